"""Residual stream: the likeliest powers of c come first, few are tried, and gradients tell what reads and writes it."""

from __future__ import annotations

import itertools
from functools import cache

import pytest

from hesso_hf.hf_models.build import model_class_of
from hesso_hf.hf_models.tiny_configs import default_config, tiny_config
from hesso_hf.structures.build import moving_axes
from hesso_hf.structures.groups import Scheme
from hesso_hf.structures.proof.bench import Bench
from hesso_hf.structures.proof.norms import norms_after_writers
from hesso_hf.structures.proof.residual_stream import (
    DEVIATIONS,
    MOST_CANDIDATES,
    Sides,
    StreamAxis,
    _deviating,
    stream_axes,
    stream_powers,
    writing_modules,
)
from hesso_hf.structures.proof.result import TOLERANCE
from hesso_hf.structures.proof.schemes import stream_schemes
from hesso_hf.structures.proof.tiny_case import covering_config
from tests.support.families import ALL, STREAM


@cache
def bench(name: str) -> Bench:
    config = ALL[name].config()
    return Bench(model_class_of(config), tiny_config(model_class_of(config), config))


def first_guess(name: str) -> Scheme:
    found = bench(name)
    return next(stream_schemes(found, moving_axes(STREAM, found.axis_map)))


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-tied",
        "llama-biases",
        "olmo2",
        "exaone4",
        "granite",
        "phi",
        "olmo",
        "cohere2",
        "mixtral",
    ],
)
def test_the_first_guess_is_right(name: str):
    assert bench(name).error_of({STREAM: first_guess(name)}) <= TOLERANCE


@pytest.mark.parametrize(
    "model_type",
    [
        "jetmoe",  # a bias of the whole block
        pytest.param("zaya", marks=pytest.mark.slow),  # biases on both sides of the residual connection
    ],
)
def test_the_first_guess_is_right_where_more_than_writers_lie_along_the_stream(model_type: str):
    model_class, config = default_config(model_type)
    found = Bench(model_class, tiny_config(model_class, config))
    guess = next(stream_schemes(found, moving_axes(STREAM, found.axis_map)))
    assert found.error_of({STREAM: guess}) <= TOLERANCE


def test_an_embedding_that_the_model_scales_by_its_width_deviates_in_two_places():
    """Gemma: sqrt(hidden_size) gives c already, so the final norm takes 1/c once although the matrix is tied."""
    found = bench("gemma2")
    schemes = stream_schemes(found, moving_axes(STREAM, found.axis_map))
    usual = next(schemes).powers
    right = next(scheme for scheme in schemes if found.error_of({STREAM: scheme}) <= TOLERANCE).powers
    changed = {pattern: right[pattern] for pattern in usual if usual[pattern] != right[pattern]}
    assert changed == {"model.embed_tokens.weight": 0, "model.norm.weight": -1}


def written(name: str) -> dict[str, int]:
    """The powers of the first guess, by the parameter's name within its layer."""
    return {pattern.rpartition("*.")[2]: power for pattern, power in first_guess(name).powers.items()}


def test_the_powers_of_a_pre_norm_model():
    powers = written("llama")
    writers = {"model.embed_tokens.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"}
    assert {name for name, power in powers.items() if power == 1} == writers
    assert {name for name, power in powers.items() if power == -1} == norms
    assert {power for name, power in powers.items() if name not in writers | norms} == {0}
    assert written("llama-tied")["model.norm.weight"] == -2


def test_the_powers_of_a_post_norm_model():
    powers = written("olmo2")
    readers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert {powers[f"{name}.weight"] for name in readers} == {-1}
    assert powers["post_attention_layernorm.weight"] == powers["post_feedforward_layernorm.weight"] == 0


def test_offsets_of_norms_are_never_scaled():
    powers = written("phi")
    assert (powers["input_layernorm.weight"], powers["input_layernorm.bias"]) == (-1, 0)
    assert (powers["model.final_layernorm.weight"], powers["model.final_layernorm.bias"]) == (-1, 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("phi", {"embed_tokens.weight", "dense.weight", "dense.bias", "fc2.weight", "fc2.bias"}),
        ("olmo", {"embed_tokens.weight", "o_proj.weight", "down_proj.weight"}),
        ("llama", set()),
        ("gemma2", set()),
        ("olmo2", set()),
    ],
)
def test_what_writes_to_a_stream_is_centred_only_where_norms_subtract_its_mean(name: str, expected: set[str]):
    assert {".".join(pattern.split(".")[-2:]) for pattern in first_guess(name).centred} == expected


def guesses(name: str, centred: bool) -> tuple[list[dict[str, int]], list[StreamAxis]]:
    found = bench(name)
    axes = stream_axes(found.model, found.axis_map, moving_axes(STREAM, found.axis_map))
    after = norms_after_writers(found.model, found.input_ids, writing_modules(axes))
    return list(stream_powers(axes, after, found.tied, centred)), axes


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "olmo2"])
def test_what_deviates_in_fewer_places_is_tried_first_and_no_more_than_so_many(name: str):
    powers, axes = guesses(name, centred=False)
    middle = len(powers) // 2  # the first guess and what deviates from it, then the second
    assert 100 < middle <= MOST_CANDIDATES
    place = {axis.pattern: axis.reader_group for axis in axes if axis.info.role == "matrix" and axis.side == "in"}
    place |= {axis.pattern: "the ends" for axis in axes if not axis.info.layer}
    for half in (powers[:middle], powers[middle:]):
        usual, places = half[0], []
        for guess in half:
            changed = [pattern for pattern, power in guess.items() if power != usual[pattern]]
            places.append(len({place.get(pattern, pattern) for pattern in changed}))
        assert places == sorted(places)
        assert places[:2] == [0, 1]
        assert places[-1] == DEVIATIONS
        assert len({tuple(sorted(guess.items())) for guess in half}) == len(half)


def test_readers_of_one_block_deviate_together():
    powers, _ = guesses("llama", centred=False)
    prefix = "model.layers.*.self_attn."
    for guess in itertools.islice(powers, 100):
        assert len({guess[f"{prefix}{name}_proj.weight"] for name in "qkv"}) == 1


def test_a_centred_stream_has_no_second_guess():
    powers, _ = guesses("phi", centred=True)
    assert len(powers) <= MOST_CANDIDATES
    assert len(guesses("phi", centred=False)[0]) > len(powers)


def test_no_more_than_so_many_are_tried_however_many_places_there_are():
    found = list(_deviating([[{f"norm {i}": power} for power in (0, 1, -1)] for i in range(40)]))
    assert len(found) == MOST_CANDIDATES
    assert set(found[0].values()) == {0}
    assert all(sum(map(bool, guess.values())) == 1 for guess in found[1:81])


def test_a_norm_of_the_embedding_gives_the_stream_out():
    """Inkling: what the embedding's norm gives is c times what it gave, as the stream wants it; the last takes 1/c."""
    model_class, config = default_config("inkling_text")
    found = Bench(model_class, covering_config(model_class, config))
    first = next(stream_schemes(found, moving_axes(STREAM, found.axis_map)))
    assert found.error_of({STREAM: first}) <= TOLERANCE
    powers = first.powers
    assert powers["model.embed_tokens.weight"] == 1
    assert powers["model.embed_tokens.embed_norm.weight"] == 0
    assert powers["model.norm.weight"] == -1


Found = tuple[Sides, list[StreamAxis]]


@cache
def found(model_type: str) -> Found:
    model_class, config = default_config(model_type)
    bench = Bench(model_class, covering_config(model_class, config))
    axes = moving_axes(STREAM, bench.axis_map)
    known, after = bench.stream(axes)
    return bench.sides(axes, after), known


@cache
def powers(model_type: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return the powers of the first guess and those that are right, by the name within a layer."""
    model_class, config = default_config(model_type)
    bench = Bench(model_class, covering_config(model_class, config))
    schemes = stream_schemes(bench, moving_axes(STREAM, bench.axis_map))
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
