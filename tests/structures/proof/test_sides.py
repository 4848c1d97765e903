"""Sides: by gradients, what reads the stream, what writes to it, what gates it, and which weights read a norm."""

from __future__ import annotations

from functools import cache

import pytest

from hesso_hf.hf_models.tiny_config import default_config
from hesso_hf.structures.groups import moving_axes
from hesso_hf.structures.proof.prove import TOLERANCE, _Bench
from hesso_hf.structures.proof.residual_stream import StreamAxis
from hesso_hf.structures.proof.sides import Sides
from hesso_hf.structures.proof.tiny_case import covering_config
from tests.support.families import STREAM

Found = tuple[Sides, list[StreamAxis]]


@cache
def found(model_type: str) -> Found:
    model_class, config = default_config(model_type)
    bench = _Bench(model_class, covering_config(model_class, config))
    axes = moving_axes(STREAM, bench.axis_map)
    known, after = bench.stream(axes)
    return bench._sides(axes, after), known


@cache
def powers(model_type: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return the powers of the first guess and those that are right, by the name within a layer."""
    model_class, config = default_config(model_type)
    bench = _Bench(model_class, covering_config(model_class, config))
    schemes = bench._stream_schemes(moving_axes(STREAM, bench.axis_map))
    first = next(schemes)
    right = next(scheme for scheme in schemes if bench.error_of({STREAM: scheme}) <= TOLERANCE)
    return by_name(first.powers), by_name(right.powers)


def by_name(powers: dict[str, int]) -> dict[str, int]:
    return {name_of(pattern): power for pattern, power in powers.items()}


def name_of(pattern: str) -> str:
    parts = pattern.split(".")
    return ".".join(parts[3:]) if pattern.startswith("model.layers.") else pattern


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("mixtral", {"mlp.experts.gate_up_proj": "in", "mlp.experts.down_proj": "out", "mlp.gate.weight": "in"}),
        # what has no module of its own, reads the stream without a norm's weight, and is alone in its module
        ("hy_v4", {"attn_hc.fn": "in", "ffn_hc.fn": "in", "model.hc_head.hc_fn": "in"}),
        # one number for each channel of what a block writes
        ("inkling_text", {"attn_sconv.conv1d.weight": "in", "mlp.shared_experts.down_proj": "out"}),
    ],
)
def test_fused_weights_get_their_side(model_type: str, expected: dict[str, str]) -> None:
    _, known = found(model_type)
    assert {name: {a.side for a in known if name_of(a.pattern) == name} for name in expected} == {
        name: {side} for name, side in expected.items()
    }


def test_what_reads_a_norm_is_found() -> None:
    sides, known = found("longcat_flash")
    places = [[by_name(option) for option in place] for place in sides.read_norms(known)]
    norms = ["input_layernorm.*.weight", "post_attention_layernorm.*.weight"]
    readers = [
        ["self_attn.*.q_a_proj.weight", "self_attn.*.kv_a_proj_with_mqa.weight"],
        [
            "mlp.experts.gate_up_proj", "mlp.router.classifier.weight",
            "mlps.*.gate_proj.weight", "mlps.*.up_proj.weight",
        ],
    ]  # fmt: skip
    assert places == [
        [{norm: -1} | dict.fromkeys(mine, 0), {norm: 0} | dict.fromkeys(mine, -1)]
        for norm, mine in zip(norms, readers, strict=True)
    ]


def test_a_norm_that_an_identity_expert_passes_on_takes_nothing_and_what_reads_it_does() -> None:
    first, right = powers("longcat_flash")
    assert {name: power for name, power in right.items() if first[name] != power} == {
        "post_attention_layernorm.*.weight": 0,
        "mlp.experts.gate_up_proj": -1,
        "mlp.router.classifier.weight": -1,
        "mlps.*.gate_proj.weight": -1,
        "mlps.*.up_proj.weight": -1,
    }


def test_gates_of_what_is_read_take_nothing() -> None:
    sides, known = found("qwen4_exp_text")
    (place,) = sides.inner(known)
    ups = {"attn_hyper_connection.input_mix_weight_up.weight", "mlp_hyper_connection.input_mix_weight_up.weight"}
    ups |= {"model.hyper_connection_mixer.input_mix_weight_up.weight"}
    assert [by_name(option) for option in place] == [dict.fromkeys(ups, 1), dict.fromkeys(ups, 0)]


def test_a_plain_model_has_no_gates() -> None:
    sides, known = found("mixtral")
    assert sides.inner(known) == []
