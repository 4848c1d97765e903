"""Notebooks: each one runs, and is committed with the outputs of a run that shows nothing but results."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from hesso_hf import HessoTrainer, bundled
from hesso_hf.hf_models.tiny_model import random_model
from tests.support import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
STEPS, EXAMPLES = 16, 24  # of training, and of the text, where a notebook is run in short
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


def test_there_are_notebooks_and_what_they_link_to_is_there() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]
    for path in NOTEBOOKS:
        for link in re.findall(
            r"\]\(([^)#]+)\)", "".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
        ):
            assert link.startswith("https://") or (path.parent / link).is_file(), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_with_the_outputs_of_one_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    figures = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert all(len(figure) * 3 / 4 < MAX_FIGURE_BYTES for figure in figures)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a single layer of random weights."""
    folder, whole = tmp_path_factory.mktemp("one-layer"), bundled.bundled_model_path()
    config = AutoConfig.from_pretrained(whole, num_hidden_layers=1)
    random_model(LlamaForCausalLM, config, 1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_code_runs_in_short(path: Path, one_layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All code in one piece, with a smaller model, fewer steps of training and less text, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundled, "bundled_model_path", lambda: one_layer)
    whole = bundled.python_docs_dataset
    monkeypatch.setattr(bundled, "python_docs_dataset", lambda *a, **kw: whole(*a, **kw).select(range(EXAMPLES)))
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    code = re.sub(r"max_steps=\d+", f"max_steps={STEPS}", "\n\n".join(cells))
    shown, left = logging.is_progress_bar_enabled(), dict[str, object]()
    try:
        with warnings.catch_warnings():
            exec(compile(code, path.name, "exec"), left)
    finally:
        if shown:
            logging.enable_progress_bar()
    trainers = [value for value in left.values() if isinstance(value, HessoTrainer)]
    assert trainers
    assert all(trainer.hesso_plan.target.parameter_ratio > 0.1 for trainer in trainers)
    saved = [AutoModelForCausalLM.from_pretrained(folder.parent) for folder in tmp_path.rglob("pruning_report.json")]
    assert bool(saved) == (path != NOTEBOOKS[1]), (
        "all but the one on budgets, which trains nothing, save a smaller model"
    )
    assert all(model.num_parameters() < trainers[0].hesso_plan.target.parameters_before for model in saved)


@pytest.mark.slow
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
    for cell in notebook.cells:
        if "outputs" in cell:
            said = [output for output in cell.outputs if output.get("name") == "stderr"]
            lines = [line for output in said for line in output.text.splitlines()]
            assert all(line.startswith("hesso-hf: ") for line in lines), "stages of a command, and nothing else"
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    check_outputs(notebook)
    fresh = [output.text for output in outputs(notebook) if output.output_type == "stream"]
    assert sum("869,504" in text for text in fresh) == sum("869,504" in text for text in committed)
