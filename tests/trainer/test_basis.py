"""`stream_basis`: turned before anything is measured, exact at the export, not again on resume, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.engines.deepspeed.engine import DeepSpeedEngine
from hesso_hf.errors import CheckpointMismatchError, HessoError
from hesso_hf.hf_models.tiny_model import logits_of, relative_error
from tests.support import shortened
from tests.support.tiny import tiny_gemma2, tiny_llama, tiny_phi, token_batches
from tests.support.training import trainer

RATIO: dict[str, Any] = {
    "pruning_ratio": 0.3, "warmup_steps": 2, "pruning_steps": 5, "pruning_periods": 2, "saliency_batches": 2,
    "calibration_examples": 4,
}  # fmt: skip


def whole(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("build", [tiny_llama, tiny_phi, lambda: tiny_llama(tie_word_embeddings=True)])
def test_a_run_in_the_principal_basis_starts_with_the_same_function_and_exports_exactly(build, tmp_path: Path):
    model, ids = build(), token_batches(1)[0]
    expected, given = logits_of(model, ids), whole(model)
    run = trainer(tmp_path, model, HessoConfig(**RATIO, stream_basis="principal", stream_basis_tolerance=10.0))
    run.create_optimizer()
    turned = whole(model)
    assert not torch.equal(turned["model.embed_tokens.weight"], given["model.embed_tokens.weight"])
    if not model.config.tie_word_embeddings:
        assert relative_error(logits_of(model, ids), expected) <= 2e-6
    run.train()
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    model.eval()
    assert relative_error(logits_of(small, ids), logits_of(model, ids)) <= 1e-5
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert report["stream_basis"]["tokens"] == 10 * math.ceil(shortened.TOKENS / 10)  # blocks of ten
    assert report["stream_basis"]["error"] <= 1e-5


def test_the_default_is_the_principal_basis_where_channels_go(tmp_path: Path):
    model = tiny_llama()
    given, ids = whole(model), token_batches(1)[0]
    logits = logits_of(model, ids)
    run = trainer(tmp_path, model, HessoConfig(**RATIO, target_sizes={"hidden_size": 48}))
    run.create_optimizer()
    assert not torch.equal(given["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert run.hesso_run.record()["stream_basis"]["clusters"] == 1
    assert relative_error(logits_of(model, ids), logits) <= 2e-6
    run.train()
    run.save_model(str(tmp_path / "small"))


@pytest.mark.parametrize(
    "given_up", [{"target_sizes": {"hidden_size": 60}}, {"structures": ["mlp_channels"]}], ids=["stays", "not pruned"]
)
def test_a_stream_that_keeps_its_channels_keeps_its_basis(given_up: dict[str, Any], tmp_path: Path, monkeypatch):
    model = tiny_llama()
    given, said = whole(model), []
    monkeypatch.setattr("hesso_hf.trainer.basis.logger.warning", said.append)
    run = trainer(tmp_path, model, HessoConfig(**RATIO, **given_up))
    run.create_optimizer()
    assert all(torch.equal(given[name], parameter) for name, parameter in model.named_parameters())
    assert run.hesso_run.record()["stream_basis"] is None
    assert said == []


def test_sizes_that_are_given_tell_beforehand_whether_to_turn(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hesso_hf.trainer.basis.turn_stream", lambda *args, **options: pytest.fail("turned"))
    given = {key: value for key, value in RATIO.items() if key != "pruning_ratio"}
    run = trainer(tmp_path, tiny_llama(), HessoConfig(**given, target_sizes={"intermediate_size": 28}))
    run.create_optimizer()
    assert run.hesso_run.basis is None


def test_a_resumed_run_is_not_turned_again(tmp_path: Path):
    config = HessoConfig(**RATIO, stream_basis="principal")
    once = trainer(tmp_path / "once", tiny_llama(), config)
    once.train()
    first = trainer(tmp_path / "twice", tiny_llama(), config, save_strategy="steps", save_steps=4)
    first.train()
    second = trainer(tmp_path / "twice", tiny_llama(), config, save_strategy="no")
    second.train(resume_from_checkpoint=str(tmp_path / "twice" / "checkpoint-4"))
    assert second.hesso_run.basis == once.hesso_run.basis
    for (name, found), parameter in zip(second.model.named_parameters(), once.model.parameters(), strict=True):
        assert torch.equal(found, parameter), name
    with pytest.raises(CheckpointMismatchError, match="stream_basis"):
        trainer(tmp_path / "other", tiny_llama(), HessoConfig(**RATIO, stream_basis="given")).train(
            resume_from_checkpoint=str(tmp_path / "twice" / "checkpoint-4")
        )


def test_what_cannot_be_turned_is_refused_by_name_or_stays_as_it_is(tmp_path: Path, monkeypatch):
    with pytest.raises(HessoError, match=r"`stream_basis` \('principal'\): .*post_attention_layernorm.* use 'auto'"):
        trainer(tmp_path, tiny_gemma2(), HessoConfig(**RATIO, stream_basis="principal")).create_optimizer()
    model = tiny_gemma2()
    given = whole(model)
    said: list[str] = []
    monkeypatch.setattr("hesso_hf.trainer.basis.logger.warning", said.append)
    trainer(tmp_path, model, HessoConfig(**RATIO, stream_basis="auto")).create_optimizer()
    assert all(torch.equal(given[name], parameter) for name, parameter in model.named_parameters())
    (warning,) = said
    assert warning.startswith("`stream_basis` ('auto'): the stream stays in its given basis: model.layers.0.post_att")
    only_heads = HessoConfig(**RATIO, structures=["attention_heads"], stream_basis="principal")
    with pytest.raises(HessoError, match="no channel of the stream is pruned"):
        trainer(tmp_path, tiny_llama(), only_heads).create_optimizer()


def test_a_model_that_zero_3_has_divided_already_is_not_turned(tmp_path: Path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("hesso_hf.trainer.basis.logger.warning", said.append)

    def begun(wanted: str) -> HessoTrainer:
        run = trainer(tmp_path, tiny_llama(), HessoConfig(**RATIO, stream_basis=wanted))
        next(run.model.parameters()).ds_id = 0
        run.hesso_engine = DeepSpeedEngine(run.args, run.accelerator, run.hesso_config)
        run.hesso_run.new_process()
        return run

    for wanted in ("auto", "given"):
        assert begun(wanted).hesso_run.basis is None
    (warning,) = said
    assert "stays in its given basis: the model was sharded by ZeRO-3 while it was loaded" in warning
    with pytest.raises(HessoError, match=r"`stream_basis` \('principal'\): .* sharded by ZeRO-3 .* use 'auto'"):
        begun("principal")


def test_a_tied_model_over_the_tolerance_is_refused_or_stays_as_it_is(tmp_path: Path, monkeypatch):
    strict: dict[str, Any] = {**RATIO, "stream_basis_tolerance": -1.0}
    with pytest.raises(HessoError, match="gains differ too much"):
        trainer(
            tmp_path, tiny_llama(tie_word_embeddings=True), HessoConfig(**strict, stream_basis="principal")
        ).create_optimizer()
    model = tiny_llama(tie_word_embeddings=True)
    given = whole(model)
    said: list[str] = []
    monkeypatch.setattr("hesso_hf.trainer.basis.logger.warning", said.append)
    run: HessoTrainer = trainer(tmp_path, model, HessoConfig(**strict, stream_basis="auto"))
    run.create_optimizer()
    assert "gains differ too much" in said[0]
    assert all(torch.equal(given[name], parameter) for name, parameter in model.named_parameters())
    assert run.hesso_plan.curves is not None
