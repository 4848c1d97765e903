"""Proof: which layout, which norm and which power of c are right, found on a tiny random model of the same class.

Random units of the tiny model are zeroed, the same units are cut out, and the logits compared: only the right layouts
and powers agree. Layouts are discovered, powers of c guessed, and the comparison decides. A structure for which none
agrees is refused with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...config import DEFAULT_STRUCTURES
from ...errors import UnsupportedStructureError
from ...hf_models.sizes import HIDDEN, MLP, get_size, head_dim_of, num_units
from ...hf_models.tiny_config import tiny_config
from ...hf_models.tiny_model import forward_logits, logits_of, random_model, relative_error, token_ids
from ..cut import load_cut, zero_units_
from ..experts import EXPERT_UNITS
from ..groups import (
    COUPLED,
    HEAD_UNITS,
    AxisName,
    Branch,
    PruningGroups,
    Scheme,
    build_groups,
    coupled_units,
    moving_axes,
)
from ..layers import LAYER_UNITS
from ..layout import Layout, Segment
from ..shape_probe import AxisMap, coupled_axes, probe_axes
from .division import Division, divisions
from .experts import ids_for_all_experts, prove_experts
from .layers import LayerTrial
from .norms import has_bare_layernorm, norms_after_writers
from .ownership import GradientProbe, discover_branches, layout_of
from .residual_stream import StreamAxis, inner_powers, stream_axes, stream_powers, writing_modules, written_patterns
from .result import TOLERANCE, Proof, StructureProof, groups_of, guarded
from .sides import Sides
from .tiny_case import covering_config, units_to_keep
from .width_constants import constants_by_width, powers_against


def prove(
    model_class: type[PreTrainedModel], config: PretrainedConfig, names: tuple[str, ...] = DEFAULT_STRUCTURES
) -> Proof:
    """Prove the named structures, which must not exclude each other, for an architecture.

    Experts have one possible layout and need gates on the routers, so they are proved alone. Whole layers come last,
    since they have to hold together with the others, and on a model of the real one's depth.
    """
    others = tuple(name for name in names if name not in (EXPERT_UNITS, LAYER_UNITS))
    proof = _prove_units(model_class, config, others) if others else Proof({})
    found = dict(proof.structures)
    if EXPERT_UNITS in names:
        found |= guarded((EXPERT_UNITS,), partial(prove_experts, model_class, config))
    if LAYER_UNITS in names:
        found |= guarded((LAYER_UNITS,), partial(_prove_layers, model_class, config, proof))
    return replace(proof, structures={name: found[name] for name in names})


def _prove_units(model_class: type[PreTrainedModel], config: PretrainedConfig, names: tuple[str, ...]) -> Proof:
    try:
        bench = Bench(model_class, covering_config(model_class, config))
    except Exception as error:  # model code may refuse the tiny sizes with any exception type
        reason = f"no tiny {model_class.__name__} could be built: {type(error).__name__}: {error}"
        return Proof({name: StructureProof(name, None, None, reason) for name in names})
    proofs = bench.prove(names)
    schemes = _unit_schemes(proofs)
    return Proof(proofs, bench.error_of(schemes) if schemes else None, bench.axis_map.coupling is not None)


def _prove_layers(
    model_class: type[PreTrainedModel], config: PretrainedConfig, others: Proof
) -> dict[str, StructureProof]:
    """Prove that whole layers can be dropped, alone and together with the other proved structures."""
    bench = Bench(model_class, tiny_config(model_class, config, all_layers=True))
    if not others.coupled:
        bench.axis_map = replace(bench.axis_map, coupling=None)
    trial = LayerTrial(bench, TOLERANCE)  # refuses first what needs no model
    scheme, error = trial.find(bench.stream(list(bench.axis_map.moving((HIDDEN,))))[0])
    if schemes := _unit_schemes(others.structures):
        groups = bench.groups(schemes)
        joint = trial.joint_error(scheme, groups, units_to_keep(groups, bench.model_class, bench.config)[0])
        if joint > TOLERANCE:
            reason = f"together with {list(schemes)} the logits differ: relative error {joint:.1e} > {TOLERANCE:.0e}"
            return {LAYER_UNITS: StructureProof(LAYER_UNITS, None, joint, reason)}
        error = max(error, joint)
    return {LAYER_UNITS: StructureProof(LAYER_UNITS, scheme, error)}


def _unit_schemes(proofs: Mapping[str, StructureProof]) -> dict[str, Scheme]:
    """Return the schemes of what is proved, experts and whole layers aside."""
    return {name: found.scheme for name, found in proofs.items() if isinstance(found.scheme, Scheme)}


def proved_groups(
    model_class: type[PreTrainedModel], config: PretrainedConfig, names: tuple[str, ...] = DEFAULT_STRUCTURES
) -> tuple[PruningGroups, Proof, AxisMap]:
    """Probe a model's config, prove the named structures and return the groups of those that hold."""
    proof = prove(model_class, config, names)
    groups, axis_map = groups_of(model_class, config, proof)
    return groups, proof, axis_map


class Bench:
    """A tiny random model on which schemes are tried."""

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
        self.model_class, self.config = model_class, config
        self.model = random_model(model_class, config)
        self.axis_map = probe_axes(model_class, config)
        self.input_ids = token_ids(config)
        self.logits = logits_of(self.model, self.input_ids)
        self.gradients = GradientProbe(self.model, ids_for_all_experts(config), forward_logits)
        self.tied = not any(info.role == "output" for info in self.axis_map.parameters.values())

    # -- one structure at a time ----------------------------------------------------------------------------------

    def prove(self, names: tuple[str, ...]) -> dict[str, StructureProof]:
        """Prove the named structures, coupled ones together."""
        proofs: dict[str, StructureProof] = {}
        coupled = self.axis_map.coupling is not None
        if coupled and set(COUPLED) <= set(names):
            proofs |= self._divided(COUPLED, "attention_heads", self._prove_coupled)
            if all(proofs[name].scheme is None for name in COUPLED):
                proofs |= self._width_after_all(proofs["attention_heads"].reason)
        for name in sorted(names, key=lambda name: name == "mixer_channels"):  # which the width's proof may settle
            if name not in proofs:
                proofs |= self._divided((name,), name, partial(self._prove_alone, name))
        if not coupled and all(name in proofs and proofs[name].scheme is None for name in COUPLED):
            proofs |= self._coupled_after_all()
        return {name: proofs[name] for name in names}

    def _width_after_all(self, reason: str) -> dict[str, StructureProof]:
        """Some classes have their heads' sizes elsewhere: the width alone may be proved then, and heads are refused."""
        before = self.axis_map
        self.axis_map = probe_axes(self.model_class, self.config, couple=False)
        proofs = guarded(("embedding_channels",), partial(self._prove_alone, "embedding_channels", Division()))
        if proofs["embedding_channels"].scheme is not None:
            return proofs | {"attention_heads": StructureProof("attention_heads", None, None, reason)}
        self.axis_map = before
        return {}

    def _coupled_after_all(self) -> dict[str, StructureProof]:
        """Some classes take head_dim, and all the same need heads * head_dim to be the width."""
        before = self.axis_map
        self.axis_map = coupled_axes(self.model_class, self.config, before)
        if self.axis_map.coupling is not None and self.axis_map.coupling.head_dim == head_dim_of(self.config):
            proofs = self._divided(COUPLED, "attention_heads", self._prove_coupled)
            if all(proof.scheme is not None for proof in proofs.values()):
                return proofs
        self.axis_map = before
        return {}

    def _divided(
        self, names: tuple[str, ...], structure: str, prove: Callable[[Division], dict[str, StructureProof]]
    ) -> dict[str, StructureProof]:
        """Try a proof with one division of a structure's axes into units after the other, the finest first.

        Args:
            structure: the one whose axes can be divided in several ways.
        """
        first: dict[str, StructureProof] = {}
        before, self.divided = self.axis_map, list[list[Branch]]()
        for division in divisions(structure, self.config):
            self.axis_map = before
            proofs = guarded(names, partial(prove, division))
            if any(found.scheme is not None or not found.applicable for found in proofs.values()):
                return proofs
            first = first or proofs
        return first

    def _branches(
        self, structure: str, axes: list[AxisName], granule: int, division: Division, partial: bool = False
    ) -> list[Branch]:
        """Divide axes into branches, each time in another way.

        Raises:
            UnsupportedStructureError: also where this division isn't another one than those before.
        """
        units = num_units(structure, self.config) // division.bundle
        found = discover_branches(self.gradients, self.axis_map, axes, units, granule, partial, division.strided)
        if found in self.divided:
            raise UnsupportedStructureError("its axes divide into units in no other way")
        self.divided.append(found)
        return found

    def _prove_alone(self, structure: str, division: Division) -> dict[str, StructureProof]:
        axes = moving_axes(structure, self.axis_map, self.config)
        if structure != "embedding_channels":
            return self._first_exact({}, structure, self._inner_schemes(structure, axes, division))
        others: dict[str, Scheme] = {}
        names = [name for name, _ in axes]
        if len(set(names)) < len(names):  # a weight both of whose sides follow the width
            axes, inner = self._split(axes)
            if inner:
                others["mixer_channels"] = self._mlp_by_width(inner)
        return self._first_exact(others, structure, self._stream_schemes(axes))

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

    def _inner_schemes(self, structure: str, axes: list[AxisName], division: Division) -> Iterator[Scheme]:
        granule = (head_dim_of(self.config) or 1) if structure in HEAD_UNITS else 1
        branches = self._branches(structure, axes, granule, division)
        yield from self._schemes_of(branches, num_units(structure, self.config), axes, bundle=division.bundle)

    def _schemes_of(
        self,
        branches: list[Branch],
        units: int,
        axes: list[AxisName],
        granule: int = 1,
        per_channel: int = 0,
        bundle: int = 1,
    ) -> Iterator[Scheme]:
        known = stream_axes(self.model, self.axis_map, axes)
        shifts = {axis.pattern: axis.vector.shift for axis in known if axis.vector.shift}
        for shared in (False, True):
            for powers in inner_powers(known):
                yield Scheme(
                    tuple(branches), units // bundle, shifts, powers, shared=shared, granule=granule,
                    per_channel=per_channel, bundle=bundle,
                )  # fmt: skip

    def _stream_schemes(self, axes: list[AxisName]) -> Iterator[Scheme]:
        """Schemes for the residual stream: layouts by the slope, powers by the stream's structure."""
        units = num_units("embedding_channels", self.config)
        layouts: dict[AxisName, Layout] = {}
        for name, dim in axes:
            info = self.axis_map.parameters[name]
            runs = info.shape[dim] // units
            layouts[info.pattern, dim] = Layout((Segment(runs, 1), *_rest(info.shape[dim] - runs * units)))
        known, after = self.stream(axes)
        found = constants_by_width(self.model_class, self.config, self.axis_map.coupling is not None)
        against = powers_against(self.model, self.input_ids, self.axis_map, found) if found else {}
        for info in self.axis_map.parameters.values():
            if info.pattern in against:
                layouts[info.pattern, 0] = Layout(_rest(info.shape[0]))
        shifts = {axis.pattern: axis.vector.shift for axis in known if axis.vector.shift}
        centred = self._subtracts_mean(known)
        branch = Branch(("residual stream", 0), layouts)
        more = partial(self._sides(axes, after).further_places, known)
        for powers in stream_powers(known, after, self.tied, centred, more):
            writers = written_patterns(known, powers) if centred else frozenset()
            yield Scheme((branch,), units, shifts, powers | against, writers)

    def stream(self, axes: list[AxisName]) -> tuple[list[StreamAxis], set[str]]:
        """Describe the axes along the residual stream, and name the norms of what is yet to be added to it."""
        known = stream_axes(self.model, self.axis_map, axes)
        after = norms_after_writers(self.model, self.input_ids, writing_modules(known))
        return self._sides(axes, after).settled(known), after

    def _sides(self, axes: list[AxisName], after: set[str]) -> Sides:
        return Sides(self.gradients, self.axis_map, axes, after, num_units("embedding_channels", self.config))

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

    def _prove_coupled(self, division: Division) -> dict[str, StructureProof]:
        """Prove heads and embedding channels where head_dim follows from both, and an MLP whose size does too."""
        coupling = self.axis_map.coupling
        assert coupling is not None
        by_width = [axis for axis, found in self.axis_map.slopes.items() if HIDDEN in found]
        stream, inner = self._split(by_width)
        if not inner:  # there are no heads to follow the width
            self.axis_map = probe_axes(self.model_class, self.config, couple=False)
            return self._prove_alone("embedding_channels", division)
        branches = self._branches("attention_heads", inner, coupling.head_dim, division, partial=True)
        attention = [branch for branch in branches if not self._divides_by_channel(branch, inner)]
        mine = [axis for branch in attention for axis in self._axes_of(branch, inner)]
        others: dict[str, Scheme] = {}
        rest = [axis for axis in inner if axis not in mine]
        if rest:
            own_size = get_size(self.config, MLP) is not None
            others["mixer_channels" if own_size else "mlp_channels"] = self._mlp_by_width(rest)
        proofs: dict[str, StructureProof] = {}
        units = num_units("attention_heads", self.config)
        for heads in self._schemes_of(attention, units, mine, coupling.head_dim, bundle=division.bundle):
            if heads.shared and not any(power for power in heads.powers.values()):
                break  # layers that read each other's keys are refused here
            others["attention_heads"] = heads
            proofs = self._first_exact(others, "embedding_channels", self._stream_schemes(stream))
            if proofs["attention_heads"].scheme is not None:
                break
        return proofs

    def _axes_of(self, branch: Branch, axes: list[AxisName]) -> list[AxisName]:
        return [(name, dim) for name, dim in axes if (self.axis_map.parameters[name].pattern, dim) in branch.layouts]

    def _divides_by_channel(self, branch: Branch, axes: list[AxisName]) -> bool:
        """Tell an MLP from an attention: its units can be single channels."""
        mine = self._axes_of(branch, axes)
        name, dim = next(axis for axis in mine if self.axis_map.parameters[axis[0]].pattern == branch.reader[0])
        channels = self.axis_map.parameters[name].shape[dim]
        try:
            found = discover_branches(self.gradients, self.axis_map, mine, channels, 1)
            return len(found) == 1 and all(layout.size(1) == layout.per_unit for layout in found[0].layouts.values())
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
        gates = self._gates(axes)

        def zero(mask: torch.Tensor) -> None:
            for (name, _), fill in gates.items():
                self.gradients.parameters[name].masked_fill_(mask, fill)

        owners = self.gradients.owners(num_units("embedding_channels", self.config), zero, axes)
        one_each = Layout((Segment(1, 1),))
        along = set(gates) | {axis for axis in axes if layout_of(owners[axis], len(owners[axis])) == one_each}
        along |= {axis for axis in axes if self.gradients.output_axis(axis[0]) in along}  # biases, as weights' rows
        return [axis for axis in axes if axis in along], [axis for axis in axes if axis not in along]

    def _gates(self, axes: list[AxisName]) -> dict[AxisName, float]:
        """Return the vectors of the stream's norms with the value that lets nothing through.

        Where a layer's norms are its own members, a norm further inside (of the queries of all heads) is none of them.
        """
        width = num_units("embedding_channels", self.config)
        gates: dict[AxisName, float] = {}
        inner: dict[AxisName, float] = {}
        for axis in stream_axes(self.model, self.axis_map, axes):
            for name, dim in axes:
                info = self.axis_map.parameters[name]
                if (info.pattern, dim) == (axis.pattern, axis.dim) and info.shape == (width,):
                    member = info.module.rpartition(".")[0] == info.layer or not info.layer
                    if axis.vector.kind != "other":
                        (gates if member else inner)[name, dim] = -axis.vector.shift
        return gates if any(self.axis_map.parameters[name].layer for name, _ in gates) else gates | inner

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

    def __init__(self, bench: Bench, schemes: dict[str, Scheme]) -> None:
        self.bench = bench
        groups = bench.groups(schemes)
        self.kept, small_config = units_to_keep(groups, bench.model_class, bench.config)
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
        logits = logits_of(self.small, self.bench.input_ids)
        if logits.shape != self.logits.shape:
            raise UnsupportedStructureError(f"{type(self.small).__name__} gives these channels out, so all are needed")
        return relative_error(logits, self.logits)
