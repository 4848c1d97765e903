"""Filling: a forward pass of a model without weights, which reads each layer's when they are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..structures.cut import Where
from ..structures.uneven_layers import layer_of

Rows = Callable[[Where], torch.Tensor]  # what reads some rows of one tensor
PIECE = 2**22  # bytes of a tensor that are worked on at a time; about what fits a processor's cache
AT_ONCE = 2**28  # bytes of a matrix that is read whole for one product

_ASKED = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.stride, torch.Tensor.is_floating_point}


def stretches(shape: torch.Size, itemsize: int) -> Iterator[Where]:
    """Yield the rows of a tensor, in runs of at most `PIECE` bytes (one row at least)."""
    if not shape:
        yield ...
        return
    rows = max(1, PIECE // max(1, math.prod(shape[1:]) * itemsize))
    yield from (slice(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows))


def filled(like: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return a tensor of the shape and dtype of another, filled a stretch after the other."""
    made = torch.empty(like.shape, dtype=like.dtype)
    for where in stretches(like.shape, made.element_size()):
        made[where] = rows(where)
    return made


class Filling(TorchFunctionMode):
    """While it is entered, a model's parameters on the meta device stand for what is read where one is used.

    Those of one layer are kept until one of another layer is used. Of an embedding only the rows that are looked up
    are read, and a large matrix is multiplied by in parts.

    Args:
        model: its parameters on the meta device, its buffers on the CPU.
        open_: gives what reads a parameter by name, or its first one where it is tied.
    """

    def __init__(self, model: nn.Module, open_: Callable[[str], Rows]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._open, self._layer, self._read = open_, "", dict[int, torch.Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASKED:
            return func(*args, **kwargs)
        if func.__name__ == "__get__" and id(args[0]) in self._names:
            found = func(*args)
            if not isinstance(found, torch.Tensor):
                return torch.device("cpu") if isinstance(found, torch.device) else found
        if func is F.embedding and self._is_empty(args[1]):
            return self._looked_up(*args)
        if func is F.linear and self._is_empty(args[1]) and args[1].numel() * args[1].element_size() > AT_ONCE:
            return self._multiplied(*args, **kwargs)
        return func(*map(self._fill, args), **{name: self._fill(value) for name, value in kwargs.items()})

    def __exit__(self, *raised: Any) -> None:
        self._read.clear()
        super().__exit__(*raised)

    def _is_empty(self, value: Any) -> bool:
        return id(value) in self._names

    def _fill(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(self._fill, value)) if any(map(self._holds, value)) else value
        if not self._is_empty(value):
            return value
        name, key = self._names[id(value)], id(value)
        self._enter(name)
        if key not in self._read:
            self._read[key] = filled(value, self._open(name))
        return self._read[key]

    def _enter(self, name: str) -> None:
        """Let the weights of another layer go."""
        layer = layer_of(name) or name
        if layer != self._layer:
            self._read.clear()
            self._layer = layer

    def _holds(self, value: Any) -> bool:
        return any(map(self._holds, value)) if isinstance(value, list | tuple) else self._is_empty(value)

    def _looked_up(self, ids: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
        name = self._names[id(weight)]
        self._enter(name)
        wanted, places = ids.unique(return_inverse=True)
        return self._open(name)(wanted).to(weight.dtype)[places]

    def _multiplied(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        name, added = self._names[id(weight)], self._fill(bias)
        self._enter(name)
        rows, parts, count = self._open(name), [], max(1, AT_ONCE // 4 // weight[0].nbytes)
        for first in range(0, len(weight), count):

            def further(where: Any, first: int = first) -> torch.Tensor:
                return rows(slice(first + where.start, first + where.stop))

            part = filled(weight[first : first + count], further)
            parts.append(F.linear(x, part, None if added is None else added[first : first + count]))
        return torch.cat(parts, -1)
