"""Trainers with losses, steps, data and callbacks of their own: what the run adds reaches them, or they are told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import Trainer, TrainerCallback, default_data_collator

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.errors import HessoError
from tests.support.checks import propagated
from tests.support.tiny import VOCAB, tiny_llama
from tests.support.training import ALONE, arguments, blocks, hesso_config, trainer

SHORT: dict[str, Any] = {
    "pruning_ratio": 0.3, "warmup_steps": 2, "pruning_steps": 4, "pruning_periods": 2, "calibration_examples": 2,
    "healing": "off",
}  # fmt: skip


class OwnLoss(HessoTrainer):
    """Computes its loss without the class that it is of."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnStep(HessoTrainer):
    """Takes its step without the class that it is of."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (OwnLoss, {"replay_share": 0.5}, r"`replay_share` \(0.5\): OwnLoss.compute_loss doesn't call .*replay"),
        (OwnStep, {"replay_share": 0.5}, r"`replay_share` \(0.5\): OwnStep.training_step doesn't call .*replay"),
        (
            OwnLoss,
            {"replay_share": 0.0, "distillation_alpha": 0.9},
            r"`distillation_alpha` \(0.9\): OwnLoss.compute_loss doesn't call .*the teacher",
        ),
    ],
)
def test_a_loss_or_step_of_its_own_that_passes_teachers_by_is_refused_where_they_were_asked_for(
    kind: type, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, trainer_class=kind, config=HessoConfig(**SHORT | options), max_steps=8)
    with pytest.raises(HessoError, match=said):
        run.train()
    assert run.state.global_step == 1


def test_replay_that_nobody_asked_for_is_let_go_there_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hesso_hf.trainer.replay.MOST_WRITTEN", 1e9)  # in so short a run
    monkeypatch.setattr("hesso_hf.trainer.knowledge.KNOWN", math.inf)
    run = trainer(tmp_path, trainer_class=OwnLoss, config=HessoConfig(**SHORT), max_steps=8)
    with propagated(caplog):
        run.train()
    assert "so nothing is learnt from the base model: replay and distillation are off" in caplog.text
    assert run.hesso_run.record()["replay"] is None
    assert run.hesso_run.record()["distillation"] is None


def test_a_step_of_its_own_learns_from_a_teacher_all_the_same(tmp_path: Path) -> None:
    config = hesso_config(distillation_alpha=0.9)
    run = trainer(tmp_path, trainer_class=OwnStep, config=config)
    run.train()
    assert run.distillation is not None


@pytest.mark.parametrize("options", [{"replay_share": 0.5}, {"distillation_alpha": 0.5}])
def test_the_logged_loss_has_what_a_subclass_adds_and_nothing_of_a_teacher(
    options: dict[str, Any], tmp_path: Path
) -> None:
    class Penalised(HessoTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + 5.0

    first = {}
    for name, changes in (("alone", {}), ("taught", options)):
        config = hesso_config(**changes)
        run = trainer(tmp_path / name, trainer_class=Penalised, config=config, gradient_accumulation_steps=2)
        run.train()
        first[name] = next(entry["loss"] for entry in run.state.log_history if "loss" in entry)
    assert first["taught"] == pytest.approx(first["alone"], abs=1e-5)


class Once(TorchIterableDataset):
    """Can be read once."""

    def __init__(self, count: int) -> None:
        self._rows = iter([{name: torch.tensor(value) for name, value in row.items()} for row in blocks(count)])

    def __iter__(self) -> Iterator[Any]:
        return self._rows


def test_evaluation_reads_all_of_a_stream_that_can_be_read_once(tmp_path: Path) -> None:
    def rows(predictions: Any) -> dict[str, float]:
        return {"rows": float(len(predictions.predictions))}

    losses = []
    for kind, more in ((Trainer, {}), (HessoTrainer, {"hesso_config": hesso_config()})):
        run = kind(
            tiny_llama(), arguments(tmp_path, max_steps=7, learning_rate=0.0), train_dataset=blocks(),
            eval_dataset={"once": Once(100), "less": Once(40)}, compute_metrics=rows, **more,
        )  # fmt: skip
        if kind is HessoTrainer:
            assert run.hesso_run.measurer.singles.of(run.eval_dataset["once"], 64)
        found = run.evaluate()
        assert (found["eval_once_rows"], found["eval_less_rows"]) == (100, 40)
        losses.append(found["eval_once_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_collator_that_fails_with_one_row_is_given_as_many_as_in_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def pairs(rows: list[Any]) -> Any:
        assert len(rows) > 1, "needs pairs"
        return default_data_collator(rows)

    config = HessoConfig(**{**SHORT, "healing": "auto"}, replay_share=0.0, quality_examples=4)
    options = {"data_collator": pairs, "eval_dataset": blocks(12)}
    run = trainer(tmp_path, config=config, options=options, max_steps=8)
    with propagated(caplog):
        run.train()
    assert "the data collator fails with one example (needs pairs): losses before" in caplog.text
    assert {len(example["input_ids"]) for example in run.hesso_run.measurer.examples(3)} == {4}
    assert run.hesso_run.record()["quality"]["eval_loss"]["examples"] == 4
    assert run.hesso_plan.curves.rises


def test_what_fails_in_training_too_is_the_collator_s_own_error(tmp_path: Path) -> None:
    def broken(rows: list[Any]) -> Any:
        raise KeyError("no such column")

    run = trainer(tmp_path, config=HessoConfig(**SHORT, replay_share=0.0), options={"data_collator": broken})
    with pytest.raises(KeyError, match="no such column"):
        run.train()


def test_a_stream_of_the_hub_is_not_opened_for_each_question(tmp_path: Path) -> None:
    opened: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        opened.append(1)
        yield from blocks(64)

    stream = IterableDataset.from_generator(rows)
    run = trainer(tmp_path, data=stream, config=hesso_config())
    singles = run.hesso_run.measurer.singles
    opened.clear()
    few = singles.of(stream, 4)
    again = [example["input_ids"].tolist() for example in singles.of(stream, 3)]
    assert again == [example["input_ids"].tolist() for example in few[:3]]
    assert len(opened) == 1
    assert len(singles.of(stream, 100)) == len(singles.of(stream, 200)) == 64  # all that there are
    assert len(opened) == 2


class Average(TrainerCallback):
    """Keeps an average of the weights, as copies of the model or of its tensors."""

    def __init__(self, as_module: bool) -> None:
        self._as_module, self.average = as_module, None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._as_module:
            self.average = {name: value.detach().clone() for name, value in model.named_parameters()}
            return
        self.average = self.average or AveragedModel(model)
        self.average.update_parameters(model)


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("compact", ["auto", "end"])
def test_a_callback_that_averages_weights_has_the_model_stay_whole(
    as_module: bool, compact: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, config=hesso_config(compact=compact), options={"callbacks": [Average(as_module)]})
    with propagated(caplog):
        run.train()
    assert run.hesso_run.record()["compaction"] is None
    assert ("Average (`average`) keeps a copy of its weights" in caplog.text) == (compact == "end")
    run.save_model(str(tmp_path / "small"))
    assert run.pruning_report.pruning_ratio > 0.1


@pytest.mark.parametrize("reads", [True, False])
def test_nothing_is_asked_of_callbacks_that_keep_no_weights(reads: bool, tmp_path: Path) -> None:
    class Reads(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.model, self.last = model, [torch.zeros(3)]

    run = trainer(tmp_path, config=hesso_config(compact="end"), options={"callbacks": [Reads()] if reads else None})
    run.train()
    assert run.hesso_run.record()["compaction"] is not None


def test_what_structures_cost_is_measured_with_checkpointed_layers_where_training_has_them(tmp_path: Path) -> None:
    held, most = [0], {}

    def pack(tensor: torch.Tensor) -> Any:
        held[0] += tensor.numel()
        most[phase] = max(most.get(phase, 0), held[0])
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        held[0] -= tensor.numel()
        return tensor

    ids = torch.randint(3, VOCAB, (4, 64), generator=torch.Generator().manual_seed(3)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    curves = []
    for phase in (False, True):
        model = tiny_llama(num_hidden_layers=6, attention_dropout=0.5, max_position_embeddings=64)
        config = HessoConfig(**{**ALONE, **SHORT})
        run = trainer(tmp_path, model=model, data=data, config=config, max_steps=8, gradient_checkpointing=phase)
        if phase:
            model.gradient_checkpointing_enable()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            curves.append(run.hesso_run.measurer.curves(model, run.hesso_plan.groups))
        held[0] = 0
        assert not any(module.training for module in model.modules()) or model.training
    assert most[True] < most[False] / 3
    for name, rises in curves[0].rises.items():
        assert rises == pytest.approx(curves[1].rises[name], abs=1e-6)


def test_without_room_for_a_backward_pass_structures_share_the_cut_evenly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = trainer(tmp_path, config=HessoConfig(**{**ALONE, **SHORT}), max_steps=8)
    monkeypatch.setattr("hesso_hf.pruning.calibration._scores", full)
    with propagated(caplog):
        run.train()
    assert "they share the cut evenly: there is no room for a backward pass of 10 tokens (gradient" in caplog.text
    assert run.hesso_optimizer.process.finished


def test_a_model_on_several_devices_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1}
    with pytest.raises(HessoError, match=r"several devices.*`device_map`.*choose FSDP2"):
        trainer(tmp_path, model=model, config=hesso_config())


def test_no_replay_where_processes_share_a_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = SimpleNamespace(cp_enabled=True, sp_enabled=False, sp_backend="", tp_enabled=False, cp_size=2)
    make = Trainer.create_accelerator_and_postprocess

    def make_parallel(self: Trainer) -> None:
        make(self)
        monkeypatch.setattr(self.accelerator.state, "parallelism_config", parallel, raising=False)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", make_parallel)
    with pytest.raises(HessoError, match=r"`replay_share` \(0.5\): `parallelism_config` has processes share"):
        trainer(tmp_path, config=HessoConfig(**SHORT, replay_share=0.5))


def test_a_copy_of_the_weights_that_another_process_keeps_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an average on the main process alone: one that cut without the others would wait for them for ever."""
    monkeypatch.setattr("hesso_hf.trainer.compacting.from_all", lambda own: [own, "Average (`average`)"])
    run = trainer(tmp_path, config=hesso_config(compact="auto"))
    run.train()
    assert run.hesso_run.record()["compaction"] is None


def test_a_model_that_vllm_serves_stays_whole(tmp_path: Path) -> None:
    run = trainer(tmp_path, config=hesso_config(compact="end"))
    run.args.use_vllm = True
    with pytest.raises(HessoError, match=r"`compact` \('end'\).*`use_vllm` \(True\): vLLM takes weights of no other"):
        run.train()
