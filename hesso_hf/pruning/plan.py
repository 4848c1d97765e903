"""The plan of a run: the model's groups, the budget and the schedule, made before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.utils import logging

from ..budget.cost import Cost, build_cost
from ..budget.forward_time import ForwardTimes, solve_on_main
from ..budget.ladder import solve_ladder
from ..budget.latency import LatencyTable, build_latency
from ..budget.solver import LossFunction, PriceFunction
from ..budget.target_sizes import TargetSizes
from ..config import HessoConfig, structures_around
from ..config.checks import refuse_what_trainers_do
from ..distributed.parts import full_shape, named_parameters, stock_class
from ..errors import BudgetError, HessoError, UnsupportedStructureError
from ..export import in_training
from ..hf_models.build import build_meta
from ..hf_models.resize import resized_config
from ..hf_models.sizes import canonical_name
from ..structures.cut import build_cut, load_cut
from ..structures.experts import EXPERT_UNITS
from ..structures.groups import KeptUnits, PruningGroups
from ..structures.lora import Adapters, base_of, check_adapters, lora_layers, parameters_of
from ..structures.proof.prove import proved_groups
from ..structures.router_gates import RouterGates
from ..structures.shape_probe import AxisMap
from ..structures.untouched import untouched_models
from .calibration import LossCurves
from .criteria import needed_sums
from .optimizer import HessoOptimizer
from .preview import preview
from .process import PruningProcess
from .schedule import Schedule, resolve_schedule

logger = logging.get_logger(__name__)

_NOTHING = "nothing is pruned: the sizes that meet the budget are the model's own"


@dataclass
class PruningPlan:
    """What a run will do to a model.

    Attributes:
        groups: the structures that may be pruned.
        parameters: parameter count of kept units.
        price: the budget metric, where it isn't the parameter count.
        target: units to keep; a preview with an even split until `settle` measured one.
        rungs: the same of the models that are saved on the way, the largest first.
        curves: the measurement that decided the split, if there was one.
        timed: whether what a budget of latency takes has been timed.
    """

    config: HessoConfig
    model: PreTrainedModel
    groups: PruningGroups
    parameters: Cost
    target: TargetSizes
    price: PriceFunction | None = None
    curves: LossCurves | None = None
    rungs: tuple[TargetSizes, ...] = ()
    timed: bool = False

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        config: HessoConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> PruningPlan:
        """Prove the model's structures and check that the budget can be met.

        Args:
            device: that a budget of latency is measured on, by default the model's.
            dtype: that it is measured in: `config.export_dtype` where that is given, by default that of the weights.

        Raises:
            UnsupportedStructureError: for a model or structure that can't be pruned, with the reason.
            BudgetError: for a ratio that can't be met.
        """
        checked = check_model(model)
        known = structures_around(config.structure_names)
        proved, _, axis_map = proved_groups(stock_class(checked), checked.config, known)
        check_parameters(checked, axis_map)
        groups = proved.select(config.structure_names, explicit=config.structures != "all")
        if config.structures == "all":
            for sentence in proved.why_whole(proved.refused):
                logger.warning(sentence)
        parameters = build_cost("parameters", groups, axis_map, checked.config)
        price: PriceFunction | None = None
        if config.budget_metric == "latency":
            exported = getattr(torch, config.export_dtype) if config.export_dtype else None
            timed_in = exported or dtype or checked.dtype
            where = device or checked.device
            price = build_latency(groups, axis_map, where, timed_in, config.latency_tokens)
            ForwardTimes(stock_class(checked), checked.config, where, timed_in, config.latency_tokens).check()
        elif config.budget_metric != "parameters":
            price = build_cost(config.budget_metric, groups, axis_map, checked.config)
        target, *rungs = solve_ladder(config, checked.config, groups, parameters, price)
        if not lora_layers(checked):  # else frozen weights get a gradient where one is needed
            check_gradients(checked, groups, config)
        for whole in untouched_models(checked, groups):
            logger.warning(f"{whole}, and `pruning_ratio` is met by the rest")
        plan = cls(config, checked, groups, parameters, target, price, rungs=tuple(rungs))
        plan.check_target()
        return plan

    @property
    def wants_calibration(self) -> bool:
        """Whether there is a split between structures to be measured."""
        pinned = {canonical_name(self.model.config, name) for name in self.config.pinned_sizes}
        structures = self.groups.structures
        free = [name for name in self.groups.independent if not pinned & structures[name].increments.keys()]
        ratio = self.config.pruning_ratio is not None and self.config.structure_shares is None
        return ratio and len(free) > 1 and self.config.calibration_examples > 0

    @property
    def expected_rise(self) -> float | None:
        """Rise of the loss that is expected of the target sizes (nats per token), None where it wasn't measured."""
        if self.curves is None:
            return None
        kept = {name: self.target.kept_units[name] for name in self.curves.rises}
        return float(self.curves.loss(self.target.num_units)(kept))

    def settle(self, measure: Callable[[], LossCurves]) -> None:
        """Measure the split between structures, where there is one to choose, and time what a budget of latency takes.

        Raises:
            BudgetError: where no sizes that were timed come near the ratio.
        """
        loss: LossFunction | None = None
        if self.wants_calibration and (curves := measure()).rises:  # else there was nothing to measure on
            self.curves = curves
            loss = curves.loss({name: structure.num_units for name, structure in self.groups.structures.items()})
        elif self.timed or not isinstance(self.price, LatencyTable):
            return
        self.timed = True
        self.target, *rungs = self._solved(loss)
        self.rungs = tuple(rungs)
        self.check_target()

    def _solved(self, loss: LossFunction | None) -> list[TargetSizes]:
        """Solve again, a budget of latency by timing whole models where all layers are alike."""
        config, table = self.config, self.price

        def solve() -> list[TargetSizes]:  # `prepare` has warned
            model_config = self.model.config
            return solve_ladder(config, model_config, self.groups, self.parameters, table, loss, warns=False)

        if not isinstance(table, LatencyTable) or config.layer_widths == "per_layer":
            return solve()
        times = ForwardTimes(stock_class(self.model), self.model.config, table.device, table.dtype, table.tokens)
        return solve_on_main(solve, table, times, config.pruning_ratio)

    def check_target(self) -> None:
        """Build every smaller model without weights and count its parameters.

        Raises:
            BudgetError: where the class builds something else than was planned.
            UnsupportedStructureError: where it can't have layers of different widths.
        """
        if self.config.layer_widths == "per_layer":
            return check_layer_widths(self.model, self.groups, self.target)  # the sizes are means over the layers
        for target in (self.target, *self.rungs):
            small = build_meta(stock_class(self.model), resized_config(self.model.config, target.sizes))
            count = sum(parameter.numel() for parameter in small.parameters())
            if count != target.parameters_after:
                raise BudgetError(
                    f"{stock_class(self.model).__name__} with {target.sizes} has {count:,} parameters, "
                    f"{target.parameters_after:,} were planned; pin other sizes with `target_sizes`"
                )
        return None

    def preview(self, schedule: Schedule) -> str:
        """Describe sizes and steps for people, and what the trial removals expect of the loss."""
        return preview(self, schedule)

    def sizes_of(self, name: str) -> list[str]:
        """Return the config sizes of a structure, before and after."""
        structure = self.groups.structures[name]
        before, after = (structure.config_sizes(n) for n in (structure.num_units, self.target.kept_units[name]))
        return [f"{size} {before[size]} -> {after[size]}" for size in after]

    def warn_of_shape(self) -> None:
        """Warn of structures of which so little stays that nobody serves such a model, and where all of all stay."""
        if self.target.kept_units == self.target.num_units:
            given = self.config.target_sizes
            logger.warning(f"`target_sizes` ({given}) are the model's own: nothing is pruned" if given else _NOTHING)
        for name, share in self.target.nearly_gone.items():
            kept, units = self.target.kept_units[name], self.target.num_units[name]
            logger.warning(
                f"{name}: {kept} of {units} units of a layer stay ({share:.0%}; {', '.join(self.sizes_of(name))}); a "
                "model of such a shape learns little and serves badly: lower `pruning_ratio`, or pin sizes with "
                "`target_sizes`"
            )

    def process(self, schedule: Schedule) -> PruningProcess:
        """Build the pruning state over the model's parameters."""
        self.warn_of_shape()
        experts, adapters = self.groups.structures.get(EXPERT_UNITS), Adapters.of(self.model)
        gates = RouterGates.attach(self.model, experts) if experts is not None else None
        parameters = parameters_of(self.model)
        process = PruningProcess(
            parameters, self.groups, self.target, schedule, self.config, gates, adapters, self.rungs
        )
        in_training.begin(self.model, process.decision)
        return process


def wrap_optimizer(optimizer: Optimizer, model: nn.Module, config: HessoConfig, total_steps: int) -> HessoOptimizer:
    """Put HESSO around an optimizer for a training loop of one's own; the split between structures is even.

    Call `step` as usual; when `optimizer.process.finished`, `export_pruned(model, folder)` writes the smaller model.

    Args:
        model: a transformers model, or a PeftModel of one with LoRA; wrap it with DDP, where that is used, before.
        total_steps: optimizer steps of the whole run, of which shares in `config` are taken.

    Raises:
        HessoError: where the model, the budget or the schedule doesn't allow what is asked for, or the optimizer was
            made for another model.

    Example:
        >>> # optimizer = wrap_optimizer(torch.optim.AdamW(model.parameters()), model, HessoConfig(0.5), 1000)
    """
    refuse_what_trainers_do(config)
    plan = PruningPlan.prepare(model, config)
    plan.settle(lambda: LossCurves({}, {}))  # there are no examples to measure on
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise HessoError(
            f"`optimizer` ({type(optimizer).__name__}) holds no parameter of `model`: make it from model.parameters(), "
            "after the model is loaded and wrapped"
        )
    process = plan.process(resolve_schedule(config, total_steps))
    process.prepare_gradients()
    return HessoOptimizer(optimizer, process)


def check_gradients(model: PreTrainedModel, groups: PruningGroups, config: HessoConfig) -> None:
    """Refuse layers that are frozen as a whole where the saliency needs a gradient.

    Raises:
        UnsupportedStructureError: naming the structure and the layer.
    """
    if set(needed_sums(config.saliency_weights)) <= {"x2"}:
        return
    trained = {name for name, parameter in named_parameters(model).items() if parameter.requires_grad}
    for name, structure in groups.structures.items():
        for layer, axes in zip(structure.layers, structure.axes, strict=True):
            if not any(axis.parameter in trained for axis in axes):
                raise UnsupportedStructureError(
                    f"{name} of {layer or 'the model'}: all weights are frozen, so `saliency` "
                    f"({list(config.saliency_weights)}) sees no gradient; train them, or use saliency='magnitude'"
                )


def check_layer_widths(model: PreTrainedModel, groups: PruningGroups, target: TargetSizes) -> None:
    """Cut a model without weights to layers of different widths, as the end of the run will.

    Raises:
        UnsupportedStructureError: where the class doesn't build such layers.
    """
    units = {}
    for name, structure in groups.structures.items():
        few = tuple(range(target.kept_units[name]))
        all_units = tuple(range(structure.num_units))
        units[name] = tuple(all_units if index == 1 else few for index in range(len(structure.layers)))
    kept = KeptUnits({name: structure.num_units for name, structure in groups.structures.items()}, units)
    try:
        full = build_meta(stock_class(model), copy.deepcopy(model.config))
        with torch.device("meta"):
            small = build_cut(full, groups, kept)
        load_cut(small, dict(full.named_parameters()), groups, kept)
    except Exception as error:  # the class may fail in any way
        raise UnsupportedStructureError(
            f"`layer_widths` ('per_layer'): {stock_class(model).__name__} can't have layers that differ in "
            f"{[name for name, layers in units.items() if len(set(layers)) > 1]} ({error}); use 'uniform', or name "
            "other `structures`"
        ) from error


def check_parameters(model: PreTrainedModel, axis_map: AxisMap) -> None:
    """Compare the model's parameters with those that its config says.

    Raises:
        UnsupportedStructureError: naming the first that is missing, extra (weights tied or untied by hand) or resized.
    """
    factors = Adapters.of(model).factors()
    shapes = {name: full_shape(parameter) for name, parameter in parameters_of(model).items() if name not in factors}
    for name in sorted(shapes.keys() ^ axis_map.parameters.keys()):
        where = "the model but not in what" if name in shapes else "what"
        raise UnsupportedStructureError(
            f"{name} is in {where} {type(model.config).__name__} builds; were weights tied or replaced by hand? "
            "Set `tie_word_embeddings` in the config accordingly and load the model again"
        )
    for name, info in axis_map.parameters.items():
        if shapes[name] != info.shape:
            raise UnsupportedStructureError(
                f"{name} has shape {shapes[name]}, its config says {info.shape}; sizes and config must agree"
            )


def check_unquantised(model: nn.Module) -> None:
    """Refuse packed weights.

    Raises:
        UnsupportedStructureError: with what to do instead.
    """
    if getattr(base_of(model), "hf_quantizer", None) is not None:
        raise UnsupportedStructureError(
            f"`model` ({type(base_of(model)).__name__}) is quantised: packed weights can't be cut. "
            "Load it in float32, or call `model.dequantize()` (before `get_peft_model`, where an adapter is trained)"
        )


def check_model(model: nn.Module) -> PreTrainedModel:
    """Return the model where it can be pruned as it is.

    Raises:
        UnsupportedStructureError: for anything but an unquantised `PreTrainedModel`, or a PeftModel of one with LoRA.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedStructureError(f"`model` ({type(model).__name__}) must be a transformers PreTrainedModel")
    check_unquantised(model)
    model = check_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedStructureError(f"`model` ({type(model).__name__}) must be a transformers PreTrainedModel")
    if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) and not lora_layers(model):
        logger.warning(
            f"`model` trains pure {str(model.dtype).removeprefix('torch.')} weights: small updates are rounded away. "
            "Load it with `dtype=torch.float32` and set `bf16=True` in TrainingArguments for fp32 masters"
        )
    return model
