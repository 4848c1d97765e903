"""Export from a checkpoint's files: the files of the path through the whole model, with little in memory at a time."""

from __future__ import annotations

import errno
import json
import logging
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hesso_hf.errors import HessoError, StorageError, VerificationError
from hesso_hf.export import checkpoint as streaming
from hesso_hf.export import export_pruned, filling, source
from hesso_hf.export.checkpoint import NotStreamedError
from hesso_hf.export.filling import layer_of
from hesso_hf.export.report import PruningReport
from hesso_hf.export.stored import StoredWeights
from hesso_hf.export.weight_files import WeightFiles
from hesso_hf.hf_models.build import model_class_of
from hesso_hf.structures.groups import KeptUnits, PruningGroups
from hesso_hf.structures.proof.prove import proved_groups
from tests.support.families import ALL, EXPERT, HEADS, MLP, OTHERS, STREAM, random_model, random_units, zero_pruned_

FAMILIES = ALL | {family.name: family for family in OTHERS}
KEPT: dict[str, dict[str, int]] = {
    "llama": {HEADS: 2, MLP: 37, STREAM: 48},
    "llama-tied": {MLP: 37, STREAM: 48, "layers": 1},
    "gpt2": {HEADS: 4, MLP: 37, STREAM: 48},
    "mixtral": {MLP: 40, "experts": 3},
    "deepseek_v3": {STREAM: 48, EXPERT: 20, "experts": 2},
}
CONVERTED = ("mixtral", "deepseek_v3")  # each expert is stored by itself


@cache
def proved(name: str) -> PruningGroups:
    config = FAMILIES[name].config()
    return proved_groups(model_class_of(config), config, tuple(KEPT[name]))[0]


def units(name: str) -> KeptUnits:
    return random_units(proved(name), KEPT[name])


def uneven() -> KeptUnits:
    """Return a decision by which a llama's layers keep different numbers of channels."""
    return KeptUnits({MLP: 52}, {MLP: (tuple(range(0, 40)), tuple(range(9, 31)))})


def checkpoint(folder: Path, name: str, kept: KeptUnits, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint in several files, its pruned units at zero."""
    model = random_model(FAMILIES[name].config())
    zero_pruned_(model, proved(name), kept)
    for buffer in model.buffers():  # those that are trained, or chosen by, aren't zero
        if buffer.dim() == 1 and not buffer.any():
            buffer.normal_()
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")  # type: ignore[arg-type, call-arg]
    return folder


def exported(folder: Path, target: Path, name: str, kept: KeptUnits, **options: Any) -> PruningReport:
    shards = "5GB" if name in CONVERTED else "30KB"  # Transformers keeps what it has divided in one file
    return export_pruned(folder, target, kept_units=kept, groups=proved(name), max_shard_size=shards, **options)


def whole(*_: Any) -> Any:
    """Stand for `open_checkpoint` where a checkpoint is to be loaded whole."""
    raise NotStreamedError("a test asks for it")


def contents(folder: Path) -> dict[str, Any]:
    """Return what is in a folder's files, without the errors that were measured."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = json.loads(files["pruning_report.json"])
    return files | {"pruning_report.json": report | {"verification": 0}, "README.md": 0, "report.html": 0}


CASES = [
    *(pytest.param(name, "float32", id=name) for name in KEPT),
    *(pytest.param(name, "bfloat16", id=f"{name}-bf16") for name in ("llama", "gpt2", "mixtral")),
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_file_is_the_one_that_comes_of_the_whole_model(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = units(name)
    dense = checkpoint(tmp_path / "dense", name, kept, getattr(torch, dtype))
    monkeypatch.setattr(filling, "PIECE", 2000)  # tensors are read in several pieces
    monkeypatch.setattr(filling, "AT_ONCE", 4000)
    with monkeypatch.context() as patched:
        patched.setattr(source.AutoTokenizer, "from_pretrained", None)
        patched.setattr(model_class_of(FAMILIES[name].config()), "from_pretrained", None)  # nothing is loaded
        found = exported(dense, tmp_path / "streamed", name, kept)
    monkeypatch.setattr(source, "open_checkpoint", whole)
    expected = exported(dense, tmp_path / "whole", name, kept)
    assert found.verification.fold_error < 1e-5
    assert abs(found.verification.rounding_error - expected.verification.rounding_error) < 1e-5
    ours, theirs = contents(tmp_path / "streamed"), contents(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert not {file: (text, ours[file]) for file, text in theirs.items() if ours[file] != text}
    assert ("model.safetensors.index.json" in ours) == (name not in CONVERTED)
    AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")


def test_layers_of_different_widths_and_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dense = checkpoint(tmp_path / "dense", "llama", uneven())
    for path in ("streamed", "whole"):
        report = exported(dense, tmp_path / path, "llama", uneven(), dtype="bfloat16")
        assert not report.stock
        monkeypatch.setattr(source, "open_checkpoint", whole)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "dense", "llama", units("llama"))


def stored_again(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint's last file."""
    path = max(folder.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refuse(folder: Path, target: Path, error: type[Exception]) -> str:
    """Export over a model that was there, expect an error, and check that this model is as it was."""
    target.mkdir()
    (target / "config.json").write_text("before")
    with pytest.raises(error) as caught:
        exported(folder, target, "llama", units("llama"))
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert not list(target.parent.glob(".*staging*"))
    return str(caught.value)


def test_a_tensor_that_is_missing_or_has_another_shape_is_named(llama: Path, tmp_path: Path):
    stored_again(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(71)}))
    assert "model.norm.weight is (71,)" in refuse(llama, tmp_path / "small", HessoError)
    stored_again(llama, lambda tensors: tensors.pop("model.norm.weight"))
    assert "model.norm.weight is missing in" in refuse(llama, tmp_path / "other", HessoError)
    max(llama.glob("*.safetensors")).unlink()
    assert "can't be read" in refuse(llama, tmp_path / "third", HessoError)


def test_a_unit_that_is_to_be_cut_and_is_not_zero_is_named(llama: Path, tmp_path: Path):
    stored_again(llama, lambda tensors: [tensor.fill_(0.5) for tensor in tensors.values()])
    assert "is to be cut but its weights aren't zero" in refuse(llama, tmp_path / "small", HessoError)


def test_a_disk_that_fills_up_leaves_what_was_there(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain, calls = WeightFiles.write, list[str]()

    def full(files: WeightFiles, name: str, pieces: Any) -> None:
        calls.append(name)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(files, name, pieces)

    monkeypatch.setattr(WeightFiles, "write", full)
    assert "can't be written in" in refuse(llama, tmp_path / "small", StorageError)
    assert len(calls) == 6


def test_what_a_file_loses_on_the_way_is_seen(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = WeightFiles.write

    def spoilt(files: WeightFiles, name: str, pieces: Any) -> None:
        plain(files, name, (piece + (1e-3 if "layers.1.mlp.up" in name else 0.0) for piece in pieces))

    monkeypatch.setattr(WeightFiles, "write", spoilt)
    text = refuse(llama, tmp_path / "small", VerificationError)
    assert "model.layers.1.mlp.up_proj.weight reads back from" in text


def test_no_more_than_a_layer_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Count the bytes of all tensors that are read from files or filled, until they are let go."""
    family, layers = FAMILIES["llama"], 12
    config = family.config(num_hidden_layers=layers)
    model = random_model(config)
    groups = proved_groups(type(model), config, (MLP,))[0]
    kept = random_units(groups, {MLP: 37})
    zero_pruned_(model, groups, kept)
    model.save_pretrained(tmp_path / "dense")
    held = peak = 0

    def counting(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any) -> torch.Tensor:
            nonlocal held, peak
            tensor = make(*args)
            held, peak = held + tensor.nbytes, max(peak, held + tensor.nbytes)
            weakref.finalize(tensor, let_go, tensor.nbytes)
            return tensor

        return made

    def let_go(size: int) -> None:
        nonlocal held
        held -= size

    monkeypatch.setattr(StoredWeights, "_read", counting(StoredWeights._read))
    monkeypatch.setattr(filling, "filled", counted := counting(filling.filled))
    monkeypatch.setattr(streaming, "filled", counted)
    export_pruned(tmp_path / "dense", tmp_path / "small", kept_units=kept, groups=groups)
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    layer = sum(size for name, size in sizes.items() if layer_of(name) == "model.layers.0")
    assert layer < peak <= layer + 2 * max(sizes.values()) < sum(sizes.values()) / 4
    assert held == 0


@pytest.mark.parametrize("why", ["tied", "dtypes", "pickle"])
def test_what_is_loaded_whole_says_why(why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    name = "llama-tied" if why == "tied" else "llama"
    folder = checkpoint(tmp_path / "dense", name, units(name))
    if why == "tied":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = max(folder.glob("*.safetensors")).name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        embedding = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()
        stored_again(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    elif why == "dtypes":
        stored_again(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        for path in folder.glob("model*"):
            path.unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with caplog.at_level(logging.INFO, "hesso_hf.export"):
        exported(folder, tmp_path / "small", name, units(name))
    expected = {
        "tied": "it holds model.embed_tokens.weight and lm_head.weight, which are tied",
        "dtypes": "its weights are of ['torch.bfloat16', 'torch.float32'], its config says torch.float32",
        "pickle": "it holds no safetensors file",
    }
    assert f"is loaded whole: {expected[why]}" in caplog.text


def test_experts_in_several_files_are_loaded_again(tmp_path: Path):
    kept = units("mixtral")
    dense = checkpoint(tmp_path / "dense", "mixtral", kept)
    export_pruned(dense, tmp_path / "one", kept_units=kept, groups=proved("mixtral"))
    export_pruned(dense, tmp_path / "many", kept_units=kept, groups=proved("mixtral"), max_shard_size="9KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 9
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())
