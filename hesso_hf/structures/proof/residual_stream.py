"""Streams: the powers of c that keep a model exact when channels that norms run over are removed.

With D channels cut to d and c = sqrt(d / D), a writer to the stream takes c and what reads the raw stream 1/c, mostly a
norm's weight. Which is which is guessed from the model's structure; the proof tries the guess and then what deviates
from it in one, two or three places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..groups import AxisName
from ..shape_probe import AxisMap, ParameterInfo
from .norms import OTHER, VectorRole, vector_role

DEVIATIONS, MOST_CANDIDATES = 3, 600
Side = Literal["in", "out", "either"]
Place = list[dict[str, int]]  # alternatives: pattern to power, the likeliest first


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
    def holder(self) -> str:
        """The name of the module that holds the one that owns it."""
        return self.info.module.rpartition(".")[0]

    @property
    def reader_group(self) -> str:
        """Readers in one block read the same thing: the name of the module that holds them, "" for a layer's own."""
        return "" if self.holder == self.info.layer else self.holder.rpartition(".")[2]


def tail_of(axis: StreamAxis) -> str:
    """Return the name within the layer of the module that owns an axis' parameter."""
    return axis.info.module.removeprefix(f"{axis.info.layer}.")


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


def stream_powers(
    axes: list[StreamAxis], after: set[str], tied: bool, centred: bool, more: Callable[[], list[Place]] = list
) -> Iterator[dict[str, int]]:
    """Yield powers of c for the patterns on the stream, the likeliest first.

    Args:
        after: modules whose input is what a block writes, before it reaches the stream.
        tied: whether the embedding is the output matrix too.
        centred: whether the stream's mean is kept at zero, which a norm's output can't be.
        more: further places that may deviate, asked for where the first guess fails.
    """
    offsets = {a.info.module: a.pattern for a in axes if a.vector.kind == "offset"}
    modules = {a.pattern: a.info.module for a in axes if a.vector.kind == "scale"}
    # the second guess: the stream is the norms' output, which the blocks read as it is
    for raw in (False,) if centred else (False, True):
        for powers in _deviating([_ends(axes, tied), *_places(axes, after, raw)], more):
            for pattern, module in modules.items():
                if module in offsets:  # the norm's output is c times too large where its weight isn't divided by c
                    powers[offsets[module]] = powers[pattern] + 1
            yield powers


def _ends(axes: list[StreamAxis], tied: bool) -> Place:
    """What comes in and out: the embedding, the last norm and the output matrix, the likeliest powers first."""
    first = [a.pattern for a in axes if a.info.role == "embedding"][:1]
    finals = [a.pattern for a in axes if a.vector.kind == "scale" and not a.info.layer and not _of_embedding(a, axes)]
    outputs = [a.pattern for a in axes if a.info.role == "output"]
    options = [(1, -2, 0), (0, -1, 0), (1, -1, 0), (0, -2, 0), (0, 0, 0), (1, 0, 0), (1, -3, 0)]
    if not tied:
        options = [(1, -1, 0), (0, -1, 0), (1, -2, 0), (1, 0, 0), (0, 0, 0)]
    if not finals and outputs:
        options = [(1, 0, -1), (1, 0, 0), (0, 0, -1), (0, 0, 0)]
    return [
        dict.fromkeys(first, embedding) | dict.fromkeys(finals, final) | dict.fromkeys(outputs, output)
        for embedding, final, output in options
    ]


def _places(axes: list[StreamAxis], after: set[str], raw: bool) -> list[Place]:
    """List what else may take one power or another; alike in all kinds of layers where the guess is the same."""
    scales = [a for a in axes if a.vector.kind == "scale" and a.info.layer]
    normed_modules = {a.info.module for a in axes if a.vector.kind == "scale"}
    normed = {a.info.kind for a in scales if a.info.module not in after}
    embeddings = [a.pattern for a in axes if a.info.role == "embedding"]
    mixers = {a.holder for a in axes if a.vector.kind == "scale"} - {a.info.layer for a in axes}
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}

    def place(name: str, options: tuple[int, ...], pattern: str) -> None:
        found.setdefault((name, options), []).append(pattern)

    for axis in axes:
        tail = tail_of(axis)
        if axis.vector.kind == "scale":
            usual = 0 if raw or axis.info.module in after else -1
            if axis.info.layer:
                place(tail, (usual, -1 - usual), axis.pattern)
            elif _of_embedding(axis, axes):  # what it gives out is the stream
                place(tail, (0, -1), axis.pattern)
        elif (axis.vector.kind == "offset" and axis.info.module in normed_modules) or axis.info.role == "output":
            continue
        elif axis.vector.kind == "offset":  # of a block that isn't a norm: it is written to the stream
            place(f"{tail} {axis.pattern}", (1, 0), axis.pattern)
        elif axis.info.role == "embedding":
            if axis.pattern != embeddings[0]:
                place(tail, (1, 0), axis.pattern)
        elif axis.info.role in ("norm", "other"):
            added = axis.pattern.endswith("bias")
            place(f"{tail} {axis.pattern}", (1, 0, -1) if added else (0, 1, -1), axis.pattern)
        elif axis.side == "in":
            usual = -1 if raw or axis.info.kind not in normed else 0
            place(axis.reader_group, (usual, -1 - usual), axis.pattern)
        elif axis.side == "either":
            options = _either(axis)
            name = axis.pattern.removeprefix(f"{axis.info.kind}.")
            place(name, (-1, 0, 1) if raw and options[0] == 0 else options, axis.pattern)
        else:  # beside a norm of the stream it may be a gate on what the norm gives, as in hyper-connections
            place(f"{tail} writes", (0, 1) if axis.holder in mixers else (1, 0), axis.pattern)
    return [[dict.fromkeys(patterns, power) for power in options] for (_, options), patterns in found.items()]


def _of_embedding(axis: StreamAxis, axes: list[StreamAxis]) -> bool:
    """Tell a norm that is part of the embedding from the last one."""
    return any(axis.info.module.startswith(f"{other.info.module}.") for other in axes if other.info.role == "embedding")


def _either(axis: StreamAxis) -> tuple[int, ...]:
    """A matrix without a module of its own (fused experts): mostly, the last dimension is the input's."""
    return (0, 1, -1) if axis.dim == len(axis.info.shape) - 1 else (1, 0, -1)


def _deviating(places: list[Place], more: Callable[[], list[Place]] = list) -> Iterator[dict[str, int]]:
    """Yield assignments by the number of places in which they deviate from the first options."""
    usual = {pattern: power for options in places for pattern, power in options[0].items()}
    yield usual
    places, count = [*places, *more()], 1
    for deviations in range(1, DEVIATIONS + 1):
        for chosen in itertools.combinations(places, deviations):
            for options in itertools.product(*(place[1:] for place in chosen)):
                yield usual | {pattern: power for option in options for pattern, power in option.items()}
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
