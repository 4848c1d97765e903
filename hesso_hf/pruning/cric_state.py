"""CRIC: look along the way to zero before deciding (Corrective Redundant Identification Cycle, arXiv 2409.09085).

The lowest units are driven to zero for a trial, all units are scored at S points on the way, and the weights return to
where they were. Units that newly look redundant on the way take the next trial. What is kept is O(units): running sums.
Legend: L layers, U units per layer, S samples in a cycle, C criteria.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .saliency import PerUnit, float_sums, no_units, on_device

PATH_PARTS = 4  # a unit's scores along its own path are kept as means of so many parts
SHOWN_PATHS = 32  # units a structure whose path the report gives
PROBE_SAMPLES, PROBE_CYCLES = 3, 4  # what `cric_mode="probe"` takes where nothing is said
PROBE_BATCHES, PROBE_BATCH_SIZE = 2, 8  # examples that the trainer probes on


class Cric:
    """The violating sets V_c, the history H of units that were in one, and the running sums of their scores.

    Args:
        shapes: (L, U) per structure.
        removed: units to be removed, over all layers, per structure.
        criteria: C, values of each unit at each sample.
        samples: S, points on the way to zero in one cycle.
        max_cycles: when to stop at the latest.
        tolerance: stop when no structure has more newcomers: a count, or below 1 a share of `removed`.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        removed: Mapping[str, int],
        criteria: int,
        samples: int,
        max_cycles: int,
        tolerance: float,
        device: torch.device,
    ) -> None:
        self.samples, self.max_cycles = samples, max_cycles
        self._allowed = {n: tolerance if tolerance >= 1 else tolerance * count for n, count in removed.items()}
        self.first, self.violating, self.shrinking = (no_units(shapes, device) for _ in range(3))
        self.entering, self.decided = (no_units(shapes, device) for _ in range(2))
        self.seen = no_units(shapes, device)  # H, the units whose cycle is over
        zeros = partial(torch.zeros, dtype=float_sums(device), device=device)
        parts = min(PATH_PARTS, samples)
        self._own: PerUnit = {name: zeros((criteria, parts, *shape)) for name, shape in shapes.items()}
        self._all: PerUnit = {name: zeros((criteria, *shape)) for name, shape in shapes.items()}
        self.sizes: list[dict[str, int]] = []  # of the violating set, per cycle
        self.num_samples = 0  # over all cycles
        self.ended = False

    @property
    def cycles(self) -> int:
        """Number of cycles begun."""
        return len(self.sizes)

    def begin_cycle(self, violating: Mapping[str, torch.Tensor], shrinking: Mapping[str, torch.Tensor]) -> None:
        """Start on a violating set V_c; newcomers that aren't in it wait for a later one.

        Args:
            shrinking: V_c and what else goes the way to zero with it, so that as many units go as are to be removed.
        """
        for name, units in violating.items():
            self.violating[name].copy_(units)
            self.shrinking[name].copy_(shrinking[name])
            self.entering[name] &= ~units
            if not self.sizes:
                self.first[name].copy_(units)
        self.sizes.append({name: int(units.sum()) for name, units in self.violating.items()})

    def record(self, t: int, values: Mapping[str, torch.Tensor], lowest: Mapping[str, torch.Tensor]) -> None:
        """Add the values at sample t of this cycle; units among the lowest that were never violating are newcomers.

        Args:
            values: the criteria's values, shape (C, L, U) per structure.
            lowest: the units that would be removed by these values, bool (L, U).
        """
        for name, value in values.items():
            self._own[name][:, self._part(t)] += value.masked_fill(~self.violating[name], 0.0)
            self._all[name] += value
            self.entering[name] |= lowest[name] & ~self.violating[name] & ~self.seen[name]
        self.num_samples += 1

    def _part(self, t: int) -> int:
        return t * min(PATH_PARTS, self.samples) // self.samples

    def end_cycle(self) -> bool:
        """Move V_c to the history and tell whether the search is over: few newcomers, or the most cycles made."""
        for name, units in self.violating.items():
            self.seen[name] |= units
        few = all(int(units.sum()) <= self._allowed[name] for name, units in self.entering.items())
        self.ended = few or self.cycles >= self.max_cycles
        return self.ended

    def means(self) -> PerUnit:
        """Return each criterion's mean (C, L, U): of units that were violating over their own cycle, else over all."""
        found = {}
        for name, own in self._own.items():
            everywhere = self._all[name] / max(1, self.num_samples)
            found[name] = torch.where(self.seen[name], own.sum(1) / self.samples, everywhere)
        return found

    def decide(self, lowest: Mapping[str, torch.Tensor]) -> None:
        """Take the final decision, bool (L, U), for the report."""
        for name, units in lowest.items():
            self.decided[name].copy_(units)

    def to_(self, device: torch.device) -> None:
        """Move all sets and sums to another device."""
        for key in _TENSORS:
            setattr(self, key, on_device(getattr(self, key), device))

    # -- report and state -----------------------------------------------------------------------------------------

    def report(self, layers: Mapping[str, tuple[str, ...]], criteria: tuple[str, ...]) -> dict[str, Any]:
        """Return what CRIC did as plain JSON types: cycles, samples, violating sets, corrected units, paths.

        Args:
            layers: names of each structure's layers.
            criteria: names of the C criteria.
        """
        structures = {}
        for name in self.first:
            violating = [sizes[name] for sizes in self.sizes]
            paths = self._paths(name, layers[name], criteria)
            structures[name] = corrected_units(self.first[name], self.decided[name], violating, paths)
        return {
            "cycles": self.cycles,
            "max_cycles": self.max_cycles,
            "samples_per_cycle": self.samples,
            "samples": self.num_samples,
            "ended": self.ended,
            "structures": structures,
        }

    def _paths(self, name: str, layers: tuple[str, ...], criteria: tuple[str, ...]) -> list[dict[str, Any]]:
        """Return the criteria's values along the path of some corrected and replacing units."""
        parts = self._own[name].shape[1]
        counts = [sum(1 for t in range(self.samples) if self._part(t) == part) for part in range(parts)]
        means = self._own[name] / torch.tensor(counts, device=self._own[name].device).view(1, -1, 1, 1)
        found = []
        first, decided = self.first[name], self.decided[name]
        for role, units in (("corrected", first & ~decided), ("replacing", decided & ~first)):
            for layer, unit in (units & self.seen[name]).nonzero().tolist()[: SHOWN_PATHS // 2]:
                values = means[:, :, layer, unit].tolist()
                found.append(
                    {"role": role, "layer": layers[layer], "unit": unit}
                    | {"values": dict(zip(criteria, values, strict=True))}
                )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides the future: tensors and plain containers only."""
        return {key: dict(getattr(self, key)) for key in _TENSORS} | {
            "sizes": [dict(sizes) for sizes in self.sizes],
            "num_samples": self.num_samples,
            "max_cycles": self.max_cycles,
            "ended": self.ended,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state of the same shapes."""
        for key in _TENSORS:
            for name, value in getattr(self, key).items():
                value.copy_(state[key][name])
        self.sizes = [dict(sizes) for sizes in state["sizes"]]
        self.num_samples, self.max_cycles = int(state["num_samples"]), int(state["max_cycles"])
        self.ended = bool(state["ended"])


_TENSORS = ("first", "violating", "shrinking", "entering", "seen", "decided", "_own", "_all")


def corrected_units(
    first: torch.Tensor, decided: torch.Tensor, violating: list[int], paths: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what is reported of a structure: the units first thought redundant, and those that weren't after all.

    Args:
        first, decided: bool (L, U), before and after CRIC.
        violating: how many units were on trial for the first time, in turn.
    """
    corrected, replacing = first & ~decided, decided & ~first
    return {
        "first": int(first.sum()),
        "violating": violating,
        "num_corrected": int(corrected.sum()),
        "corrected": listed(corrected),
        "replaced_by": listed(replacing),
        "paths": paths,
    }


def listed(units: torch.Tensor) -> dict[str, list[int]]:
    """Return the marked units as {layer index: [unit, ...]}, layers without any left out."""
    found: dict[str, list[int]] = {}
    for layer, unit in units.nonzero().tolist():
        found.setdefault(str(layer), []).append(unit)
    return found
