"""Proof for whole layers: on a tiny model with all of the real one's layers, dropping is the same as zeroing writers.

Rules that the model code computes from a layer's index, layers that read from others and scales by depth all show here:
a model without some layers then isn't the model in which these do nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import HessoError, UnsupportedStructureError
from ...hf_models.by_layer import is_by_layer
from ...hf_models.resize import resized_config
from ...hf_models.sizes import LAYERS, text_config_of
from ...hf_models.tiny_model import logits_of, relative_error
from ..cut import kept_sizes, load_cut, zero_units_
from ..groups import KeptUnits, PruningGroups
from ..layers import LAYER_UNITS, LayerScheme, full_names, layer_groups, stack_of
from .bench import Bench
from .residual_stream import StreamAxis
from .result import TOLERANCE

_MAX_KINDS = 4  # so many kinds of layers are dropped as a whole, each
_JOINT_LAYERS = 4  # so many are kept where other structures are cut as well: rounding grows with depth


class LayerTrial:
    """Drops layers of a tiny model in several ways and finds the parameters that have to be zero for it."""

    def __init__(self, bench: Bench) -> None:
        stack_of(bench.axis_map)
        self.bench = bench
        _vary_buffers(bench.model)
        self.logits = logits_of(bench.model, bench.input_ids)
        self.layers = bench.axis_map.sizes.get(LAYERS) or 0
        self._small: dict[tuple[int, ...], torch.Tensor] = {}

    def find(self, stream: list[StreamAxis]) -> tuple[LayerScheme, float]:
        """Return the first scheme under which every way to drop layers gives the zeroed model's logits, and its error.

        Args:
            stream: the axes along the residual stream.

        Raises:
            UnsupportedStructureError: where there is none.
        """
        best: float | None = None
        for scheme in writer_schemes(stream):
            if not scheme.writers:
                continue
            error = self._worst(scheme)
            if error <= TOLERANCE:
                scheme = self._smallest(scheme)
                return scheme, self._worst(scheme)
            best = error if best is None else min(best, error)
        if best is None:
            raise UnsupportedStructureError("nothing was found that writes to the residual stream in a layer")
        raise UnsupportedStructureError(
            f"a model without some layers isn't the one in which they write nothing (relative error {best:.1e} > "
            f"{TOLERANCE:.0e}): layers use one another or their index"
        )

    def joint_error(self, scheme: LayerScheme, others: PruningGroups, units: KeptUnits) -> float:
        """Return the error where other structures are cut as well."""
        groups = replace(others, structures={**others.structures, **self._groups(scheme).structures})
        layers = _random_layers(self.layers, min(_JOINT_LAYERS, self.layers - 1))
        kept = KeptUnits({**units.num_units, LAYER_UNITS: self.layers}, {**units.kept, LAYER_UNITS: (layers,)})
        zeroed = self._zeroed(groups, kept)
        return relative_error(self._cut(groups, kept, zeroed), logits_of(zeroed, self.bench.input_ids))

    def _smallest(self, scheme: LayerScheme) -> LayerScheme:
        """Leave out what needn't be zero: where heads and width move together, readers look like writers."""
        first = next(ways_to_drop(self.bench.config, self.layers))
        for module in sorted({pattern.rpartition(".")[0] for pattern, _ in scheme.writers}):
            fewer = scheme.without_module(module)
            if fewer.writers and self._error_of(fewer, first) <= TOLERANCE:
                scheme = fewer
        return scheme

    def _worst(self, scheme: LayerScheme) -> float:
        return max(self._error_of(scheme, layers) for layers in ways_to_drop(self.bench.config, self.layers))

    def _error_of(self, scheme: LayerScheme, layers: tuple[int, ...]) -> float:
        groups = self._groups(scheme)
        kept = KeptUnits({LAYER_UNITS: self.layers}, {LAYER_UNITS: (layers,)})
        zeroed = logits_of(self._zeroed(groups, kept), self.bench.input_ids)
        if relative_error(zeroed, self.logits) < 100 * TOLERANCE:
            return math.inf  # they do nothing anyway, so nothing is learnt
        if layers not in self._small:
            self._small[layers] = self._cut(groups, kept, self.bench.model)
        return relative_error(self._small[layers], zeroed)

    def _groups(self, scheme: LayerScheme) -> PruningGroups:
        return PruningGroups({LAYER_UNITS: layer_groups(self.bench.axis_map, scheme)})

    def _zeroed(self, groups: PruningGroups, kept: KeptUnits) -> PreTrainedModel:
        zeroed = copy.deepcopy(self.bench.model)
        zero_units_(dict(zeroed.named_parameters()), groups, kept)
        return zeroed

    @torch.no_grad()
    def _cut(self, groups: PruningGroups, kept: KeptUnits, full: PreTrainedModel) -> torch.Tensor:
        """Return the logits of the model without the layers."""
        layers = kept.kept[LAYER_UNITS][0]
        try:
            config = resized_config(self.bench.config, kept_sizes(groups, kept), layers, self.bench.axis_map.sizes)
            small = self.bench.model_class(config).float().eval()
            load_cut(small, dict(full.named_parameters()), groups, kept)
            states, buffers = full.state_dict(), dict(small.named_buffers())
            for name, origin in full_names(buffers, groups, kept).items():
                if origin in states and states[origin].shape == buffers[name].shape:
                    buffers[name].copy_(states[origin])
            return logits_of(small, self.bench.input_ids)
        except HessoError:
            raise
        except Exception as error:  # model code may fail without some layers with any exception type
            raise UnsupportedStructureError(
                f"{self.bench.model_class.__name__} fails with layers {list(layers)} of {self.layers} alone: "
                f"{type(error).__name__}: {error}"
            ) from error


def writer_schemes(stream: list[StreamAxis]) -> Iterator[LayerScheme]:
    """Yield what may be all that writes to the stream in a layer: first without biases of norms after the writers.

    Weights that may read or write (fused experts) mostly have their inputs in the last dimension.
    """
    inside = [axis for axis in stream if axis.info.layer]
    writers = {(a.pattern, a.dim) for a in inside if a.info.role in ("matrix", "bias") and _writes(a)}
    offsets = {(a.pattern, a.dim) for a in inside if a.vector.kind == "offset"}
    yield LayerScheme(frozenset(writers))
    if offsets:
        yield LayerScheme(frozenset(writers | offsets))


def _writes(axis: StreamAxis) -> bool:
    return axis.side == "out" or (axis.side == "either" and axis.dim < len(axis.info.shape) - 1)


def ways_to_drop(config: PretrainedConfig, layers: int) -> Iterator[tuple[int, ...]]:
    """Yield layers to keep: a random half, the other half, and all but those of each kind that the config names."""
    half = _random_layers(layers, layers // 2)
    yield half
    yield tuple(sorted(set(range(layers)) - set(half)))
    kinds = _kinds(config, layers)
    if 1 < len(set(kinds)) <= _MAX_KINDS:
        for kind in sorted(set(kinds)):
            yield tuple(index for index, found in enumerate(kinds) if found != kind)


def _kinds(config: PretrainedConfig, layers: int) -> list[tuple[str, ...]]:
    values = text_config_of(config).to_dict()
    lists = [value for name, value in values.items() if is_by_layer(name, value, layers)]
    return [tuple(str(value[index]) for value in lists) for index in range(layers)]


def _random_layers(layers: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(layers)
    return tuple(sorted(torch.randperm(layers, generator=generator)[:count].tolist()))


@torch.no_grad()
def _vary_buffers(model: PreTrainedModel) -> None:
    """Move saved buffers from their initial values, where a scale of the layer would do nothing."""
    generator = torch.Generator().manual_seed(0)
    states: dict[str, Any] = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in states and buffer.is_floating_point():
            buffer.add_(0.5 * torch.rand(buffer.shape, generator=generator))
