"""Groups: what a user reads when a structure can't be pruned."""

from __future__ import annotations

import pytest
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hesso_hf.config import HessoConfig
from hesso_hf.errors import BudgetError, UnsupportedStructureError
from hesso_hf.hf_models.build import build_meta
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.structures.groups import MOST_OF_A_REASON, PruningGroups
from tests.support.checks import propagated

LLAMA = LlamaConfig(
    hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=67,
)  # fmt: skip


def refusal(groups: PruningGroups, *names: str) -> str:
    with pytest.raises(UnsupportedStructureError) as caught:
        groups.select(names, explicit=True)
    return str(caught.value)


def bert(model_class: type[PreTrainedModel] = BertLMHeadModel) -> PreTrainedModel:
    """A model whose norms lie on the stream itself, so that no narrower one computes the same."""
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return model_class(BertConfig(vocab_size=67, is_decoder=model_class is BertLMHeadModel, **sizes))


def test_a_refusal_says_which_structure_of_which_class_stays_whole_and_what_to_prune_instead() -> None:
    with pytest.raises(UnsupportedStructureError) as caught:
        PruningPlan.prepare(bert(), HessoConfig(0.1, structures=["attention_heads", "embedding_channels"]))
    message = str(caught.value)
    asked = "`structures` (['attention_heads', 'embedding_channels']): "
    assert message.startswith(f"{asked}attention heads, embedding channels of BertLMHeadModel stay whole")
    assert "(reason: the hidden state is the output of a norm (bert.embeddings.LayerNorm): over fewer" in message
    assert "so hidden_size stays, and with it attention heads: best relative error" in message
    assert message.endswith("; can be pruned instead: ['mlp_channels']")


def test_a_ratio_beyond_what_can_go_names_what_cannot() -> None:
    whole = r"\['attention_heads', 'embedding_channels'\] of BertLMHeadModel can't go; nearest feasible: "
    with pytest.raises(BudgetError, match=rf"met within 5% by \['mlp_channels'\], the {whole}"):
        PruningPlan.prepare(bert(), HessoConfig(0.9))


def test_what_a_class_does_not_have_is_said_so() -> None:
    with pytest.raises(UnsupportedStructureError) as caught:
        PruningPlan.prepare(LlamaForCausalLM(LLAMA), HessoConfig(0.2, structures=["query_heads", "mlp_channels"]))
    message = str(caught.value)
    assert "LlamaForCausalLM has no query heads that could be pruned (reason: each query head has" in message
    assert message.endswith("can be pruned instead: ['mlp_channels', 'embedding_channels']")


def test_where_nothing_is_left_it_is_said_so() -> None:
    groups = PruningGroups({}, {"mlp_channels": "a\n  long " + "x" * 500}, model_class=LlamaForCausalLM)
    message = refusal(groups, "mlp_channels")
    assert message.endswith("; nothing else can be")
    assert "(reason: a long xxx" in message
    assert len(message) < MOST_OF_A_REASON + 200


@pytest.mark.parametrize("model_class", [BertLMHeadModel, BertForSequenceClassification])
def test_all_structures_leaves_out_the_refused_ones_with_a_warning_for_each_reason(
    model_class: type[PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    model = bert(model_class)
    with propagated(caplog):
        plan = PruningPlan.prepare(model, HessoConfig(0.1))
    assert list(plan.groups.structures) == ["mlp_channels"]
    told = {record.getMessage() for record in caplog.records if "stay whole" in record.getMessage()}
    (sentence,) = told
    assert sentence.startswith(f"attention heads, embedding channels of {model_class.__name__} stay whole, since")
    assert "mixer" not in sentence  # a pooler's channels follow the width, and no layer has them


def test_what_transformers_says_of_a_class_is_not_said_of_the_models_that_are_only_looked_at(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = bert(BertForMaskedLM)  # whose config names no class
    with propagated(caplog):
        PruningPlan.prepare(model, HessoConfig(0.1, structures="mlp_channels"))
        build_meta(BertLMHeadModel, model.config)
    assert "is_decoder" not in caplog.text
