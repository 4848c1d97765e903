"""Models that aren't causal decoders: classifiers, encoders and encoder-decoders are pruned as far as they prove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, TrainingArguments

from hesso_hf import HessoConfig, HessoTrainer, export_pruned
from hesso_hf.hf_models.tiny_configs import tiny_config
from hesso_hf.hf_models.tiny_model import logits_of, random_model
from hesso_hf.structures.proof.prove import prove
from tests.support.checks import propagated

TASKS = {  # class, config fields, ratio, structures that hold
    "classifier": (
        "Qwen2ForSequenceClassification",
        {},
        0.3,
        {"attention_heads", "mlp_channels", "embedding_channels"},
    ),
    "encoder": ("BertForSequenceClassification", {}, 0.2, {"mlp_channels"}),
    "encoder-decoder": (
        "T5ForConditionalGeneration",
        {"decoder_start_token_id": 0, "pad_token_id": 0},
        0.3,
        {"attention_heads", "mlp_channels", "embedding_channels"},
    ),
}


def tiny(name: str, fields: dict[str, Any]) -> PreTrainedModel:
    model_class = getattr(transformers, name)
    return random_model(model_class, tiny_config(model_class, model_class.config_class(**fields)))


@pytest.mark.parametrize(("name", "fields", "ratio", "structures"), TASKS.values(), ids=TASKS)
def test_a_trained_model_of_another_task_is_saved_smaller_and_loads_in_its_stock_class(
    name: str,
    fields: dict[str, Any],
    ratio: float,
    structures: set[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    model = tiny(name, fields)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 67, (16, 12), generator=generator).tolist()
    labels = [row % 2 for row in range(16)] if "Classification" in name else ids
    before = sum(parameter.numel() for parameter in model.parameters())
    args = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="steps", save_steps=6, learning_rate=1e-3,
    )  # fmt: skip
    config = HessoConfig(pruning_ratio=ratio, warmup_steps=1, pruning_steps=2, pruning_periods=1)
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    with propagated(caplog):
        trainer = HessoTrainer(model=model, args=args, train_dataset=data, hesso_config=config)
        assert set(trainer.hesso_plan.groups.structures) == structures
        trainer.train()
    assert f"no replay: {name} writes no text" in caplog.text
    assert ("nothing is healed: it knows one stack" in caplog.text) == (name == "T5ForConditionalGeneration")
    trainer.save_model(str(tmp_path / "small"))
    small = type(model).from_pretrained(tmp_path / "small").eval()
    after = sum(parameter.numel() for parameter in small.parameters())
    assert after == pytest.approx((1 - ratio) * before, rel=0.05)
    inputs = torch.tensor(ids[:2])
    trained, found = logits_of(model.eval(), inputs), logits_of(small, inputs)
    assert (found - trained).abs().max() <= 1e-5 * trained.abs().max()
    if name == "Qwen2ForSequenceClassification":  # the proof that an export begins with takes long for the others
        assert export_pruned(tmp_path / "checkpoint-6", tmp_path / "exported").parameters_after == after


def test_a_model_that_gives_its_hidden_states_out_keeps_their_width():
    model = tiny("LlamaModel", {})
    proved = prove(type(model), model.config).structures
    assert proved["mlp_channels"].scheme is not None
    assert "gives these channels out" in proved["embedding_channels"].reason
