"""`hesso-hf export`: the smaller model of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import HessoError
from ..printing import print_report

HELP = "write the smaller model of a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("checkpoint", help="checkpoint-* folder of a run whose pruning has finished")
    parser.add_argument("output", help="folder for the smaller model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="stored dtype")
    parser.add_argument("--trust-pickles", action="store_true", help="open DeepSpeed's files, which can run code")


def run(arguments: argparse.Namespace) -> int:
    """Export, and print the report."""
    if not Path(arguments.checkpoint).is_dir():
        raise HessoError(
            f"`checkpoint` ({arguments.checkpoint!r}) is no folder; give a checkpoint-* folder that training wrote"
        )
    from ...export import export_pruned

    report = export_pruned(
        arguments.checkpoint, arguments.output, dtype=arguments.dtype, trust_pickles=arguments.trust_pickles
    )
    print_report(report.to_dict(), arguments.output)
    return 0
