"""The rows of removed tokens are cut out of embedding, output matrix and its bias, and the config's ids renumbered."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import UnsupportedStructureError
from ..hf_models.build import build_meta
from ..hf_models.resize import resized_config
from ..hf_models.sizes import VOCAB, get_size
from ..structures.groups import AxisName
from ..structures.shape_probe import growth
from .tokens import KeptTokens

PER_LAYER_VOCAB = "vocab_size_per_layer_input"
_PROBE_STEPS = (1, 64)  # a class may round its vocabulary up
_ID = re.compile(r"(^|_)token_(ids?|index)$")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_ID_SEQUENCES = ("bad_words_ids", "force_words_ids")


def vocabulary_axes(model_class: type[PreTrainedModel], config: PretrainedConfig) -> dict[AxisName, str]:
    """Find which dimension of which parameter or buffer is the vocabulary, by shapes on the meta device.

    Returns:
        (name, dimension) to the config size that it follows.

    Raises:
        UnsupportedStructureError: where there is none, or one that isn't as long as the vocabulary.
    """
    axes: dict[AxisName, str] = {}
    before = _shapes(build_meta(model_class, config))
    for size in (VOCAB, PER_LAYER_VOCAB):
        value = get_size(config.get_text_config(), size)
        if value is None:
            continue
        for (name, dim), slope in _moved(model_class, config, size, value, before).items():
            if slope != 1 or before[name][dim] != value:
                raise UnsupportedStructureError(
                    f"{name} of {model_class.__name__}: dimension {dim} ({before[name][dim]}) depends on `{size}` "
                    f"({value}) but isn't one row a token, so tokens can't be removed"
                )
            axes[name, dim] = size
    if VOCAB not in axes.values():
        raise UnsupportedStructureError(f"no parameter of {model_class.__name__} has a dimension that `{VOCAB}` gives")
    return axes


def rows_elements(model: PreTrainedModel) -> int:
    """Return the number of parameters that one token takes, tied ones once."""
    parameters = dict(model.named_parameters())
    axes = vocabulary_axes(type(model), model.config)
    return sum(parameters[name].numel() // parameters[name].shape[dim] for name, dim in axes if name in parameters)


def config_token_ids(model: PreTrainedModel) -> set[int]:
    """Return the ids that a model's config and generation config name."""
    size = get_size(model.config.get_text_config(), VOCAB) or 0
    holders: list[Any] = [model.config]
    if model.can_generate() and model.generation_config is not None:
        holders.append(model.generation_config)
    found = {index for holder in holders for _, _, ids in _token_ids(holder) for index in ids}
    return {index for index in found if 0 <= index < size}


@torch.no_grad()
def trim_embeddings(model: PreTrainedModel, kept: KeptTokens) -> PreTrainedModel:
    """Return a copy of a model with the kept tokens only; its logits are those of the model at these tokens.

    Raises:
        UnsupportedStructureError: where the vocabulary's dimensions can't be found, or `kept` is of another vocabulary.
    """
    size = get_size(model.config.get_text_config(), VOCAB)
    if size != kept.vocab_size:
        raise UnsupportedStructureError(
            f"`kept` decides on {kept.vocab_size} tokens, {type(model).__name__} has `{VOCAB}` {size}"
        )
    axes = vocabulary_axes(type(model), model.config)
    with no_init_weights():
        small = type(model)(_trimmed_config(model.config, kept))
    small.tie_weights()
    full = _tensors(model)
    for name, tensor in _tensors(small).items():
        if name not in full:
            raise UnsupportedStructureError(f"{name} exists in the smaller {type(model).__name__} only; tied by hand?")
        rows = full[name].detach()
        for dim in range(rows.dim()):
            if (name, dim) in axes:
                rows = rows.index_select(dim, kept.indices(rows.shape[dim], rows.device))
        if rows.shape != tensor.shape:
            raise UnsupportedStructureError(
                f"{name} has shape {tuple(rows.shape)} with the kept tokens, the smaller model {tuple(tensor.shape)}"
            )
        tensor.data = rows.clone()
    if model.can_generate() and model.generation_config is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
        _renumber(small.generation_config, kept)
    return small.train(model.training)


def _trimmed_config(config: PretrainedConfig, kept: KeptTokens) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    for size in (VOCAB, PER_LAYER_VOCAB):
        value = get_size(text, size)
        if value is not None:
            setattr(text, size, len(kept.indices(value)))
    _renumber(changed, kept)
    return resized_config(changed, {})


def _renumber(holder: Any, kept: KeptTokens) -> None:
    """Give ids in a config their new numbers; drop removed ones from lists of tokens to avoid or to prefer."""
    new, values = kept.new_ids, vars(holder)
    for fields, name, ids in _token_ids(holder):
        # an id outside the vocabulary (-1, or a default that a small vocabulary never reaches) means no token; it stays
        changed = [new[index] if 0 <= index < kept.vocab_size else index for index in ids]
        fields[name] = changed if isinstance(fields[name], list | tuple) else changed[0]
    for name in _ID_LISTS:
        if values.get(name):
            values[name] = [new.get(index, index) for index in values[name] if index in new or index < 0]
    for name in _ID_SEQUENCES:
        if values.get(name):
            values[name] = [found for sequence in values[name] if (found := _nested(sequence, new))] or None
    if values.get("sequence_bias"):
        bias = values["sequence_bias"]
        pairs = bias.items() if isinstance(bias, dict) else bias
        renumbered = [[_nested(list(sequence), new), value] for sequence, value in pairs]
        values["sequence_bias"] = [pair for pair in renumbered if pair[0]] or None
    if values.get("forced_decoder_ids"):
        values["forced_decoder_ids"] = [[at, new.get(index, index)] for at, index in values["forced_decoder_ids"]]


def _nested(sequence: list[Any], new: dict[int, int]) -> list[Any]:
    """Renumber a sequence of ids, or a list of alternatives; empty where a token of it is gone."""
    if sequence and isinstance(sequence[0], list):
        return [inner for inner in (_nested(part, new) for part in sequence) if inner]
    return [new[index] for index in sequence] if all(index in new for index in sequence) else []


def _token_ids(holder: Any) -> Iterator[tuple[dict[str, Any], str, list[int]]]:
    """Yield each `*_token_id`, a number or a list, of a config and the configs inside it: fields, name and ids."""
    fields = holder if isinstance(holder, dict) else vars(holder)
    for name, value in list(fields.items()):
        if isinstance(value, PretrainedConfig | dict):
            yield from _token_ids(value)
        elif _ID.search(str(name)) and not isinstance(value, bool):
            ids = list(value) if isinstance(value, list | tuple) else [value]
            if all(isinstance(index, int) for index in ids):
                yield fields, name, ids


def _moved(
    model_class: type[PreTrainedModel], config: PretrainedConfig, size: str, value: int, before: dict
) -> dict[AxisName, float]:
    """Return how much each dimension grows per token more."""
    errors: list[Exception] = []
    for step in _PROBE_STEPS:
        changed = copy.deepcopy(config)
        setattr(changed.get_text_config(), size, value + step)
        try:
            after = _shapes(build_meta(model_class, changed))
            return {axis: more / step for axis, more in growth(before, after).items()}
        except Exception as error:  # model code may refuse a size with any exception type
            errors.append(error)
    raise UnsupportedStructureError(
        f"`{size}` can't be changed in {model_class.__name__}: {type(errors[0]).__name__}: {errors[0]}"
    ) from errors[0]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters, tied ones once, and buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
