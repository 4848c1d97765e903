"""Fewer layers: a config's fields with one layer of each kind, by rules on the fields' names and values."""

from __future__ import annotations

import re
from typing import Any

from transformers import PretrainedConfig

from .sizes import LAYERS, OTHER_NAMES, get_size

MOST_LAYERS = 6
_INTERVALS = re.compile(r"(_period|_interval|_step|_every_n_layers|^layer_group_size|^_?sliding_window_pattern)$")
_OFFSETS = re.compile(r"_offset$")
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_SHARED_LAST = ("num_kv_shared_layers",)
_LAYER_INDICES = re.compile(r"(_layers|_ids|_idxs|_indices|_indexes)$")
_LAYER_COUNTS = {
    LAYERS, *OTHER_NAMES[LAYERS], "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers",
}  # fmt: skip


def keep_some_layers(config: PretrainedConfig, values: dict[str, Any], of_a_kind: int = 1) -> None:
    """Keep the first layer of each kind, two at least and six at most, in the count and every field by layer."""
    layers = get_size(config, LAYERS)
    if not layers:
        return
    _shorten_intervals(values)
    by_layer = {n: v for n, v in values.items() if _is_by_layer(n, v, layers)}
    indices = {n: v for n, v in values.items() if n not in by_layer and _is_indices(n, v, layers)}
    firsts = {n: values[n] for n in _DENSE_FIRST if isinstance(values.get(n), int)}
    lasts = {n: values[n] for n in _SHARED_LAST if isinstance(values.get(n), int)}
    kinds = [
        (
            *(str(value[i]) for value in by_layer.values()),
            *(i in value if isinstance(value, list) else str(_at(value, i)) for value in indices.values()),
            *(i < value for value in firsts.values()),
            *(i >= layers - value for value in lasts.values()),
        )
        for i in range(layers)
    ]
    chosen = _chosen_layers(kinds, of_a_kind)
    for name, value in by_layer.items():
        kept = [value[i] for i in chosen]
        values[name] = "".join(kept) if isinstance(value, str) else kept
    for name, value in indices.items():
        values[name] = _reindexed(value, chosen)
    for name, value in firsts.items():
        values[name] = sum(i < value for i in chosen)
    for name, value in lasts.items():
        values[name] = sum(i >= layers - value for i in chosen)
    _count_layers(values, layers, len(chosen))


def _shorten_intervals(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool):
            if _INTERVALS.search(name):
                values[name] = min(value, 2)
            elif _OFFSETS.search(name):
                values[name] = min(value, 1)


def _count_layers(values: dict[str, Any], old: int, new: int) -> None:
    """Write the number of layers under every name; some classes count pairs of layers."""
    for name in _LAYER_COUNTS & values.keys():
        if isinstance(values[name], int):
            pairs = old // values[name] if values[name] and old % values[name] == 0 else 1
            values[name] = max(2, new // pairs)


def _chosen_layers(kinds: list[tuple[Any, ...]], of_a_kind: int) -> list[int]:
    first = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < of_a_kind][: MOST_LAYERS * of_a_kind]
    return first if len(first) > 1 else list(range(min(2, len(kinds))))


def _is_by_layer(name: str, value: Any, layers: int) -> bool:
    """Tell whether a field has one entry a layer; a list of all layers' indices has not."""
    if isinstance(value, str):
        return "pattern" in name and len(value) == layers
    return isinstance(value, list) and len(value) == layers and not _is_indices(name, value, layers)


def _is_indices(name: str, value: Any, layers: int) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(
            isinstance(v, dict) and str(k).isdigit() and int(k) < layers for k, v in value.items()
        )
    if not isinstance(value, list) or not value or not _LAYER_INDICES.search(name):
        return False
    return all(isinstance(i, int) and 0 <= i < layers for i in value) and sorted(set(value)) == value


def _at(value: dict[Any, Any], index: int) -> Any:
    return next((item for key, item in value.items() if int(key) == index), None)


def _reindexed(value: Any, chosen: list[int]) -> Any:
    if isinstance(value, list):
        return [new for new, old in enumerate(chosen) if old in value]
    return {new: _at(value, old) for new, old in enumerate(chosen) if _at(value, old) is not None}
