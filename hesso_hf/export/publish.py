"""Atomic publishing: what was in a folder stays loadable until a verified replacement is complete."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

_MODEL_FILE = re.compile(
    r"(model|pytorch_model)(-[0-9a-f]{8})?(-\d+-of-\d+)?\.(safetensors|bin)|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|adapter_config\.json"  # from_pretrained would load the base model that this names instead
)
_LAST = (SAFE_WEIGHTS_INDEX_NAME, CONFIG_NAME)


@contextmanager
def staged_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success its files replace those of the same names there.

    Weights go first, the index and the config last; model files that the new model doesn't have are removed; everything
    else in `target` is left alone. On an exception `target` is untouched.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    staging = target.parent / f"{_prefix(target)}{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                _sync(path)
        _replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.hesso-staging-"


def _remove_abandoned(target: Path) -> None:
    """Remove staging folders of processes that died before they could."""
    for folder in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        process = folder.name.removeprefix(_prefix(target))
        if process.isdigit() and (int(process) == os.getpid() or not _is_alive(int(process))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Force a file to the disk before it replaces anything."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _replace(staging: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    _rename_shards(staging, target)
    files = sorted((path.relative_to(staging) for path in staging.rglob("*") if path.is_file()), key=_order)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(staging / file, target / file)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _replace_across(staging / file, target / file)
    new = {str(file) for file in files}
    for path in target.iterdir():
        if path.is_file() and _MODEL_FILE.fullmatch(path.name) and path.name not in new:
            path.unlink()


def _replace_across(source: Path, destination: Path) -> None:
    """Replace a file where the target is a file system of its own (a mount): copy beside it, then rename."""
    beside = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    shutil.copy2(source, beside)
    _sync(beside)
    os.replace(beside, destination)


def _rename_shards(staging: Path, target: Path) -> None:
    """Give new shards names that the old model's shards don't have: else a crash halfway would mix the two silently."""
    index_file = staging / SAFE_WEIGHTS_INDEX_NAME
    if not index_file.exists():
        return
    index = json.loads(index_file.read_text(encoding="utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    if not any((target / shard).exists() for shard in shards):
        return
    token = secrets.token_hex(4)
    names = {shard: f"model-{token}-{shard.removeprefix('model-')}" for shard in shards}
    for shard, name in names.items():
        os.rename(staging / shard, staging / name)
    index["weight_map"] = {key: names[shard] for key, shard in index["weight_map"].items()}
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _order(file: Path) -> tuple[int, str]:
    """Weights, other files, the index, the config."""
    if file.name in _LAST:
        return (2 + _LAST.index(file.name), file.name)
    return (0 if file.suffix == ".safetensors" else 1, file.name)
