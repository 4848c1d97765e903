"""Whole models within a model, such as a vision tower, in which nothing is pruned."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from .groups import PruningGroups


@dataclass(frozen=True)
class Untouched:
    """A model within a model that stays whole; `share` is of all parameters."""

    name: str
    model_class: str
    share: float

    def __str__(self) -> str:
        whose = f"{self.name} ({self.model_class}, {self.share:.0%} of the parameters)"
        return f"{whose} stays whole: nothing in it is pruned"


def untouched_models(model: PreTrainedModel, groups: PruningGroups) -> list[Untouched]:
    """Return the outermost models within a model that have nothing to be pruned, although others have."""
    pruned = {axis.parameter for structure in groups.structures.values() for _, axis in structure.all_axes()}
    found: list[Untouched] = []
    for name, module in model.named_modules() if pruned else ():
        if not name or not isinstance(module, PreTrainedModel):
            continue
        if any(name.startswith(f"{outer.name}.") for outer in found):
            continue
        if not any(f"{name}.{parameter}" in pruned for parameter, _ in module.named_parameters()):
            share = module.num_parameters() / model.num_parameters()
            found.append(Untouched(name, type(module).__name__, share))
    return found
