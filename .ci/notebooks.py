"""Run the notebooks, each in an empty folder and offline, and keep what they print and draw in their files.

python .ci/notebooks.py [notebooks/01_quickstart.ipynb ...]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def execute(path: Path) -> None:
    """Run a notebook with this interpreter, and write it back with the outputs and without the run's dates."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook, timeout=1800, kernel_name="python3", resources=resources, coalesce_streams=True
        )
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:  # without what a command says of its stages on the way
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["text/plain"] = "<figure>"
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed, a development tool here, prints that there is no GPU
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for each in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted((ROOT / "notebooks").glob("*.ipynb")):
        print(each, flush=True)
        execute(each)
