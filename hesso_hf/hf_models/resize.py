"""Configs of other sizes: for probes, as they are; for the smaller model, through the class' own checks."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import PretrainedConfig, PreTrainedModel

from ..compat import attention_of, experts_of, set_attention, set_experts
from ..errors import HessoError, last_line
from .build import build_meta
from .by_layer import keep_layers_
from .sizes import HEAD_DIM, HIDDEN, LAYERS, MLP, ConfigSizes, head_dim_of, set_sizes, text_config_of


def copy_with(config: PretrainedConfig, changes: dict[str, int], sizes: ConfigSizes | None = None) -> PretrainedConfig:
    """Return a copy with sizes set, head_dim explicit, and no validation (for shape probes only).

    Args:
        sizes: those of `config`, where they are known.
    """
    sizes = sizes or ConfigSizes.of(config)
    changed = copy.deepcopy(config)
    if sizes.head_dim is not None:
        set_sizes(changed, {HEAD_DIM: sizes.head_dim})
    set_sizes(changed, _explicit_mlp(sizes) | changes)
    if HIDDEN in changes and sizes.fixed_mixer:
        name, channels = sizes.fixed_mixer
        # past the class' check of types, for any width: the model code multiplies and rounds down
        vars(text_config_of(changed))[name] = (channels + 0.5) / changes[HIDDEN]
    return changed


def resized_config(
    config: PretrainedConfig,
    changes: dict[str, int],
    layers: Sequence[int] | None = None,
    sizes: ConfigSizes | None = None,
) -> PretrainedConfig:
    """Return the validated config of the smaller model, through the class' own constructor.

    `head_dim` is written only where hidden_size // num_attention_heads doesn't give it: some engines ignore it.

    Args:
        layers: where the number of layers changes, those that stay; by default the first ones, which has the same size.
        sizes: those of `config`, where they are known.

    Raises:
        HessoError: where the config class refuses the sizes.
    """
    sizes = sizes or ConfigSizes.of(config)
    changed = copy.deepcopy(config)
    if LAYERS in changes:
        staying = range(changes[LAYERS]) if layers is None else layers
        keep_layers_(text_config_of(changed), staying, sizes.get(LAYERS) or 0)
    set_sizes(changed, _explicit_mlp(sizes) | changes)
    if HIDDEN in changes and (mixer := sizes.fixed_mixer) and mixer[1] % changes[HIDDEN] == 0:
        set_sizes(changed, {mixer[0]: mixer[1] // changes[HIDDEN]})
    try:
        if sizes.head_dim is not None and head_dim_of(changed) != sizes.head_dim:
            set_sizes(changed, {HEAD_DIM: sizes.head_dim})
        rebuilt = type(config).from_dict(changed.to_dict())
        rebuilt.validate()
    except Exception as error:  # a config class may refuse with any exception type
        raise HessoError(f"{type(config).__name__} refuses {changes}: {last_line(error)}") from error
    set_attention(rebuilt, attention_of(config))
    set_experts(rebuilt, experts_of(config))
    return rebuilt


def buildable_config(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    changes: dict[str, int],
    sizes: ConfigSizes | None = None,
) -> PretrainedConfig:
    """Return the config of the smaller model, after trying that the class takes it, not only its config class.

    Raises:
        HessoError: where one of the two refuses the sizes.
    """
    resized = resized_config(config, changes, sizes=sizes)
    try:
        build_meta(model_class, resized)
    except Exception as error:  # model code may refuse sizes with any exception type
        raise HessoError(f"{model_class.__name__} refuses {changes}: {last_line(error)}") from error
    return resized


def _explicit_mlp(sizes: ConfigSizes) -> dict[str, int]:
    """Return an MLP size that the model code derives from others, to be written: it no longer follows them then."""
    mlp = sizes.get(MLP)
    return {MLP: mlp} if sizes.mlp_is_derived and mlp is not None else {}
