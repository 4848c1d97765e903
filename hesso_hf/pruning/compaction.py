"""Compaction: once all units that go are at zero, model and optimizer state in memory become the smaller ones.

It is the export's cut, verified as the export verifies it, put in the place of the model that is being trained.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..compat import refit, why_not_refit
from ..distributed.collectives import on_all, world_size
from ..distributed.passes import in_eval
from ..errors import HessoError, VerificationError, first_line
from ..export.adapter import AdapterSource
from ..export.decision import Compaction, Decision, decide
from ..export.in_training import note_cut
from ..export.parameters import ParameterSource, WholeSource
from ..export.verify import FOLD_TOLERANCE, Verifier
from ..structures.cut import Cuts, cuts_by_tensor, zero_units_
from ..structures.groups import KeptUnits
from ..structures.in_place import InPlace
from ..structures.layers import full_names
from ..structures.lora import Adapters, base_of, lora_layers, num_parameters, parameters_of
from ..structures.router_gates import remove_gates
from .optimizer import HessoOptimizer
from .optimizer_state import (
    MEANS,
    cut_values,
    factor_of,
    numbers_of,
    put_numbers,
    state_powers,
    why_not_cut_state,
    why_not_one_of,
)
from .process import PruningProcess
from .weights.snapshot import kept_random_state

_CUT = "cut the model in memory"


def why_not_compact(
    base: Optimizer | None, layer_widths: str, optimizers: Iterable[type[Optimizer]] | None = None
) -> str:
    """Return why a model that trains can't become the smaller one, "" where it can.

    Args:
        base: the optimizer that HESSO is around, where there is one already.
        layer_widths: as in `HessoConfig`.
        optimizers: the only ones whose state can be cut; by default all that `state_powers` knows.
    """
    if layer_widths == "per_layer":
        return "`layer_widths` ('per_layer') has a model that no stock class is"
    if base is None:
        return ""
    return why_not_cut_state(base) if optimizers is None else why_not_one_of(base, optimizers)


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


class Steps(Protocol):
    """HESSO around an optimizer's steps."""

    process: PruningProcess


class InMemory:
    """A model that trains, to become the smaller one where it stands: every process has all of it.

    Attributes:
        place: that the smaller one is put into.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.place = model, InPlace(model)

    def decision(self, process: PruningProcess) -> Decision:
        """Return what stays.

        Raises:
            HessoError: where a unit that goes isn't at zero.
        """
        return decide(self.model, process.kept_units(), process.groups)

    def source(self, decision: Decision) -> ParameterSource:
        """Return what makes the smaller model."""
        model = self.model
        adapted = bool(lora_layers(model))
        return AdapterSource(model, decision, str(model.name_or_path)) if adapted else WholeSource(model, decision)

    def in_fp32(self) -> AbstractContextManager[None]:
        """Have the model compute in fp32 for a while, where its parameters are."""
        return nullcontext()

    def cut_state(self, name: str, values: torch.Tensor, cuts: Cuts, mean: int | None, like: nn.Parameter) -> Any:
        """Return what is left of a tensor of the optimizer's state, not scaled.

        Args:
            name: of the parameter that it belongs to.
            mean: the dimension that it is the mean over, None where it has all.
            like: the smaller parameter.
        """
        return cut_values(values, cuts, like.dim(), mean)


def compact(model: nn.Module, optimizer: HessoOptimizer) -> Compaction:
    """Cut the pruned units out of a model that goes on training, and out of its optimizer's state.

    For training loops of one's own: call it between two steps, once `optimizer.process.finished`, on every process. The
    model and its parameters stay the objects that they are; gradients are forgotten. A model that `torch.compile`
    returned compiles anew, and DDP makes its buckets anew. For a model under FSDP2 there is
    `hesso_hf.engines.fsdp.compaction.compact`.

    Args:
        model: the transformers model that `wrap_optimizer` was given; on several processes in its
            `DistributedDataParallel`.

    Raises:
        HessoError: where pruning hasn't finished, or the model can't be cut in memory, with the reason.
        VerificationError: where the smaller model's logits differ. Nothing has changed then, on any process, as after
            an error of another one (HessoError) and where there is no room.
    """
    parallel = parallel_of(model)
    whole = parallel.module if parallel is not None else model
    reason = why_not_compact(optimizer.base, optimizer.process.config.layer_widths)
    check_compactable(optimizer, reason or why_not_refit_parallel(model))
    try:
        return cut_in_memory(InMemory(base_of(whole)), optimizer)
    finally:
        if parallel is not None:
            refit(parallel)  # a cut that was undone has left gradients without their way to the others


def check_compactable(optimizer: Steps, reason: str) -> None:
    """Refuse to cut where there is a reason against it, and before or after the time.

    Raises:
        HessoError: with the reason.
    """
    process = optimizer.process
    if reason:
        raise HessoError(f"`model` can't be cut while it trains: {reason}; `export_pruned` cuts it afterwards")
    if not process.finished or process.state.compaction is not None:
        found = "the model was cut already" if process.finished else "cut the model when pruning has finished"
        raise HessoError(f"`optimizer` is at step {process.step}, pruning ends at {process.schedule.end}: {found}")


def cut_in_memory(memory: InMemory, optimizer: HessoOptimizer) -> Compaction:
    """Cut the pruned units out of a model, however it lies in memory, and out of its optimizer's state.

    Raises:
        HessoError, VerificationError: as `compact` does.
    """
    trained, process = memory.model, optimizer.process
    decision = memory.decision(process)
    trained.zero_grad(set_to_none=True)
    with in_eval(trained), kept_random_state(trained.device):
        verifier = on_all(lambda: Verifier(memory.source(decision)), _CUT)
        small, error = on_all(verifier.checked_cut, _CUT)
        compaction = Compaction(
            process.step, error, num_parameters(trained), decision.sizes_before, decision.kept_units
        )
        _put_(base_of(small), memory, process, optimizer.base, decision, verifier)
    _forget_(trained, process, compaction)
    return compaction


def compact_as(
    model: PreTrainedModel, process: PruningProcess, base: Optimizer | None, compaction: Compaction, kept: KeptUnits
) -> None:
    """Make a model as small as that of a checkpoint, before its weights and the optimizer's state are loaded.

    Args:
        model: as large as the one that the run began with.
        base: the optimizer that HESSO is around, where there is one already.
        kept: the checkpoint's decision.
    """
    decision, memory = Decision(process.groups, kept), InMemory(model)
    with kept_random_state(model.device):
        zero_units_(parameters_of(model), Adapters.of(model).extend(decision.groups), kept)  # a base as it is on disk
        _put_(base_of(memory.source(decision).cut(kept)), memory, process, base, decision, None)
    _forget_(model, process, compaction)


@torch.no_grad()
def _put_(
    small: PreTrainedModel,
    memory: InMemory,
    process: PruningProcess,
    base: Optimizer | None,
    decision: Decision,
    verifier: Verifier | None,
) -> None:
    """Put the smaller model in the larger one's place where a verifier finds that it computes the same there.

    Raises:
        VerificationError: where it doesn't; everything is as it was then, as after any other error.
    """
    model, place = memory.model, memory.place
    groups, parameters = Adapters.of(model).extend(decision.groups), parameters_of(model)
    process.bound.route({name: torch.ones_like(scales) for name, scales in process.scales.items()})

    def check() -> None:
        error = verifier.error_of(model) if verifier is not None else 0.0
        if not error <= FOLD_TOLERANCE:
            raise VerificationError(
                f"{type(model).__name__} isn't the same when it is cut in memory: its logits differ by {error:.1e} "
                f"(relative, fp32; allowed {FOLD_TOLERANCE:.0e})"
            )

    try:
        with memory.in_fp32():
            on_all(lambda: place.put(small, decision.groups, decision.kept), _CUT)
            on_all(check, _CUT)
        on_all(place.settle, _CUT)
    except Exception as error:
        place.undo()
        process.bound.route(process.scales)
        if isinstance(error, HessoError | torch.OutOfMemoryError):
            raise
        # model code that goes by other sizes than its modules' may fail in any way
        raise VerificationError(f"{type(model).__name__} can't be cut in memory: {first_line(error)}") from error
    place.keep()
    remove_gates(model)
    left = parameters_of(model)
    now = {origin: left[name] for name, origin in full_names(left, decision.groups, decision.kept).items()}
    if base is None:
        return
    _exchange_(base, parameters, now)
    try:
        _cut_state_(base, now, cuts_by_tensor(groups, decision.kept), memory)
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__} was cut in memory, and its optimizer's state could not be ({first_line(error)}): "
            "go on from the last checkpoint, with `compact` 'never'"
        ) from error


def _forget_(model: PreTrainedModel, process: PruningProcess, compaction: Compaction) -> None:
    """Let go what only the larger model needed."""
    process.let_go(compaction, parameters_of(model))
    note_cut(model, compaction)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what was compiled has the sizes in it
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _exchange_(base: Optimizer, parameters: dict[str, nn.Parameter], now: Mapping[str, nn.Parameter]) -> None:
    """Have an optimizer train what is left of a model's parameters; what is gone isn't held any more.

    Args:
        parameters: those of the larger model; emptied.
        now: those of the smaller one, by the names that they had in the larger one.
    """
    others = {id(parameter): now.get(name) for name, parameter in parameters.items()}
    for group in base.param_groups:
        found = [others.get(id(parameter), parameter) for parameter in group["params"]]
        group["params"] = [parameter for parameter in found if parameter is not None]
    for name, parameter in parameters.items():
        state = base.state.pop(parameter, None)
        if state is not None and name in now:
            base.state[now[name]] = state
    parameters.clear()


def _cut_state_(
    base: Optimizer, parameters: Mapping[str, nn.Parameter], cuts: Mapping[str, Cuts], memory: InMemory
) -> None:
    """Cut what an optimizer keeps of each parameter, and scale it as the gradient is scaled by a factor on the weight.

    Args:
        parameters: those of the smaller model, by the names that they had in the larger one.
        cuts: of each parameter.
    """
    for name, parameter in parameters.items():
        state: dict[str, Any] = base.state.get(parameter, {})
        axes = cuts.get(name, ())
        for key, power in state_powers(base).items():
            if isinstance(state.get(key), torch.Tensor) and axes:
                left = memory.cut_state(name, numbers_of(state, key), axes, MEANS.get(key), parameter)
                put_numbers(base, parameter, state, key, left / factor_of(axes) ** power)
