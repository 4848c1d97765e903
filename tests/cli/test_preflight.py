"""`hesso-hf prune` looks before it trains, saves before it measures, and says how to go on after Ctrl-C."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, TrainingArguments

from hesso_hf import HessoTrainer
from hesso_hf.cli import preflight
from hesso_hf.cli.main import main
from hesso_hf.cli.preflight import check_hub, num_checkpoints
from hesso_hf.errors import HessoError
from hesso_hf.hf_models import loading
from tests.support.loopback_hub import LoopbackHub


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a step is made."""
    monkeypatch.setattr(HessoTrainer, "training_step", lambda *_, **__: pytest.fail("a step was made"))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where weights are loaded."""
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.parametrize("argument", ["output", "output_dir"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    argument: str, inputs: list[str], tmp_path: Path, unloaded: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    flags = {"output_dir": str(tmp_path / "run")} | {argument: str(tmp_path / "file" / "x")}
    assert main([*inputs, *(text for name, folder in flags.items() for text in (f"--{name}", folder))]) == 2
    assert f"`{argument}` ('{tmp_path}/file/x') can't be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_teacher_that_is_not_there_is_told_before_anything_is_loaded(
    inputs: list[str], tmp_path: Path, unloaded: None, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = ["--distill_from", str(tmp_path / "teacher"), "--distillation_alpha", "0.5"]
    assert main([*inputs, "--output_dir", str(tmp_path / "run"), *teacher]) == 2
    said = capsys.readouterr().err
    assert f"`distill_from` ('{tmp_path}/teacher'): " in said
    assert "no such folder exists, and no model of that name could be had from the Hub" in said


def test_a_disk_without_room_is_told_before_the_first_step(
    inputs: list[str], tmp_path: Path, untrained: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=500_000))
    assert main([*inputs, "--output_dir", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().err
    # 156,908 parameters of 4 bytes, with two moments; 151,084 stay
    assert "the disk has room for 500 kB, and the run writes about 6.25 MB (the smaller model in " in text
    assert f"{tmp_path}/run/small about 604 kB; 3 checkpoints in {tmp_path}/run about 5.65 MB)" in text
    assert "make room, name folders on another disk, or write fewer checkpoints (`save_total_limit`)" in text


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "no", "enable_jit_checkpoint": True}, 1),
        ({"save_steps": 40}, 3),
        ({"save_steps": 0.25}, 4),
        ({"save_steps": 10, "save_total_limit": 2}, 3),
        ({"save_strategy": "epoch", "num_train_epochs": 2}, 2),
    ],
)
def test_so_many_checkpoints_lie_on_the_disk_at_once(options: dict[str, Any], count: int, tmp_path: Path) -> None:
    assert num_checkpoints(TrainingArguments(str(tmp_path), use_cpu=True, **options), 100) == count


def test_the_plan_is_printed_and_the_small_model_saved_before_it_is_measured(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(self: HessoTrainer) -> None:
        raise HessoError("out of luck")

    monkeypatch.setattr(HessoTrainer, "evaluate", evaluate)
    assert main([*inputs, "--output_dir", str(tmp_path / "run"), "--save_strategy", "no"]) == 2
    shown = capsys.readouterr()
    assert "out of luck" in shown.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "small").config.intermediate_size == 28
    plan, report = shown.out.index("HESSO: 156,908 -> 151,084 parameters"), shown.out.index("of the parameters removed")
    assert plan < report
    assert shown.out.count("intermediate_size 44 -> 28") == 1
    assert "steps: warm-up 1, pruning 2 to 4 in 3 periods, recovery 5 to 6" in shown.out
    assert "pin_memory" not in shown.err


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--max_steps", "6"], 1),
        (["--max_steps", "230"], 4),
        (["--max_steps", "90000"], 500),
        (["--max_steps", "230", "--logging_steps", "500"], 500),
    ],
)
def test_a_run_logs_fifty_times_where_nothing_is_said(
    flags: list[str], steps: int, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []

    def train(self: HessoTrainer, **kwargs: Any) -> None:
        found.append(self.args.logging_steps)
        raise HessoError("far enough")

    monkeypatch.setattr(HessoTrainer, "train", train)
    assert main([*inputs, *flags, "--save_strategy", "no", "--output_dir", str(tmp_path / "run")]) == 2
    assert found == [steps]


def test_no_bar_of_weights_breaks_the_line_of_progress(inputs: list[str], tmp_path: Path, capfd: Any) -> None:
    assert main([*inputs, "--output_dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    assert "Writing model shards" not in capfd.readouterr().err


def test_ctrl_c_prints_the_command_that_goes_on(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, plain = [], HessoTrainer.training_step

    def training_step(self: HessoTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) in (2, 5, 6):
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(HessoTrainer, "training_step", training_step)
    flags = [*inputs, "--output_dir", str(tmp_path / "a run")]
    for there in (f"starts anew, since there is no checkpoint in {tmp_path}/a run yet", "goes on from"):
        assert main(flags) == 130
        text = capsys.readouterr().err
        assert there in text
    assert f"goes on from {tmp_path}/a run/checkpoint-2" in text
    name, *argv = shlex.split(text.strip().splitlines()[-1])
    assert name == "hesso-hf"
    assert argv == [*flags, "--resume_from_checkpoint", "auto"]
    assert main(argv) == 130
    assert capsys.readouterr().err.strip().endswith(shlex.join(argv))  # which is no longer than before
    assert main(argv) == 0
    assert steps == [0, 1, 0, 1, 2, 2, *range(2, 6)]
    assert (tmp_path / "a run" / "small" / "config.json").exists()


def test_ctrl_c_after_the_smaller_model_is_saved_says_so(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def print_report(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hesso_hf.cli.prune.print_report", print_report)
    assert main([*inputs, "--output_dir", str(tmp_path / "run")]) == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"hesso-hf: interrupted after the smaller model was saved in {tmp_path}/run/small: ")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what sets the Hub that this process' client asks, and its token."""

    def asks(hub: LoopbackHub, token: str) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", token)

    return asks


@pytest.mark.parametrize(
    ("role", "token", "exists", "refused"),
    [
        ("write", "hf_test", False, False),
        ("write", "hf_test", True, False),
        ("write", "hf_other", False, True),
        ("read", "hf_test", False, True),
        ("read", "hf_test", True, True),
    ],
)
def test_the_hub_is_asked_whether_it_can_be_written(
    role: str, token: str, exists: bool, refused: bool, online: Any, tmp_path: Path
) -> None:
    arguments = TrainingArguments(str(tmp_path / "mine"), push_to_hub=True, use_cpu=True)
    with LoopbackHub() as hub:
        online(hub, "hf_test")
        if exists:
            check_hub(arguments)
        hub.role = role
        online(hub, token)
        if not refused:
            return check_hub(arguments)
        with pytest.raises(HessoError, match=r"`push_to_hub` \(True\): '(user/)?mine' can't be written on the Hub \("):
            check_hub(arguments)


def test_the_hub_is_asked_before_anything_is_loaded(
    inputs: list[str], tmp_path: Path, unloaded: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refusing(training: TrainingArguments) -> None:
        raise HessoError("no right to write")

    monkeypatch.setattr(preflight, "check_hub", refusing)
    assert main([*inputs, "--output_dir", str(tmp_path), "--push_to_hub", "true"]) == 2
    assert "no right to write" in capsys.readouterr().err


def test_a_push_that_fails_names_the_folder_that_the_model_is_in(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def push_to_hub(self: HessoTrainer) -> None:
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(preflight, "check_hub", lambda training: None)
    monkeypatch.setattr(HessoTrainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(HessoTrainer, "push_to_hub", push_to_hub)
    flags = ["--output_dir", str(tmp_path / "run"), "--save_strategy", "no", "--push_to_hub", "true"]
    assert main([*inputs, *flags]) == 2
    expected = (
        f"the smaller model is saved in {tmp_path}/run/small, and pushing it failed (ConnectionError: the line is d"
    )
    assert expected in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "small").config.intermediate_size == 28


def test_a_dry_run_says_what_the_run_would_take_and_saves_no_model(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its replay is written, and the run that follows takes it."""
    flags = [*inputs, "--output_dir", str(tmp_path / "run"), "--replay_share", "0.25", "--eval_strategy", "epoch"]
    assert main([*flags, "--dry_run"]) == 0
    text, beside = capsys.readouterr()
    assert "Loading weights" not in beside
    assert "HESSO: 156,908 -> 151,084 parameters" in text
    assert "tokens: about 32 a step, 192 in 6 steps, and replay" in text
    assert f"replay: written in {tmp_path}/run/replay, where the run takes it from" in text
    assert re.search(r"^time: [\d.e-]+ s a step, \d+ s in all", text, re.MULTILINE)
    assert re.search(r"^memory: [\d.]+ [MG]B of main memory$", text, re.MULTILINE)
    assert re.search(rf"^disk: about 604 kB for the smaller model in {tmp_path}/run/small$", text, re.MULTILINE)
    assert "disk: about 5.65 MB for 3 checkpoints in " in text
    assert text.endswith("dry run: no model was saved\n")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["replay"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "replay").iterdir()}
    assert main(flags) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "replay").iterdir()} == written
    assert {"small", "checkpoint-6"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_short_dry_run_publishes_nothing(inputs: list[str], tmp_path: Path, online: Any, capsys: Any) -> None:
    flags = ["--output_dir", str(tmp_path / "run"), "--push_to_hub", "true", "--hub_model_id", "user/small"]
    with LoopbackHub() as hub:
        online(hub, "hf_test")
        assert main([*inputs, *flags, "--max_steps", "1", "--pruning_steps", "1", "--hesso_warmup_steps", "0",
                     "--dry_run"]) == 0  # fmt: skip
        assert not [path for method, path in hub.requests if method in ("POST", "PUT")]
    out = capsys.readouterr().out
    assert "time: the run is too short to tell" in out
    assert "time: known after" not in out
