"""DeepSpeed's universal checkpoints: what a run under ZeRO goes on from with another number of processes.

DeepSpeed's own checkpoint holds each process' flat vectors and is read by as many processes only. Its tool
`ds_to_universal` takes them apart by parameter into a second folder beside the first, and a run whose config says
`"checkpoint": {"load_universal": true}` reads that one, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...compat import engine_options
from ...errors import CheckpointMismatchError

LATEST = "latest_universal"  # the file that names the universal folder


def reads_universal(engine_config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's config says that universal checkpoints are read."""
    return bool((engine_config.get("checkpoint") or {}).get("load_universal"))


def check_readable(folder: Path, processes: int, present: int, universal: bool) -> None:
    """Compare how a checkpoint lies on disk with how it is to be read.

    Args:
        folder: of the checkpoint.
        processes: how many wrote it.
        present: how many read it.
        universal: whether DeepSpeed's config says that universal checkpoints are read.

    Raises:
        CheckpointMismatchError: naming the setting and the command.
    """
    if universal and not (folder / LATEST).exists():
        raise CheckpointMismatchError(
            f"`checkpoint.load_universal` (True) of DeepSpeed's config, but `resume_from_checkpoint` ({str(folder)!r}) "
            f"has no universal checkpoint: make it with `{_command(folder)}`, or leave the setting out to resume on "
            f"{processes} processes"
        )
    if not universal and processes != present:
        made = "" if (folder / LATEST).exists() else f"run `{_command(folder)}` and "
        raise CheckpointMismatchError(
            f"`resume_from_checkpoint` ({str(folder)!r}) was written by {processes} processes, this run has {present}; "
            f'{made}set `"checkpoint": {{"load_universal": true}}` in DeepSpeed\'s config, or resume on {processes}'
        )


def check_trained(parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Refuse parameters that pruning scales and DeepSpeed leaves out of universal checkpoints.

    Args:
        parameters: what pruning acts on, by name.
        folder: of the checkpoint that is to be read.

    Raises:
        CheckpointMismatchError: where one of them is frozen.
    """
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        raise CheckpointMismatchError(
            "`checkpoint.load_universal` (True) of DeepSpeed's config: it doesn't read frozen parameters such as "
            f"{frozen[0]} from a universal checkpoint ({str(folder)!r}), and pruning had changed them; leave it out "
            "and resume on as many processes as wrote it"
        )


def _command(folder: Path) -> str:
    latest = folder / "latest"
    tag = folder / (latest.read_text(encoding="utf-8").strip() if latest.exists() else "global_step*")
    return (
        f"python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {tag} "
        f"--output_folder {tag}_universal"
    )


@contextlib.contextmanager
def reading_what_is_there(engine: Any, folder: Path) -> Iterator[None]:
    """Let DeepSpeed's engine read its own checkpoint where a folder has no universal one, as this run writes them."""
    options = engine_options(engine)
    before = options.load_universal_checkpoint
    options.load_universal_checkpoint = before and (folder / LATEST).exists()
    try:
        yield
    finally:
        options.load_universal_checkpoint = before


def repair_optimizer(base: Optimizer, folder: Path) -> None:
    """Undo what DeepSpeed 0.19 does to the base optimizer while it reads a universal checkpoint of ZeRO-3.

    It gives all parameter groups the first one's options, and all flat vectors one tensor that counts steps, so that
    each of them counts a step of all.

    Args:
        base: the optimizer around which ZeRO is.
        folder: of the checkpoint that was read.
    """
    tag = (folder / LATEST).read_text(encoding="utf-8").strip()
    # a pickle with DeepSpeed's classes, which DeepSpeed itself has just opened
    stored = torch.load(folder / tag / "zero" / "optimizer_state.pt", map_location="cpu", mmap=True, weights_only=False)
    for group, saved in zip(base.param_groups, stored["param_groups"], strict=True):
        group |= {key: value for key, value in saved.items() if key != "params"}
    for state in base.state.values():
        scalars = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and not value.dim()}
        state |= {key: value.clone() for key, value in scalars.items()}
