"""Budget: from a ratio or pinned sizes to the sizes of the smaller model.

The solver lists the sizes that the rounding rules allow, drops what the config class refuses, and among those that meet
the ratio takes the split between structures that is expected to lose the least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig
from transformers.utils import logging

from ..config import HessoConfig
from ..errors import BudgetError, HessoError, nearest_name
from ..hf_models.resize import buildable_config, resized_config
from ..hf_models.sizes import EXPERTS, LAYERS, ConfigSizes, canonical_name
from ..structures.groups import PruningGroups, StructureGroups
from .cost import Cost, Counts
from .rounding import CHANNELS, MULTIPLES, allowed_counts
from .target_sizes import TargetSizes

logger = logging.get_logger(__name__)

CLOSE_ENOUGH = 0.005  # of the model: splits this near to the ratio compete by expected loss
MEETS = 0.01  # of the model: a nearest size farther off is named in a warning
MOST_COMBINATIONS = 200_000
UNREACHABLE = 0.05  # of the model: a nearest size farther off is an error
_NAMED = 3  # of the nearest sizes, in messages
_NAMED_APART = {LAYERS: "layers", EXPERTS: "experts"}  # sizes of structures that 'all' doesn't stand for

PriceFunction = Callable[[Counts], np.ndarray]
LossFunction = Callable[[Counts], np.ndarray]


def solve_budget(
    config: HessoConfig,
    model_config: PretrainedConfig,
    groups: PruningGroups,
    parameters: Cost,
    price: PriceFunction | None = None,
    loss: LossFunction | None = None,
    least: Mapping[str, int] | None = None,
    warns: bool = True,
) -> TargetSizes:
    """Find the target sizes.

    Args:
        groups: the structures that may be pruned.
        parameters: the parameter count of kept units.
        price: the budget metric, where it isn't the parameter count.
        loss: expected loss of kept units; by default every structure is cut by a like share.
        least: units that stay of each structure at the least.
        warns: of a ratio that is met only nearly.

    Raises:
        BudgetError: where no allowed sizes come near the ratio, naming the nearest.
        HessoError: for pinned sizes that don't exist, aren't whole units, or that the config class refuses.
    """
    sizes = ConfigSizes.of(model_config)
    solver = _Solver(config, model_config, groups, parameters, price or parameters, sizes, least, warns)
    pinned = pinned_units(config, model_config, groups)
    if config.pruning_ratio is None:
        kept = {name: pinned.get(name, groups.structures[name].num_units) for name in groups.independent}
        return solver.target(groups.with_coupled(kept))
    if config.structure_shares is not None:
        loss = shares_loss(solver.price, config.structure_shares, groups)
    return solver.solve(config.pruning_ratio, pinned, loss or even_loss(parameters, groups))


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
            hint = nearest_name(name, list(by_size))
            if name in _NAMED_APART:
                hint = f": name {_NAMED_APART[name]!r} in `structures` too, which are pruned only then"
            raise HessoError(
                f"`target_sizes`: {name!r} is no size that can be pruned here{hint}; can be pinned: {sorted(by_size)}"
            )
        units, structure = _units_of(name, size, by_size[name]), by_size[name].structure
        ratio = groups.coupled.get(structure, 1)
        if units % ratio:
            raise HessoError(
                f"`target_sizes[{name!r}]` ({size}) must be a multiple of {size // units * ratio}: here "
                f"{list(groups.coupled)} only shrink together"
            )
        structure = groups.driver if structure in groups.coupled else structure
        if pinned.setdefault(structure, units // ratio) != units // ratio:
            raise HessoError(
                f"`target_sizes` ({config.target_sizes}) contradict each other for {structure}: "
                f"{pinned[structure]} and {units // ratio} units per layer"
            )
    return pinned


def _units_of(name: str, size: int, group: StructureGroups) -> int:
    increment, full = group.increments[name], group.increments[name] * group.num_units
    step = increment * group.pools
    least = max(step, group.least * increment)
    if size % step or not least <= size <= full:
        reason = f", for {group.needed_for}" if group.needed_for else ""
        kind = f"a multiple of {step}" if step > 1 else "an integer"
        raise HessoError(f"`target_sizes[{name!r}]` ({size}) must be {kind} between {least} and {full}{reason}")
    return size // increment


def even_loss(parameters: Cost, groups: PruningGroups) -> LossFunction:
    """Without measurements: structures share the cut evenly (squares, weighted by their parameters)."""
    weights = {
        name: parameters.full - float(parameters({name: structure.num_units // 2}))
        for name, structure in groups.structures.items()
    }

    def loss(kept: Counts) -> np.ndarray:
        left = {name: np.asarray(count) / groups.structures[name].num_units for name, count in kept.items()}
        return np.asarray(sum(weights[name] * (1 - share) ** 2 for name, share in left.items()))

    return loss


def shares_loss(price: PriceFunction, shares: dict[str, float], groups: PruningGroups) -> LossFunction:
    """Distance between each structure's share of the saving, taken alone, and the share asked for."""
    full = float(price({}))

    def loss(kept: Counts) -> np.ndarray:
        saved = {name: full - price({name: count}) for name, count in kept.items()}
        total = np.maximum(sum(saved.values()), 1e-9)
        return np.asarray(sum((own / total - shares.get(name, 0.0)) ** 2 for name, own in saved.items()))

    return loss


@dataclass
class _Solver:
    config: HessoConfig
    model_config: PretrainedConfig
    groups: PruningGroups
    parameters: Cost
    price: PriceFunction
    sizes: ConfigSizes
    least: Mapping[str, int] | None
    warns: bool

    @property
    def asked(self) -> str:
        """The argument that the ratio is from."""
        return "pruning_ratio" if self.least is None else "export_at"

    def target(self, kept: dict[str, int]) -> TargetSizes:
        """Check kept units against the config class and price them."""
        self._check(kept)
        for name, count in kept.items():
            group = self.groups.structures[name]
            assert 1 <= count <= group.num_units
            assert count % group.pools == 0
        return TargetSizes(
            kept_units=dict(kept),
            num_units={name: self.groups.structures[name].num_units for name in kept},
            sizes=self._sizes(kept),
            metric=self.config.budget_metric,
            cost_before=float(self.price({})),
            cost_after=float(self.price(kept)),
            parameters_before=round(self.parameters.full),
            parameters_after=round(float(self.parameters(kept))),
        )

    def _sizes(self, kept: dict[str, int]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, count in kept.items():
            sizes |= self.groups.structures[name].config_sizes(count)
        return sizes

    def solve(self, ratio: float, pinned: dict[str, int], loss: LossFunction) -> TargetSizes:
        """Take the expected best among the allowed sizes nearest to the ratio."""
        for most in MULTIPLES:
            grid = self._grid(ratio, pinned, most)
            removed = 1 - self.price(grid) / float(self.price({}))
            off = np.where(removed > 1e-9, np.abs(removed - ratio), np.inf)  # whoever asks for a cut gets one
            nearest = self._nearest(grid, off)
            least = off[nearest[0]] if nearest else np.inf
            if least <= CLOSE_ENOUGH:
                break
        self._check_least(ratio, removed[np.isfinite(off)])
        if not nearest:
            raise BudgetError(f"{type(self.model_config).__name__} refuses every smaller size of {list(grid)}")
        self._check_reach(ratio, least, [self._row(grid, index) for index in nearest])
        near = np.flatnonzero(off <= max(CLOSE_ENOUGH, least + 1e-12))
        losses = np.broadcast_to(loss(grid), off.shape)
        ranked = near[np.lexsort((off[near], losses[near]))]
        return self.target(self._row(grid, next(self._accepted(grid, ranked))))

    def _nearest(self, grid: dict[str, np.ndarray], off: np.ndarray) -> list[int]:
        """Return a few accepted indices whose sizes differ, the nearest first."""
        found: dict[tuple[int, ...], int] = {}
        nearest = np.argsort(off, kind="stable")[: np.isfinite(off).sum()]
        for index in self._accepted(grid, nearest):
            found.setdefault(tuple(self._row(grid, index).values()), index)
            if len(found) == _NAMED:
                break
        return list(found.values())

    def _check_least(self, ratio: float, removed: np.ndarray) -> None:
        """Refuse a ratio that is nearer to nothing than to the least that can go."""
        least = float(removed.min()) if len(removed) else 1.0
        if least >= 2 * ratio:
            raise BudgetError(
                f"`{self.asked}` ({ratio}) is too small: the least that can go here is {least:.2%}; take "
                f"{math.ceil(1000 * least) / 1000} or more, or a smaller `round_to`"
            )

    def _row(self, grid: dict[str, np.ndarray], index: int) -> dict[str, int]:
        return {name: int(counts[index]) for name, counts in grid.items()}

    def _accepted(self, grid: dict[str, np.ndarray], order: np.ndarray) -> Iterator[int]:
        """Yield those indices whose sizes the config class accepts (it never refuses for the MLP size alone)."""
        judged: dict[tuple[tuple[str, int], ...], bool] = {}
        for index in order:
            kept = self._row(grid, index)
            key = tuple(item for item in kept.items() if item[0] not in CHANNELS)
            if key not in judged:
                try:
                    self._check(kept)
                    judged[key] = True
                except HessoError:
                    judged[key] = False
            if judged[key]:
                yield int(index)

    def _check(self, kept: dict[str, int]) -> None:
        """Raise HessoError where the class, as far as it says so before a model runs, refuses sizes."""
        self._check_sizes(self._sizes(kept))
        if self.config.layer_widths == "per_layer":
            alike = {name: count for name, count in kept.items() if len(self.groups.structures[name].layers) == 1}
            try:
                self._check_sizes(self._sizes(alike))
            except HessoError as error:
                raise HessoError(
                    f"{error} With `layer_widths` ('per_layer') the config keeps the full size of what differs between "
                    "layers; choose other sizes, or 'uniform'"
                ) from error

    def _check_sizes(self, sizes: dict[str, int]) -> None:
        if self.groups.picky:
            assert self.groups.model_class is not None
            buildable_config(self.groups.model_class, self.model_config, sizes, self.sizes)
        else:
            resized_config(self.model_config, sizes, sizes=self.sizes)

    def _allowed(self, name: str, most: int) -> list[int]:
        counts = allowed_counts(self.config, self.groups.structures[name], most)
        return [count for count in counts if count >= (self.least or {}).get(name, 0)]

    def _grid(self, ratio: float, pinned: dict[str, int], most: int) -> dict[str, np.ndarray]:
        """List combinations; of the MLP channels, which no config class refuses, only the two nearest sizes."""
        names = list(self.groups.independent)
        options = {name: np.array([pinned[name]] if name in pinned else self._allowed(name, most)) for name in names}
        finest = next((name for name in CHANNELS if name in names and name not in pinned), None)
        coarse = [name for name in names if name != finest]
        _thin_out(options, coarse)
        combinations = np.meshgrid(*(options[name] for name in coarse), indexing="ij")
        grid = {name: column.ravel() for name, column in zip(coarse, combinations, strict=True)}
        if finest is not None:
            goal = (1 - ratio) * float(self.price({}))
            below = self._last_below(grid, finest, options[finest], goal)
            grid = {name: np.concatenate([column, column]) for name, column in grid.items()}
            picks = np.concatenate([below, below + 1])
            grid[finest] = options[finest][np.clip(picks, 0, len(options[finest]) - 1)]
        return self.groups.with_coupled(grid)

    def _last_below(self, counts: dict[str, np.ndarray], finest: str, options: np.ndarray, goal: float) -> np.ndarray:
        """Bisect, for each combination, for the last option of the finest structure that costs at most `goal`."""
        rows = len(next(iter(counts.values()))) if counts else 1
        low, high = np.full(rows, -1), np.full(rows, len(options) - 1)
        while (low < high).any():
            middle = (low + high + 1) // 2
            row = self.groups.with_coupled({**counts, finest: options[np.maximum(middle, 0)]})
            fits = self.price(row) <= goal
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
        return low

    def _check_reach(self, ratio: float, nearest: float, options: list[dict[str, int]]) -> None:
        """Say so where the ratio can't be met; refuse where it is out of reach."""
        if nearest <= MEETS:
            return
        within, full = UNREACHABLE if nearest > UNREACHABLE else MEETS, float(self.price({}))
        named = "; ".join(f"{1 - float(self.price(kept)) / full:.3f} with {self._sizes(kept)}" for kept in options)
        refused = list(self.groups.refused)
        whole = f", the {refused} of {self.groups.owner} can't go" if refused else ""
        message = (
            f"`{self.asked}` ({ratio}) of {self.config.budget_metric} can't be met within {within:.0%} by "
            f"{list(self.groups.structures)}{whole}; nearest feasible: {named}"
        )
        if nearest > UNREACHABLE:
            raise BudgetError(f"{message}. Choose one of these ratios, more structures or a smaller `round_to`")
        if self.warns:
            logger.warning(f"{message}. The nearest is taken.")


def _thin_out(options: dict[str, np.ndarray], names: list[str]) -> None:
    """Leave out every other option of the longest list until there aren't too many combinations."""
    while names and np.prod([float(len(options[name])) for name in names]) > MOST_COMBINATIONS:
        longest = max(names, key=lambda name: len(options[name]))
        options[longest] = options[longest][::-1][::2][::-1]  # the full size stays
