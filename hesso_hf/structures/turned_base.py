"""A frozen base that isn't as it is on disk: what a checkpoint that holds adapters only has to hold as well.

The base as it is on disk is turned anew when training goes on and for an export, and gets its healed matrices; the
adapters of the checkpoint lie in the new basis already.
Legend: D channels of the stream.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..errors import UnsupportedStructureError
from .lora import parameters_of
from .proof.turn import turn_of
from .turn import StreamTurn

BASIS_NAME = "stream_basis.safetensors"
HEALED_NAME = "healed_base.safetensors"
_ROTATION, _GAIN = "rotation", "last_gain"


def turn_tensors(rotation: torch.Tensor, last_gain: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return what a turn is made anew from: Q, shape (D, D), fp64, and a tied model's uniform last gain, shape (D,)."""
    return {_ROTATION: rotation} | ({} if last_gain is None else {_GAIN: last_gain.detach().cpu().clone()})


def write_turn(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write it into a checkpoint."""
    save_file(dict(tensors), folder / BASIS_NAME)


def read_turn(folder: Path) -> dict[str, torch.Tensor]:
    """Read what `write_turn` wrote; nothing where the base stays in its given basis."""
    path = folder / BASIS_NAME
    return load_file(path) if path.exists() else {}


@torch.no_grad()
def turn_base_(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], trained: Container[str] = ()) -> None:
    """Turn the base of a model as it was turned before; adapters stay as they are, and what was trained beside them.

    Args:
        tensors: as `turn_tensors` returns them; nothing is done where there are none.
        trained: names of parameters that come from the checkpoint.
    """
    if not tensors:
        return
    turn, _ = turn_of(model)
    parameters = {
        name: parameter.detach().clone() if name in trained else parameter
        for name, parameter in parameters_of(model).items()
    }
    if turn.tied_norm is not None:
        parameters[turn.tied_norm.scale].copy_(tensors[_GAIN])
    turn.turn_(parameters, tensors[_ROTATION])


def write_healed(folder: Path, matrices: Mapping[str, torch.Tensor]) -> None:
    """Write the frozen matrices that were refitted into a checkpoint."""
    save_file({name: matrix.detach().cpu().contiguous() for name, matrix in matrices.items()}, folder / HEALED_NAME)


@torch.no_grad()
def heal_base_(parameters: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Put what `write_healed` wrote, if anything, into a model's parameters, by name."""
    path = folder / HEALED_NAME
    for name, matrix in load_file(path).items() if path.exists() else ():
        parameters[name].copy_(matrix)


def check_trained(turn: StreamTurn, parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse norms that are trained beside adapters, whose first gains only the base on disk has.

    Raises:
        UnsupportedStructureError: naming the parameter.
    """
    for norm in (*turn.norms, *([turn.tied_norm] if turn.tied_norm else [])):
        for name in filter(None, (norm.scale, norm.offset)):
            if parameters[name].requires_grad:
                raise UnsupportedStructureError(
                    f"{name} is trained beside the adapter, so the base on disk can't be turned as it was again; leave "
                    "it out of `peft_config.modules_to_save` and `peft_config.bias`"
                )
