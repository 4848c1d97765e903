"""What a plan says before the first step: a table of sizes, the steps, and what is expected of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..budget.ladder import rung_folder
from ..hf_models.resize import resized_config
from ..hf_models.serving import not_served_as_they_are
from .schedule import Schedule

if TYPE_CHECKING:
    from .plan import PruningPlan

PHASES = {"warmup": "warm-up", "sampling": "CRIC", "pruning": "pruning", "recovery": "recovery"}


def preview(plan: PruningPlan, schedule: Schedule) -> str:
    """Describe a plan for people, in lines that fit a terminal."""
    target = plan.target
    lines = [
        f"HESSO: {target.parameters_before:,} -> {target.parameters_after:,} parameters "
        f"({target.parameter_ratio:.1%} removed)"
    ]
    full, kept_units = plan.parameters.full, target.kept_units
    saved = {name: full - float(plan.parameters({name: kept})) for name, kept in kept_units.items()}
    rows, whole = [["structure", "units per layer", "go", "of the cut", "sizes"]], []
    for name, units in target.num_units.items():
        kept = kept_units[name]
        if kept == units:
            whole.append(f"{name} ({units:,} units per layer)")
            continue
        share, sizes = saved[name] / (sum(saved.values()) or 1), plan.sizes_of(name)
        rows.append([name, f"{units:,} -> {kept:,}", f"{1 - kept / units:.0%}", f"{share:.0%}", sizes[0]])
        rows += [["", "", "", "", size] for size in sizes[1:]]
    if len(rows) > 1:
        lines += _columns(rows)
    if whole:
        lines.append(f"stays whole: {', '.join(whole)}")
    lines.append(_steps(schedule))
    for share, rung, step in zip(plan.config.rungs, plan.rungs, schedule.rung_saves, strict=True):
        lines.append(f"on the way: {rung.parameters_after:,} parameters after step {step}, in {rung_folder(share)}")
    if plan.expected_rise is not None:
        lines.append(f"expected before any recovery: +{plan.expected_rise:.2f} nats per token")
    if plan.config.layer_widths == "uniform":
        small = resized_config(plan.model.config, target.sizes)
        before = {size: n for name, units in target.num_units.items()
                  for size, n in plan.groups.structures[name].config_sizes(units).items()}  # fmt: skip
        lines += [f"to serve it: {said}" for said in not_served_as_they_are(small, before)]
    return "\n  ".join(lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[cell.ljust(width) if index in (0, 4) else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))] for row in rows]  # fmt: skip
    return ["  ".join(row).rstrip() for row in aligned]


def _steps(schedule: Schedule) -> str:
    """Return the phases with their steps, counted from 1: `steps: warm-up 1, pruning 2 to 4 in 3 periods, ...`."""
    spans = []
    for name, (before, last) in schedule.phases.items():
        span = f"{before + 1} to {last}" if last > before + 1 else f"{last}"
        periods = f" in {len(schedule.periods)} periods" if name == "pruning" and len(schedule.periods) > 1 else ""
        spans.append(f"{PHASES[name]} {span}{periods}")
    return f"steps: {', '.join(spans)}"
