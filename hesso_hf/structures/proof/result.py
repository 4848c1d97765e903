"""The outcome of a proof: what was settled for each structure and how exactly it holds, or why it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from ...errors import NotApplicableError, UnsupportedStructureError
from ..build import build_groups, check_covered, coupled_units, needing_others
from ..experts import EXPERT_UNITS, ExpertScheme, expert_groups
from ..groups import PruningGroups, Scheme, StructureGroups
from ..layers import LayerScheme, layer_groups
from ..shape_probe import AxisMap, coupled_axes, probe_axes

TOLERANCE = 1e-5


@dataclass(frozen=True)
class StructureProof:
    """The outcome for one structure: a scheme with its relative error, or a reason.

    Attributes:
        applicable: False where the architecture has no such structure, so that there is nothing to refuse.
    """

    structure: str
    scheme: Scheme | ExpertScheme | LayerScheme | None
    relative_error: float | None
    reason: str = ""
    applicable: bool = True


@dataclass(frozen=True)
class Proof:
    """The outcome for all structures of one architecture.

    Attributes:
        joint_error: the relative error with all proved ones cut at once.
        coupled: whether heads and width only shrink together.
    """

    structures: dict[str, StructureProof]
    joint_error: float | None = None
    coupled: bool = False


def guarded(names: tuple[str, ...], prove: Callable[[], dict[str, StructureProof]]) -> dict[str, StructureProof]:
    """Turn whatever a proof raises into a refusal."""
    try:
        return prove()
    except NotApplicableError as error:
        return {name: StructureProof(name, None, None, str(error), applicable=False) for name in names}
    except UnsupportedStructureError as error:
        reason = str(error)
    except Exception as error:  # model code may fail on a cut model with any exception type
        reason = f"{type(error).__name__}: {error}"
    return {name: StructureProof(name, None, None, reason) for name in names}


def groups_of(
    model_class: type[PreTrainedModel], config: PretrainedConfig, proof: Proof
) -> tuple[PruningGroups, AxisMap]:
    """Apply a proof to a model of any size of the same architecture."""
    axis_map = probe_axes(model_class, config, couple=False)
    if proof.coupled:
        axis_map = coupled_axes(model_class, config, axis_map)
    structures: dict[str, StructureGroups] = {}
    refused = {n: found.reason for n, found in proof.structures.items() if found.scheme is None and found.applicable}
    schemes: dict[str, Scheme] = {}
    for name, found in proof.structures.items():
        if found.scheme is None:
            continue
        try:
            structures[name] = _build(name, model_class, config, axis_map, found.scheme)
            if structures[name].num_units < 2:
                raise UnsupportedStructureError("there is only one unit per layer")
            if isinstance(found.scheme, Scheme):
                schemes[name] = found.scheme
        except UnsupportedStructureError as error:
            refused[name] = str(error)
    structures = {name: built for name, built in structures.items() if name not in refused}
    coupled = coupled_units(structures, axis_map, schemes)
    for name in schemes:
        members = coupled if name in coupled else (name,)
        try:
            check_covered({other: structures[other] for other in members}, axis_map)
        except UnsupportedStructureError as error:
            refused |= dict.fromkeys(members, str(error))
    needing = needing_others(axis_map, schemes)
    for name in needing - refused.keys() if not coupled.keys() - refused.keys() else ():
        refused[name] = f"it only shrinks together with {sorted(needing - {name})}, which aren't all verified"
    refused |= _on_shared_axes({name: built for name, built in structures.items() if name not in refused})
    structures = {name: built for name, built in structures.items() if name not in refused}
    absent = {name: found.reason for name, found in proof.structures.items() if not found.applicable}
    coupled = {name: ratio for name, ratio in coupled.items() if name in structures}
    return PruningGroups(structures, refused, coupled, absent, axis_map.picky, model_class), axis_map


def _on_shared_axes(structures: dict[str, StructureGroups]) -> dict[str, str]:
    """Refuse experts that lie along the same dimension as their channels, as one matrix of all experts' rows."""
    axes = {name: {(axis.parameter, axis.dim) for _, axis in built.all_axes()} for name, built in structures.items()}
    for other in ("mlp_channels", "expert_channels"):
        shared = axes.get(EXPERT_UNITS, set()) & axes.get(other, set())
        if shared:
            return {EXPERT_UNITS: f"{min(shared)[0]} has experts and {other} along one dimension: name one of the two"}
    return {}


def _build(
    name: str, model_class: type[PreTrainedModel], config: PretrainedConfig, axis_map: AxisMap, scheme: object
) -> StructureGroups:
    if isinstance(scheme, ExpertScheme):
        return expert_groups(model_class, config)
    if isinstance(scheme, LayerScheme):
        return layer_groups(axis_map, scheme)
    assert isinstance(scheme, Scheme)
    return build_groups(name, axis_map, scheme)
