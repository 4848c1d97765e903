"""Tiny configs of any class: what the proof is tried on.

A small config of the same class is found by trying: the sizes that differ most from each other come first, and the
first that builds and runs is taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import HessoError, UnsupportedStructureError
from .build import build_meta, causal_class_of
from .shrink import TINY_MLP, TINY_VOCAB, Geometry, has_frequency_lists, shrink_values
from .sizes import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    MLP,
    VOCAB,
    ConfigSizes,
    get_size,
    head_dim_of,
    raw_value,
    set_sizes,
    text_config_of,
)
from .tiny_model import SHAPE, logits_of, random_model, token_ids

_MOST_PARAMETERS = 8_000_000


@cache
def _architectures() -> dict[str, dict[str, Any]]:
    text = (Path(__file__).parent / "architectures.json").read_text(encoding="utf-8")
    return json.loads(text)


def default_config(model_type: str) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return the causal language model of a model type and a config for it: its defaults, made consistent.

    Raises:
        HessoError: where Transformers has no causal language model of that type.
    """
    known = model_type in CONFIG_MAPPING
    config_class = CONFIG_MAPPING[model_type] if known else PretrainedConfig  # which has no model
    model_class = causal_class_of(config_class, model_type)
    return model_class, config_for(model_class, config_class(**_architectures().get(model_type, {}).get("set", {})))


def config_for(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """Return the config, or the part of a multimodal one, that a model class takes."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return next((part for part in parts if isinstance(part, wanted)), config)


def tiny_config(
    model_class: type[PreTrainedModel], config: PretrainedConfig, all_layers: bool = False
) -> PretrainedConfig:
    """Return a small config of the same class: sizes that differ, large epsilons, one layer of each kind or all layers.

    Raises:
        UnsupportedStructureError: where no candidate builds and runs; with each different reason.
    """
    config = config_for(model_class, config)
    if get_size(config, VOCAB) is None:
        raise UnsupportedStructureError(
            f"{model_class.__name__} reads no tokens ({type(config).__name__} has no `{VOCAB}`), and what is cut is "
            "verified by the logits of tokens: take a language model"
        )
    if refused := _architectures().get(config.model_type, {}).get("refused"):
        raise UnsupportedStructureError(f"no tiny {model_class.__name__} could be built: {refused}")
    reasons: dict[str, None] = {}
    for geometry in _geometries(model_class, config):
        try:
            candidate = _candidate(config, replace(geometry, all_layers=all_layers))
            check_runs(model_class, candidate)
            return candidate
        except Exception as error:  # model code may refuse sizes with any exception type
            reasons[f"{type(error).__name__}: {short(error)}"] = None
    raise UnsupportedStructureError(f"no tiny {model_class.__name__} could be built: {'; '.join(list(reasons)[:4])}")


def _geometries(model_class: type[PreTrainedModel], config: PretrainedConfig) -> Iterator[Geometry]:
    """Yield sizes to try: all different, then heads that make up the width, then the config's own sizes of a head."""
    own = head_dim_of(config)
    heads, kv_heads = get_size(config, HEADS), get_size(config, KV_HEADS)
    counts = list(_head_counts(heads, kv_heads))
    free = [Geometry(h, k, 8, _width(h, k, 8)) for h, k in counts]
    coupled = [Geometry(h, k, dim, h * dim) for dim in (12, 16) for h, k in counts if dim != h]
    implied = [Geometry(h, k, None, h * dim) for dim in (12, 16) for h, k in counts]
    if own is not None:
        free += [Geometry(h, k, own, _width(h, k, own), own_heads=True) for h, k in counts]
        coupled += [Geometry(h, k, own, h * own, own_heads=True) for h, k in counts]
        implied += [Geometry(h, k, None, h * own, own_heads=True) for h, k in counts]
    if get_size(config, HEAD_DIM) is None and not _honours_head_dim(model_class, config):
        found = [*implied, *free, *coupled]
    else:
        found = [*free, *coupled, *implied]
    if has_frequency_lists(config):  # one factor for each rotary frequency: head_dim and its quotient stay
        found = [geometry for geometry in coupled if geometry.own_heads] + found
    return iter([found[0], replace(found[0], layers_of_a_kind=2), *found[1:]])  # layers may share with the last alike


def _head_counts(heads: int | None, kv_heads: int | None) -> Iterator[tuple[int, int]]:
    """Yield (heads, key-value heads) with the config's own number of query heads for each key-value head."""
    if not heads or not kv_heads or heads == kv_heads:
        yield from ((5, 5), (8, 8), (4, 4), (6, 6))  # where heads work in pairs or fours, eight tell more than four
    elif kv_heads == 1:
        yield from ((5, 1), (4, 1))
    else:
        ratio = max(1, heads // kv_heads)
        yield from ((3 * ratio, 3), (4 * ratio, 4), (2 * ratio, 2))


def _width(heads: int, kv_heads: int, head_dim: int) -> int:
    """Return a width that isn't heads * head_dim, and that the heads divide, also when there is one unit less."""
    fewer = heads // kv_heads * (kv_heads - 1) or heads - 1
    step = math.lcm(heads, fewer, 4)
    width = step * math.ceil(60 / step)
    return width + step if width in (heads * head_dim, TINY_MLP, TINY_VOCAB) else width


def _honours_head_dim(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Tell whether an explicit head_dim changes the model's shapes, in a class that has no such field."""
    if isinstance(getattr(type(text_config_of(config)), HEAD_DIM, None), property):
        return False
    try:
        found = []
        for head_dim in (8, 16):
            candidate = _candidate(config, Geometry(4, 4, head_dim, 48))
            found.append([parameter.shape for parameter in build_meta(model_class, candidate).parameters()])
        return found[0] != found[1]
    except Exception:  # model code may refuse sizes with any exception type: the candidates will tell
        return True


def _candidate(config: PretrainedConfig, geometry: Geometry) -> PretrainedConfig:
    values = shrink_values(config, geometry)
    if geometry.head_dim is not None:
        text = text_config_of(config)
        where = values
        if text is not config:
            where = next(values[name] for name in config.sub_configs if getattr(config, name, None) is text)
        if not isinstance(getattr(type(text), HEAD_DIM, None), property) and HEAD_DIM not in type(text).attribute_map:
            where[HEAD_DIM] = where.get(HEAD_DIM) or geometry.head_dim
    _merge(values, _architectures().get(config.model_type, {}).get("tiny", {}))
    found = type(config).from_dict(values)
    if not isinstance(raw_value(config, MLP), int) and ConfigSizes.of(found).get(MLP):
        set_sizes(found, {MLP: TINY_MLP})  # what the model code would derive from the width
    return found


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(name), dict):
            _merge(values[name], change)
        else:
            values[name] = change


def check_runs(model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
    """Build the model and run it.

    Raises:
        HessoError: where it is too big, or what comes out isn't finite or not of as many examples.
    """
    size = sum(parameter.numel() for parameter in build_meta(model_class, config).parameters())
    if size > _MOST_PARAMETERS:
        raise HessoError(f"it would have {size} parameters")
    logits = logits_of(random_model(model_class, config), token_ids(config))
    if logits.shape[0] != SHAPE[0] or not logits.isfinite().all():
        raise HessoError(f"its logits of shape {tuple(logits.shape)} aren't of {SHAPE[0]} examples or not finite")


def short(error: Exception) -> str:
    """Return the beginning of an error's message in one line."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:200]
