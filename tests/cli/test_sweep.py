"""`hesso-hf sweep`: a run for each ratio, what is done isn't run again, and one table and page of all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from hesso_hf.bundled import bundled_model_path
from hesso_hf.cli.main import main
from hesso_hf.cli.prune import PART_OF_SWEEP
from tests.support.tiny import tiny_llama


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a tiny model."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_llama(vocab_size=1024).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(bundled_model_path()).save_pretrained(folder / "model")
    training = {
        "output_dir": str(folder / "runs"), "max_steps": 6, "use_cpu": True, "report_to": "none",
        "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    hesso = {"pruning_ratio": 0.4, "round_to": 1, "stream_basis": "given", "replay_share": 0.0, "healing": "off"}
    values = {
        "model": str(folder / "model"), "dataset": "python-docs", "max_examples": 20, "block_size": 16,
        "training": training, "hesso": hesso,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Have runs done in this process; return their commands."""
    commands: list[list[str]] = []

    def ended(command: list[str]) -> int:
        commands.append(command)
        return main(command[command.index("hesso_hf") + 1 :])

    monkeypatch.setattr("hesso_hf.cli.sweep._ended", ended)
    return commands


def test_runs_are_compared_and_those_that_are_done_are_not_run_again(
    recipe: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["sweep", str(recipe), "--ratios", "0.5", "0.3", "--hesso_calibration_examples", "2"]
    assert main(flags) == 0
    assert [command[:4] for command in started] == [[sys.executable, "-m", "hesso_hf", "prune"]] * 2
    assert all(command[5:7] == ["--hesso_calibration_examples", "2"] for command in started)
    runs = recipe.parent / "runs"
    table = (runs / "sweep.md").read_text()
    assert "|  | before | 0.3 | 0.5 |" in table  # in order
    removed = next(line for line in table.splitlines() if line.startswith("| removed |")).split(" | ")[2:]
    for cell, share in zip(removed, (30, 50), strict=True):
        assert abs(float(cell.strip("% |")) - share) < 2
    assert "| loss on held-out examples (nats per token) | " in table
    printed = capsys.readouterr().out
    assert "loss on held-out examples" in printed
    page = (runs / "sweep.html").read_text()
    assert "0.3/small" in page
    assert "0.5/small" in page
    assert main(flags) == 0
    assert len(started) == 2
    assert capsys.readouterr().out.count("done before") == 2


def test_a_dry_one_says_what_each_run_would_do_and_compares_nothing(
    recipe: Path, started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output_dir", str(tmp_path / "dry"), "--hesso_calibration_examples", "2", "--dry_run"]
    assert main(["sweep", str(recipe), "--ratios", "0.5", "0.3", *flags]) == 0
    assert len(started) == 2
    assert capsys.readouterr().out.count("dry run: no model was saved") == 2
    assert not list((tmp_path / "dry").rglob("sweep.*"))


def test_one_run_saves_models_on_the_way_and_prints_them_beside_the_last(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--hesso_pruning_steps", "3", "--hesso_warmup_steps", "0", "--hesso_calibration_examples", "2"]
    assert main(["prune", str(recipe), "--export_at", "0.17,0.3", "--output_dir", str(tmp_path), *steps]) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index(f"{tmp_path / 'rung-0.17'}, {tmp_path / 'rung-0.3'}, {tmp_path / 'small'}") :]
    assert table.splitlines()[1].split() == ["before", "0.17", "0.3", "0.4"]
    for share, folder in ((17, "rung-0.17"), (30, "rung-0.3"), (40, "small")):
        report = json.loads((tmp_path / folder / "pruning_report.json").read_text())
        assert abs(100 * report["pruning_ratio"] - share) < 2
        assert f"{report['parameters']['after']:,}" in table
        assert f"{report['quality']['eval_loss']['after']['loss']:.4f}" in table
    assert (tmp_path / "ladder.html").exists()


def test_a_launcher_starts_the_runs_and_one_that_fails_ends_the_sweep(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def ended(command: list[str]) -> int:
        commands.append(command)
        return 143

    monkeypatch.setattr("hesso_hf.cli.sweep._ended", ended)
    flags = ["sweep", str(recipe), "--ratios", "0.2", "0.7", "--launcher", "accelerate launch --num_processes 2"]
    assert main(flags) == 143
    (command,) = commands
    assert command[:7] == ["accelerate", "launch", "--num_processes", "2", "-m", "hesso_hf", "prune"]
    assert command[-2:] == ["--resume_from_checkpoint", "auto"]
    said = capsys.readouterr().err
    assert "the run at 0.2 ended with 143" in said
    assert "--ratios 0.2 0.7 --launcher 'accelerate launch --num_processes 2'" in said


def test_ctrl_c_lets_the_run_end_by_itself_and_names_the_command_that_goes_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    class Started:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            self.waited = 0
            with pytest.MonkeyPatch.context() as inner:  # the run, which leaves it to the sweep to say what goes on
                inner.setenv(PART_OF_SWEEP, env[PART_OF_SWEEP])
                inner.setattr("hesso_hf.cli.prune.prune", interrupted)
                assert main(command[command.index("hesso_hf") + 1 :]) == 130
            assert capsys.readouterr().err == ""

        def wait(self) -> int:
            self.waited += 1
            done.append("wait")
            if self.waited == 1:
                raise KeyboardInterrupt
            return 130

        def kill(self) -> None:
            done.append("kill")

    monkeypatch.setattr("hesso_hf.cli.sweep.subprocess.Popen", Started)
    assert main(["sweep", str(recipe), "--ratios", "0.2", "0.3", "--output_dir", "some/runs"]) == 130
    assert done == ["wait", "wait"]
    said = capsys.readouterr().err
    assert "hesso-hf: the run at 0.2 was interrupted; this goes on with the sweep:" in said
    assert f"  hesso-hf sweep {recipe} --ratios 0.2 0.3 --output_dir some/runs" in said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ratios", "0.2", "1.5"], "`--ratios` (1.5) must lie between 0 and 1"),
        (["--ratios", "0.2", "0.20"], "`--ratios` (0.2) is given more than once"),
        (["--ratios", "0.2", "--hesso_pruning_ratio", "0.4"], "`--hesso_pruning_ratio` is what the runs of a sweep"),
        (["--ratios", "0.2", "--output=x"], "`--output` is what the runs of a sweep differ in"),
        (["--ratios", "0.2", "--hesso_cricc", "true"], "hesso_cric"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(
    flags: list[str], expected: str, recipe: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(recipe), *flags]) == 2
    assert expected in capsys.readouterr().err
    assert started == []


def test_a_recipe_with_one_folder_for_the_model_is_refused(
    recipe: Path, tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.yaml").write_text(recipe.read_text() + "output: small\n")
    assert main(["sweep", str(tmp_path / "one.yaml"), "--ratios", "0.2", "0.3"]) == 2
    assert "`output` ('small') is one folder" in capsys.readouterr().err
    assert started == []
