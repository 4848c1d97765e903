"""`inspect_model`: what can be pruned in a model, from its config alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from transformers import PretrainedConfig, PreTrainedModel

from ..config import OPT_IN, HessoConfig
from ..errors import HessoError
from ..hf_models.build import build_meta, class_to_build, load_config
from ..structures.groups import PruningGroups, StructureGroups
from ..structures.proof.prove import proved_groups
from ..structures.proof.result import Proof
from ..structures.shape_probe import AxisMap
from ..structures.untouched import Untouched, untouched_models
from .cost import build_cost
from .solver import solve_budget


@dataclass(frozen=True)
class StructureInspection:
    """What is known about one structure.

    Attributes:
        units: units in one layer (for the residual stream: in the model).
        layers: number of layers that have units of their own.
        parameters_per_unit: elements that go with one unit of one layer.
        prunable_parameters: elements of all units together.
        layouts: parameter pattern and dimension to layout.
        relative_error: error of the logits of a cut tiny model of this class against its zeroed full one, fp32.
        reason: why it is refused or not applicable.
    """

    status: Literal["proved", "refused", "not_applicable"]
    units: int | None = None
    layers: int | None = None
    parameters_per_unit: int | None = None
    prunable_parameters: int | None = None
    config_sizes: dict[str, int] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    powers: dict[str, int] = field(default_factory=dict)
    relative_error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found; `untouched` are models within the model, such as a vision tower, that stay whole."""

    model_type: str
    model_class: str
    parameters: int
    structures: dict[str, StructureInspection]
    joint_relative_error: float | None
    feasible: dict[str, dict[str, Any]]
    untouched: tuple[Untouched, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types: one key per structure, and `model` and `feasible` beside them."""
        model = {
            "model_type": self.model_type,
            "model_class": self.model_class,
            "parameters": self.parameters,
            "joint_relative_error": self.joint_relative_error,
            "untouched": [asdict(whole) for whole in self.untouched],
        }
        return {name: asdict(found) for name, found in self.structures.items()} | {
            "model": model,
            "feasible": self.feasible,
        }


def inspect_model(
    source: str | PretrainedConfig | PreTrainedModel,
    pruning_ratios: tuple[float, ...] = (0.2, 0.3, 0.5),
    trust_remote_code: bool = False,
) -> Inspection:
    """Find and prove the structures of a model without loading its weights.

    Args:
        source: a Hub id, a folder, a config or a model.
        pruning_ratios: shares of the parameters for which feasible sizes are listed.

    Raises:
        HessoError: where no config is found at `source`, its layers differ in width and `trust_remote_code` isn't
            given, or a ratio doesn't lie between 0 and 1.

    Example:
        >>> from transformers import LlamaConfig
        >>> inspect_model(LlamaConfig(num_key_value_heads=8)).structures["attention_heads"].units
        8
    """
    budgets = {str(ratio): HessoConfig(pruning_ratio=ratio) for ratio in pruning_ratios}
    config = load_config(source, trust_remote_code)
    if isinstance(source, PreTrainedModel):
        model_class: type[PreTrainedModel] = type(source)
    else:
        model_class = class_to_build(config, trust_remote_code)
    groups, proof, axis_map = proved_groups(model_class, config)
    structures = _describe_all(groups, proof, axis_map)
    for name in OPT_IN:  # the default ones do without them, so they are proved and priced apart
        structures |= _describe_all(*proved_groups(model_class, config, (name,)))
    counts = build_cost("parameters", groups, axis_map, config)
    feasible: dict[str, dict[str, Any]] = {}
    for ratio, budget in budgets.items() if groups.structures else ():
        try:
            target = solve_budget(budget, config, groups, counts, warns=False)
            feasible[ratio] = {
                "sizes": target.sizes, "parameters": target.parameters_after, "ratio": target.ratio,
                "nearly_gone": target.nearly_gone,
            }  # fmt: skip
        except HessoError as error:
            feasible[ratio] = {"reason": str(error)}
    untouched = untouched_models(build_meta(model_class, config), groups)
    return Inspection(
        config.model_type, model_class.__name__, round(counts.full), structures, proof.joint_error, feasible,
        tuple(untouched),
    )  # fmt: skip


def _describe_all(groups: PruningGroups, proof: Proof, axis_map: AxisMap) -> dict[str, StructureInspection]:
    structures = {}
    for name, found in proof.structures.items():
        error = found.relative_error
        if name in groups.structures:
            structures[name] = _describe(groups.structures[name], axis_map, error)
        elif name in groups.absent:
            structures[name] = StructureInspection("not_applicable", reason=groups.absent[name])
        else:
            structures[name] = StructureInspection("refused", relative_error=error, reason=groups.refused[name])
    return structures


def _describe(groups: StructureGroups, axis_map: AxisMap, error: float | None) -> StructureInspection:
    shapes = {name: info.shape for name, info in axis_map.parameters.items()}
    layouts, powers = {}, {}
    for _, axis in groups.all_axes():
        pattern = axis_map.parameters[axis.parameter].pattern
        layouts[f"{pattern}[{axis.dim}]"] = str(axis.layout)
        if axis.power:
            powers[pattern] = axis.power
    per_unit = groups.elements_per_unit(shapes)
    of_all_layers = sum(
        math.prod(shapes[axis.parameter]) // shapes[axis.parameter][axis.dim] * axis.layout.per_unit
        for _, axis in groups.all_axes()
    )
    if groups.stack:  # all of a layer goes, not only what writes to the stream
        first = f"{groups.stack}.0"
        per_unit = of_all_layers = sum(
            math.prod(info.shape) for info in axis_map.parameters.values() if info.layer == first
        )
    return StructureInspection(
        "proved", groups.num_units, len(groups.layers), per_unit, of_all_layers * groups.num_units,
        groups.config_sizes(groups.num_units), layouts, powers, error,
    )  # fmt: skip
