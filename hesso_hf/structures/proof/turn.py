"""Whether turning the stream is exact for an architecture: tried on its tiny model with a random rotation.

Which sides lie on the stream and what its norms are was settled when the embedding channels were proved; which weights
read a norm is told by gradients: where the norm lets nothing through, they have none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...distributed.parts import stock_class
from ...errors import UnsupportedStructureError
from ...hf_models.tiny_model import SEED, logits_of, relative_error
from ..build import num_units
from ..groups import AxisName, Scheme
from ..shape_probe import probe_axes
from ..turn import NormScheme, StreamTurn, TurnScheme, random_rotation
from .bench import Bench
from .cache import Case, cached
from .prove import REMEMBERED, Prover
from .residual_stream import StreamAxis, block_of
from .result import TOLERANCE
from .tiny_case import covering_config


def prove_turn(model_class: type[PreTrainedModel], config: PretrainedConfig) -> tuple[TurnScheme, float]:
    """Find out how an architecture's stream is turned, and the relative error of a turned tiny model's logits.

    Raises:
        UnsupportedStructureError: with the reason why another basis isn't exact, or can't be had.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():  # whatever the caller's numbers and mode are
            torch.manual_seed(SEED)
            bench = Bench(model_class, covering_config(model_class, config))
            proof = Prover(bench).prove_stream()
            if not isinstance(proof.scheme, Scheme):
                raise UnsupportedStructureError(f"its embedding channels aren't verified: {proof.reason}")
            scheme = turn_scheme(bench, proof.scheme)
            error = turn_error(bench, scheme)
            gates = _gates(bench, proof.scheme) if error > TOLERANCE else []
    except UnsupportedStructureError:
        raise
    except Exception as failure:  # model code may fail on a turned model with any exception type
        raise UnsupportedStructureError(f"{type(failure).__name__}: {failure}") from failure
    if error > TOLERANCE:
        if gates:
            raise UnsupportedStructureError(f"what {gates[0]} gives out scales the stream by channel")
        raise UnsupportedStructureError(f"turned logits differ: relative error {error:.1e} > {TOLERANCE:.0e}")
    return scheme, error


def turn_of(model: PreTrainedModel) -> tuple[StreamTurn, float]:
    """Prove how the stream of a model's class is turned, and name the model's parameters; with the proof's error.

    What was proved isn't proved again, as for `proved_groups`.

    Raises:
        UnsupportedStructureError: with the reason why it isn't.
    """
    return _remembered(Case.of(stock_class(model), model.config))


@lru_cache(maxsize=REMEMBERED)
def _remembered(case: Case) -> tuple[StreamTurn, float]:
    scheme, error = cached(case, ("the stream's turn",), lambda: prove_turn(case.model_class, case.config))
    axis_map = probe_axes(case.model_class, case.config)
    return StreamTurn.of(scheme, axis_map, num_units("embedding_channels", axis_map.sizes)), error


def turn_scheme(bench: Bench, channels: Scheme) -> TurnScheme:
    """Sort the sides that lie on the stream into what is turned and the norms whose gains are folded.

    Args:
        channels: the proved scheme of the embedding channels.

    Raises:
        UnsupportedStructureError: naming what keeps the stream to its given basis.
    """
    known, after = bench.stream(_on_stream(bench, channels))
    offsets = {axis.info.module: axis.pattern for axis in known if axis.vector.kind == "offset"}
    scales = [axis for axis in known if axis.vector.kind == "scale"]
    for axis in known:
        _refuse_by_channel(axis, channels.powers.get(axis.pattern, 0), axis.info.module in after)
    ends = [axis for axis in scales if not axis.info.layer]
    for axis in ends if len(ends) > 1 else ():  # the last norm and those of embeddings
        if channels.powers.get(axis.pattern, 0) >= 0:
            raise UnsupportedStructureError(f"{axis.info.name} scales channels of the stream itself")
    read = _readers(bench, known, channels.powers, scales, offsets)
    norms: list[NormScheme] = []
    tied: NormScheme | None = None
    for axis in scales:
        norm = NormScheme(axis.pattern, offsets.get(axis.info.module, ""), axis.vector.shift, read[axis.pattern])
        if norm.readers:
            norms.append(norm)
        elif bench.tied and not axis.info.layer and tied is None:
            tied = norm
        else:
            _refuse_by_channel(axis, channels.powers.get(axis.pattern, 0), after=True)
            raise UnsupportedStructureError(f"nothing that lies on the stream reads {axis.info.name} alone")
    gains = {axis.info.module for axis in scales}
    of_norms = {axis.pattern for axis in known if axis.vector.kind != "other" and axis.info.module in gains}
    axes = tuple((axis.pattern, axis.dim) for axis in known if axis.pattern not in of_norms)
    return TurnScheme(axes, tuple(norms), tied, any(a.vector.subtracts_mean for a in scales) or bool(channels.centred))


def _refuse_by_channel(axis: StreamAxis, power: int, after: bool) -> None:
    """Refuse what scales the stream channel by channel, which no rotation commutes with.

    Args:
        power: of c, that the parameter takes where channels are removed; 1 is what is added to the stream.
        after: whether what a block writes goes through its module.
    """
    name, role = axis.info.name, axis.info.role
    if axis.vector.kind == "scale" and after and power >= 0:
        raise UnsupportedStructureError(f"{name} scales channels of what is yet to be added to the stream")
    vector = axis.vector.kind == "other" and role != "bias" and (len(axis.info.shape) == 1 or role == "other")
    if vector and power <= 0:
        raise UnsupportedStructureError(f"{name} scales the stream by channel")


def _on_stream(bench: Bench, channels: Scheme) -> list[AxisName]:
    """List the sides of parameters that lie along the stream."""
    found = {axis for branch in channels.branches for axis, layout in branch.layouts.items() if layout.per_unit}
    return [
        (info.name, dim)
        for info in bench.axis_map.parameters.values()
        for dim in range(len(info.shape))
        if (info.pattern, dim) in found
    ]


def _gates(bench: Bench, channels: Scheme) -> list[str]:
    """Name the matrices with a row for each channel that don't write to the stream."""
    known, _ = bench.stream(_on_stream(bench, channels))
    rows = [axis for axis in known if axis.info.role == "matrix" and axis.side == "out"]
    return [axis.info.name for axis in rows if channels.powers.get(axis.pattern, 0) == 0]


def _readers(
    bench: Bench, known: list[StreamAxis], powers: Mapping[str, int], scales: list[StreamAxis], offsets: dict[str, str]
) -> dict[str, tuple[AxisName, ...]]:
    """Return, per gain's pattern, the matrices that have no gradient where its norms let nothing through.

    Where that doesn't tell, as of routers and indexers that choose, they read what the rest of their block reads.

    Raises:
        UnsupportedStructureError: where it is several norms.
    """
    readers = [
        axis for axis in known
        if axis.info.role in ("matrix", "output") and axis.side != "out" and powers.get(axis.pattern, 0) <= 0
    ]  # fmt: skip
    dead = _without_gradients(bench, {})
    infos = {scale.pattern: scale.info for scale in scales}
    found: dict[str, set[str]] = {axis.pattern: set() for axis in readers}
    for scale in scales:
        if scale.pattern in dead:
            raise UnsupportedStructureError(f"{scale.info.name} takes no part on text alone: what reads it isn't told")
        closed = {scale.pattern: -scale.vector.shift}
        if scale.info.module in offsets:
            closed[offsets[scale.info.module]] = 0.0
        read = _without_gradients(bench, closed) - dead
        for axis in readers:  # a last norm that lets nothing through closes everything before it
            if axis.info.kind == scale.info.kind and axis.pattern in read and _may_read(axis, scale, powers):
                found[axis.pattern].add(scale.pattern)
    for axis in readers:
        others = [found[other.pattern] for other in readers if block_of(other) == block_of(axis)]
        clear = {pattern for norms in others if len(norms) == 1 for pattern in norms}
        if (axis.pattern in dead or len(found[axis.pattern]) > 1) and len(clear) == 1:
            found[axis.pattern] = clear
        if len(norms := sorted(found[axis.pattern])) > 1:
            raise UnsupportedStructureError(
                f"{infos[norms[0]].name} or {infos[norms[1]].name} scales channels of the stream itself, or of what is "
                f"yet to be added to it: {axis.info.name} reads both"
            )
        if norms and infos[norms[0]].shape[0] != axis.info.shape[axis.dim]:
            raise UnsupportedStructureError(
                f"{infos[norms[0]].name} scales copies of the stream by channel, {axis.info.name} reads their mixture"
            )
    return {s.pattern: tuple((a.pattern, a.dim) for a in readers if s.pattern in found[a.pattern]) for s in scales}


def _may_read(axis: StreamAxis, scale: StreamAxis, powers: Mapping[str, int]) -> bool:
    """Tell by the powers of c whether a matrix reads what a norm gives out, or the stream as it is."""
    return axis.info.role == "output" or powers.get(axis.pattern, 0) + powers.get(scale.pattern, 0) == -1


def _without_gradients(bench: Bench, closed: dict[str, float]) -> set[str]:
    """Return the patterns none of whose parameters has a gradient, with some patterns set to a value."""
    probe = bench.gradients
    patterns = {name: info.pattern for name, info in bench.axis_map.parameters.items()}
    with probe.undone():
        for name, parameter in probe.parameters.items():
            if patterns[name] in closed:
                parameter.fill_(closed[patterns[name]])
        vanished = probe.vanished((name, 0) for name, parameter in probe.parameters.items() if parameter.dim())
    return set(patterns.values()) - {patterns[name] for (name, _), mask in vanished.items() if not mask.all()}


def turn_error(bench: Bench, scheme: TurnScheme) -> float:
    """Turn the tiny model by a random rotation and return the relative error of its logits."""
    model = copy.deepcopy(bench.model)
    parameters = dict(model.named_parameters())
    width = bench.width
    turn = StreamTurn.of(scheme, bench.axis_map, width)
    blocks = [list(range(width))]
    if turn.tied_norm:  # a gain that is uniform within two clusters, as it must be made first
        blocks = [list(range(width // 3)), list(range(width // 3, width))]
        with torch.no_grad():
            for value, block in zip((0.7, 1.6), blocks, strict=True):
                parameters[turn.tied_norm.scale][block] = value
    expected = logits_of(model, bench.input_ids)
    turn.turn_(parameters, random_rotation(width, turn.centred, blocks, SEED))
    return relative_error(logits_of(model, bench.input_ids), expected)
