"""The case that a proof is tried on: a tiny config with all kinds of layers, and random units of it to keep."""

from __future__ import annotations

import itertools

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ...errors import HessoError, UnsupportedStructureError
from ...hf_models.build import build_meta
from ...hf_models.resize import buildable_config, copy_with, resized_config
from ...hf_models.sizes import LAYERS, ConfigSizes
from ...hf_models.tiny_configs import check_runs, config_for, short, tiny_config
from ...hf_models.tiny_model import SEED
from ..groups import KeptUnits, PruningGroups, StructureGroups
from ..shape_probe import describe_parameters

logger = logging.get_logger(__name__)


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
            check_runs(model_class, shallow)
            return shallow
    except Exception as error:  # model code may refuse the depth with any exception type
        logger.info(f"{model_class.__name__} is proved with all its layers, fewer don't build: {short(error)}")
    return whole


def _kinds(model_class: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, int]:
    """Return the kinds of layers with the index of the first of each; what is in no layer counts as of the first."""
    found: dict[str, int] = {}
    for info in describe_parameters(build_meta(model_class, config)).values():
        index = info.layer.rpartition(".")[2]
        found.setdefault(info.kind, int(index) if index.isdigit() else 0)
    return found


def units_to_keep(
    groups: PruningGroups,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    known: ConfigSizes | None = None,
) -> tuple[KeptUnits, PretrainedConfig]:
    """Choose random units of a tiny model to keep, about three of four, so many that its class accepts them.

    Args:
        known: the sizes of `config`, where they are known.
    """
    free = {name: groups.structures[name] for name in groups.independent}
    options = [[count * group.pools for count in _tiny_counts(group.pool_size)] for group in free.values()]
    error: HessoError | None = None
    for choice in itertools.product(*options):
        counts = groups.with_coupled(dict(zip(free, choice, strict=True)))
        sizes: dict[str, int] = {}
        for name, count in counts.items():
            sizes |= groups.structures[name].config_sizes(count)
        try:
            small = buildable_config(model_class, config, sizes, known)
        except HessoError as refusal:
            error = refusal
            continue
        generator = torch.Generator().manual_seed(SEED + 1)
        kept = {}
        for name, count in counts.items():
            structure = groups.structures[name]
            kept[name] = tuple(_random_units(structure, count, generator) for _ in structure.layers)
        return KeptUnits({name: g.num_units for name, g in groups.structures.items()}, kept), small
    raise error or UnsupportedStructureError("there is only one unit per layer")


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
