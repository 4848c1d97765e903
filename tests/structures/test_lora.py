"""LoRA: a frozen matrix and its adapter are scored, scaled and held at zero as one; other adapters are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from hesso_hf import HessoConfig, HessoTrainer, wrap_optimizer
from hesso_hf.errors import HessoError, UnsupportedStructureError
from hesso_hf.pruning.calibration import measure_curves
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.pruning.saliency import UnitSums
from hesso_hf.pruning.weights.bound_groups import BoundGroups
from hesso_hf.structures.lora import Adapters, base_of, dense_model, parameters_of
from tests.support.lora import LINEARS, lora_config, lora_run, tiny_lora
from tests.support.tiny import backward, tiny_gpt2, tiny_llama, tiny_phi, tiny_phi3, token_batches
from tests.support.training import arguments, blocks, hesso_config, trainer

TERMS = ("x2", "xg", "xg2", "g2")
# model and LoRA options; all shapes of factors: linear layers, GPT-2's transposed ones, fused ones, embeddings
KINDS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "some linears": (tiny_llama, {}),
    "all linears": (tiny_llama, {"target_modules": "all-linear"}),
    "one linear": (tiny_llama, {"target_modules": ["up_proj"], "use_rslora": True}),
    "embeddings": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "ranks": (tiny_llama, {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 7}}),
    "one layer": (tiny_llama, {"layers_to_transform": [1]}),
    "biases": (tiny_llama, {"bias": "all"}),
    "modules_to_save": (tiny_llama, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "transposed": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "fused": (tiny_phi3, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
}


def adapted(kind: str) -> PreTrainedModel:
    build, options = KINDS[kind]
    return base_of(tiny_lora(build(), **options))


def bound_to(model: PreTrainedModel, plan: PruningPlan) -> BoundGroups:
    return BoundGroups(parameters_of(model), plan.groups, adapters=Adapters.of(model))


SLOW = ("one linear", "ranks", "one layer", "biases", "all linears")
MARKED = [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]


@pytest.fixture(scope="module", params=MARKED)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel, PruningPlan]:
    """A model with adapters, the same as a dense one, and the plan of the latter."""
    model = adapted(request.param)
    dense = copy.deepcopy(dense_model(model))
    return model, dense, PruningPlan.prepare(dense, HessoConfig(0.3))


# -- what they add up to -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_model_is_the_one_that_peft_merges(kind: str) -> None:
    build, options = KINDS[kind]
    tuned = tiny_lora(build(), **options)
    ours = dense_model(base_of(tuned))
    merged = copy.deepcopy(tuned).merge_and_unload()
    found = dict(ours.named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=1e-5, atol=1e-6)
    assert found.keys() == dict(merged.named_parameters()).keys()
    batch = token_batches(1)[0]
    torch.testing.assert_close(ours(batch).logits, tuned(batch).logits, rtol=1e-4, atol=1e-5)


def test_the_dense_model_shares_what_no_adapter_changes() -> None:
    model = adapted("some linears")
    ours, own = dict(dense_model(model).named_parameters()), parameters_of(model)
    shared = {name for name in ours if ours[name].data_ptr() == own[name].data_ptr()}
    assert ours.keys() - shared == Adapters.of(model).low_rank.keys()


def test_units_of_a_model_with_adapters_are_scored_as_those_of_the_dense_one(pair: Any) -> None:
    model, dense, plan = pair
    batch = token_batches(1)[0]
    sums = []
    for each in (model, dense):
        bound = bound_to(each, plan)
        with bound.frozen.revealed():
            backward(each.eval(), batch)
            sums.append(UnitSums.zeros(plan.groups, TERMS, bound.device))
            bound.accumulate_(sums[-1])
        each.zero_grad(set_to_none=True)
    for name, terms in sums[1].sums.items():
        for term, expected in terms.items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(sums[0].sums[name][term] / scale, expected / scale, rtol=1e-3, atol=1e-5)


def test_scaled_and_masked_units_are_those_of_the_dense_model(pair: Any) -> None:
    model, dense, plan = copy.deepcopy(pair[0]), copy.deepcopy(pair[1]), pair[2]
    generator = torch.Generator().manual_seed(4)
    shapes = bound_to(dense, plan).shapes()
    factors = {name: 0.3 + torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    pruned = {name: torch.rand(shape, generator=generator) < 0.3 for name, shape in shapes.items()}
    for step in ("multiply_", "centre_", "mask_weights_"):
        for each in (model, dense):
            getattr(bound_to(each, plan), step)(pruned if step == "mask_weights_" else factors)
        bound = bound_to(model, plan)
        for name, parameter in dense.named_parameters():
            if name in bound.axes:
                torch.testing.assert_close(bound.effective(name), parameter.data, rtol=1e-4, atol=1e-5)
                assert step != "mask_weights_" or torch.equal(bound.effective(name) == 0, parameter == 0), name
    assert bound.norm_of(factors_marked := {name: ~mask for name, mask in pruned.items()}) == pytest.approx(
        bound_to(dense, plan).norm_of(factors_marked), rel=1e-5
    )


def test_a_normed_stream_is_centred_in_both_parts() -> None:
    tuned = tiny_lora(tiny_phi(), target_modules=["dense", "fc2", "q_proj"])
    model, dense = base_of(tuned), copy.deepcopy(dense_model(base_of(tuned)))
    plan = PruningPlan.prepare(dense, HessoConfig(0.3))
    assert any(axis.centred and "lora" in axis.parameter for axis in _all_axes(bound_to(model, plan)))
    scales = {"embedding_channels": torch.linspace(0, 1, 60)[None]}
    for each in (model, dense):
        bound_to(each, plan).centre_(scales)
    for name in Adapters.of(model).low_rank:
        torch.testing.assert_close(bound_to(model, plan).effective(name), dict(dense.named_parameters())[name].data)


def _all_axes(bound: BoundGroups) -> list[Any]:
    return [axis for axes in bound.axes.values() for _, _, axis in axes]


def test_the_split_is_measured_as_on_the_dense_model() -> None:
    model = adapted("some linears")
    dense = copy.deepcopy(dense_model(model))
    groups = PruningPlan.prepare(dense, HessoConfig(0.3)).groups
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    curves = [
        measure_curves(m, groups, token_batches(2), lambda m, batch: m(batch, labels=batch).loss, HessoConfig(0.3))
        for m in (model, dense)
    ]
    for name, rises in curves[1].rises.items():
        assert curves[0].rises[name] == pytest.approx(rises, abs=1e-4)
    assert max(curves[0].rises["embedding_channels"]) > 0.01
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for n, p in model.named_parameters() if "lora" not in n)
    assert [module.training for module in model.modules()] == modes


# -- training ----------------------------------------------------------------------------------------------------------


def test_pruned_units_reach_zero_and_stay_there_with_their_optimizer_state(tmp_path: Path) -> None:
    run = lora_run(tmp_path, lora={"target_modules": LINEARS})
    run.train()
    process, model = run.hesso_optimizer.process, run.hesso_run.model
    assert process.finished
    own, checked = parameters_of(model), 0
    for name, axes in process.bound.axes.items():
        state = run.hesso_optimizer.state.get(own[name], {})
        assert bool(state) == ("lora" in name)  # nothing but the adapter is trained
        for structure, layer, axis in axes:
            pruned = axis.layout.expand((process.scales[structure][layer] == 0).float(), 0.0).bool()
            for tensor in (own[name], *(state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)):
                assert not tensor.index_select(axis.dim, pruned.nonzero().flatten()).any(), name
                checked += int(pruned.any())
    assert checked > 50


def test_kept_weights_of_the_base_are_never_touched(tmp_path: Path) -> None:
    original = tiny_llama()
    run = lora_run(tmp_path, tiny_llama())
    run.train()
    own = parameters_of(run.hesso_run.model)
    kept = {name: scales > 0 for name, scales in run.hesso_optimizer.process.scales.items()}
    for name, parameter in original.named_parameters():
        expected = parameter.data.clone()
        for structure, layer, axis in run.hesso_optimizer.process.bound.axes[name]:
            expected *= axis.spread(kept[structure][layer].float(), expected.dim())
        assert torch.equal(own[name], expected), name
    factors = Adapters.of(run.hesso_run.model).factors()
    started = parameters_of(base_of(tiny_lora()))
    assert not any(torch.equal(own[name], started[name]) for name in factors)


def test_until_units_shrink_the_adapter_is_trained_as_without_pruning(tmp_path: Path) -> None:
    """Scored gradients of frozen weights reach neither clipping nor the optimizer."""
    changes = {"max_steps": 4, "lr_scheduler_type": "constant", "max_grad_norm": 0.05}
    plain = Trainer(model=tiny_lora(), args=arguments(tmp_path / "plain", **changes), train_dataset=blocks())
    plain.train()
    schedule = {"warmup_steps": 4, "pruning_steps": 3, "pruning_periods": 1, "saliency_batches": 3}
    run = lora_run(tmp_path / "pruned", config=hesso_config(**schedule), **(changes | {"max_steps": 8}))
    seen: list[dict[str, torch.Tensor]] = []
    step = run.training_step

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append({n: p.detach().clone() for n, p in run.model.named_parameters() if "lora" in n})
        return step(*args, **kwargs)

    run.training_step = recorded  # type: ignore[method-assign]
    run.train()
    started = dict(tiny_lora().named_parameters())
    for name, parameter in plain.model.named_parameters():
        if "lora" in name:
            assert torch.equal(seen[4][name], parameter), name
            assert not torch.equal(parameter, started[name])


@pytest.mark.parametrize("mode", ["path", pytest.param("probe", marks=pytest.mark.slow)])
def test_cric_decides_with_adapters_and_gives_the_weights_back(mode: str, tmp_path: Path) -> None:
    cric = {"cric": True, "cric_mode": mode, "cric_sampling_steps": 3, "cric_max_cycles": 2}
    run = lora_run(tmp_path, config=hesso_config(**cric), max_steps=20, save_strategy="no")
    run.train()
    process, own = run.hesso_optimizer.process, parameters_of(run.hesso_run.model)
    assert process.finished
    assert process.cric_report()["ended"]
    kept = process.scales["mlp_channels"][0] > 0
    name = "model.layers.0.mlp.gate_proj.weight"
    channels = process.scales["embedding_channels"][0] > 0
    original = dict(tiny_llama().named_parameters())[name]
    assert torch.equal(own[name], original * kept[:, None] * channels)


def test_cric_probes_adapters_as_it_does_the_dense_model() -> None:
    model = tiny_lora()
    dense = copy.deepcopy(dense_model(base_of(model)))
    batches, scores = token_batches(2), []
    for each in (model, dense):
        config = hesso_config(cric=True, cric_mode="probe", cric_sampling_steps=3, cric_max_cycles=2, warmup_steps=0)
        each.eval()
        optimizer = wrap_optimizer(torch.optim.AdamW(_trained(each), lr=1e-3), each, config, 12)
        optimizer.probe([lambda m=each, b=b: m(input_ids=b, labels=b).loss for b in batches])
        scores.append(optimizer.process.trial.scores())
    for name, expected in scores[1].items():
        torch.testing.assert_close(scores[0][name], expected, rtol=1e-3, atol=1e-5)


def _trained(model: Any) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_a_training_loop_of_ones_own_prunes_adapters_too() -> None:
    model = tiny_lora()
    optimizer = wrap_optimizer(torch.optim.SGD(_trained(model), lr=1e-2, momentum=0.9), model, hesso_config(), 10)
    for batch in token_batches(10):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        frozen = [p for n, p in model.named_parameters() if "lora" not in n]
        assert all(parameter.grad is None for parameter in frozen)
        optimizer.zero_grad()
    assert optimizer.process.finished
    assert not any(parameter.requires_grad for parameter in frozen)
    assert len(optimizer.process.kept_units().kept["mlp_channels"][0]) == 28


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positional", [False, True])
def test_peft_config_wraps_the_model(positional: bool, tmp_path: Path) -> None:
    options = {"args": arguments(tmp_path), "train_dataset": blocks(), "hesso_config": hesso_config()}
    first: list[Any] = [tiny_llama()] if positional else []
    named: dict[str, Any] = {} if positional else {"model": tiny_llama()}
    run = HessoTrainer(*first, **named, **options, peft_config=lora_config())
    run.train()
    run.save_model(str(tmp_path / "small"))
    assert type(run.model).__name__.startswith("Peft")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.intermediate_size == 28


def test_peft_config_goes_on_to_a_trainer_that_has_it(tmp_path: Path) -> None:
    from hesso_hf import HessoMixin

    class Wrapping(Trainer):
        def __init__(self, model: Any, peft_config: Any = None, **kwargs: Any) -> None:
            self.given = peft_config
            super().__init__(model=get_peft_model(model, peft_config), **kwargs)

    class Both(HessoMixin, Wrapping):
        pass

    given = lora_config()
    run = Both(model=tiny_llama(), args=arguments(tmp_path), hesso_config=hesso_config(), peft_config=given)
    assert run.given is given


@pytest.mark.parametrize("given", [{"model": None, "model_init": tiny_lora}, {"model": "adapted"}])
def test_peft_config_is_refused_where_it_cannot_wrap(given: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_lora() if given.pop("model") else None
    with pytest.raises(HessoError, match="leave `peft_config` out"):
        HessoTrainer(
            model=model, args=arguments(tmp_path), hesso_config=hesso_config(), peft_config=lora_config(), **given
        )


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM")), r"`peft_config` \(IA3\).*`LoraConfig`"),
    (lambda: get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
     r"\(PROMPT_TUNING\)"),
    (lambda: get_peft_model(tiny_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
     r"\(PREFIX_TUNING\)"),
    (lambda: tiny_lora(use_dora=True), "`peft_config.use_dora`.*set use_dora=False"),
    (lambda: tiny_lora(lora_bias=True), "`peft_config.lora_bias`.*set lora_bias=False"),
    (lambda: tiny_lora(trainable_token_indices=[3]), "trainable_token_indices.*modules_to_save"),
    (lambda: tiny_lora(layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
    (lambda: tiny_lora(tiny_llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"]),
     "lm_head: LoRA on a weight that is tied.*untie"),
    (lambda: tiny_lora(tiny_llama(tie_word_embeddings=True), modules_to_save=["lm_head"]), "modules_to_save.*untie"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:24] for _, message in REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_other_adapters_are_refused_by_name(build: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedStructureError, match=message):
        trainer(tmp_path, build())


def test_several_adapters_are_refused() -> None:
    model = tiny_lora()
    model.add_adapter("second", lora_config(r=2))
    with pytest.raises(UnsupportedStructureError, match=r"\['default', 'second'\].*delete_adapter"):
        PruningPlan.prepare(model, hesso_config())


def test_an_adapter_that_is_merged_off_or_frozen_is_refused() -> None:
    model = tiny_lora()
    model.merge_adapter()
    with pytest.raises(UnsupportedStructureError, match=r"merged; call `model.unmerge_adapter\(\)`"):
        PruningPlan.prepare(model, hesso_config())
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(UnsupportedStructureError, match="is disabled"):
        PruningPlan.prepare(model, hesso_config())
    model.requires_grad_(False)
    with pytest.raises(UnsupportedStructureError, match="is_trainable=True"):
        PruningPlan.prepare(model, hesso_config())


def test_adapters_that_no_peft_model_holds_are_refused() -> None:
    model = inject_adapter_in_model(lora_config(), tiny_llama())
    with pytest.raises(UnsupportedStructureError, match="get_peft_model"):
        PruningPlan.prepare(model, hesso_config())


def test_a_quantised_base_is_refused_with_what_to_do() -> None:
    model = tiny_lora()
    model.get_base_model().hf_quantizer = object()
    with pytest.raises(UnsupportedStructureError, match=r"quantised.*`model.dequantize\(\)` \(before `get_peft_model`"):
        PruningPlan.prepare(model, hesso_config())


def test_fp16_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lora_run(tmp_path)
    monkeypatch.setattr(run.args, "fp16", True)
    with pytest.raises(HessoError, match="use bf16"):
        run.hesso_engine.refuse(adapters=True)


def test_layers_of_other_kinds_are_refused() -> None:
    from peft.tuners.lora import LoraLayer

    model = tiny_lora()
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.__class__ = type("Linear4bit", (type(layer),), {})
    with pytest.raises(UnsupportedStructureError, match=r"Linear4bit.*`model.dequantize\(\)`"):
        PruningPlan.prepare(model, hesso_config())


def test_a_lora_config_alone_changes_nothing_for_dense_models() -> None:
    assert isinstance(lora_config(), LoraConfig)
    model = tiny_llama()
    assert base_of(model) is model
    assert not Adapters.of(model)
    assert parameters_of(model).keys() == dict(model.named_parameters()).keys()
