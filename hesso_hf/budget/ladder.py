"""Budgets on the way: the sizes of the models that are saved before pruning has come to its end."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from ..config import HessoConfig
from ..errors import BudgetError
from ..structures.groups import PruningGroups
from .cost import Cost
from .solver import LossFunction, PriceFunction, solve_budget
from .target_sizes import TargetSizes


def solve_ladder(
    config: HessoConfig,
    model_config: PretrainedConfig,
    groups: PruningGroups,
    parameters: Cost,
    price: PriceFunction | None = None,
    loss: LossFunction | None = None,
    warns: bool = True,
) -> list[TargetSizes]:
    """Find the target sizes, and those of the models that are saved on the way to it, the largest first.

    Args:
        price, loss, warns: as `solve_budget` takes them.

    Raises:
        BudgetError, HessoError: as `solve_budget` does, of any of them.
    """
    target = solve_budget(config, model_config, groups, parameters, price, loss, warns=warns)
    rungs: list[TargetSizes] = []
    for share in reversed(config.rungs):
        smaller = rungs[0] if rungs else target
        on_the_way = replace(config, pruning_ratio=share, target_sizes=None, export_at=None, ladder_recovery=0.0)
        kept = smaller.kept_units
        rungs.insert(0, solve_budget(on_the_way, model_config, groups, parameters, price, loss, kept, warns))
        if rungs[0].kept_units == kept:
            raise BudgetError(
                f"`export_at` ({share:g}): the sizes nearest to it are those of the next larger share; leave it out, "
                "or take a smaller `round_to`"
            )
    return [target, *rungs]


def rung_folder(share: float) -> str:
    """Return the name of the folder of a model that is saved on the way (`export_at`)."""
    return f"rung-{share:g}"
