"""Proof: which layout, which norm and which power of c are right, found on a tiny random model of the same class.

Random units of the tiny model are zeroed, the same units are cut out, and the logits compared: only the right layouts
and powers agree. Layouts are discovered, powers of c guessed, and the comparison decides. A structure for which none
agrees is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...config import DEFAULT_STRUCTURES
from ...errors import NotApplicableError, UnsupportedStructureError
from ...hf_models.sizes import HIDDEN, LAYERS, MLP, ConfigSizes
from ...hf_models.tiny_configs import tiny_config
from ...hf_models.tiny_model import SEED
from ..build import HEAD_UNITS, moving_axes, num_units, unit_increments
from ..experts import EXPERT_UNITS, num_experts
from ..groups import COUPLED, AxisName, Branch, PruningGroups, Scheme
from ..layers import LAYER_UNITS
from ..shape_probe import AxisMap, coupled_axes, probe_axes
from . import schemes
from .bench import Bench, Trial
from .branches import Division, discover_branches, divisions
from .cache import Case, cached
from .experts import prove_experts
from .layers import LayerTrial
from .norms import norm_of_the_stream
from .result import TOLERANCE, Proof, StructureProof, groups_of, guarded
from .tiny_case import covering_config, units_to_keep

Proved = tuple[PruningGroups, Proof, AxisMap]
REMEMBERED = 64  # proofs, the last ones: a sweep's trainers, or a test session's, have few configs


def prove(
    model_class: type[PreTrainedModel], config: PretrainedConfig, names: tuple[str, ...] = DEFAULT_STRUCTURES
) -> Proof:
    """Prove the named structures, which must not exclude each other, for an architecture.

    Experts have one possible layout and need gates on the routers, so they are proved alone. Whole layers come last,
    since they have to hold together with the others, and on a model of the real one's depth. Random numbers are of a
    generator of the proof's own: a run's dropout doesn't depend on whether something was proved before.
    """
    others = tuple(name for name in names if name not in (EXPERT_UNITS, LAYER_UNITS))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(SEED)
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
    except UnsupportedStructureError as error:
        return Proof({name: StructureProof(name, None, None, str(error)) for name in names})
    except Exception as error:  # model code may refuse the tiny sizes with any exception type
        reason = f"no tiny {model_class.__name__} could be built: {type(error).__name__}: {error}"
        return Proof({name: StructureProof(name, None, None, reason) for name in names})
    proofs = Prover(bench).prove(names)
    proved = _unit_schemes(proofs)
    return Proof(proofs, bench.error_of(proved) if proved else None, bench.axis_map.coupled_head_dim is not None)


def _prove_layers(
    model_class: type[PreTrainedModel], config: PretrainedConfig, others: Proof
) -> dict[str, StructureProof]:
    """Prove that whole layers can be dropped, alone and together with the other proved structures."""
    bench = Bench(model_class, tiny_config(model_class, config, all_layers=True))
    if not others.coupled:
        bench.axis_map = replace(bench.axis_map, coupled_head_dim=None)
    trial = LayerTrial(bench)  # refuses first what needs no model
    scheme, error = trial.find(bench.stream(list(bench.axis_map.moving((HIDDEN,))))[0])
    if proved := _unit_schemes(others.structures):
        groups = bench.groups(proved)
        joint = trial.joint_error(
            scheme, groups, units_to_keep(groups, bench.model_class, bench.config, bench.sizes)[0]
        )
        if joint > TOLERANCE:
            reason = f"together with {list(proved)} the logits differ: relative error {joint:.1e} > {TOLERANCE:.0e}"
            return {LAYER_UNITS: StructureProof(LAYER_UNITS, None, joint, reason)}
        error = max(error, joint)
    return {LAYER_UNITS: StructureProof(LAYER_UNITS, scheme, error)}


def _unit_schemes(proofs: Mapping[str, StructureProof]) -> dict[str, Scheme]:
    """Return the schemes of what is proved, experts and whole layers aside."""
    return {name: found.scheme for name, found in proofs.items() if isinstance(found.scheme, Scheme)}


def proved_groups(
    model_class: type[PreTrainedModel], config: PretrainedConfig, names: tuple[str, ...] = DEFAULT_STRUCTURES
) -> Proved:
    """Probe a model's config, prove the named structures and return the groups of those that hold.

    Class, config and names decide it, so that what a process has proved it doesn't prove again, and nor does another
    one where it could be kept.
    """
    return _remembered(Case.of(model_class, config), names)


@lru_cache(maxsize=REMEMBERED)
def _remembered(case: Case, names: tuple[str, ...]) -> Proved:
    told = _of_sizes(case.config, names)
    proof = cached(case, names, lambda: prove(case.model_class, case.config, names), told)
    groups, axis_map = groups_of(case.model_class, case.config, proof)
    return groups, proof, axis_map


def _of_sizes(config: PretrainedConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the structures that a config has sizes of; a mixer's channels have none: the width's proof finds them."""
    sizes = ConfigSizes.of(config)

    def is_there(name: str) -> bool:
        if name in (EXPERT_UNITS, LAYER_UNITS):
            return (num_experts(config) if name == EXPERT_UNITS else sizes.get(LAYERS)) is not None
        try:
            return bool(unit_increments(name, sizes))
        except UnsupportedStructureError as error:
            return not isinstance(error, NotApplicableError)

    return tuple(filter(is_there, names))


class Prover:
    """Proves the structures of a tiny model one after the other, coupled ones together."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.divided: list[list[Branch]] = []

    def prove(self, names: tuple[str, ...]) -> dict[str, StructureProof]:
        """Prove the named structures, coupled ones together."""
        proofs: dict[str, StructureProof] = {}
        coupled = self.bench.axis_map.coupled_head_dim is not None
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

    def prove_stream(self) -> StructureProof:
        """Prove the embedding channels, and heads only where the two may have to shrink together."""
        if self.bench.axis_map.coupled_head_dim is not None:
            return self.prove(COUPLED)["embedding_channels"]
        found = self.prove(("embedding_channels",))
        if found["embedding_channels"].scheme is None and self.prove(COUPLED[:1])[COUPLED[0]].scheme is None:
            found |= self._coupled_after_all()
        return found["embedding_channels"]

    def _width_after_all(self, reason: str) -> dict[str, StructureProof]:
        """Some classes have their heads' sizes elsewhere: the width alone may be proved then, and heads are refused."""
        before = self.bench.axis_map
        self.bench.axis_map = probe_axes(self.bench.model_class, self.bench.config, couple=False)
        proofs = guarded(("embedding_channels",), partial(self._prove_alone, "embedding_channels", Division()))
        if proofs["embedding_channels"].scheme is not None:
            return proofs | {"attention_heads": StructureProof("attention_heads", None, None, reason)}
        self.bench.axis_map = before
        return {}

    def _coupled_after_all(self) -> dict[str, StructureProof]:
        """Some classes take head_dim, and all the same need heads * head_dim to be the width."""
        before = self.bench.axis_map
        self.bench.axis_map = coupled_axes(self.bench.model_class, self.bench.config, before)
        head_dim = self.bench.axis_map.coupled_head_dim
        if head_dim is not None and head_dim == self.bench.sizes.head_dim:
            proofs = self._divided(COUPLED, "attention_heads", self._prove_coupled)
            if all(proof.scheme is not None for proof in proofs.values()):
                return proofs
        self.bench.axis_map = before
        return {}

    def _divided(
        self, names: tuple[str, ...], structure: str, prove: Callable[[Division], dict[str, StructureProof]]
    ) -> dict[str, StructureProof]:
        """Try a proof with one division of a structure's axes into units after the other, the finest first.

        Args:
            structure: the one whose axes can be divided in several ways.
        """
        first: dict[str, StructureProof] = {}
        before, self.divided = self.bench.axis_map, list[list[Branch]]()
        for division in divisions(structure, self.bench.sizes):
            self.bench.axis_map = before
            proofs = guarded(names, partial(prove, division))
            if any(found.scheme is not None or not found.applicable for found in proofs.values()):
                return proofs
            first = first or proofs
        return first

    def _branches(
        self, structure: str, axes: list[AxisName], granule: int, division: Division, leaves_some: bool = False
    ) -> list[Branch]:
        """Divide axes into branches, each time in another way.

        Args:
            leaves_some: whether axes may be left over.

        Raises:
            UnsupportedStructureError: also where this division isn't another one than those before.
        """
        units = num_units(structure, self.bench.sizes) // division.bundle
        found = discover_branches(
            self.bench.gradients, self.bench.axis_map, axes, units, granule, leaves_some, division.strided
        )
        if found in self.divided:
            raise UnsupportedStructureError("its axes divide into units in no other way")
        self.divided.append(found)
        return found

    def _prove_alone(self, structure: str, division: Division) -> dict[str, StructureProof]:
        axes = moving_axes(structure, self.bench.axis_map)
        if structure != "embedding_channels":
            granule = (self.bench.sizes.head_dim or 1) if structure in HEAD_UNITS else 1
            branches = self._branches(structure, axes, granule, division)
            units = num_units(structure, self.bench.sizes)
            candidates = schemes.schemes_of(self.bench, branches, units, axes, bundle=division.bundle)
            return self._first_exact({}, structure, candidates)
        self.bench.check_reached(axes)
        others: dict[str, Scheme] = {}
        names = [name for name, _ in axes]
        if len(set(names)) < len(names):  # a weight both of whose sides follow the width
            axes, inner = self.bench.split(axes)
            if inner:
                others["mixer_channels"] = schemes.mlp_by_width(self.bench, inner)
        return self._first_exact(others, structure, schemes.stream_schemes(self.bench, axes))

    def _first_exact(
        self, others: dict[str, Scheme], structure: str, candidates: Iterator[Scheme]
    ) -> dict[str, StructureProof]:
        """Try candidates for one structure, with others' schemes given, until the logits agree."""
        best: float | None = None
        trials: dict[str, Trial] = {}
        for candidate in candidates:
            tried = {**others, structure: candidate}
            key = (candidate.branches, candidate.shared, candidate.centred)
            if repr(key) not in trials:
                trials[repr(key)] = Trial(self.bench, tried)
            error = trials[repr(key)].error_of(tried)
            if error <= TOLERANCE:
                return {name: StructureProof(name, scheme, error) for name, scheme in tried.items()}
            best = error if best is None else min(best, error)
        named = {name: scheme for name, scheme in others.items() if name != "mixer_channels" or self._in_layers(scheme)}
        reason = self._why(structure, named)
        reason += f": best relative error {best or float('nan'):.1e} > {TOLERANCE:.0e}"
        return {name: StructureProof(name, None, best, reason) for name in (*named, structure)}

    def _in_layers(self, scheme: Scheme) -> bool:
        """Tell what layers compute from what follows the width beside them, such as a pooler."""
        patterns = {pattern for branch in scheme.branches for pattern, _ in branch.layouts}
        return any(info.layer for info in self.bench.axis_map.parameters.values() if info.pattern in patterns)

    def _why(self, structure: str, others: Mapping[str, Scheme]) -> str:
        """Say why units can't be cut out, where that can be told, else only that the logits changed."""
        if structure == "embedding_channels":
            known, _ = self.bench.stream(moving_axes(structure, self.bench.axis_map))
            norms = {axis.info.module for axis in known if axis.vector.kind == "scale" and axis.vector.subtracts_mean}
            norm = norm_of_the_stream(self.bench.model, self.bench.input_ids, norms)
            if norm:
                also = f", and with it {', '.join(others).replace('_', ' ')}" if others else ""
                return (
                    f"the hidden state is the output of a norm ({norm}): over fewer channels the next norm would "
                    f"subtract another mean, so hidden_size stays{also}"
                )
        return "however they are cut out of a tiny random model, its logits change"

    def _prove_coupled(self, division: Division) -> dict[str, StructureProof]:
        """Prove heads and embedding channels where head_dim follows from both, and an MLP whose size does too."""
        head_dim = self.bench.axis_map.coupled_head_dim
        assert head_dim is not None
        by_width = [axis for axis, found in self.bench.axis_map.slopes.items() if HIDDEN in found]
        self.bench.check_reached(by_width)
        stream, inner = self.bench.split(by_width)
        if not inner:  # there are no heads to follow the width
            self.bench.axis_map = probe_axes(self.bench.model_class, self.bench.config, couple=False)
            return self._prove_alone("embedding_channels", division)
        branches = self._branches("attention_heads", inner, head_dim, division, leaves_some=True)
        attention = [branch for branch in branches if not self._divides_by_channel(branch, inner)]
        mine = [axis for branch in attention for axis in self._axes_of(branch, inner)]
        others: dict[str, Scheme] = {}
        rest = [axis for axis in inner if axis not in mine]
        if rest:
            own_size = self.bench.sizes.get(MLP) is not None
            others["mixer_channels" if own_size else "mlp_channels"] = schemes.mlp_by_width(self.bench, rest)
        proofs: dict[str, StructureProof] = {}
        units = num_units("attention_heads", self.bench.sizes)
        for heads in schemes.schemes_of(self.bench, attention, units, mine, head_dim, bundle=division.bundle):
            if heads.shared and not any(power for power in heads.powers.values()):
                break  # layers that read each other's keys are refused here
            others["attention_heads"] = heads
            proofs = self._first_exact(others, "embedding_channels", schemes.stream_schemes(self.bench, stream))
            if proofs["attention_heads"].scheme is not None:
                break
        return proofs

    def _axes_of(self, branch: Branch, axes: list[AxisName]) -> list[AxisName]:
        return [
            (name, dim) for name, dim in axes if (self.bench.axis_map.parameters[name].pattern, dim) in branch.layouts
        ]

    def _divides_by_channel(self, branch: Branch, axes: list[AxisName]) -> bool:
        """Tell an MLP from an attention: its units can be single channels."""
        mine = self._axes_of(branch, axes)
        name, dim = next(axis for axis in mine if self.bench.axis_map.parameters[axis[0]].pattern == branch.reader[0])
        channels = self.bench.axis_map.parameters[name].shape[dim]
        try:
            found = discover_branches(self.bench.gradients, self.bench.axis_map, mine, channels, 1)
            return len(found) == 1 and all(layout.size(1) == layout.per_unit for layout in found[0].layouts.values())
        except UnsupportedStructureError:
            return False
