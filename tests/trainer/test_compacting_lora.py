"""A run with adapters whose frozen base becomes the smaller one when pruning ends; on disk it stays as large."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hesso_hf import HessoConfig, HessoTrainer, export_pruned
from hesso_hf.hf_models.tiny_model import logits_of
from hesso_hf.structures.lora import Adapters, base_of, num_parameters, parameters_of
from tests.support.lora import RANK, tiny_lora
from tests.support.tiny import tiny_llama, tiny_phi
from tests.support.training import hesso_config, logged, trainer
from tests.trainer.test_compacting import END, checkpoint

# All that changes a frozen base: it is turned, healed and cut.
CHANGED = {"stream_basis": "principal", "healing": "auto", "saliency": "reconstruction", "calibration_examples": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(seed=4, tie_word_embeddings=False).save_pretrained(folder)
    return folder


def made(folder: Path, base: Path, config: HessoConfig | None = None, lora: Any = None, **changes: Any) -> HessoTrainer:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
    tuned: Any = tiny_lora(model, **(lora or {}))
    return trainer(folder, tuned, config or hesso_config(compact="end", **CHANGED), **changes)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    run = made(tmp_path_factory.mktemp("whole"), base, save_strategy="steps", save_steps=1)
    run.train()
    return run


@pytest.fixture(scope="module")
def masked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    run = made(tmp_path_factory.mktemp("masked"), base, hesso_config(compact="never", **CHANGED))
    run.train()
    return run


def test_the_base_and_its_adapters_become_smaller_and_the_loss_goes_on(
    whole: HessoTrainer, masked: HessoTrainer
) -> None:
    ours, theirs = logged(whole, "loss"), logged(masked, "loss")
    assert ours[:END] == theirs[:END]
    assert abs(ours[END] - theirs[END]) < 1e-5
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.02
    model = base_of(whole.model)
    assert num_parameters(model) == whole.hesso_plan.target.parameters_after < num_parameters(base_of(masked.model))
    down = model.model.layers[0].mlp.down_proj
    assert (down.in_features, down.out_features) == (28, 48)
    assert (down.lora_A.default.in_features, down.lora_B.default.out_features) == (28, 48)
    assert down.lora_A.default.weight.shape == (RANK, 28)
    trained = {id(parameter) for group in whole.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in whole.model.parameters() if parameter.requires_grad}
    for name in Adapters.of(model).factors():
        state = whole.hesso_engine.steps.base.state[parameters_of(model)[name]]
        assert state["exp_avg"].shape == parameters_of(model)[name].shape


def test_checkpoints_after_the_cut_say_that_they_are_adapters_of_the_smaller_model(whole: HessoTrainer) -> None:
    smaller = "adapter of the smaller model"
    for step, holds in ((END - 1, "dense"), (END, smaller), (12, smaller)):
        folder = checkpoint(whole, step)
        assert json.loads((folder / "hesso_state.json").read_text())["holds"] == holds
        card = (folder / "README.md").read_text()
        assert ("# A dense model, not the smaller one" in card) == (holds == "dense")
        assert ("# An adapter of the smaller model, in training" in card) == (holds != "dense")
        assert "which plain `from_pretrained` loads, and" not in card
    with pytest.raises(RuntimeError, match="size mismatch"):  # as the card says
        PeftModel.from_pretrained(tiny_llama(seed=4, tie_word_embeddings=False), folder)


@pytest.mark.parametrize("step", [END - 1, END, 10])
def test_interrupted_equals_uninterrupted(whole: HessoTrainer, base: Path, step: int, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(whole, step), tmp_path / f"checkpoint-{step}")
    again = made(tmp_path, base)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    ours, theirs = parameters_of(base_of(again.model)), parameters_of(base_of(whole.model))
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    assert logged(again, "loss")[-1] == logged(whole, "loss")[-1]


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_the_saved_model_is_the_trained_one_whoever_saves_it(whole: HessoTrainer, form: str, tmp_path: Path) -> None:
    report = export_pruned(checkpoint(whole, 12), tmp_path / "exported", lora_export=form)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert report.to_dict()["parameters"]["before"] == tiny_llama(tie_word_embeddings=False).num_parameters()
    assert (small.config.hidden_size, small.config.intermediate_size) == (48, 28)
    tuned = base_of(PeftModel.from_pretrained(small, tmp_path / "exported" / "adapter")) if form == "adapter" else small
    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    wanted = logits_of(base_of(whole.model), ids)
    assert float((logits_of(tuned, ids) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    if form == "merged":
        whole.save_model(str(tmp_path / "saved"))
        files = [load_file(tmp_path / name / "model.safetensors") for name in ("saved", "exported")]
        assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, {}),
        ({}, {"gradient_checkpointing": True, "bf16": True}),
    ],
    ids=["embeddings and a trained copy", "checkpointed gradients"],
)
def test_other_adapters_and_settings(lora: Any, changes: Any, base: Path, tmp_path: Path) -> None:
    run = made(tmp_path, base, hesso_config(compact="end"), lora, **changes)
    run.train()
    assert base_of(run.model).config.hidden_size == 48
    run.save_model(str(tmp_path / "small"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.hidden_size == 48


def test_dropped_layers_take_their_adapters_with_them(base: Path, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "intermediate_size": 28}
    config = hesso_config(compact="end", structures=["layers", "mlp_channels"], target_sizes=sizes)
    run = made(tmp_path, base, config, save_strategy="steps", save_steps=12)
    run.train()
    assert len(base_of(run.model).model.layers) == 1
    run.save_model(str(tmp_path / "small"))
    exported = export_pruned(checkpoint(run, 12), tmp_path / "again").to_dict()
    assert exported["sizes"]["after"]["num_hidden_layers"] == 1
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("small", "again")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


def test_a_base_in_half_precision_stays_in_it(base: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    run = trainer(tmp_path, tiny_lora(model), hesso_config(compact="end", healing="auto"))  # type: ignore[arg-type]
    run.train()
    small = base_of(run.model)
    assert small.config.hidden_size == 48
    dtypes = {name: parameter.dtype for name, parameter in parameters_of(small).items()}
    assert {dtypes[name] for name in Adapters.of(small).factors()} == {torch.float32}
    assert dtypes["model.layers.0.mlp.down_proj.weight"] == torch.bfloat16


def test_what_was_centred_in_the_base_is_the_same_on_resuming(tmp_path: Path) -> None:
    """Where norms subtract the mean, frozen weights are centred step by step, which rounds otherwise than at once."""
    tiny_phi(seed=4).save_pretrained(tmp_path / "base")

    def run(folder: Path, **changes: Any) -> HessoTrainer:
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = hesso_config(compact="end", healing="auto")
        tuned: Any = tiny_lora(model, target_modules=["q_proj", "fc2"])
        return trainer(folder, tuned, config, **changes)

    first = run(tmp_path / "first", save_strategy="steps", save_steps=END)
    first.train()
    again = run(tmp_path / "first")
    again.train(resume_from_checkpoint=str(checkpoint(first, END)))
    theirs = parameters_of(base_of(first.model))
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in parameters_of(base_of(again.model)).items())
    assert base_of(again.model).config.hidden_size == 48
