"""What a report says of the command and the recipe that it came of: enough to repeat it, and no secret or place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hesso_hf.cli.origin import origin_of
from hesso_hf.cli.recipe import parse_recipe


def test_a_recipe_and_its_flags_are_one_recipe_again(tmp_path: Path) -> None:
    path, text = tmp_path / "mine.yaml", tmp_path / "text.jsonl"
    path.write_text(
        f"model: bundled\ndataset: {text}\ntraining: {{max_steps: 9, learning_rate: 0.5, hub_token: s1}}\n"
        "hesso: {pruning_ratio: 0.5}\n"
    )
    text.write_text('{"text": "a"}')
    flags = ["--max_steps", "7", "--hub_token", "s2", "--hub_token=s3", f"--output={tmp_path}/out", "--warmup-steps=3"]
    found = origin_of(parse_recipe(str(path), [*flags, "--hesso_saliency", "magnitude"]))
    assert found["recipe"] == {
        "model": "bundled", "dataset": "text.jsonl", "output": "out",
        "training": {"max_steps": 7, "learning_rate": 0.5, "warmup_steps": 3.0},
        "hesso": {"pruning_ratio": 0.5, "saliency": "magnitude"},
    }  # fmt: skip
    assert found["command"] == (
        "hesso-hf prune mine.yaml --max_steps 7 --output=out --warmup-steps=3 --hesso_saliency magnitude"
    )
    assert found["datasets"] == ["text.jsonl"]


LAUNCHED = {
    "python /env/bin/accelerate launch --config_file /at/ddp.yaml -m hesso_hf prune r.yaml":
        "accelerate launch --config_file ddp.yaml -m hesso_hf",
    "/env/bin/torchrun --nproc_per_node=2 -m hesso_hf prune": "torchrun --nproc_per_node=2 -m hesso_hf",
    "srun worker": "accelerate launch --num_processes 2 -m hesso_hf",
}  # fmt: skip


@pytest.mark.parametrize(("parent", "command"), LAUNCHED.items())
def test_of_several_processes_the_command_has_their_launcher(
    parent: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(psutil.Process, "parent", lambda _: SimpleNamespace(cmdline=parent.split))
    flags = ["--model", "org/name", "--dataset", "org/data", "--hesso_pruning_ratio", "0.3"]
    assert origin_of(parse_recipe(None, flags))["command"] == f"{command} prune {' '.join(flags)}"


def test_data_of_the_hub_keep_their_name(tmp_path: Path) -> None:
    flags = ["--model", "org/name", "--dataset", "org/data", "--hesso_pruning_ratio", "0.3"]
    found = origin_of(parse_recipe(None, flags))
    assert found["datasets"] == ["org/data"]
    assert found["command"] == f"hesso-hf prune {' '.join(flags)}"
