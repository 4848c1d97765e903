"""Config sizes: reading, changing and validating them without a table per architecture.

Names are Transformers' canonical ones (`num_attention_heads`, `hidden_size`, ...); a config class' `attribute_map`
turns them into its own.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import HessoError, NotApplicableError, UnsupportedStructureError
from .by_layer import common_size, set_common_size
from .layer_lists import keep_layers_

HEADS, KV_HEADS, HEAD_DIM = "num_attention_heads", "num_key_value_heads", "head_dim"
HIDDEN, MLP, LAYERS = "hidden_size", "intermediate_size", "num_hidden_layers"
EXPERT_MLP, EXPERTS, VOCAB = "moe_intermediate_size", "num_experts", "vocab_size"
_SIZE_OF = {"mlp_channels": MLP, "expert_channels": EXPERT_MLP, "embedding_channels": HIDDEN}

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
    HEADS: ("decoder_attention_heads", "encoder_attention_heads"),
    MLP: ("decoder_ffn_dim", "encoder_ffn_dim"),
    LAYERS: ("decoder_layers", "encoder_layers"),
}
_HALVES_OF_COUNTS = {
    HEADS: ("num_decoder_attention_heads", "num_encoder_attention_heads"),
    LAYERS: ("num_decoder_layers", "num_encoder_layers"),
}
_WITH_WIDTH = ("word_embed_proj_dim", "embedding_size")  # of the embedding: the width, where nothing projects it
# Switches with which the model code makes another size of the one that the config says.
_ADJUSTED_BY = {MLP: ("block_auto_adjust_ff_dim",)}
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
    for halves in (_HALVES, _HALVES_OF_COUNTS):
        found = [(text, half) for half in halves.get(name, ()) if _raw(text, half) is not None]
        if found:
            return found + [(text, name)] * (name == LAYERS and _is_plain(text, name))
    parts = [part for part in (_raw(text, key) for key in _PARTS) if isinstance(part, PretrainedConfig)]
    owners = [*parts, text]  # what a part says is what the model code reads
    places = []
    for owner in owners:
        names = (type(owner).attribute_map.get(name, name), *OTHER_NAMES.get(name, ()))
        held = [(owner, attribute) for attribute in names if hasattr_safely(owner, attribute)]
        places += ([place for place in held if _raw(*place) is not None] or held)[:1]
    values = [_raw(*place) for place in places]
    known = [value for value in values if value is not None]
    if not known:
        return places[:1]
    widths = [(text, attribute) for attribute in _WITH_WIDTH if name == HIDDEN and _raw(text, attribute) == known[0]]
    return [place for place, value in zip(places, values, strict=True) if value == known[0]] + widths


def text_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the text decoder: the config itself, unless it is multimodal."""
    try:
        return config.get_text_config()
    except ValueError:  # an encoder-decoder of two configs
        return config.get_text_config(decoder=True)


def get_size(config: PretrainedConfig, name: str) -> int | None:
    """Return a config size, or None where the config has none of that name, or several (one a layer).

    An MLP size that the model code derives (GPT-2's `n_inner` of None, LFM2's `intermediate_size` under
    `block_auto_adjust_ff_dim`) is read from the model's shapes. Numbers of heads that differ between layers count in
    parts that all have as many of.
    """
    places = size_places(config, name)
    if not places:
        return None
    value = _raw(*places[0])
    if _is_derived(config, name) and len(places) == 1:
        return _derived_size(config.model_type, config.to_json_string(use_diff=False), places[0][1])
    if value is None and name in _IN_PARTS and varies(config, places[0][1]):
        return common_size(*places[0])
    return value if isinstance(value, int) and not isinstance(value, bool) else None


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
        for switch in _switched_on(config, name):
            setattr(text_config_of(config), switch, False)


def _follow_by_layer(config: PretrainedConfig, name: str, value: Any) -> None:
    """Change a list of one size a layer as the size itself; where that gives no whole numbers, none of them follows."""
    by_layer, old = _raw(config, name + BY_LAYER), _raw(config, name)
    if isinstance(by_layer, list) and isinstance(old, int) and all(item * value % old == 0 for item in by_layer):
        setattr(config, name + BY_LAYER, [item * value // old for item in by_layer])


def _switched_on(config: PretrainedConfig, name: str) -> list[str]:
    """List the switches that make the model code adjust a size."""
    return [switch for switch in _ADJUSTED_BY.get(name, ()) if _raw(text_config_of(config), switch) is True]


def _is_derived(config: PretrainedConfig, name: str) -> bool:
    """Tell whether the model code takes another size than the config says."""
    places = size_places(config, name)
    return name == MLP and bool(places) and (_raw(*places[0]) is None or bool(_switched_on(config, name)))


def canonical_name(config: PretrainedConfig, name: str) -> str:
    """Return the canonical name of the size that a config's class calls `name`; `name` itself where it is none's."""
    if name in OTHER_NAMES:
        return name
    for canonical in OTHER_NAMES:
        for owner, attribute in size_places(config, canonical):
            if name in (attribute, type(owner).attribute_map.get(attribute)):
                return canonical
    return name


def hasattr_safely(config: PretrainedConfig, name: str) -> bool:
    """Tell whether a config has an attribute, also one that differs between layers."""
    try:
        return hasattr(config, name)
    except RuntimeError:  # what a config with sizes of its own for each layer raises
        return True


def _raw(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # what a config with sizes of its own for each layer raises
        return None


def varies(config: PretrainedConfig, name: str) -> bool:
    """Tell whether a size differs between layers, so that the config refuses to give one."""
    try:
        getattr(text_config_of(config), name, None)
    except RuntimeError:
        return True
    return False


def _is_plain(config: PretrainedConfig, name: str) -> bool:
    return name not in type(config).attribute_map and isinstance(_raw(config, name), int)


@lru_cache(maxsize=64)
def _derived_size(model_type: str, config_json: str, attribute: str) -> int | None:
    """Find the value that, written explicitly, leaves every parameter shape as it is, and whose successor doesn't."""
    try:
        config = CONFIG_MAPPING[model_type].from_dict(json.loads(config_json))
        model_class = model_class_of(config)
        expected = _shapes_with(model_class, config, {})
        for switch in _switched_on(config, MLP):
            setattr(text_config_of(config), switch, False)
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
    """Return the effective head_dim: the explicit one, else hidden_size // num_attention_heads."""
    explicit = get_size(config, HEAD_DIM)
    if explicit is None and varies(config, HEAD_DIM):
        return None
    hidden = get_size(config, HIDDEN)
    heads = None if varies(config, HEADS) else get_size(config, HEADS)
    return explicit or (hidden // heads if hidden and heads else None)


def unit_increments(structure: str, config: PretrainedConfig) -> dict[str, int]:
    """Return how much each config size grows with one more unit of `structure`.

    An attention head unit is one key-value head with all its query heads; under multi-query attention, where the only
    key-value head can't go, one query head. A query head unit is one query head of grouped ones.

    Raises:
        UnsupportedStructureError: where the config has no such size.
    """
    if structure == "mixer_channels":
        raise NotApplicableError("no mixer's channels follow the width")
    if structure not in ("attention_heads", "query_heads"):
        name = _SIZE_OF[structure]
        if get_size(config, name) is None:
            raise NotApplicableError(f"{structure}: {type(config).__name__} has no integer `{name}`")
        return {name: 1}
    heads, kv_heads = get_size(config, HEADS), get_size(config, KV_HEADS)
    if heads is None:
        raise NotApplicableError(f"{structure}: {type(config).__name__} has no integer `{HEADS}`")
    if structure == "query_heads":
        _refuse_ungrouped(heads, kv_heads)
    elif kv_heads is None or kv_heads == 1:
        return {HEADS: 1}
    assert kv_heads is not None
    if heads % kv_heads:
        raise UnsupportedStructureError(
            f"{structure}: {heads} query heads don't divide over {kv_heads} key-value heads"
        )
    return {HEADS: 1} if structure == "query_heads" else {HEADS: heads // kv_heads, KV_HEADS: 1}


def _refuse_ungrouped(heads: int, kv_heads: int | None) -> None:
    if kv_heads is None or kv_heads == heads:
        raise NotApplicableError("each query head has a key-value head of its own: use attention_heads")
    if kv_heads == 1:
        raise NotApplicableError(
            "all query heads share one key-value head, and attention_heads means single query heads there: use it"
        )


def num_pools(structure: str, config: PretrainedConfig) -> int:
    """Return into how many runs a layer's units are split that all keep equally many: key-value heads, or 1."""
    kv_heads = get_size(config, KV_HEADS)
    return kv_heads if structure == "query_heads" and kv_heads else 1


def num_units(structure: str, config: PretrainedConfig) -> int:
    """Return the number of units of `structure` in one layer."""
    name, increment = next(iter(unit_increments(structure, config).items()))
    size = get_size(config, name)
    assert size is not None
    return size // increment


def copy_with(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """Return a copy with attributes set, head_dim explicit, and no validation (for shape probes only)."""
    changed = copy.deepcopy(config)
    head_dim = head_dim_of(config)
    if head_dim is not None:
        set_sizes(changed, {HEAD_DIM: head_dim})
    set_sizes(changed, _explicit_mlp(config) | changes)
    if HIDDEN in changes and (mixer := _fixed_mixer(config)):
        name, channels = mixer
        # past the class' check of types, for any width: the model code multiplies and rounds down
        vars(text_config_of(changed))[name] = (channels + 0.5) / changes[HIDDEN]
    return changed


def _fixed_mixer(config: PretrainedConfig) -> tuple[str, int] | None:
    """Return the field that says by how much a mixer exceeds the width, and the mixer's channels, where these stay.

    They do where the config class wants them to be heads * head_dim, and so refuses another width alone.
    """
    text, width = text_config_of(config), get_size(config, HIDDEN)
    for *counts, name in MIXER_HEADS:
        factors, expansion = [_raw(text, count) for count in counts], _raw(text, name)
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


def _explicit_mlp(config: PretrainedConfig) -> dict[str, int]:
    """Return an MLP size that the model code derives from others, to be written: it no longer follows them then."""
    derived = get_size(config, MLP) if _is_derived(config, MLP) else None
    return {} if derived is None else {MLP: derived}


def resized_config(
    config: PretrainedConfig, sizes: dict[str, int], layers: Sequence[int] | None = None
) -> PretrainedConfig:
    """Return the validated config of the smaller model, through the class' own constructor.

    `head_dim` is written only where hidden_size // num_attention_heads doesn't give it: some engines ignore it.

    Args:
        layers: where the number of layers changes, those that stay; by default the first ones, which has the same size.

    Raises:
        HessoError: where the config class refuses the sizes.
    """
    changed = copy.deepcopy(config)
    if LAYERS in sizes:
        staying = range(sizes[LAYERS]) if layers is None else layers
        keep_layers_(text_config_of(changed), staying, get_size(config, LAYERS) or 0)
    set_sizes(changed, _explicit_mlp(config) | sizes)
    head_dim = head_dim_of(config)
    if HIDDEN in sizes and (mixer := _fixed_mixer(config)) and mixer[1] % sizes[HIDDEN] == 0:
        set_sizes(changed, {mixer[0]: mixer[1] // sizes[HIDDEN]})
    try:
        if head_dim is not None and head_dim_of(changed) != head_dim:
            set_sizes(changed, {HEAD_DIM: head_dim})
        values = changed.to_dict()
        rebuilt = type(config).from_dict(values)
        rebuilt.validate()
    except Exception as error:  # a config class may refuse with any exception type
        raise HessoError(f"{type(config).__name__} refuses {sizes}: {_last_line(error)}") from error
    rebuilt._attn_implementation = config._attn_implementation
    return rebuilt


def build_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Build a model without weights: parameters on the meta device, tied as the config says."""
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    model.tie_weights()
    return model


def buildable_config(
    model_class: type[PreTrainedModel], config: PretrainedConfig, sizes: dict[str, int]
) -> PretrainedConfig:
    """Return the config of the smaller model, after trying that the class takes it, not only its config class.

    Raises:
        HessoError: where one of the two refuses the sizes.
    """
    resized = resized_config(config, sizes)
    try:
        build_meta(model_class, resized)
    except Exception as error:  # model code may refuse sizes with any exception type
        raise HessoError(f"{model_class.__name__} refuses {sizes}: {_last_line(error)}") from error
    return resized


def model_class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the stock class for a config: the one it names in `architectures`, else its causal language model.

    Raises:
        UnsupportedStructureError: where Transformers has no causal language model for the config.
    """
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise UnsupportedStructureError(
            f"model_type {config.model_type!r} has no causal language model in the installed transformers"
        )
    found: Any = mapping[type(config)]
    return found[0] if isinstance(found, list | tuple) else found


def load_config(source: Any, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the config of a config, a model, a local folder, a config.json or a Hub id.

    Raises:
        HessoError: where nothing of that kind is found.
    """
    if isinstance(source, PretrainedConfig):
        return source
    if isinstance(source, PreTrainedModel):
        return source.config
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise HessoError(
            f"no model config found at {str(source)!r}: neither a folder with a config.json, nor a Hub id that can be "
            f"reached ({_last_line(error)})"
        ) from error


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
