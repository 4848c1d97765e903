"""Healing: what marked units contribute through the matrix that reads them is refitted into the columns that stay.

With X the activations that a matrix W reads, S the units that stay and R the marked ones, W_S takes on W_R B, where
B = argmin |X_R - X_S B^T|^2 + ridge |B|^2 says the marked units by the others. The matrices are taken in the order of
the forward pass, each on activations that its healed predecessors make: one forward pass of all examples finds all.
Where processes hold parts of the matrices, all run the same pass and put one matrix together at a time; the main one
alone looks, and each takes what belongs to its parts.
Shapes: N examples, T tokens, C columns of a matrix, O outputs; S and R index columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..distributed.collectives import broadcast_, from_main
from .fisher import OutputFisher
from .ranking import lowest_units
from .readers import Reader
from .reading import FEWEST_TOKENS, ModelReading
from .reconstruction import RIDGE, removal_costs
from .refit import StandIn, places_of, said_by_others, solved
from .saliency import PerUnit, float_sums, no_units, on_device
from .weights.bound_groups import BoundGroups

PER_COLUMN, HEALING_TOKENS = 16 / 3, 8192  # tokens for each column of the widest matrix, and at most


def enough_tokens(widest: int) -> int:
    """Return how many tokens of the training data units are judged and healed on where nothing is asked for.

    Args:
        widest: columns of the widest matrix.
    """
    return min(HEALING_TOKENS, max(FEWEST_TOKENS, math.ceil(PER_COLUMN * widest)))


class Healer(ModelReading):
    """Refits matrices on a few examples, and says what is lost with each unit though they are.

    Args:
        model, batch: as `ModelReading` takes them.

    Example:
        optimizer.process.heal_with(Healer(model, tokenizer(texts, return_tensors="pt", padding=True)))
    """

    @torch.no_grad()
    def corrections(
        self, bound: BoundGroups, marked: PerUnit, pruned: PerUnit, fisher: OutputFisher | None = None
    ) -> dict[str, list[torch.Tensor]]:
        """Return what is to be added to each reader's weight by the time its marked units are at zero.

        Args:
            fisher: what `fisher` has found; by default it is looked for.

        Returns:
            By the reader's name, what belongs to each piece of it that this process holds: all of it where that is one.
        """
        readers, fisher = self.readers(bound), fisher or self.fisher(bound)
        made: dict[str, torch.Tensor] = {}
        found: dict[str, list[torch.Tensor]] = {}
        self._name_unread(readers, marked)

        def refit(reader: Reader, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            going, away = (reader.columns(units).to(rows.device) for units in (marked, pruned))
            gone, stays = places_of(going), places_of(~going & ~away)
            said = said_by_others(self._counted(reader.name, rows, fisher), weight[:, gone], gone, stays)
            if said is not None:
                added = torch.zeros_like(weight)
                added[:, stays] = (weight[:, gone].to(said.dtype) @ said).to(weight.dtype)
                made[reader.name] = added if reader.dim == 1 else added.T.contiguous()
                _leave_out(bound, reader.name, made[reader.name], marked, pruned)
            return StandIn(said, gone, stays).healed(rows)

        def look(reader: Reader, rows: torch.Tensor) -> torch.Tensor | None:
            weight, held = reader.weight(bound), bound.held[reader.name]
            instead = self._looked(bound, reader, rows, lambda: refit(reader, weight, rows))
            if bound.sharded:
                made.setdefault(reader.name, weight.new_zeros(held.shape))
                broadcast_([made[reader.name]])
            if reader.name in made:
                found[reader.name] = held.pieces_of(made.pop(reader.name))
            return instead

        self._read(bound, [reader for reader in readers if bool(reader.columns(marked).any())], look)
        return found

    @torch.no_grad()
    def costs(
        self,
        bound: BoundGroups,
        pruned: PerUnit,
        going: Mapping[str, int] | None = None,
        fisher: OutputFisher | None = None,
    ) -> PerUnit:
        """Return what is lost with each unit though the others are refitted, (L, U), of structures that are healed.

        See `reconstruction.removal_costs`: a unit's cost is what it adds where cheaper ones of its layer went before.

        Args:
            going: how many units of each pool of a layer will have gone, by structure. Each layer is then judged on
                what it reads where the cheapest of the earlier layers are gone and healed.
            fisher: what `fisher` has found, by which errors count; by default it is looked for.
        """
        return self._judged(bound, pruned, going, fisher or self.fisher(bound))

    @torch.no_grad()
    def look_ahead(
        self, bound: BoundGroups, pruned: PerUnit, going: Mapping[str, int], fisher: OutputFisher
    ) -> tuple[PerUnit, PerUnit, OutputFisher]:
        """Judge all units, then again by how much the model minds errors once the cheapest of them are gone and healed.

        Weights are left alone: what others say of the cheapest is read in their place.

        Args:
            going, fisher: as `costs` takes them.

        Returns:
            Costs as the model is, costs with the cheapest units on trial, and what was found there for `corrections`.
        """
        trial: dict[str, StandIn] = {}
        costs = self._judged(bound, pruned, going, fisher, trial)
        found = self.fisher(bound, trial)
        del trial  # room for what follows
        ahead = OutputFisher(fisher.rows | found.rows, fisher.norms | found.norms)  # where nothing was found, as it is
        return costs, self._judged(bound, pruned, going, ahead), ahead

    def _judged(
        self,
        bound: BoundGroups,
        pruned: PerUnit,
        going: Mapping[str, int] | None,
        fisher: OutputFisher,
        trial: dict[str, StandIn] | None = None,
    ) -> PerUnit:
        """Return what `costs` does, and note in `trial` what stands in for the cheapest units of each reader."""
        shapes, pools = bound.shapes(), {name: group.pools for name, group in bound.groups.structures.items()}
        found = {name: torch.zeros(shape, dtype=float_sums(bound.device)) for name, shape in shapes.items()}
        seen: set[tuple[str, int]] = set()

        def add(reader: Reader, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
            gram = self._counted(reader.name, rows, fisher).gram()
            weight = fisher.of_errors(reader.name, weight.to(gram.dtype))
            leaving = no_units(shapes, rows.device)
            for structure, layer, axis in reader.axes:
                units = axis.layout.expand(torch.arange(shapes[structure][1], device=rows.device), -1)
                gone = pruned[structure][layer].to(rows.device)
                costs = removal_costs(gram, weight, units, gone)
                found[structure][layer] += costs.to(found[structure].device)
                seen.add((structure, layer))
                if going is not None:
                    cheapest = lowest_units(costs[None], gone[None], going[structure], False, pools[structure])[0]
                    leaving[structure][layer] = cheapest & ~gone
            columns = reader.columns(leaving)
            gone, stays = places_of(columns), places_of(~columns & ~reader.columns(pruned).to(rows.device))
            if not len(gone):
                return None
            stand_in = StandIn(solved(gram, RIDGE, gone, stays), gone, stays)
            if trial is not None:
                trial[reader.name] = stand_in.as_read(rows.dtype)
            return stand_in.healed(rows)

        def look(reader: Reader, rows: torch.Tensor) -> torch.Tensor | None:
            weight = reader.weight(bound)
            return self._looked(bound, reader, rows, lambda: add(reader, weight, rows), else_)

        else_ = "gradients judge units there" if trial is None else "no unit is on trial there"
        self._read(bound, self.readers(bound), look, else_)
        judged = {name: c for name, c in found.items() if all((name, layer) in seen for layer in range(len(c)))}
        return on_device(from_main(judged) if bound.sharded else judged, bound.device)

    def _name_unread(self, readers: list[Reader], marked: PerUnit) -> None:
        """Warn of structures whose units no linear layer reads; channels of the stream are never healed."""
        read = {structure for reader in readers for structure, _, _ in reader.axes} | {"embedding_channels"}
        for structure in sorted(name for name, units in marked.items() if bool(units.any()) and name not in read):
            of = f"{structure} of {type(self._model).__name__}"
            self._warn(f"healing: {of} aren't healed: no linear layer reads them")


def _leave_out(bound: BoundGroups, name: str, correction: torch.Tensor, marked: PerUnit, pruned: PerUnit) -> None:
    """Put what would be added to units that go themselves at zero, such as channels of the stream."""
    for structure, layer, axis in bound.axes[name]:
        if structure in marked:
            gone = marked[structure][layer] | pruned[structure][layer]
            correction.mul_(axis.spread((~gone).to(correction), correction.dim()))
