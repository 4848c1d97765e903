"""Residual stream: the powers of c that keep a model exact when channels that norms run over are removed.

With D channels cut to d and c = sqrt(d / D), a writer to the stream takes c and what reads the raw stream 1/c, mostly a
norm's weight. Which is which is guessed from the model's structure; the proof tries the guess and then what deviates
from it in one, two or three places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..groups import Axis, AxisName
from ..layout import layout_with_rest
from ..shape_probe import AxisMap, ParameterInfo
from .norms import OTHER, VectorRole, vector_role
from .ownership import UNKNOWN, GradientProbe

DEVIATIONS, MOST_CANDIDATES = 3, 600
Side = Literal["in", "out", "either"]
Place = list[dict[str, int]]  # alternatives: pattern to power, the likeliest first
# The powers that a parameter on the stream may take, the likeliest first, by what it is.
_POWERS: dict[str, tuple[int, ...]] = {
    "norm of the stream": (-1, 0),
    "norm of a block": (0, -1),  # what is yet to be added to the stream, or the stream is what norms give
    "norm of an embedding": (0, -1),  # what it gives out is the stream
    "offset": (1, 0),  # of a block that isn't a norm: it is written to the stream
    "embedding": (1, 0),  # beside the first
    "added vector": (1, 0, -1),
    "vector": (0, 1, -1),
    "reader": (0, -1),
    "raw reader": (-1, 0),  # of a stream that no norm divides
    "fused reader": (0, 1, -1),  # fused experts
    "raw fused reader": (-1, 0, 1),
    "fused writer": (1, 0, -1),
    "writer": (1, 0),
    "gate": (0, 1),  # beside a norm of the stream: on what the norm gives, as in hyper-connections
}
# Of the first embedding, the last norm and the output matrix.
_ENDS = {
    "tied": ((1, -2, 0), (0, -1, 0), (1, -1, 0), (0, -2, 0), (0, 0, 0), (1, 0, 0), (1, -3, 0)),
    "untied": ((1, -1, 0), (0, -1, 0), (1, -2, 0), (1, 0, 0), (0, 0, 0)),
    "without a norm": ((1, 0, -1), (1, 0, 0), (0, 0, -1), (0, 0, 0)),
}


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
    def first(self) -> AxisName:
        """The axis of its first parameter."""
        return self.info.name, self.dim

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
    if info.role in ("norm", "bias", "other", "embedding"):
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
    options = _ENDS["without a norm" if outputs and not finals else "tied" if tied else "untied"]
    return [
        dict.fromkeys(first, embedding) | dict.fromkeys(finals, final) | dict.fromkeys(outputs, output)
        for embedding, final, output in options
    ]


def _places(axes: list[StreamAxis], after: set[str], raw: bool) -> list[Place]:
    """List what else may take one power or another; alike in all kinds of layers where the guess is the same."""
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for axis in axes:
        part, name = _part(axis, axes, after, raw)
        if part:
            found.setdefault((name, _POWERS[part]), []).append(axis.pattern)
    return [[dict.fromkeys(patterns, power) for power in options] for (_, options), patterns in found.items()]


def _part(axis: StreamAxis, axes: list[StreamAxis], after: set[str], raw: bool) -> tuple[str, str]:
    """Return what an axis' parameter is, a key of the table or "", and the name that it shares with those alike."""
    tail, role, vector = tail_of(axis), axis.info.role, axis.vector.kind
    scales = [other for other in axes if other.vector.kind == "scale"]
    if vector == "scale" and not axis.info.layer:
        return "norm of an embedding" if _of_embedding(axis, axes) else "", tail
    if vector == "scale":
        return "norm of a block" if raw or axis.info.module in after else "norm of the stream", tail
    if vector == "offset":
        return "" if axis.info.module in {scale.info.module for scale in scales} else "offset", f"{tail} {axis.pattern}"
    if role in ("embedding", "output"):
        first = next((other.pattern for other in axes if other.info.role == "embedding"), "")
        return "" if role == "output" or axis.pattern == first else "embedding", tail
    if role in ("norm", "other"):
        return "added vector" if axis.pattern.endswith("bias") else "vector", f"{tail} {axis.pattern}"
    if axis.side == "in":
        normed = {scale.info.kind for scale in scales if scale.info.layer and scale.info.module not in after}
        return "raw reader" if raw or axis.info.kind not in normed else "reader", axis.reader_group
    if axis.side == "either":  # a matrix without a module of its own: mostly, the last dimension is the input's
        reads, within = axis.dim == len(axis.info.shape) - 1, axis.pattern.removeprefix(f"{axis.info.kind}.")
        return ("raw fused reader" if raw else "fused reader") if reads else "fused writer", within
    mixers = {scale.holder for scale in scales} - {other.info.layer for other in axes}
    return "gate" if axis.holder in mixers else "writer", f"{tail} writes"


def _of_embedding(axis: StreamAxis, axes: list[StreamAxis]) -> bool:
    """Tell a norm that is part of the embedding from the last one."""
    return any(axis.info.module.startswith(f"{other.info.module}.") for other in axes if other.info.role == "embedding")


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


@dataclass(frozen=True)
class Sides:
    """Settles what the stream does at weights that don't say it, and which weights read a norm's output.

    Where nothing writes to a channel, and the layers' norms let nothing of it through, no weight that reads it has a
    gradient there, and every weight that writes to it has.

    Attributes:
        axes: all axes along the stream.
        after: modules whose input is what a block writes, before it reaches the stream.
        width: number of channels.
    """

    probe: GradientProbe
    axis_map: AxisMap
    axes: list[AxisName]
    after: set[str]
    width: int

    def settled(self, known: list[StreamAxis]) -> list[StreamAxis]:
        """Return the axes with fused weights' sides settled, where the other weights beside them come out right."""
        unsettled = [axis for axis in known if axis.side == "either"]
        if not unsettled or not self._gates(known):
            return known
        vanished, trusted = self._vanished(known)
        writers = {axis.info.module for axis in unsettled if vanished.get(axis.first) is False}
        # a norm behind the whole block may hide what writes in it
        doubtful = {block_of(axis) for axis in known if axis.side == "out" and vanished.get(axis.first)}

        def settled(axis: StreamAxis) -> StreamAxis:
            is_clear = axis.info.kind in trusted and block_of(axis) not in doubtful
            if axis.side != "either" or axis.first not in vanished or not (is_clear or axis.info.module in writers):
                return axis
            return replace(axis, side="in" if vanished[axis.first] else "out")

        return [settled(axis) for axis in known]

    def further_places(self, known: list[StreamAxis]) -> list[Place]:
        """Return what may deviate from the usual powers and needs gradients to be seen."""
        return [*self.inner(known), *self.read_norms(known)]

    def inner(self, known: list[StreamAxis]) -> list[Place]:
        """Matrices with a row for each channel that don't write to the stream (gates of what is read) take nothing."""
        vanished, trusted = self._vanished(known)
        writing = [axis for axis in known if axis.side == "out"]
        modules = {axis.info.module for axis in writing if axis.info.kind in trusted and vanished.get(axis.first)}
        found = [axis.pattern for axis in writing if axis.info.module in modules]
        return [[dict.fromkeys(found, power) for power in (1, 0)]] if found else []

    def _vanished(self, known: list[StreamAxis]) -> tuple[dict[AxisName, bool], set[str]]:
        """Tell of each matrix whether it loses its gradient where nothing comes through, and which kinds to trust.

        In these some weight that is known to write keeps its gradient, and all that are known to read lose theirs.
        """
        written = [a for a in known if a.info.role in ("matrix", "embedding", "bias") and a.side != "in"]
        blank = self._gates(known) | {(axis.pattern, axis.dim): 0.0 for axis in written}
        matrices = [axis for axis in known if axis.info.role in ("matrix", "embedding", "output")]
        found = self._owners(blank, {axis.first for axis in matrices})
        clear = [axis for axis in matrices if axis.side != "either" and axis.first in found]
        writing = {a.info.kind for a in clear if a.side == "out" and not found[a.first]}
        return found, writing - {a.info.kind for a in clear if a.side == "in" and not found[a.first]}

    def read_norms(self, known: list[StreamAxis]) -> list[Place]:
        """For each norm that a layer reads the stream by: its weight takes 1/c, or else whatever reads its output."""
        found: list[Place] = []
        gates = self._gates(known)
        readers = [axis for axis in known if axis.side == "in" and axis.info.layer]
        tails: dict[str, list[StreamAxis]] = {}
        for axis in known:
            if axis.vector.kind == "scale" and (axis.pattern, axis.dim) in gates:
                tails.setdefault(tail_of(axis), []).append(axis)
        for norms in tails.values():
            blank = {(axis.pattern, axis.dim): gates[axis.pattern, axis.dim] for axis in norms}
            owners = self._owners(blank, {axis.first for axis in readers})
            mine = [axis.pattern for axis in readers if owners.get(axis.first)]
            if mine:
                patterns = [axis.pattern for axis in norms]
                found.append([dict.fromkeys(patterns, n) | dict.fromkeys(mine, -1 - n) for n in (-1, 0)])
        return found

    def _gates(self, known: list[StreamAxis]) -> dict[AxisName, float]:
        """Return the patterns of the layers' norms of the stream, with the value that lets nothing through."""
        norms = [axis for axis in known if axis.info.layer and axis.vector.kind != "other"]
        return {(a.pattern, a.dim): -a.vector.shift for a in norms if a.info.module not in self.after}

    def _owners(self, blank: Mapping[AxisName, float], axes: set[AxisName]) -> dict[AxisName, bool]:
        """Tell of each axis that has a gradient whether each of its indices loses it with what is blanked."""
        fills = {
            (name, dim): blank[pattern, dim]
            for name, dim in self.axes
            if (pattern := self.axis_map.parameters[name].pattern, dim) in blank
        }

        def zero(mask: torch.Tensor) -> None:
            for (name, dim), fill in fills.items():
                parameter = self.probe.parameters[name]
                runs, rest = divmod(parameter.shape[dim], self.width)
                Axis(name, dim, layout_with_rest(runs, 1, rest)).mask_(parameter, mask, fill)

        found = self.probe.owners(self.width, zero, axes, tuple(fills.items()))
        return {axis: bool((owner >= 0).all()) for axis, owner in found.items() if bool((owner != UNKNOWN).any())}


def block_of(axis: StreamAxis) -> tuple[str, str]:
    """Return the kind of layer and the part of it that an axis' parameter belongs to, its attention or MLP."""
    return axis.info.kind, tail_of(axis).partition(".")[0]
