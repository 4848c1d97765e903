"""Units: by how much each config size grows with one more of a structure, and how many of it a layer has."""

from __future__ import annotations

from ..errors import NotApplicableError, UnsupportedStructureError
from ..hf_models.sizes import EXPERT_MLP, HEADS, HIDDEN, KV_HEADS, MLP, ConfigSizes

HEAD_UNITS = ("attention_heads", "query_heads")
_SIZE_OF = {"mlp_channels": MLP, "expert_channels": EXPERT_MLP, "embedding_channels": HIDDEN}


def unit_increments(structure: str, sizes: ConfigSizes) -> dict[str, int]:
    """Return how much each config size grows with one more unit of `structure`.

    An attention head unit is one key-value head with all its query heads; under multi-query attention, where the only
    key-value head can't go, one query head. A query head unit is one query head of grouped ones.

    Raises:
        UnsupportedStructureError: where the config has no such size.
    """
    if structure == "mixer_channels":
        raise NotApplicableError("no mixer's channels follow the width")
    name = HEADS if structure in HEAD_UNITS else _SIZE_OF[structure]
    size = sizes.get(name)
    if size is None:
        raise NotApplicableError(f"{structure}: {sizes.config_class} has no integer `{name}`")
    return _head_increments(structure, size, sizes.get(KV_HEADS)) if structure in HEAD_UNITS else {name: 1}


def _head_increments(structure: str, heads: int, kv_heads: int | None) -> dict[str, int]:
    alone = kv_heads is None or kv_heads == 1
    if structure == "attention_heads" and alone:
        return {HEADS: 1}
    if structure == "query_heads" and (kv_heads is None or kv_heads == heads):
        raise NotApplicableError("each query head has a key-value head of its own: use attention_heads")
    if structure == "query_heads" and alone:
        raise NotApplicableError(
            "all query heads share one key-value head, and attention_heads means single query heads there: use it"
        )
    assert kv_heads is not None
    if heads % kv_heads:
        raise UnsupportedStructureError(
            f"{structure}: {heads} query heads don't divide over {kv_heads} key-value heads"
        )
    return {HEADS: 1} if structure == "query_heads" else {HEADS: heads // kv_heads, KV_HEADS: 1}


def num_pools(structure: str, sizes: ConfigSizes) -> int:
    """Return into how many runs a layer's units are split that all keep equally many: key-value heads, or 1."""
    return (sizes.get(KV_HEADS) or 1) if structure == "query_heads" else 1


def num_units(structure: str, sizes: ConfigSizes) -> int:
    """Return the number of units of `structure` in one layer."""
    name, increment = next(iter(unit_increments(structure, sizes).items()))
    return sizes.by_name[name] // increment
