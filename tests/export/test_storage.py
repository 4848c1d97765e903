"""Folders and disks: what can't be written is told with its name, its need and the room that there is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hesso_hf.errors import StorageError
from hesso_hf.export.storage import check_room, check_writable, room, shown, writing
from tests.support.disk import full_disk


def test_a_folder_that_can_be_made_is_looked_at_and_not_made(tmp_path: Path) -> None:
    check_writable("output", tmp_path / "a" / "b")
    check_writable("output", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"`output` \('.*/file'\) can't be written: Not a directory; name another"):
        check_writable("output", tmp_path / "file")
    with pytest.raises(StorageError, match=r"`output` \('.*/file/a/b'\) .*\('.*/file' is what there is of it\)"):
        check_writable("output", tmp_path / "file" / "a" / "b")


def test_what_goes_on_one_disk_is_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [("the model", tmp_path / "small", 3_000_000), ("2 checkpoints", tmp_path, 4_000_000)]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=7_000_000))
    check_room(parts)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=6_999_999))
    with pytest.raises(
        StorageError, match=r"room for 7 MB, and the run writes about 7 MB \(the model in .*/small about"
    ):
        check_room(parts)


@pytest.mark.parametrize("library", ["python", "safetensors", "torch"])
def test_a_write_that_fails_is_told_alike_whoever_writes(library: str, tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(5000)}
    path = tmp_path / "file"

    def write() -> None:
        if library == "python":
            path.write_bytes(bytes(20_000))
        elif library == "safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path)

    text = rf"^the model \(about 20 kB\) can't be written in '{tmp_path}', where there is room for [\d.,]+ [MG]B: "
    with full_disk(), pytest.raises(StorageError, match=text), writing("the model", tmp_path, 20_000):
        write()
    write()


@pytest.mark.parametrize("error", [OSError("it has no config.json"), RuntimeError("shapes differ"), KeyError("x")])
def test_other_errors_are_left_alone(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, writing("the model", tmp_path, 1):
        raise error
    assert caught.value is error


def test_sizes_are_for_people(tmp_path: Path) -> None:
    assert [shown(size) for size in (7, 1_500, 2.5e6, 81e9)] == ["7 bytes", "1.5 kB", "2.5 MB", "81.0 GB"]
    assert room(tmp_path / "not" / "there") == room(tmp_path) > 0
