"""Shape probe: which dimension of which parameter does each config size determine?

The model is built on the meta device from its config and again with one size changed; every dimension that moved is an
axis of that size and the slope is its stride. No forward pass, no weights, no table per architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .sizes import HEADS, HIDDEN, KV_HEADS, MLP, build_meta, copy_with, get_size

Role = Literal["matrix", "bias", "norm", "embedding", "output", "other"]
PROBED_SIZES = (HEADS, KV_HEADS, MLP, HIDDEN)


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of the model: where it sits and what its owner is."""

    name: str
    shape: tuple[int, ...]
    role: Role
    module: str
    layer: str

    @property
    def pattern(self) -> str:
        """The name with every index replaced by `*`: the same for all layers."""
        return re.sub(r"\.\d+(?=\.)", ".*", self.name)


@dataclass(frozen=True)
class AxisMap:
    """What the probe found: for each (parameter, dim) the slopes, in indices per one more of each config size."""

    parameters: dict[str, ParameterInfo]
    slopes: dict[tuple[str, int], dict[str, int]]
    failed: dict[str, str]

    def moving(self, sizes: Iterator[str] | tuple[str, ...]) -> dict[tuple[str, int], dict[str, int]]:
        """Return the axes that at least one of `sizes` moves."""
        wanted = set(sizes)
        return {axis: found for axis, found in self.slopes.items() if wanted & set(found)}


def probe_axes(model_class: type[PreTrainedModel], config: PretrainedConfig) -> AxisMap:
    """Find the axes of every probed config size by comparing parameter shapes on the meta device."""
    base_model = build_meta(model_class, copy_with(config, {}))
    parameters = describe_parameters(base_model)
    slopes: dict[tuple[str, int], dict[str, int]] = {}
    failed: dict[str, str] = {}
    for size in PROBED_SIZES:
        if get_size(config, size) is None:
            continue
        try:
            changed = _slopes_of(model_class, config, size, parameters)
        except Exception as error:  # model code may refuse a size with any exception type
            failed[size] = f"{type(error).__name__}: {error}"
            continue
        for axis, slope in changed.items():
            slopes.setdefault(axis, {})[size] = slope
    return AxisMap(parameters, slopes, failed)


def describe_parameters(model: nn.Module) -> dict[str, ParameterInfo]:
    """Describe each (untied) parameter by the kind of module that owns it."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    owners = dict(model.named_modules())
    found = {}
    for name, parameter in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        owner = owners[module_name]
        found[name] = ParameterInfo(
            name, tuple(parameter.shape), _role(owner, leaf, owner is output), module_name, layer_of(name, owners)
        )
    return found


def _slopes_of(
    model_class: type[PreTrainedModel], config: PretrainedConfig, size: str, parameters: dict[str, ParameterInfo]
) -> dict[tuple[str, int], int]:
    value = get_size(config, size)
    assert value is not None
    errors: list[Exception] = []
    for step in _steps(config, size, value):
        try:
            shapes = _shapes(model_class, copy_with(config, {size: value + step}))
            return _compare(parameters, shapes, step)
        except Exception as error:  # the next step may suit a divisibility check of the model code
            errors.append(error)
    raise errors[0]


def _steps(config: PretrainedConfig, size: str, value: int) -> list[int]:
    """Increments to try: one, then ones that keep query heads divisible by key-value heads."""
    kv_heads = get_size(config, KV_HEADS) or 1
    return list(dict.fromkeys([1, kv_heads if size == HEADS else value, value]))


def _compare(parameters: dict[str, ParameterInfo], shapes: dict[str, tuple[int, ...]], step: int) -> dict:
    if shapes.keys() != parameters.keys():
        raise ValueError("the set of parameters itself changes with the size")
    moved = {}
    for name, info in parameters.items():
        for dim, (before, after) in enumerate(zip(info.shape, shapes[name], strict=True)):
            if before == after:
                continue
            if (after - before) % step:
                raise ValueError(f"{name} dimension {dim} moves by {after - before} for {step}")
            moved[(name, dim)] = (after - before) // step
    return moved


def _shapes(model_class: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in build_meta(model_class, config).named_parameters()}


def _role(owner: nn.Module, leaf: str, is_output: bool) -> Role:
    own = dict(owner.named_parameters(recurse=False))
    widest = max(parameter.dim() for parameter in own.values())
    if own[leaf].dim() == 1:
        return "bias" if widest > 1 else "norm"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    return "output" if is_output else "matrix"


@lru_cache(maxsize=16384)
def _indexed_prefixes(name: str) -> tuple[tuple[str, str], ...]:
    parts = name.split(".")
    return tuple((".".join(parts[:i]), ".".join(parts[: i + 1])) for i, part in enumerate(parts) if part.isdigit())


def layer_of(name: str, owners: dict[str, nn.Module]) -> str:
    """Return the outermost indexed module that holds the parameter (`model.layers.3`), or "" outside any layer."""
    for parent, layer in _indexed_prefixes(name):
        if isinstance(owners.get(parent), nn.ModuleList):
            return layer
    return ""
