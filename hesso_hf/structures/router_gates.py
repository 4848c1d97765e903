"""Routing: a router never chooses a pruned expert, and chooses one on its way to zero less and less.

Weights at zero aren't removal: the router would still choose the expert and give it a share of the sum. So the logit of
an expert with scale s gets + log(s): nothing at 1, and at 0 so low that it takes no share. Where a bias is added to the
scores for the choice alone (`e_score_correction_bias`), so does the bias. Hooks on one model's modules do that; no
class is touched.
Legend: L layers, U experts per layer.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..compat import forward_hooks
from ..distributed.parts import full_shape
from ..errors import HessoError, UnsupportedStructureError
from .groups import Axis, StructureGroups
from .layout import Layout

_PRODUCTS = {F.linear, torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


class _Offsets:
    """log(scale) of one layer's experts, shape (U,) in fp32; None while all are kept whole."""

    def __init__(self) -> None:
        self.values: torch.Tensor | None = None

    def set(self, scales: torch.Tensor, whole: bool) -> None:
        self.values = None if whole else scales.detach().float().log()

    def over(self, layout: Layout, like: torch.Tensor) -> torch.Tensor:
        """Spread over an axis; -inf becomes a quarter of the lowest number, so that sums of it stay finite."""
        assert self.values is not None
        spread = layout.expand(self.values.to(like.device), fixed_value=0.0)
        return spread.clamp_min(torch.finfo(like.dtype).min / 4).to(like.dtype)


class _AddToLogits(TorchFunctionMode):
    """Adds the offsets to the product with the router's weight."""

    def __init__(self, offsets: _Offsets, layout: Layout, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._offsets, self._layout = offsets, layout
        self._shapes = (shape, shape[::-1])
        self.applied = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _PRODUCTS:
            return result
        if not any(isinstance(value, torch.Tensor) and value.shape in self._shapes for value in args[1:2]):
            return result
        self.applied += 1
        return result + self._offsets.over(self._layout, result)


class _Hooks:
    """A pair of hooks around a module's forward; what one call put in place is kept per thread, innermost last."""

    def __init__(self, offsets: _Offsets) -> None:
        self.offsets = offsets
        self._entered: dict[int, list[Any]] = {}

    def register(self, module: nn.Module) -> list[Any]:
        """Put the hooks on; the second one runs after an error too (checkpointing stops a recomputation by one)."""
        return [
            module.register_forward_pre_hook(self.before),
            module.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, module: nn.Module, args: Any) -> None:
        put = self._put(module) if self.offsets.values is not None else None
        self._entered.setdefault(_thread(), []).append(put)

    def after(self, module: nn.Module, args: Any, result: Any) -> None:
        put = self._entered[_thread()].pop()
        if put is not None:
            self._take(module, put, result)

    def _put(self, module: nn.Module) -> Any:
        raise NotImplementedError

    def _take(self, module: nn.Module, put: Any, result: Any) -> None:
        raise NotImplementedError


def _thread() -> int:
    """Return the thread's number, for which torch.compile would break its graph; it traces in one thread at a time."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class _LogitHooks(_Hooks):
    """Around a router: the mode that adds to its logits."""

    def __init__(self, offsets: _Offsets, leaf: str, layout: Layout) -> None:
        super().__init__(offsets)
        self._leaf, self._layout = leaf, layout

    def _put(self, module: nn.Module) -> _AddToLogits:
        mode = _AddToLogits(self.offsets, self._layout, full_shape(module.get_parameter(self._leaf)))
        mode.__enter__()
        return mode

    def _take(self, module: nn.Module, put: _AddToLogits, result: Any) -> None:
        put.__exit__(None, None, None)
        if put.applied != 1 and result is not None:
            raise HessoError(
                f"{type(module).__name__} computed {put.applied} products with its `{self._leaf}` instead of one: "
                "its logits can't be told"
            )


class _BiasHooks(_Hooks):
    """Around the layer's block: a bias of the choice is replaced by itself plus the offsets."""

    def __init__(self, offsets: _Offsets, owner: str, leaf: str, layout: Layout) -> None:
        super().__init__(offsets)
        self._owner, self._leaf, self._layout = owner, leaf, layout

    def _slots(self, module: nn.Module) -> Any:
        owner = module.get_submodule(self._owner)
        return owner._buffers if self._leaf in owner._buffers else owner._parameters

    def _put(self, module: nn.Module) -> torch.Tensor:
        slots = self._slots(module)
        bias = slots[self._leaf]
        slots[self._leaf] = bias + self.offsets.over(self._layout, bias)
        return bias

    def _take(self, module: nn.Module, put: torch.Tensor, result: Any) -> None:
        self._slots(module)[self._leaf] = put


class RouterGates:
    """The hooks on one model instance's routers.

    Example:
        gates = RouterGates.attach(model, groups.structures["experts"])
        gates.set_scales(scales)  # (L, U)
        gates.detach()
    """

    def __init__(self, offsets: list[_Offsets], handles: list[Any]) -> None:
        self._offsets, self._handles = offsets, handles

    @classmethod
    def attach(cls, model: nn.Module, experts: StructureGroups) -> RouterGates:
        """Put gates that change nothing yet on a model's routers, in place of those that are there.

        Raises:
            UnsupportedStructureError: for a layer without a router that could be found.
        """
        remove_gates(model)
        gates = cls([_Offsets() for _ in experts.layers], [])
        for parts in zip(gates._offsets, experts.axes, experts.buffers, experts.layers, strict=True):
            gates._handles += _attach_layer(model, *parts)
        return gates

    def set_scales(self, scales: torch.Tensor, ask: bool = True) -> None:
        """Take the experts' scales, shape (L, U): 1 kept, between 0 and 1 shrinking, 0 pruned.

        Args:
            ask: the device which layers keep all experts whole, and wait for it; else they are those that did so far.
        """
        before = [layer.values is None for layer in self._offsets]
        layers = (scales == 1).all(1).cpu().tolist() if ask else before
        for layer, values, is_whole in zip(self._offsets, scales, layers, strict=True):
            layer.set(values, is_whole)

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def routed_by(model: nn.Module, experts: StructureGroups | None, scales: torch.Tensor | None) -> Iterator[None]:
    """For a while, let a model's routers see these scales; without experts, or with gates of its own, as it is."""
    if experts is None or scales is None or is_gated(model):
        yield
        return
    gates = RouterGates.attach(model, experts)
    gates.set_scales(scales)
    try:
        yield
    finally:
        gates.detach()


def is_gated(model: nn.Module) -> bool:
    """Whether a model, or what it was copied from, has gates that change something."""
    return any(hooks.offsets.values is not None for _, hooks in _hooks_of(model))


def remove_gates(model: nn.Module) -> None:
    """Take all gates off a model."""
    for hooked, hooks in list(_hooks_of(model)):
        for registry in forward_hooks(hooked):
            for key in [key for key, hook in registry.items() if getattr(hook, "__self__", None) is hooks]:
                del registry[key]


def _hooks_of(model: nn.Module) -> Iterator[tuple[nn.Module, _Hooks]]:
    for module in model.modules():
        for hook in forward_hooks(module)[0].values():
            if isinstance(getattr(hook, "__self__", None), _Hooks):
                yield module, hook.__self__  # type: ignore[attr-defined]


def _attach_layer(
    model: nn.Module, offsets: _Offsets, axes: tuple[Axis, ...], buffers: tuple[Axis, ...], layer: str
) -> list[Any]:
    handles: list[Any] = []
    routers = [axis for axis in axes if _is_router(model, axis)]
    if not routers:
        raise UnsupportedStructureError(f"experts: no router with one row for each expert was found in {layer}")
    for axis in routers:
        router, name = _called_router(model, axis.parameter)
        handles += _LogitHooks(offsets, name, axis.layout).register(router)
    block = _common_owner([axis.parameter for axis in (*axes, *buffers)])
    added = [axis for axis in axes if _is_bias_of_choice(model, axis)]
    for axis in (*added, *buffers):
        owner, _, leaf = axis.parameter.rpartition(".")
        inside = owner.removeprefix(block).removeprefix(".")
        handles += _BiasHooks(offsets, inside, leaf, axis.layout).register(model.get_submodule(block))
    return handles


def _is_router(model: nn.Module, axis: Axis) -> bool:
    """A matrix with one row for each expert, in a module that holds no fused expert weight."""
    owner, _, _ = axis.parameter.rpartition(".")
    others = model.get_submodule(owner).parameters(recurse=False)
    holds_experts = any(len(full_shape(parameter)) > 2 for parameter in others)
    rows = axis.dim == 0 and axis.layout.per_unit == 1
    return rows and len(full_shape(model.get_parameter(axis.parameter))) == 2 and not holds_experts


def _called_router(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """Return the module whose forward computes the logits, and the weight's name in it.

    That is the weight's owner, unless a router class holds the owner: it may use the weight alone (LongCat-Flash).
    """
    owner, _, name = parameter.rpartition(".")
    parent, _, last = owner.rpartition(".")
    if type(model.get_submodule(parent)).__name__.endswith("Router"):
        return model.get_submodule(parent), f"{last}.{name}"
    return model.get_submodule(owner), name


def _is_bias_of_choice(model: nn.Module, axis: Axis) -> bool:
    """One number for each expert that isn't the bias of the router's own product."""
    shape = full_shape(model.get_parameter(axis.parameter))
    single = axis.layout.per_unit == 1 and math.prod(shape) == shape[-1] == shape[axis.dim]
    return single and not axis.parameter.endswith(".bias")


def _common_owner(names: list[str]) -> str:
    paths = [name.split(".")[:-1] for name in names]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join(level[0] for level in levels)
