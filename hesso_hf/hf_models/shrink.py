"""Shrinking a config by rules on its fields' names and values, with one layer of each kind.

Nothing here knows an architecture: a field is a size of the field's usual names, a list with one entry a layer, a list
of layer indices, an interval between layers, a special token, a table's length, or it stays as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .by_layer import keep_some_layers
from .sizes import (
    BY_LAYER,
    EXPERT_MLP,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    MIXER_HEADS,
    MLP,
    OTHER_NAMES,
    VOCAB,
    get_size,
    raw_value,
    set_common_value,
    size_places,
    text_config_of,
    varies,
)

TINY_VOCAB, TINY_MLP = 67, 44


@dataclass(frozen=True)
class Geometry:
    """The sizes that depend on each other, and how much else of the config is kept.

    Attributes:
        own_heads: keeps the config's other sizes inside a head.
        all_layers: keeps every layer, and with them all that the config says by layer.
    """

    heads: int
    kv_heads: int
    head_dim: int | None
    hidden: int
    own_heads: bool = False
    layers_of_a_kind: int = 1
    all_layers: bool = False


SIDE = Geometry(heads=4, kv_heads=4, head_dim=8, hidden=32)  # of parts beside the text decoder
# Sizes of the field that have no canonical name here. All differ from each other and from the canonical ones.
_WIDTHS = {
    EXPERT_MLP: 28, "expert_ffn_hidden_size": 28, "moe_ffn_hidden_size": 28, "shared_expert_intermediate_size": 36,
    "moe_shared_expert_intermediate_size": 36, "shared_intermediate_size": 36, "shared_experts_intermediate_size": 36,
    "intermediate_size_mlp": 52, "dense_intermediate_size": 52, "prefix_dense_intermediate_size": 52,
    "moe_latent_size": 40, "hidden_size_per_layer_input": 12, "ple_embed_dim": 20, "laurel_rank": 10,
    "router_hidden_size": 20,
}  # fmt: skip
_HEAD_SIZES = {
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "q_lora_rank": 20, "kv_lora_rank": 24,
    "index_head_dim": 8, "indexer_head_dim": 8, "o_lora_rank": 20, "linear_key_head_dim": 6,
    "linear_value_head_dim": 10, "linear_head_dim": 8, "mamba_d_state": 6, "mamba_d_head": 8, "mamba_head_dim": 8,
    "mamba_headdim": 8, "mamba_dt_rank": 6, "time_step_rank": 6, "state_size": 10, "ssm_state_size": 10,
    "rotary_dim": 4, "d_rel": 6, "global_head_dim": 16, "swa_head_dim": 8,
}  # fmt: skip
_COUNTS = {
    EXPERTS: 4, **dict.fromkeys(OTHER_NAMES[EXPERTS], 4),
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_top_k": 2, "top_k_experts": 2,
    "n_group": 2, "num_expert_group": 2, "topk_group": 1, "n_shared_experts": 2, "num_shared_experts": 2,
    "moe_num_shared_experts": 2, "zero_expert_num": 2, "index_n_heads": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "linear_num_key_heads": 2, "linear_num_heads": 4, "mamba_n_groups": 3, "mamba_ngroups": 3, "n_groups": 3,
    "num_centroids": 8, "num_codebooks": 2,
}  # fmt: skip
_MOST = {
    "index_topk": 5, "indexer_budget": 8, "indexer_compress_ratio": 2,
    "index_topk_blocks": 2, "sliding_window": 7, "sliding_window_size": 7, "attention_chunk_size": 8,
    "window_size": 7, "attention_window_size": 7, "chunk_size": 4, "mamba_chunk_size": 4, "block_size": 4,
    "index_block_size": 4, "block_multiple_of": 8,
    "max_position_embeddings": 64, "original_max_position_embeddings": 32, "n_positions": 64, "n_ctx": 64,
    "max_target_positions": 64, "max_source_positions": 64, "max_seq_len": 64, "model_max_length": 64,
    "num_nextn_predict_layers": 1, "vocab_size_per_layer_input": TINY_VOCAB, "ngram_vocab_size_base": 61,
    "unpadded_vocab_size": TINY_VOCAB, "encoder_hash_byte_group_vocab": 61, "num_mtp_layers": 1,
}  # fmt: skip
_FREQUENCY_LISTS = ("short_factor", "long_factor")
_SPECIAL_TOKEN = re.compile(r"(_token_ids?|_token_index)$")
_EPSILON = re.compile(r"(^|_)(eps|epsilon)$")


def shrink_values(config: PretrainedConfig, geometry: Geometry) -> dict[str, Any]:
    """Return the fields of a small config of the same class, for its `from_dict`."""
    text = text_config_of(config)
    values = _shrink(config, text, geometry)
    hidden = get_size(text, HIDDEN)
    if text is not config and hidden:
        _follow(values, hidden, geometry.hidden)  # a projector's output is as wide as the text model
    return values


def _shrink(config: PretrainedConfig, text: PretrainedConfig, geometry: Geometry) -> dict[str, Any]:
    values = config.to_dict()
    is_text, has_width = config is text, bool(size_places(config, HIDDEN))
    parts = {name for name in values if isinstance(raw_value(config, name), PretrainedConfig)}
    if is_text or not parts:
        if not geometry.all_layers:
            keep_some_layers(config, values, geometry.layers_of_a_kind)
        old = config.to_dict()
        fields = _sizes_of_fields(config, geometry)
        for name in _in_parts(config, fields):
            set_common_value(values, name, fields.pop(name))
        for name in values.keys() & fields.keys():
            values[name] = _resized(values[name], fields[name], may_grow=name not in _COUNTS)
        if old_hidden := get_size(config, HIDDEN):
            _follow(values, old_hidden, geometry.hidden, done=fields.keys())
        _keep_ratios(old, values, fields)
        _keep_relations(old, values)
        _shrink_rotary(config, values, geometry)
    for name in parts:
        part = getattr(config, name)
        is_decoder = part is text or name in ("attn_config", "ffn_config") or (is_text and not has_width)
        values[name] = _shrink(part, part if is_decoder else text, geometry if is_decoder else SIDE)
    _small_numbers(values)
    return values


def _sizes_of_fields(config: PretrainedConfig, geometry: Geometry) -> dict[str, int]:
    """Return the small value of each field, by its own name."""
    canonical = {
        HEADS: geometry.heads, KV_HEADS: geometry.kv_heads, HIDDEN: geometry.hidden, MLP: TINY_MLP,
        VOCAB: TINY_VOCAB, EXPERT_MLP: 28, EXPERTS: 4, "hidden_size_global": geometry.hidden,
    }  # fmt: skip
    if geometry.head_dim is not None or isinstance(raw_value(config, HEAD_DIM), int):
        canonical[HEAD_DIM] = geometry.head_dim or geometry.hidden // geometry.heads
    fields = dict(_WIDTHS) | _COUNTS | ({} if geometry.own_heads else _HEAD_SIZES)
    fields |= {name: size for name, size in canonical.items() if name not in type(config).attribute_map}
    for name, size in canonical.items():
        for owner, attribute in size_places(config, name):
            if owner is config and not isinstance(getattr(type(config), attribute, None), property):
                fields[attribute] = size
    return fields


def _resized(value: Any, size: int, may_grow: bool) -> Any:
    """Put a size in: counts don't grow, lists with one size a layer keep which layers agree."""
    if isinstance(value, list):
        distinct = sorted({item for item in value if isinstance(item, int) and item})
        return [size + 4 * distinct.index(item) if item in distinct else item for item in value]
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    return size if may_grow else min(value, size)


def _follow(values: dict[str, Any], old: int, new: int, done: Any = ()) -> None:
    """Other fields that equal a multiple of the width follow it: projections' outputs, recurrent widths."""
    for name, value in values.items():
        if name in done or name in _MOST or isinstance(value, bool) or not isinstance(value, int):
            continue
        for factor in (1, 2):
            if value == factor * old and value > 64:
                values[name] = factor * new


def _keep_relations(old: dict[str, Any], values: dict[str, Any]) -> None:
    """Fields that hold the sum, the ratio or the product of others still do."""
    nope, rope = old.get("qk_nope_head_dim"), old.get("qk_rope_head_dim")
    if isinstance(nope, int) and isinstance(rope, int):
        small_nope, small_rope = values["qk_nope_head_dim"], values["qk_rope_head_dim"]
        follows = {nope: small_nope, rope: small_rope, nope + rope: small_nope + small_rope}
        for override in (old.get("per_layer_config") or {}).values():
            if own := override.get("qk_nope_head_dim"):
                follows.setdefault(own + rope, _in_ratio(own, nope, small_nope) + small_rope)
        for name in (HEAD_DIM, "qk_head_dim"):
            if old.get(name) in follows:
                values[name] = follows[old[name]]
    keys, heads = old.get("linear_num_key_heads"), old.get("linear_num_value_heads")
    if keys and heads:
        values["linear_num_value_heads"] = values["linear_num_key_heads"] * max(1, heads // keys)
    for names in MIXER_HEADS:  # heads of state space layers fill the width times the expansion, where they did
        sizes = [size for name in (*names, HIDDEN) if isinstance(size := old.get(name), int | float) and size]
        if len(sizes) == 4:
            count, head_dim, expansion, hidden = sizes
            if count * head_dim == int(expansion * hidden):
                values[names[0]] = int(values[names[2]] * values[HIDDEN]) // values[names[1]]


def _keep_ratios(old: dict[str, Any], values: dict[str, Any], fields: dict[str, int]) -> None:
    """What single layers have for themselves, and lists of one size a layer, keep their ratios to the common size."""
    overrides = (values.get("per_layer_config") or {}).values()
    for name in fields:
        base = old.get(name)
        if not isinstance(base, int) or not base:
            continue
        for override in overrides:
            if isinstance(value := override.get(name), int):
                override[name] = _in_ratio(value, base, values[name])
        if isinstance(by_layer := values.get(name + BY_LAYER), list):
            values[name + BY_LAYER] = [max(1, item * values[name] // base) for item in by_layer]


def _in_parts(config: PretrainedConfig, fields: dict[str, int]) -> list[str]:
    """List numbers of heads that differ between layers: they keep their ratios, each so many times the small one."""
    places = [place for name in (HEADS, KV_HEADS) for place in size_places(config, name)[:1]]
    return [name for owner, name in places if owner is config and name in fields and varies(config, name)]


def _in_ratio(value: int, base: int, small_base: int) -> int:
    return max(2, round(small_base * value / base) // 2 * 2)


def _shrink_rotary(config: PretrainedConfig, values: dict[str, Any], geometry: Geometry) -> None:
    """Cut one-number-a-frequency lists and sections of rotary embeddings to half the head_dim."""
    head_dim = values.get(HEAD_DIM)
    if not isinstance(head_dim, int):
        head_dim = geometry.head_dim or geometry.hidden // geometry.heads
    for name in ("rope_parameters", "rope_scaling"):
        for rope in _rotary_dicts(values.get(name)):
            share = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
            half = int(head_dim * share) // 2
            for key in _FREQUENCY_LISTS:
                if isinstance(rope.get(key), list):
                    rope[key] = (rope[key] * half)[:half]
            if isinstance(rope.get("mrope_section"), list):
                parts = len(rope["mrope_section"])
                rope["mrope_section"] = [half - (parts - 1) * (half // parts)] + [half // parts] * (parts - 1)
            if isinstance(rope.get("original_max_position_embeddings"), int):
                rope["original_max_position_embeddings"] = 32


def has_frequency_lists(config: PretrainedConfig) -> bool:
    """Tell whether the rotary scaling has one number for each frequency."""
    text = text_config_of(config)
    found = [rope for name in ("rope_parameters", "rope_scaling") for rope in _rotary_dicts(raw_value(text, name))]
    return any(isinstance(rope.get(name), list) for rope in found for name in _FREQUENCY_LISTS)


def _rotary_dicts(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, dict):
        return []
    return [value, *(inner for inner in value.values() if isinstance(inner, dict))]


def _small_numbers(values: dict[str, Any]) -> None:
    """Large epsilons, so that a fold that changes one can't pass; special tokens in the vocabulary; short tables."""
    for name, value in values.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, float) and _EPSILON.search(name):
            values[name] = 0.05
        elif _SPECIAL_TOKEN.search(name):
            values[name] = [_token(item) for item in value] if isinstance(value, list) else _token(value)
        elif isinstance(value, int) and value > 0 and (name in _MOST or name.endswith("vocab_size")):
            values[name] = min(value, _MOST.get(name, TINY_VOCAB))


def _token(value: Any) -> Any:
    return value % 3 if isinstance(value, int) and value > 2 else value
