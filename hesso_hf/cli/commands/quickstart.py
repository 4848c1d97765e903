"""`hesso-hf quickstart`: prune the bundled model by half and compare, offline."""

from __future__ import annotations

import argparse

from ...config import HessoConfig
from ..inputs import check_text_file, model_source
from ..printing import print_table

HELP = "prune the bundled model by half and compare, offline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--model", help="folder or Hub id instead of the bundled model")
    parser.add_argument("--dataset", default="python-docs", help="text to train on")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--steps", type=int, default=200, help="steps of each of the two runs")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the parameters to remove")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", default="quickstart", help="folder for the smaller models and results.json")


def run(arguments: argparse.Namespace) -> int:
    """Train, compare and print."""
    HessoConfig(pruning_ratio=arguments.ratio)  # refuses what isn't a share
    check_text_file(arguments.dataset)
    if arguments.model is not None:
        model_source(arguments.model)
    from ..quickstart import QuickstartOptions, run_quickstart

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "command")}
    rows, samples = run_quickstart(QuickstartOptions(**options))
    print_table("before and after", ["", *[row.name for row in rows]], [
        ["parameters", *[f"{row.parameters:,}" for row in rows]],
        ["size on disk", *[f"{row.bytes / 1e6:.2f} MB" for row in rows]],
        ["held-out perplexity", *[f"{row.perplexity:.2f}" for row in rows]],
        ["tokens/s (forward)", *[f"{row.tokens_per_second:,.0f}" for row in rows]],
    ])  # fmt: skip
    for name, sample in samples.items():
        print(f"\n{name}:\n  " + sample.strip().replace("\n", "\n  "))
    print(f"\nsmaller model: {arguments.output}/hesso, loads with plain AutoModelForCausalLM.from_pretrained")
    return 0
