"""Models without weights: a config's class, and the model built from it on the meta device."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME, logging

from ..errors import HessoError, UnsupportedStructureError, first_line

_GENERATING = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Leave out what Transformers advises whoever builds a model, where one is built only to be looked at."""
    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


@without_advice()
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
    return causal_class_of(type(config), config.model_type)


def unknown_class_of(config: PretrainedConfig) -> str | None:
    """Return the class that a config names, where Transformers has none of that name."""
    import transformers

    named = config.architectures or []
    return None if not named or any(hasattr(transformers, name) for name in named) else named[0]


def class_to_build(config: PretrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    """Return the class that builds a config's model: its own where the layers differ in width, else the stock class.

    Raises:
        HessoError: where it is its own, whose code isn't allowed to run.
    """
    if not vars(config).get("layer_sizes"):
        return model_class_of(config)
    if not trust_remote_code:
        raise HessoError(
            f"`model` ({config.name_or_path!r}) has layers of different widths, which need the code that lies beside "
            "it: allow that with `--trust-remote-code` (in Python, `trust_remote_code=True`)"
        )
    return own_class_of(config, str(config.name_or_path))


def auto_class_of(model_class: type[PreTrainedModel], config: PretrainedConfig) -> str:
    """Return the name of the class of Transformers' that finds a model class by its config.

    Several may find it: that of causal language models goes first, that of models to pretrain last. `AutoModel` loads
    what none finds, by the code that lies beside it.
    """
    kinds = {name: kind for name, kind in vars(modeling_auto).items() if name.startswith("AutoModelFor")}
    for name in sorted(kinds, key=lambda name: (name != "AutoModelForCausalLM", name == "AutoModelForPreTraining")):
        found = kinds[name]._model_mapping.get(type(config), ())
        if model_class in (found if isinstance(found, list | tuple) else (found,)):
            return name
    return AutoModel.__name__


def own_loader_of(config: PretrainedConfig) -> str:
    """Return the name of the auto class that a config with code of its own model names: causal models' if it does."""
    named = _own_loaders(config)
    return AutoModelForCausalLM.__name__ if AutoModelForCausalLM.__name__ in named else named[0]


def _own_loaders(config: PretrainedConfig) -> list[str]:
    return [name for name in getattr(config, "auto_map", None) or () if name.startswith(AutoModel.__name__)]


def loader_of(config: PretrainedConfig, trust_remote_code: bool) -> Any:
    """Return what loads a config's model: the auto class that its own code is for, where that may run, or its class."""
    if trust_remote_code and _own_loaders(config):
        import transformers

        name = own_loader_of(config)
        if not hasattr(transformers, name):
            raise HessoError(
                f"the model's own code is for {name}, which Transformers {transformers.__version__} has not"
            )
        return getattr(transformers, name)
    return model_class_of(config)


def check_next_tokens(config: PretrainedConfig, source: str, remedy: str) -> None:
    """Refuse a model that doesn't say of each token which one comes next; of own code the auto class tells it.

    Args:
        source: what the user named.
        remedy: what to do instead.

    Raises:
        HessoError: naming the model and its class.
    """
    if _own_loaders(config):
        name = own_loader_of(config)
        predicts = name in (AutoModel.__name__, *_GENERATING)
    else:
        found = model_class_of(config)
        name, predicts = found.__name__, not config.is_encoder_decoder and bool(found.can_generate())
    if not predicts:
        raise HessoError(f"`model` ({source!r}) is loaded as {name}, which predicts no next tokens: {remedy}")


def own_class_of(config: PretrainedConfig, folder: str) -> type[PreTrainedModel]:
    """Return the class of a config that brings the code of its model, which is run."""
    found: Any = get_class_from_dynamic_module(config.auto_map[own_loader_of(config)], folder)
    return found


def causal_class_of(config_class: type[PretrainedConfig], model_type: str) -> type[PreTrainedModel]:
    """Return the causal language model of a config class.

    Raises:
        UnsupportedStructureError: where Transformers has none.
    """
    mapping = AutoModelForCausalLM._model_mapping
    if config_class not in mapping:
        raise UnsupportedStructureError(
            f"model_type {model_type!r} has no causal language model in the installed transformers"
        )
    found: Any = mapping[config_class]
    return found[0] if isinstance(found, list | tuple) else found


def load_config(source: Any, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the config of a config, a model, a local folder, a config.json or a Hub id.

    Raises:
        HessoError: where nothing of that kind is found, or what is found can't be used.
    """
    if isinstance(source, PretrainedConfig):
        return source
    if isinstance(source, PreTrainedModel):
        return source.config
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        reason = first_line(error)
        if "gated repo" in str(error):
            raise HessoError(
                f"{str(source)!r} is gated: accept its licence on the Hub, and log in by `hf auth login`"
            ) from error
        if not os.path.exists(source):
            raise HessoError(
                f"no model config found at {str(source)!r}: no such folder exists, and no model of that name could be "
                f"had from the Hub ({reason}); check the path"
            ) from error
        if os.path.isdir(source) and not os.path.exists(os.path.join(source, CONFIG_NAME)):
            raise HessoError(
                f"no model config found at {str(source)!r}: that folder has no {CONFIG_NAME}; give the one that "
                "`save_pretrained` wrote"
            ) from error
        raise HessoError(f"no model config found at {str(source)!r} that can be used: {reason}") from error
