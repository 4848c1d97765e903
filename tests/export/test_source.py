"""Checkpoints are read with what lies beside the weights, and torch's files without trusting the pickle among them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from hesso_hf import export_pruned
from hesso_hf.bundled import bundled_model_path
from hesso_hf.errors import CheckpointMismatchError, HessoError
from hesso_hf.export.checkpoint_state import SHARDS_NAME
from hesso_hf.export.source import load_shards, read_source
from hesso_hf.structures.groups import KeptUnits
from tests.support.lora import tiny_lora
from tests.support.tiny import tiny_gemma2, tiny_llama
from tests.support.training import trainer


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


class OwnLlama(LlamaForCausalLM):
    """A class that Transformers doesn't have."""


REMEDY = r"go on with the run \(`resume_from_checkpoint`\).*`export_pruned\(model, ...\)`"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = tiny_gemma2(1).bfloat16()
    (tmp_path / SHARDS_NAME).mkdir()
    save({"model": model.state_dict()}, storage_writer=FileSystemWriter(tmp_path / SHARDS_NAME), no_dist=True)
    return tmp_path


def test_weights_are_read_in_their_dtype(checkpoint: Path) -> None:
    model = tiny_gemma2(1).bfloat16()
    found = load_shards(type(model), model.config, checkpoint)
    for (name, ours), theirs in zip(found.named_parameters(), model.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs), name


def test_a_pickle_that_wants_more_is_not_opened(checkpoint: Path, tmp_path: Path) -> None:
    model = tiny_gemma2(1)
    (checkpoint / SHARDS_NAME / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    with pytest.raises(CheckpointMismatchError, match=r"\.mkdir, which torch never writes there"):
        load_shards(type(model), model.config, checkpoint)
    assert not (tmp_path / "harm").exists()


@pytest.fixture
def with_processor(tmp_path: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    images = CLIPImageProcessor()
    LlavaProcessor(image_processor=images, tokenizer=tokenizer, patch_size=8).save_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def test_a_processor_is_read_whole(with_processor: Path) -> None:
    found = read_source(with_processor, None, None, None, trust_pickles=False).tokenizer
    assert isinstance(found, LlavaProcessor)
    assert found.image_processor.crop_size is not None


def test_a_processor_that_cannot_be_read_leaves_the_tokenizer(
    with_processor: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (with_processor / "processor_config.json").write_text('{"processor_class": "NoSuchProcessor"')
    found = read_source(with_processor, None, None, None, trust_pickles=False).tokenizer
    assert isinstance(found, PreTrainedTokenizerBase)
    assert f"the processor in {with_processor} can't be loaded" in caplog.text


@pytest.mark.parametrize("named", [True, False])
def test_a_model_of_an_own_class_is_not_read_by_another(named: bool, tmp_path: Path) -> None:
    model = OwnLlama(tiny_llama().config)
    if not named:
        model.__class__ = type("LlamaForCausalLM", (OwnLlama,), {})
    run = trainer(tmp_path / "run", model, max_steps=12, save_strategy="steps", save_steps=12)
    run.train()
    run.save_model(str(tmp_path / "small"))
    with pytest.raises(HessoError, match=rf"checkpoint-12'\).*isn't Transformers'.*{REMEDY}"):
        export_pruned(tmp_path / "run" / "checkpoint-12", tmp_path / "again")


def test_weights_of_an_own_class_are_refused_by_its_name_or_its_code(tmp_path: Path) -> None:
    OwnLlama(tiny_llama().config).save_pretrained(tmp_path / "named")
    with pytest.raises(HessoError, match=rf"named'\): its model is a OwnLlama, which Transformers doesn.t.*{REMEDY}"):
        read_source(tmp_path / "named", None, None, None, trust_pickles=False)
    stock = tiny_llama()
    stock.config.auto_map = {"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"}
    stock.save_pretrained(tmp_path / "code")
    assert read_source(tmp_path / "code", None, None, None, trust_pickles=False).model is not None  # loaded as stock
    (tmp_path / "code" / "modeling_own.py").touch()
    with pytest.raises(HessoError, match=rf"code'\): it brings the code .*modeling_own.LlamaForCausalLM.*{REMEDY}"):
        read_source(tmp_path / "code", None, None, None, trust_pickles=False)


def test_an_adapter_of_an_own_class_is_refused(tmp_path: Path) -> None:
    OwnLlama(tiny_llama().config).save_pretrained(tmp_path / "base")
    tiny_lora(OwnLlama.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(HessoError, match=rf"adapter'\): its model is a OwnLlama.*{REMEDY}"):
        read_source(tmp_path / "adapter", KeptUnits({}, {}), None, None, trust_pickles=False)
