"""Tiny random models of any class: what the proof is tried on.

A small config of the same class is found by trying: the sizes that differ most from each other come first, and the
first that builds and runs is taken.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested

from .errors import HessoError, UnsupportedStructureError
from .groups import KeptUnits, PruningGroups, StructureGroups
from .probe import describe_parameters
from .shrink import TINY_MLP, TINY_VOCAB, Geometry, getattr_or_none, has_frequency_lists, shrink_values
from .sizes import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MLP,
    VOCAB,
    build_meta,
    buildable_config,
    copy_with,
    get_size,
    head_dim_of,
    resized_config,
    set_sizes,
    text_config_of,
)

logger = logging.get_logger(__name__)

SEED = 20240915
_SHAPE = (2, 12)
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
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in AutoModelForCausalLM._model_mapping:
        raise HessoError(f"model_type {model_type!r} has no causal language model in the installed transformers")
    config_class = CONFIG_MAPPING[model_type]
    found: Any = AutoModelForCausalLM._model_mapping[config_class]
    model_class = found[0] if isinstance(found, list | tuple) else found
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
    """Return a config of the same class with small sizes that differ, large epsilons and one layer of each kind.

    Args:
        all_layers: whether to keep every layer instead of one of each kind.

    Raises:
        UnsupportedStructureError: where no candidate builds and runs; with each different reason.
    """
    config = config_for(model_class, config)
    if refused := _architectures().get(config.model_type, {}).get("refused"):
        raise UnsupportedStructureError(f"no tiny {model_class.__name__} could be built: {refused}")
    reasons: dict[str, None] = {}
    for geometry in _geometries(model_class, config):
        try:
            candidate = _candidate(config, replace(geometry, all_layers=all_layers))
            _check(model_class, candidate)
            return candidate
        except Exception as error:  # model code may refuse sizes with any exception type
            reasons[f"{type(error).__name__}: {_short(error)}"] = None
    raise UnsupportedStructureError(f"no tiny {model_class.__name__} could be built: {'; '.join(list(reasons)[:4])}")


def covering_config(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """Return a tiny config whose layers are of all kinds that the model has.

    Where the config can't say one of each (rules on a layer's index), it has as many of the first as have all kinds.
    """
    small = tiny_config(model_class, config)
    explicit = copy_with(config_for(model_class, config), {})  # a default config may leave head_dim out
    if _kinds(model_class, small).keys() >= _kinds(model_class, explicit).keys():
        return small
    whole = tiny_config(model_class, config, all_layers=True)
    try:
        kinds = _kinds(model_class, whole)
        shallow = resized_config(whole, {LAYERS: 1 + max(kinds.values())})
        if _kinds(model_class, shallow) == kinds:
            _check(model_class, shallow)
            return shallow
    except Exception as error:  # model code may refuse the depth with any exception type
        logger.info(f"{model_class.__name__} is proved with all its layers, fewer don't build: {_short(error)}")
    return whole


def _kinds(model_class: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, int]:
    """Return the kinds of layers with the index of the first of each; what is in no layer counts as of the first."""
    found: dict[str, int] = {}
    for info in describe_parameters(build_meta(model_class, config)).values():
        index = info.layer.rpartition(".")[2]
        found.setdefault(info.kind, int(index) if index.isdigit() else 0)
    return found


def random_model(model_class: type[PreTrainedModel], config: PretrainedConfig, seed: int = SEED) -> PreTrainedModel:
    """Build a model with random weights, biases and norm weights, in fp32 on the CPU; zeros would hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the fp32 logits of a forward pass without a cache, in the weights' own dtype."""
    return forward_logits(model, input_ids)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def forward_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the fp32 logits of a forward pass without a cache, with a gradient where one is wanted.

    Models without an output matrix give their last hidden states; an encoder-decoder reads the ids on both sides. The
    class' forward is called, since mixed-precision training wraps the instance's in autocast.
    """
    pad = getattr_or_none(model.config.get_text_config(), "pad_token_id")
    if pad is None and len(input_ids) > 1 and type(model).__name__.endswith("ForSequenceClassification"):
        return torch.cat([forward_logits(model, row) for row in input_ids.split(1)])  # it can't tell where rows end
    accepted = inspect.signature(type(model).forward).parameters
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        inputs["use_cache"] = False
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = input_ids
    with attention_in_fp32(model):
        # FSDP2 gathers in hooks on the call; Accelerate replaces `forward` on the instance, with autocast around it
        output = model(**inputs) if isinstance(model, FSDPModule) else type(model).forward(model, **inputs)
    found = output.get("logits")
    return (found if found is not None else output["last_hidden_state"]).float()


@contextlib.contextmanager
def attention_in_fp32(model: nn.Module) -> Iterator[None]:
    """For a while, let a model of fp32 weights compute attention in fp32 where its flash attention can't."""
    configs: dict[int, PretrainedConfig] = {}  # a model in it comes after those that it is in
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and is_flash_attention_requested(config):
            configs[id(config)] = config
    before = {key: config._attn_implementation for key, config in configs.items()}
    whole = next(model.parameters()).dtype == torch.float32
    with_sdpa = all(m._supports_sdpa for m in model.modules() if isinstance(m, PreTrainedModel))
    try:
        for config in configs.values() if whole else ():
            config._attn_implementation = "sdpa" if with_sdpa else "eager"
        yield
    finally:
        for key, name in before.items():
            configs[key]._attn_implementation = name


def token_ids(config: PretrainedConfig, seed: int = SEED, rows: int = _SHAPE[0]) -> torch.Tensor:
    """Return random token ids, shape (rows, 12), none of them a special one."""
    vocab = get_size(config, VOCAB)
    assert vocab is not None
    return torch.randint(3, vocab, (rows, _SHAPE[1]), generator=torch.Generator().manual_seed(seed))


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
        if not isinstance(getattr(type(text), HEAD_DIM, None), property) and not _names_head_dim(text):
            where[HEAD_DIM] = where.get(HEAD_DIM) or geometry.head_dim
    _merge(values, _architectures().get(config.model_type, {}).get("tiny", {}))
    found = type(config).from_dict(values)
    if not isinstance(getattr_or_none(config, MLP), int) and get_size(found, MLP):
        set_sizes(found, {MLP: TINY_MLP})  # what the model code would derive from the width
    return found


def _names_head_dim(config: PretrainedConfig) -> bool:
    return HEAD_DIM in type(config).attribute_map


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(name), dict):
            _merge(values[name], change)
        else:
            values[name] = change


def _check(model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
    """Build the model and run it.

    Raises:
        HessoError: where it is too big, or what comes out isn't finite or not of as many examples.
    """
    size = sum(parameter.numel() for parameter in build_meta(model_class, config).parameters())
    if size > _MOST_PARAMETERS:
        raise HessoError(f"it would have {size} parameters")
    logits = logits_of(random_model(model_class, config), token_ids(config))
    if logits.shape[0] != _SHAPE[0] or not logits.isfinite().all():
        raise HessoError(f"its logits of shape {tuple(logits.shape)} aren't of {_SHAPE[0]} examples or not finite")


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:200]


def units_to_keep(
    groups: PruningGroups, model_class: type[PreTrainedModel], config: PretrainedConfig
) -> tuple[KeptUnits, PretrainedConfig]:
    """Choose random units of a tiny model to keep, about three of four, so many that its class accepts them."""
    free = {name: groups.structures[name] for name in groups.independent}
    options = [[count * group.pools for count in _tiny_counts(group.pool_size)] for group in free.values()]
    error: HessoError | None = None
    for choice in itertools.product(*options):
        counts = groups.with_coupled(dict(zip(free, choice, strict=True)))
        sizes: dict[str, int] = {}
        for name, count in counts.items():
            sizes |= groups.structures[name].config_sizes(count)
        try:
            small = buildable_config(model_class, config, sizes)
        except HessoError as refusal:
            error = refusal
            continue
        generator = torch.Generator().manual_seed(SEED + 1)
        kept = {}
        for name, count in counts.items():
            structure = groups.structures[name]
            kept[name] = tuple(_random_units(structure, count, generator) for _ in structure.layers)
        return KeptUnits({name: g.num_units for name, g in groups.structures.items()}, kept), small
    raise error or UnsupportedStructureError("there is only one unit a layer")


def _random_units(structure: StructureGroups, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Choose `count` units of a layer, equally many of each pool.

    Never just the first ones: what depends on a unit's position (ALiBi's slopes) must not look the same after the cut.
    """
    units: list[int] = []
    for pool in range(structure.pools):
        size, wanted = structure.pool_size, count // structure.pools
        chosen = torch.randperm(size, generator=generator)[:wanted].tolist()
        if wanted < size and sorted(chosen) == list(range(wanted)):
            chosen[chosen.index(0)] = size - 1
        units += [pool * size + unit for unit in chosen]
    return tuple(sorted(units))


def _tiny_counts(units: int) -> list[int]:
    """List numbers of units to keep, multiples of four first: grouped expert kernels need rows of 16 bytes."""
    counts = [count for count in range(units - 1, 0, -1) if 0.5 <= count / units < 0.9]
    return sorted(counts, key=lambda count: count % 4 != 0)
