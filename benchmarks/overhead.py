"""What HESSO costs: its share of a training step and its extra memory, against the same base optimizer alone.

    python benchmarks/overhead.py [--device cuda] [--scale 1b]

The bundled model is scaled up to about 100M parameters (1.2B with `--scale 1b`, for a GPU) and stepped with AdamW.
Times are medians over steps of each kind, measured inside one run; `share` is what HESSO adds, as a share of the step
without it. Memory is the peak of what HESSO allocates, tracked per tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, LlamaForCausalLM

from hesso_hf import HessoConfig, HessoOptimizer
from hesso_hf.bundled import bundled_model_path
from hesso_hf.cli.allocations import Allocations
from hesso_hf.export.report import versions
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.pruning.schedule import Schedule

RESULTS = Path(__file__).parent / "results" / "overhead.json"
SCALES = {
    "tiny": {},
    "100m": {
        "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 6, "head_dim": 64, "vocab_size": 16384,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    },
}  # fmt: skip


@dataclass
class Times:
    """Seconds of whole steps and of HESSO's part of them, by kind of step."""

    step: dict[str, list[float]] = field(default_factory=dict)
    hesso: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, step: float, hesso: float) -> None:
        self.step.setdefault(kind, []).append(step)
        self.hesso.setdefault(kind, []).append(hesso)

    def summary(self) -> dict[str, Any]:
        """Medians; `share` of the step that is left when HESSO's part is taken off."""
        found = {}
        for kind, steps in self.step.items():
            plain = median(step - own for step, own in zip(steps, self.hesso[kind], strict=True))
            own = median(self.hesso[kind])
            found[kind] = {
                "step_seconds": median(steps),
                "hesso_seconds": own,
                "share": own / plain,
                "steps": len(steps),
            }
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", choices=list(SCALES), default="100m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2, help="steps of each kind")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(bundled_model_path())
    for name, value in SCALES[options.scale].items():
        setattr(config, name, value)
    with device:
        model = LlamaForCausalLM(config)
    batch = torch.randint(0, config.vocab_size, (options.batch_size, options.length), device=device)
    results = {}
    for structures in (["attention_heads", "mlp_channels"], ["attention_heads", "mlp_channels", "embedding_channels"]):
        results[" + ".join(structures)] = measure(model, batch, structures, options.repeats)
        print(json.dumps(results, indent=1), flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    entry = {
        "device": name,
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "tokens_per_step": batch.numel(),
        "versions": versions(),
        "results": results,
    }
    stored = json.loads(options.output.read_text()) if options.output.exists() else {}
    stored[f"{name} {options.scale}"] = entry
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(model: LlamaForCausalLM, batch: torch.Tensor, structures: list[str], repeats: int) -> dict[str, Any]:
    """Time each kind of step in one run, then track HESSO's memory in a second, shorter one."""
    times, tracker = Times(), Allocations()

    def timed(call: Callable[[], None]) -> float:
        started = _now(batch.device)
        call()
        return _now(batch.device) - started

    def tracked(call: Callable[[], None]) -> float:
        with tracker:
            call()
        return 0.0

    _run(model, batch, structures, repeats, timed, times)
    snapshot = _run_cric(model, batch, structures, repeats, timed, times)
    _run(model, batch[:1, :16], structures, 1, tracked, Times(), tracker)  # HESSO's memory doesn't know the batch
    bytes_of_parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "steps": times.summary(),
        "extra_bytes_peak": tracker.peak,
        "extra_memory_share_of_parameters": tracker.peak / bytes_of_parameters,
        "cric_snapshot_share_of_parameters_and_state": snapshot,
    }


def _run(
    model: LlamaForCausalLM,
    batch: torch.Tensor,
    structures: list[str],
    repeats: int,
    part: Callable[[Callable[[], None]], float],
    times: Times,
    tracker: Allocations | None = None,
) -> None:
    """Step through warm-up, `repeats` periods of three steps, and recovery; `part` runs each of HESSO's parts."""
    schedule = Schedule(repeats + 1, 3 * repeats, repeats, 10**6)
    plan = _plan(model, structures)
    base = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with tracker or contextlib.nullcontext():
        optimizer = HessoOptimizer(base, plan.process(schedule))
    for step in range(schedule.end + repeats):
        position = schedule.period_step(step)
        kind = schedule.phase(step) if position is None else ("scoring" if position.t == 0 else "shrinking")
        whole, scoring, shrinking = _step(model, batch, optimizer, part)
        if step:  # the first step makes the base optimizer's state
            times.add(kind, whole, scoring + shrinking)


def _run_cric(
    model: LlamaForCausalLM,
    batch: torch.Tensor,
    structures: list[str],
    repeats: int,
    part: Callable[[Callable[[], None]], float],
    times: Times,
) -> float:
    """Step through one CRIC cycle; return the size of its snapshot as a share of parameters and optimizer state."""
    schedule = Schedule(2, 1, 1, 10**6, cycle_steps=repeats + 2, cycles=1)
    plan = _plan(model, structures, cric=True)
    optimizer = HessoOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-5), plan.process(schedule))
    share = 0.0
    for step in range(schedule.sampling_end):
        position = schedule.sampling_step(step)
        whole, scoring, shrinking = _step(model, batch, optimizer, part)
        if position is not None:
            kind = "snapshot" if position.t == 0 else ("restore" if position.last else "sampling")
            times.add(kind, whole, scoring + shrinking)
            if kind == "sampling":
                times.add("score of a sample", whole - shrinking, scoring)
        snapshot = optimizer.process.on_trial
        if snapshot is not None:
            held = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
            copies = snapshot.state_dict()
            share = _num_bytes([copies["weights"], copies["state"]]) / _num_bytes(held)
    return share


def _num_bytes(values: Any) -> int:
    """Return the size of the tensors in lists and dictionaries."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _plan(model: LlamaForCausalLM, structures: list[str], cric: bool = False) -> PruningPlan:
    options = {"structures": structures, "calibration_examples": 0, "saliency_batches": 1, "cric": cric}
    return PruningPlan.prepare(model, HessoConfig(pruning_ratio=0.4, **options))


def _step(
    model: LlamaForCausalLM,
    batch: torch.Tensor,
    optimizer: HessoOptimizer,
    part: Callable[[Callable[[], None]], float],
) -> tuple[float, float, float]:
    """Make one training step; return its seconds, those of scoring and those of shrinking."""
    process, base = optimizer.process, optimizer.base
    started = _now(batch.device)
    optimizer.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))  # as Trainer does in every step
    scoring = part(process.observe_gradients) + part(lambda: process.before_step(base))
    base.step()
    shrinking = part(lambda: process.after_step(base))
    return _now(batch.device) - started, scoring, shrinking


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
