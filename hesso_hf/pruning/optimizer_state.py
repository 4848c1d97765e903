"""What an optimizer keeps of each parameter, to be cut as the parameter is: in full precision, or in few bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, Optimizer, RMSprop
from torch.optim import Adafactor as TorchAdafactor
from transformers import Adafactor

from ..structures.cut import Cuts
from ..structures.groups import Axis

# The state of one value an element, by optimizer, with the power of the gradient that it goes by.
_OF_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
STATE_POWERS: Mapping[type[Optimizer], Mapping[str, int]] = {
    Adam: _OF_ADAM,
    AdamW: _OF_ADAM,
    SGD: {"momentum_buffer": 1},
    RMSprop: {"square_avg": 2, "grad_avg": 1, "momentum_buffer": 0},
    Adagrad: {"sum": 2},
    Muon: {"momentum_buffer": 1},
    Adafactor: {"exp_avg": 0, "exp_avg_sq": 2, "exp_avg_sq_row": 2, "exp_avg_sq_col": 2},
    TorchAdafactor: {"variance": 2, "row_var": 2, "col_var": 2},
}
# The same of bitsandbytes' optimizers, by the name that its kernels know one by.
BITSANDBYTES_POWERS: Mapping[str, Mapping[str, int]] = {
    "adam": {"state1": 1, "state2": 2},
    "lion": {"state1": 1},
    "momentum": {"state1": 1},
    "rmsprop": {"state1": 2},
    "adagrad": {"state1": 2},
}
# What is a mean over a dimension, the last or the one before.
MEANS = {"exp_avg_sq_row": -1, "row_var": -1, "exp_avg_sq_col": -2, "col_var": -2}
_BLOCK = 256  # elements that have one scale in bitsandbytes' state


def state_powers(base: Optimizer) -> Mapping[str, int]:
    """Return the state of one value an element that an optimizer keeps, with the power of the gradient it goes by.

    It is empty for an optimizer whose state isn't known. Known beside torch's and Transformers' are torchao's Adam and
    AdamW in 8 and 4 bits and fp8, and those of bitsandbytes that aren't paged.
    """
    kind, package = type(base), type(base).__module__.partition(".")[0]
    if package == "torchao" and kind.__name__.startswith("Adam"):
        return _OF_ADAM
    if package == "bitsandbytes" and not getattr(base, "is_paged", False):
        return BITSANDBYTES_POWERS.get(getattr(base, "optimizer_name", ""), {})
    return STATE_POWERS.get(kind, {})


def why_not_cut_state(base: Optimizer) -> str:
    """Return why an optimizer's state can't be cut, "" where it can."""
    if state_powers(base):
        return ""
    if getattr(base, "is_paged", False):
        return f"the state of {_name(base)} is paged: its memory is handed out once; take the optimizer that isn't"
    known = ", ".join(kind.__name__ for kind in STATE_POWERS)
    return f"the state of {_name(base)} can't be cut ({known} of torch's can, and those of torchao and bitsandbytes)"


def why_not_one_of(base: Optimizer, optimizers: Iterable[type[Optimizer]]) -> str:
    """Return that the state of none but these can be cut, "" where it is one of them."""
    if type(base) in optimizers:
        return ""
    known = ", ".join(kind.__name__ for kind in optimizers)
    return f"the state of {_name(base)} can't be cut ({known} of torch's can)"


def _name(base: Optimizer) -> str:
    return f"{type(base).__module__}.{type(base).__name__}"


def numbers_of(state: Mapping[str, Any], key: str) -> torch.Tensor:
    """Return what an optimizer keeps of a parameter under a key as numbers, one an element where it is in few bits."""
    values: Any = state[key]
    if hasattr(values, "codes"):  # torchao's
        return values.dequantize()  # type: ignore[no-any-return]
    if values.dtype == torch.uint8:
        from bitsandbytes.functional import dequantize_blockwise

        scales, code = _beside(key)
        return dequantize_blockwise(values, absmax=state[scales], code=state[code], blocksize=_BLOCK)  # type: ignore[no-any-return]
    return values  # type: ignore[no-any-return]


def put_numbers(base: Any, parameter: nn.Parameter, state: dict[str, Any], key: str, numbers: torch.Tensor) -> None:
    """Have an optimizer keep other numbers of a parameter under a key, in as few bits as it keeps those of its size.

    Args:
        parameter: of which they are, as it is now.
        numbers: of its shape.
    """
    old: Any = state[key]
    if hasattr(old, "codes"):
        state[key] = base._new_buffer(parameter, key == "exp_avg")  # in full precision where blocks don't fit
        state[key].copy_(numbers)
    elif old.dtype == torch.uint8:
        from bitsandbytes.functional import quantize_blockwise

        scales, code = _beside(key)
        state[key], found = quantize_blockwise(numbers.contiguous(), code=state[code], blocksize=_BLOCK, nested=False)
        state[scales] = found.absmax
    else:
        state[key] = numbers


def _beside(key: str) -> tuple[str, str]:
    """Return where bitsandbytes keeps the scales of the blocks, and what the codes stand for."""
    number = key.removeprefix("state")
    return f"absmax{number}", f"qmap{number}"


def factor_of(cuts: Cuts) -> float:
    """Return the factor on a weight that is cut, by whose inverse its gradient is scaled."""
    return math.prod(math.sqrt(len(units) / total) ** axis.power for axis, units, total in cuts)


def cut_values(values: torch.Tensor, cuts: Cuts, dims: int, mean: int | None = None) -> torch.Tensor:
    """Cut what an optimizer keeps of a parameter with so many dimensions, without a factor.

    Args:
        mean: the dimension that it is the mean over, None where it has all.
    """
    for axis, units, total in cuts:
        values = _cut_values(values, axis, units, total, dims, mean)
    return values


def _cut_values(
    values: torch.Tensor, axis: Axis, units: torch.Tensor, total: int, dims: int, mean: int | None
) -> torch.Tensor:
    """Cut what an optimizer keeps of a parameter with so many dimensions.

    Args:
        mean: the dimension that it is the mean over, in which pruned units were zeros; None where it has all.
    """
    indices = axis.layout.indices(units, total).to(values.device)
    if mean is None or axis.dim != dims + mean:
        before = mean is not None and values.dim() < dims and axis.dim > dims + mean
        return values.index_select(axis.dim - before, indices)
    return values * (axis.layout.size(total) / len(indices))
