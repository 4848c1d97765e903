"""Notebooks: each one runs, and is committed with the outputs of a run that shows nothing but results."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
MAX_FIGURE_BYTES = 100_000
JUNK = ("Traceback", "Warning", "it/s]", "/home/", "/tmp/", "site-packages", str(ROOT))


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(output: nbformat.NotebookNode) -> str:
    """Return all text of an output."""
    data = {name: value for name, value in output.get("data", {}).items() if name != "image/png"}
    return output.get("text", "") + json.dumps(data)


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    found = outputs(notebook)
    assert found
    for output in found:
        assert output.output_type != "error", output.get("evalue")
        assert output.get("name") != "stderr", output.text
        assert not [word for word in JUNK if word in text_of(output)], text_of(output)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_with_the_outputs_of_one_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    figures = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert all(len(figure) * 3 / 4 < MAX_FIGURE_BYTES for figure in figures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute with the running interpreter, offline, in an empty folder."""
    kernels = tmp_path / "jupyter" / "kernels" / "this-python"
    kernels.mkdir(parents=True)
    arguments = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": arguments, "display_name": "this Python", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(path, as_version=4)
    committed = [output.text for output in outputs(notebook) if output.output_type == "stream"]
    client = NotebookClient(
        notebook, timeout=400, kernel_name="this-python", resources={"metadata": {"path": str(work)}}
    )
    client.execute()
    check_outputs(notebook)
    fresh = [output.text for output in outputs(notebook) if output.output_type == "stream"]
    assert sum("869,504" in text for text in fresh) == sum("869,504" in text for text in committed)
