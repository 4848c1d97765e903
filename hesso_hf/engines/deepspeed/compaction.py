"""Compaction under ZeRO: the smaller model takes the larger one's place in the engine that trains it.

ZeRO's flat vectors can't become shorter. So DeepSpeed makes a second engine for the smaller model, around the same base
optimizer and schedule, its vectors are filled with what is left of the first one's, and the first, which a training
loop holds, becomes the second. Modules stay the objects that they are; under ZeRO-3 parameters are new ones.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from transformers import PreTrainedModel

from ...distributed.collectives import (
    all_or_none,
    broadcast_,
    from_main,
    is_main_process,
    on_all,
    summed_over_ranks,
)
from ...distributed.parts import full_shape, named_parameters
from ...distributed.passes import in_eval
from ...errors import HessoError, VerificationError, first_line
from ...export.decision import NOTHING_CUT, Compaction, Decision
from ...export.verify import FOLD_TOLERANCE, Verifier, relative_error
from ...pruning.compaction import check_compactable
from ...pruning.optimizer_state import STATE_POWERS, cut_values, factor_of
from ...pruning.weights.snapshot import kept_random_state
from ...structures.cut import cuts_by_tensor
from ...structures.groups import PruningGroups
from ...structures.layers import full_names
from ...structures.lora import num_parameters
from ...structures.router_gates import remove_gates
from .export import ZeroSource
from .holdings import ZeroHoldings
from .in_place import ZeroInPlace, without_values
from .ranges import Place, masters_of
from .steps import ZeroSteps

_CUT = "cut the model in memory"
_OF_ADAM = STATE_POWERS[Adam]
POWERS: Mapping[str, Mapping[str, int]] = {  # by the optimizer's name: DeepSpeed's are imported by whoever uses them
    **{kind.__name__: STATE_POWERS[kind] for kind in (Adam, AdamW, SGD)},
    "FusedAdam": _OF_ADAM,
    "DeepSpeedCPUAdam": _OF_ADAM,
}
# What an engine and its ZeRO optimizer know that the next ones go on with.
_COUNTED = ("global_steps", "global_samples", "micro_steps", "skipped_steps", "_global_grad_norm", "training")
_KNOWN = ("loss_scaler", "_global_grad_norm", "overflow")


def why_not_exchange(base: Optimizer | None, settings: Mapping[str, Any], compiles: bool) -> str:
    """Return why a model under ZeRO can't be exchanged for a smaller one, "" where it can.

    Args:
        base: the base optimizer, where there is one already.
        settings: DeepSpeed's config.
        compiles: whether the engine compiles the model.
    """
    zero = settings["zero_optimization"]
    if compiles:
        return "`torch_compile` under DeepSpeed, whose engine has compiled the larger one"
    against = {
        "offload_param": (zero.get("offload_param") or {}).get("device", "none") != "none",
        "zero_quantized_weights": bool(zero.get("zero_quantized_weights")),
        "zero_hpz_partition_size": (zero.get("zero_hpz_partition_size") or 1) > 1,
    }
    if found := next((name for name, there in against.items() if there), ""):
        return f"`{found}` ({zero[found]}) of DeepSpeed's config"
    if base is not None and type(base).__name__ not in POWERS:
        return f"the state of {type(base).__name__} can't be cut under DeepSpeed ({', '.join(POWERS)} can)"
    return ""


@dataclass
class _Left:
    """What is left of a trained parameter: on the main process its values, in fp32, on the others nothing.

    Attributes:
        weights: the masters.
        state: of the base optimizer, by key.
    """

    shape: torch.Size
    weights: torch.Tensor | None
    state: dict[str, torch.Tensor | None] = field(default_factory=dict)


def compact(model: PreTrainedModel, engine: Any, steps: ZeroSteps, wrappers: Iterable[Any] = ()) -> Compaction:
    """Cut the pruned units out of a model that ZeRO trains, and out of its optimizer's state; all processes call it.

    Call it between two steps, once `steps.process.finished`.

    Args:
        engine: DeepSpeed's; it stays the object that it is.
        wrappers: what else holds its ZeRO optimizer, as `optimizer`: Accelerate's.

    Raises:
        HessoError: where pruning hasn't finished, or the model can't be cut, with the reason. Nothing has changed then.
        VerificationError: where the smaller model's logits differ. Nothing has changed then.
        RuntimeError: where DeepSpeed can't train the smaller model, which has taken the larger one's place.
    """
    check_compactable(steps, "")
    process, writes = steps.process, is_main_process()
    decision = Decision(process.groups, process.kept_units())
    with in_eval(model), kept_random_state(model.device):
        verifier = on_all(lambda: Verifier(ZeroSource(model, decision, writes)), _CUT)
        small, error = on_all(verifier.checked_cut, _CUT)
        compaction = Compaction(process.step, error, num_parameters(model), decision.sizes_before, decision.kept_units)
        small = without_values(model, decision) if small is None else small
        exchange = _Exchange(model, engine, steps, decision, small)
        del small
        exchange.read()
        exchange.put()
        process.let_go(compaction, named_parameters(model))
        try:
            exchange.renew([wrapper for wrapper in wrappers if wrapper.optimizer is engine.optimizer])
            steps.attach(engine, named_parameters(model))
            exchange.check(verifier, writes)
        except Exception as failed:
            raise RuntimeError(
                f"{type(model).__name__} was cut in memory, and DeepSpeed can't go on with it ({first_line(failed)}): "
                "go on from the last checkpoint, with `compact` 'never'"
            ) from failed
    return compaction


class _Exchange:
    """Puts a smaller model into a larger one's place in DeepSpeed's engine, with masters and optimizer state."""

    def __init__(
        self, model: PreTrainedModel, engine: Any, steps: ZeroSteps, decision: Decision, small: PreTrainedModel
    ) -> None:
        self._model, self._engine, self._steps, self._decision, self._small = model, engine, steps, decision, small
        self._found = named_parameters(small)
        self._origins = full_names(self._found, decision.groups, decision.kept)
        expected = from_main(self._origins)
        on_all(lambda: _check_alike(self._origins, expected), _CUT)
        self._zero: Any = engine.optimizer
        self._base: Optimizer = self._zero.optimizer
        self._groups = [[self._zero.param_names[p] for p in group] for group in _trained_by_group(self._zero)]
        self._left: dict[str, _Left] = {}
        self._scalars: dict[str, Any] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    @torch.no_grad()
    def read(self) -> None:
        """Take what is left of masters and state to the main process' memory, one tensor at a time.

        Raises:
            HessoError: for state that isn't known how to be cut, on all processes; nothing has changed then.
        """
        decision, zero, base = self._decision, self._zero, self._base
        powers, cuts = POWERS[type(base).__name__], cuts_by_tensor(decision.groups, decision.kept)
        masters, trained = masters_of(zero), {name for group in self._groups for name in group}
        first: Mapping[str, Any] = base.state.get(masters[0], {})
        keys = [key for key, value in first.items() if isinstance(value, torch.Tensor) and value.dim()]
        if unknown := sorted(set(keys) - powers.keys()):
            raise HessoError(f"the state of {type(base).__name__} holds {unknown}, which can't be cut")
        self._scalars = {key: value for key, value in first.items() if key not in keys}
        self._dtypes = {key: first[key].dtype for key in keys}
        holdings, larger = ZeroHoldings(zero), named_parameters(self._model)
        for name, origin in self._origins.items():
            if origin not in trained:
                continue
            values, axes = self._found[name].detach(), cuts.get(origin, ())
            left = _Left(values.shape, values.cpu() if is_main_process() else None)
            for key in keys:
                whole = _whole_state(holdings.place(larger[origin]), larger[origin], masters, base, key)
                cut = cut_values(whole, axes, values.dim()) / factor_of(axes) ** powers[key]
                left.state[key] = cut.cpu() if is_main_process() else None
            self._left[name] = left

    def put(self) -> None:
        """Give the model's modules the smaller model's sizes and weights.

        Raises:
            HessoError, OutOfMemoryError: where that fails on a process; all is as it was then.
        """
        place = ZeroInPlace(self._model, self._delivered())
        try:
            on_all(lambda: place.put(self._small, self._decision.groups, self._decision.kept), _CUT)
        except Exception:
            place.undo()
            raise
        place.keep()
        del self._small, self._found
        remove_gates(self._model)

    @torch.no_grad()
    def _delivered(self) -> dict[nn.Parameter, nn.Parameter]:
        """Return what takes each parameter's place, from the main process, divided where the parameter is."""
        larger, device, made = named_parameters(self._model), self._model.device, dict[nn.Parameter, nn.Parameter]()
        for name, origin in self._origins.items():
            old: Any = larger[origin]
            whole = all_or_none(partial(_on_device, self._found[name].detach(), device), device)
            broadcast_([whole])
            made[old] = nn.Parameter(whole.to(old.dtype), requires_grad=old.requires_grad)
            if hasattr(old, "ds_tensor"):
                old.convert_to_zero_parameters(param_list=[made[old]])
        return made

    @torch.no_grad()
    def renew(self, wrappers: list[Any]) -> None:
        """Have DeepSpeed train the smaller model, with what is left of masters and state, in the same engine."""
        import deepspeed

        engine, base = self._engine, self._base
        now = named_parameters(self._model)
        names = {origin: name for name, origin in self._origins.items()}
        self._steps.detach()
        base.state.clear()
        for options, group in zip(base.param_groups, self._groups, strict=True):
            options["params"] = [now[names[origin]] for origin in group if origin in names]
        settings = [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups]
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        engine.destroy()
        counted = {name: vars(engine)[name] for name in _COUNTED if name in vars(engine)}
        known = {name: vars(self._zero)[name] for name in _KNOWN if name in vars(self._zero)}
        for holder in (engine, *wrappers):
            holder.optimizer = None
        self._zero = None
        gc.collect()  # vectors and parameters refer to each other in circles
        new, zero, *_ = deepspeed.initialize(
            model=self._model, optimizer=base, lr_scheduler=engine.lr_scheduler, config=engine.config
        )
        vars(new).update(counted)
        vars(zero).update(known)
        for wrapper in wrappers:
            wrapper.optimizer = zero
        for options, kept in zip(base.param_groups, settings, strict=True):
            options |= kept
        self._fill(zero)
        # What is bound to either of the two is then bound to both; the second lives as long as the first.
        object.__setattr__(engine, "__dict__", vars(new))
        engine.__dict__["_same_engine"] = new
        gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fill(self, zero: Any) -> None:
        """Give a new ZeRO optimizer the masters and the state that are left."""
        masters, holdings, device = masters_of(zero), ZeroHoldings(zero), self._model.device
        for vector in masters:
            scalars = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in self._scalars.items()}
            zeros = {key: torch.zeros_like(vector, dtype=dtype) for key, dtype in self._dtypes.items()}
            self._base.state[vector] = scalars | {key: value.detach() for key, value in zeros.items()}
        for name, parameter in named_parameters(self._model).items():
            if name not in self._left:
                continue
            left, place = self._left.pop(name), holdings.place(parameter)
            for key, values in {"": left.weights, **left.state}.items():
                whole = torch.empty(left.shape, device=device) if values is None else values.to(device)
                broadcast_([whole])
                if place is not None:
                    target = masters[place.vector] if not key else self._base.state[masters[place.vector]][key]
                    _range(target, place).copy_(whole.flatten()[place.start : place.start + place.length])
        holdings.publish()

    def check(self, verifier: Verifier, writes: bool) -> None:
        """Compare the logits of the masters that are trained from now on with the larger model's.

        Raises:
            VerificationError: where they differ.
        """
        whole = Decision(PruningGroups({}), NOTHING_CUT)
        logits = ZeroSource(self._model, whole, writes).logits(verifier.input_ids)
        error = relative_error(logits.to(verifier.logits.device), verifier.logits)
        if not error <= FOLD_TOLERANCE:
            raise VerificationError(f"its logits differ by {error:.1e} (relative, fp32; allowed {FOLD_TOLERANCE:.0e})")


def _check_alike(origins: dict[str, str], expected: dict[str, str]) -> None:
    """Refuse to go on where this process has other parameters: the others would wait for it."""
    if origins != expected:
        others = sorted(origins.keys() ^ expected.keys()) or list(origins)
        raise HessoError(f"the smaller model has other parameters on the main process: {others[0]}")


def _on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values where they are, else as much memory."""
    return torch.empty(values.shape, device=device) if values.is_meta else values.to(device)


def _trained_by_group(zero: Any) -> list[list[nn.Parameter]]:
    """Return the parameters of each of the base optimizer's groups, in their order."""
    if not hasattr(zero, "fp16_groups"):
        return zero.bit16_groups
    found: list[list[nn.Parameter]] = [[] for _ in zero.optimizer.param_groups]
    for index, parameters in enumerate(zero.fp16_groups):  # the parts that ZeRO-3 divides groups into
        found[zero.sub_group_to_group_id[index]] += parameters
    return found


def _whole_state(
    place: Place | None, parameter: torch.Tensor, masters: list[torch.Tensor], base: Optimizer, key: str
) -> torch.Tensor:
    """Return a whole parameter's state in fp32, put together from the ranges of all processes."""
    shape = full_shape(parameter)
    found = all_or_none(lambda: torch.zeros(math.prod(shape), device=parameter.device), parameter.device)
    if place is not None:
        own = _range(base.state[masters[place.vector]][key], place)
        found[place.start : place.start + place.length] = own.to(found.device, found.dtype)
    return summed_over_ranks(found).view(shape)


def _range(vector: torch.Tensor, place: Place) -> torch.Tensor:
    return vector.detach().view(-1).narrow(0, place.offset, place.length)
