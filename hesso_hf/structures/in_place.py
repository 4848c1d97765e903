"""A smaller model in a larger one's place: modules stay the objects that they are, and parameters that are whole.

Whoever holds the model, a module or a parameter (a training loop, an optimizer, hooks, a patched `forward`) holds the
smaller one's from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..compat import set_buffer
from ..distributed.parts import named_parameters, plain_name
from .groups import KeptUnits, PruningGroups
from .layers import LAYER_UNITS, full_names, kept_layers
from .lora import unset_like

_EVERY_MODULES = frozenset(vars(nn.Module()))  # its hooks, whether it trains
_PLAIN = (bool, int, float, str, type(None), torch.dtype, range, PretrainedConfig)


class InPlace:
    """What a model was before a smaller one took its place, so that it can be again.

    Example:
        >>> # place = InPlace(model); place.put(small, groups, kept); place.settle(); place.undo()
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._undo: list[Callable[[], Any]] = []
        self._dtypes: dict[str, torch.dtype] = {}

    @torch.no_grad()
    def put(self, small: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> None:
        """Give the model the sizes, weights and buffers of `small`, which shares its memory then, in its dtype.

        An attribute of a module follows where two models as the class makes them, of the one config and of the other,
        differ in it; all others are left as they are. Configs are the smaller model's own: those of before, which
        other models may share, don't change.
        """
        model = self._model
        plain = dict(unset_like(model).named_modules())
        modules = {plain_name(name): module for name, module in model.named_modules()}
        buffers = {plain_name(name): buffer for name, buffer in model.named_buffers()}
        smaller = dict(small.named_modules())
        use_cache = vars(model.config).get("use_cache")
        if use_cache is not None:
            small.config.use_cache = use_cache  # a run may have turned it off
        for name, origin in full_names(smaller, groups, kept).items():
            self._set_attributes(modules[origin], smaller[name], plain[origin])
        found, parameters = named_parameters(small), named_parameters(model)
        origins = full_names(found, groups, kept)
        self._dtypes = {name: parameters[origin].dtype for name, origin in origins.items()}
        self._put_parameters({parameters[origin]: found[name].data for name, origin in origins.items()})
        del found, parameters
        held = dict(small.named_buffers())
        for name, origin in full_names(held, groups, kept).items():
            before, after = buffers[origin], held[name]
            if before.dim() and before.shape == after.shape:
                continue  # as it was; a scalar follows from the sizes
            owner, _, leaf = origin.rpartition(".")
            self._undo.append(lambda m=modules[owner], n=leaf, b=before: set_buffer(m, n, b))  # type: ignore[misc]
            set_buffer(modules[owner], leaf, after.to(before.device, before.dtype))
        if (staying := kept_layers(kept)) is not None:
            layers = model.get_submodule(groups.structures[LAYER_UNITS].stack)
            assert isinstance(layers, nn.ModuleList)
            gone = [(index, layer) for index, layer in enumerate(layers) if index not in staying]
            for index, layer in reversed(gone):
                self._undo.append(lambda i=index, m=layer: layers.insert(i, m))  # type: ignore[misc]
                del layers[index]

    @torch.no_grad()
    def settle(self) -> None:
        """Give the parameters, in the dtype of the smaller model so far, the dtypes that the model's had."""
        for name, parameter in named_parameters(self._model).items():
            set_data(parameter, parameter.data.to(self._dtypes[name]))

    def undo(self) -> None:
        """Make the model what it was."""
        while self._undo:
            self._undo.pop()()

    def keep(self) -> None:
        """Let go what the model was."""
        self._undo.clear()

    def _put_parameters(self, values: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """Give parameters values of other shapes and another dtype."""
        for parameter, tensor in values.items():
            self._undo.append(lambda p=parameter, v=parameter.data: set_data(p, v))  # type: ignore[misc]
            set_data(parameter, tensor.to(parameter.device))

    def _set_attributes(self, module: nn.Module, smaller: nn.Module, plain: nn.Module) -> None:
        held = vars(module)
        for key, value in vars(smaller).items():
            before = vars(plain).get(key)
            if key in _EVERY_MODULES or not _is_plain(value) or not _is_plain(before):
                continue
            if isinstance(value, PretrainedConfig) or value != before:
                present = {key: held[key]} if key in held else {}
                self._undo.append(lambda h=held, k=key, p=present: (h.pop(k), h.update(p)))  # type: ignore[misc]
                held[key] = value


def set_data(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Give a parameter values of another shape; its gradient is forgotten.

    What accumulates the gradient lives on in every graph that is still held, and knows the shape; another dtype in
    between has torch make a new one.
    """
    parameter.grad = None
    parameter.data = values.new_empty(0, dtype=torch.float32 if parameter.dtype != torch.float32 else torch.float64)
    parameter.data = values


def _is_plain(value: Any) -> bool:
    """Whether a value says something by itself, and holds no module, function or tensor."""
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
