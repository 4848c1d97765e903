"""What a config says about each of its layers: sizes of their own, and lists that are cut with the layers.

Where layers have sizes of their own, one number stands for all, and the layers keep their ratios to it. There is no
table per architecture for the rest: a list with one entry a layer loses the entries of dropped layers, a list of layer
indices and a dict keyed by them are renumbered. A rule that the model code computes from a layer's index has no such
list; the proof refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

_INDEX_NAMES = ("layer", "idx", "indices", "_ids")  # what a list of layer indices is called
_NEVER = ("architectures", "rope_parameters", "rope_scaling", "token", "label")  # a length that fits is chance there


def common_size(config: PretrainedConfig, name: str) -> int | None:
    """Return into how many equal parts a size divides in every layer; None where no layer has its own.

    With 128 heads in most layers and 64 in some that is 64: a part is two heads or one.
    """
    values: dict[str, Any] = config.to_dict()
    size: Any = values.get(name)
    own = _own_sizes(values, name)
    if not own or not all(isinstance(value, int) and value > 0 for value in (size, *own)):
        return None
    return math.gcd(size, *own)


def set_common_size(config: PretrainedConfig, name: str, parts: int) -> None:
    """Write a size as that many parts, in place; every layer keeps its own number of indices for each."""
    values = config.to_dict()
    set_common_value(values, name, parts)
    config.per_layer_config = None  # type: ignore[assignment]  # its setter takes a dict, or None to reset it
    setattr(config, name, values[name])
    config.per_layer_config = values["per_layer_config"]


def set_common_value(values: dict[str, Any], name: str, parts: int) -> None:
    """Write a size as that many parts into a config's fields, in place."""
    divisor = math.gcd(values[name], *_own_sizes(values, name))
    for holder in (values, *(values.get("per_layer_config") or {}).values()):
        if name in holder:
            holder[name] = holder[name] // divisor * parts


def _own_sizes(values: dict[str, Any], name: str) -> list[int]:
    return [own[name] for own in (values.get("per_layer_config") or {}).values() if name in own]


def keep_layers_(config: PretrainedConfig, kept: Sequence[int], total: int) -> None:
    """Cut every entry of a config that holds something for each of `total` layers to the kept ones, in place.

    Args:
        kept: sorted indices of the layers that stay.
    """
    for name, value in list(vars(config).items()):
        if not name.startswith("_") and not any(part in name for part in _NEVER):
            changed = _kept_part(name, value, kept, total)
            if changed is not None:
                setattr(config, name, changed)


def is_by_layer(name: str, value: Any, total: int) -> bool:
    """Tell whether an entry has one item for each layer: a pattern of letters, or a list that isn't all indices."""
    if isinstance(value, str):
        return "pattern" in name and len(value) == total
    return isinstance(value, list | tuple) and len(value) == total and not _is_indices(name, value, total)


def _is_indices(name: str, value: Any, total: int) -> bool:
    named = any(part in name for part in _INDEX_NAMES)
    return named and isinstance(value, list | tuple) and _are_indices(value, total)


def _kept_part(name: str, value: Any, kept: Sequence[int], total: int) -> Any:
    """Return what is left of a value, None where it says nothing about single layers."""
    if is_by_layer(name, value, total):
        items = [value[index] for index in kept]
        return "".join(items) if isinstance(value, str) else type(value)(items)
    if _is_indices(name, value, total):
        return type(value)(kept.index(layer) for layer in value if layer in kept)
    if isinstance(value, dict) and value:
        indices = [_as_index(key) for key in value]
        if _are_indices(sorted(index for index in indices if index is not None), total) and None not in indices:
            entries = {int(key): (key, entry) for key, entry in value.items()}
            return {
                type(entries[layer][0])(new): entries[layer][1] for new, layer in enumerate(kept) if layer in entries
            }
    return None


def _as_index(key: Any) -> int | None:
    return int(key) if isinstance(key, int) or (isinstance(key, str) and key.isdigit()) else None


def _are_indices(values: Sequence[Any], total: int) -> bool:
    """Whether these are layer indices in ascending order, each once."""
    if not values or not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return False
    return list(values) == sorted(set(values)) and values[0] >= 0 and values[-1] < total
