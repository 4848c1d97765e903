"""The benchmarks' code paths at a small size; what they measure is for a quiet machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hesso_hf.bundled import bundled_model_path, python_docs_texts

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_stories_runs_every_method_at_the_same_sizes_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stories

    model, data = tmp_path / "models" / "stories260K", tmp_path / "data" / "tinystories"
    AutoModelForCausalLM.from_pretrained(bundled_model_path()).save_pretrained(model)
    AutoTokenizer.from_pretrained(bundled_model_path()).save_pretrained(model)
    data.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [json.dumps({"text": text[:4000]}) for text in python_docs_texts(split)[:4]]  # type: ignore[arg-type]
        (data / f"{split}.jsonl").write_text("\n".join(rows))
    output = tmp_path / "stories.json"
    flags = ["--data", str(tmp_path), "--steps", "10", "--seeds", "0", "--ratios", "0.5", "--held-out-blocks", "1"]
    monkeypatch.setattr(stories, "BATCH", 1)
    monkeypatch.setattr(sys, "argv", ["stories.py", *flags, "--output", str(output)])
    assert stories.main() == 0
    found = json.loads(output.read_text())
    medians = found["medians"]["0.5"]
    assert set(medians) == {"hesso", "one_shot_magnitude", "one_shot_taylor", "scratch"}
    assert len({tuple(entry["parameters"]) for entry in medians.values()}) == 1
    assert len({run["tokens"] for run in found["runs"]}) == 1
    before = output.read_text()
    assert stories.main() == 0  # nothing is run again
    assert json.loads(output.read_text())["runs"] == json.loads(before)["runs"]


def test_stories_says_so_where_the_model_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import stories

    monkeypatch.setattr(sys, "argv", ["stories.py", "--data", str(tmp_path)])
    assert stories.main() == 0
    assert "SKIPPED" in capsys.readouterr().out


def test_overhead_counts_every_kind_of_step_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import overhead

    output = tmp_path / "overhead.json"
    flags = ["--device", "cpu", "--scale", "tiny", "--repeats", "1", "--batch-size", "1", "--length", "16"]
    monkeypatch.setattr(sys, "argv", ["overhead.py", *flags, "--output", str(output)])
    assert overhead.main() == 0
    entry = json.loads(output.read_text())["cpu tiny"]
    for found in entry["results"].values():
        assert set(found["steps"]) == {"warmup", "scoring", "shrinking", "recovery"}
        assert all(kind["hesso_seconds"] > 0 for kind in found["steps"].values())
        assert 0 < found["extra_bytes_peak"] < 869_504 * 4
