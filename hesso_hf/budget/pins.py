"""Pinned sizes: what `target_sizes` asks for, in units."""

from __future__ import annotations

from transformers import PretrainedConfig

from ..config import HessoConfig
from ..errors import HessoError, nearest_name
from ..hf_models.sizes import canonical_name
from ..structures.groups import PruningGroups, StructureGroups


def pinned_units(config: HessoConfig, model_config: PretrainedConfig, groups: PruningGroups) -> dict[str, int]:
    """Translate `target_sizes` to units.

    Raises:
        HessoError: for sizes that don't exist, aren't whole units or contradict each other.
    """
    pinned: dict[str, int] = {}
    by_size = {size: group for group in groups.structures.values() for size in group.increments}
    for asked, size in config.pinned_sizes.items():
        name = asked if asked in by_size else canonical_name(model_config, asked)
        if name not in by_size:
            raise HessoError(
                f"`target_sizes`: {name!r} is no size that can be pruned here"
                f"{nearest_name(name, list(by_size))}; can be pinned: {sorted(by_size)}"
            )
        units = _units_of(name, size, by_size[name])
        structure = by_size[name].structure
        if structure in groups.coupled:
            units, structure = _driving_units(groups, name, size, units, structure), groups.driver
        if pinned.setdefault(structure, units) != units:
            raise HessoError(
                f"`target_sizes` ({config.target_sizes}) contradict each other for {structure}: "
                f"{pinned[structure]} and {units} units a layer"
            )
    return pinned


def _driving_units(groups: PruningGroups, name: str, size: int, units: int, structure: str) -> int:
    ratio = groups.coupled[structure]
    if units % ratio:
        raise HessoError(
            f"`target_sizes[{name!r}]` ({size}) must be a multiple of {size // units * ratio}: here "
            f"{list(groups.coupled)} only shrink together"
        )
    return units // ratio


def _units_of(name: str, size: int, group: StructureGroups) -> int:
    increment, full = group.increments[name], group.increments[name] * group.num_units
    step = increment * group.pools
    least = max(step, group.least * increment)
    if size % step or not least <= size <= full:
        reason = f", for {group.needed_for}" if group.needed_for else ""
        raise HessoError(
            f"`target_sizes[{name!r}]` ({size}) must be a multiple of {step} between {least} and {full}{reason}"
        )
    return size // increment
