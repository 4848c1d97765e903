"""Proof: which layout, which norm and which power of c are right, found on a tiny random model of the same class.

Random units of the tiny model are zeroed, the same units are cut out, and the logits compared: only the right layouts
and powers agree. A structure for which none agrees is refused with the reason, never guessed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .config import STRUCTURES
from .cut import load_cut
from .depth import LAYER_UNITS, layer_groups
from .depth_proof import LayerTrial, narrow_windows
from .errors import HessoError, UnsupportedStructureError
from .groups import KeptUnits, PruningGroups, Scheme, build_groups, candidate_axes, mask_
from .probe import AxisMap, ParameterInfo, probe_axes
from .sizes import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, get_size, head_dim_of, num_units, resized_config

TOLERANCE = 1e-5
_TINY_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "top_k_experts": 2}
_SEED = 20240915


@dataclass(frozen=True)
class StructureProof:
    """The outcome for one structure: a scheme with its relative error, or a reason."""

    structure: str
    scheme: Scheme | None
    relative_error: float | None
    reason: str = ""


@dataclass(frozen=True)
class Proof:
    """The outcome for all structures of one architecture, and the error with all proved ones cut at once."""

    structures: dict[str, StructureProof]
    joint_error: float | None = None


def tiny_config(config: PretrainedConfig, all_layers: bool = False) -> PretrainedConfig:
    """Return a config of the same class with small sizes that all differ, a large epsilon and few layers.

    One layer of each kind is kept (at least two layers), so that every per-layer list stays consistent; or all are.
    """
    values = config.to_dict()
    if not all_layers:
        _keep_some_layers(values, int(values.get(LAYERS) or getattr(config, LAYERS)))
    heads, kv_heads = get_size(config, HEADS), get_size(config, KV_HEADS)
    grouped = kv_heads is not None and heads is not None and 1 < kv_heads < heads
    sizes: dict[str, int] = {"vocab_size": 67, HIDDEN: 60, MLP: 44, HEADS: 6 if grouped else 5}
    if kv_heads is not None:
        sizes[KV_HEADS] = 3 if grouped else (1 if kv_heads == 1 else 5)
    sizes[HEAD_DIM] = 8
    if _has_per_frequency_lists(values):  # one factor per rotary frequency: head_dim and its quotient must stay
        sizes[HEAD_DIM] = head_dim_of(config) or 8
        sizes[HIDDEN] = sizes[HEADS] * sizes[HEAD_DIM]
    for name, most in _TINY_EXPERTS.items():
        if get_size(config, name):
            sizes[name] = min(most, values.get(name) or most)
    names = type(config).attribute_map
    for name, size in sizes.items():
        if name == HEAD_DIM or getattr(config, name, None) is not None:
            values[names.get(name, name)] = size
    for name, value in list(values.items()):
        if "eps" in name and isinstance(value, float):
            values[name] = 0.05  # large, so that a fold that changes the norms' epsilon can't pass
        if name.endswith("_token_id") and isinstance(value, int) and value >= 67:
            values[name] = 0
    return type(config).from_dict(values)


def _keep_some_layers(values: dict[str, Any], layers: int) -> None:
    """Keep the first layer of each kind, two at least, in `num_hidden_layers` and every list of that length."""
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == layers}
    kinds = [tuple(str(value[i]) for value in lists.values()) for i in range(layers)]
    chosen = sorted({kinds.index(kind) for kind in kinds})
    chosen = sorted({*chosen, *range(min(2, layers))}) if len(chosen) < 2 else chosen
    for name, value in lists.items():
        values[name] = [value[i] for i in chosen]
    values[LAYERS] = len(chosen)


def _has_per_frequency_lists(values: dict[str, Any]) -> bool:
    """Rotary scalings with one number per frequency tie the model to its head_dim."""
    rope = [values.get(name) for name in ("rope_parameters", "rope_scaling")]
    return any(isinstance(value, list) for item in rope if isinstance(item, dict) for value in item.values())


def random_model(model_class: type[PreTrainedModel], config: PretrainedConfig, seed: int = _SEED) -> PreTrainedModel:
    """Build a model with random weights, biases and norm weights, in fp32 on the CPU; zeros would hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the fp32 logits of a forward pass without a cache, in the weights' own dtype.

    The class' forward is called, since mixed-precision training wraps the instance's in autocast.
    """
    return type(model).forward(model, input_ids=input_ids, use_cache=False).logits.float()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def prove(model_class: type[PreTrainedModel], config: PretrainedConfig) -> Proof:
    """Prove every known structure for an architecture."""
    try:
        bench = _Bench(model_class, tiny_config(config))
    except Exception as error:  # model code may refuse the tiny sizes with any exception type
        reason = f"no tiny {model_class.__name__} could be built: {type(error).__name__}: {error}"
        return Proof({name: StructureProof(name, None, None, reason) for name in STRUCTURES})
    proofs = {name: bench.prove(name) for name in STRUCTURES}
    schemes = {name: proof.scheme for name, proof in proofs.items() if proof.scheme is not None}
    return Proof(proofs, bench.error_of(schemes) if schemes else None)


def prove_layers(model_class: type[PreTrainedModel], config: PretrainedConfig, others: Proof) -> StructureProof:
    """Prove that whole layers can be dropped, alone and together with the other proved structures."""
    try:
        bench = _Bench(model_class, narrow_windows(tiny_config(config, all_layers=True)))
        trial = LayerTrial(bench, logits_of, TOLERANCE)
        scheme, error = trial.find()
        schemes = {name: found.scheme for name, found in others.structures.items() if found.scheme is not None}
        if schemes:
            groups = bench.groups(schemes)
            joint = trial.joint_error(scheme, groups, _units_to_keep(groups, bench.config)[0])
            if joint > TOLERANCE:
                reason = (
                    f"together with {list(schemes)} the logits differ: relative error {joint:.1e} > {TOLERANCE:.0e}"
                )
                return StructureProof(LAYER_UNITS, None, joint, reason)
            error = max(error, joint)
        return StructureProof(LAYER_UNITS, scheme, error)
    except UnsupportedStructureError as error:
        return StructureProof(LAYER_UNITS, None, None, str(error))
    except Exception as error:  # model code may fail on a cut model with any exception type
        return StructureProof(LAYER_UNITS, None, None, f"{type(error).__name__}: {error}")


def proved_groups(
    model_class: type[PreTrainedModel], config: PretrainedConfig, layers: bool = False
) -> tuple[PruningGroups, Proof, AxisMap]:
    """Probe a model's config, prove its structures and return the groups of those that hold.

    Args:
        layers: whether to prove whole layers too, on a tiny model with as many of them.
    """
    proof = prove(model_class, config)
    if layers:
        proof = replace(proof, structures=proof.structures | {LAYER_UNITS: prove_layers(model_class, config, proof)})
    axis_map = probe_axes(model_class, config)
    structures, refused = {}, {}
    for name, found in proof.structures.items():
        if found.scheme is None:
            refused[name] = found.reason
            continue
        try:
            build = layer_groups if name == LAYER_UNITS else partial(build_groups, name)
            structures[name] = build(axis_map, config, found.scheme)
        except UnsupportedStructureError as error:
            refused[name] = str(error)
        if name in structures and structures[name].num_units < 2:
            refused[name] = "there is only one unit a layer"
            del structures[name]
    return PruningGroups(structures, refused), proof, axis_map


class _Bench:
    """A tiny random model on which schemes are tried."""

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
        self.model_class, self.config = model_class, config
        self.model = random_model(model_class, config)
        self.axis_map = probe_axes(model_class, config)
        generator = torch.Generator().manual_seed(_SEED)
        self.input_ids = torch.randint(3, config.get_text_config().vocab_size, (2, 12), generator=generator)
        self.logits = logits_of(self.model, self.input_ids)

    def prove(self, structure: str) -> StructureProof:
        best: float | None = None
        trials: dict[tuple[str, ...], _Trial] = {}
        try:
            shifts = _norm_shifts(structure, self.model, self.axis_map, self.config)
            for scheme in candidate_schemes(structure, self.axis_map, self.config, shifts):
                layouts = tuple(scheme.layouts.values())
                if layouts not in trials:
                    trials[layouts] = _Trial(self, {structure: scheme})
                error = trials[layouts].error_of({structure: scheme})
                if error <= TOLERANCE:
                    return StructureProof(structure, scheme, error)
                best = error if best is None else min(best, error)
        except UnsupportedStructureError as error:
            return StructureProof(structure, None, None, str(error))
        except Exception as error:  # model code may fail on a cut model with any exception type
            return StructureProof(structure, None, None, f"{type(error).__name__}: {error}")
        return StructureProof(
            structure, None, best, f"no layout reproduces the logits: best relative error {best:.1e} > {TOLERANCE:.0e}"
        )

    def error_of(self, schemes: dict[str, Scheme]) -> float:
        """Zero random units, cut them out, and return the relative error of the cut model's logits."""
        return _Trial(self, schemes).error_of(schemes)

    def groups(self, schemes: dict[str, Scheme]) -> PruningGroups:
        """Build the tiny model's groups."""
        return PruningGroups({n: build_groups(n, self.axis_map, self.config, scheme) for n, scheme in schemes.items()})


class _Trial:
    """One set of units of the tiny model, zeroed under fixed layouts, and the model that is cut to the others."""

    def __init__(self, bench: _Bench, schemes: dict[str, Scheme]) -> None:
        self.bench = bench
        groups = bench.groups(schemes)
        self.kept, small_config = _units_to_keep(groups, bench.config)
        zeroed = copy.deepcopy(bench.model)
        self.parameters = dict(zeroed.named_parameters())
        for name, structure in groups.structures.items():
            for layer, axis in structure.all_axes():
                pruned = torch.ones(structure.num_units, dtype=torch.bool)
                pruned[list(self.kept.kept[name][layer])] = False
                mask_(self.parameters[axis.parameter].data, axis, pruned)
        self.logits = logits_of(zeroed, bench.input_ids)
        if relative_error(self.logits, bench.logits) < 100 * TOLERANCE:
            raise UnsupportedStructureError("zeroing its units changes nothing, so no layout can be told from another")
        self.small = bench.model_class(small_config).float().eval()

    def error_of(self, schemes: dict[str, Scheme]) -> float:
        """Cut with the schemes' powers of c and compare logits."""
        load_cut(self.small, self.parameters, self.bench.groups(schemes), self.kept)
        return relative_error(logits_of(self.small, self.bench.input_ids), self.logits)


def _units_to_keep(groups: PruningGroups, config: PretrainedConfig) -> tuple[KeptUnits, PretrainedConfig]:
    """Choose random units to keep, about three of four, so many that the config class accepts the sizes."""
    counts = [_tiny_counts(structure.num_units) for structure in groups.structures.values()]
    error: HessoError | None = None
    for choice in itertools.product(*counts):
        sizes: dict[str, int] = {}
        for structure, count in zip(groups.structures.values(), choice, strict=True):
            sizes |= structure.config_sizes(count)
        try:
            small = resized_config(config, sizes)
        except HessoError as refusal:
            error = refusal
            continue
        generator = torch.Generator().manual_seed(_SEED + 1)
        kept = {}
        for (name, structure), count in zip(groups.structures.items(), choice, strict=True):
            layers = [torch.randperm(structure.num_units, generator=generator)[:count] for _ in structure.layers]
            kept[name] = tuple(tuple(sorted(layer.tolist())) for layer in layers)
        return KeptUnits({name: g.num_units for name, g in groups.structures.items()}, kept), small
    raise error or UnsupportedStructureError("there is only one unit a layer")


def _tiny_counts(units: int) -> list[int]:
    """List numbers of units to keep, multiples of four first: grouped expert kernels need rows of 16 bytes."""
    counts = [count for count in range(units - 1, 0, -1) if 0.5 <= count / units < 0.9]
    return sorted(counts, key=lambda count: count % 4 != 0)


def candidate_schemes(
    structure: str, axis_map: AxisMap, config: PretrainedConfig, shifts: dict[str, float]
) -> Iterator[Scheme]:
    """Yield schemes to try, the most common first: all layouts that the shapes allow times the powers of c."""
    axes = candidate_axes(structure, axis_map, config)
    kinds: dict[tuple[str, int], list[str]] = {}
    for (parameter, dim), layouts in axes.items():
        kinds[(axis_map.parameters[parameter].pattern, dim)] = list(layouts)
    infos = {axis_map.parameters[p].pattern: (axis_map.parameters[p], dim) for p, dim in axes}
    powers = _stream_powers(infos, axis_map) if structure == "embedding_channels" else _inner_powers(infos)
    for choice in itertools.product(*kinds.values()):
        for power in powers:
            yield Scheme(dict(zip(kinds, choice, strict=True)), shifts, power)


def _stream_powers(infos: dict[str, tuple[ParameterInfo, int]], axis_map: AxisMap) -> list[dict[str, int]]:
    """Powers of c for the residual stream, ordered by how far they are from a plain pre-norm model."""
    fixed: dict[str, int] = {}
    norms: list[str] = []
    finals: list[str] = []
    embeddings: list[str] = []
    readers: dict[str, list[str]] = {}
    for pattern, (info, dim) in infos.items():
        if info.role == "norm":
            (norms if info.layer else finals).append(pattern)
        elif info.role == "embedding":
            embeddings.append(pattern)
        elif info.role == "output":
            fixed[pattern] = 0
        elif info.role == "bias" or dim != len(info.shape) - 1:
            fixed[pattern] = 1  # a writer of the stream
        else:
            readers.setdefault(info.module.rpartition(".")[0].rpartition(".")[2], []).append(pattern)
    choices = []
    for ends, inner, read in itertools.product(
        [(1, -1), (1, -2), (0, -1), (0, -2), (1, 0), (0, 0), (1, -3)],
        itertools.product((-1, 0), repeat=len(norms)),
        itertools.product((0, -1), repeat=len(readers)),
    ):
        powers = fixed | dict(zip(norms, inner, strict=True))
        powers |= dict.fromkeys(embeddings, ends[0]) | dict.fromkeys(finals, ends[1])
        for group, power in zip(readers.values(), read, strict=True):
            powers |= dict.fromkeys(group, power)
        choices.append((inner.count(0) + 2 * read.count(-1), powers))
    choices.sort(key=lambda choice: choice[0])
    return [powers for _, powers in choices]


def _inner_powers(infos: dict[str, tuple[ParameterInfo, int]]) -> list[dict[str, int]]:
    """Powers of c inside a layer: none, or, where a norm runs over all units (q_norm over heads), 1/c on it."""
    norms = [pattern for pattern, (info, _) in infos.items() if info.role == "norm"]
    if not norms:
        return [{}]
    writers = [pattern for pattern, (info, dim) in infos.items() if info.role != "norm" and dim == 0]
    choices: list[dict[str, int]] = []
    for writes in itertools.product((1, 0), repeat=len(writers)):
        choices.append(dict.fromkeys(norms, -1) | dict(zip(writers, writes, strict=True)))
    return [{}, *choices]


def _norm_shifts(
    structure: str, model: PreTrainedModel, axis_map: AxisMap, config: PretrainedConfig
) -> dict[str, float]:
    """Find for each norm on the structure's axes whether w or 1 + w is used.

    Raises:
        UnsupportedStructureError: where a norm subtracts the mean over the units, since zeroed units count in it.
    """
    modules = dict(model.named_modules())
    if structure == "embedding_channels":
        _refuse_parameterless_layernorm(model, num_units(structure, config))
    shifts: dict[str, float] = {}
    for parameter, _ in candidate_axes(structure, axis_map, config):
        info = axis_map.parameters[parameter]
        if info.role == "norm" and info.pattern not in shifts:
            shifts[info.pattern] = _norm_shift(info, modules[info.module])
    return shifts


@torch.no_grad()
def _norm_shift(info: ParameterInfo, module: nn.Module) -> float:
    norm = copy.deepcopy(module)
    probe = torch.randn(2, 3, info.shape[0], generator=torch.Generator().manual_seed(_SEED))
    try:
        if _subtracts_mean(norm, probe):
            raise UnsupportedStructureError(
                f"{info.module} ({type(module).__name__}) subtracts the mean over all channels, pruned ones too"
            )
        weight = norm.get_parameter(info.name.rpartition(".")[2])
        for stored, shift in ((0.0, 0.0), (-1.0, 1.0)):
            weight.fill_(stored)
            if not norm(probe).any():
                return shift
    except UnsupportedStructureError:
        raise
    except Exception as error:  # a module may need more than the hidden states
        raise UnsupportedStructureError(
            f"{info.module} ({type(module).__name__}) can't be probed alone: {error}"
        ) from error
    raise UnsupportedStructureError(f"{info.module} ({type(module).__name__}) vanishes neither at w = 0 nor at w = -1")


def _subtracts_mean(norm: nn.Module, probe: torch.Tensor) -> bool:
    shifted = norm(probe + 3.0)
    return bool((shifted - norm(probe)).abs().max() < 1e-4 * shifted.abs().max())


@torch.no_grad()
def _refuse_parameterless_layernorm(model: PreTrainedModel, channels: int) -> None:
    """A norm without weights has no axis to find it by; try every such module whose name says norm."""
    probe = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(_SEED))
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and not list(module.parameters()) and not list(module.children()):
            try:
                subtracts = _subtracts_mean(module, probe)
            except Exception:  # it takes other inputs, so it isn't a norm of the stream
                subtracts = False
            if subtracts:
                raise UnsupportedStructureError(
                    f"{name} ({type(module).__name__}) subtracts the mean over all channels, pruned ones too"
                )
