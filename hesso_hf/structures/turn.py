"""Turning: another orthogonal basis of the residual stream, with the function of the model unchanged.

A norm's gain g goes into what reads the norm, W diag(g), and becomes 1; then every matrix and table on the stream, what
reads it as well as what writes it, takes the rotation Q along its side of the stream (W Q, Q^T W, E Q). Norms of root
mean squares don't notice; those that subtract the mean don't where Q maps the vector of ones to itself.
Legend: D channels of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..distributed.parts import rewrite_, whole_of
from ..errors import UnsupportedStructureError
from .groups import AxisName
from .lora import Adapters
from .shape_probe import AxisMap

_LEAST_GAIN = 1e-3  # of the largest: an offset can't be divided by less


@dataclass(frozen=True)
class NormScheme:
    """A norm of the stream, by patterns of parameters.

    Attributes:
        scale: the gain's pattern, "" where the norm has none.
        offset: the bias' pattern, "" where the norm has none.
        shift: what the model adds to the stored gain.
        readers: matrices and their side that read what the norm gives out; none where it is the tied output matrix.
    """

    scale: str
    offset: str = ""
    shift: float = 0.0
    readers: tuple[AxisName, ...] = ()


@dataclass(frozen=True)
class TurnScheme:
    """What the proof settles about an architecture's stream, by patterns: valid for models of every size.

    Attributes:
        axes: every side of a matrix, table or bias that lies on the stream.
        norms: the norms whose gains go into their readers.
        tied_norm: the last norm where the output matrix is the embedding; its gain stays, and Q must commute with it.
        centred: whether norms subtract the mean, so that Q must keep the vector of ones.
    """

    axes: tuple[AxisName, ...]
    norms: tuple[NormScheme, ...]
    tied_norm: NormScheme | None
    centred: bool


@dataclass(frozen=True)
class StreamTurn(TurnScheme):
    """A scheme applied to one model: what `TurnScheme` says of patterns its fields say here of parameters, by name.

    Attributes:
        axes, norms, tied_norm: as there, those of every layer by itself.
        width: D.
    """

    width: int

    @classmethod
    def of(cls, scheme: TurnScheme, axis_map: AxisMap, width: int) -> StreamTurn:
        """Name the parameters of a model.

        Raises:
            UnsupportedStructureError: where a norm's reader is in another layer, or read through two norms.
        """
        named: dict[str, dict[str, list[str]]] = {}
        for info in axis_map.parameters.values():
            named.setdefault(info.pattern, {}).setdefault(info.layer, []).append(info.name)
        layers = [(names, dim) for pattern, dim in scheme.axes for names in named.get(pattern, {}).values()]
        axes = tuple((name, dim) for names, dim in layers for name in names)
        norms = tuple(_named(norm, named, layer) for norm in scheme.norms for layer in named.get(norm.scale, {}))
        read = [reader for norm in norms for reader in norm.readers]
        for reader in set(read):
            if read.count(reader) > 1:
                raise UnsupportedStructureError(f"{reader[0]} reads several norms")
        tied = _named(scheme.tied_norm, named, "") if scheme.tied_norm else None
        return cls(axes, norms, tied, scheme.centred, width)

    def with_adapters(self, adapters: Adapters) -> StreamTurn:
        """Return the turn with the adapters' factors in it: A goes with what W reads, B with what it writes."""

        def beside(axes: tuple[AxisName, ...]) -> tuple[AxisName, ...]:
            factors = [adapters.low_rank[name].along(dim) for name, dim in axes if name in adapters.low_rank]
            return (*axes, *factors)

        norms = tuple(replace(norm, readers=beside(norm.readers)) for norm in self.norms)
        return replace(self, axes=beside(self.axes), norms=norms)

    @torch.no_grad()
    def fold_gains_(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Put every gain into what reads its norm, in place; the gain of a tied last norm stays.

        A norm's bias is divided by the gain; where that is almost nothing it goes into the readers' own biases. Where
        processes hold parts of the parameters, all call this, as everything here.

        Raises:
            UnsupportedStructureError: where a reader has none then; nothing is changed.
        """
        self.check_gains(parameters)
        for norm in self.norms:
            gain, closed = whole_of(parameters[norm.scale]).double() + norm.shift, _closed(norm, parameters)
            for name, dim in norm.readers:
                if closed.any() and (bias := _bias_of(name, dim, parameters)) is not None:
                    moved = torch.where(closed, whole_of(parameters[norm.offset]).double(), 0.0)
                    added = whole_of(parameters[name]).double().movedim(dim, -1) @ moved
                    rewrite_(bias, 0, partial(_added, added=added))
                rewrite_(parameters[name], dim, partial(_scaled, dim=dim, factors=gain))
            parameters[norm.scale].fill_(1.0 - norm.shift)
            if norm.offset:
                left = torch.where(closed, 0.0, 1.0 / torch.where(closed | (gain == 0), 1.0, gain))
                rewrite_(parameters[norm.offset], 0, partial(_scaled, dim=0, factors=left))

    def check_gains(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Refuse what `fold_gains_` can't do, before anything is changed.

        Raises:
            UnsupportedStructureError: where a bias has almost no gain to be divided by and its readers have none.
        """
        for norm in self.norms:
            closed = _closed(norm, parameters)
            for name, dim in norm.readers if closed.any() else ():
                if _bias_of(name, dim, parameters) is None:
                    raise UnsupportedStructureError(f"{norm.scale} has gains near zero beside a bias, {name} has none")

    @torch.no_grad()
    def turn_(self, parameters: Mapping[str, torch.Tensor], rotation: torch.Tensor) -> None:
        """Fold the gains and turn the stream, in place; products are taken in fp64 and rounded once.

        Args:
            rotation: Q, shape (D, D), orthogonal; column j is the new channel j in the old ones. It keeps the vector of
                ones where `centred`, and commutes with the gain of `tied_norm`.

        Raises:
            UnsupportedStructureError: as `fold_gains_`; nothing is changed then.
        """
        self.fold_gains_(parameters)
        norms = (*self.norms, self.tied_norm) if self.tied_norm else self.norms
        offsets = [norm.offset for norm in norms if norm.offset]
        for name, dim in (*self.axes, *((name, 0) for name in offsets)):
            rewrite_(parameters[name], dim, partial(_rotated, dim=dim, rotation=rotation))


def _added(values: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return values.double() + added


def _scaled(values: torch.Tensor, dim: int, factors: torch.Tensor) -> torch.Tensor:
    return (values.double().movedim(dim, -1) * factors).movedim(-1, dim)


def _rotated(values: torch.Tensor, dim: int, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate along a dimension: runs of the channels, of copies of the stream; behind them what isn't of it."""
    values, rotation = values.double().movedim(dim, -1), rotation.to(values.device, torch.float64)
    runs = values.shape[-1] // len(rotation)
    along, rest = values.tensor_split([runs * len(rotation)], dim=-1)
    turned = (along.unflatten(-1, (runs, len(rotation))) @ rotation).flatten(-2)
    return torch.cat([turned, rest], dim=-1).movedim(-1, dim)


def _named(norm: NormScheme, named: Mapping[str, Mapping[str, list[str]]], layer: str) -> NormScheme:
    """Name a norm's parameters in one layer; a layer that lacks one, or has several such norms, is refused."""
    patterns = (norm.scale, norm.offset, *(pattern for pattern, _ in norm.readers))
    for pattern in filter(None, patterns):
        if layer not in named.get(pattern, {}):
            raise UnsupportedStructureError(f"{pattern} isn't in {layer or 'the model'} beside {norm.scale}")
    scale, *others = named[norm.scale][layer]
    if others:
        raise UnsupportedStructureError(f"{scale} and {others[0]} are alike: their readers aren't told apart")
    readers = tuple((name, dim) for pattern, dim in norm.readers for name in named[pattern][layer])
    return NormScheme(scale, named[norm.offset][layer][0] if norm.offset else "", norm.shift, readers)


def _closed(norm: NormScheme, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return which channels of a norm, bool (D,), have a bias and almost no gain to divide it by."""
    gain = (whole_of(parameters[norm.scale]).double() + norm.shift).abs()
    if not norm.offset:
        return torch.zeros_like(gain, dtype=torch.bool)
    return (gain < _LEAST_GAIN * gain.max()) & (whole_of(parameters[norm.offset]) != 0)


def _bias_of(name: str, dim: int, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the bias that is added to what a matrix makes of one of its sides, None where there is none."""
    shape = [size for index, size in enumerate(parameters[name].shape) if index != dim]
    bias = parameters.get(f"{name.removesuffix('weight')}bias")
    return bias if bias is not None and list(bias.shape) == shape else None


def keeping_ones(vectors: torch.Tensor) -> torch.Tensor:
    """Return an orthogonal Q with Q 1 = 1 whose columns are near to given ones.

    [1/sqrt(D), V] has a column of ones, which maps e_1 to it; a Householder reflection that swaps the two comes first.

    Args:
        vectors: V, shape (D, D - 1), orthonormal and each of sum zero.
    """
    width = len(vectors)
    ones = torch.full((width, 1), width**-0.5, dtype=vectors.dtype)
    normal = ones.clone()
    normal[0] -= 1.0
    if not normal.any():  # of one channel
        return ones
    reflection = torch.eye(width, dtype=vectors.dtype) - 2 * normal @ normal.T / normal.square().sum()
    return torch.cat([ones, vectors], dim=1) @ reflection


def random_rotation(width: int, centred: bool, blocks: list[list[int]], seed: int) -> torch.Tensor:
    """Return a random orthogonal Q, fp64, that moves channels within blocks only and keeps ones where `centred`."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.zeros(width, width, dtype=torch.float64)
    for block in blocks:
        numbers = torch.randn(len(block), len(block), dtype=torch.float64, generator=generator)
        if centred:
            numbers[:, 0] = 1.0
        found = torch.linalg.qr(numbers)[0]
        index = torch.tensor(block)
        rotation[index[:, None], index] = keeping_ones(found[:, 1:]) if centred else found
    return rotation
