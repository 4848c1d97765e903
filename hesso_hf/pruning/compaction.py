"""Compaction: once all units that go are at zero, model and optimizer state in memory become the smaller ones.

It is the export's cut, verified as the export verifies it, put in the place of the model that is being trained.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, Optimizer, RMSprop
from torch.optim import Adafactor as TorchAdafactor
from transformers import Adafactor, PreTrainedModel

from ..compat import refit, why_not_refit
from ..distributed.collectives import on_all, world_size
from ..errors import HessoError, VerificationError
from ..export.adapter import AdapterSource
from ..export.decision import Compaction, Decision, decide
from ..export.parameters import WholeSource
from ..export.verify import FOLD_TOLERANCE, Verifier
from ..hf_models.build import first_line
from ..structures.cut import cuts_by_tensor, zero_units_
from ..structures.groups import Axis, KeptUnits, PruningGroups
from ..structures.in_place import InPlace, set_data
from ..structures.layers import is_dropped
from ..structures.lora import Adapters, base_of, lora_layers, num_parameters, parameters_of
from ..structures.router_gates import remove_gates
from .optimizer import HessoOptimizer
from .process import PruningProcess
from .weights.snapshot import kept_random_state

# The state of one value an element, by optimizer, with the power of the gradient that it goes by.
_OF_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
STATE_POWERS: Mapping[type[Optimizer], Mapping[str, int]] = {
    Adam: _OF_ADAM,
    AdamW: _OF_ADAM,
    SGD: {"momentum_buffer": 1},
    RMSprop: {"square_avg": 2, "grad_avg": 1, "momentum_buffer": 0},
    Adagrad: {"sum": 2},
    Muon: {"momentum_buffer": 1},
    Adafactor: {"exp_avg": 0, "exp_avg_sq": 2, "exp_avg_sq_row": 2, "exp_avg_sq_col": 2},
    TorchAdafactor: {"variance": 2, "row_var": 2, "col_var": 2},
}
# What is a mean over a dimension, the last or the one before.
MEANS = {"exp_avg_sq_row": -1, "row_var": -1, "exp_avg_sq_col": -2, "col_var": -2}
_CUT = "cut the model in memory"


def why_not_compact(model: nn.Module, base: Optimizer | None, layer_widths: str) -> str:
    """Return why a model that trains can't become the smaller one, "" where it can.

    Args:
        base: the optimizer that HESSO is around, where there is one already.
        layer_widths: as in `HessoConfig`.
    """
    if layer_widths == "per_layer":
        return "`layer_widths` ('per_layer') has a model that no stock class is"
    if base is not None and type(base) not in STATE_POWERS:
        known = ", ".join(kind.__name__ for kind in STATE_POWERS)
        return f"the state of {type(base).__module__}.{type(base).__name__} can't be cut ({known} of torch's can)"
    return ""


def parallel_of(model: nn.Module) -> DistributedDataParallel | None:
    """Return DDP in what a model is wrapped in, None where there is none."""
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


def why_not_refit_parallel(model: nn.Module) -> str:
    """Return why what averages a model's gradients over processes can't be had for a smaller one, "" where it can.

    Args:
        model: in all that it is wrapped in.
    """
    if world_size() == 1:
        return ""
    parallel = parallel_of(model)
    return "it is trained on several processes, and not by DDP" if parallel is None else why_not_refit(parallel)


def compact(model: nn.Module, optimizer: HessoOptimizer) -> Compaction:
    """Cut the pruned units out of a model that goes on training, and out of its optimizer's state.

    For training loops of one's own: call it between two steps, once `optimizer.process.finished`, on every process. The
    model and its parameters stay the objects that they are; gradients are forgotten. A model that `torch.compile`
    returned compiles anew, and DDP makes its buckets anew.

    Args:
        model: the transformers model that `wrap_optimizer` was given; on several processes in its
            `DistributedDataParallel`.

    Raises:
        HessoError: where pruning hasn't finished, or the model can't be cut in memory, with the reason.
        VerificationError: where the smaller model's logits differ. Nothing has changed then, on any process, as after
            an error of another one (HessoError) and where there is no room.
    """
    process, parallel = optimizer.process, parallel_of(model)
    whole = parallel.module if parallel is not None else model
    reason = why_not_compact(whole, optimizer.base, process.config.layer_widths) or why_not_refit_parallel(model)
    if reason:
        raise HessoError(f"`model` can't be cut while it trains: {reason}; `export_pruned` cuts it afterwards")
    if not process.finished or process.state.compaction is not None:
        found = "the model was cut already" if process.finished else "cut the model when pruning has finished"
        raise HessoError(f"`optimizer` is at step {process.step}, pruning ends at {process.schedule.end}: {found}")
    trained = base_of(whole)
    decision = decide(trained, process.kept_units(), process.groups)
    trained.zero_grad(set_to_none=True)
    was_training = trained.training
    try:
        with kept_random_state(trained.device):
            verifier = on_all(lambda: Verifier(_source(trained, decision)), _CUT)
            small, error = on_all(verifier.checked_cut, _CUT)
            compaction = Compaction(
                process.step, error, num_parameters(trained), decision.sizes_before, decision.kept_units
            )
            _put_(base_of(small), trained, optimizer, decision, verifier)
    finally:
        trained.train(was_training)
        if parallel is not None:
            refit(parallel)  # a cut that was undone has left gradients without their way to the others
    _forget_(trained, process, compaction)
    return compaction


def compact_as(model: PreTrainedModel, optimizer: HessoOptimizer, compaction: Compaction, kept: KeptUnits) -> None:
    """Make a model as small as that of a checkpoint, before its weights and the optimizer's state are loaded.

    Args:
        model: as large as the one that the run began with.
        kept: the checkpoint's decision.
    """
    decision = Decision(optimizer.process.groups, kept)
    with kept_random_state(model.device):
        zero_units_(parameters_of(model), Adapters.of(model).extend(decision.groups), kept)  # a base as it is on disk
        _put_(base_of(_source(model, decision).cut(kept)), model, optimizer, decision, None)
    _forget_(model, optimizer.process, compaction)


def _source(model: PreTrainedModel, decision: Decision) -> WholeSource:
    adapted = bool(lora_layers(model))
    return AdapterSource(model, decision, str(model.name_or_path)) if adapted else WholeSource(model, decision)


@torch.no_grad()
def _put_(
    small: PreTrainedModel,
    model: PreTrainedModel,
    optimizer: HessoOptimizer,
    decision: Decision,
    verifier: Verifier | None,
) -> None:
    """Put the smaller model in the larger one's place where a verifier finds that it computes the same there.

    Raises:
        VerificationError: where it doesn't; everything is as it was then, as after any other error.
    """
    process, place, adapters = optimizer.process, InPlace(model), Adapters.of(model)
    named, dtypes = parameters_of(model), {parameter: parameter.dtype for parameter in model.parameters()}
    process.bound.route({name: torch.ones_like(scales) for name, scales in process.scales.items()})

    def put() -> None:
        place.put(small, decision.groups, decision.kept)
        error = verifier.error_of(model) if verifier is not None else 0.0
        if not error <= FOLD_TOLERANCE:
            raise VerificationError(
                f"{type(model).__name__} isn't the same when it is cut in memory: its logits differ by {error:.1e} "
                f"(relative, fp32; allowed {FOLD_TOLERANCE:.0e})"
            )

    try:
        on_all(put, _CUT)
    except Exception as error:
        place.undo()
        process.bound.route(process.scales)
        if isinstance(error, HessoError | torch.OutOfMemoryError):
            raise
        # model code that goes by other sizes than its modules' may fail in any way
        raise VerificationError(f"{type(model).__name__} can't be cut in memory: {first_line(error)}") from error
    for parameter in model.parameters():
        set_data(parameter, parameter.data.to(dtypes[parameter]))
    remove_gates(model)
    _cut_state_(optimizer.base, named, decision, adapters.extend(decision.groups))


def _forget_(model: PreTrainedModel, process: PruningProcess, compaction: Compaction) -> None:
    """Let go what only the larger model needed."""
    process.let_go(compaction, parameters_of(model))
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what was compiled has the sizes in it
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _cut_state_(
    base: Optimizer, parameters: Mapping[str, nn.Parameter], decision: Decision, groups: PruningGroups
) -> None:
    """Cut what an optimizer keeps of each parameter, and scale it as the gradient is scaled by a factor on the weight.

    Args:
        parameters: those of the larger model, by the names that they had there.
        groups: those of the decision, adapters' factors among them.
    """
    cuts, powers, gone = cuts_by_tensor(groups, decision.kept), STATE_POWERS.get(type(base), {}), set()
    for name, parameter in parameters.items():
        if is_dropped(name, decision.groups, decision.kept):
            base.state.pop(parameter, None)
            gone.add(id(parameter))
            continue
        state: dict[str, Any] = base.state.get(parameter, {})
        axes = cuts.get(name, [])
        factor = math.prod(math.sqrt(len(units) / total) ** axis.power for axis, units, total in axes)
        for key, power in powers.items():
            if isinstance(values := state.get(key), torch.Tensor) and axes:
                for axis, units, total in axes:
                    values = _cut_values(values, axis, units, total, parameter.dim(), MEANS.get(key))
                state[key] = values / factor**power
    for group in base.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]


def _cut_values(
    values: torch.Tensor, axis: Axis, units: torch.Tensor, total: int, dims: int, mean: int | None
) -> torch.Tensor:
    """Cut what an optimizer keeps of a parameter with so many dimensions.

    Args:
        mean: the dimension that it is the mean over, in which pruned units were zeros; None where it has all.
    """
    indices = axis.layout.indices(units, total).to(values.device)
    if mean is None or axis.dim != dims + mean:
        before = mean is not None and values.dim() < dims and axis.dim > dims + mean
        return values.index_select(axis.dim - before, indices)
    return values * (axis.layout.size(total) / len(indices))
