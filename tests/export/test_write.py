"""One writer: whatever holds the parameters, the same steps are done, with the same files and the same errors."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hesso_hf.config.files import PLOT_NAME
from hesso_hf.engines.deepspeed import export as zero_export
from hesso_hf.engines.fsdp.export import ShardedSource, Writers
from hesso_hf.errors import HessoError, VerificationError
from hesso_hf.export import export_pruned, parameters, publish, verify, write
from hesso_hf.export.checkpoint import CheckpointSource, open_checkpoint
from hesso_hf.export.decision import Decision
from hesso_hf.export.parameters import ParameterSource
from hesso_hf.export.report import PruningReport
from hesso_hf.hf_models.build import load_config
from hesso_hf.structures.cut import zero_units_
from hesso_hf.structures.groups import KeptUnits, PruningGroups
from hesso_hf.structures.proof.prove import proved_groups
from tests.project.test_structure import imports_of
from tests.support.lora import tiny_lora
from tests.support.sharded import shard_
from tests.support.sharded import whole as gathered
from tests.support.tiny import tiny_llama

KEPT = {"mlp_channels": 28, "embedding_channels": 36}
Export = Callable[..., PruningReport]


@cache
def groups() -> PruningGroups:
    model = tiny_llama()
    found = proved_groups(type(model), model.config)[0]
    return PruningGroups({name: found.structures[name] for name in KEPT})


def kept_units() -> KeptUnits:
    units = {name: group.num_units for name, group in groups().structures.items()}
    return KeptUnits(units, {n: (tuple(range(KEPT[n])),) * len(groups().structures[n].layers) for n in KEPT})


def pruned() -> PreTrainedModel:
    """Return a model with units at zero that nobody trains on."""
    model = tiny_llama(seed=5).requires_grad_(False).eval()
    zero_units_(dict(model.named_parameters()), groups(), kept_units())
    return model


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def whole(model: PreTrainedModel, folder: Path) -> PruningReport:
    return export_pruned(model, folder, kept_units=kept_units(), groups=groups(), training={"steps": 7})


def adapter(model: PreTrainedModel, folder: Path) -> PruningReport:
    tuned = tiny_lora(model, target_modules=["v_proj"])
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            parameter.data.zero_()
    return export_pruned(
        tuned, folder, kept_units=kept_units(), groups=groups(), training={"steps": 7}, lora_export="adapter"
    )


def sharded(model: PreTrainedModel, folder: Path) -> PruningReport:
    shard_(model, "shard")
    return _written(ShardedSource(model, Decision(groups(), kept_units()), Writers(0, 1, True)), folder)


def zero(model: PreTrainedModel, folder: Path) -> PruningReport:
    with zero_export.loading_whole():
        return _written(zero_export.ZeroSource(model, Decision(groups(), kept_units()), True), folder)


def streamed(model: PreTrainedModel, folder: Path) -> PruningReport:
    with tempfile.TemporaryDirectory() as dense:
        copy.deepcopy(model).save_pretrained(dense)  # which says in a config how it was saved
        files = open_checkpoint(type(model), load_config(dense), Path(dense))
        files[0].config.name_or_path = model.config.name_or_path
        return _written(CheckpointSource(*files, Decision(groups(), kept_units())), folder)


def _written(source: ParameterSource, folder: Path) -> PruningReport:
    return write.write_pruned(source, write.Output(folder, torch.float32), {"steps": 7})


WAYS: dict[str, Export] = {"whole": whole, "adapter": adapter, "sharded": sharded, "zero": zero, "streamed": streamed}
OTHERS = [name for name in WAYS if name != "whole"]


@pytest.fixture(autouse=True)
def without_deepspeed(monkeypatch: pytest.MonkeyPatch, one_process: None) -> None:
    """Let the masters be the parameters, as they are for a process that is alone."""
    monkeypatch.setattr(zero_export, "whole_fp32", lambda parameter: parameter.detach().float())


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_added_to_the_writer_is_done_wherever_the_parameters_lie(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write._add_files

    def with_notes(source: Any, output: Any, folder: Path, written: Any) -> None:
        plain(source, output, folder, written)
        (folder / "notes.txt").write_text("new")

    monkeypatch.setattr(write, "_add_files", with_notes)
    WAYS[way](pruned(), tmp_path / "small")
    assert (tmp_path / "small" / "notes.txt").read_text() == "new"


@pytest.mark.parametrize("way", OTHERS)
def test_files_weights_report_and_card_are_the_same(way: str, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("whole", way)}
    for name, folder in folders.items():
        report = WAYS[name](pruned(), folder)
        assert report.verification.fold_error < 1e-5
    assert {name for name in contents(folders[way]) if not name.startswith("adapter")} == contents(folders["whole"])
    ours, expected = (load_file(folder / "model.safetensors") for folder in (folders[way], folders["whole"]))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    reports = [json.loads((folder / "pruning_report.json").read_text()) for folder in folders.values()]
    for report in reports:
        assert report.pop("verification").keys() == {"fold_error", "rounding_error", "dtype", "tokens"}
    assert reports[0] == reports[1]
    assert reports[0]["steps"] == 7
    cards = [(folder / "README.md").read_text() for folder in folders.values()]
    assert _without_numbers(cards[0]) == _without_numbers(cards[1])
    AutoModelForCausalLM.from_pretrained(folders[way])


def _without_numbers(text: str) -> str:
    return re.sub(r"\d\.\de[-+]\d\d", "x", text)


def refused(way: str, folder: Path, error: type[Exception]) -> str:
    """Export, expect an error, check that nothing is left, and return its text without what differs by place."""
    folder.mkdir()
    (folder / "config.json").write_text(pruned().config.to_json_string())  # of a model that was here before
    with pytest.raises(error) as caught:
        WAYS[way](pruned(), folder)
    assert type(caught.value) is error
    assert contents(folder) == {"config.json"}
    assert not list(folder.parent.glob(".*staging*"))
    text = _without_numbers(str(caught.value)).replace(str(folder.parent), "")
    return re.sub(
        r"staging-\d+|(/|^)(whole|adapter|sharded|zero|streamed)\b|\.(whole|adapter|sharded|zero|streamed)\.", "", text
    )


@pytest.mark.parametrize("way", OTHERS)
@pytest.mark.parametrize("cause", ["logits", "disk", "publishing"])
def test_what_goes_wrong_has_one_text(way: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error: type[Exception] = VerificationError
    if cause == "logits":
        monkeypatch.setattr(verify, "FOLD_TOLERANCE", -1.0)
    elif cause == "disk":
        monkeypatch.setattr(parameters.torch, "equal", lambda *_: False)
    else:
        error = OSError

        def full(*_: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(publish, "_replace", full)
    text = refused(way, tmp_path / way, error)
    assert text == refused("whole", tmp_path / "whole", error)
    expected = {
        "logits": r"differ from the trained model's by x .*alone: mlp_channels x, embedding_channels x\. Nothing was",
        "disk": "reads back from .* differently than it was written",
        "publishing": "no space left",
    }[cause]
    assert re.search(expected, text)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_structure_alone_cannot_have_is_no_other_error(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the culprit is looked for, a config class may refuse one structure's sizes without the others'."""
    from hesso_hf.structures import cut

    plain = cut.resized_config
    groups()  # proved before anything is refused

    def picky(config: Any, sizes: dict[str, int], *rest: Any) -> Any:
        if sizes.keys() == {"intermediate_size"}:
            raise HessoError("no such sizes")
        return plain(config, sizes, *rest)

    monkeypatch.setattr(cut, "resized_config", picky)
    monkeypatch.setattr(verify, "FOLD_TOLERANCE", -1.0)
    assert "alone: mlp_channels nan, embedding_channels x" in refused(way, tmp_path / way, VerificationError)


@pytest.mark.parametrize("way", WAYS)
def test_what_belonged_to_the_model_before_goes_when_the_new_one_is_there(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    adapter(pruned(), folder)
    (folder / PLOT_NAME).write_bytes(b"old")
    (folder / "notes.txt").write_text("mine")
    WAYS[way](pruned(), folder)
    assert (folder / "notes.txt").exists()
    assert not (folder / PLOT_NAME).exists()
    assert (folder / "adapter").exists() == (way == "adapter")


@pytest.mark.parametrize("way", WAYS)
def test_the_trained_model_is_as_it_was(way: str, tmp_path: Path) -> None:
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    WAYS[way](model, tmp_path / "small")
    assert model.config.to_dict() | {"_name_or_path": 0} == config | {"_name_or_path": 0}
    if way != "adapter":  # PEFT has put its layers into it
        after = model.state_dict()
        assert all(torch.equal(gathered(after[name]), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("engine", ["engines.fsdp.export", "engines.deepspeed.export"])
def test_an_engine_has_no_step_of_its_own(engine: str) -> None:
    assert "export.parameters" in imports_of(engine)
    assert "export.write" in imports_of("engines.engine")
    steps = {f"export.{name}" for name in ("publish", "verify", "plots", "export", "source", "adapter")}
    assert not imports_of(engine) & (steps | {"structures.uneven_layers", "vocabulary.trim_tokenizer"})
