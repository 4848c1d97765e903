"""A run whose model becomes the smaller one when pruning ends: losses, checkpoints, resume, export, and refusals."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hesso_hf import HessoConfig, HessoTrainer, export_pruned
from hesso_hf.errors import CheckpointMismatchError, HessoError, VerificationError
from hesso_hf.export.checkpoint_state import read_state
from hesso_hf.pruning.compaction import parallel_of
from hesso_hf.structures.in_place import InPlace
from tests.pruning.test_optimizer_state import SIZES as FEW_BITS
from tests.pruning.test_optimizer_state import WIDE, is_in_few_bits
from tests.support import ROOT
from tests.support.checks import propagated
from tests.support.tiny import tiny_llama
from tests.support.training import hesso_config, logged, trainer
from tests.trainer.test_distributed import launch
from tests.trainer.test_resume import check_equal

NO_OTHER: dict[str, Any] = {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 1e-2})}  # whose state isn't known
END = 7  # steps after which pruning has ended


def made(folder: Path, compact: str = "end", **changes: Any) -> HessoTrainer:
    config = changes.pop("config", None) or hesso_config(compact=compact)
    return trainer(folder, config=config, **changes)


def done(folder: Path, compact: str = "end", **changes: Any) -> HessoTrainer:
    run = made(folder, compact, **changes)
    run.train()
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    """A run that writes a checkpoint every step."""
    return done(tmp_path_factory.mktemp("whole"), save_strategy="steps", save_steps=1)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    """The same run without compaction."""
    return done(tmp_path_factory.mktemp("masked"), "never")


def checkpoint(run: HessoTrainer, step: int) -> Path:
    return Path(run.args.output_dir) / f"checkpoint-{step}"


def resumed(run: HessoTrainer, step: int, folder: Path, **changes: Any) -> HessoTrainer:
    shutil.copytree(checkpoint(run, step), folder / f"checkpoint-{step}")
    again = made(folder, **changes)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return again


def test_the_loss_goes_on_where_it_was(whole: HessoTrainer, masked: HessoTrainer) -> None:
    ours, theirs = logged(whole, "loss"), logged(masked, "loss")
    assert ours[:END] == theirs[:END]
    assert abs(ours[END] - theirs[END]) < 1e-5  # the first step of the smaller model
    assert ours[END + 1] != theirs[END + 1]  # where channels went, steps are others in proportion to the weights
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.02
    assert whole.model.num_parameters() == whole.hesso_plan.target.parameters_after < masked.model.num_parameters()
    assert whole.model_wrapped is whole.model


def test_checkpoints_after_the_cut_are_small_stock_models_and_say_so(whole: HessoTrainer) -> None:
    for step, size, holds in ((END - 1, 44, "dense"), (END, 28, "smaller"), (12, 28, "smaller")):
        folder = checkpoint(whole, step)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model) is LlamaForCausalLM
        assert model.config.intermediate_size == size
        assert json.loads((folder / "hesso_state.json").read_text())["holds"] == holds
        card = (folder / "README.md").read_text()
        assert ("# The smaller model, in training" in card) == (holds == "smaller")
        assert ("A dense model, not the smaller one" in card) == (holds == "dense")
    assert f"cut out after step {END}" in card
    for ours, theirs in zip(model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# before the cut, right after it, later
@pytest.mark.parametrize("step", [END - 1, END, 10])
def test_interrupted_equals_uninterrupted(whole: HessoTrainer, step: int, tmp_path: Path) -> None:
    run = resumed(whole, step, tmp_path)
    check_equal(run, whole)
    assert run.hesso_run.record()["compaction"] == whole.hesso_run.record()["compaction"]
    theirs = whole.model.config.to_dict()  # what saving adds differs
    assert {k: v for k, v in run.model.config.to_dict().items() if v != theirs[k]}.keys() <= {"architectures", "dtype"}


def test_weights_alone_go_on_after_the_cut(whole: HessoTrainer, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 10, "save_only_model": True}
    run = done(tmp_path, **options)
    again = resumed(run, 10, tmp_path / "again")
    assert again.model.num_parameters() == run.model.num_parameters()
    assert again.state.global_step == 12


def test_the_saved_model_is_the_trained_one_whoever_saves_it(whole: HessoTrainer, tmp_path: Path) -> None:
    whole.save_model(str(tmp_path / "saved"))
    report = export_pruned(checkpoint(whole, 12), tmp_path / "exported")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("saved", "exported")]
    in_memory = whole.pruned_model()
    for name, parameter in in_memory.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name
        assert all(torch.equal(file[name], parameter) for file in files), name
    assert in_memory is not whole.model
    assert whole.pruning_report is not None
    ours, theirs = whole.pruning_report.to_dict(), report.to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= {"base_model"}  # this one has no name
    assert ours["parameters"] == {"before": tiny_llama().num_parameters(), "after": whole.model.num_parameters()}
    assert ours["sizes"]["before"]["hidden_size"] == 60
    assert ours["sizes"]["after"]["hidden_size"] == 48
    assert ours["compaction"]["step"] == END
    assert ours["kept_units"] == whole._process.kept_units().to_dict()
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"cut out after step {END} of the training" in card
    assert "with its pruned units at zero" not in card
    with pytest.raises(HessoError, match=r"`kept_units`: the model in .* is the smaller one already"):
        export_pruned(checkpoint(whole, 12), tmp_path / "other", kept_units=whole._process.kept_units())


def test_the_export_is_that_of_the_masked_run_where_nothing_was_trained_since(tmp_path: Path) -> None:
    small = []
    for compact in ("end", "never"):
        run = made(tmp_path / compact, compact, max_steps=12, save_strategy="steps", save_steps=END)
        run.train()
        export_pruned(checkpoint(run, END), tmp_path / compact / "small")
        small.append(load_file(tmp_path / compact / "small" / "model.safetensors"))
    for name, ours in small[0].items():
        assert torch.equal(ours, small[1][name]), name


def test_the_best_checkpoint_is_a_small_one(tmp_path: Path) -> None:
    run = done(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        options={"eval_dataset": made(tmp_path / "x").train_dataset.select(range(4))},
    )  # fmt: skip
    best = Path(run.state.best_model_checkpoint or "")
    assert int(best.name.rpartition("-")[2]) >= END
    for ours, theirs in zip(
        run.model.parameters(), AutoModelForCausalLM.from_pretrained(best).parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_nothing_of_the_larger_model_is_left(tmp_path: Path) -> None:
    run = done(tmp_path, model=tiny_llama(intermediate_size=46))  # a size that no other test has
    gc.collect()
    tensors = [held for held in gc.get_objects() if type(held) in (torch.Tensor, torch.nn.Parameter)]
    assert any(held is run.model.lm_head.weight for held in tensors)
    assert not [held.shape for held in tensors if 46 in held.shape and held.numel() > 1000]  # the state has 46 scales


def test_a_second_call_of_train_goes_on_with_the_smaller_model(tmp_path: Path) -> None:
    run = done(tmp_path, save_strategy="steps", save_steps=6)
    with pytest.raises(CheckpointMismatchError, match="go on with the model that the run began with"):
        run.train(resume_from_checkpoint=str(checkpoint(run, 6)))
    run.train()
    assert run.model.num_parameters() == run.hesso_plan.target.parameters_after
    run.train(resume_from_checkpoint=str(checkpoint(run, 12)))


def test_a_checkpoint_of_the_smaller_model_is_resumed_with_the_larger_one_alone(
    whole: HessoTrainer, tmp_path: Path
) -> None:
    last = checkpoint(whole, 10)
    small = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
    config = HessoConfig(target_sizes={"intermediate_size": 20}, healing="off", replay_share=0.0)
    with pytest.raises(CheckpointMismatchError):
        trainer(tmp_path, model=small, config=config).train(resume_from_checkpoint=str(last))
    other = made(tmp_path, model=tiny_llama(num_hidden_layers=3))
    with pytest.raises(CheckpointMismatchError, match="go on with the model that the run began with"):
        other.train(resume_from_checkpoint=str(last))
    again = made(tmp_path)
    again.args.auto_find_batch_size = True
    with pytest.raises(CheckpointMismatchError, match="is the smaller one already, with which `auto_find_batch_size`"):
        again.hesso_run.compacting.check_resumable(read_state(last), str(last))


_TWO = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.trainer.test_compacting import two_processes
two_processes(Path(sys.argv[1]))
"""


def two_processes(folder: Path) -> None:
    """Train with a cut on the way, from a checkpoint after one, and where a process has no room for it."""
    half = {"compact": "auto", "per_device_train_batch_size": 2}
    cut = made(folder / "cut", **half, max_steps=12, save_strategy="steps", save_steps=10)
    cut.train()
    resumed = made(folder / "resumed", **half)
    resumed.train(resume_from_checkpoint=str(folder / "cut" / "checkpoint-10"))
    plain = InPlace.put
    if cut.args.process_index:
        InPlace.put = Mock(side_effect=torch.OutOfMemoryError)  # type: ignore[method-assign]
    masked = made(folder / "masked", **half)
    masked.train()
    InPlace.put = plain  # type: ignore[method-assign]
    for name, run in {"cut": cut, "resumed": resumed, "masked": masked}.items():
        assert run.args.world_size == 2
        assert parallel_of(run.model_wrapped) is not None
        weights = dict(run.accelerator.unwrap_model(run.model).named_parameters())
        torch.save(weights, folder / f"{name}-{run.args.process_index}.pt")
    cut.save_model(str(folder / "small"))


def test_two_processes_cut_as_one_does(whole: HessoTrainer, masked: HessoTrainer, tmp_path: Path) -> None:
    launched = launch(_TWO, str(tmp_path), str(ROOT))
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert launched.stderr.count("stays whole, its pruned units at zero") == 2
    for name, expected in {"cut": whole, "resumed": whole, "masked": masked}.items():
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for key, parameter in expected.model.named_parameters():
            assert torch.equal(ranks[0][key], ranks[1][key]), (name, key)
            assert (ranks[0][key] - parameter).abs().max() < 1e-5, (name, key)
    cut, resumed = (torch.load(tmp_path / f"{name}-0.pt", weights_only=True) for name in ("cut", "resumed"))
    assert all(torch.equal(cut[key], resumed[key]) for key in cut)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.hidden_size == 48


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True}, {"gradient_checkpointing": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}, {"optim": "adafactor"},
    ],
    ids=["bf16", "checkpointing", "compile", "accumulation", "no clipping", "adafactor"],
)  # fmt: skip
def test_it_works_under_other_settings(options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (logged(done(tmp_path / c, c, max_steps=9, **options), "loss") for c in ("end", "never"))
    assert ours[:END] == theirs[:END]
    assert abs(ours[END] - theirs[END]) < (5e-3 if "bf16" in options else 1e-5)


@pytest.mark.engines
@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_torch_8bit"])
def test_a_state_in_few_bits_is_cut_and_goes_on_bit_for_bit(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # torchao's: a minute for each shape
    config = hesso_config(target_sizes=FEW_BITS, pruning_ratio=None, compact="end")
    options = {"config": config, "optim": optim, "save_strategy": "steps", "save_steps": 1}
    whole = made(tmp_path / "whole", model=tiny_llama(**WIDE), **options)
    whole.train()
    assert whole.model.config.intermediate_size == FEW_BITS["intermediate_size"]
    optimizer: Any = whole.optimizer
    assert any(is_in_few_bits(value) for state in optimizer.optimizer.base.state.values() for value in state.values()
               if isinstance(value, torch.Tensor))  # fmt: skip
    again = resumed(whole, END, tmp_path / "again", model=tiny_llama(**WIDE), **options)
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_had_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesso_hf.trainer.run.PruningRun.new_process", lambda _: pytest.fail("work was done"))
    refused = r"`compact` \('end'\): the model in memory stays whole: "
    with pytest.raises(HessoError, match=refused + "`layer_widths`"):
        made(tmp_path, config=hesso_config(compact="end", layer_widths="per_layer"))
    with pytest.raises(HessoError, match=refused + "`auto_find_batch_size`"):
        made(tmp_path, auto_find_batch_size=True)
    with pytest.raises(HessoError, match=refused + "the state of .*NAdam can't be cut"):
        made(tmp_path, options=NO_OTHER).train()
    with monkeypatch.context() as patch:
        patch.setattr("transformers.TrainingArguments.n_gpu", 2)
        with pytest.raises(HessoError, match=refused + "DataParallel copies it"):
            made(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    with pytest.raises(HessoError, match=refused + "regional compilation"):
        made(tmp_path, torch_compile=True, torch_compile_backend="eager")


def test_by_default_what_cannot_be_cut_stays_masked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with propagated(caplog), caplog.at_level(logging.INFO, logger="hesso_hf.trainer.compacting"):
        run = done(tmp_path, "auto", options=NO_OTHER)
    assert "`compact` ('auto'): the model in memory stays whole, its pruned units at zero: the state of" in caplog.text
    assert run.model.config.hidden_size == 60
    run.save_model(str(tmp_path / "small"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.hidden_size == 48


@pytest.mark.parametrize("kind", [VerificationError, torch.OutOfMemoryError])
def test_a_cut_that_fails_leaves_the_run_masked_with_a_warning(
    kind: type[Exception],
    masked: HessoTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(*_: Any) -> None:
        raise kind("the reason")

    monkeypatch.setattr("hesso_hf.engines.engine.compact", failing)
    with propagated(caplog):
        run = done(tmp_path)
    assert "stays whole, its pruned units at zero: the reason" in caplog.text
    assert logged(run, "loss") == logged(masked, "loss")


def test_a_cut_that_failed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def failing(*_: Any) -> None:
        tried.append(True)
        raise VerificationError("the logits differ")

    monkeypatch.setattr("hesso_hf.engines.engine.compact", failing)
    run = done(tmp_path, max_steps=END)
    run.hesso_run.compacting.at_the_end()  # as after a step that is skipped
    assert tried == [True]
