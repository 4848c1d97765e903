"""Loading: by every process, or without weights where FSDP2 will bring them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils import logging

from hesso_hf import export_pruned
from hesso_hf.errors import HessoError
from hesso_hf.hf_models.build import check_next_tokens, load_config
from hesso_hf.hf_models.loading import load_model
from hesso_hf.structures.groups import KeptUnits
from hesso_hf.structures.proof.prove import proved_groups
from tests.support.families import zero_pruned_
from tests.support.tiny import tiny_gpt2, tiny_llama

WAITING = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "RANK": "1",
}  # fmt: skip


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WAITING.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("family", ["tied", "untied"])
def test_a_process_that_waits_for_weights_has_everything_else(family: str, waiting: None, tmp_path: Path) -> None:
    model = tiny_gpt2(1) if family == "tied" else tiny_llama(1)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    model.save_pretrained(tmp_path)
    expected, found = (
        type(model).from_pretrained(tmp_path, dtype=torch.bfloat16),
        load_model(str(tmp_path), torch.bfloat16),
    )
    assert type(found) is type(expected)
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.generation_config.max_new_tokens == 7
    assert not found.training
    described = [
        {name: (p.shape, p.dtype, p.device, p.requires_grad) for name, p in each.named_parameters()}
        for each in (found, expected)
    ]  # tied ones are listed once
    assert described[0] == described[1]
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(buffer, buffers.pop(name)) for name, buffer in found.named_buffers())
    assert not buffers


def test_it_uses_no_memory_for_them(waiting: None, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, vocab_size=2000
    )
    model = LlamaForCausalLM(config)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    before = psutil.Process().memory_info().rss
    found = load_model(str(tmp_path), torch.float32)
    assert psutil.Process().memory_info().rss - before < 0.2 * size
    assert sum(parameter.numel() for parameter in found.parameters()) * 4 == size


@pytest.mark.parametrize("changes", [{"RANK": "0"}, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}, {"FSDP_VERSION": "1"}])
def test_others_read_them(
    changes: dict[str, str], waiting: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    model = tiny_llama(1)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path), torch.float32).lm_head.weight, model.lm_head.weight)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(HessoError, match=str(tmp_path)):
        load_model(str(tmp_path), torch.float32)


@pytest.mark.parametrize("shown", [True, False])
def test_no_bars_are_shown_while_weights_are_read_and_then_as_before(
    shown: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(1).save_pretrained(tmp_path)
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        capfd.readouterr()
        load_model(str(tmp_path), torch.float32)
        assert "Loading weights" not in capfd.readouterr().err
        assert logging.is_progress_bar_enabled() is shown
        LlamaForCausalLM.from_pretrained(tmp_path)
        assert ("Loading weights" in capfd.readouterr().err) is shown
    finally:
        logging.enable_progress_bar()


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, LlamaForSequenceClassification])
@pytest.mark.parametrize("waits", [False, True])
def test_a_model_whose_layers_differ_is_loaded_by_the_auto_class_of_its_kind(
    model_class: type, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_class(tiny_llama().config)
    groups = proved_groups(model_class, model.config, ("mlp_channels",))[0]
    kept = KeptUnits({"mlp_channels": 44}, {"mlp_channels": (tuple(range(40)), tuple(range(9, 31)))})
    zero_pruned_(model, groups, kept)
    model.save_pretrained(tmp_path / "dense")
    export_pruned(model, tmp_path / "small", groups=groups, kept_units=kept)
    for name, value in WAITING.items() if waits else ():
        monkeypatch.setenv(name, value)
    found = load_model(str(tmp_path / "small"), torch.float32, trust_remote_code=True)
    assert type(found).__name__ == f"Pruned{model_class.__name__}"
    assert [layer.mlp.up_proj.out_features for layer in found.model.layers] == [40, 22]
    dense = load_model(str(tmp_path / "dense"), torch.float32, trust_remote_code=True)
    assert type(dense) is model_class, "without code of its own it is the class that the config names"
    if model_class is LlamaForSequenceClassification:
        with pytest.raises(HessoError, match="loaded as AutoModelForSequenceClassification, which predicts no next to"):
            check_next_tokens(load_config(tmp_path / "small"), "small", "another")
