"""`EvalCallback`: tasks at each evaluation, in the log and the metrics, and nothing else of the run changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hesso_hf import EvalCallback
from hesso_hf.bundled import bundled_model_path
from hesso_hf.cli.main import main
from hesso_hf.errors import HessoError
from tests.support import fsdp_cpu
from tests.support.checks import propagated
from tests.support.lm_eval import stand_in
from tests.support.tiny import tiny_llama
from tests.support.training import blocks, trainer

EVERY_FOURTH: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the stand-in for lm-eval is asked."""
    return stand_in(monkeypatch)


def run_of(folder: Path, eval_dataset: Any = None, **changes: Any) -> Any:
    options = {
        "eval_dataset": eval_dataset or blocks(8, seed=5),
        "processing_class": AutoTokenizer.from_pretrained(bundled_model_path()),
    }
    return trainer(folder, model=tiny_llama(attention_dropout=0.2), options=options, **EVERY_FOURTH, **changes)


def test_scores_are_logged_at_each_evaluation_and_a_best_model_is_chosen_by_them(
    asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = run_of(tmp_path, save_strategy="steps", save_steps=4, load_best_model_at_end=True,
                 metric_for_best_model="eval_lambada_acc", greater_is_better=True)  # fmt: skip
    run.add_callback(EvalCallback(run, "lambada", limit=5, num_fewshot=2, batch_size=3))
    run.train()
    with_scores = [entry for entry in run.state.log_history if "eval_lambada_acc" in entry]
    logged = [(entry["step"], entry["eval_lambada_acc"]) for entry in with_scores]
    assert logged == [(4, 0.25), (8, 0.5), (12, 0.75)]
    entry = with_scores[0]
    assert (entry["eval_lambada_acc_stderr"], entry["eval_lambada_em_strict"]) == (0.0123, 0.5)
    assert run.state.best_metric == 0.75
    assert run.state.best_model_checkpoint.endswith("checkpoint-12")
    assert all((of["tasks"], of["limit"], of["num_fewshot"]) == (["lambada"], 5, 2) for of in asked)
    assert all(of["model"].batch_size == 3 for of in asked)
    assert [run.evaluate()["eval_lambada_acc"] for _ in range(2)] == [1.0, 1.25], "by hand it asks each time"


def test_a_recipe_names_them_too(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"{i} and {i} make {2 * i}" for i in range(400)))
    flags = [
        "prune", "--model", "bundled", "--dataset", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "run"),
        "--max_steps", "4", "--pruning_ratio", "0.3", "--block_size", "32", "--per_device_train_batch_size", "2",
        "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no",
        "--calibration_examples", "0", "--stream_basis", "given", "--healing", "off", "--eval_strategy", "steps",
        "--eval_steps", "2", "--eval_tasks", "lambada", "--eval_tasks_limit", "3",
    ]  # fmt: skip
    assert main(flags) == 0
    assert [(of["tasks"], of["limit"]) for of in asked] == [(["lambada"], 3)] * 2
    assert "eval_lambada_acc 0.5" in capsys.readouterr().out


def test_the_run_is_what_it_is_without(asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever lm-eval draws, and whether it leaves the model in training mode; data sets by name ask once."""
    import lm_eval

    plain, modes = lm_eval.simple_evaluate, []

    def draws(**given: Any) -> Any:
        torch.manual_seed(0)
        modes.append(given["model"].pretrained.training)
        return plain(**given)

    monkeypatch.setattr(lm_eval, "simple_evaluate", draws)
    data = {name: blocks(8, seed=seed) for name, seed in (("one", 5), ("two", 6))}
    found = []
    for name in ("with", "without"):
        run = run_of(tmp_path / name, data)
        if name == "with":
            run.add_callback(EvalCallback(run, "lambada"))
        run.train()
        found.append(run.model.state_dict())
    assert modes == [False] * 3
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_task_that_fails_ends_no_run(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import lm_eval

    def simple_evaluate(**given: Any) -> Any:
        raise ConnectionError("no data of lambada")

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    run = run_of(tmp_path)
    run.add_callback(EvalCallback(run, "lambada"))
    with propagated(caplog):
        run.train()
    assert run.state.global_step == 12
    assert "ConnectionError: no data of lambada: no score of tasks; training goes on" in caplog.text


def test_what_cannot_be_asked_is_refused(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    run = run_of(tmp_path)
    with pytest.raises(HessoError, match=r"`tasks` \('lambda'\): lm-eval has no such task \(did you mean 'lambada'"):
        EvalCallback(run, "lambda")
    with pytest.raises(HessoError, match="need the tokenizer: give the trainer `processing_class`"):
        EvalCallback(trainer(tmp_path), "lambada")


def job(folder: str, processes: int) -> None:
    """Train with tasks, and leave what each process logged and was asked."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = stand_in(monkeypatch)
        run = run_of(Path(folder), per_device_train_batch_size=2)
        run.add_callback(EvalCallback(run, "lambada"))
        run.train()
    logged = [entry["eval_lambada_acc"] for entry in run.state.log_history if "eval_lambada_acc" in entry]
    rank = run.args.process_index
    Path(folder, f"rank{rank}.json").write_text(json.dumps({"asked": len(found), "logged": logged}))


def sharded_job(folder: str, processes: int) -> None:
    """Say why there are no tasks where no process has the whole model."""
    with pytest.raises(HessoError, match="no process has the whole model under FSDP and DeepSpeed; evaluate checkp"):
        EvalCallback(run_of(Path(folder)), "lambada")
    print("REFUSED", flush=True)


def test_the_main_process_asks_and_all_know(tmp_path: Path) -> None:
    done = fsdp_cpu.run(tmp_path, __name__, "job", sharded=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found == [{"asked": 3, "logged": [0.25, 0.5, 0.75]}, {"asked": 0, "logged": [0.25, 0.5, 0.75]}]


def test_under_fsdp_it_is_refused(tmp_path: Path) -> None:
    done = fsdp_cpu.run(tmp_path, __name__, "sharded_job")
    assert done.stdout.count("REFUSED") == 2, done.stderr[-3000:]
