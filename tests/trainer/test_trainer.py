"""HessoTrainer: the whole job through the real Trainer."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.optimization import Adafactor

from hesso_hf import HessoConfig, HessoMixin, HessoTrainer, export_pruned
from hesso_hf.engines.deepspeed import engine as zero_engine
from hesso_hf.errors import (
    BudgetError,
    HessoError,
    TrainingDivergedError,
    UnsupportedStructureError,
    VerificationError,
)
from hesso_hf.export.publish import staged_folder
from hesso_hf.hf_models.tiny_model import logits_of, relative_error
from hesso_hf.pruning import calibration
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.weights.bound_groups import BoundGroups
from tests.support.lora import lora_run
from tests.support.tiny import QUERIES, tiny_llama
from tests.support.training import arguments, blocks, hesso_config, logged, said_by_the_dense_model, trainer


def check_small_model(run: HessoTrainer, folder: Path, sizes: dict[str, int]) -> None:
    """The saved model has the sizes, is a stock class and gives the trained model's logits."""
    small = AutoModelForCausalLM.from_pretrained(folder)
    for name, size in sizes.items():
        assert getattr(small.config, name) == size, name
    assert type(small).__module__.startswith("transformers.")
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = logits_of(run.model.eval(), ids)
    assert relative_error(logits_of(small, ids), expected) <= 1e-5
    assert (logits_of(small, ids) - expected).abs().max() <= 1e-4


def test_trains_prunes_and_saves_a_smaller_stock_model(tmp_path: Path) -> None:
    run = trainer(tmp_path / "out")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    run.save_model(str(tmp_path / "small"))
    check_small_model(run, tmp_path / "small", hesso_config().pinned_sizes)
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert report["sizes"]["before"]["intermediate_size"] == 44
    assert report["sizes"]["after"]["intermediate_size"] == 28
    assert report["schedule"] == {
        "warmup_steps": 2, "pruning_steps": 5, "pruning_periods": 2, "total_steps": 12,
        "cycle_steps": 0, "cycles": 0, "pauses": [],
    }  # fmt: skip
    assert report["saliency"] == {"taylor_second_order": 1.0}
    assert report["verification"]["fold_error"] <= 1e-5
    assert [len(layer) for layer in report["kept_units"]["mlp_channels"]["kept"]] == [28, 28]
    assert any(not torch.equal(before[name], p) for name, p in run.model.named_parameters())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.use_cache


@pytest.mark.parametrize(
    "cric", [{}, {"cric": True}, {"cric": True, "cric_mode": "probe"}], ids=["hesso", "path", "probe"]
)
def test_query_heads_from_the_first_step_to_the_small_model(cric: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 6, "intermediate_size": 28}
    config = hesso_config(structures=["query_heads", "mlp_channels"], target_sizes=sizes, **cric)
    model = tiny_llama(num_attention_heads=QUERIES)  # four for each of three key-value heads
    run = trainer(tmp_path / "out", model=model, config=config, max_steps=20)
    run.train()
    run.save_model(str(tmp_path / "small"))
    check_small_model(run, tmp_path / "small", sizes | {"num_key_value_heads": 3, "head_dim": 8, "hidden_size": 60})
    for layer in run.hesso_optimizer.process.kept_units().kept["query_heads"]:
        assert [sum(head // 4 == kv_head for head in layer) for kv_head in range(3)] == [2, 2, 2]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    prompt, settings = torch.tensor([[5, 9, 33, 12]]), {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    full, cached, plain = (
        each.eval().generate(prompt, use_cache=use, **settings)
        for each, use in ((run.model, False), (small, True), (small, False))
    )
    assert torch.equal(full, cached)
    assert torch.equal(full, plain)


def test_the_split_is_measured_with_as_many_query_heads_of_every_key_value_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: set[int] = set()

    class Spy(BoundGroups):
        def mask_weights_(self, pruned: Mapping[str, torch.Tensor], shifted_only: bool = False) -> None:
            for layer in pruned.get("query_heads", ()):
                (count,) = set(layer.view(3, 4).sum(1).tolist())
                removed.add(count)
            super().mask_weights_(pruned, shifted_only)

    monkeypatch.setattr(calibration, "BoundGroups", Spy)
    config = HessoConfig(pruning_ratio=0.25, structures=["query_heads", "mlp_channels"], round_to=1)
    run = trainer(tmp_path / "out", model=tiny_llama(num_attention_heads=QUERIES), config=config)
    run.train()
    assert removed == {1, 2, 3}
    curves = run.hesso_plan.curves
    assert curves is not None
    assert curves.removed["query_heads"] == (0.25, 0.5, 0.75)
    assert run.hesso_optimizer.process.target.kept_units["query_heads"] % 3 == 0
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    full = tiny_llama(num_attention_heads=QUERIES).num_parameters()
    assert 1 - small.num_parameters() / full == pytest.approx(0.25, abs=0.01)


def test_ratio_is_the_share_of_the_parameters(tmp_path: Path) -> None:
    config = HessoConfig(pruning_ratio=0.3, round_to=1)
    run = trainer(tmp_path, config=config)
    full = sum(p.numel() for p in run.model.parameters())
    run.train()
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    removed = 1 - sum(p.numel() for p in small.parameters()) / full
    assert abs(removed - 0.3) <= 0.01
    assert run.pruning_report is not None
    assert run.pruning_report.pruning_ratio == pytest.approx(removed, abs=1e-12)


def test_logs_phase_units_ratios_and_norm(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    assert logged(run, "hesso/phase") == [0.0] + [2.0] * 5 + [3.0] * 6  # the phase of the step that comes next
    assert logged(run, "hesso/pruned_mlp_channels") == [0.0] * 3 + [16.0] * 3 + [32.0] * 6
    assert logged(run, "hesso/pruned_attention_heads") == [0.0] * 6 + [2.0] * 6  # round(1 * 1/2) = 0 in period one
    ratios = logged(run, "hesso/pruned_ratio")
    assert ratios[-1] == pytest.approx(logged(run, "hesso/target_ratio")[-1], abs=1e-9)
    assert ratios == sorted(ratios)
    norms = logged(run, "hesso/redundant_norm")
    assert norms[2] > 0
    assert norms[-1] == 0.0
    assert run.hesso_optimizer.seconds > 0


def test_two_equal_runs_log_the_same_but_for_how_long_they_took(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / name) for name in ("first", "second")]
    for run in runs:
        run.train()
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}  # Trainer's own
    first, second = ([{k: entry[k] for k in entry.keys() - timed} for entry in run.state.log_history] for run in runs)
    assert first == second
    assert len(first) == 13


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"])
def test_any_optimizer_of_the_training_arguments(tmp_path: Path, optim: str) -> None:
    rate = 1e-2 if optim != "rmsprop" else 1e-3
    run = trainer(tmp_path, optim=optim, learning_rate=rate)
    run.train()
    run.save_model(str(tmp_path / "small"))
    check_small_model(run, tmp_path / "small", hesso_config().pinned_sizes)


def test_optimizers_given_by_the_user(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    run = trainer(tmp_path, model=model, options={"optimizers": (optimizer, scheduler)})
    run.train()
    assert run.hesso_optimizer.base is optimizer
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 13)
    run.save_model(str(tmp_path / "small"))
    check_small_model(run, tmp_path / "small", hesso_config().pinned_sizes)


def test_optimizer_class_and_keywords(tmp_path: Path) -> None:
    options = {"optimizer_cls_and_kwargs": (Adafactor, {"lr": 1e-3, "relative_step": False, "scale_parameter": False})}
    run = trainer(tmp_path, options=options)
    run.train()
    assert isinstance(run.hesso_optimizer.base, Adafactor)
    assert run.hesso_optimizer.process.finished


def test_without_anything_to_prune_it_is_the_plain_trainer_bit_for_bit(tmp_path: Path) -> None:
    nothing = {"num_key_value_heads": 3, "intermediate_size": 44, "hidden_size": 60}
    for name, changes in {"plain": {}, "accumulated": {"gradient_accumulation_steps": 4}}.items():
        run = trainer(tmp_path / name, config=hesso_config(target_sizes=nothing), **changes)
        plain = Trainer(model=tiny_llama(), args=arguments(tmp_path / name, **changes), train_dataset=blocks())
        run.train()
        plain.train()
        for (key, ours), theirs in zip(run.model.named_parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), key


def test_accumulation_sees_the_same_gradients(tmp_path: Path) -> None:
    runs = [
        trainer(tmp_path / "whole", per_device_train_batch_size=8),
        trainer(tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=8),
    ]
    for run in runs:
        run.train()
    assert runs[0].hesso_optimizer.process.kept_units() == runs[1].hesso_optimizer.process.kept_units()
    for ours, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 2e-4


def test_saliency_sees_the_gradient_before_clipping(tmp_path: Path) -> None:
    """With clipping to almost nothing the sums still have the raw gradient's size."""
    sums = []
    for clip in (1e-6, 0.0, 1e6):
        run = trainer(tmp_path, learning_rate=0.0, weight_decay=0.0, max_grad_norm=clip, max_steps=8)
        run.add_callback(_StopBefore(2))
        run.train()
        sums.append(run.hesso_optimizer.process.state.sums.sums["mlp_channels"]["xg2"].clone())
    assert sums[0].max() > 1e-12
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


class _StopBefore(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"max_steps": -1, "num_train_epochs": 1},
     {"torch_compile": True, "torch_compile_backend": "eager"}, {"gradient_checkpointing": True},
     {"lr_scheduler_type": "cosine", "warmup_steps": 3}],
    ids=["bf16", "epochs", "compile", "checkpointing", "cosine"],
)  # fmt: skip
def test_training_arguments_are_honoured(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = trainer(tmp_path, **changes)
    run.train()
    run.save_model(str(tmp_path / "small"))
    assert run.hesso_optimizer.process.schedule.total_steps == (16 if "num_train_epochs" in changes else 12)
    check_small_model(run, tmp_path / "small", hesso_config().pinned_sizes)


def test_streamed_data_and_measured_split(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(blocks())

    run = trainer(tmp_path, config=HessoConfig(pruning_ratio=0.3, round_to=1), data=Stream())  # type: ignore[arg-type]
    run.train()
    curves = run.hesso_plan.curves
    assert curves is not None
    assert set(curves.rises) == {"attention_heads", "mlp_channels", "embedding_channels"}
    assert run.hesso_optimizer.process.finished


def test_calibration_changes_neither_weights_nor_random_state(tmp_path: Path) -> None:
    run = trainer(tmp_path, config=HessoConfig(pruning_ratio=0.3))
    before = [p.detach().clone() for p in run.model.parameters()]
    state = torch.random.get_rng_state()
    curves = run.hesso_run.curves()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert all(p.grad is None for p in run.model.parameters())
    assert any(rise > 0 for rises in curves.rises.values() for rise in rises)


@pytest.mark.parametrize("hidden", [False, True])
def test_calibration_shows_how_far_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str], hidden: bool) -> None:
    config = HessoConfig(pruning_ratio=0.3, calibration_examples=2)
    trainer(tmp_path, config=config, disable_tqdm=hidden).hesso_run.curves()
    shown = capfd.readouterr().err
    assert ("Measuring what structures cost: 100%" in shown) is not hidden


def test_a_model_that_does_not_fit_the_device_whole_is_not_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before DeepSpeed takes a model that only all its processes together can hold."""
    run = trainer(tmp_path, config=HessoConfig(pruning_ratio=0.3))
    size = sum(parameter.numel() * 4 for parameter in run.model.parameters())
    asked = []
    monkeypatch.setattr(
        zero_engine,
        "device_with_room",
        lambda *wanted: asked.append(wanted) or torch.device("meta"),
    )
    with _propagated(caplog):
        run.hesso_engine = zero_engine.DeepSpeedEngine(run.args, run.accelerator, run.hesso_config)
        run.hesso_run.settle()
    assert run.hesso_plan.curves is None
    assert asked == [(run.args.device, size)]  # of its gradients: it lies there already
    assert "share the cut evenly. Give `structures` shares" in caplog.text


def test_per_layer_widths(tmp_path: Path) -> None:
    config = HessoConfig(
        target_sizes={"intermediate_size": 20, "num_key_value_heads": 2}, layer_widths="per_layer",
        warmup_steps=2, pruning_steps=4, saliency_batches=2,
    )  # fmt: skip
    model = tiny_llama()
    with torch.no_grad():  # the first layer's channels matter far more
        model.model.layers[0].mlp.down_proj.weight.mul_(30)
    run = trainer(tmp_path, model=model, config=config, learning_rate=1e-4)
    run.train()
    kept = [len(layer) for layer in run.hesso_optimizer.process.kept_units().kept["mlp_channels"]]
    assert sum(kept) == 40
    assert kept[0] != kept[1]
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert [layer.mlp.gate_proj.out_features for layer in small.model.layers] == kept
    ids = torch.randint(3, 60, (2, 12))
    assert relative_error(logits_of(small, ids), logits_of(run.model.eval(), ids)) <= 1e-5
    generated = [small.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*generated)


# -- saving ------------------------------------------------------------------------------------------------------------


def test_saving_before_pruning_has_finished_writes_the_dense_model_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path)
    run.add_callback(_StopBefore(4))
    run.train()
    with _propagated(caplog):
        run.save_model(str(tmp_path / "dense"))
    assert "step 4 of 7" in caplog.text
    assert "dense" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config.intermediate_size == 44


def test_saving_after_an_interrupt_writes_the_dense_model(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    run = trainer(tmp_path)
    run.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.save_model(str(tmp_path / "dense"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config.intermediate_size == 44


def test_published_folder_has_no_pickle_and_keeps_other_files(tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", save_strategy="steps", save_steps=6)
    run.train()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run.save_model()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md", "pruning_report.json"} <= names
    assert {"checkpoint-6", "checkpoint-12", "notes.txt"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}


def test_a_failing_verification_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    run.train()
    with monkeypatch.context() as patch:
        patch.setattr("hesso_hf.export.verify.FOLD_TOLERANCE", -1.0)
        with pytest.raises(VerificationError, match="embedding_channels") as caught:
            run.save_model(str(tmp_path / "small"))
    assert not (tmp_path / "small").exists()
    kept = tmp_path / "small-dense"
    assert f"is saved in {kept}" in str(caught.value)
    for found, trained in zip(LlamaForCausalLM.from_pretrained(kept).parameters(), run.model.parameters(), strict=True):
        assert torch.equal(found, trained)
    assert_same_small(run, kept, tmp_path)


def assert_same_small(run: HessoTrainer, dense: Path, folder: Path) -> None:
    """Export what was saved in the smaller model's place, and compare with the smaller model that the run saves."""
    export_pruned(dense, folder / "again")
    run.save_model(str(folder / "small"))
    files = [load_file(folder / name / "model.safetensors") for name in ("again", "small")]
    assert files[0].keys() == files[1].keys()
    assert max(float((files[0][name] - files[1][name]).abs().max()) for name in files[0]) < 1e-6


def test_a_failing_verification_of_an_adapter_keeps_what_base_and_adapter_are_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lora_run(tmp_path)
    run.train()
    with monkeypatch.context() as patch:
        patch.setattr("hesso_hf.export.verify.FOLD_TOLERANCE", -1.0)
        with pytest.raises(VerificationError, match="small-dense"):
            run.save_model(str(tmp_path / "small"))
    assert_same_small(run, tmp_path / "small-dense", tmp_path)


def test_memory_that_runs_out_while_the_small_model_is_made_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, held, asked = lora_run(tmp_path), [], []
    run.train()

    def cut_model(model: Any, *args: Any) -> None:
        held.append(weakref.ref(model.lm_head.weight))  # of the copy in fp32
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    def fp32_place(model: Any) -> torch.device:
        asked.append((model, held[-1]()))
        return torch.device("cpu")

    with monkeypatch.context() as patch:
        patch.setattr("hesso_hf.export.parameters.cut_model", cut_model)
        patch.setattr("hesso_hf.trainer.saving.fp32_place", fp32_place)
        with pytest.raises(HessoError) as caught:
            run.save_model(str(tmp_path / "small"))
        assert asked == [(run.hesso_run.model, None)], "the adapters are merged where there is room, with the copy gone"
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(HessoError, match=r"can't be saved in .* either .* still in memory: make room, then"):
            run.save_model(str(tmp_path / "file" / "small"))
    said = str(caught.value)
    assert not isinstance(caught.value, VerificationError)
    assert said.startswith(
        "memory ran out while the smaller model was made (CUDA out of memory. Tried to allocate 2 GiB)"
    )
    assert f"is saved in {tmp_path / 'small-dense'}" in said
    assert not (tmp_path / "small").exists()
    assert_same_small(run, tmp_path / "small-dense", tmp_path)


def test_whatever_fails_in_making_the_smaller_model_what_was_trained_is_saved(tmp_path: Path, monkeypatch: Any) -> None:
    def cut_model(*args: Any) -> None:
        raise AttributeError("no such attribute")

    run = trainer(tmp_path, max_steps=8)
    run.train()
    with monkeypatch.context() as patch:
        patch.setattr("hesso_hf.export.parameters.cut_model", cut_model)
        with pytest.raises(HessoError, match=r"can't be made \(AttributeError: no such attribute\)") as caught:
            run.save_model(str(tmp_path / "small"))
    assert f"is saved in {tmp_path / 'small-dense'}" in str(caught.value)
    assert_same_small(run, tmp_path / "small-dense", tmp_path)


def test_load_best_model_chooses_among_pruned_ones(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        learning_rate=0.002, options={"eval_dataset": said_by_the_dense_model()},
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint is not None
    best = int(run.state.best_model_checkpoint.rpartition("-")[2])
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert min(losses, key=losses.__getitem__) < 7  # a dense step had the lowest loss of all
    assert best >= 8  # pruning ended with step 7
    assert losses[best] == min(loss for step, loss in losses.items() if step >= 7)
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    run.save_model(str(tmp_path / "small"))
    check_small_model(run, tmp_path / "small", hesso_config().pinned_sizes)


def test_pruned_units_of_the_best_model_are_at_zero_whatever_its_file_says(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=12)
    run.train()
    best = tmp_path / "checkpoint-12" / "model.safetensors"
    stored = {name: values + 0.01 for name, values in load_file(best).items()}
    save_file(stored, best, metadata={"format": "pt"})
    run.state.best_model_checkpoint = str(best.parent)
    run._load_best_model()
    kept = run._process.kept_units().kept["mlp_channels"][0]
    found = run.model.model.layers[0].mlp.up_proj.weight.detach()
    wanted = torch.zeros_like(found)
    columns = run._process.kept_units().kept["embedding_channels"][0]
    wanted[torch.tensor(kept)[:, None], torch.tensor(columns)] = stored["model.layers.0.mlp.up_proj.weight"][
        torch.tensor(kept)[:, None], torch.tensor(columns)
    ]
    assert torch.equal(found, wanted)
    run.save_model(str(tmp_path / "small"))
    check_small_model(run, tmp_path / "small", hesso_config().pinned_sizes)


def test_create_optimizer_returns_one_that_prunes(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    found = run.create_optimizer()
    assert isinstance(found, HessoOptimizer)
    assert run.hesso_optimizer is found
    assert run.create_optimizer() is found


def test_random_states_of_all_are_saved_before_any_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that says that a checkpoint is whole comes next."""
    events = []
    monkeypatch.setattr(Trainer, "_save_rng_state", lambda *_: events.append("saved"))
    run = trainer(tmp_path)
    monkeypatch.setattr("hesso_hf.distributed.together.from_all", lambda value: events.append("waited") or [value])
    with run._checkpoint.doing(shared=True):
        run._save_rng_state(str(tmp_path))
        assert events == ["saved", "waited"]


@pytest.mark.parametrize("named", [False, True])
def test_what_a_subclass_names_as_counted_is_left_alone_by_measurements(tmp_path: Path, named: bool) -> None:
    class Counting(HessoTrainer):
        hesso_counted = (*HessoTrainer.hesso_counted, "seen") if named else HessoTrainer.hesso_counted
        seen = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            return super().compute_loss(*args, **kwargs)

    run = trainer(tmp_path, config=HessoConfig(pruning_ratio=0.3), trainer_class=Counting)
    run.seen = 5
    run.hesso_run.curves()
    assert (run.seen == 5) is named


def test_early_stopping_waits_for_the_end_of_pruning(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        learning_rate=0.002,
        options={"eval_dataset": said_by_the_dense_model(), "callbacks": [EarlyStoppingCallback(2)]},
    )  # fmt: skip
    run.train()
    assert run.state.global_step >= 7


def test_a_second_save_replaces_the_first_one(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "small"))
    first = (tmp_path / "small" / "model.safetensors").read_bytes()
    run.save_model(str(tmp_path / "small"))
    assert (tmp_path / "small" / "model.safetensors").read_bytes() == first
    with pytest.raises(OSError, match="disk"), staged_folder(tmp_path / "small"):
        raise OSError("the disk is full")
    check_small_model(run, tmp_path / "small", hesso_config().pinned_sizes)


# -- composition and bad input -----------------------------------------------------------------------------------------


def test_mixin_with_another_trainer_class(tmp_path: Path) -> None:
    class Scaled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs)
            return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss

    class ScaledHesso(HessoMixin, Scaled):
        pass

    run = trainer(tmp_path, trainer_class=ScaledHesso, config=HessoConfig(pruning_ratio=0.3))
    run.train()
    run.save_model(str(tmp_path / "small"))
    assert isinstance(run, Scaled)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.num_parameters() == run.model.num_parameters() < tiny_llama().num_parameters()


def test_model_init(tmp_path: Path) -> None:
    """It is called for the trainer, and again when training begins: the first model isn't kept."""
    run = HessoTrainer(
        model_init=lambda: tiny_llama(), args=arguments(tmp_path), train_dataset=blocks(), hesso_config=hesso_config()
    )
    first = weakref.ref(run.model)
    run.train()
    gc.collect()
    assert first() is None
    run.save_model(str(tmp_path / "small"))
    check_small_model(run, tmp_path / "small", hesso_config().pinned_sizes)


def test_non_finite_steps_are_skipped_and_three_in_a_row_stop_the_run(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def __init__(self, steps: set[int]) -> None:
            self.steps = steps

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            bad = state.global_step in self.steps
            self.handle = model.lm_head.weight.register_hook(lambda grad: grad * float("nan")) if bad else None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.handle is not None:
                self.handle.remove()

    run = trainer(tmp_path / "two")
    run.add_callback(Poison({3, 4, 6}))
    run.train()
    assert run.hesso_optimizer.process.step == 9  # of 12, three were skipped
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert run.hesso_optimizer.process.finished

    run = trainer(tmp_path / "three", save_strategy="steps", save_steps=2)
    run.add_callback(Poison({3, 4, 5}))
    with pytest.raises(TrainingDivergedError, match="checkpoint-4"):
        run.train()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: hesso_config(warmup_steps=9),
            r"`warmup_steps` \(9\) \+ `pruning_steps` \(5\) = 14 exceed the run's 12",
        ),
        (lambda: hesso_config(pruning_steps=0.1, pruning_periods=4), r"`pruning_steps` \(1\).*`pruning_periods` \(4\)"),
    ],
)
def test_a_schedule_that_does_not_fit_fails_before_the_first_step(tmp_path: Path, config: Any, message: str) -> None:
    run = trainer(tmp_path, config=config())
    with pytest.raises(HessoError, match=message):
        run.train()
    assert run.state.global_step == 0


def test_bad_input_fails_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(HessoError, match="hesso_config"):
        HessoTrainer(model=tiny_llama(), args=arguments(tmp_path), train_dataset=blocks())
    with pytest.raises(BudgetError, match="nearest feasible"):
        trainer(tmp_path, config=HessoConfig(pruning_ratio=0.9, structures=["attention_heads"]))
    with pytest.raises(HessoError, match=r"intermediate_siz.*did you mean 'intermediate_size'"):
        trainer(tmp_path, config=HessoConfig(target_sizes={"intermediate_siz": 8}))
    with pytest.raises(UnsupportedStructureError, match="PreTrainedModel"):
        trainer(tmp_path, model=torch.nn.Linear(3, 3))  # type: ignore[arg-type]


def test_pure_half_precision_weights_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with _propagated(caplog):
        run = trainer(tmp_path, model=tiny_llama().bfloat16())
    assert "fp32 masters" in caplog.text
    run.train()
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.dtype == torch.bfloat16
    assert run.pruning_report is not None
    assert run.pruning_report.verification.fold_error <= 1e-5
    assert run.pruning_report.verification.rounding_error > 1e-5


# -- what users' trainers and data bring along -------------------------------------------------------------------------


def test_label_smoothing_and_a_loss_function_of_ones_own(tmp_path: Path) -> None:
    def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        losses = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return losses * labels.numel() / num_items_in_batch

    ratio = HessoConfig(pruning_ratio=0.3)
    for changes, options in (({"label_smoothing_factor": 0.1}, {}), ({}, {"compute_loss_func": summed})):
        run = trainer(tmp_path, config=ratio, options=options, **changes)
        run.train()
        assert run.hesso_plan.curves is not None
        assert run._process.finished


def test_an_example_without_labels_is_left_out_of_the_measurement(tmp_path: Path) -> None:
    data = blocks().to_dict()
    data["labels"][0] = [-100] * len(data["labels"][0])
    run = trainer(tmp_path, config=HessoConfig(pruning_ratio=0.3), data=Dataset.from_dict(data))
    run.train()
    assert run.hesso_plan.curves is not None
    rises = [rise for curve in run.hesso_plan.curves.rises.values() for rise in curve]
    assert all(torch.isfinite(torch.tensor(rise)) for rise in rises)
    assert len(rises) > 5


def test_optimizers_with_a_train_mode(tmp_path: Path) -> None:
    class ScheduleFreeLike(torch.optim.SGD):
        training = False

        def train(self) -> None:
            self.training = True

        def eval(self) -> None:
            self.training = False

        def step(self, closure: Any = None) -> Any:
            assert self.training, "train() was not called"
            return super().step(closure)

    run = trainer(tmp_path, options={"optimizer_cls_and_kwargs": (ScheduleFreeLike, {"lr": 1e-2})})
    run.train()
    assert run._process.finished


def test_frozen_layers_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.requires_grad_(False)
    with pytest.raises(UnsupportedStructureError, match=r"mlp_channels of model.layers.1: all weights are frozen"):
        trainer(
            tmp_path,
            model=model,
            config=hesso_config(structures=["mlp_channels"], target_sizes={"intermediate_size": 28}),
        )


def test_uneven_heads_are_exported_too(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(30)
    config = HessoConfig(
        target_sizes={"num_key_value_heads": 2}, layer_widths="per_layer", warmup_steps=2, pruning_steps=2,
        pruning_periods=1, saliency="magnitude",
    )  # fmt: skip
    run = trainer(tmp_path, model=model, config=config, learning_rate=1e-5)
    run.train()
    kept = [len(layer) for layer in run._process.kept_units().kept["attention_heads"]]
    assert kept == [3, 1]
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert [layer.self_attn.k_proj.out_features for layer in small.model.layers] == [24, 8]


def test_a_dense_save_removes_the_card_of_an_earlier_small_model(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "model"))
    again = trainer(tmp_path)
    again.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "pruning_report.json").exists()
    assert not (tmp_path / "model" / "README.md").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.intermediate_size == 44


class _propagated:
    """Let pytest see the log of transformers, which doesn't propagate by default."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.caplog = caplog

    def __enter__(self) -> None:
        for name in ("transformers", "hesso_hf"):
            logging.getLogger(name).addHandler(self.caplog.handler)

    def __exit__(self, *error: object) -> None:
        for name in ("transformers", "hesso_hf"):
            logging.getLogger(name).removeHandler(self.caplog.handler)


def test_flash_attention_that_has_no_fp32_stands_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels take half precision only; the split is measured, and logits are compared, in fp32."""
    dtypes = set()

    def half_only(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        wanted = get_target_dtype(query, module) or query.dtype  # as transformers' own wrapper casts
        dtypes.add(wanted)
        if wanted == torch.float32:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return sdpa_attention_forward(module, *(part.to(wanted) for part in (query, *args[:2])), *args[2:], **kwargs)

    AttentionInterface.register("flash_stand_in", half_only)
    AttentionMaskInterface.register("flash_stand_in", sdpa_mask)
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, **_: name)
    model = tiny_llama()
    model.set_attn_implementation("flash_stand_in")
    run = trainer(tmp_path, model, HessoConfig(0.3, pruning_steps=4, calibration_examples=2), max_steps=8, bf16=True)
    run.train()
    run.save_model(str(tmp_path / "small"))
    assert dtypes == {torch.bfloat16}
    assert run.pruning_report is not None
    assert run.pruning_report.verification.fold_error < 1e-5
    assert run.hesso_plan.curves is not None
    assert model.config._attn_implementation == "flash_stand_in"


def test_an_optimizer_that_a_subclass_makes_itself_is_pruned_around(tmp_path: Path) -> None:
    class Mine(HessoTrainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
            return self.optimizer

    run = trainer(tmp_path, trainer_class=Mine, save_strategy="steps", save_steps=4)
    run.train()
    assert isinstance(run.hesso_optimizer.base, torch.optim.SGD)
    assert run._process.finished
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.num_parameters() < run.model.num_parameters()
    resumed = trainer(tmp_path, trainer_class=Mine, save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for a, b in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_healing_takes_examples_that_lie_between_those_that_are_measured_on(tmp_path: Path) -> None:
    measurer = trainer(tmp_path).hesso_run.measurer
    for count in (4, 16, 32):
        first, others = (
            {tuple(example["input_ids"].flatten().tolist()) for example in measurer.examples(count, between)}
            for between in (False, True)
        )
        assert len(first) == len(others) == count
        assert not first & others


def test_a_config_of_another_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(HessoError, match=r"`hesso_config` \(dict\) must be a HessoConfig"):
        HessoTrainer(tiny_llama(), arguments(tmp_path), hesso_config={"pruning_ratio": 0.5})


def test_an_optimizer_for_a_number_of_steps_needs_no_data(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=-1)
    run.train_dataset = None
    with pytest.raises(HessoError, match=r"how many steps the run has: set `max_steps`, give `train_dataset`, or call"):
        run.create_optimizer()
    run.create_optimizer_and_scheduler(30)
    assert run.hesso_optimizer.process.schedule.total_steps == 30
    assert run.lr_scheduler is not None


def test_training_again_goes_on_with_the_pruned_model(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    kept, before = run.hesso_optimizer.process.kept_units(), run.model.lm_head.weight.detach().clone()
    run.train()
    assert run.state.global_step == 12
    assert run.hesso_optimizer.process.kept_units() == kept
    assert not torch.equal(run.model.lm_head.weight, before)
    run.save_model(str(tmp_path / "small"))
    check_small_model(run, tmp_path / "small", hesso_config().pinned_sizes)
