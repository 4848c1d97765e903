"""What a config says about single layers: fields that are cut with the layers, and configs with fewer layers.

There is no table per architecture: a list with one entry a layer loses the entries of dropped layers, a list of layer
indices and a dict keyed by them are renumbered. A rule that the model code computes from a layer's index has no such
list; the proof refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .sizes import LAYERS, OTHER_NAMES, get_size

MOST_LAYERS = 6
_INDEX_NAMES = ("layer", "idx", "indices", "indexes", "_ids")  # what a list of layer indices is called
_NEVER = ("architectures", "rope_parameters", "rope_scaling", "token", "label")  # a length that fits is chance there
_INTERVALS = re.compile(r"(_period|_interval|_step|_every_n_layers|^layer_group_size|^_?sliding_window_pattern)$")
_OFFSETS = re.compile(r"_offset$")
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_SHARED_LAST = ("num_kv_shared_layers",)
_LAYER_COUNTS = {
    LAYERS, *OTHER_NAMES[LAYERS], "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers",
}  # fmt: skip


def keep_layers_(config: PretrainedConfig, kept: Sequence[int], total: int) -> None:
    """Cut what a config holds for each of `total` layers to the kept ones (sorted indices), in place."""
    for name, value in list(vars(config).items()):
        if not name.startswith("_") and (changed := _kept_part(name, value, kept, total)) is not None:
            setattr(config, name, changed)


def keep_some_layers(config: PretrainedConfig, values: dict[str, Any], of_a_kind: int = 1) -> None:
    """Keep the first layer of each kind in a config's fields, two at least and six at most, and their count.

    Two layers are of one kind where every field says the same of both.
    """
    layers = get_size(config, LAYERS)
    if not layers:
        return
    _shorten_intervals(values)
    by_layer = {name: value for name, value in values.items() if _kept_part(name, value, (), layers) is not None}
    spans = {name: range(values[name]) for name in _DENSE_FIRST if isinstance(values.get(name), int)}
    spans |= {name: range(layers - values[name], layers) for name in _SHARED_LAST if isinstance(values.get(name), int)}
    kinds = [
        (
            *(repr(_kept_part(name, value, (layer,), layers)) for name, value in by_layer.items()),
            *(layer in span for span in spans.values()),
        )
        for layer in range(layers)
    ]
    chosen = _chosen_layers(kinds, of_a_kind)
    values |= {name: _kept_part(name, value, chosen, layers) for name, value in by_layer.items()}
    values |= {name: sum(layer in span for layer in chosen) for name, span in spans.items()}
    for name in _LAYER_COUNTS & values.keys():
        if isinstance(count := values[name], int):
            pairs = layers // count if count and layers % count == 0 else 1  # some classes count pairs of layers
            values[name] = max(2, len(chosen) // pairs)


def _shorten_intervals(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool):
            if _INTERVALS.search(name):
                values[name] = min(value, 2)
            elif _OFFSETS.search(name):
                values[name] = min(value, 1)


def _chosen_layers(kinds: list[tuple[Any, ...]], of_a_kind: int) -> list[int]:
    first = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < of_a_kind][: MOST_LAYERS * of_a_kind]
    return first if len(first) > 1 else list(range(min(2, len(kinds))))


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
    if any(part in name for part in _NEVER):
        return None
    if is_by_layer(name, value, total):
        items = [value[index] for index in kept]
        return "".join(items) if isinstance(value, str) else type(value)(items)
    if _is_indices(name, value, total):
        return type(value)(kept.index(layer) for layer in value if layer in kept)
    if isinstance(value, dict) and value:
        indices = [_as_index(key) for key in value]
        if None not in indices and _are_indices(sorted(index for index in indices if index is not None), total):
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
