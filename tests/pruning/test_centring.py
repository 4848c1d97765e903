"""Centring: layer norms subtract the stream's mean, so what is written to it ends with mean zero over kept channels."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hesso_hf import HessoConfig, HessoTrainer, export_pruned
from hesso_hf.pruning.calibration import measure_curves
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.process import PruningProcess
from hesso_hf.pruning.schedule import Schedule
from hesso_hf.structures.groups import Axis, KeptUnits, PruningGroups, portions_of
from hesso_hf.structures.layout import block_layout
from hesso_hf.structures.proof.prove import proved_groups
from tests.pruning.test_optimizer import adamw, still
from tests.support import families
from tests.support.checks import check_equal
from tests.support.families import STREAM
from tests.support.tiny import HIDDEN, backward, process_for, tiny_gpt2, tiny_llama, tiny_olmo, tiny_phi, token_batches
from tests.support.training import trainer

KEPT = {"embedding_channels": 54}
TOGETHER = {"attention_heads": 4, "embedding_channels": 40}  # of GPT-2: ten channels a head
MODELS: dict[str, Callable[[], PreTrainedModel]] = {"phi": tiny_phi, "gpt2": tiny_gpt2, "olmo": tiny_olmo}
SCHEDULE = Schedule(total_steps=12, warmup_steps=2, pruning_steps=7, pruning_periods=2)  # periods of 3 and 4 steps


def process_of(name: str, model: PreTrainedModel, schedule: Schedule = SCHEDULE, **config: Any) -> PruningProcess:
    return process_for(model, TOGETHER if name == "gpt2" else KEPT, schedule, **config)


def writers_of(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, int]]:
    """What writes to the stream, with the dimension along the channels, by the names that classes give it."""
    found: dict[str, tuple[torch.Tensor, int]] = {}
    for name, parameter in model.named_parameters():
        *_, module, leaf = name.split(".")
        if module in ("embed_tokens", "wte", "wpe"):
            found[name] = (parameter.data, 1)
        elif module in ("dense", "fc2", "o_proj", "down_proj", "c_proj"):
            found[name] = (parameter.data, 1 if module == "c_proj" and leaf == "weight" else 0)
    return found


def means_of(model: PreTrainedModel, kept: list[int]) -> dict[str, float]:
    """The largest mean over kept channels of everything that writes to the stream."""
    index = torch.tensor(kept)
    return {
        name: float(tensor.index_select(dim, index).double().mean(dim).abs().max())
        for name, (tensor, dim) in writers_of(model).items()
    }


# -- one tensor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
def test_the_mean_goes_to_the_channels_by_their_scales(dim: int):
    values = torch.tensor([[2.0, 4.0, 6.0, 0.0], [1.0, -1.0, 5.0, 0.0]])
    scales = torch.tensor([1.0, 1.0, 0.5, 0.0])
    expected = values - torch.tensor([[12.0], [5.0]]) / 2.5 * scales
    tensor = values.clone() if dim else values.T.clone()
    Axis("x", dim, block_layout(1), centred=True).centre_(tensor, portions_of(scales))
    torch.testing.assert_close(tensor if dim else tensor.T, expected)
    assert tensor.sum(dim).abs().max() < 1e-6


def test_a_share_of_the_mean_is_taken_out():
    bias = torch.tensor([3.0, 5.0, 7.0, 1.0])
    Axis("x", 0, block_layout(1), centred=True).centre_(bias, portions_of(torch.ones(4), 0.25))
    assert bias.tolist() == [2.0, 4.0, 6.0, 0.0]


def test_the_channels_of_an_embedding_that_lie_several_times_are_all_centred():
    bias = torch.randn(6)
    Axis("x", 0, block_layout(1)).centre_(bias, portions_of(torch.tensor([1.0, 0, 1, 0, 1, 1])))
    assert abs(float(bias.sum())) < 1e-5


# -- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_centring_changes_the_logits_of_tied_models_only(name: str):
    model = MODELS[name]()
    ids = families.token_ids(model.config)
    before = families.logits(model, ids)
    process = process_of(name, model)
    process.bound.centre_(process.scales)
    difference = families.relative_difference(families.logits(model, ids), before)
    assert (difference > 1e-3) if name == "gpt2" else (difference <= 1e-6)
    assert max(means_of(model, list(range(HIDDEN))).values()) <= 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_before_pruning_bit_for_bit(name: str):
    model = MODELS[name]()
    twin = copy.deepcopy(model)
    base, wrapped = adamw(twin), HessoOptimizer(adamw(model), process_of(name, model))
    for batch in token_batches(SCHEDULE.warmup_steps):
        for each, optimizer in ((model, wrapped), (twin, base)):
            backward(each, batch)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_in_the_first_period_the_mean_goes_in_even_steps_and_then_stays_away(name: str):
    """With an optimizer that moves nothing: step t of T leaves 1 - 1/(T-t) of the sum, and none after the last."""
    model = MODELS[name]()
    optimizer = HessoOptimizer(still(model), process_of(name, model))
    process = optimizer.process
    for step, batch in enumerate(token_batches(SCHEDULE.total_steps)):
        before = {key: tensor.double().clone() for key, (tensor, _) in writers_of(model).items()}
        scales = process.scales[STREAM][0].double().clone()
        backward(model, batch)
        optimizer.step()
        after = process.scales[STREAM][0].double()
        factors = torch.where(scales > 0, after / scales.clamp_min(1e-9), 0.0)
        left = 1.0 if step < 2 else {2: 2 / 3, 3: 1 / 2}.get(step, 0.0)
        for key, (tensor, dim) in writers_of(model).items():
            if left and key.endswith("attn.c_proj.weight"):  # its other axis shrinks too
                continue
            shape = [1] * tensor.dim()
            shape[dim] = -1
            expected = left * (before[key] * factors.view(shape)).sum(dim)
            torch.testing.assert_close(tensor.double().sum(dim), expected, rtol=0, atol=1e-5, msg=f"{step} {key}")
    assert int((process.scales[STREAM] == 0).sum()) == HIDDEN - process.target.kept_units[STREAM]


@pytest.mark.parametrize("name", MODELS)
def test_after_pruning_the_kept_channels_have_mean_zero_and_the_export_is_exact(name: str, tmp_path: Path):
    model = MODELS[name]()
    optimizer = HessoOptimizer(adamw(model), process_of(name, model))
    for step, batch in enumerate(token_batches(SCHEDULE.total_steps)):
        backward(model, batch)
        optimizer.step()
        if step >= SCHEDULE.end - 1:
            kept = optimizer.process.kept_units().kept[STREAM][0]
            assert max(means_of(model, list(kept)).values()) <= 1e-6, step
    assert len(kept) < HIDDEN
    export_pruned(model, tmp_path, kept_units=optimizer.process.kept_units(), groups=optimizer.process.groups)
    small = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = families.token_ids(model.config)
    assert small.config.hidden_size == len(kept)
    assert families.relative_difference(families.logits(small, ids), families.logits(model, ids)) <= 1e-5


def test_the_width_of_an_rms_norm_model_is_never_centred():
    model = tiny_llama()
    process = process_for(model, KEPT, SCHEDULE)
    before = copy.deepcopy(model)
    process.bound.centre_(process.scales)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_nothing_is_centred_where_the_width_stays():
    model = tiny_phi()
    optimizer = HessoOptimizer(still(model), process_for(model, {"mlp_channels": 33, STREAM: HIDDEN}, SCHEDULE))
    before = {key: tensor.clone() for key, (tensor, _) in writers_of(model).items() if "fc2.weight" not in key}
    for batch in token_batches(SCHEDULE.total_steps):
        backward(model, batch)
        optimizer.step()
    assert all(torch.equal(tensor, before[key]) for key, (tensor, _) in writers_of(model).items() if key in before)


# -- CRIC ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phi", "gpt2"])
def test_cric_returns_to_where_it_was_bit_for_bit(name: str):
    model = MODELS[name]()
    schedule = Schedule(total_steps=20, warmup_steps=2, pruning_steps=6, pruning_periods=2, cycle_steps=3, cycles=2)
    optimizer = HessoOptimizer(adamw(model), process_of(name, model, schedule, cric=True))
    process, before = optimizer.process, []
    returned = 0
    for step, batch in enumerate(token_batches(schedule.total_steps)):
        if step == schedule.warmup_steps:
            before = [parameter.detach().clone() for parameter in model.parameters()]
        backward(model, batch)
        optimizer.step()
        if before and not returned and process.trial.ended:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            returned = step
    assert returned
    kept = process.kept_units().kept[STREAM][0]
    assert len(kept) == process.target.kept_units[STREAM]
    assert max(means_of(model, list(kept)).values()) <= 1e-6


@pytest.mark.parametrize("name", ["phi", "gpt2"])
def test_a_probe_leaves_the_weights_as_they_were(name: str):
    model = MODELS[name]()
    schedule = Schedule(total_steps=9, warmup_steps=0, pruning_steps=6, pruning_periods=2)
    optimizer = HessoOptimizer(adamw(model), process_of(name, model, schedule, cric=True, cric_mode="probe"))
    before = copy.deepcopy(model)
    batches = token_batches(2)
    optimizer.process.probe([lambda batch=batch: model(input_ids=batch, labels=batch).loss for batch in batches])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert optimizer.process.trial.ended


# -- calibration and verification ---------------------------------------------------------------------------------


def stream_groups(model: PreTrainedModel) -> PruningGroups:
    groups = proved_groups(type(model), model.config)[0]
    return PruningGroups({STREAM: groups.structures[STREAM]})


@pytest.mark.usefixtures("unshortened")
def test_the_measured_rise_is_that_of_a_centred_model_and_leaves_the_weights_alone():
    model = tiny_phi()
    groups, before = stream_groups(model), copy.deepcopy(model)
    batches = token_batches(2)
    removed = []

    def loss(tried: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
        zero = (tried.model.embed_tokens.weight == 0).all(0)
        if zero.any():
            removed.append(int(zero.sum()))
            kept = (~zero).nonzero().flatten().tolist()
            assert max(means_of(tried, kept).values()) <= 1e-6
        return tried(input_ids=batch, labels=batch).loss

    curves = measure_curves(model, groups, batches, loss, HessoConfig(pruning_ratio=0.3))
    assert sorted(set(removed)) == [round(share * HIDDEN) for share in (0.125, 0.25, 0.5, 0.75, 0.875)]
    assert len(curves.rises[STREAM]) == 5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_model_in_half_precision_is_verified_without_what_rounding_left_of_the_mean(tmp_path: Path):
    model = tiny_phi()
    groups = stream_groups(model)
    kept = families.random_units(groups, {STREAM: 48})
    families.zero_pruned_(model, groups, kept)
    model = model.bfloat16()
    assert max(means_of(model, list(kept.kept[STREAM][0])).values()) > 1e-5  # rounding put some back
    before = copy.deepcopy(model)
    report = export_pruned(model, tmp_path, kept_units=kept, groups=groups)
    assert report.verification.fold_error <= 1e-5
    assert report.verification.rounding_error > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_layer_norm_model_that_was_not_centred_is_refused(tmp_path: Path):
    model = tiny_phi()
    groups = stream_groups(model)
    kept: KeptUnits = families.random_units(groups, {STREAM: 48})
    families.zero_pruned_(model, groups, kept)
    with torch.no_grad():
        model.model.layers[0].mlp.fc2.bias[list(kept.kept[STREAM][0])] += 0.5
    with pytest.raises(ValueError, match=r"logits differ.*embedding_channels"):
        export_pruned(model, tmp_path / "small", kept_units=kept, groups=groups)
    assert not (tmp_path / "small").exists()


# -- the trainer --------------------------------------------------------------------------------------------------


def run_of(folder: Path, name: str) -> HessoTrainer:
    sizes = {"phi": {"hidden_size": 48, "intermediate_size": 28}, "gpt2": {"hidden_size": 40, "intermediate_size": 28}}
    config = HessoConfig(
        target_sizes=sizes[name], warmup_steps=2, pruning_steps=6, pruning_periods=2, saliency_batches=2
    )
    return trainer(folder, MODELS[name](), config, save_strategy="steps", save_steps=1, max_steps=10)


@pytest.fixture(scope="module", params=["phi", "gpt2"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    run = run_of(tmp_path_factory.mktemp(request.param), request.param)
    run.train()
    return run


def test_the_trainer_saves_an_exact_small_model(undisturbed: HessoTrainer, tmp_path: Path):
    undisturbed.save_model(str(tmp_path))
    model, small = undisturbed.model, AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = families.token_ids(model.config)
    assert small.config.hidden_size < HIDDEN
    assert families.relative_difference(families.logits(small, ids), families.logits(model, ids)) <= 1e-5


@pytest.mark.parametrize("step", [3, 6])  # inside the first period, while the mean goes, and inside the second
def test_interrupted_equals_uninterrupted(undisturbed: HessoTrainer, tmp_path: Path, step: int):
    shutil.copytree(Path(undisturbed.args.output_dir) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    name = "gpt2" if undisturbed.model.config.model_type == "gpt2" else "phi"
    run = run_of(tmp_path, name)
    run.train(resume_from_checkpoint=True)
    check_equal(run, undisturbed)
