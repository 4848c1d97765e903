"""Turning the stream: exact where it is proved, refused by name where something is tied to the given channels."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch

from hesso_hf.errors import UnsupportedStructureError
from hesso_hf.hf_models.tiny_configs import default_config
from hesso_hf.hf_models.tiny_model import logits_of, relative_error
from hesso_hf.structures.proof.turn import prove_turn
from hesso_hf.structures.shape_probe import probe_axes
from hesso_hf.structures.turn import StreamTurn, keeping_ones, random_rotation
from tests.support.checks import needs
from tests.support.moe import moe_model
from tests.support.tiny import HIDDEN, tiny_gpt2, tiny_llama, tiny_olmo, tiny_phi, tiny_phi3, token_batches

MODELS = {
    "llama": tiny_llama, "tied llama": lambda: tiny_llama(tie_word_embeddings=True), "phi3": tiny_phi3,
    "phi": tiny_phi, "gpt2": tiny_gpt2, "olmo": tiny_olmo, "mixtral": lambda: moe_model("mixtral"),
}  # fmt: skip
ALL = [list(range(HIDDEN))]


def known(model_type: str, *others: str):
    """Return a type as a parameter of a test, skipped where the installed Transformers is too old to have it."""
    return pytest.param(model_type, *others, marks=needs(model_type))


@functools.cache
def proved(kind: str):
    """Return a model's scheme, found once for all tests."""
    model = MODELS[kind]()
    scheme, error = prove_turn(type(model), model.config)
    assert error <= 1e-5
    return scheme


def turned(kind: str):
    """Return a model, its turn, and its logits; the last gain of a tied one is made uniform."""
    model = MODELS[kind]()
    turn = StreamTurn.of(
        proved(kind), probe_axes(type(model), model.config), model.get_input_embeddings().weight.shape[1]
    )
    if turn.tied_norm:
        with torch.no_grad():
            dict(model.named_parameters())[turn.tied_norm.scale].fill_(1.3)
    return model, turn, logits_of(model, token_batches(1)[0])


@pytest.mark.parametrize("kind", MODELS)
def test_a_turned_model_computes_the_same(kind: str):
    model, turn, expected = turned(kind)
    identities = [id(parameter) for parameter in model.parameters()]
    weights = copy.deepcopy(dict(model.named_parameters()))
    turn.turn_(dict(model.named_parameters()), random_rotation(turn.width, turn.centred, [[*range(turn.width)]], 5))
    assert relative_error(logits_of(model, token_batches(1)[0]), expected) <= 2e-6
    assert [id(parameter) for parameter in model.parameters()] == identities
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, weights[name])}
    assert {name for name, _ in turn.axes} <= moved
    for norm in turn.norms:
        assert torch.equal(dict(model.named_parameters())[norm.scale], torch.full((turn.width,), 1.0 - norm.shift))


@pytest.mark.parametrize("kind", MODELS)
def test_leaving_out_one_side_or_one_gain_is_noticed(kind: str):
    """So no part of a scheme is there for nothing."""
    model, turn, expected = turned(kind)
    rotation = random_rotation(turn.width, turn.centred, [[*range(turn.width)]], 5)

    def error_with(**changes) -> float:
        broken = copy.deepcopy(model)
        replace(turn, **changes).turn_(dict(broken.named_parameters()), rotation)
        return relative_error(logits_of(broken, token_batches(1)[0]), expected)

    for index, axis in enumerate(turn.axes):
        assert error_with(axes=turn.axes[:index] + turn.axes[index + 1 :]) > 1e-4, axis
    for index, norm in enumerate(turn.norms):
        assert error_with(norms=turn.norms[:index] + turn.norms[index + 1 :]) > 1e-4, norm


def test_where_the_mean_is_subtracted_another_rotation_is_wrong():
    model, turn, expected = turned("phi")
    assert turn.centred
    turn.turn_(dict(model.named_parameters()), random_rotation(HIDDEN, False, ALL, 5))
    assert relative_error(logits_of(model, token_batches(1)[0]), expected) > 1e-2


def test_a_rotation_keeps_the_ones_and_moves_channels_within_blocks_only():
    blocks = [[0, 3, 4, 9], [1, 2, 5, 6, 7, 8], [10]]
    rotation = random_rotation(11, True, blocks, 1)
    assert (rotation @ rotation.T - torch.eye(11)).abs().max() <= 1e-14
    assert (rotation @ torch.ones(11, dtype=torch.float64) - 1).abs().max() <= 1e-14
    for block in blocks:
        outside = [index for index in range(11) if index not in block]
        assert not rotation[block][:, outside].any()


def test_a_column_of_ones_beside_eigenvectors_would_not_do():
    vectors = torch.linalg.qr(torch.cat([torch.ones(6, 1), torch.randn(6, 5)], 1).double())[0][:, 1:]
    beside = torch.cat([torch.full((6, 1), 6**-0.5, dtype=torch.float64), vectors], 1)
    ones = torch.ones(6, dtype=torch.float64)
    assert (beside @ ones - ones).abs().max() > 0.1
    assert (keeping_ones(vectors) @ ones - ones).abs().max() <= 1e-14


def test_a_bias_beside_a_gain_of_zero_goes_into_the_readers_biases():
    model, turn, _ = turned("phi")
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for norm in turn.norms:
            parameters[norm.scale][7] = 0.0
    expected = logits_of(model, token_batches(1)[0])
    turn.turn_(parameters, random_rotation(HIDDEN, True, ALL, 5))
    assert relative_error(logits_of(model, token_batches(1)[0]), expected) <= 2e-6


def test_a_bias_beside_a_gain_of_zero_is_refused_where_readers_have_none_and_nothing_has_changed():
    class_, config = default_config("gpt_neox")
    config = type(config)(**(config.to_dict() | {
        "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 44, "num_hidden_layers": 2, "vocab_size": 67,
        "attention_bias": False,
    }))  # fmt: skip
    from hesso_hf.hf_models.tiny_model import random_model

    model = random_model(class_, config)
    scheme, _ = prove_turn(class_, config)
    turn = StreamTurn.of(scheme, probe_axes(class_, config), 48)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        parameters["gpt_neox.layers.1.input_layernorm.weight"][3] = 0.0
    before = copy.deepcopy(parameters)
    with pytest.raises(UnsupportedStructureError, match=r"layers.1.input_layernorm.weight has gains near zero"):
        turn.turn_(parameters, random_rotation(48, True, [list(range(48))], 5))
    assert all(torch.equal(before[name], parameters[name]) for name in before)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma2", r"post_attention_layernorm.weight scales channels of what is yet to be added"),
        ("olmo2", r"post_attention_layernorm.weight scales channels of what is yet to be added"),
        ("bloom", r"embedding channels aren't verified"),
        (
            "minimax",
            r"input_layernorm.weight or .*post_attention_layernorm.weight scales channels of the stream itself",
        ),
        known("axk1", r"post_mlp_layernorm.weight scales channels of what is yet to be added"),
        known("axk2", r"what .*input_layernorm.mlp.fc2.weight gives out scales the stream by channel"),
        known("qwen4_exp_text", r"hc_norm.weight scales copies of the stream by channel, .* reads their mixture"),
        known("inkling_text", r"embed_norm.weight scales channels of the stream itself"),
        known("doge", r"input_residual scales the stream by channel"),
        ("mllama", r"layers.1.input_layernorm.weight takes no part on text alone"),
        known("longcat_flash", r"input_layernorm.0.weight and .*input_layernorm.1.weight are alike"),
    ],
)
def test_what_keeps_a_class_to_its_given_basis_is_named(model_type: str, reason: str):
    with pytest.raises(UnsupportedStructureError, match=reason):
        prove_turn(*default_config(model_type))


@pytest.mark.parametrize(
    "model_type",
    [
        "phimoe", "cpmant", "gpt_neox_japanese", "jetmoe", "olmoe", "minicpm3",
        *map(known, ("deepseek_v32", "hy_v4", "dots3_note_text", "hrm_text")),
    ],
)  # fmt: skip
def test_what_gradients_and_names_do_not_tell_is_found(model_type: str):
    """Routers and indexers that choose, vectors that are added, copies of the stream, norms inside the attention."""
    model_class, config = default_config(model_type)
    if model_type == "hrm_text":
        config.num_layers_per_stack = 2  # of 16, each of which is run eight times
    scheme, error = prove_turn(model_class, config)
    assert error <= 1e-5
    assert scheme.norms or model_type == "hrm_text"  # whose norms have no gains


def test_whatever_a_turned_model_fails_with_is_a_refusal(monkeypatch: pytest.MonkeyPatch):
    def failing(*_: object) -> float:
        raise RuntimeError("sizes must match")

    monkeypatch.setattr("hesso_hf.structures.proof.turn.turn_error", failing)
    with pytest.raises(UnsupportedStructureError, match="RuntimeError: sizes must match"):
        prove_turn(type(tiny_llama()), tiny_llama().config)
