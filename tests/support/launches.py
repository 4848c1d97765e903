"""What HESSO makes a GPU do in one step, counted on any machine: operators, the kernels they launch, and host syncs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hesso_hf.pruning.optimizer import HessoOptimizer

# makes a tensor without computing anything, or says something of one
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh"}
FREE |= {"_local_scalar_dense", "expand", "reshape", "_reshape_alias", "_unsafe_view"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}  # the host needs what the GPU says


class Launches(TorchDispatchMode):
    """Counts what is called while it is active.

    Attributes:
        operators: calls that start work, by name.
        kernels: what they start on a GPU, by name: a `_foreach_` over tensors that broadcast starts one for each.
        syncs: for what the host waits, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.paused:
            self._count(func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        name = func._schema.name.partition("::")[2]
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim()}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if name in WAITS or (name.startswith("index") and _by_mask(args)):
            self.syncs[name] += bool(devices - {"cpu"}) or any(tensor.device.type != "cpu" for tensor in tensors)
        across = name in ("copy_", "_to_copy") and len(devices) > 1
        if across and not (kwargs.get("non_blocking") or True in args[2:]):
            self.syncs[f"{name} between devices"] += 1
        if name in FREE or func.is_view or devices <= {"cpu"}:
            return
        self.operators[name] += 1
        self.kernels[name] += _kernels(name, args)


def _by_mask(args: Any) -> bool:
    """Whether an operator's indices are masks, whose number of ones the host has to know."""
    indices = args[1] if len(args) > 1 else ()
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in tree_leaves(indices))


def _kernels(name: str, args: Any) -> int:
    """One for an operator; for lists of tensors one for all where torch fuses them, which it does for equal shapes."""
    if not name.startswith("_foreach_"):
        return 1
    lists = [value for value in args if isinstance(value, list | tuple)]
    fused = all(one.shape == other.shape for one, other in zip(lists[0], lists[-1], strict=True))
    return 1 if fused else len(lists[0])


def counted_step(model: nn.Module, optimizer: HessoOptimizer, batch: torch.Tensor) -> tuple[str, Launches]:
    """Train a step; return which kind it was, and what HESSO did in it besides the model and the base optimizer."""
    kind, counts = kind_of(optimizer), Launches()
    optimizer.process.prepare_gradients()
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    step = optimizer.base.step

    def uncounted(*args: Any) -> Any:
        counts.paused = True
        try:
            return step(*args)
        finally:
            counts.paused = False

    optimizer.base.step = uncounted  # type: ignore[method-assign]
    try:
        with counts:
            optimizer.observe_gradients()
            counts.paused = True
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            counts.paused = False
            optimizer.report_gradient_norm(norm)
            optimizer.report_loss(loss)
            optimizer.step()
    finally:
        optimizer.base.step = step  # type: ignore[method-assign]
    optimizer.zero_grad()
    return kind, counts


def kind_of(optimizer: HessoOptimizer) -> str:
    """Name the kind of the coming step."""
    process = optimizer.process
    schedule, step = process.schedule, process.step
    sample = schedule.sampling_step(step) if process.trial is not None else None
    if sample is not None:
        return "CRIC's last sample" if sample.last else "CRIC's first sample" if sample.t == 0 else "CRIC's sample"
    position = schedule.period_step(step)
    if position is not None:
        when = "a period's first step" if position.t == 0 else "a period's last step" if position.last else "shrinking"
        return when if position.index == 0 else f"{when}, later periods"
    scored = schedule.scoring_window(step, process.config.saliency_batches)
    return f"{schedule.phase(step)}{', scored' if scored else ''}"
