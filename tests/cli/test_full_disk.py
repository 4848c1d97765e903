"""`hesso-hf prune` on a full disk: the smaller model is saved where there is room for it, and what is said is so."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hesso_hf import HessoTrainer
from hesso_hf.cli import finishing
from hesso_hf.cli.main import main
from hesso_hf.errors import StorageError
from tests.support import ROOT, forks
from tests.support.disk import full_disk

ROOM = 1_000_000  # bytes in a file: the model has 628 kB, the optimizer's state twice that


class Terminal(io.StringIO):
    """What is typed at a terminal; before each line what it waits for is done."""

    def __init__(self, *waits: Any) -> None:
        super().__init__("\n" * len(waits))
        self._waits = iter(waits)

    def isatty(self) -> bool:
        return True

    def readline(self, *args: Any) -> str:
        if (wait := next(self._waits, None)) is not None:
            wait()
        return super().readline(*args)


def test_where_only_the_last_checkpoint_cannot_be_written_the_run_is_done(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(ROOM):
        assert main([*inputs, "--save_steps", "6", "--output_dir", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("hesso-hf: ")]
    assert len(said) == 2
    assert f"can't be written in '{tmp_path}/run/checkpoint-6', where there is room for" in said[0]
    assert "in memory" not in err
    assert said[1] == f"hesso-hf: training was over: the smaller model is saved in {tmp_path}/run/small"
    assert "of the parameters removed" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "small").config.intermediate_size == 28


def test_where_steps_are_missing_the_model_of_the_last_one_is_saved_beside(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(ROOM):
        assert main([*inputs, "--save_steps", "5", "--output_dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert (
        "there is no earlier checkpoint to go on from. Pruning is over; the smaller model is saved as it is no" in err
    )
    saved = tmp_path / "run" / "small-of-step-5"
    assert f"training ended after step 5 of 6; the smaller model of it is saved in {saved}" in err
    assert AutoModelForCausalLM.from_pretrained(saved).config.intermediate_size == 28
    assert not (tmp_path / "run" / "small").exists()


def test_before_pruning_is_over_there_is_nothing_to_save(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(ROOM):
        assert main([*inputs, "--save_steps", "2", "--output_dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "there is no earlier checkpoint to go on from\n" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


def test_a_half_written_checkpoint_makes_room_for_the_smaller_model(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hesso_hf.export.storage.check_room", lambda needs: None)
    monkeypatch.setattr("hesso_hf.export.storage.room", lambda folder: 500_000)
    with full_disk(ROOM):
        assert main([*inputs, "--save_steps", "6", "--output_dir", str(tmp_path / "run")]) == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["small"]


def test_the_best_checkpoint_is_what_is_saved_where_it_is_asked_for(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, plain = [], HessoTrainer._save_checkpoint

    def save_checkpoint(self: HessoTrainer, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == 6:
            self.state.best_global_step = 5
            raise StorageError("the disk is full")
        plain(self, *args, **kwargs)

    monkeypatch.setattr(HessoTrainer, "_save_checkpoint", save_checkpoint)
    monkeypatch.setattr(HessoTrainer, "_load_best_model", lambda self: loaded.append(self.state.best_model_checkpoint))
    flags = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "true"]
    assert main([*inputs, *flags, "--output_dir", str(tmp_path / "run")]) == 0
    assert loaded == [str(tmp_path / "run" / "checkpoint-5")]


_ONE_OF_TWO = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from contextlib import nullcontext
import torch
torch.set_num_threads(1)
from hesso_hf.cli.main import main
from tests.support import ROOT, forks
from tests.support.disk import full_disk
main_process = os.environ["RANK"] == "0"
if sys.argv[4] == "early" and main_process:  # before Transformers' own part, in which all come together
    from hesso_hf.engines import engine
    def save_random_states(*_):
        raise OSError(28, "No space left on device")
    engine.save_random_states = save_random_states
with full_disk(int(sys.argv[2])) if main_process else nullcontext():
    code = main(json.loads(sys.argv[3]))
print(f"CODE {code}", flush=True)
"""


@pytest.mark.parametrize(("save_steps", "where"), [(6, "late"), (6, "early"), (2, "late")])
def test_of_two_processes_the_one_that_writes_tells_the_other(
    save_steps: int, where: str, inputs: list[str], tmp_path: Path
) -> None:
    """The last checkpoint, after which both save the smaller model; one before pruning is over, which ends both."""
    flags = [*inputs, "--save_steps", str(save_steps), "--output_dir", str(tmp_path / "run")]
    done = forks.run(_ONE_OF_TWO, str(ROOT), str(ROOM), json.dumps(flags), where, processes=2)
    saved = tmp_path / "run" / "small"
    assert done.stdout.count(f"CODE {0 if save_steps == 6 else 2}") == 2, done.stderr[-2000:]
    if save_steps == 6:
        assert done.stderr.count(f"hesso-hf: training was over: the smaller model is saved in {saved}") == 1
        assert AutoModelForCausalLM.from_pretrained(saved).config.intermediate_size == 28
    else:
        assert "there is no earlier checkpoint to go on from" in done.stderr
        assert not saved.exists()


@pytest.fixture
def full_after_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """A disk that is full once training is over, until this is closed."""

    def train(self: HessoTrainer, **kwargs: Any) -> None:
        plain(self, **kwargs)
        disk.enter_context(full_disk())

    plain = HessoTrainer.train
    monkeypatch.setattr(HessoTrainer, "train", train)
    with ExitStack() as disk:
        yield disk


def test_without_a_terminal_nothing_is_said_to_be_in_memory(
    inputs: list[str], tmp_path: Path, full_after_training: ExitStack, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main([*inputs, "--save_strategy", "no", "--output_dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.endswith(f". No other place takes it; {finishing.LOST}\n")


def test_at_a_terminal_the_model_is_saved_once_there_is_room(
    inputs: list[str], tmp_path: Path, full_after_training: ExitStack, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(lambda: None, full_after_training.close))
    assert main([*inputs, "--save_strategy", "no", "--output_dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count(f"No other place takes it; {finishing.ASKED}\n") == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "small").config.intermediate_size == 28
