"""What a model of given sizes costs: parameters, forward operations, bytes; as sums of products of kept units.

All costs take one array of kept units per structure (broadcastable) and return one array, so that a solver can price a
whole grid at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

from ..hf_models.sizes import HEADS, KV_HEADS, LAYERS, get_size, head_dim_of
from ..structures.experts import EXPERT_UNITS, experts_per_token, num_experts
from ..structures.groups import PruningGroups
from ..structures.layers import LAYER_UNITS, in_stack
from ..structures.shape_probe import AxisMap, ParameterInfo

Counts = Mapping[str, "np.ndarray | int"]
Factor = tuple[str, int, int]  # structure, indices per unit, fixed indices: the length of a dimension
CONTEXT = 2048  # tokens that the attention and cache terms of `flops` and `memory` are taken at
_BYTES = 2  # of an element, of weights and cache alike


@dataclass(frozen=True)
class Cost:
    """A cost as terms coefficient * product of (per_unit * kept[structure] + fixed).

    Attributes:
        metric: `parameters`, `flops` (forward, per token, at CONTEXT tokens) or `memory` (bytes of weights and cache).
        units: units per layer of each structure in the full model.
    """

    metric: str
    terms: tuple[tuple[float, tuple[Factor, ...]], ...]
    units: dict[str, int]

    def __call__(self, kept: Counts) -> np.ndarray:
        """Price kept units; structures that aren't named stay whole."""
        total: np.ndarray = np.zeros(())
        for coefficient, factors in self.terms:
            product: np.ndarray = np.asarray(coefficient, dtype=np.float64)
            for factor in factors:
                product = product * length_of(factor, kept, self.units)
            total = total + product
        return total

    @property
    def full(self) -> float:
        """Cost of the full model."""
        return float(self({}))


def length_of(factor: Factor, kept: Counts, units: Mapping[str, int]) -> np.ndarray:
    """Return the length that kept units give; structures that aren't named in `kept` stay whole."""
    structure, per_unit, fixed = factor
    return np.asarray(kept.get(structure, units.get(structure, 0)), dtype=np.float64) * per_unit + fixed


def build_cost(metric: str, groups: PruningGroups, axis_map: AxisMap, config: PretrainedConfig) -> Cost:
    """Build the cost model of a metric from the proved groups (`latency` is measured elsewhere)."""
    moving = moving_sizes(groups)
    terms: defaultdict[tuple[Factor, ...], float] = defaultdict(float)
    for info in axis_map.parameters.values():
        place = in_stack(groups, info)
        if place == "other":  # the first layer stands for all
            continue
        weight = _weight(metric, info, config)
        factors = moving.get(info.name, {})
        if metric == "flops" and _is_expert_weight(info):  # a token's share of the experts, however many there are
            factors = {dim: factor for dim, factor in factors.items() if factor[0] != EXPERT_UNITS}
        for dim, size in enumerate(info.shape):
            weight *= 1 if dim in factors else size
        depth = [(LAYER_UNITS, 1, 0)] if place == "first" else []
        terms[tuple(sorted([*factors.values(), *depth]))] += weight
    _add_attention(terms, metric, groups, config)
    units = {name: structure.num_units for name, structure in groups.structures.items()}
    return Cost(metric, tuple((weight, factors) for factors, weight in terms.items() if weight), units)


def moving_sizes(groups: PruningGroups) -> dict[str, dict[int, Factor]]:
    """Return, per parameter and dimension that shrinks, the factor that its length is."""
    return {
        parameter: {
            axis.dim: (name, axis.layout.per_unit, sum(segment.fixed for segment in axis.layout.segments))
            for name, _, axis in axes
            if not axis.layout.owned
        }
        for parameter, axes in groups.by_parameter().items()
    }


def _weight(metric: str, info: ParameterInfo, config: PretrainedConfig) -> float:
    """Return what one element of a parameter costs."""
    if metric == "parameters":
        return 1.0
    if metric == "memory":
        return float(_BYTES)
    if info.role in ("norm", "bias"):
        return 1.0
    if info.role == "embedding":  # a look-up costs nothing, a tied output matrix its product
        return 2.0 if info.tied else 0.0
    experts = num_experts(config)
    if experts and _is_expert_weight(info):
        return 2.0 * (experts_per_token(config) or experts) / experts
    return 2.0


def _is_expert_weight(info: ParameterInfo) -> bool:
    return len(info.shape) == 3 or ".experts." in info.name


def _add_attention(
    terms: defaultdict[tuple[Factor, ...], float],
    metric: str,
    groups: PruningGroups,
    config: PretrainedConfig,
) -> None:
    """Add the scores and weighted sums (flops) or the key-value cache (memory) of CONTEXT tokens."""
    layers, heads, head_dim = get_size(config, LAYERS), get_size(config, HEADS), head_dim_of(config)
    if metric == "parameters" or not (layers and head_dim and heads):
        return
    counted, weight = (HEADS, 4.0) if metric == "flops" else (KV_HEADS, 2.0 * _BYTES)
    per_token, depth = weight * head_dim * CONTEXT, [(LAYER_UNITS, 1, 0)]
    if LAYER_UNITS not in groups.structures:
        per_token, depth = per_token * layers, []
    shrinking = [(name, g.increments[counted], 0) for name, g in groups.structures.items() if counted in g.increments]
    if not shrinking:
        per_token *= get_size(config, counted) or heads
    terms[tuple(sorted([*depth, *shrinking]))] += per_token
