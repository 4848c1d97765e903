"""Sizes that single layers have for themselves: one number stands for all, and the layers keep their ratios to it."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig


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
