"""What needs no framework imports none: `--version`, a report, and files that don't exist are answered at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hesso_hf.config.files import REPORT_NAME

FRAMEWORKS = ("torch", "transformers", "accelerate", "datasets", "peft", "numpy", "matplotlib")
RUN = f"""
import sys
from hesso_hf.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as left:
    code = left.code
print("loaded:", sorted({set(FRAMEWORKS)!r} & set(sys.modules)))
sys.exit(code)
"""


def run(argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, *argv], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--version"], 0, ""),
        (["--help"], 0, ""),
        (["plan", "--help"], 0, ""),
        (["quickstart", "--help"], 0, ""),
        (["prune", "--help"], 0, ""),
        *[([name, "--help"], 0, "") for name in ("inspect", "sweep", "export", "eval", "report", "survey")],
        (["report", "small"], 0, ""),
        (["report", "small", "--json"], 0, ""),
        (["report", "small", "--html", "small.html"], 0, ""),
        (["report", "nowhere"], 2, "`RUN` ('nowhere'): there is no such folder"),
        (["prun", "nowhere.yaml"], 2, "unknown command 'prun' (did you mean 'prune'?)"),
        (["prune", "nowhere.yaml"], 2, "no such file"),
        (["prune", "bad.yaml"], 2, "did you mean 'pruning_ratio'"),
        (["inspect", "./nowhere"], 2, "no such file or folder"),
        (["inspect", "bundled", "--ratio", "50"], 2, "`pruning_ratio` (50.0)"),
        (["plan", "nowhere/config.json"], 2, "no such file or folder"),
        (["plan", "bundled", "--gpus", "0"], 2, "`--gpus` (0)"),
        (["export", "nowhere", "out"], 2, "is no folder"),
        (["eval", "bundled", "--new-tokens", "-1"], 2, "must be at least 0"),
        (["eval", "bundled", "--dataset", "no.txt"], 2, "no such file"),
        (
            ["eval", "bundled", "x", "--dataset", "python-docs", "--output", "x.csv"],
            2,
            "must end in .json, .md, .svg or .png",
        ),
        (["eval", "bundled", "--dataset", "python-docs", "--card"], 2, "`--card` writes into folders of"),
        (["survey", "--jobs", "0"], 2, "must be above zero"),
        (["quickstart", "--dataset", "no.txt"], 2, "no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_framework_is_imported(argv: list[str], code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("hesso: {pruning_ration: 0.5}\n")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / REPORT_NAME).write_text(json.dumps({
        "parameters": {"before": 4000, "after": 2000}, "pruning_ratio": 0.5,
        "sizes": {"before": {"intermediate_size": 44}, "after": {"intermediate_size": 22}},
        "verification": {"fold_error": 1e-7, "rounding_error": 0.0, "dtype": "float32"},
        "phases": {"warmup": [0, 2], "pruning": [2, 6]}, "losses": {"lines": {"loss": [[1, 3.0]]}, "skipped": 0},
    }))  # fmt: skip
    done = run(argv, tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
