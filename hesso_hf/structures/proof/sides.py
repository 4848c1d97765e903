"""Sides: what the stream does at weights that don't say it, and which weights read a norm, both by gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..groups import AxisName
from ..layout import Layout, Segment
from ..shape_probe import AxisMap
from .ownership import UNKNOWN, GradientProbe
from .residual_stream import Place, StreamAxis, tail_of


class Sides:
    """Settles what the stream does at weights that don't say it, and which weights read a norm's output.

    Where nothing writes to a channel, and the layers' norms let nothing of it through, no weight that reads it has a
    gradient there, and every weight that writes to it has.

    Args:
        axes: all axes along the stream.
        after: modules whose input is what a block writes, before it reaches the stream.
        width: number of channels.
    """

    def __init__(
        self, probe: GradientProbe, axis_map: AxisMap, axes: list[AxisName], after: set[str], width: int
    ) -> None:
        self.probe, self.axis_map, self.axes, self.after, self.width = probe, axis_map, axes, after, width

    def settled(self, known: list[StreamAxis]) -> list[StreamAxis]:
        """Return the axes with fused weights' sides settled, where the other weights beside them come out right."""
        unsettled = [axis for axis in known if axis.side == "either"]
        if not unsettled or not self._gates(known):
            return known
        vanished, trusted = self._vanished(known)
        writers = {axis.info.module for axis in unsettled if vanished.get((axis.info.name, axis.dim)) is False}
        doubtful = {
            _block(axis) for axis in known if axis.side == "out" and vanished.get((axis.info.name, axis.dim))
        }  # a norm behind the whole block may hide what writes in it
        return [
            replace(axis, side="in" if vanished[axis.info.name, axis.dim] else "out")
            if axis in unsettled
            and (axis.info.name, axis.dim) in vanished
            and ((axis.info.kind in trusted and _block(axis) not in doubtful) or axis.info.module in writers)
            else axis
            for axis in known
        ]

    def further_places(self, known: list[StreamAxis]) -> list[Place]:
        """Return what may deviate from the usual powers and needs gradients to be seen."""
        return [*self.inner(known), *self.read_norms(known)]

    def inner(self, known: list[StreamAxis]) -> list[Place]:
        """Matrices with a row for each channel that don't write to the stream (gates of what is read) take nothing."""
        vanished, trusted = self._vanished(known)
        modules = {
            axis.info.module
            for axis in known
            if axis.side == "out" and axis.info.kind in trusted and vanished.get((axis.info.name, axis.dim))
        }
        found = [axis.pattern for axis in known if axis.info.module in modules and axis.side == "out"]
        return [[dict.fromkeys(found, power) for power in (1, 0)]] if found else []

    def _vanished(self, known: list[StreamAxis]) -> tuple[dict[AxisName, bool], set[str]]:
        """Tell of each matrix whether it loses its gradient where nothing comes through, and which kinds to trust.

        In these some weight that is known to write keeps its gradient, and all that are known to read lose theirs.
        """
        written = [a for a in known if a.info.role in ("matrix", "embedding", "bias") and a.side != "in"]
        blank = self._gates(known) | {(axis.pattern, axis.dim): 0.0 for axis in written}
        matrices = [axis for axis in known if axis.info.role in ("matrix", "embedding", "output")]
        found = self._owners(blank, {(axis.info.name, axis.dim) for axis in matrices})
        clear = [axis for axis in matrices if axis.side != "either" and (axis.info.name, axis.dim) in found]
        writing = {a.info.kind for a in clear if a.side == "out" and not found[a.info.name, a.dim]}
        return found, writing - {a.info.kind for a in clear if a.side == "in" and not found[a.info.name, a.dim]}

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
            owners = self._owners(blank, {(axis.info.name, axis.dim) for axis in readers})
            mine = [axis.pattern for axis in readers if owners.get((axis.info.name, axis.dim))]
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
                shape = [1] * parameter.dim()
                shape[dim] = -1
                runs, rest = divmod(parameter.shape[dim], self.width)
                layout = Layout((Segment(runs, 1), *((Segment(fixed=rest),) if rest else ())))
                parameter.masked_fill_(layout.expand(mask, fixed_value=False).view(shape), fill)

        found = self.probe.owners(self.width, zero, axes)
        return {axis: bool((owner >= 0).all()) for axis, owner in found.items() if bool((owner != UNKNOWN).any())}


def _block(axis: StreamAxis) -> tuple[str, str]:
    """Return the kind of layer and the part of it that an axis' parameter belongs to, its attention or MLP."""
    return axis.info.kind, tail_of(axis).partition(".")[0]
