"""Whether turning the stream is exact for an architecture: tried on its tiny model with a random rotation.

Which sides lie on the stream and what its norms are was settled when the embedding channels were proved; which weights
read a norm is told by gradients: where the norm lets nothing through, they have none.
"""

from __future__ import annotations

import copy

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import UnsupportedStructureError
from ...hf_models.tiny_model import SEED, logits_of, relative_error
from ..groups import AxisName, Scheme
from ..turn import NormScheme, StreamTurn, TurnScheme, random_rotation
from .bench import Bench
from .prove import Prover
from .residual_stream import StreamAxis
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
            proof = Prover(bench).prove(("attention_heads", "embedding_channels"))["embedding_channels"]
            if not isinstance(proof.scheme, Scheme):
                raise UnsupportedStructureError(f"its embedding channels aren't proved: {proof.reason}")
            scheme = turn_scheme(bench, proof.scheme)
            error = turn_error(bench, scheme)
    except UnsupportedStructureError:
        raise
    except Exception as failure:  # model code may fail on a turned model with any exception type
        raise UnsupportedStructureError(f"{type(failure).__name__}: {failure}") from failure
    if error > TOLERANCE:
        raise UnsupportedStructureError(f"turned logits differ: relative error {error:.1e} > {TOLERANCE:.0e}")
    return scheme, error


def turn_scheme(bench: Bench, channels: Scheme) -> TurnScheme:
    """Sort the sides that lie on the stream into what is turned and the norms whose gains are folded.

    Args:
        channels: the proved scheme of the embedding channels.

    Raises:
        UnsupportedStructureError: naming what keeps the stream to its given basis.
    """
    on_stream = {axis for branch in channels.branches for axis in branch.layouts}
    names = [
        (info.name, dim)
        for info in bench.axis_map.parameters.values()
        for dim in range(len(info.shape))
        if (info.pattern, dim) in on_stream
    ]
    known, after = bench.stream(names)
    offsets = {axis.info.module: axis.pattern for axis in known if axis.vector.kind == "offset"}
    scales = [axis for axis in known if axis.vector.kind == "scale"]
    for axis in known:
        _refuse_by_channel(axis, offsets, after)
    read = _readers(bench, known, channels, scales, offsets)
    norms: list[NormScheme] = []
    tied: NormScheme | None = None
    for axis in scales:
        norm = NormScheme(axis.pattern, offsets.get(axis.info.module, ""), axis.vector.shift, read[axis.pattern])
        if norm.readers:
            norms.append(norm)
        elif bench.tied and not axis.info.layer and tied is None:
            tied = norm
        else:
            raise UnsupportedStructureError(f"nothing that lies on the stream reads {axis.info.name} alone")
    axes = tuple((axis.pattern, axis.dim) for axis in known if axis.vector.kind == "other")
    return TurnScheme(axes, tuple(norms), tied, any(a.vector.subtracts_mean for a in scales) or bool(channels.centred))


def _refuse_by_channel(axis: StreamAxis, offsets: dict[str, str], after: set[str]) -> None:
    """Refuse what scales or shifts the stream channel by channel, which no rotation commutes with."""
    if axis.vector.kind == "scale" and axis.info.module in after:
        raise UnsupportedStructureError(f"{axis.info.name} scales channels of what is yet to be added to the stream")
    alone = axis.vector.kind == "other" and len(axis.info.shape) == 1 and axis.info.role != "bias"
    if alone or (axis.info.role == "other" and len(axis.info.shape) > 1):
        raise UnsupportedStructureError(f"{axis.info.name} scales the stream by channel")


def _readers(
    bench: Bench, known: list[StreamAxis], channels: Scheme, scales: list[StreamAxis], offsets: dict[str, str]
) -> dict[str, tuple[AxisName, ...]]:
    """Return, per gain's pattern, the matrices that have no gradient where its norms let nothing through."""
    readers = [
        axis for axis in known
        if axis.info.role in ("matrix", "output") and axis.side != "out" and channels.powers.get(axis.pattern, 0) <= 0
    ]  # fmt: skip
    found: dict[str, tuple[AxisName, ...]] = {}
    dead = _without_gradients(bench, {})
    for scale in scales:
        closed = {scale.pattern: -scale.vector.shift}
        if scale.info.module in offsets:
            closed[offsets[scale.info.module]] = 0.0
        read = _without_gradients(bench, closed) - dead
        found[scale.pattern] = tuple(
            (axis.pattern, axis.dim) for axis in readers
            if axis.info.kind == scale.info.kind  # a last norm that lets nothing through closes everything before it
            and axis.pattern in read
        )  # fmt: skip
    return found


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
