"""The loss of the base model and of the smaller one on held-out and on other text, as `evaluate` has it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from hesso_hf import HessoTrainer
from hesso_hf.export import export_pruned
from hesso_hf.trainer.measure import Measurer
from tests.support import fsdp_cpu
from tests.support.checks import propagated
from tests.support.tiny import tiny_llama
from tests.support.training import blocks, hesso_config, logged, trainer

KEYS = ("eval_held_out_loss", "eval_retained_loss")


def uneven(count: int = 9) -> Dataset:
    """Blocks of which fewer and fewer tokens are predicted, of the last none."""
    data = blocks(count, seed=5)
    labels = [[-100] * (index + 2) + row[index + 2 :] for index, row in enumerate(data["labels"])]
    return Dataset.from_dict({"input_ids": data["input_ids"], "labels": labels})


def drawing(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Collate, and draw a random number as collators that mask do."""
    torch.rand(1)
    return default_data_collator(rows)


def made(
    folder: Path, data: Any, config: dict[str, Any] | None = None, data_collator: Any = None, **changes: Any
) -> HessoTrainer:
    """Build a run with dropout, to which random numbers matter."""
    options: dict[str, Any] = {"eval_dataset": data, "data_collator": data_collator}
    model = tiny_llama(attention_dropout=0.3)
    return trainer(folder, model, hesso_config(**(config or {})), options=options, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[HessoTrainer, dict[str, Any], dict[str, Any], Path]:
    """A run with two texts to evaluate on, what `evaluate` said before and after it, and the smaller model."""
    folder = tmp_path_factory.mktemp("run")
    data = {"held_out": uneven(), "retained": blocks(5, seed=2)}
    changes = {"per_device_eval_batch_size": 16, "save_strategy": "steps", "save_steps": 9}
    trained = made(folder / "out", data, **changes)
    before = trained.evaluate()
    trained.train()
    trained.save_model(str(folder / "small"))
    return trained, before, trained.evaluate(), folder


def test_the_report_has_what_evaluate_says_before_and_after(run: Any) -> None:
    _, before, after, folder = run
    quality = json.loads((folder / "small" / "pruning_report.json").read_text())["quality"]
    assert tuple(quality) == KEYS
    for key, examples, tokens in zip(KEYS, (8, 5), (36, 45), strict=True):
        assert (quality[key]["examples"], quality[key]["tokens"]) == (examples, tokens)
        for when, measured in (("before", before), ("after", after)):
            found = quality[key][when]
            assert abs(found["loss"] - measured[key]) <= 1e-5
            assert found["perplexity"] == math.exp(found["loss"])
        assert abs(quality[key]["before"]["loss"] - quality[key]["after"]["loss"]) > 1e-2


def test_card_and_page_show_it(run: Any) -> None:
    small = run[-1] / "small"
    found = json.loads((small / "pruning_report.json").read_text())["quality"]["eval_retained_loss"]
    before, after = (f"{found[when]['loss']:.4f}" for when in ("before", "after"))
    assert f"| loss on other text (nats per token) | {before} | {after} |" in (small / "README.md").read_text()
    assert f"<td>{before}</td><td>{after}</td>" in (small / "report.html").read_text()


def test_a_step_that_is_saved_again_is_not_measured_again(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measurer, "loss", lambda *_: pytest.fail("measured again"))
    run[0].save_model(str(tmp_path / "small"))
    assert "after" in run[0].hesso_run.quality.record()["eval_held_out_loss"]


def test_a_model_that_is_trained_further_is_measured_again(tmp_path: Path) -> None:
    run, found = made(tmp_path / "out", blocks(5, seed=2)), []
    for _ in range(2):
        run.train()
        run.save_model(str(tmp_path / "small"))
        found.append(run.hesso_run.quality.record()["eval_loss"])
    assert found[0]["before"] == found[1]["before"]
    assert found[0]["after"]["loss"] != found[1]["after"]["loss"]
    assert abs(found[1]["after"]["loss"] - run.evaluate()["eval_loss"]) <= 1e-5


def test_a_run_that_goes_on_has_the_base_model_s_loss_of_its_beginning(run: Any, tmp_path: Path) -> None:
    trained, *_, folder = run
    expected = trained.hesso_run.quality.record()
    later = made(tmp_path, {"held_out": uneven(), "retained": blocks(5, seed=2)})
    later.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-9"))
    later.save_model(str(tmp_path / "small"))
    assert later.hesso_run.quality.record() == expected


def test_an_export_of_a_checkpoint_says_what_was_measured_until_then(run: Any, tmp_path: Path) -> None:
    groups = run[0].hesso_plan.groups
    export_pruned(run[-1] / "out" / "checkpoint-9", tmp_path / "small", groups=groups)
    found = json.loads((tmp_path / "small" / "pruning_report.json").read_text())["quality"][KEYS[0]]
    assert "before" in found
    assert "after" not in found
    assert f"| {found['before']['loss']:.4f} | – |" in (tmp_path / "small" / "README.md").read_text()


def test_training_is_the_same_with_it_as_without(tmp_path: Path) -> None:
    runs = []
    for data in (blocks(7, seed=2), None):
        runs.append(made(tmp_path, data, data_collator=drawing))  # which sets the seed
        runs[-1].train()
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    assert all(torch.equal(a, b) for a, b in zip(*(one.model.parameters() for one in runs), strict=True))
    assert [one.hesso_run.record()["quality"] is None for one in runs] == [False, True]


@pytest.mark.parametrize(("count", "examples"), [(3, 3), (0, None)])
def test_it_takes_as_many_examples_as_it_may(count: int, examples: int | None, tmp_path: Path) -> None:
    run = made(tmp_path, blocks(7, seed=2), {"quality_examples": count})
    run.create_optimizer_and_scheduler(12)
    found = run.hesso_run.quality.record()
    assert (found and found["eval_loss"]["examples"]) == examples


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (RuntimeError("no such layer"), "`eval_loss` isn't measured before training: RuntimeError: no such layer"),
        (float("nan"), "`eval_loss` isn't measured before training: it is nan"),
    ],
)
def test_what_fails_is_named_and_costs_no_run(
    loss: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> torch.Tensor:
        if isinstance(loss, Exception):
            raise loss
        return torch.tensor(loss)

    run = made(tmp_path, blocks(7, seed=2))
    run.model.train().model.layers[0].eval()
    modes = [module.training for module in run.model.modules()]
    monkeypatch.setattr(Measurer, "loss", failing)
    with propagated(caplog):
        run.create_optimizer_and_scheduler(12)
    assert said in caplog.text
    assert [module.training for module in run.model.modules()] == modes
    assert run.hesso_run.quality.record() is None


def failing_job(folder: str, processes: int) -> None:
    """Measure one text with a loss that fails on the second process, and another with one that doesn't."""
    failing, fine = blocks(7, seed=2), blocks(5, seed=4)
    run = made(Path(folder) / "out", {"first": failing, "second": fine})
    rank, plain, text = run.args.process_index, run.compute_loss, torch.tensor(failing["input_ids"])

    def compute_loss(model: Any, inputs: Any, **kwargs: Any) -> Any:
        if rank == 1 and (text == inputs["input_ids"].cpu()).all(1).any():
            raise RuntimeError("no such layer")
        return plain(model, inputs, **kwargs)

    run.compute_loss = compute_loss  # type: ignore[method-assign]
    run.create_optimizer_and_scheduler(12)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(run.hesso_run.quality.record()))


def test_what_fails_on_one_process_is_left_out_on_all_and_none_waits(tmp_path: Path) -> None:
    done = fsdp_cpu.run(tmp_path, __name__, "failing_job", sharded=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0].keys() == {"eval_second_loss"}
    alone = made(tmp_path / "alone", {"second": blocks(5, seed=4)})
    alone.create_optimizer_and_scheduler(12)
    record = alone.hesso_run.quality.record()
    assert record is not None
    assert found[0]["eval_second_loss"]["before"]["loss"] == pytest.approx(record["eval_second_loss"]["before"]["loss"])
    assert done.stderr.count("`eval_first_loss` isn't measured before training: RuntimeError: no such layer") >= 1


@pytest.mark.parametrize("hindrance", ["engine", "trainer"])
def test_what_can_not_be_measured_is_named(
    hindrance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = made(tmp_path, blocks(7, seed=2))
    monkeypatch.setattr(Measurer, "loss", lambda *_: pytest.fail("measured all the same"))
    if hindrance == "engine":
        monkeypatch.setattr(run.hesso_engine, "measures_quality", False)
    else:
        run.hesso_run.measurer.generates = "it generates"
    with propagated(caplog):
        run.create_optimizer_and_scheduler(12)
    said = {"engine": "DeepSpeed computes in its own steps alone", "trainer": "it generates"}[hindrance]
    assert f"`eval_loss` isn't measured before training: {said}" in caplog.text


def test_under_autocast_the_base_model_computes_as_evaluate_does(tmp_path: Path) -> None:
    found = {}
    for bf16 in (False, True):
        run = made(tmp_path, blocks(5, seed=2), bf16=bf16, per_device_eval_batch_size=1)
        run.create_optimizer_and_scheduler(12)
        found[bf16] = run.hesso_run.quality.record()["eval_loss"]["before"]["loss"]
        assert abs(found[bf16] - run.evaluate()["eval_loss"]) <= 1e-5
    assert abs(found[True] - found[False]) > 1e-4
