"""push_to_hub sends the smaller model with its card, through the real client, and it loads back from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import Trainer, TrainerCallback

from hesso_hf.config.files import PAGE_NAME, RECIPE_NAME
from tests.support import ROOT
from tests.support.checks import propagated
from tests.support.loopback_hub import LoopbackHub
from tests.support.training import trainer

_PUSH = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
from tests.support.training import blocks, trainer
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from hesso_hf.export.card import licence_of
from hesso_hf.hf_models.tiny_model import logits_of, relative_error
for strategy in sys.argv[3:]:
    run = trainer(Path(sys.argv[1]) / strategy, push_to_hub=True, hub_model_id=f"user/{strategy}",
                  hub_strategy=strategy, save_strategy="steps", save_steps=4)
    run.train()
    run.hesso_run.origin = {"command": "hesso-hf prune mine.yaml", "recipe": {"model": "mine"}}
    run.push_to_hub(commit_message="Pruned", tags=["stories"], language="en", license="mit")
    assert licence_of(f"user/{strategy}") == {"license": "mit"}
    small = AutoModelForCausalLM.from_pretrained(f"user/{strategy}")
    ids = torch.randint(3, 60, (2, 9))
    error = relative_error(logits_of(small, ids), logits_of(run.model.eval(), ids))
    print(f"RESULT {strategy}", small.config.intermediate_size, small.config.hidden_size, error)
"""


STRATEGIES = ("end", "every_save")


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoopbackHub, str]:
    """Push with every strategy from one process; return the Hub, and what the process printed."""
    folder = tmp_path_factory.mktemp("pushed")
    with LoopbackHub() as hub:
        env = {**os.environ, **hub.env(folder / "cache"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _PUSH, str(folder / "out"), str(ROOT), *STRATEGIES]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return hub, done.stdout


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_push_to_hub_and_load_back(strategy: str, pushed: tuple[LoopbackHub, str]) -> None:
    hub, printed = pushed
    files, commits = hub.files(f"user/{strategy}"), hub.commits(f"user/{strategy}")
    mlp, hidden, error = next(
        line.split()[2:] for line in printed.splitlines() if line.startswith(f"RESULT {strategy} ")
    )
    assert (int(mlp), int(hidden)) == (28, 48)
    assert float(error) <= 1e-5
    assert {"config.json", "model.safetensors", "README.md", "pruning_report.json"} <= files.keys()
    assert f"]({PAGE_NAME})" in files["README.md"].decode()
    assert files[PAGE_NAME].startswith(b"<!DOCTYPE html>")
    assert files[RECIPE_NAME] == b"# hesso-hf prune mine.yaml\nmodel: mine\n"
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth")) or "checkpoint" in name]
    assert json.loads(files["config.json"])["intermediate_size"] == 28
    card = ModelCard(files["README.md"].decode())
    assert {"pruned", "hesso", "stories"} <= set(card.data.tags or [])
    assert card.data.language == "en"
    assert commits[-1] == "Pruned"
    pushed = [title for title in commits if title.startswith("Training in progress")]
    # steps 4, 8 and 12 are saved; at step 4 the model was still dense, and nothing was pushed
    assert pushed == (["Training in progress, step 8", "Training in progress, step 12"] if strategy != "end" else [])


@pytest.mark.parametrize("steps", [0, 4], ids=["untrained", "half-pruned"])
def test_a_dense_model_is_neither_saved_nor_pushed(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: pytest.fail("asked the Hub for a repository"))
    run = trainer(tmp_path)
    if steps:
        run.add_callback(StopAt(steps))
        run.train()
    assert run.push_to_hub() is None
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_push_on_the_way_that_fails_is_warned_of_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", offline)
    run = trainer(tmp_path, push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=8)
    with propagated(caplog):
        run.train()
    assert run.state.global_step == 12
    assert "nothing is pushed to the Hub after step 8: ConnectionError: the line is dead" in caplog.text
    assert (tmp_path / "pruning_report.json").exists()


class StopAt(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self._step
