"""Checks of the files that a command is given; they need no framework, so a mistake is answered at once."""

from __future__ import annotations

from pathlib import Path

from ..bundled import resolve_model
from ..errors import HessoError

TEXT_LOADERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}


def model_source(name: str) -> str:
    """Return what `from_pretrained` takes: the bundled model's folder for `bundled`, all else as it is.

    Raises:
        HessoError: for a path, which a Hub id can't be, that doesn't exist.
    """
    is_path = name.startswith(("/", ".", "~")) or name.endswith(".json") or name.count("/") > 1
    if is_path and not Path(name).exists():
        raise HessoError(f"no model config found at {name!r}: there is no such file or folder")
    return resolve_model(name)


def check_text_file(dataset: str) -> None:
    """Refuse a text file that doesn't exist.

    Raises:
        HessoError: naming it.
    """
    if Path(dataset).suffix in TEXT_LOADERS and not Path(dataset).exists():
        raise HessoError(f"`dataset` ({dataset!r}): no such file")
