"""The quickstart's own code path, a few steps of it: three models trained, saved, reloaded elsewhere and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hesso_hf.cli.main import main
from hesso_hf.config.files import REPORT_NAME


def test_quickstart_prints_the_table_and_keeps_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    flags = ["--steps", "8", "--batch-size", "8", "--block-size", "48", "--output", str(output)]
    assert main(["quickstart", *flags]) == 0
    out, err = capsys.readouterr()
    lines = out.replace(str(output), "quickstart").splitlines()
    assert len(lines) <= 24, out  # a screen
    assert max(map(len, lines)) <= 100, out
    assert not err.strip(), err
    assert out.count("HESSO: 869,504 -> ") == 1
    assert "train_runtime" not in out
    for text in ("parameters", "size on disk", "held-out perplexity", "tokens/s", "HESSO", "one-shot magnitude"):
        assert text in out
    report = json.loads((output / "hesso" / REPORT_NAME).read_text())
    assert len(report["losses"]["lines"]["loss"]) == 8
    assert report["quality"]["eval_loss"].keys() >= {"before", "after"}
    results = json.loads((output / "results.json").read_text())
    original, hesso, one_shot = results["rows"]
    assert original["parameters"] == 869_504
    assert abs(1 - hesso["parameters"] / original["parameters"] - 0.5) <= 0.01
    assert one_shot["parameters"] == hesso["parameters"]
    assert hesso["bytes"] < 0.6 * original["bytes"]  # all three are stored in the original's dtype
    assert one_shot["bytes"] < 0.6 * original["bytes"]
    assert original["perplexity"] < min(hesso["perplexity"], one_shot["perplexity"])
    assert set(results["samples"]) == {"original", "HESSO", "one-shot magnitude"}
    assert len(set(results["samples"].values())) == 3
