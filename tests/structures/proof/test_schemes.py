"""Constants of the width: which numbers of the model code follow it, and which weights make up for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, export_pruned, wrap_optimizer
from hesso_hf.hf_models.tiny_configs import default_config
from hesso_hf.hf_models.tiny_model import logits_of, random_model, relative_error
from hesso_hf.structures.layout import Layout, Segment
from hesso_hf.structures.proof import schemes
from hesso_hf.structures.proof.bench import Bench
from hesso_hf.structures.proof.schemes import constants_by_width, powers_against
from hesso_hf.structures.proof.tiny_case import covering_config
from tests.support.checks import known


@cache
def bench(model_type: str) -> Bench:
    model_class, config = default_config(model_type)
    return Bench(model_class, covering_config(model_class, config))


def found(model_type: str) -> dict[tuple[str, str], int]:
    mine = bench(model_type)
    return constants_by_width(mine.model_class, mine.config, mine.sizes, mine.axis_map.coupled_head_dim is not None)


def test_factors_that_follow_the_width_are_found_with_their_power() -> None:
    names = {
        (module.removeprefix("model.layers.0."), name) for module, name in found("longcat_flash") if ".0." in module
    }
    assert {("self_attn.0", "mla_scale_q_lora"), ("self_attn.0", "mla_scale_kv_lora")} <= names
    assert set(found("longcat_flash").values()) == {1}


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gpt2"])
def test_others_have_none(model_type: str) -> None:
    """GPT-2's head_dim follows the width; where the heads do too, its scale stays."""
    assert found(model_type) == {}


@pytest.mark.parametrize("model_type", ["longcat_flash", known("dots3_note_text")])
def test_the_norms_before_them_make_up_for_them(model_type: str) -> None:
    mine = bench(model_type)
    before = {name: parameter.clone() for name, parameter in mine.model.named_parameters()}
    powers = powers_against(mine.model, mine.input_ids, mine.axis_map, found(model_type))
    assert {pattern.rpartition("*")[0] != "" and pattern.split(".")[-2] for pattern in powers} == {
        "q_a_layernorm",
        "kv_a_layernorm",
    }
    assert set(powers.values()) == {-1}
    assert all(torch.equal(before[name], parameter) for name, parameter in mine.model.named_parameters())


def test_a_constant_that_no_norm_makes_up_for_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "_vectors", lambda axis_map, module: [])
    mine = bench("longcat_flash")
    assert powers_against(mine.model, mine.input_ids, mine.axis_map, found("longcat_flash")) == {}


def test_a_vector_that_no_unit_owns_is_scaled_as_a_whole() -> None:
    layout = Layout((Segment(fixed=6),))
    fitted = layout.fitted(4, 10, 8, 0)
    assert fitted == Layout((Segment(fixed=8),))
    assert fitted.indices(torch.tensor([1, 2]), 10).tolist() == list(range(8))


@pytest.mark.parametrize("cric", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_with_weights_off_the_stream_ends_exact(tmp_path: Path, cric: bool) -> None:
    """Attention's own norms belong to no channel: nothing shrinks them, and the export scales them once."""
    mine = bench("longcat_flash")
    model = random_model(mine.model_class, mine.config)
    config = HessoConfig(0.1, structures=("embedding_channels",), cric=cric, round_to=1)
    optimizer = wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, config, 40)
    for step in range(40):
        ids = torch.randint(3, mine.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.process.finished
    export_pruned(model, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.hidden_size < mine.config.hidden_size
    assert relative_error(logits_of(small, mine.input_ids), logits_of(model.eval(), mine.input_ids)) <= 1e-5
