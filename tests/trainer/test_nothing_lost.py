"""No finished training is lost, and no dense model taken for a small one: disks, folders, the base, checkpoints."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from hesso_hf import HessoTrainer, export_pruned
from hesso_hf.cli.main import main
from hesso_hf.config.files import REPORT_NAME
from hesso_hf.errors import HessoError, StorageError
from hesso_hf.hf_models.tiny_model import logits_of
from hesso_hf.trainer import saving
from tests.support.checks import propagated
from tests.support.disk import full_disk
from tests.support.lora import lora_run
from tests.support.tiny import token_batches
from tests.support.training import hesso_config, trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a base model is read from."""
    folder = tmp_path_factory.mktemp("read") / "base"
    trainer(folder.parent / "x").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> HessoTrainer:
    """A run that has finished, with a checkpoint on the way and one at the end."""
    output_dir = tmp_path_factory.mktemp("run")
    made = trainer(
        output_dir, LlamaForCausalLM.from_pretrained(base), hesso_config(warmup_steps=1), max_steps=8,
        save_strategy="steps", save_steps=4, save_total_limit=None,
    )  # fmt: skip
    with pytest.raises(HessoError, match="`pruned_model`: pruning has not begun, so the model is dense: train until"):
        made.pruned_model()
    made.train()
    return made


def test_the_pruned_model_in_memory_is_the_one_that_is_saved(run: HessoTrainer, tmp_path: Path) -> None:
    small = run.pruned_model()
    run.save_model(str(tmp_path / "small"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(small) is type(saved) is LlamaForCausalLM
    assert small.config.intermediate_size == 28
    for (name, ours), theirs in zip(small.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    (ids,) = token_batches(1)
    assert (logits_of(small, ids) - logits_of(run.model.eval(), ids)).abs().max() <= 1e-4
    kept = {parameter.data_ptr() for parameter in run.model.parameters()}
    assert not kept & {parameter.data_ptr() for parameter in small.parameters()}  # to be trained on, say


def test_adapters_are_merged_into_the_pruned_model_and_the_dtype_is_the_exports(tmp_path: Path) -> None:
    tuned = lora_run(tmp_path, config=hesso_config(export_dtype="bfloat16"))
    tuned.train()
    small = tuned.pruned_model()
    assert type(small) is LlamaForCausalLM
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    (ids,) = token_batches(1)
    expected = logits_of(tuned.model.eval().base_model.model, ids)
    assert (logits_of(small.float(), ids) - expected).abs().max() <= 0.03 * expected.abs().max()


def test_a_model_that_is_not_what_was_trained_is_not_given_out(
    run: HessoTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hesso_hf.export.verify.FOLD_TOLERANCE", -1.0)
    with pytest.raises(HessoError, match="differ from the trained model's"):
        run.pruned_model()


def test_where_no_process_has_the_model_whole_there_is_none_in_memory(
    run: HessoTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.hesso_engine, "keeps_whole", False)
    with pytest.raises(
        HessoError, match=r"`pruned_model`: under FSDP and DeepSpeed .*`save_model\(folder\)` on all of"
    ):
        run.pruned_model()


def test_a_checkpoint_says_that_it_is_dense_and_how_it_is_exported(run: HessoTrainer) -> None:
    early, late = (Path(str(run.args.output_dir)) / f"checkpoint-{step}" for step in (4, 8))
    for folder in (early, late):
        card = (folder / "README.md").read_text()
        assert "A dense model, not the smaller one" in card
        assert f"hesso-hf export {folder} small" in card
        assert json.loads((folder / "hesso_state.json").read_text())["holds"] == "dense"
        assert json.loads((folder / "config.json").read_text())["hesso_hf"]["holds"] == "dense"
        assert AutoModelForCausalLM.from_pretrained(folder).config.intermediate_size == 44
    assert "at step 4 of 6" in (early / "README.md").read_text()
    assert "Its pruned units are at zero" in (late / "README.md").read_text()


def test_the_smaller_model_of_a_checkpoint_is_not_called_dense(run: HessoTrainer, tmp_path: Path) -> None:
    export_pruned(f"{run.args.output_dir}/checkpoint-8", tmp_path / "small")
    run.save_model(str(tmp_path / "saved"))
    for folder in ("small", "saved"):
        assert "hesso_hf" not in json.loads((tmp_path / folder / "config.json").read_text())
    assert not hasattr(run.model.config, "hesso_hf")


def test_saving_the_model_in_memory_warns_and_says_in_its_config_that_it_is_dense(
    run: HessoTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with propagated(caplog):
        run.save_model(str(tmp_path / "small"))
        assert "`save_pretrained` writes" not in caplog.text
        run.model.save_pretrained(tmp_path / "dense")
    assert "`save_pretrained` writes the dense model, its pruned units at zero" in caplog.text
    for remedy in ("`trainer.save_model(folder)`", "`trainer.pruned_model()`", "`hesso-hf export`"):
        assert remedy in caplog.text
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["hesso_hf"]["holds"] == "dense"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.config.intermediate_size == 44
    export_pruned(tmp_path / "dense", tmp_path / "of-dense")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "of-dense").config.intermediate_size == 28


def test_copies_and_pickles_of_the_model_have_the_class_own_way_to_save(run: HessoTrainer, tmp_path: Path) -> None:
    torch.save(run.model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(run.model), loaded):
        assert other.save_pretrained.__func__ is LlamaForCausalLM.save_pretrained
        assert other.save_pretrained.__self__ is other
    assert b"hesso_hf" not in (tmp_path / "model.pt").read_bytes()


def test_nothing_is_warned_of_before_units_are_at_zero_or_once_they_are_cut(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    early = trainer(tmp_path, LlamaForCausalLM.from_pretrained(base))
    early.create_optimizer_and_scheduler(12)
    cut = trainer(tmp_path, LlamaForCausalLM.from_pretrained(base), hesso_config(compact="end"))
    cut.train()
    with propagated(caplog):
        for name, other in (("early", early), ("cut", cut)):
            other.model.save_pretrained(tmp_path / name)
            assert "hesso_hf" not in json.loads((tmp_path / name / "config.json").read_text())
    assert "`save_pretrained` writes" not in caplog.text


@pytest.mark.parametrize("trained", [False, True])
def test_the_base_is_not_replaced_unless_that_is_asked_for(
    trained: bool, run: HessoTrainer, base: Path, tmp_path: Path
) -> None:
    before = (base / "model.safetensors").read_bytes()
    other = run if trained else trainer(tmp_path, LlamaForCausalLM.from_pretrained(base))
    (tmp_path / "link").symlink_to(base)
    for name in (base, tmp_path / "link"):
        with pytest.raises(HessoError, match=r"is the folder that the base model was read from.*overwrite_base=True"):
            other.save_model(str(name))
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("compact", ["never", "end"])
def test_saving_the_model_in_memory_does_not_replace_the_base_unless_that_is_asked_for(
    compact: str, base: Path, tmp_path: Path
) -> None:
    before = (base / "model.safetensors").read_bytes()
    other = trainer(tmp_path, LlamaForCausalLM.from_pretrained(base), hesso_config(compact=compact))
    other.train()
    model = other.model
    for folder in ({"save_directory": base}, {"save_directory": str(base)}):
        with pytest.raises(HessoError, match=r"is the folder that the base model was read from.*overwrite_base=True"):
            model.save_pretrained(**folder)
    model.save_pretrained(tmp_path / "elsewhere")
    del other
    gc.collect()
    with pytest.raises(HessoError, match="is the folder that the base model was read from"):
        model.save_pretrained(base)
    assert (base / "model.safetensors").read_bytes() == before
    copied = shutil.copytree(base, tmp_path / "copied")
    meant = trainer(tmp_path, LlamaForCausalLM.from_pretrained(copied), hesso_config(overwrite_base=True))
    meant.create_optimizer_and_scheduler(12)
    meant.model.save_pretrained(copied)


def test_an_adapter_may_be_saved_beside_its_base(base: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(base, tmp_path / "copied")
    tuned = lora_run(tmp_path / "x", LlamaForCausalLM.from_pretrained(copied))
    tuned.create_optimizer_and_scheduler(12)
    tuned.model.save_pretrained(copied)
    assert (copied / "adapter_config.json").exists()
    assert (copied / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_checkpoints_are_not_written_where_the_base_is_one_of_them(base: Path, tmp_path: Path) -> None:
    """They would replace it, or it would be removed as the oldest."""
    earlier = shutil.copytree(base, tmp_path / "checkpoint-4")
    before = (earlier / "model.safetensors").read_bytes()

    def run(config: Any = None, **changes: Any) -> HessoTrainer:
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "save_total_limit": 1}
        model = LlamaForCausalLM.from_pretrained(earlier)
        return trainer(tmp_path, model, config or hesso_config(warmup_steps=1), **(options | changes))

    with pytest.raises(HessoError, match=r"is where the base model lies, as checkpoint-4, .*another folder.*overwrite"):
        run().train()
    run(save_strategy="no").train()
    assert (earlier / "model.safetensors").read_bytes() == before
    run(hesso_config(warmup_steps=1, overwrite_base=True), save_steps=2, save_total_limit=None).train()
    with pytest.raises(HessoError, match="is where the base model lies, as checkpoint-4, "):
        run(save_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = trainer(
        tmp_path, LlamaForCausalLM.from_pretrained(earlier), hesso_config(warmup_steps=1), max_steps=9,
        save_strategy="steps", save_steps=9,
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(earlier))
    assert again.state.global_step == 9


def test_an_export_does_not_replace_the_base_either_unless_that_is_asked_for(
    run: HessoTrainer, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(str(run.args.output_dir)) / "checkpoint-8"
    before = (base / "model.safetensors").read_bytes()
    refused = r"is the folder that the base model was read from.*overwrite_base=True"
    with pytest.raises(HessoError, match=refused):
        export_pruned(checkpoint, base)
    with pytest.raises(HessoError, match=refused):
        export_pruned(LlamaForCausalLM.from_pretrained(base), base)
    assert main(["export", str(checkpoint), str(base)]) == 2
    assert "--overwrite-base" in capsys.readouterr().err
    assert (base / "model.safetensors").read_bytes() == before
    of_the_hub = LlamaForCausalLM.from_pretrained(base)
    of_the_hub.config._commit_hash = "9f8e"  # its name is that of the folder by chance
    export_pruned(of_the_hub, shutil.copytree(base, tmp_path / "base"))
    shutil.copytree(base, tmp_path / "other")
    export_pruned(LlamaForCausalLM.from_pretrained(tmp_path / "other"), tmp_path / "other", overwrite_base=True)
    assert (tmp_path / "other" / REPORT_NAME).exists()


def test_an_adapter_s_base_is_not_replaced_either_and_is_where_that_is_meant(tmp_path: Path) -> None:
    model = trainer(tmp_path / "x").model
    model.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(HessoError, match="is the folder that the base model was read from"):
        lora_run(tmp_path / "x", model).save_model(str(tmp_path / "base"))
    meant = trainer(
        tmp_path / "x", LlamaForCausalLM.from_pretrained(tmp_path / "base"), hesso_config(overwrite_base=True)
    )
    meant.train()
    meant.save_model(str(tmp_path / "base"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.intermediate_size == 28


def test_where_a_folder_cannot_be_written_the_small_model_is_saved_elsewhere(run: HessoTrainer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Nothing is lost: the smaller model is saved in") as caught:
        run.save_model(str(tmp_path / "file" / "small"))
    assert f"can't be written in '{tmp_path / 'file' / 'small'}'" in str(caught.value)
    (rescued,) = Path(str(run.args.output_dir)).glob("small-rescued-*")
    assert f"saved in '{rescued}' instead" in str(caught.value)
    assert AutoModelForCausalLM.from_pretrained(rescued).config.intermediate_size == 28


def test_where_no_disk_has_room_the_small_model_is_saved_in_shared_memory(
    run: HessoTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    shared = tmp_path / "shm"
    monkeypatch.setattr(saving, "SHARED_MEMORY", shared)
    monkeypatch.setattr(saving, "room", lambda folder: 10**9 if folder == shared else 0)
    with pytest.raises(StorageError, match="No other place takes it"):
        run.save_model(str(tmp_path / "file" / "small"))
    shared.mkdir()
    with pytest.raises(StorageError, match=r"is saved in '.*/shm/small-rescued-\d+' instead, which is in main memory"):
        run.save_model(str(tmp_path / "file" / "small"))
    (rescued,) = shared.iterdir()
    assert AutoModelForCausalLM.from_pretrained(rescued).config.intermediate_size == 28


def test_on_a_full_disk_need_and_room_are_named_and_the_run_can_be_saved_later(
    run: HessoTrainer, tmp_path: Path
) -> None:
    size = 4 * sum(parameter.numel() for parameter in run.pruned_model().parameters())
    with full_disk(), pytest.raises(StorageError) as caught:
        run.save_model(str(tmp_path / "small"))
    text = str(caught.value)
    assert (
        f"the smaller model (about {size / 1000:.3g} kB) can't be written in '{tmp_path / 'small'}', where there"
        in text
    )
    assert "there is room for" in text
    assert "File too large" in text
    assert "still in memory: make room, then `save_model` again" in text
    assert f"`hesso-hf export {run.args.output_dir}/checkpoint-8 FOLDER`" in text
    assert list(tmp_path.iterdir()) == []
    run.save_model(str(tmp_path / "small"))
    assert (tmp_path / "small" / "config.json").exists()


class FullAfter(TrainerCallback):
    """Fills the disk after a checkpoint."""

    def __init__(self, disk: Any) -> None:
        self._disk = disk

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._disk.__enter__()


def second_checkpoint_unwritten(run: Any) -> StorageError:
    """Train until the second checkpoint, for which there is no room, and return what is said of it."""
    disk = full_disk()
    run.add_callback(FullAfter(disk))
    try:
        with pytest.raises(StorageError) as caught:
            run.train()
    finally:
        disk.__exit__(None, None, None)
    return caught.value


def test_on_a_full_disk_a_checkpoint_names_the_one_to_go_on_from(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    error = second_checkpoint_unwritten(trainer(tmp_path, **options))
    assert f") can't be written in '{tmp_path / 'checkpoint-4'}', where there is room for" in str(error)
    assert f"Make room, then: `resume_from_checkpoint='{tmp_path / 'checkpoint-2'}'`" in str(error)
    assert "Pruning is over" not in str(error), "it needs six steps"
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 8


def test_on_a_full_disk_after_pruning_a_checkpoint_names_the_smaller_model_that_there_is(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=7, max_steps=16)
    error = second_checkpoint_unwritten(run)
    assert f"{saving.HELD_ON_THE_WAY}. `hesso-hf export {tmp_path / 'checkpoint-7'} FOLDER` writes" in str(error)
    assert error.in_memory == saving.HELD_ON_THE_WAY
    run.save_model(str(tmp_path / "small"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.intermediate_size == 28
