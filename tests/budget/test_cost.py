"""Operations and matrix products that a budget counts, of models with an output matrix, a tied one and none."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from hesso_hf import HessoConfig
from hesso_hf.budget.cost import CONTEXT
from hesso_hf.budget.latency import LatencyTable
from hesso_hf.hf_models.build import build_meta
from hesso_hf.hf_models.resize import resized_config
from hesso_hf.hf_models.tiny_model import random_model
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.structures.shape_probe import describe_parameters

LLAMA = LlamaConfig(
    vocab_size=8000, hidden_size=144, intermediate_size=272, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=3, head_dim=24, pad_token_id=0, attn_implementation="eager",
)  # fmt: skip


def counted(model: PreTrainedModel) -> float:
    """Return the operations of matrix products for one of CONTEXT tokens, as torch counts them."""
    ids = torch.arange(CONTEXT)[None] % 60 + 3
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    return counter.get_total_flops() / CONTEXT


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_class", [LlamaForSequenceClassification, LlamaForCausalLM])
def test_the_operations_that_go_are_those_that_torch_counts(model_class: type[PreTrainedModel], tied: bool):
    config = LlamaConfig(**(LLAMA.to_dict() | {"tie_word_embeddings": tied, "attn_implementation": "eager"}))
    model = model_class(config)
    target = PruningPlan.prepare(model, HessoConfig(pruning_ratio=0.5, budget_metric="flops")).target
    small = model_class(resized_config(config, target.sizes))
    assert target.cost_before == pytest.approx(counted(model), rel=0.003)  # norms aren't in torch's count
    assert target.ratio == pytest.approx(1 - counted(small) / counted(model), abs=0.003)


def test_only_the_embedding_that_is_the_output_matrix_is_tied():
    gpt2 = GPT2Config(vocab_size=97, n_embd=60, n_layer=1, n_head=6)
    found = describe_parameters(build_meta(GPT2LMHeadModel, gpt2))
    assert [name for name, info in found.items() if info.tied] == ["transformer.wte.weight"]
    bert = BertConfig(vocab_size=97, hidden_size=60, num_hidden_layers=1, num_attention_heads=6, intermediate_size=44)
    assert not any(info.tied for info in describe_parameters(build_meta(BertForSequenceClassification, bert)).values())


def test_a_latency_budget_times_no_look_up_of_a_model_without_output_matrix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LatencyTable, "_time", lambda self, rows, columns: 1e-6 * rows * columns)
    hesso = HessoConfig(pruning_ratio=0.4, budget_metric="latency", latency_tokens=64)
    target = PruningPlan.prepare(random_model(LlamaForSequenceClassification, LLAMA), hesso).target
    products = 2 * (144 * 24 * (6 + 3 + 3 + 6) + 3 * 144 * 272) + 2 * 144  # the last for two labels
    assert target.cost_before == pytest.approx(1e-6 * products)
