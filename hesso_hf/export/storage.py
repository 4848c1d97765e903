"""Folders: whether they can be written and have room, asked before work is done, and what a write that fails says."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import HessoError, StorageError

_TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream error")  # how torch's writer says that it failed


def check_writable(argument: str, folder: Path) -> None:
    """Refuse a folder that can't be made or written to; nothing is left behind.

    Raises:
        StorageError: naming the argument, the folder and the reason.
    """
    place = _existing(folder)
    where = "" if place == folder.absolute() else f" ({str(place)!r} is what there is of it)"
    try:
        with tempfile.TemporaryDirectory(prefix=".hesso-", dir=place):
            pass
    except OSError as error:
        raise StorageError(
            f"`{argument}` ({str(folder)!r}) can't be written{where}: {error.strerror}; name another folder"
        ) from error


def room(folder: Path) -> int:
    """Return how many bytes can still be written into a folder, which needn't exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def check_room(parts: list[tuple[str, Path, int]]) -> None:
    """Refuse what doesn't fit the disks that it would be written to.

    Args:
        parts: what is written, where, and how many bytes it takes.

    Raises:
        StorageError: naming the folders, what they need and the room that there is.
    """
    by_disk: dict[int, list[tuple[str, Path, int]]] = {}
    for part in parts:
        by_disk.setdefault(os.stat(_existing(part[1])).st_dev, []).append(part)
    for together in by_disk.values():
        needed, free = sum(size for *_, size in together), room(together[0][1])
        if needed > free:
            named = "; ".join(f"{what} in {folder} about {shown(size)}" for what, folder, size in together)
            raise StorageError(
                f"the disk has room for {shown(free)}, and the run writes about {shown(needed)} ({named}): make room, "
                "name folders on another disk, or write fewer checkpoints (`save_total_limit`)"
            )


def shown(size: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
        size /= 1000
    return f"{size:,.1f} GB"


@contextmanager
def writing(what: str, folder: Path, size: int) -> Iterator[None]:
    """Say where a write failed, what it was to write (about `size` bytes) and how much room there is.

    Raises:
        StorageError: in place of an error of the file system, of safetensors' or of torch's writer.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is None:  # Transformers' own, about what a folder holds
            raise
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TORCH_WRITER):
            raise
        raise StorageError(
            f"{what} (about {shown(size)}) can't be written in {str(folder)!r}, where there is room for "
            f"{shown(room(folder))}: {str(error).splitlines()[0]}"
        ) from error


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))


def check_not_base(
    target: Path, base: Path | None, asked: bool, asking: str = "HessoConfig(overwrite_base=True)"
) -> None:
    """Refuse to replace the model that training began from, which may be the only copy, unless that is asked for.

    Args:
        base: the folder that it was read from, None where that is no folder.
        asked: that it be replaced.
        asking: how a user says so.

    Raises:
        HessoError: naming the folder.
    """
    if base is not None and not asked and target.exists() and base.exists() and target.samefile(base):
        raise HessoError(
            f"{str(target)!r} is the folder that the base model was read from, and would hold another model then: name "
            f"another folder, or say that this is meant by `{asking}`"
        )
