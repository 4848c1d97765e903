"""`stream_basis` with LoRA: base and adapter are turned together; a checkpoint holds the turn, which is made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, export_pruned
from hesso_hf.errors import CheckpointMismatchError, HessoError, UnsupportedStructureError
from hesso_hf.hf_models.tiny_model import logits_of, relative_error
from hesso_hf.pruning import turn_stream
from hesso_hf.structures.lora import Adapters, base_of, dense_model, parameters_of
from hesso_hf.structures.turned_base import BASIS_NAME, HEALED_NAME
from tests.support.checks import check_equal
from tests.support.lora import LINEARS, tiny_lora
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_phi, token_batches
from tests.support.training import trainer

BATCHES = [{"input_ids": ids, "labels": ids} for ids in token_batches(20, shape=(4, 16))]
RATIO: dict[str, Any] = {
    "pruning_ratio": 0.3, "warmup_steps": 2, "pruning_steps": 5, "pruning_periods": 2, "saliency_batches": 2,
    "calibration_examples": 4, "stream_basis": "principal", "stream_basis_tolerance": 10.0,
}  # fmt: skip
MODELS = {
    "llama": lambda: tiny_lora(target_modules=LINEARS),
    "tied llama": lambda: tiny_lora(tiny_llama(tie_word_embeddings=True), target_modules=LINEARS),
    "embedding": lambda: tiny_lora(target_modules=["embed_tokens", "o_proj", "lm_head"]),
    "phi": lambda: tiny_lora(tiny_phi(), target_modules=["q_proj", "dense", "fc1", "fc2"]),
    "gpt2": lambda: tiny_lora(tiny_gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "head": lambda: tiny_lora(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_turned_model_with_adapters_computes_the_same_and_merges_to_the_same(kind: str) -> None:
    model = base_of(MODELS[kind]())
    before = {name: parameter.detach().clone() for name, parameter in parameters_of(model).items()}
    ids = token_batches(1)[0]
    expected = logits_of(model, ids)
    basis = turn_stream(model, BATCHES, tolerance=10.0)
    after = parameters_of(model)
    if "last_gain" in basis.tensors:  # the same model with its last gain made uniform
        reference = base_of(MODELS[kind]())
        (last,) = [name for name in after if name.endswith(("model.norm.weight", "ln_f.weight"))]
        with torch.no_grad():
            parameters_of(reference)[last].copy_(basis.tensors["last_gain"])
        expected = logits_of(reference, ids)
    assert relative_error(logits_of(model, ids), expected) <= 2e-6
    assert relative_error(logits_of(dense_model(model), ids), expected) <= 2e-6
    moved = {name for name in Adapters.of(model).factors() if not torch.equal(before[name], after[name])}
    assert any("lora_A" in name or "embedding" in name for name in moved)


RESUMED = {
    "llama": tiny_lora,
    "tied llama": lambda: tiny_lora(tiny_llama(tie_word_embeddings=True)),
    "trained head": lambda: tiny_lora(modules_to_save=["lm_head"]),
    "trained biases": lambda: tiny_lora(tiny_phi(), target_modules=["q_proj", "dense", "fc2"], bias="lora_only"),
}


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=pytest.mark.skipif(
        kind == "trained biases" and Version(peft.__version__) < Version("0.21"),
        reason="this peft doesn't load trained biases; the stock Trainer resumes without them too",
    )) for kind in RESUMED
])  # fmt: skip
def test_a_resumed_run_with_adapters_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    model, tied = RESUMED[kind], kind == "tied llama"
    config = HessoConfig(**RATIO)
    once = trainer(tmp_path / "once", model(), config)
    once.train()
    first = trainer(tmp_path / "twice", model(), config, save_strategy="steps", save_steps=4)
    first.train()
    folder = tmp_path / "twice" / "checkpoint-4"
    tensors = load_file(folder / BASIS_NAME)
    assert set(tensors) == ({"rotation", "last_gain"} if tied else {"rotation"})
    assert tensors["rotation"].dtype == torch.float64
    second = trainer(tmp_path / "twice", model(), config, save_strategy="no")
    second.train(resume_from_checkpoint=str(folder))
    assert second.hesso_run.basis == once.hesso_run.basis
    check_equal(second, once)

    rotation = tensors["rotation"][:, torch.randperm(60, generator=torch.Generator().manual_seed(1))].contiguous()
    save_file(tensors | {"rotation": rotation}, folder / BASIS_NAME)
    with pytest.raises(CheckpointMismatchError, match="which is frozen, differs"):
        trainer(tmp_path / "twice", model(), config).train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_from_just_before_a_scoring_holds_what_was_healed_in_the_base(tmp_path: Path) -> None:
    """By then frozen weights have gradients for a while, and are no less frozen."""
    config = HessoConfig(**RATIO | {"pruning_steps": 6})
    once = trainer(tmp_path / "once", tiny_lora(), config, save_strategy="steps", save_steps=1)
    once.train()
    periods = once.hesso_run.process.schedule.periods
    for step in range(periods[0].start + 1, periods[-1].end):
        assert (tmp_path / "once" / f"checkpoint-{step}" / HEALED_NAME).exists(), step
    folder = tmp_path / "once" / f"checkpoint-{periods[1].start}"  # the next step scores
    second = trainer(tmp_path / "twice", tiny_lora(), config)
    second.train(resume_from_checkpoint=str(folder))
    check_equal(second, once)


@pytest.mark.parametrize("lora_export", ["merged", "adapter"])
def test_the_small_model_is_the_one_that_was_trained(lora_export: str, tmp_path: Path) -> None:
    """From memory, and from a checkpoint, which holds the adapter and the turn, and names the base on disk."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = HessoConfig(**RATIO, lora_export=lora_export)
    run = trainer(tmp_path / "run", tiny_lora(base), config, save_strategy="steps", save_steps=12)
    run.train()
    run.save_model(str(tmp_path / "small"))
    ids = token_batches(1)[0]
    trained = logits_of(base_of(run.model).eval(), ids)
    assert relative_error(logits_of(loaded(tmp_path / "small"), ids), trained) <= 1e-5
    export_pruned(tmp_path / "run" / "checkpoint-12", tmp_path / "again")
    assert relative_error(logits_of(loaded(tmp_path / "again"), ids), trained) <= 1e-5


def loaded(folder: Path) -> Any:
    small = AutoModelForCausalLM.from_pretrained(folder)
    if (folder / "adapter").exists():
        from peft import PeftModel

        small = base_of(PeftModel.from_pretrained(small, folder / "adapter"))
    return small.eval()


def test_norms_that_are_trained_beside_the_adapter_are_refused() -> None:
    with pytest.raises(UnsupportedStructureError, match=r"norm\.weight is trained beside the adapter"):
        turn_stream(base_of(tiny_lora(modules_to_save=["norm"])), BATCHES)
    model = base_of(tiny_lora(tiny_phi(), target_modules=["q_proj"], bias="all"))
    with pytest.raises(UnsupportedStructureError, match=r"layernorm\.bias is trained beside the adapter"):
        turn_stream(model, BATCHES)


def test_a_base_below_fp32_may_cost_no_more_than_the_tolerance() -> None:
    def model() -> Any:
        return base_of(tiny_lora(tiny_llama().bfloat16()))

    with pytest.raises(HessoError, match=r"rounded to torch.bfloat16 cost too much: loss .* load the model in float32"):
        turn_stream(found := model(), BATCHES, tolerance=-1.0)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model().parameters(), strict=True))
    basis = turn_stream(found, BATCHES, tolerance=1.0)
    assert basis.rise != 0
    expected = logits_of(model(), ids := token_batches(1)[0])
    assert relative_error(logits_of(found, ids), expected) <= 0.05
