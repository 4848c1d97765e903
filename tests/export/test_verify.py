"""Verification: what is compared is computed in fp32, whatever a run allows for its speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hesso_hf import export_pruned
from hesso_hf.errors import VerificationError
from hesso_hf.hf_models.tiny_model import logits_of, relative_error
from tests.support.lora import lora_run
from tests.support.tf32 import tf32
from tests.support.tiny import tiny_llama, token_batches
from tests.support.training import hesso_config, trainer


def test_logits_that_tensor_cores_round_differ_by_more_than_a_comparison_allows():
    model, (ids,) = tiny_llama(), token_batches(1)
    exact = logits_of(model, ids)
    with tf32(), torch.no_grad():
        assert relative_error(model(input_ids=ids).logits, exact) > 2e-4
        assert torch.equal(logits_of(model, ids), exact)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_a_run_with_tf32_is_exported(tmp_path: Path):
    with tf32():
        run = trainer(tmp_path)
        run.train()
        run.save_model(str(tmp_path / "small"))
    assert run.pruning_report is not None
    assert run.pruning_report.verification.fold_error < 1e-5


@pytest.mark.parametrize("way", ["merged", "adapter"])
def test_a_run_of_an_adapter_with_tf32_is_exported(way: str, tmp_path: Path):
    with tf32():
        run = lora_run(tmp_path, config=hesso_config(lora_export=way))
        run.train()
        run.save_model(str(tmp_path / "small"))
    assert run.pruning_report is not None
    assert run.pruning_report.verification.fold_error < 1e-5


def test_weights_that_overflow_in_the_stored_dtype_are_named(tmp_path: Path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2.0**20)
        model.model.layers[1].mlp.up_proj.weight.mul_(2.0**-20)
    with pytest.raises(VerificationError, match=r"float16.*overflow.*`dtype`.*bfloat16 or float32.*Nothing was publ"):
        export_pruned(model, tmp_path / "small", dtype="float16")
    assert not list(tmp_path.iterdir())
    assert export_pruned(model, tmp_path / "small", dtype="bfloat16").verification.rounding_error < 0.1
