"""Write options.md from the fields of HessoConfig and of a recipe: `python docs/options.py [--check]`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from hesso_hf import HessoConfig
from hesso_hf.cli.recipe import RunArguments

PAGE = Path(__file__).with_name("options.md")
HEAD = """# All options

This page is written from the dataclasses by `python docs/options.py`.

## Options of HessoConfig

In a recipe these stand under `hesso:`, and on the command line each is a flag of its own name. Steps are optimizer
steps: 1 or more is a count, below 1 a share of the run.

`HessoConfig.paper(pruning_ratio)` is the paper's method alone: HESSO with CRIC, and none of what this library adds.

"""
KEYS = """
## Keys of a recipe

These stand at the top of a [recipe](cli.md#recipes), and each is a flag of `hesso-hf prune`. Beside them are `hesso`,
with the options above, and `training`, with the fields of Transformers' `TrainingArguments`.

"""


def page() -> str:
    """Return the page's text."""
    return HEAD + _table(HessoConfig) + KEYS + _table(RunArguments)


def _table(owner: type) -> str:
    lines = ["| name | default | what it is |", "| --- | --- | --- |"]
    for field in dataclasses.fields(owner):
        meaning = field.metadata["help"].replace("|", "\\|").replace("%%", "%")  # argparse's way to write it
        lines.append(f"| `{field.name}` | `{field.default!r}` | {meaning} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is out of date")
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
