"""`hesso-hf inspect`: what can be pruned in a model, from its config alone."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ...config import HessoConfig
from ..inputs import model_source
from ..printing import print_table

HELP = "what can be pruned in a model, from its config alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("model", help="Hub id, folder or config.json")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.2, 0.3, 0.5], help="shares to find sizes for")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust-remote-code", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Inspect, and print a table or JSON."""
    model = model_source(arguments.model)
    for ratio in arguments.ratio:
        HessoConfig(pruning_ratio=ratio)  # refuses what isn't a share
    from ...budget import inspect_model

    found = inspect_model(model, tuple(arguments.ratio), arguments.trust_remote_code)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    rows = []
    for name, item in found.structures.items():
        rows.append([
            name, item.status.replace("_", " "), str(item.units or "-"), str(item.layers or "-"),
            f"{item.parameters_per_unit:,}" if item.status == "proved" else "-",
            f"{item.relative_error:.0e}" if item.relative_error is not None else "-",
        ])  # fmt: skip
    title = f"{found.model_class}, {found.parameters:,} parameters"
    print_table(title, ["structure", "status", "units", "layers", "parameters\na unit", "error"], rows)
    for name, item in found.structures.items():
        if item.status != "proved":
            print(f"{name}: {item.reason.removeprefix(f'{name}: ')}")
    print("\nsizes for an even split between the structures (a training run measures the split on its data):")
    for ratio, option in found.feasible.items():
        print(f"ratio {ratio}: {option.get('reason') or _sizes_line(option)}")
    return 0


def _sizes_line(option: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in option["sizes"].items())
    return f"{option['parameters']:,} parameters ({option['ratio']:.1%} removed): {sizes}"
