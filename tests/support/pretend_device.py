"""A device that isn't the CPU, on any machine: its tensors are the CPU's inside, and mixing them with others raises.

It becomes its process' accelerator for good, so a test that uses it does so in a process of its own (`apart`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import TrainingArguments

from hesso_hf.pruning.weights import holdings
from tests.support import forks

DEVICE = "pretend:0"
aten = torch.ops.aten
# what copies from one device to another, or takes indices from the CPU
ACROSS = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default,
}  # fmt: skip


class MixedDevicesError(RuntimeError):
    """What a GPU raises for tensors on it and on the CPU in one operation."""


class PretendTensor(torch.Tensor):
    """A tensor on the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendTensor:
        found = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(DEVICE), requires_grad=held.requires_grad,
        )  # fmt: skip
        found.held = held
        return found

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:  # which tells tied weights
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (self.held, self.dtype, DEVICE, self.requires_grad)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendGenerator(torch.Generator):
    """A generator on the device, or on the CPU."""

    def __new__(cls, device: Any = "cpu") -> PretendGenerator:
        found = super().__new__(cls, "cpu")
        _GENERATORS[found._cdata] = torch.device(device).type  # operators are given another object around the same
        return found


_GENERATORS: dict[int, str] = {}


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Have the CPU do it with what tensors on the device hold; pytree's own walk would take most of a run's time."""
    same: dict[int, PretendTensor] = {}  # what was changed in place is given back itself
    others = False

    def inner(value: Any) -> Any:
        nonlocal others
        if isinstance(value, PretendTensor):
            same[id(value.held)] = value
            return value.held
        if isinstance(value, torch.Tensor):
            others = others or value.dim() > 0
        elif isinstance(value, list | tuple):
            return type(value)([inner(part) for part in value])
        return value

    def outer(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return same[id(value)] if id(value) in same else PretendTensor(value)
        return type(value)([outer(part) for part in value]) if isinstance(value, list | tuple) else value

    given, named = [inner(value) for value in args], {key: inner(value) for key, value in kwargs.items()}
    if same and others and func not in ACROSS:
        raise MixedDevicesError(f"{func}: tensors on {DEVICE} and on the CPU")
    device, generator = named.get("device"), named.get("generator")
    here = bool(same) if device is None else torch.device(device).type == "pretend"
    if generator is not None and (_GENERATORS.get(generator._cdata) == "pretend") != here:
        raise MixedDevicesError(f"{func}: a generator and tensors on different devices")
    if device is not None:
        named["device"] = torch.device("cpu")
    if func is aten.histc.default and here:
        given[0] = given[0].float()  # a GPU counts integers too
    found = func(*given, **named)
    if func is aten.copy_.default:
        return args[0]
    return outer(found) if here else found


def _start() -> None:
    """Make the device known to torch, before the first backward pass counts devices."""
    _setup_privateuseone_for_python_backend("pretend")
    _LIBRARY.impl("empty.memory_format", lambda size, *, dtype=None, **_: _empty(size, dtype), "PrivateUse1")
    _LIBRARY.impl("empty_strided", lambda size, _, *, dtype=None, **__: _empty(size, dtype), "PrivateUse1")
    for name in ("_copy_from", "_copy_from_and_resize"):
        _LIBRARY.impl(name, _copy_from, "PrivateUse1")
    torch.Generator, torch.load = PretendGenerator, _load  # type: ignore[misc]
    torch.Tensor.data = property(_PLAIN_DATA.__get__, _set_data)  # type: ignore[assignment]
    torch._has_compatible_shallow_copy_type = lambda *_: True  # `model.to` leaves an optimizer's parameters in place
    plain = (torch.Tensor, PretendTensor)
    holdings.is_plain = lambda value: type(value) in plain and value.is_floating_point()
    PartialState.default_device = property(lambda _: torch.device(DEVICE))
    TrainingArguments.device = property(lambda args: args._setup_devices and torch.device(DEVICE))


_LIBRARY = torch.library.Library("aten", "IMPL")


_PLAIN_DATA: Any = torch.Tensor.data


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor other values, on whichever device they are, as those of a GPU and of the CPU take each other's."""
    if isinstance(tensor, PretendTensor) == isinstance(value, PretendTensor):
        _PLAIN_DATA.__set__(tensor, value)
        if isinstance(tensor, PretendTensor):
            tensor.held = _held(value)
    else:
        value = value.detach()
        kept = isinstance(tensor, nn.Parameter)
        torch.utils.swap_tensors(tensor, nn.Parameter(value, tensor.requires_grad) if kept else value)


_plain_load = torch.load


def _load(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """Load as torch does, whose storages don't know the device."""
    found = _plain_load(*args, map_location="cpu", **kwargs)
    return found if map_location is None else tree_map_only(torch.Tensor, lambda value: value.to(map_location), found)


def _empty(size: Any, dtype: torch.dtype | None) -> torch.Tensor:
    return PretendTensor(torch.empty(size, dtype=dtype, device="cpu"))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _held(target).copy_(_held(source))
    return target


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """Do something in a process of its own that has the device, and return what it returns, without tensors on it."""
    return forks.call(_work, work, args)


def _work(work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    _start()
    return work(*args)
