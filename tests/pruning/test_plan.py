"""The plan of a run, and a training loop without the Trainer."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from hesso_hf import HessoConfig, export_pruned, wrap_optimizer
from hesso_hf.budget.latency import LatencyTable
from hesso_hf.errors import HessoError, UnsupportedStructureError
from hesso_hf.hf_models.resize import copy_with
from hesso_hf.hf_models.serving import not_served_as_they_are
from hesso_hf.hf_models.tiny_model import logits_of, relative_error
from hesso_hf.pruning.calibration import LossCurves
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.pruning.schedule import Schedule
from tests.support.checks import propagated
from tests.support.tiny import backward, tiny_gpt2, tiny_llama, token_batches
from tests.support.training import hesso_config, trainer


def test_a_training_loop_of_ones_own(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, HessoConfig(0.4, round_to=1), 20)
    for batch in token_batches(20):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.process.finished
    report = export_pruned(model, tmp_path / "small")
    assert report.pruning_ratio == pytest.approx(0.4, abs=0.01)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    ids = token_batches(1)[0]
    assert relative_error(logits_of(small, ids), logits_of(model.eval(), ids)) <= 1e-5


@pytest.mark.parametrize(("structures", "valid"), [("mlp_channels", True), ("embedding_channels", False)])
def test_an_export_before_the_end_says_that_pruning_is_not_finished(
    structures: str, valid: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, steps = tiny_llama(), {"warmup_steps": 1, "pruning_steps": 6, "pruning_periods": 3}
    config = HessoConfig(0.2, structures=structures, round_to=1, saliency="magnitude", healing="off", **steps)
    optimizer = wrap_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, config, 10)
    for batch in token_batches(4):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    with propagated(caplog):
        if valid:
            share = export_pruned(model, tmp_path / "small").pruning_ratio
            assert 0.01 < share < 0.19
            said = f"(step 4 of 7): {share:.1%} of the parameters are removed, not {optimizer.process.target.ratio:.1%}"
            assert f"pruning isn't finished {said}; go on stepping until `optimizer.process.finished`" in caplog.text
        else:
            with pytest.raises(
                HessoError, match=r"isn't finished \(step 4 of 7\); go on stepping .* LlamaConfig refuses"
            ):
                export_pruned(model, tmp_path / "small")
    caplog.clear()
    process = weakref.ref(optimizer.process)
    del optimizer
    gc.collect()
    assert process() is None  # the model doesn't keep it
    with pytest.raises(HessoError) if not valid else nullcontext():
        export_pruned(model, tmp_path / "small")
    assert "finished" not in caplog.text


def test_a_plan_says_what_goes_and_when() -> None:
    model = tiny_llama()
    plan = PruningPlan.prepare(model, HessoConfig(target_sizes={"intermediate_size": 28}, structures="mlp_channels"))
    small = copy_with(model.config, {"intermediate_size": 28})
    assert plan.preview(Schedule(4, 9, 3, 40)).splitlines() == [
        f"HESSO: {model.num_parameters():,} -> {model.num_parameters() - 2 * 16 * (3 * 60 + 2):,} parameters "
        f"({plan.target.parameter_ratio:.1%} removed)",
        "  structure     units per layer   go  of the cut  sizes",
        "  mlp_channels         44 -> 28  36%        100%  intermediate_size 44 -> 28",
        "  steps: warm-up 1 to 4, pruning 5 to 13 in 3 periods, recovery 14 to 40",
        *[f"  to serve it: {said}" for said in not_served_as_they_are(small)],
    ]
    assert "  steps: pruning 1, recovery 2 to 40" in plan.preview(Schedule(0, 1, 1, 40)).splitlines()
    plan.curves = LossCurves({"mlp_channels": (0.5,)}, {"mlp_channels": (1.1,)})
    assert "  expected before any recovery: +0.80 nats per token" in plan.preview(Schedule(4, 9, 3, 40)).splitlines()


def test_a_structure_of_which_nothing_goes_has_no_row_in_the_plan() -> None:
    wanted = {"intermediate_size": 28, "num_key_value_heads": 3}
    text = PruningPlan.prepare(tiny_llama(), HessoConfig(target_sizes=wanted)).preview(Schedule(4, 9, 3, 40))
    assert "0%  " not in text.replace("100%", "")
    assert "  stays whole: attention_heads (3 units per layer)" in text
    assert max(map(len, text.splitlines()[:5])) <= 100


def test_a_curve_goes_on_beyond_the_last_share_that_was_tried() -> None:
    curves = LossCurves({"mlp_channels": (0.5, 0.75)}, {"mlp_channels": (1.0, 2.0)})
    expected = curves.loss({"mlp_channels": 80})
    assert [float(expected({"mlp_channels": kept})) for kept in (80, 40, 20, 10)] == [0.0, 1.0, 2.0, 2.5]


def test_a_budget_that_is_met_only_nearly_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        plan = PruningPlan.prepare(tiny_llama(), HessoConfig(0.35, round_to=16))
        measured = LossCurves(*(dict.fromkeys(plan.groups.structures, (value,)) for value in (0.5, 1.0)))
        plan.settle(lambda: measured)
    assert plan.curves is not None
    assert caplog.text.count("can't be met within 1%") == 1


def test_a_vision_tower_that_stays_whole_is_named(caplog: pytest.LogCaptureFixture) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=99, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=98))
    with propagated(caplog):
        PruningPlan.prepare(model, HessoConfig(0.3))
    (message,) = {record.message for record in caplog.records if "stays whole: nothing" in record.message}
    share = model.model.vision_tower.num_parameters() / model.num_parameters()
    assert message.startswith(f"model.vision_tower (CLIPVisionModel, {share:.0%} of the parameters)")


def test_a_shape_of_which_little_stays_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for size, warned in ((9, False), (8, True)):
        caplog.clear()
        plan = PruningPlan.prepare(
            tiny_llama(), HessoConfig(target_sizes={"intermediate_size": size}, structures="mlp_channels")
        )
        with propagated(caplog):
            plan.process(Schedule(1, 2, 1, 4))
        assert ("mlp_channels: 8 of 44 units of a layer stay (18%; intermediate_size 44 -> 8)" in caplog.text) == warned


def test_weights_tied_or_replaced_by_hand_are_named() -> None:
    tied = tiny_llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(UnsupportedStructureError, match=r"lm_head.weight is in what LlamaConfig builds"):
        PruningPlan.prepare(tied, HessoConfig(0.3))
    replaced = tiny_llama()
    replaced.lm_head = nn.Linear(60, 71, bias=False)
    with pytest.raises(
        UnsupportedStructureError, match=r"lm_head.weight has shape \(71, 60\), its config says \(67, 60\)"
    ):
        PruningPlan.prepare(replaced, HessoConfig(0.3))


def test_a_loop_with_the_wrong_model_or_optimizer_is_refused() -> None:
    model, other = tiny_llama(), tiny_llama()
    with pytest.raises(HessoError, match=r"`optimizer` \(AdamW\) holds no parameter of `model`"):
        wrap_optimizer(torch.optim.AdamW(other.parameters()), model, HessoConfig(0.3), 10)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UnsupportedStructureError, match=r"`model` \(AdamW\) must be"):
        wrap_optimizer(model, optimizer, HessoConfig(0.3), 10)  # type: ignore[arg-type]


def test_quantised_models_are_refused() -> None:
    model = tiny_llama()
    model.hf_quantizer = object()
    with pytest.raises(UnsupportedStructureError, match="quantised"):
        PruningPlan.prepare(model, HessoConfig(0.3))


@pytest.mark.parametrize("metric", ["flops", "memory"])
def test_other_budgets_are_met(metric: str) -> None:
    plan = PruningPlan.prepare(tiny_llama(), HessoConfig(0.3, budget_metric=metric, round_to=1))
    assert plan.target.ratio == pytest.approx(0.3, abs=0.03)
    assert plan.target.metric == metric
    assert plan.target.cost_after < plan.target.cost_before


def test_structures_that_were_asked_for_and_refused_are_an_error() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_head=4, n_layer=2, vocab_size=67, n_inner=40))
    with pytest.raises(HessoError, match=r"leaves out \['embedding_channels'\].* only shrink together"):
        PruningPlan.prepare(model, HessoConfig(0.3, structures=["attention_heads"]))


@pytest.mark.parametrize(
    ("make", "asked"),
    [(partial(tiny_llama, num_hidden_layers=4, mlp_bias=False), {"pruning_ratio": ratio}) for ratio in (0.3, 0.4)]
    + [(partial(tiny_gpt2, n_layer=4), {"target_sizes": {"n_inner": 20}})],
)
def test_layers_of_different_widths_can_be_saved_whatever_sizes_the_plan_chose(
    make: Callable[[], PreTrainedModel], asked: dict[str, Any], tmp_path: Path
) -> None:
    """A config keeps the full size of what differs between layers, and its class has to accept it with the others."""
    model = make()
    config = HessoConfig(layer_widths="per_layer", saliency="magnitude", warmup_steps=0, pruning_steps=1, **asked)
    optimizer = wrap_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, config, 2)
    for batch in token_batches(2):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    kept = optimizer.process.kept_units()
    assert any(len({len(layer) for layer in layers}) > 1 for layers in kept.kept.values())
    export_pruned(model, tmp_path / "small", kept_units=kept)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    ids = token_batches(1)[0]
    assert relative_error(logits_of(small, ids), logits_of(model.eval(), ids)) <= 1e-5


def test_layers_that_a_class_does_not_build_differently_are_refused_before_training() -> None:
    model = tiny_gpt2()
    sizes = {"num_attention_heads": model.config.n_head // 2}
    with pytest.raises(HessoError, match=r"`layer_widths` \('per_layer'\).*'uniform'"):
        PruningPlan.prepare(model, HessoConfig(target_sizes=sizes, layer_widths="per_layer"))


@pytest.mark.parametrize(
    ("export", "training", "timed"),
    [(None, None, torch.float32), (None, torch.bfloat16, torch.bfloat16), ("float16", torch.bfloat16, torch.float16)],
)
def test_latency_is_timed_where_and_as_the_model_will_compute(
    export: str | None, training: torch.dtype | None, timed: torch.dtype
):
    config = HessoConfig(target_sizes={"intermediate_size": 28}, budget_metric="latency", export_dtype=export)
    plan = PruningPlan.prepare(tiny_llama(), config, torch.device("meta"), training)
    assert isinstance(plan.price, LatencyTable)
    assert plan.price.dtype == timed
    assert plan.price.device.type == "meta"


def test_a_trainer_times_latency_as_it_computes(tmp_path: Path):
    config = hesso_config(budget_metric="latency")
    run = trainer(tmp_path, config=config, bf16=True)
    assert run.hesso_plan.price.dtype == torch.bfloat16
    assert run.hesso_plan.price.device == run.args.device


@pytest.mark.parametrize(
    "asked",
    [
        {"export_at": [0.15]}, {"stream_basis": "principal"}, {"replay_share": 0.3}, {"replay_dataset": "d.jsonl"},
        {"distillation_alpha": 0.5}, {"distillation_alpha": 0.5, "distill_from": "teacher"}, {"prune_vocabulary": True},
        {"compact": "end"},
    ],
    ids=str,
)  # fmt: skip
def test_a_loop_of_ones_own_is_told_of_what_nothing_would_do_there(asked: dict[str, Any]) -> None:
    model, (name, value) = tiny_llama(), next(iter(asked.items()))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        HessoError, match=rf"`{name}` \({re.escape(repr(value))}\): a trainer does it, in a loop of your"
    ):
        wrap_optimizer(optimizer, model, HessoConfig(0.3, **asked), 40)


def test_sizes_that_are_the_models_own_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    config = HessoConfig(target_sizes={"hidden_size": model.config.hidden_size})
    with propagated(caplog):
        wrap_optimizer(torch.optim.AdamW(model.parameters()), model, config, 40)
    assert "are the model's own: nothing is pruned" in caplog.text
