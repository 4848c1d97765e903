"""The principal basis: sums over what the norms see, its rotation, a tied model's last gain, the whole turn."""

from __future__ import annotations

import copy
import dataclasses
from unittest import mock

import pytest
import torch

from hesso_hf.errors import HessoError, UnsupportedStructureError
from hesso_hf.hf_models.tiny_model import logits_of, relative_error
from hesso_hf.pruning.basis import gain_clusters, principal_rotation, stream_covariance, turn_of, turn_stream
from hesso_hf.structures.proof import turn
from tests.support.tiny import HIDDEN, tiny_gpt2, tiny_llama, tiny_phi, token_batches

BATCHES = [{"input_ids": ids, "labels": ids} for ids in token_batches(20, shape=(4, 16))]


@pytest.mark.parametrize("build", [tiny_llama, tiny_phi])
def test_the_sum_is_over_the_inputs_of_all_norms_without_padding(build):
    model = build()
    ids = BATCHES[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    turn = turn_of(model)[0]
    found, tokens = stream_covariance(model, turn, [{"input_ids": ids, "attention_mask": mask}])
    states = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert tokens == int(mask.sum())
    seen: list[torch.Tensor] = [states[0], *([states[1]] if len(states) > 2 else [])]  # inputs of the layers
    for layer in model.model.layers if build is tiny_llama else ():
        caught: list[torch.Tensor] = []
        handle = layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, into=caught: into.append(args[0])
        )
        model(input_ids=ids, attention_mask=mask)
        handle.remove()
        seen += caught
    caught = []
    last = model.model.norm if build is tiny_llama else model.model.final_layernorm
    handle = last.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(input_ids=ids, attention_mask=mask)
    handle.remove()
    expected = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
    for state in (*seen, caught[0]):
        rows = state.detach()[mask.bool()].double()
        rows = rows - rows.mean(1, keepdim=True) if build is tiny_phi else rows
        rows = rows / rows.square().mean(1, keepdim=True).sqrt()
        expected += rows.T @ rows
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("centred", [False, True])
def test_the_rotation_diagonalises_each_block_largest_first(centred: bool):
    numbers = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    numbers -= numbers.mean(1, keepdim=True) if centred else 0.0
    total = numbers.T @ numbers
    blocks = [[0, 5, 7, 8, 11], [1, 2, 3, 4, 6, 9, 10]]
    rotation = principal_rotation(total, centred, blocks)
    assert (rotation.T @ rotation - torch.eye(12)).abs().max() <= 1e-13
    assert torch.equal(rotation, principal_rotation(total.clone(), centred, blocks))
    if centred:
        assert (rotation.sum(1) - 1).abs().max() <= 1e-13
        return
    turned = rotation.T @ total @ rotation
    for block in blocks:
        inner = turned[block][:, block]
        assert (inner - inner.diagonal().diag()).abs().max() <= 1e-10
        assert (inner.diagonal().diff() <= 1e-10).all()


def test_clusters_hold_like_gains_and_far_ones_are_alone():
    gain = torch.tensor([1.0, 1.01, 2.0, 2.02, 0.99, 1.98, -7.0, 1.5, 30.0], dtype=torch.float64)
    found = gain_clusters(gain, 3)
    assert sorted(map(sorted, found)) == [[0, 1, 4], [2, 3, 5], [6], [7], [8]]
    assert gain_clusters(torch.ones(5), 4) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("build", [tiny_llama, tiny_phi, tiny_gpt2, lambda: tiny_llama(tie_word_embeddings=True)])
def test_a_turned_model_computes_the_same_and_its_first_channels_hold_most(build):
    model = build()
    turn = turn_of(model)[0]
    ids = token_batches(1)[0]
    expected = logits_of(model, ids)
    reference = copy.deepcopy(model)
    basis = turn_stream(model, BATCHES, tolerance=10.0)
    if turn.tied_norm:  # the same model with its last gain made uniform
        gain = dict(model.named_parameters())[turn.tied_norm.scale]
        with torch.no_grad():
            dict(reference.named_parameters())[turn.tied_norm.scale].copy_(gain)
        assert 1 < basis.clusters < HIDDEN
        expected = logits_of(reference, ids)
    assert relative_error(logits_of(model, ids), expected) <= 2e-6
    total, tokens = stream_covariance(model, turn, BATCHES)
    assert tokens == basis.tokens == 20 * 64
    along = total.diagonal()
    given = stream_covariance(reference, turn, BATCHES)[0].diagonal()
    if not turn.tied_norm:
        assert float(along.topk(15).values.sum() / along.sum()) > float(given.topk(15).values.sum() / given.sum()) + 0.1
        assert basis.energy["0.25"] == pytest.approx(float(along.topk(15).values.sum() / along.sum()), abs=1e-3)


def test_what_the_norms_see_is_summed_without_logits_or_a_loss():
    model, heads = tiny_llama(), list[str]()
    turn = turn_of(model)[0]
    expected = stream_covariance(model, turn, BATCHES)[0]
    model.lm_head.register_forward_pre_hook(lambda *_: heads.append("head"))
    assert torch.equal(stream_covariance(model, turn, BATCHES)[0], expected)
    assert not heads
    norm = model.model.norm  # one that lies beside the head is run into
    model.model.norm, model.norm = torch.nn.Identity(), norm
    model.lm_head.register_forward_pre_hook(lambda head, args: (norm(args[0]),))
    names = {name: name.replace("model.norm", "norm") for name in (part.scale for part in turn.norms)}
    norms = tuple(dataclasses.replace(part, scale=names[part.scale]) for part in turn.norms)
    beside = dataclasses.replace(turn, norms=norms)
    assert torch.equal(stream_covariance(model, beside, BATCHES)[0], expected)


def test_too_few_tokens_are_warned_of(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("hesso_hf.pruning.basis.logger.warning", said.append)
    turn_stream(tiny_llama(), BATCHES[:1])
    assert "basis (60 channels) is measured on only 64 tokens" in said[0]


def test_a_tied_model_whose_gains_differ_too_much_stays_as_it_is():
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(HessoError, match=r"gains differ too much .*`clusters` \(1\)"):
        turn_stream(model, BATCHES, clusters=1, tolerance=-1.0)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert model.training is False


def test_a_tied_model_needs_a_loss():
    with pytest.raises(HessoError, match="`labels`"):
        turn_stream(tiny_llama(tie_word_embeddings=True), [{"input_ids": BATCHES[0]["input_ids"]}])
    untied = tiny_llama()
    assert turn_stream(untied, [{"input_ids": BATCHES[0]["input_ids"]}]).clusters == 1


def test_what_turning_costs_is_measured_on_some_batches_spread_over_all(monkeypatch):
    monkeypatch.setattr("hesso_hf.pruning.basis.LOSS_TOKENS", 640)
    read: list[int] = []

    def loss(model, batch):
        read.append(id(batch))
        return model(**batch).loss

    basis = turn_stream(tiny_llama(tie_word_embeddings=True), BATCHES, tolerance=9.0, loss=loss)
    assert basis.tokens == 20 * 64
    assert read == 2 * [id(batch) for batch in BATCHES[::2]]


def test_what_is_refused_for_its_gains_keeps_the_last_gain_too():
    """A tied model's gain is made uniform only when nothing else can be in the way."""
    model = tiny_gpt2()
    parameters = dict(model.named_parameters())
    turn = turn_of(model)[0]
    with torch.no_grad():
        parameters[turn.norms[0].scale][5] = 0.0
    broken = {name: None for name, _ in turn.norms[0].readers}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hesso_hf.structures.turn._bias_of", lambda name, *_: broken.get(name))
        with pytest.raises(UnsupportedStructureError, match="gains near zero"):
            turn_stream(model, BATCHES, tolerance=10.0)
    assert all(torch.equal(before[name], parameter) for name, parameter in parameters.items())


def test_a_basis_of_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(
        "hesso_hf.pruning.basis.stream_covariance", lambda *_: (torch.zeros(HIDDEN, HIDDEN).double(), 64)
    )
    with pytest.raises(HessoError, match="no norm of the stream was given hidden states"):
        turn_stream(tiny_llama(), BATCHES)


def test_a_process_proves_once_how_a_class_with_a_config_is_turned() -> None:
    with mock.patch.object(turn, "prove_turn", wraps=turn.prove_turn) as proved:
        found = [turn_of(tiny_llama(intermediate_size=size)) for size in (43, 43, 46)]
    assert proved.call_count == 2
    assert found[0] is found[1]
