"""Streams: the powers of c that keep a model exact when channels that norms run over are removed.

With D channels cut to d and c = sqrt(d / D), a writer to the stream takes c and what reads the raw stream 1/c, mostly a
norm's weight. Which is which is guessed from the model's structure; the proof tries the guess and then what deviates
from it in one, two or three places.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .groups import AxisName
from .norms import OTHER, VectorRole, vector_role
from .probe import AxisMap, ParameterInfo

DEVIATIONS, MOST_CANDIDATES = 3, 600
Side = Literal["in", "out", "either"]


@dataclass(frozen=True)
class StreamAxis:
    """One pattern of parameters on the stream, seen at its first parameter.

    Attributes:
        side: for a matrix, whether the stream is on its input or its output side.
        vector: for a vector, what it does.
    """

    pattern: str
    dim: int
    info: ParameterInfo
    side: Side
    vector: VectorRole

    @property
    def reader_group(self) -> tuple[str, str]:
        """Readers in one block read the same thing: the kind of layer and the name of the module that holds them."""
        return self.info.kind, self.info.module.rpartition(".")[0].rpartition(".")[2]


def stream_axes(model: PreTrainedModel, axis_map: AxisMap, axes: list[AxisName]) -> list[StreamAxis]:
    """Describe the axes along the residual stream, one for each pattern."""
    modules = dict(model.named_modules())
    found: dict[AxisName, StreamAxis] = {}
    for name, dim in axes:
        info = axis_map.parameters[name]
        if (info.pattern, dim) not in found:
            module = modules[info.module]
            found[info.pattern, dim] = StreamAxis(
                info.pattern, dim, info, _side(info, module, dim), vector_role(info, module)
            )
    return list(found.values())


def _side(info: ParameterInfo, module: nn.Module, dim: int) -> Side:
    if info.role in ("norm", "bias", "other"):
        return "out"
    if info.role == "embedding":
        return "out"
    if info.role == "output":
        return "in"
    if isinstance(module, Conv1D):
        return "out" if dim == 1 else "in"
    if isinstance(module, nn.Linear):
        return "out" if dim == 0 else "in"
    return "either"


def writing_modules(axes: list[StreamAxis]) -> set[str]:
    """Return the names of the blocks' modules that may write to the stream."""
    return {a.info.module for a in axes if a.info.role == "matrix" and a.side != "in" and a.info.layer}


def written_patterns(axes: list[StreamAxis], powers: Mapping[str, int]) -> frozenset[str]:
    """Return the patterns of what is added to the stream: embeddings, writers and their biases."""
    roles = ("embedding", "matrix", "bias")
    found = {a.pattern for a in axes if a.info.role in roles and a.side != "in"}
    return frozenset(found | {a.pattern for a in axes if a.vector == OTHER and powers.get(a.pattern) == 1})


def stream_powers(axes: list[StreamAxis], after: set[str], tied: bool, centred: bool) -> Iterator[dict[str, int]]:
    """Yield powers of c for the patterns on the stream, the likeliest first.

    Args:
        after: modules whose input is what a block writes, before it reaches the stream.
        tied: whether the embedding is the output matrix too.
        centred: whether the stream's mean is kept at zero, which a norm's output can't be.
    """
    scales = [a for a in axes if a.vector.kind == "scale"]
    normed = {a.info.kind for a in scales if a.info.layer and a.info.module not in after}
    offsets = {a.info.module: a.pattern for a in axes if a.vector.kind == "offset"}
    choices: list[tuple[tuple[str, ...], tuple[int, ...]]] = []  # patterns, powers from the likeliest to the least
    readers: dict[tuple[str, str], list[str]] = {}
    writers: dict[str, list[str]] = {}
    final = any(not a.info.layer for a in scales)
    for axis in axes:
        if axis.vector.kind == "scale":
            usual: tuple[int, ...] = (0, -1) if axis.info.module in after else (-1, 0)
            if not axis.info.layer:
                usual = (-2, -1, 0, -3) if tied else (-1, -2, 0, -3)
            choices.append(((axis.pattern,), usual))
        elif axis.vector.kind == "offset":
            continue
        elif axis.info.role == "embedding":
            choices.append(((axis.pattern,), (1, 0)))
        elif axis.info.role == "output":
            choices.append(((axis.pattern,), (0, -1) if final else (-1, 0)))
        elif axis.info.role in ("norm", "other"):
            choices.append(((axis.pattern,), (0, 1, -1)))
        elif axis.side == "in":
            readers.setdefault(axis.reader_group, []).append(axis.pattern)
        elif axis.side == "either":
            choices.append(((axis.pattern,), _either(axis)))
        else:
            writers.setdefault(axis.info.module.removeprefix(f"{axis.info.layer}."), []).append(axis.pattern)
    choices += [(tuple(group), (0, -1) if kind in normed else (-1, 0)) for (kind, _), group in readers.items()]
    choices += [(tuple(group), (1, 0)) for group in writers.values()]
    modules = {axis.pattern: axis.info.module for axis in scales}
    inside = {axis.pattern for axis in scales if axis.info.layer} | {p for group in readers.values() for p in group}
    fused = {axis.pattern for axis in axes if axis.side == "either"}
    swapped = [(p, found[::-1] if p[0] in inside else _raw(found) if p[0] in fused else found) for p, found in choices]
    # the second guess: the stream is the norms' output, which the blocks read as it is
    for powers in itertools.chain(_deviating(choices), () if centred else _deviating(swapped)):
        for pattern, module in modules.items():
            if module in offsets:  # the norm's output is c times too large where its weight isn't divided by c
                powers[offsets[module]] = powers[pattern] + 1
        yield powers


def _either(axis: StreamAxis) -> tuple[int, ...]:
    """A matrix without a module of its own (fused experts): mostly, the last dimension is the input's."""
    return (0, 1, -1) if axis.dim == len(axis.info.shape) - 1 else (1, 0, -1)


def _raw(powers: tuple[int, ...]) -> tuple[int, ...]:
    """Put the power of what reads the raw stream first, where that of what reads a norm's output was."""
    return (-1, 0, 1) if powers[0] == 0 else powers


def _deviating(choices: list[tuple[tuple[str, ...], tuple[int, ...]]]) -> Iterator[dict[str, int]]:
    """Yield assignments by the number of places in which they deviate from the first choices."""
    usual = {pattern: powers[0] for patterns, powers in choices for pattern in patterns}
    count = 0
    for deviations in range(DEVIATIONS + 1):
        for places in itertools.combinations(choices, deviations):
            for powers in itertools.product(*(options[1:] for _, options in places)):
                changed = {p: power for (patterns, _), power in zip(places, powers, strict=True) for p in patterns}
                yield usual | changed
                count += 1
                if count == MOST_CANDIDATES:
                    return


def inner_powers(axes: list[StreamAxis]) -> list[dict[str, int]]:
    """Powers of c inside a block: none, or, where a norm runs over all units (q_norm over heads), 1/c on it."""
    norms = [axis.pattern for axis in axes if axis.info.role == "norm"]
    if not norms:
        return [{}]
    writers = [axis.pattern for axis in axes if axis.info.role != "norm" and axis.side != "in"]
    choices: list[dict[str, int]] = [{}]
    for writes in itertools.product((1, 0), repeat=min(len(writers), 5)):
        choices.append(dict.fromkeys(norms, -1) | dict(zip(writers, writes, strict=False)))
    return choices
