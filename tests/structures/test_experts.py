"""Experts as units: a pruned one is never routed to, and what is saved routes as the trained model did."""

from __future__ import annotations

import contextlib
import copy
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3ForCausalLM, PreTrainedModel, TrainerCallback

from hesso_hf import HessoConfig, HessoError, export_pruned, inspect_model
from hesso_hf.budget.cost import build_cost
from hesso_hf.budget.target_sizes import TargetSizes
from hesso_hf.errors import BudgetError, UnsupportedStructureError, VerificationError
from hesso_hf.export.decision import Decision, kept_mask
from hesso_hf.export.parameters import WholeSource
from hesso_hf.export.verify import Verifier
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.pruning.process import PruningProcess
from hesso_hf.pruning.ranking import Ranking
from hesso_hf.pruning.weights.bound_groups import BoundGroups
from hesso_hf.structures.cut import cut_model
from hesso_hf.structures.experts import EXPERT_UNITS, expert_groups
from hesso_hf.structures.groups import KeptUnits, PruningGroups, StructureGroups
from hesso_hf.structures.layout import block_layout
from hesso_hf.structures.proof.experts import random_experts
from hesso_hf.structures.proof.prove import proved_groups
from hesso_hf.structures.router_gates import (
    RouterGates,
    _hooks_of,
    _LogitHooks,
    _Offsets,
    is_gated,
    remove_gates,
    routed_by,
)
from hesso_hf.structures.shape_probe import probe_axes
from tests.support.families import logits, relative_difference, zero_pruned_
from tests.support.moe import FAMILIES, KEPT, moe_model, moe_tokens
from tests.support.tiny import tiny_llama
from tests.support.training import hesso_config, logged, trainer


def random_kept(structure: StructureGroups, count: int, seed: int = 1) -> KeptUnits:
    """Keep random experts, others in every layer, as many of each routing group."""
    pools, size, generator = structure.pools, structure.pool_size, torch.Generator().manual_seed(seed)
    layers = []
    for _ in structure.layers:
        orders = torch.stack([torch.randperm(size, generator=generator) + size * pool for pool in range(pools)])
        layers.append(tuple(sorted(orders[:, : count // pools].flatten().tolist())))
    return KeptUnits({EXPERT_UNITS: structure.num_units}, {EXPERT_UNITS: tuple(layers)})


def pruned_model(name: str) -> tuple[PreTrainedModel, PreTrainedModel, PruningGroups, KeptUnits]:
    """Return the original, and the same with experts at zero and gates on."""
    original = moe_model(name)
    structure = expert_groups(type(original), original.config)
    kept = random_kept(structure, KEPT.get(name, 4))
    groups = PruningGroups({EXPERT_UNITS: structure})
    model = copy.deepcopy(original)
    zero_pruned_(model, groups, kept)
    gates = RouterGates.attach(model, structure)
    gates.set_scales(kept_mask(kept, EXPERT_UNITS).float())
    return original, model, groups, kept


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])  # the second with a bias of the choice
def test_a_compiled_block_routes_as_the_plain_one_in_one_graph(name: str):
    model = moe_model(name, experts_implementation="batched_mm")
    structure = expert_groups(type(model), model.config)
    gates, block = RouterGates.attach(model, structure), model.get_submodule(f"{structure.layers[0]}.mlp")
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    hidden = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    found = []
    for scales in (torch.ones(structure.num_units), torch.arange(structure.num_units).div(structure.num_units)):
        gates.set_scales(scales.expand(len(structure.layers), -1))
        with torch.no_grad():
            expected = block(hidden)
            assert torch.equal(compiled(hidden), expected)
        found.append(expected)
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_saved_model_routes_as_the_gated_one(name: str, tmp_path: Path):
    original, model, groups, kept = pruned_model(name)
    tokens = moe_tokens()
    expected = logits(model, tokens)
    assert relative_difference(expected, logits(original, tokens)) > 1e-2
    cut_model(model, groups, kept, torch.float32).save_pretrained(tmp_path)
    small = type(model).from_pretrained(tmp_path).eval()
    assert small.num_parameters() < model.num_parameters()
    assert relative_difference(logits(small, tokens), expected) < 1e-5
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens[:, :5], **options), small.generate(tokens[:, :5], **options))
    remove_gates(model)  # weights at zero alone aren't removal
    assert relative_difference(logits(model, tokens), expected) > 1e-3


def test_experts_at_zero_are_found_without_a_decision(tmp_path: Path):
    original, model, _, kept = pruned_model("mixtral")
    report = export_pruned(model, tmp_path / "pruned")
    assert report.kept_units.kept[EXPERT_UNITS] == kept.kept[EXPERT_UNITS]
    assert report.sizes_after["num_experts"] == 4
    assert EXPERT_UNITS not in export_pruned(original, tmp_path / "whole").kept_units.kept


def test_experts_and_whole_layers_go_together():
    model = moe_model("mixtral", num_hidden_layers=4)
    groups, proof, _ = proved_groups(type(model), model.config, (EXPERT_UNITS, "layers"))
    assert groups.structures.keys() == {EXPERT_UNITS, "layers"}, groups.refused
    assert proof.structures[EXPERT_UNITS].relative_error < 1e-5
    experts = random_kept(groups.structures[EXPERT_UNITS], 4)
    kept = KeptUnits(experts.num_units | {"layers": 4}, experts.kept | {"layers": ((0, 2, 3),)})
    zero_pruned_(model, groups, kept)
    assert Verifier(WholeSource(model, Decision(groups, kept))).checked_cut()[1] < 1e-5


def gated(name: str, scales: torch.Tensor | None = None) -> tuple[PreTrainedModel, RouterGates, StructureGroups]:
    model = moe_model(name)
    structure = expert_groups(type(model), model.config)
    gates = RouterGates.attach(model, structure)
    gates.set_scales(torch.ones(len(structure.layers), structure.num_units) if scales is None else scales)
    return model, gates, structure


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "ernie4_5_moe"])
def test_a_gate_that_keeps_all_changes_no_bit_and_can_be_taken_off(name: str):
    tokens = moe_tokens()
    expected = logits(moe_model(name), tokens)
    model, gates, structure = gated(name)
    assert torch.equal(logits(model, tokens), expected)
    gates.set_scales(torch.full((len(structure.layers), structure.num_units), 0.5))
    gates.set_scales(torch.ones(len(structure.layers), structure.num_units))
    assert torch.equal(logits(model, tokens), expected)
    gates.set_scales(torch.eye(structure.num_units)[: len(structure.layers)] * -1 + 1)
    assert not torch.equal(logits(model, tokens), expected)
    gates.detach()
    assert torch.equal(logits(model, tokens), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_a_scale_a_little_lower_changes_the_logits_a_little(name: str):
    """Small enough a step flips no choice of the router; the change is then proportional to it."""
    model, gates, structure = gated(name)
    tokens = moe_tokens(6)
    expected, changes = logits(model, tokens), []
    for step in (1e-4, 1e-5):
        scales = torch.ones(len(structure.layers), structure.num_units)
        scales[:, ::2] -= step
        gates.set_scales(scales)
        changes.append(relative_difference(logits(model, tokens), expected))
    assert 0 < changes[1] < changes[0] < 1e-3
    assert changes[1] < 0.3 * changes[0]


def test_the_choice_fades_on_the_way_to_zero_and_is_never_that_of_a_pruned_expert():
    """DeepSeek-V3: a bias added after the sigmoid would win the choice for an expert whose score is zero."""
    model, gates, structure = gated("deepseek_v3")
    shares, victim = [], 4
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.e_score_correction_bias[victim] = 9.0
            module.register_forward_hook(lambda _, args, result: shares.append((result[2] == victim).float().mean()))
    means = []
    for scale in (1.0, 1e-2, 1e-5, 0.0):
        scales = torch.ones(len(structure.layers), structure.num_units)
        scales[:, victim] = scale
        gates.set_scales(scales)
        shares.clear()
        logits(model, moe_tokens())
        means.append(float(sum(shares)))
    assert means[0] > 0.5
    assert means[0] >= means[1] >= means[2] >= means[3] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_two_pruned_experts_have_a_finite_sum(dtype: torch.dtype):
    """Group-limited routing adds the best two scores of a group, and infinities that meet give NaN."""
    offsets = _Offsets()
    offsets.set(torch.tensor([1.0, 0.0, 0.0]), whole=False)
    spread = offsets.over(block_layout(1), torch.zeros(3, dtype=dtype))
    assert (2 * spread - spread.sum()).isfinite().all()
    assert spread.float().softmax(0).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_those_of_the_plain_backward(name: str, reentrant: bool):
    found = []
    for checkpointing in (False, True):
        model, gates, structure = gated(name)
        scales = torch.ones(len(structure.layers), structure.num_units)
        scales[:, 1], scales[:, 3] = 0.0, 0.3
        gates.set_scales(scales)
        model.train()
        if checkpointing:
            # which older Transformers call otherwise
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model(input_ids=moe_tokens(), labels=moe_tokens()).loss.backward()
        found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
        assert torch.overrides._get_current_function_mode_stack() == []
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert torch.equal(found[1][key], gradient), key
    pruned = next(gradient[1] for key, gradient in found[0].items() if key.endswith("gate_up_proj"))
    assert not pruned.any()


def test_a_stopped_forward_leaves_nothing_behind():
    """Checkpointing stops a recomputation by an exception wherever the last saved tensor is: in a router too."""
    model, gates, structure = gated("deepseek_v3")
    gates.set_scales(torch.full((len(structure.layers), structure.num_units), 0.5))
    router = next(module for name, module in model.named_modules() if name.endswith("mlp.gate"))
    bias = router.e_score_correction_bias
    router.norm_topk_prob = torch.zeros(2)  # its truth is ambiguous
    with pytest.raises(RuntimeError, match="ambiguous"):
        logits(model, moe_tokens())
    assert torch.overrides._get_current_function_mode_stack() == []
    assert router.e_score_correction_bias is bias
    states = torch.randn(4, 72, requires_grad=True)
    router.norm_topk_prob = True
    plain = router(states)[1]
    again = checkpoint(lambda value: router(value)[1], states, use_reentrant=False)
    assert torch.equal(plain, again)


def test_gates_belong_to_one_model_and_a_copy_takes_its_own_along():
    model, gates, structure = gated("mixtral")
    other, tokens = moe_model("mixtral"), moe_tokens()
    scales = torch.ones(len(structure.layers), structure.num_units)
    scales[:, 2] = 0.0
    gates.set_scales(scales)
    copied, pruned = copy.deepcopy(model), logits(model, tokens)
    gates.set_scales(torch.ones_like(scales))
    assert torch.equal(logits(copied, tokens), pruned)
    assert torch.equal(logits(other, tokens), logits(model, tokens))
    assert is_gated(copied)
    assert not is_gated(model)
    RouterGates.attach(copied, structure)  # in place of the old ones
    assert torch.equal(logits(copied, tokens), logits(other, tokens))
    with routed_by(other, structure, scales):
        assert torch.equal(logits(other, tokens), pruned)
    assert torch.equal(logits(other, tokens), logits(model, tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_narrow_dtype_stays_finite_and_misses_pruned_experts(name: str, dtype: torch.dtype):
    widths = {"moe_intermediate_size": 24} if name == "deepseek_v3" else {"intermediate_size": 56}
    model = moe_model(name, **widths).to(dtype)  # rows of 16 bytes: grouped kernels need them
    structure = expert_groups(type(model), model.config)
    gates = RouterGates.attach(model, structure)
    pruned = random_experts(structure, torch.Generator().manual_seed(2))
    gates.set_scales((~pruned).float())
    chosen: list[set[int]] = []
    for _, module in model.named_modules():
        if type(module).__name__.endswith("outer"):
            module.register_forward_hook(lambda _, args, result: chosen.append(set(result[2].flatten().tolist())))
    assert logits(model, moe_tokens()).isfinite().all()
    assert len(chosen) == len(structure.layers)
    for layer, used in zip(pruned, chosen, strict=True):
        assert not used & set(layer.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("name", "sizes", "named"),
    [
        ("mixtral", {"num_local_experts": 1}, r"between 2 and 6, for `num_experts_per_tok` \(2\)"),
        ("deepseek_v3", {"n_routed_experts": 8}, r"a multiple of 3 between 6 and 12, for .*`n_group` \(3\)"),
        ("deepseek_v3", {"n_routed_experts": 3}, r"between 6 and 12, for .*`topk_group` \(2\)"),
        ("mixtral", {"num_local_experts": 7}, "between 2 and 6"),
    ],
)
def test_sizes_that_the_router_cannot_work_with_are_refused(name: str, sizes: dict[str, int], named: str):
    with pytest.raises(HessoError, match=named):
        plan_of(name, target_sizes=sizes)


def plan_of(name: str, **options: Any) -> PruningPlan:
    return PruningPlan.prepare(moe_model(name), HessoConfig(structures=["experts"], **options))


@pytest.mark.parametrize("asked", ["num_local_experts", "num_experts"])
def test_target_sizes_take_the_config_s_own_name_or_the_common_one(asked: str):
    assert plan_of("mixtral", target_sizes={asked: 4}).target.sizes == {"num_experts": 4}


def test_a_ratio_keeps_what_group_limited_routing_needs():
    plan = plan_of("deepseek_v3", pruning_ratio=0.1)
    assert plan.target.kept_units == {EXPERT_UNITS: 9}
    with pytest.raises(BudgetError, match="num_experts"):
        plan_of("deepseek_v3", pruning_ratio=0.6)


def test_experts_are_pruned_only_by_name_and_refused_by_name():
    assert "experts" not in HessoConfig(pruning_ratio=0.5).structure_names
    assert "experts" not in PruningPlan.prepare(moe_model("mixtral"), HessoConfig(pruning_ratio=0.1)).groups.structures
    with pytest.raises(UnsupportedStructureError, match=r"experts: .*LlamaConfig has no `num_experts` above one"):
        PruningPlan.prepare(tiny_llama(), HessoConfig(pruning_ratio=0.1, structures=["experts"]))
    with pytest.raises(UnsupportedStructureError, match=r"all 2 are needed for `num_experts_per_tok` \(2\)"):
        PruningPlan.prepare(
            moe_model("mixtral", num_local_experts=2), HessoConfig(pruning_ratio=0.1, structures=["experts"])
        )
    with pytest.raises(HessoError, match="layer_widths"):
        HessoConfig(pruning_ratio=0.1, structures=["experts"], layer_widths="per_layer")


def test_an_expert_less_saves_parameters_and_of_the_operations_only_its_router_row():
    plan = plan_of("mixtral", target_sizes={"num_local_experts": 4})
    found = inspect_model(plan.model)
    per_expert = 3 * 52 * 72 + 72
    assert found.structures[EXPERT_UNITS].parameters_per_unit == per_expert
    assert found.structures[EXPERT_UNITS].relative_error < 1e-5
    assert "num_experts" not in found.feasible["0.2"]["sizes"]
    assert plan.target.parameters_before - plan.target.parameters_after == 2 * 2 * per_expert
    axis_map = probe_axes(type(plan.model), plan.model.config)
    flops = build_cost("flops", plan.groups, axis_map, plan.model.config)
    assert flops.full - flops({EXPERT_UNITS: 4}) == 2 * 2 * 2 * 72  # layers, experts, operations a weight, channels
    assert flops.full > 2 * 2 * 2 * 3 * 52 * 72  # two of the experts do their work


def test_each_routing_group_loses_as_many():
    structure = expert_groups(type(moe_model("deepseek_v3")), moe_model("deepseek_v3").config)
    config = HessoConfig(target_sizes={"n_routed_experts": 6}, structures=["experts"], saliency="magnitude")
    target = TargetSizes({EXPERT_UNITS: 6}, {EXPERT_UNITS: 12}, {}, "parameters", 1.0, 1.0, 1, 1)
    ranking = Ranking(PruningGroups({EXPERT_UNITS: structure}), target, config, {EXPERT_UNITS: 1})
    scores = torch.arange(12.0).expand(2, 12)  # the lowest four are all of the first group
    half = ranking.lowest({EXPERT_UNITS: scores}, Fraction(1, 2))[EXPERT_UNITS]
    assert half[0].nonzero().flatten().tolist() == [0, 4, 8]
    whole = ranking.lowest({EXPERT_UNITS: scores}, pruned={EXPERT_UNITS: half.roll(3, 1)})[EXPERT_UNITS]
    assert whole[1].nonzero().flatten().tolist() == [0, 3, 4, 7, 8, 11]


def expert_config(name: str = "deepseek_v3", **changes: Any) -> HessoConfig:
    sizes = {"n_routed_experts": 9} if name == "deepseek_v3" else {"num_local_experts": 4, "intermediate_size": 32}
    structures = ["experts"] if name == "deepseek_v3" else ["experts", "mlp_channels"]
    return hesso_config(**({"target_sizes": sizes, "structures": structures} | changes))


def test_the_trainer_saves_fewer_experts_and_a_resumed_run_is_the_same(tmp_path: Path):
    """Interrupted at step 5, where the experts of the second period have shrunk by half."""
    whole = trainer(tmp_path / "whole", moe_model("deepseek_v3"), expert_config(), save_strategy="steps", save_steps=5)
    whole.train()
    losses = logged(whole, "loss")
    scales = whole.hesso_optimizer.process.scales[EXPERT_UNITS]
    assert (scales == 0).view(-1, 3, 4).sum(-1).eq(1).all()
    resumed = trainer(tmp_path / "resumed", moe_model("deepseek_v3", seed=6), expert_config())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert logged(resumed, "loss") == losses
    state = resumed.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(state[key], value), key
    before = {key: value.clone() for key, value in whole.model.state_dict().items()}
    for parameter in whole.model.parameters():
        parameter.data.add_(1.0)
    whole.state.best_model_checkpoint = str(tmp_path / "whole" / "checkpoint-10")
    whole._load_best_model()
    best = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-10").state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(best[key], value), key
    whole.model.load_state_dict(before)
    whole.save_model(str(tmp_path / "small"))
    small = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.n_routed_experts == 9
    assert small.model.layers[1].mlp.gate.e_score_correction_bias.shape == (9,)
    assert relative_difference(logits(small, moe_tokens()), logits(whole.model, moe_tokens())) < 1e-5
    exported = export_pruned(tmp_path / "whole" / "checkpoint-10", tmp_path / "exported")  # its model has no gates
    assert exported.verification.fold_error < 1e-5


def test_shrinking_experts_are_gated_in_training_as_their_weights_are(tmp_path: Path):
    seen: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            process = run.hesso_optimizer.process
            gates = [hooks.offsets.values for _, hooks in _hooks_of(run.model) if isinstance(hooks, _LogitHooks)]
            scales = process.scales[EXPERT_UNITS]
            seen.append(scales.clone())
            for values, row in zip(gates, scales, strict=True):
                assert (values is None and (row == 1).all()) or torch.allclose(values.exp(), row)

    run = trainer(tmp_path, moe_model("mixtral"), expert_config("mixtral"), options={"callbacks": [Watch()]})
    run.train()
    assert any(((scales > 0) & (scales < 1)).any() for scales in seen)
    assert (seen[-1] == 0).sum() == 4
    run.save_model(str(tmp_path / "small"))
    assert run.pruning_report.sizes_after == {"num_experts": 4, "intermediate_size": 32}


def test_a_run_that_ends_on_trial_takes_the_gates_back(tmp_path: Path):
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if is_gated(run.model):
                control.should_training_stop = True
            return control

    options = {"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 1}
    config = expert_config(pruning_steps=4, **options)
    run = trainer(tmp_path, moe_model("deepseek_v3"), config, options={"callbacks": [Stop()]})
    run.train()
    assert run.state.global_step == 3
    assert not is_gated(run.model)


@pytest.mark.parametrize("mode", ["path", "probe"])
def test_cric_looks_with_the_gates_and_takes_them_back(mode: str, tmp_path: Path):
    options = {"cric": True, "cric_mode": mode, "cric_sampling_steps": 2, "cric_max_cycles": 1}
    config = expert_config(pruning_steps=4, **options)
    run = trainer(tmp_path, moe_model("deepseek_v3"), config, max_steps=12)
    levels: set[float] = set()
    route = BoundGroups.route

    def watched(bound: BoundGroups, scales: Any, ask: bool = True) -> None:
        levels.update(scales[EXPERT_UNITS].unique().tolist())
        acted = is_gated(run.model)
        route(bound, scales, ask)
        whole = bool((scales[EXPERT_UNITS] == 1).all())
        assert is_gated(run.model) is not whole
        assert ask or acted is not whole

    before_step, between = PruningProcess.before_step, []

    def stepping(process: PruningProcess, base: Any) -> None:
        if process.trial.ended and (process.scales[EXPERT_UNITS] == 1).all():
            between.append(is_gated(run.model))
        before_step(process, base)

    with patch.object(BoundGroups, "route", watched), patch.object(PruningProcess, "before_step", stepping):
        run.train()
    assert 0.5 in levels
    assert between
    assert not any(between)
    run.save_model(str(tmp_path / "small"))
    assert run.pruning_report.verification.fold_error < 1e-5


@pytest.mark.usefixtures("unshortened")
def test_the_calibration_measures_with_the_gates_on(tmp_path: Path):
    """All structures' curves: zeroed experts that are still routed to would cost something else."""
    config = expert_config("mixtral", target_sizes=None, pruning_ratio=0.3)
    run = trainer(tmp_path, moe_model("mixtral"), config)
    curves = run.hesso_run.curves()
    assert curves.removed[EXPERT_UNITS][0] == 1 / 6
    assert not is_gated(run.model)
    with patch("hesso_hf.pruning.calibration.routed_by", lambda *_: contextlib.nullcontext()):
        ungated = run.hesso_run.curves()
    assert ungated.rises[EXPERT_UNITS] != curves.rises[EXPERT_UNITS]
    assert ungated.rises["mlp_channels"] == curves.rises["mlp_channels"]


def test_a_wrong_structure_is_named_with_the_routers_left_gated(tmp_path: Path):
    """The other structure alone is compared with experts gated, so it isn't blamed for them."""
    _, model, groups, kept = pruned_model("mixtral")
    verifier = Verifier(WholeSource(model, Decision(groups, kept)))
    assert verifier.checked_cut()[1] < 1e-5
    verifier.logits = verifier.logits + 1.0
    with pytest.raises(VerificationError, match="experts"):
        verifier.checked_cut()
    assert verifier._error_of_cut(KeptUnits({}, {})) > 1e-3
    verifier.logits = verifier.logits - 1.0
    assert verifier._error_of_cut(KeptUnits({}, {})) < 1e-5
