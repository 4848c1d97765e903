"""Proof: which layout, which norm and which power of c are right, found on a tiny random model of the same class.

Random units of the tiny model are zeroed, the same units are cut out, and the logits compared: only the right layouts
and powers agree. Layouts are discovered, powers of c guessed, and the comparison decides. A structure for which none
agrees is refused with the reason.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .config import DEFAULT_STRUCTURES
from .cut import load_cut
from .discovery import GradientProbe, discover_branches, layout_of
from .errors import HessoError, NotApplicableError, UnsupportedStructureError
from .groups import (
    AxisName,
    Branch,
    KeptUnits,
    PruningGroups,
    Scheme,
    StructureGroups,
    build_groups,
    centre_,
    mask_,
    moving_axes,
)
from .layout import Layout, Segment
from .norms import has_bare_layernorm, norms_after_writers
from .probe import AxisMap, coupled_axes, probe_axes
from .sizes import HEADS, HIDDEN, head_dim_of, num_units, resized_config
from .streams import StreamAxis, inner_powers, stream_axes, stream_powers, writing_modules, written_patterns
from .tiny import forward_logits, logits_of, random_model, tiny_config, token_ids

TOLERANCE = 1e-5
COUPLED = ("attention_heads", "embedding_channels")
_SEED = 20240915


@dataclass(frozen=True)
class StructureProof:
    """The outcome for one structure: a scheme with its relative error, or a reason.

    Attributes:
        applicable: False where the architecture has no such structure, so that there is nothing to refuse.
    """

    structure: str
    scheme: Scheme | None
    relative_error: float | None
    reason: str = ""
    applicable: bool = True


@dataclass(frozen=True)
class Proof:
    """The outcome for all structures of one architecture.

    Attributes:
        joint_error: the relative error with all proved ones cut at once.
        coupled: whether heads and width only shrink together.
    """

    structures: dict[str, StructureProof]
    joint_error: float | None = None
    coupled: bool = False


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def prove(
    model_class: type[PreTrainedModel], config: PretrainedConfig, names: tuple[str, ...] = DEFAULT_STRUCTURES
) -> Proof:
    """Prove the named structures, which must not exclude each other, for an architecture."""
    try:
        bench = _Bench(model_class, tiny_config(model_class, config))
    except Exception as error:  # model code may refuse the tiny sizes with any exception type
        reason = f"no tiny {model_class.__name__} could be built: {type(error).__name__}: {error}"
        return Proof({name: StructureProof(name, None, None, reason) for name in names})
    proofs = bench.prove(names)
    schemes = {name: proof.scheme for name, proof in proofs.items() if proof.scheme is not None}
    return Proof(proofs, bench.error_of(schemes) if schemes else None, bench.axis_map.coupling is not None)


def proved_groups(
    model_class: type[PreTrainedModel], config: PretrainedConfig, names: tuple[str, ...] = DEFAULT_STRUCTURES
) -> tuple[PruningGroups, Proof, AxisMap]:
    """Probe a model's config, prove the named structures and return the groups of those that hold."""
    proof = prove(model_class, config, names)
    axis_map = probe_axes(model_class, config, couple=False)
    if proof.coupled:
        axis_map = coupled_axes(model_class, config, axis_map)
    structures: dict[str, StructureGroups] = {}
    refused: dict[str, str] = {}
    schemes: dict[str, Scheme] = {}
    absent = {name: found.reason for name, found in proof.structures.items() if not found.applicable}
    for name, found in proof.structures.items():
        if found.scheme is None:
            refused |= {name: found.reason} if found.applicable else {}
            continue
        try:
            structures[name] = build_groups(name, axis_map, config, found.scheme)
            schemes[name] = found.scheme
        except UnsupportedStructureError as error:
            refused[name] = str(error)
        if name in structures and structures[name].num_units < 2:
            refused[name] = "there is only one unit a layer"
            del structures[name]
    coupled = coupled_units(structures, axis_map, schemes)
    for name in () if coupled else _needing_others(axis_map, schemes):
        refused[name] = f"head_dim follows hidden_size / {HEADS}, and the structures it shrinks with aren't all proved"
        structures.pop(name, None)
    return PruningGroups(structures, refused, coupled, absent), proof, axis_map


def coupled_units(
    structures: dict[str, StructureGroups], axis_map: AxisMap, schemes: dict[str, Scheme]
) -> dict[str, int]:
    """Return how many units of each coupled structure go with one unit of heads; empty where nothing is coupled."""
    names = _needing_others(axis_map, schemes)
    if not {"attention_heads", "embedding_channels"} <= structures.keys() & names:
        return {}
    heads = structures["attention_heads"].num_units
    return {name: structures[name].num_units // heads for name in structures if name in names}


def _needing_others(axis_map: AxisMap, schemes: dict[str, Scheme]) -> set[str]:
    if axis_map.coupling is None:
        return set()
    return {name for name in schemes if name in ("attention_heads", "embedding_channels") or schemes[name].per_channel}


class _Bench:
    """A tiny random model on which schemes are tried."""

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
        self.model_class, self.config = model_class, config
        self.model = random_model(model_class, config)
        self.axis_map = probe_axes(model_class, config)
        self.input_ids = token_ids(config)
        self.logits = logits_of(self.model, self.input_ids)
        self.gradients = GradientProbe(self.model, self.input_ids, forward_logits)
        self.tied = not any(info.role == "output" for info in self.axis_map.parameters.values())

    # -- one structure at a time ----------------------------------------------------------------------------------

    def prove(self, names: tuple[str, ...]) -> dict[str, StructureProof]:
        """Prove the named structures, coupled ones together."""
        proofs: dict[str, StructureProof] = {}
        coupled = self.axis_map.coupling is not None
        if coupled and set(COUPLED) <= set(names):
            proofs |= self._guarded(COUPLED, self._prove_coupled)
            if all(proofs[name].scheme is None for name in COUPLED):
                proofs |= self._width_after_all(proofs["attention_heads"].reason)
        for name in names:
            if name not in proofs:
                proofs |= self._guarded((name,), partial(self._prove_alone, name))
        if not coupled and all(name in proofs and proofs[name].scheme is None for name in COUPLED):
            proofs |= self._coupled_after_all()
        return {name: proofs[name] for name in names}

    def _width_after_all(self, reason: str) -> dict[str, StructureProof]:
        """Some classes have their heads' sizes elsewhere: the width alone may be proved then, and heads are refused."""
        before = self.axis_map
        self.axis_map = probe_axes(self.model_class, self.config, couple=False)
        proofs = self._guarded(("embedding_channels",), partial(self._prove_alone, "embedding_channels"))
        if proofs["embedding_channels"].scheme is not None:
            return proofs | {"attention_heads": StructureProof("attention_heads", None, None, reason)}
        self.axis_map = before
        return {}

    def _coupled_after_all(self) -> dict[str, StructureProof]:
        """Some classes take head_dim, and all the same need heads * head_dim to be the width."""
        before = self.axis_map
        self.axis_map = coupled_axes(self.model_class, self.config, before)
        if self.axis_map.coupling is not None and self.axis_map.coupling.head_dim == head_dim_of(self.config):
            proofs = self._guarded(COUPLED, self._prove_coupled)
            if all(proof.scheme is not None for proof in proofs.values()):
                return proofs
        self.axis_map = before
        return {}

    def _guarded(
        self, names: tuple[str, ...], prove: Callable[[], dict[str, StructureProof]]
    ) -> dict[str, StructureProof]:
        try:
            return prove()
        except NotApplicableError as error:
            return {name: StructureProof(name, None, None, str(error), applicable=False) for name in names}
        except UnsupportedStructureError as error:
            reason = str(error)
        except Exception as error:  # model code may fail on a cut model with any exception type
            reason = f"{type(error).__name__}: {error}"
        return {name: StructureProof(name, None, None, reason) for name in names}

    def _prove_alone(self, structure: str) -> dict[str, StructureProof]:
        axes = moving_axes(structure, self.axis_map, self.config)
        if structure == "embedding_channels":
            schemes = self._stream_schemes(axes)
        else:
            schemes = self._inner_schemes(structure, axes)
        return self._first_exact({}, structure, schemes)

    def _first_exact(
        self, others: dict[str, Scheme], structure: str, candidates: Iterator[Scheme]
    ) -> dict[str, StructureProof]:
        """Try candidates for one structure, with others' schemes given, until the logits agree."""
        best: float | None = None
        trials: dict[Any, _Trial] = {}
        for candidate in candidates:
            schemes = {**others, structure: candidate}
            key = (candidate.branches, candidate.shared, candidate.centred)
            if repr(key) not in trials:
                trials[repr(key)] = _Trial(self, schemes)
            error = trials[repr(key)].error_of(schemes)
            if error <= TOLERANCE:
                return {name: StructureProof(name, scheme, error) for name, scheme in schemes.items()}
            best = error if best is None else min(best, error)
        reason = f"no layout reproduces the logits: best relative error {best or float('nan'):.1e} > {TOLERANCE:.0e}"
        return {name: StructureProof(name, None, best, reason) for name in (*others, structure)}

    # -- schemes to try -------------------------------------------------------------------------------------------

    def _inner_schemes(self, structure: str, axes: list[AxisName]) -> Iterator[Scheme]:
        units = num_units(structure, self.config)
        granule = (head_dim_of(self.config) or 1) if structure in ("attention_heads", "query_heads") else 1
        branches = discover_branches(self.gradients, self.axis_map, axes, units, granule)
        yield from self._schemes_of(branches, units, axes)

    def _schemes_of(
        self, branches: list[Branch], units: int, axes: list[AxisName], granule: int = 1, per_channel: int = 0
    ) -> Iterator[Scheme]:
        known = stream_axes(self.model, self.axis_map, axes)
        shifts = {axis.pattern: axis.vector.shift for axis in known if axis.vector.shift}
        for shared in (False, True):
            for powers in inner_powers(known):
                yield Scheme(
                    tuple(branches), units, shifts, powers, shared=shared, granule=granule, per_channel=per_channel
                )

    def _stream_schemes(self, axes: list[AxisName]) -> Iterator[Scheme]:
        """Schemes for the residual stream: layouts by the slope, powers by the stream's structure."""
        units = num_units("embedding_channels", self.config)
        layouts: dict[AxisName, Layout] = {}
        for name, dim in axes:
            info = self.axis_map.parameters[name]
            runs = info.shape[dim] // units
            layouts[info.pattern, dim] = Layout((Segment(runs, 1), *_rest(info.shape[dim] - runs * units)))
        known = stream_axes(self.model, self.axis_map, axes)
        after = norms_after_writers(self.model, self.input_ids, writing_modules(known))
        known = self._with_sides(known, axes, after)
        shifts = {axis.pattern: axis.vector.shift for axis in known if axis.vector.shift}
        centred = self._subtracts_mean(known)
        branch = Branch(("residual stream", 0), layouts)
        for powers in stream_powers(known, after, self.tied, centred):
            writers = written_patterns(known, powers) if centred else frozenset()
            yield Scheme((branch,), units, shifts, powers, writers)

    def _with_sides(self, known: list[StreamAxis], axes: list[AxisName], after: set[str]) -> list[StreamAxis]:
        """Settle for fused weights whether the stream is their input: with the norms before them at zero nothing is."""
        if all(axis.side != "either" for axis in known):
            return known
        norms = [axis for axis in known if axis.info.layer and axis.vector.kind != "other"]
        gates = {axis.pattern: axis.vector.shift for axis in norms if axis.info.module not in after}
        if not gates:
            return known
        blank = [(name, dim) for name, dim in axes if self.axis_map.parameters[name].pattern in gates]

        def zero(mask: torch.Tensor) -> None:
            for name, _ in blank:
                pattern = self.axis_map.parameters[name].pattern
                self.gradients.parameters[name].masked_fill_(mask, -gates[pattern])

        unsettled = {(axis.info.name, axis.dim) for axis in known if axis.side == "either"}
        owners = self.gradients.owners(num_units("embedding_channels", self.config), zero, unsettled)
        reads = {axis for axis, owner in owners.items() if bool((owner >= 0).all())}
        writes = {self.axis_map.parameters[name].module for name, dim in unsettled - reads}
        return [
            replace(axis, side="in" if (axis.info.name, axis.dim) in reads else "out")
            if axis.side == "either" and axis.info.module in writes  # else nothing tells them apart
            else axis
            for axis in known
        ]

    def _subtracts_mean(self, axes: list[StreamAxis]) -> bool:
        """Tell whether the norms of the stream subtract the mean.

        Raises:
            UnsupportedStructureError: where some do and some don't.
        """
        kinds = {axis.vector.subtracts_mean: axis for axis in axes if axis.vector.kind == "scale"}
        bare = has_bare_layernorm(self.model, num_units("embedding_channels", self.config))
        if len(kinds) == 2 or (bare and False in kinds):
            raise UnsupportedStructureError(
                f"some norms of the stream subtract its mean ({kinds[True].info.module if True in kinds else 'one'}), "
                f"others don't ({kinds[False].info.module})"
            )
        return bare or True in kinds

    # -- heads and width together ---------------------------------------------------------------------------------

    def _prove_coupled(self) -> dict[str, StructureProof]:
        """Prove heads and embedding channels where head_dim follows from both, and an MLP whose size does too."""
        coupling = self.axis_map.coupling
        assert coupling is not None
        by_width = [axis for axis, found in self.axis_map.slopes.items() if HIDDEN in found]
        stream, inner = self._split(by_width)
        if not inner:  # there are no heads to follow the width
            self.axis_map = probe_axes(self.model_class, self.config, couple=False)
            return self._prove_alone("embedding_channels")
        units = num_units("attention_heads", self.config)
        branches = discover_branches(self.gradients, self.axis_map, inner, units, coupling.head_dim, partial=True)
        attention = [branch for branch in branches if not self._divides_by_channel(branch, inner)]
        mine = [axis for branch in attention for axis in self._axes_of(branch, inner)]
        others = {"attention_heads": next(self._schemes_of(attention, units, mine, coupling.head_dim))}
        rest = [axis for axis in inner if axis not in mine]
        if rest:
            others["mlp_channels"] = self._mlp_by_width(rest)
        return self._first_exact(others, "embedding_channels", self._stream_schemes(stream))

    def _axes_of(self, branch: Branch, axes: list[AxisName]) -> list[AxisName]:
        return [(name, dim) for name, dim in axes if (self.axis_map.parameters[name].pattern, dim) in branch.layouts]

    def _divides_by_channel(self, branch: Branch, axes: list[AxisName]) -> bool:
        """Tell an MLP from an attention: its units can be single channels."""
        mine = self._axes_of(branch, axes)
        name, dim = next(axis for axis in mine if self.axis_map.parameters[axis[0]].pattern == branch.reader[0])
        channels = self.axis_map.parameters[name].shape[dim]
        try:
            return len(discover_branches(self.gradients, self.axis_map, mine, channels, 1)) == 1
        except UnsupportedStructureError:
            return False

    def _mlp_by_width(self, axes: list[AxisName]) -> Scheme:
        width = num_units("embedding_channels", self.config)
        sizes = {self.axis_map.parameters[name].shape[dim] for name, dim in axes}
        units = min(sizes)
        if units % width:
            raise UnsupportedStructureError(f"{axes[0][0]} dimension {axes[0][1]} follows neither heads nor the stream")
        branches = discover_branches(self.gradients, self.axis_map, axes, units, 1)
        return next(self._schemes_of(branches, units, axes, per_channel=units // width))

    def _split(self, axes: list[AxisName]) -> tuple[list[AxisName], list[AxisName]]:
        """Divide the axes that the width moves into those along the stream and those inside the blocks.

        Where all norms let nothing of a channel through, no weight has a gradient at that channel of the stream.
        """
        known = {(axis.pattern, axis.dim): axis for axis in stream_axes(self.model, self.axis_map, axes)}
        gates: list[tuple[torch.nn.Parameter, float]] = []
        width = num_units("embedding_channels", self.config)
        for name, dim in axes:
            axis = self._seen(known, name, dim)
            if axis.vector.kind != "other" and axis.info.shape == (width,):
                gates.append((self.gradients.parameters[name], -axis.vector.shift))

        def zero(mask: torch.Tensor) -> None:
            for parameter, fill in gates:
                parameter.masked_fill_(mask, fill)

        owners = self.gradients.owners(width, zero, axes)
        along = {axis for axis in axes if (layout := layout_of(owners[axis], width)) and layout.per_unit == 1}
        along |= {
            (name, dim)
            for name, dim in axes
            if self._seen(known, name, dim).vector.kind != "other" and owners[name, dim].shape == (width,)
        }
        return [axis for axis in axes if axis in along], [axis for axis in axes if axis not in along]

    def _seen(self, known: Mapping[AxisName, StreamAxis], name: str, dim: int) -> StreamAxis:
        return known[self.axis_map.parameters[name].pattern, dim]

    # -- trials ---------------------------------------------------------------------------------------------------

    def error_of(self, schemes: dict[str, Scheme]) -> float:
        """Zero random units, cut them out, and return the relative error of the cut model's logits."""
        return _Trial(self, schemes).error_of(schemes)

    def groups(self, schemes: dict[str, Scheme]) -> PruningGroups:
        """Build the tiny model's groups."""
        built = {n: build_groups(n, self.axis_map, self.config, scheme) for n, scheme in schemes.items()}
        return PruningGroups(built, {}, coupled_units(built, self.axis_map, schemes))


def _rest(fixed: int) -> tuple[Segment, ...]:
    return (Segment(fixed=fixed),) if fixed else ()


class _Trial:
    """One set of units of the tiny model, zeroed under fixed layouts, and the model that is cut to the others."""

    def __init__(self, bench: _Bench, schemes: dict[str, Scheme]) -> None:
        self.bench = bench
        groups = bench.groups(schemes)
        self.kept, small_config = _units_to_keep(groups, bench.config)
        zeroed = copy.deepcopy(bench.model)
        self.parameters = dict(zeroed.named_parameters())
        zero_units_(self.parameters, groups, self.kept)
        self.logits = logits_of(zeroed, bench.input_ids)
        if relative_error(self.logits, bench.logits) < 100 * TOLERANCE:
            raise UnsupportedStructureError("zeroing its units changes nothing, so no layout can be told from another")
        self.small = bench.model_class(small_config).float().eval()

    def error_of(self, schemes: dict[str, Scheme]) -> float:
        """Cut with the schemes' powers of c and compare logits."""
        load_cut(self.small, self.parameters, self.bench.groups(schemes), self.kept)
        return relative_error(logits_of(self.small, self.bench.input_ids), self.logits)


@torch.no_grad()
def zero_units_(parameters: Mapping[str, torch.Tensor], groups: PruningGroups, kept: KeptUnits) -> None:
    """Set all units that aren't kept to zero, in place, and centre what writes to a stream of mean zero."""
    for name, layers in kept.kept.items():
        structure = groups.structures[name]
        for layer, axis in structure.all_axes():
            parameter = parameters[axis.parameter].data
            pruned = torch.ones(structure.num_units, dtype=torch.bool, device=parameter.device)
            pruned[list(layers[layer])] = False
            mask_(parameter, axis, pruned)
            if axis.centred and pruned.any():
                centre_(parameter, axis, (~pruned).float())


def _units_to_keep(groups: PruningGroups, config: PretrainedConfig) -> tuple[KeptUnits, PretrainedConfig]:
    """Choose random units to keep, about three of four, so many that the config class accepts the sizes."""
    free = {n: s for n, s in groups.structures.items() if n not in groups.coupled or n == "attention_heads"}
    options = [[count * group.pools for count in _tiny_counts(group.pool_size)] for group in free.values()]
    error: HessoError | None = None
    for choice in itertools.product(*options):
        counts = groups.with_coupled(dict(zip(free, choice, strict=True)))
        sizes: dict[str, int] = {}
        for name, count in counts.items():
            sizes |= groups.structures[name].config_sizes(count)
        try:
            small = resized_config(config, sizes)
        except HessoError as refusal:
            error = refusal
            continue
        generator = torch.Generator().manual_seed(_SEED + 1)
        kept = {}
        for name, count in counts.items():
            structure = groups.structures[name]
            kept[name] = tuple(_random_units(structure, count, generator) for _ in structure.layers)
        return KeptUnits({name: g.num_units for name, g in groups.structures.items()}, kept), small
    raise error or UnsupportedStructureError("there is only one unit a layer")


def _random_units(structure: StructureGroups, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Choose `count` units of a layer, equally many of each pool."""
    units: list[int] = []
    for pool in range(structure.pools):
        order = torch.randperm(structure.pool_size, generator=generator) + pool * structure.pool_size
        units += order[: count // structure.pools].tolist()
    return tuple(sorted(units))


def _tiny_counts(units: int) -> list[int]:
    """List numbers of units to keep, multiples of four first: grouped expert kernels need rows of 16 bytes."""
    counts = [count for count in range(units - 1, 0, -1) if 0.5 <= count / units < 0.9]
    return sorted(counts, key=lambda count: count % 4 != 0)
