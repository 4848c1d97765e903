"""Config sizes: where a config keeps them, reading and writing them, without a table per architecture.

Names are Transformers' canonical ones (`num_attention_heads`, `hidden_size`, ...); a config class' `attribute_map`
turns them into its own. `get_size` reads one size that the config says; `ConfigSizes.of` resolves all, also what the
model code makes of them, once.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .build import build_meta, model_class_of

HEADS, KV_HEADS, HEAD_DIM = "num_attention_heads", "num_key_value_heads", "head_dim"
HIDDEN, MLP, LAYERS = "hidden_size", "intermediate_size", "num_hidden_layers"
EXPERT_MLP, EXPERTS, VOCAB = "moe_intermediate_size", "num_experts", "vocab_size"

# Other names in the field for the same size, tried where a class' `attribute_map` doesn't say it.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    HEADS: ("n_head", "n_heads", "attention_heads"),
    KV_HEADS: ("num_kv_heads", "n_head_kv", "n_kv_heads", "kv_n_heads", "num_query_groups", "multi_query_group_num"),
    HEAD_DIM: ("attention_head_dim", "kv_channels", "dim_head", "d_head", "d_kv"),
    HIDDEN: ("d_model", "n_embd", "emb_dim", "embed_dim", "dim"),
    MLP: (
        "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dff", "d_inner", "dim_ff", "inner_dim", "feed_forward_size",
        "mlp_dim",
    ),
    LAYERS: ("num_layers", "n_layer", "n_layers", "num_blocks", "depth"),
    EXPERT_MLP: ("expert_ffn_hidden_size", "moe_ffn_hidden_size", "expert_intermediate_size"),
    EXPERTS: ("num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    VOCAB: (),
}  # fmt: skip
# Sizes that encoder-decoder classes give to both halves; the first half is what a decoder alone reads.
_HALVES = {
    HEADS: (
        ("decoder_attention_heads", "encoder_attention_heads"),
        ("num_decoder_attention_heads", "num_encoder_attention_heads"),
    ),
    MLP: (("decoder_ffn_dim", "encoder_ffn_dim"),),
    LAYERS: (("decoder_layers", "encoder_layers"), ("num_decoder_layers", "num_encoder_layers")),
}
_WITH_WIDTH = ("word_embed_proj_dim", "embedding_size")  # of the embedding: the width, where nothing projects it
_ADJUSTS_MLP = "block_auto_adjust_ff_dim"  # a switch: the model code makes another MLP size of the one that is said
BY_LAYER = "_per_layer"  # behind a size's name: a list with one a layer, which the model code reads instead
# State space layers: their heads, the channels of a head, and by what they exceed the width.
MIXER_HEADS = (
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"), ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
    ("num_heads", HEAD_DIM, "expand"), ("mamba_num_heads", "mamba_head_dim", "expand"),
    ("n_mamba_heads", "mamba_head_dim", "mamba_expand"),
)  # fmt: skip
_IN_PARTS = (HEADS, KV_HEADS)  # may differ between layers: then a unit is as many in each as go with one of the fewest
_PARTS = ("attn_config", "ffn_config")


def size_places(config: PretrainedConfig, name: str) -> list[tuple[PretrainedConfig, str]]:
    """Return where a config keeps the size of a canonical name: (config or part of it, attribute), the main one first.

    The text half of a multimodal config counts, the parts for attention and MLP that some classes split off, and both
    halves of an encoder-decoder. An attribute that is None counts where no other is found.
    """
    text = text_config_of(config)
    for halves in _HALVES.get(name, ()):
        found = [(text, half) for half in halves if raw_value(text, half) is not None]
        if found:
            plain = name not in type(text).attribute_map and isinstance(raw_value(text, name), int)
            return found + [(text, name)] * (name == LAYERS and plain)
    parts = [part for part in (raw_value(text, key) for key in _PARTS) if isinstance(part, PretrainedConfig)]
    places = []
    for owner in (*parts, text):  # what a part says is what the model code reads
        names = (type(owner).attribute_map.get(name, name), *OTHER_NAMES.get(name, ()))
        held = [
            (owner, attribute) for attribute in names if _refuses_to_say(owner, attribute) or hasattr(owner, attribute)
        ]
        places += ([place for place in held if raw_value(*place) is not None] or held)[:1]
    values = [raw_value(*place) for place in places]
    known = [value for value in values if value is not None]
    if not known:
        return places[:1]
    widths = [
        (text, attribute) for attribute in _WITH_WIDTH if name == HIDDEN and raw_value(text, attribute) == known[0]
    ]
    return [place for place, value in zip(places, values, strict=True) if value == known[0]] + widths


def text_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the text decoder: the config itself, unless it is multimodal."""
    try:
        return config.get_text_config()
    except ValueError:  # an encoder-decoder of two configs
        return config.get_text_config(decoder=True)


def get_size(config: PretrainedConfig, name: str) -> int | None:
    """Return a size that a config says; None where it says none of that name, several, or not the model's.

    Several is one a layer; not the model's is an MLP size that the model code derives, see `ConfigSizes`. Numbers of
    heads that differ between layers count in parts that all have as many of.
    """
    places = size_places(config, name)
    if not places or _is_derived(config, name, places):
        return None
    value = raw_value(*places[0])
    if value is None and name in _IN_PARTS and varies(config, places[0][1]):
        return common_size(*places[0])
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class ConfigSizes:
    """A config's sizes, resolved once.

    Attributes:
        config_class: the name of its class, for messages.
        by_name: canonical name to size, for those that are one integer.
        head_dim: the effective one: explicit, else hidden_size // num_attention_heads.
        mlp_is_derived: whether the model code derives the MLP size (GPT-2's `n_inner` of None, LFM2's
            `intermediate_size` under `block_auto_adjust_ff_dim`); it is then read from the model's shapes.
        fixed_mixer: the field that says by how much a mixer exceeds the width, and the mixer's channels, where these
            stay when the width changes.
    """

    config_class: str = ""
    by_name: Mapping[str, int] = field(default_factory=dict)
    head_dim: int | None = None
    mlp_is_derived: bool = False
    fixed_mixer: tuple[str, int] | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> ConfigSizes:
        """Resolve a config's sizes; where the MLP's is derived, models are built on the meta device to find it."""
        found = {name: get_size(config, name) for name in OTHER_NAMES}
        places = size_places(config, MLP)
        derived = _is_derived(config, MLP, places)
        if derived and len(places) == 1:
            found[MLP] = _derived_size(config.model_type, config.to_json_string(use_diff=False), places[0][1])
        return cls(
            type(config).__name__, {name: size for name, size in found.items() if size is not None},
            head_dim_of(config), derived, _fixed_mixer(config, found[HIDDEN]),
        )  # fmt: skip

    def get(self, name: str) -> int | None:
        """Return the size of a canonical name, None where the config has none, or several."""
        return self.by_name.get(name)


def set_sizes(config: PretrainedConfig, sizes: dict[str, Any]) -> None:
    """Write sizes under the names that the config's class has for them, in place.

    A size that the class has no name for is written as it is called, which is how `head_dim` becomes explicit.
    """
    for name, value in sizes.items():
        for owner, attribute in size_places(config, name) or [(text_config_of(config), name)]:
            if name in _IN_PARTS and varies(owner, attribute):
                set_common_size(owner, attribute, value)
            elif not isinstance(getattr(type(owner), attribute, None), property):
                _follow_by_layer(owner, attribute, value)
                setattr(owner, attribute, value)
        if name == MLP:
            _keep_as_said(config)


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


def _follow_by_layer(config: PretrainedConfig, name: str, value: Any) -> None:
    """Change a list of one size a layer as the size itself; where that gives no whole numbers, none of them follows."""
    by_layer, old = raw_value(config, name + BY_LAYER), raw_value(config, name)
    if isinstance(by_layer, list) and isinstance(old, int) and all(item * value % old == 0 for item in by_layer):
        setattr(config, name + BY_LAYER, [item * value // old for item in by_layer])


def _keep_as_said(config: PretrainedConfig) -> None:
    """Switch off that the model code adjusts the MLP size, where it does."""
    if _is_adjusted(config):
        setattr(text_config_of(config), _ADJUSTS_MLP, False)


def _is_adjusted(config: PretrainedConfig) -> bool:
    return raw_value(text_config_of(config), _ADJUSTS_MLP) is True


def _is_derived(config: PretrainedConfig, name: str, places: list[tuple[PretrainedConfig, str]]) -> bool:
    """Tell whether the model code takes another size than the config says."""
    return name == MLP and bool(places) and (raw_value(*places[0]) is None or _is_adjusted(config))


def canonical_name(config: PretrainedConfig, name: str) -> str:
    """Return the canonical name of the size that a config's class calls `name`; `name` itself where it is none's."""
    if name in OTHER_NAMES:
        return name
    for canonical in OTHER_NAMES:
        for owner, attribute in size_places(config, canonical):
            if name in (attribute, type(owner).attribute_map.get(attribute)):
                return canonical
    return name


def raw_value(config: PretrainedConfig, name: str) -> Any:
    """Read an attribute, None where there is none or the config refuses, since it differs between layers."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def varies(config: PretrainedConfig, name: str) -> bool:
    """Tell whether a size differs between layers, so that the config refuses to give one."""
    return _refuses_to_say(text_config_of(config), name)


def _refuses_to_say(config: PretrainedConfig, name: str) -> bool:
    try:
        getattr(config, name, None)
    except RuntimeError:  # what a config with sizes of its own for each layer raises
        return True
    return False


@lru_cache(maxsize=64)
def _derived_size(model_type: str, config_json: str, attribute: str) -> int | None:
    """Find the value that, written explicitly, leaves every parameter shape as it is, and whose successor doesn't."""
    try:
        config = CONFIG_MAPPING[model_type].from_dict(json.loads(config_json))
        model_class = model_class_of(config)
        expected = _shapes_with(model_class, config, {})
        _keep_as_said(config)
        hidden = get_size(config, HIDDEN) or 0
        dims = {dim for shape in expected for dim in shape}
        for value in sorted(dims, key=lambda dim: (dim != 4 * hidden, dim)):
            if _shapes_with(model_class, config, {attribute: value}) == expected:
                moved = _shapes_with(model_class, config, {attribute: value + 8})
                return value if moved != expected else None
    except Exception:  # model code may refuse to be built with any exception type: then there is no such size
        return None
    return None


def _shapes_with(model_class: type[PreTrainedModel], config: PretrainedConfig, changes: dict[str, Any]) -> list[Any]:
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(text_config_of(changed), name, value)
    return [tuple(parameter.shape) for parameter in build_meta(model_class, changed).parameters()]


def head_dim_of(config: PretrainedConfig) -> int | None:
    """Return the effective head_dim that a config says: the explicit one, else hidden_size // num_attention_heads."""
    explicit = get_size(config, HEAD_DIM)
    if explicit is None and varies(config, HEAD_DIM):
        return None
    hidden = get_size(config, HIDDEN)
    heads = None if varies(config, HEADS) else get_size(config, HEADS)
    return explicit or (hidden // heads if hidden and heads else None)


def _fixed_mixer(config: PretrainedConfig, width: int | None) -> tuple[str, int] | None:
    """Return the field that says by how much a mixer exceeds the width, and the mixer's channels, where these stay.

    They do where the config class wants them to be heads * head_dim, and so refuses another width alone.
    """
    text = text_config_of(config)
    for *counts, name in MIXER_HEADS:
        factors, expansion = [raw_value(text, count) for count in counts], raw_value(text, name)
        if width and all(isinstance(value, int) for value in (*factors, expansion)):
            channels = math.prod(factors)
            if expansion and channels == expansion * width and not _accepts(config, {HIDDEN: 2 * width}):
                wider = {HIDDEN: 2 * width, name: expansion // 2} if expansion % 2 == 0 else {}
                if _accepts(config, wider or {HIDDEN: width // 2, name: 2 * expansion}):
                    return name, channels
    return None


def _accepts(config: PretrainedConfig, values: dict[str, int]) -> bool:
    """Tell whether a config's class takes these values, written as they are called."""
    changed = copy.deepcopy(config)
    set_sizes(changed, values)
    try:
        type(config).from_dict(changed.to_dict()).validate()
    except Exception:  # a config class may refuse with any exception type
        return False
    return True
