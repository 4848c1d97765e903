"""A smaller model in a larger one's place: modules and parameters stay the objects that they are.

Whoever holds the model, a module or a parameter (a training loop, an optimizer, hooks, a patched `forward`) holds the
smaller one's from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..compat import set_buffer
from .groups import KeptUnits, PruningGroups
from .layers import LAYER_UNITS, full_names, kept_layers
from .lora import unset_like

_PLAIN = (bool, int, float, str, type(None), torch.dtype, range, PretrainedConfig)


class InPlace:
    """What a model was before a smaller one took its place, so that it can be again.

    Example:
        >>> # place = InPlace(model); place.put(small, groups, kept); place.undo()
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._undo: list[Callable[[], Any]] = []

    @torch.no_grad()
    def put(self, small: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> None:
        """Give the model the sizes, weights and buffers of `small`, which shares its memory then, in its dtype.

        An attribute of a module follows where two models as the class makes them, of the one config and of the other,
        differ in it; all others are left as they are. Configs are the smaller model's own: those of before, which
        other models may share, don't change.
        """
        model = self._model
        plain = dict(unset_like(model).named_modules())
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        buffers, smaller = dict(model.named_buffers()), dict(small.named_modules())
        use_cache = vars(model.config).get("use_cache")
        if use_cache is not None:
            small.config.use_cache = use_cache  # a run may have turned it off
        for name, origin in full_names(smaller, groups, kept).items():
            self._set_attributes(modules[origin], smaller[name], plain[origin])
        found = dict(small.named_parameters())
        for name, origin in full_names(found, groups, kept).items():
            parameter, values = parameters[origin], parameters[origin].data
            self._undo.append(lambda p=parameter, v=values: set_data(p, v))  # type: ignore[misc]
            set_data(parameter, found[name].data.to(parameter.device))
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

    def undo(self) -> None:
        """Make the model what it was."""
        while self._undo:
            self._undo.pop()()

    def _set_attributes(self, module: nn.Module, smaller: nn.Module, plain: nn.Module) -> None:
        held = vars(module)
        for key, value in vars(smaller).items():
            before = vars(plain).get(key)
            if key == "training" or not _is_plain(value) or not _is_plain(before):
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
