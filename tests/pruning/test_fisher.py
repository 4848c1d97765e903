"""Errors behind a matrix count by how much the model minds them."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from hesso_hf.pruning import fisher, reading
from hesso_hf.pruning.fisher import DAMPING, TOKENS, OutputFisher, output_fisher
from hesso_hf.pruning.healing import Healer
from hesso_hf.pruning.readers import readers_of
from hesso_hf.structures.lora import base_of
from tests.pruning.test_healing import CHANNELS, bound_to, none_of, tokens
from tests.support.lora import tiny_lora
from tests.support.tiny import tiny_llama


def readers(model: Any) -> dict[str, torch.nn.Module]:
    return {f"{index}.down_proj": layer.mlp.down_proj for index, layer in enumerate(model.model.layers)}


def gradients(model: Any, examples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return output_fisher(model, examples, readers(model)).rows


def test_gradients_are_those_of_labels_drawn_from_the_model() -> None:
    model, examples = tiny_llama(seed=3).eval(), list(tokens(rows=3)["input_ids"].split(1))
    found, generator = gradients(model, examples), torch.Generator().manual_seed(0)
    outputs: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, __, output: outputs.append(output))
    for row, example in enumerate(examples):
        logits = model(input_ids=example).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        wanted = torch.autograd.grad(loss, outputs[-1])[0][0]
        rows = found["1.down_proj"][row * len(wanted) : (row + 1) * len(wanted)]
        assert float((rows - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_weights_random_state_and_gradients_that_stand_are_left_alone() -> None:
    model = tiny_llama(seed=3)
    model(**tokens(), labels=tokens()["input_ids"]).loss.backward()
    stood = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    state, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    gradients(model, list(tokens()["input_ids"].split(1)))
    assert all(torch.equal(gradient, stood[name]) for name, gradient in gradients_of(model).items())
    assert len(stood) == len(list(model.parameters()))
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("adapters", [False, True], ids=["frozen", "lora"])
def test_a_frozen_model_has_the_same_gradients(adapters: bool) -> None:
    model, examples = tiny_llama(seed=3).eval(), list(tokens(rows=2)["input_ids"].split(1))
    wanted = gradients(model, examples)
    frozen: Any = tiny_llama(seed=3).eval().requires_grad_(False)
    if adapters:
        frozen = base_of(tiny_lora(frozen, target_modules=["down_proj"]).eval())
        for parameter in (p for p in frozen.parameters() if p.requires_grad):
            parameter.data.zero_()
    found = gradients(frozen, examples)
    assert all(torch.equal(found[name], rows) for name, rows in wanted.items())


def test_gradients_that_are_not_finite_are_left_out() -> None:
    model, examples = tiny_llama(seed=3).eval(), list(tokens(rows=2)["input_ids"].split(1))
    module = model.model.layers[0].mlp.down_proj
    module.register_forward_hook(lambda _, __, output: output.register_hook(lambda g: g * float("nan")) and None)
    found = output_fisher(model, examples, readers(model))
    assert found.rows.keys() == found.norms.keys() == {"1.down_proj"}


def test_of_many_tokens_about_as_many_are_kept_as_are_wanted() -> None:
    model = tiny_llama()
    batch = tokens(rows=40, length=60)
    rows = gradients(model, list(batch["input_ids"].split(1)))["0.down_proj"]
    assert TOKENS / 2 < len(rows) < 1.3 * TOKENS


def test_of_the_other_tokens_the_norms_are_kept_in_their_order() -> None:
    model, batch = tiny_llama(seed=3).eval(), tokens(rows=90, length=24)
    few = output_fisher(model, list(batch["input_ids"][:2].split(1)), readers(model))
    many = output_fisher(model, list(batch["input_ids"].split(1)), readers(model))
    for name, rows in few.rows.items():
        assert float((few.norms[name] - rows.norm(dim=1)).abs().max()) < 1e-6
        assert len(many.norms[name]) == 90 * 24 > 1.5 * len(many.rows[name])
        assert float((many.norms[name][:48] - few.norms[name]).abs().max()) < 1e-6


def test_squared_norms_by_column_are_what_the_fisher_information_says() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    rows = torch.randn(30, 7, generator=generator, dtype=torch.float64)
    minded = OutputFisher({"a": rows}).of_errors("a", weight)
    damped = rows.T @ rows / 30
    damped += DAMPING * damped.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    assert float((minded.T @ minded - weight.T @ damped @ weight).abs().max()) < 1e-12
    assert OutputFisher().of_errors("a", weight) is weight


def test_a_token_counts_by_the_norm_of_its_gradient() -> None:
    norms = torch.tensor([0.0, 1.0, 3.0, 4.0], dtype=torch.float64)
    scale = OutputFisher(norms={"a": norms}).scale_of("a", 4)
    assert scale is not None
    assert float((scale.square() - (norms / 2 + DAMPING) / (1 + DAMPING)).abs().max()) < 1e-12
    assert OutputFisher(norms={"a": norms}).scale_of("a", 3) is None
    assert OutputFisher().scale_of("a", 4) is None


@torch.no_grad()
def test_a_unit_that_says_what_nothing_reads_costs_little() -> None:
    model: Any = tiny_llama(seed=5)
    model.model.norm.weight[0] = 0.0  # the last layer's writing to this channel of the stream is lost
    down = model.model.layers[-1].mlp.down_proj.weight
    down[:, 4] = 0.0
    down[0, 4] = 1.0  # the norm's mean square still reads it a little
    down[:, :4] *= 0.3
    bound = bound_to(model)
    costs = Healer(model, tokens()).costs(bound, none_of(bound))[CHANNELS][-1]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Healer, "fisher", lambda *_: OutputFisher())
        alike = Healer(model, tokens()).costs(bound, none_of(bound))[CHANNELS][-1]
    rank, before = int((costs < costs[4]).sum()), int((alike < alike[4]).sum())
    assert rank == 0 < before, (rank, before)


def test_a_model_without_logits_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    healer = Healer(model.model, tokens())
    found = readers_of(model, bound_to(model))
    with caplog.at_level(logging.WARNING, "hesso_hf"), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Healer, "readers", lambda *_: found)
        assert healer.fisher(bound_to(model)) == OutputFisher()
    assert f"reaches {len(found)} of {len(found)} matrices of LlamaModel, such as model.layers.0" in caplog.text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "a backward pass of 24 tokens, beside what training holds, doesn't",
        ),
        (NotImplementedError("no derivative"), "of LlamaForCausalLM failed (NotImplementedError: no derivative)"),
    ],
    ids=["memory", "model"],
)
def test_where_no_gradients_can_be_had_errors_count_alike_and_a_warning_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(reading, "output_fisher", fail)
    model = tiny_llama()
    with caplog.at_level(logging.WARNING, "hesso_hf"):
        assert Healer(model, tokens()).fisher(bound_to(model)) == OutputFisher()
    assert "errors count alike, whatever the token and output: " in caplog.text
    assert told in caplog.text


@pytest.mark.parametrize("labels", [1, 3])
def test_classes_and_a_number_have_gradients_too(labels: int) -> None:
    config = LlamaConfig(**tiny_llama().config.to_dict() | {"num_labels": labels, "pad_token_id": 0})
    model = LlamaForSequenceClassification(config).eval()
    found = gradients(model, list(tokens(rows=2)["input_ids"].split(1)))
    assert all(bool(rows.any()) and bool(rows.isfinite().all()) for rows in found.values())


def test_behind_an_answer_to_the_whole_example_every_token_is_in_the_sums() -> None:
    """In the last layer only the last token has a gradient, which taking every n-th token would miss."""
    config = LlamaConfig(**tiny_llama().config.to_dict() | {"num_labels": 3, "pad_token_id": 0})
    model = LlamaForSequenceClassification(config).eval()
    batch = tokens(rows=2 * TOKENS // 8, length=8)
    examples = list(batch["input_ids"].split(1))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fisher, "TOKENS", 8 * len(examples))
        exact = gradients(model, examples)
    found = gradients(model, examples)
    for name, rows in found.items():
        assert len(rows) == len(exact[name]) / 2
        information = [each.T @ each / len(each) for each in (rows, exact[name])]
        assert float((information[0] - information[1]).norm() / information[1].norm()) < 0.15, name
    bound = bound_to(model)
    assert Healer(model, batch).costs(bound, none_of(bound))[CHANNELS].isfinite().all()


def test_examples_of_one_length_share_a_pass_and_find_what_each_alone_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gradient that nothing is drawn for, of rows of several lengths in any order."""
    model, passes = tiny_llama(seed=3).eval(), []
    ids = tokens(rows=7)["input_ids"]
    examples = [row[None, : (12, 5, 12, 9, 5, 12, 12)[index]] for index, row in enumerate(ids)]
    monkeypatch.setattr(fisher, "_by_drawn_labels", lambda logits, _: logits.detach().softmax(-1))
    model.register_forward_pre_hook(lambda *_, **kwargs: passes.append(1))
    found = {}
    for together in (1, 24):
        monkeypatch.setattr(fisher, "TOGETHER", together)
        passes.clear()
        found[together] = output_fisher(model, examples, readers(model))
        assert len(passes) == (7 if together == 1 else 4), "two and two of twelve, two of five, one of nine"
    for name, norms in found[1].norms.items():
        assert float((found[24].norms[name] - norms).abs().max()) < 1e-6 * float(norms.max())
        alone, shared = (each.rows[name].T @ each.rows[name] for each in (found[1], found[24]))
        assert float((shared - alone).abs().max()) < 1e-6 * float(alone.abs().max())


def test_a_classifier_that_cannot_tell_where_rows_end_reads_them_singly() -> None:
    config = LlamaConfig(
        vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, num_labels=5, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    found = output_fisher(model, list(tokens(rows=3)["input_ids"].split(1)), readers(model))
    assert len(found.norms["1.down_proj"]) == tokens(rows=3)["input_ids"].numel()
