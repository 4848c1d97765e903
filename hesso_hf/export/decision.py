"""The decision: which units and tokens stay, taken from a run or from what is zero, and checked against the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import OPT_IN, structures_around
from ..errors import HessoError
from ..structures.cut import take
from ..structures.experts import EXPERT_UNITS, num_experts
from ..structures.groups import KeptUnits, PruningGroups
from ..structures.layers import LAYER_UNITS, without_dropped_layers
from ..structures.lora import Adapters, parameters_of
from ..structures.proof.prove import proved_groups
from ..structures.router_gates import routed_by
from ..vocabulary.tokens import KeptTokens

NOTHING_CUT = KeptUnits({}, {})
Weights = Mapping[str, Callable[[], torch.Tensor]]  # by name what makes, or reads, a weight


@dataclass(frozen=True)
class Compaction:
    """That the pruned units were cut during training, and what the model that goes on from there doesn't show.

    Attributes:
        step: steps that had been made.
        error: relative error of the smaller model's logits then, in fp32.
        parameters_before, sizes_before: of the full model.
        kept_units: the units that stayed, those of dropped layers left out.
    """

    step: int
    error: float
    parameters_before: int
    sizes_before: dict[str, int]
    kept_units: KeptUnits

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"kept_units": self.kept_units.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Compaction:
        """Read what `to_dict` wrote."""
        return cls(**{**values, "kept_units": KeptUnits.from_dict(values["kept_units"])})


@dataclass(frozen=True)
class Decision:
    """What stays of a model.

    Attributes:
        groups: the model's structures.
        kept: the units that stay; of structures that it doesn't name, all.
        vocabulary: the tokens that stay; None for all.
        compaction: where units were cut before; then no more are.
    """

    groups: PruningGroups
    kept: KeptUnits
    vocabulary: KeptTokens | None = None
    compaction: Compaction | None = None

    @property
    def sizes_before(self) -> dict[str, int]:
        """The config sizes that units are part of, as they were before any was cut."""
        if self.compaction is not None:
            return self.compaction.sizes_before
        sizes: dict[str, int] = {}
        for name in self.kept.kept:
            sizes |= self.groups.structures[name].config_sizes(self.groups.structures[name].num_units)
        return sizes

    @property
    def kept_units(self) -> KeptUnits:
        """The units that stay of the full model, those of dropped layers left out."""
        return self.compaction.kept_units if self.compaction else without_dropped_layers(self.groups, self.kept)

    @property
    def prunes_nothing(self) -> bool:
        """Whether all units stay, and none was cut before."""
        return self.kept.all_stay and self.compaction is None

    def routing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let the routers of a model that has all experts choose among the kept ones for a while."""
        if EXPERT_UNITS not in self.kept.kept:
            return nullcontext()
        return routed_by(model, self.groups.structures[EXPERT_UNITS], kept_mask(self.kept, EXPERT_UNITS))


def decide(
    model: PreTrainedModel,
    kept_units: KeptUnits | None,
    groups: PruningGroups | None = None,
    vocabulary: KeptTokens | None = None,
    compaction: Compaction | None = None,
    stored: Mapping[str, torch.Tensor] | None = None,
) -> Decision:
    """Decide which units stay: those of a decision at hand, or those that aren't exactly zero.

    Args:
        model: with its adapters in place.
        kept_units: the decision at hand.
        groups: by default proved here.
        vocabulary: handed on.
        compaction: that cut the units out already: the others don't count then.
        stored: the weights, where the model is without them.

    Raises:
        HessoError: where a unit that is to be cut isn't zero, or the layers would differ unasked.
    """
    if compaction is not None:
        return Decision(PruningGroups({}), NOTHING_CUT, vocabulary, compaction)
    weights = _weights(model, stored)
    if groups is None:
        groups = groups_for(model, kept_units, weights)
    if kept_units is not None:
        _check_kept(kept_units, groups)
    zero = units_at_zero(weights, groups, kept_units)
    living = {name: ~found for name, found in zero.items() if name not in OPT_IN or bool(found.any())}
    kept = kept_units or KeptUnits.of(living)
    _check_zero(zero, kept)
    for name, layers in kept.kept.items():
        groups.structures[name].check_pools(layers)
    if kept_units is None:
        _check_found(kept, groups)
    return Decision(groups, kept, vocabulary)


def _check_found(kept: KeptUnits, groups: PruningGroups) -> None:
    """Refuse units found at zero that no stock class can do without."""
    staying = without_dropped_layers(groups, kept).kept
    if any(len({len(layer) for layer in layers}) > 1 for layers in staying.values()):
        counts = {name: [len(layer) for layer in layers] for name, layers in staying.items()}
        raise HessoError(
            f"the layers differ in how many units aren't zero ({counts}), which no stock class has; pass `kept_units` "
            "to export with a modelling file all the same"
        )


def groups_for(model: PreTrainedModel, kept: KeptUnits | None, weights: Weights | None = None) -> PruningGroups:
    """Prove the structures of a decision; without one, also those that must be named where some of them are at zero.

    Args:
        weights: by default the model's own.
    """
    if kept is not None:
        return proved_groups(type(model), model.config, structures_around(kept.kept))[0]
    weights = weights or _weights(model)
    named = [EXPERT_UNITS] if num_experts(model.config) is not None else []
    if any(weight().dim() > 1 and not weight().any() for weight in weights.values()):
        named.append(LAYER_UNITS)  # in a layer that does nothing, what writes to the stream is all zero
    groups = proved_groups(type(model), model.config, structures_around(named))[0]
    others = dict(groups.structures)
    whole = others.pop("attention_heads", None)
    if whole is None or units_at_zero(weights, PruningGroups({"attention_heads": whole}))["attention_heads"].any():
        return groups
    single = proved_groups(type(model), model.config, ("query_heads",))[0]
    if not single.structures or not units_at_zero(weights, single)["query_heads"].any():
        return groups
    return PruningGroups(single.structures | others, groups.refused)


@torch.no_grad()
def units_at_zero(weights: Weights, groups: PruningGroups, kept: KeptUnits | None = None) -> dict[str, torch.Tensor]:
    """Return, per structure, which units' effective weights are all exactly zero: shape (L, U), bool.

    Args:
        kept: with it only the weights of the other units are looked at, and nothing is said of those that stay.
    """
    lives = {name: torch.zeros(len(g.layers), g.num_units) for name, g in groups.structures.items()}
    for name, axes in groups.by_parameter().items():
        weight = weights[name]()
        for structure, layer, axis in axes:
            units = groups.structures[structure].num_units
            asked = torch.ones(units, dtype=torch.bool)
            if kept is not None:
                asked = ~kept_mask(kept, structure)[layer] if structure in kept.kept else ~asked
            at = axis.layout.expand(asked, fixed_value=False).nonzero().flatten()
            if not len(at):
                continue
            others = [dim for dim in range(weight.dim()) if dim != axis.dim]
            held = (weight if len(at) == weight.shape[axis.dim] else take(weight, axis.dim, at)) != -axis.shift
            along = torch.zeros(axis.layout.size(units))
            along[at] = (held.any(dim=others) if others else held).float().cpu()
            lives[structure][layer] += axis.layout.collect(along, units)
    return {name: found == 0 for name, found in lives.items()}


def _weights(model: PreTrainedModel, stored: Mapping[str, torch.Tensor] | None = None) -> Weights:
    """Return what makes each weight that the model computes with: a sum, where an adapter adds to it."""
    if stored is not None:
        return {name: partial(stored.__getitem__, name) for name, _ in model.named_parameters()}
    adapters, parameters = Adapters.of(model), parameters_of(model)
    names = parameters.keys() - set(adapters.factors())
    return {name: partial(adapters.effective, name, lambda key: parameters[key].data) for name in names}


def _check_kept(kept: KeptUnits, groups: PruningGroups) -> None:
    for name, layers in kept.kept.items():
        if name not in groups.structures:
            raise HessoError(
                f"`kept_units` names {name!r}, which isn't verified here; verified: {list(groups.structures)}"
            )
        structure = groups.structures[name]
        if len(layers) != len(structure.layers):
            raise HessoError(f"`kept_units`: {name} has {len(layers)} layers, the model {len(structure.layers)}")
        if kept.num_units[name] != structure.num_units:
            raise HessoError(
                f"`kept_units`: {name} has {kept.num_units[name]} units per layer, the model {structure.num_units}"
            )
        for index, layer in enumerate(layers):
            if not layer or min(layer) < 0 or max(layer) >= structure.num_units:
                raise HessoError(
                    f"`kept_units`: layer {index} of {name} must keep units from 0 to {structure.num_units - 1}, "
                    f"at least one; got {list(layer)[:4]}..."
                )


def _check_zero(zero: Mapping[str, torch.Tensor], kept: KeptUnits) -> None:
    for name in kept.kept:
        alive = (~kept_mask(kept, name) & ~zero[name]).nonzero().tolist()
        if alive:
            raise HessoError(
                f"{name}: unit {alive[0][1]} of layer {alive[0][0]} is to be cut but its weights aren't zero; "
                "finish pruning first, or export the checkpoint in which it was finished"
            )


def kept_mask(kept: KeptUnits, structure: str) -> torch.Tensor:
    """Return which units stay, shape (L, U), bool."""
    layers = kept.kept[structure]
    mask = torch.zeros(len(layers), kept.num_units[structure], dtype=torch.bool)
    for row, units in zip(mask, layers, strict=True):
        row[list(units)] = True
    return mask
