"""Config sizes: reading, changing and validating them without a table per architecture.

Names are Transformers' canonical ones (`num_attention_heads`, `hidden_size`, ...); a config class' `attribute_map`
turns them into its own.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .errors import HessoError, UnsupportedStructureError
from .layer_lists import keep_layers_

HEADS, KV_HEADS, HEAD_DIM = "num_attention_heads", "num_key_value_heads", "head_dim"
HIDDEN, MLP, LAYERS = "hidden_size", "intermediate_size", "num_hidden_layers"


def get_size(config: PretrainedConfig, name: str) -> int | None:
    """Return a config size, or None where the config has none of that name, or several (one a layer)."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # what a config with sizes of its own for each layer raises
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def head_dim_of(config: PretrainedConfig) -> int | None:
    """Return the effective head_dim: the explicit one, else hidden_size // num_attention_heads."""
    explicit = get_size(config, HEAD_DIM)
    hidden, heads = get_size(config, HIDDEN), get_size(config, HEADS)
    return explicit or (hidden // heads if hidden and heads else None)


def unit_increments(structure: str, config: PretrainedConfig) -> dict[str, int]:
    """Return how much each config size grows with one more unit of `structure`.

    An attention head unit is one key-value head with all its query heads; under multi-query attention, where the only
    key-value head can't go, one query head.

    Raises:
        UnsupportedStructureError: where the config has no such size.
    """
    if structure != "attention_heads":
        name = {"mlp_channels": MLP, "embedding_channels": HIDDEN}[structure]
        if get_size(config, name) is None:
            raise UnsupportedStructureError(f"{structure}: {type(config).__name__} has no integer `{name}`")
        return {name: 1}
    heads, kv_heads = get_size(config, HEADS), get_size(config, KV_HEADS)
    if heads is None:
        raise UnsupportedStructureError(f"{structure}: {type(config).__name__} has no integer `{HEADS}`")
    if kv_heads is None or kv_heads == 1:
        return {HEADS: 1}
    if heads % kv_heads:
        raise UnsupportedStructureError(
            f"{structure}: {heads} query heads don't divide over {kv_heads} key-value heads"
        )
    return {HEADS: heads // kv_heads, KV_HEADS: 1}


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
    if head_dim is not None and not isinstance(getattr(type(changed), HEAD_DIM, None), property):
        setattr(changed, HEAD_DIM, head_dim)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


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
        keep_layers_(changed, staying, get_size(config, LAYERS) or 0)
    for name, value in sizes.items():
        setattr(changed, name, value)
    head_dim = head_dim_of(config)
    try:
        if head_dim is not None and head_dim_of(changed) != head_dim:
            setattr(changed, HEAD_DIM, head_dim)
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
