"""Compaction under FSDP2, with real processes: the shards become those of the smaller model, and the run goes on."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from transformers import AutoModelForCausalLM, PreTrainedModel

from hesso_hf import HessoOptimizer, HessoTrainer, export_pruned, wrap_optimizer
from hesso_hf.config import HessoConfig
from hesso_hf.distributed.parts import local, named_parameters
from hesso_hf.engines.fsdp import compaction as in_shards
from hesso_hf.engines.fsdp import export as fsdp_export
from hesso_hf.engines.fsdp.engine import Fsdp2Engine
from hesso_hf.errors import HessoError
from hesso_hf.hf_models.loading import load_model
from hesso_hf.hf_models.tiny_model import logits_of
from hesso_hf.pruning.compaction import compact
from hesso_hf.structures.cut import cut_part
from hesso_hf.structures.in_place import InPlace
from tests.engines.test_fsdp import LOADED_BY_ONE, build, state_of
from tests.pruning.test_compaction import FAMILIES
from tests.support import fsdp_cpu
from tests.support.fsdp_cpu import Job
from tests.support.sharded import shard_, whole
from tests.support.tiny import VOCAB, tiny_llama
from tests.support.training import ALONE, hesso_config, logged, said_by_the_dense_model

LOOPS = {name: FAMILIES[name] for name in ("llama, tied", "gemma2", "phi", "qwen3_moe", "layers")}
OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "gemma2": functools.partial(SGD, lr=1e-2, momentum=0.9),
}
END, STEPS = 7, 12  # steps after which pruning has ended, of all
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "plain": ({}, {}),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "eager"}, {}),
    "bf16": ({"bf16": True}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}),
    "offloaded": ({}, {"FSDP_OFFLOAD_PARAMS": "true"}),
}


# -- what processes do -------------------------------------------------------------------------------------------------


def step(model: PreTrainedModel, optimizer: HessoOptimizer) -> float:
    """Train on this process' share of a step's batch; return its loss."""
    generator = torch.Generator().manual_seed(100 + optimizer.process.step)
    batch = torch.randint(3, VOCAB, (4, 9), generator=generator)
    share = batch.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else batch
    optimizer.zero_grad()
    loss = model(input_ids=share, labels=share).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def held(model: PreTrainedModel, optimizer: HessoOptimizer) -> dict[str, torch.Tensor]:
    """Return all that this process holds of weights and optimizer state."""
    found = {}
    for name, parameter in named_parameters(model).items():
        found[name] = local(parameter.detach()).clone()
        for key, value in optimizer.state[parameter].items():
            found[f"{name} {key}"] = local(torch.as_tensor(value)).clone()
    return found


def check_spoilt(model: PreTrainedModel, optimizer: HessoOptimizer) -> list[str]:
    """Cut the model while process 1 fails on the way; check that nothing changes and return what each one heard."""
    heard, before, logits = [], held(model, optimizer), logits_of(model, torch.arange(3, 33).view(2, 15))
    for where, name in ((fsdp_export, "cut_part"), (InPlace, "_set_attributes"), (in_shards, "_shard_like")):
        plain, calls = getattr(where, name), iter(range(1000))

        def failing(*args: Any, plain: Any = plain, calls: Any = calls) -> Any:
            whole = plain is cut_part and not args[2]  # as a comparison of logits puts it together
            if dist.get_rank() == 1 and not whole and next(calls) == 5:
                raise torch.OutOfMemoryError("no room")
            return plain(*args)

        setattr(where, name, failing)
        with pytest.raises((HessoError, torch.OutOfMemoryError)) as caught:
            in_shards.compact(model, optimizer)
        setattr(where, name, plain)
        heard.append(f"{type(caught.value).__name__}: {caught.value}")
        assert held(model, optimizer).keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in held(model, optimizer).items())
        assert torch.equal(logits_of(model, torch.arange(3, 33).view(2, 15)), logits)
    return heard


def loop_job(folder: str, processes: int, family: str, mesh: str = "shard", spoilt: bool = False) -> None:
    """Prune in a loop of one's own, cut the model in memory, train on, and leave what came out."""
    make, sizes, structures = FAMILIES[family]
    model = make().train()
    config = HessoConfig(
        target_sizes=sizes, structures=structures, warmup_steps=1, pruning_steps=2, pruning_periods=1,
        saliency_batches=1, **ALONE,
    )  # fmt: skip
    if processes > 1:
        shard_(model, mesh)
    base = OPTIMIZERS.get(family, functools.partial(AdamW, lr=2e-3, eps=1e-4))(model.parameters())
    optimizer = wrap_optimizer(base, model, config, 12)
    while not optimizer.process.finished:
        step(model, optimizer)
    step(model, optimizer)
    optimizer.zero_grad()
    sizes_before = {key: value.numel() for key, value in held(model, optimizer).items()}
    heard = check_spoilt(model, optimizer) if spoilt else []
    ids, modules = torch.arange(3, 33).view(2, 15), {id(module) for module in model.modules()}
    logits, larger = [logits_of(model, ids)], [weakref.ref(parameter) for parameter in named_parameters(model).values()]
    found = (in_shards.compact if processes > 1 else compact)(model, optimizer)
    assert processes == 1 or not [parameter for parameter in larger if parameter() is not None]
    logits.append(logits_of(model, ids))
    losses = [step(model, optimizer) for _ in range(4)]
    assert {id(module) for module in model.modules()} <= modules
    parameters = named_parameters(model)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in parameters.values()} == {id(p) for p in optimizer.state}
    left = {
        "error": found.error,
        "parameters": [found.parameters_before, model.num_parameters()],
        "logits": logits,
        "losses": losses,
        "heard": heard,
        "held": [sum(sizes_before.values()), sum(value.numel() for value in held(model, optimizer).values())],
        "weights": {name: whole(parameter.detach()) for name, parameter in parameters.items()},
    }
    torch.save(left, f"{folder}/rank{dist.get_rank() if processes > 1 else 0}.pt")


def made(folder: str, processes: int, compact: str = "end", **changes: Any) -> HessoTrainer:
    config = hesso_config(compact=compact).to_dict()
    return build(folder, STEPS, processes, hesso=config, weight_decay=0.1, **changes)


def trained_job(folder: str, processes: int, compact: str = "end", **changes: Any) -> None:
    """Train and save the small model; leave losses, weights and what each process holds."""
    run = made(folder, processes, compact, **changes)
    run.train()
    state = state_of(run)
    run.save_model(f"{folder}/small")
    parameters = named_parameters(run.hesso_run.model)
    found = {
        "losses": logged(run, "loss"),
        "weights": {name: whole(parameter.detach()) for name, parameter in parameters.items()},
        "held": sum(value.numel() for value in state.values()),
        "sharded": [isinstance(parameter, DTensor) for parameter in parameters.values()],
    }
    torch.save(found, f"{folder}/rank{run.args.process_index}.pt")


def resumed_job(folder: str, processes: int, steps: list[int]) -> None:
    """Go on from checkpoints of a run that was cut, and compare what each process holds bit for bit."""
    whole_run = made(f"{folder}/whole", processes, save_strategy="steps", save_steps=1)
    whole_run.train()
    whole_run.save_model(f"{folder}/small")
    expected = state_of(whole_run)
    record = whole_run.hesso_run.record()["compaction"]
    for number in steps:
        output = Path(f"{folder}/from-{number}/out")
        if whole_run.args.process_index == 0:
            shutil.copytree(f"{folder}/whole/out/checkpoint-{number}", output / f"checkpoint-{number}")
        dist.barrier()
        with fsdp_cpu.environment(LOADED_BY_ONE if number == steps[-1] else {}):
            again = made(f"{folder}/from-{number}", processes)
            again.train(resume_from_checkpoint=True)
        found = state_of(again)
        assert found.keys() == expected.keys()
        different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
        assert not different, (number, different)
        assert again.hesso_run.record()["compaction"] == record
    again.train()  # with the smaller model
    assert again.model.num_parameters() == again.hesso_plan.target.parameters_after
    print("RESUMED", flush=True)


def best_job(folder: str, processes: int) -> None:
    """Evaluate and save every step, and go back to the best model at the end."""
    run = made(
        folder, processes, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, options={"eval_dataset": said_by_the_dense_model()},
    )  # fmt: skip
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = {"best": run.state.best_model_checkpoint, "losses": losses, "loss": run.evaluate()["eval_loss"]}
    torch.save(best, f"{folder}/rank{run.args.process_index}.pt")


def masked_job(folder: str, processes: int) -> None:
    """Train where process 1 has no room for the cut; leave what was said and the size."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger, plain = logging.getLogger("hesso_hf.trainer.compacting"), fsdp_export.cut_part

    def failing(*args: Any) -> Any:
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("no room")
        return plain(*args)

    logger.addHandler(handler)
    fsdp_export.cut_part = failing
    run = made(folder, processes)
    run.train()
    fsdp_export.cut_part = plain
    logger.removeHandler(handler)
    left = {"said": said, "losses": logged(run, "loss"), "hidden": run.model.config.hidden_size}
    torch.save(left, f"{folder}/rank{run.args.process_index}.pt")


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    loops = [
        Job(__name__, "loop_job", folder / family, {"family": family, "spoilt": family == "layers"}) for family in LOOPS
    ]
    settings = [Job(__name__, "trained_job", folder / name, *found) for name, found in SETTINGS.items()]
    others = [
        Job(__name__, "trained_job", folder / "never", {"compact": "never"}),
        Job(__name__, "resumed_job", folder / "resumed", {"steps": [END - 1, END, 10]}),
        Job(__name__, "best_job", folder / "best"),
        Job(__name__, "masked_job", folder / "masked"),
    ]
    done = fsdp_cpu.run_jobs(folder, [*loops, *settings, *others])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("RESUMED") == 2
    return folder


def left_by(folder: Path, processes: int = 2) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def assert_near(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


def check_alike(folder: Path, family: str, alone_in: Path, processes: int = 2) -> None:
    """Compare what several processes cut and trained with what one does."""
    loop_job(str(alone_in), 1, family)
    alone = torch.load(alone_in / "rank0.pt", weights_only=True)
    ranks = left_by(folder, processes)
    for found in ranks:
        assert found["error"] < 1e-5
        before, after = found["logits"]
        assert (after - before).abs().max() < 1e-5 * before.abs().max()
        assert found["parameters"] == alone["parameters"]
        assert found["held"][1] < 0.9 * found["held"][0]
        assert_near(found["weights"], alone["weights"], 1e-5)
    for expected, *losses in zip(alone["losses"], *(found["losses"] for found in ranks), strict=True):
        assert sum(losses) / processes == pytest.approx(expected, abs=1e-5)
    assert sum(found["held"][1] for found in ranks[:2]) < 1.01 * alone["held"][1]  # steps are counted on each


@pytest.mark.parametrize("family", LOOPS)
def test_shards_are_cut_where_they_are_and_train_on_as_the_whole_model_does(
    family: str, two: Path, tmp_path: Path
) -> None:
    check_alike(two / family, family, tmp_path)


def test_where_one_process_fails_all_stay_as_they_were_and_can_be_cut_later(two: Path) -> None:
    ranks = [found["heard"] for found in left_by(two / "layers")]
    assert ranks[1] == ["OutOfMemoryError: no room"] * 3
    assert ranks[0][0] == "HessoError: another process could not do its part: OutOfMemoryError: no room"
    assert all("another process could not cut the model in memory: OutOfMemoryError" in said for said in ranks[0][1:])


def test_the_loss_goes_on_where_it_was(two: Path) -> None:
    cut, masked = left_by(two / "plain")[0], left_by(two / "never")[0]
    ours, theirs = cut["losses"], masked["losses"]
    assert ours[:END] == theirs[:END]
    assert abs(ours[END] - theirs[END]) < 1e-5
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.02
    files = [load_file(two / name / "small" / "model.safetensors") for name in ("plain", "never")]
    assert {name: value.shape for name, value in files[0].items()} == {n: v.shape for n, v in files[1].items()}
    for rank in range(2):
        assert left_by(two / "plain")[rank]["held"] < 0.8 * left_by(two / "never")[rank]["held"]


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_cut_as_one_does_under_other_settings(name: str, two: Path, tmp_path: Path) -> None:
    trained_job(str(tmp_path), 1)
    alone = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for found in left_by(two / name):
        assert all(found["sharded"])
        assert_near(found["weights"], alone["weights"], 0.1 if name == "bf16" else 1e-5)
    small = load_model(two / name / "small", torch.float32)
    assert small.config.hidden_size == 48
    assert_near(dict(small.named_parameters()), left_by(two / name)[0]["weights"], 0.0)
    report = json.loads((two / name / "small" / "pruning_report.json").read_text())
    assert report["compaction"]["step"] == END
    assert report["compaction"]["error"] < 1e-5
    assert report["parameters"] == {"before": tiny_llama().num_parameters(), "after": small.num_parameters()}
    assert report["sizes"]["before"]["hidden_size"] == 60


def test_checkpoints_are_small_and_go_on_bit_for_bit(two: Path, tmp_path: Path) -> None:
    folders = {number: two / "resumed" / "whole" / "out" / f"checkpoint-{number}" for number in (END - 1, END, STEPS)}
    sizes = {n: sum(path.stat().st_size for path in folder.rglob("*.distcp")) for n, folder in folders.items()}
    assert sizes[END] < 0.8 * sizes[END - 1]
    for number, holds in ((END - 1, "dense"), (END, "smaller")):
        assert json.loads((folders[number] / "hesso_state.json").read_text())["holds"] == holds
    assert json.loads((folders[END] / "config.json").read_text())["hidden_size"] == 48
    report = export_pruned(folders[STEPS], tmp_path / "exported")
    assert report.to_dict()["compaction"]["step"] == END
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path / "exported", two / "resumed" / "small")]
    assert all(torch.equal(files[0][name], value) for name, value in files[1].items())
    AutoModelForCausalLM.from_pretrained(two / "resumed" / "small")


def test_the_best_model_is_a_small_one(two: Path) -> None:
    for found in left_by(two / "best"):
        best = int(found["best"].rpartition("-")[2])
        pruned = {number: loss for number, loss in found["losses"].items() if number >= END}
        assert found["losses"][best] == min(pruned.values())
        assert best < STEPS, "the last one is the best one: nothing was loaded"
        assert found["loss"] == pytest.approx(found["losses"][best], rel=1e-5)


def test_where_one_process_has_no_room_all_go_on_masked_with_a_warning(two: Path) -> None:
    for found in left_by(two / "masked"):
        assert len([said for said in found["said"] if "stays whole, its pruned units at zero" in said]) == 1
        assert found["hidden"] == 60
        assert found["losses"] == left_by(two / "never")[0]["losses"]


def test_what_cannot_be_exchanged_is_named() -> None:
    model = tiny_llama()
    assert in_shards.why_not_exchange(model).startswith("model.embed_tokens.weight isn't divided")
    engine, base = SimpleNamespace(config=hesso_config()), RMSprop(model.parameters())
    assert Fsdp2Engine.why_not_compact(engine, AdamW(model.parameters())) == ""  # type: ignore[arg-type]
    reason = Fsdp2Engine.why_not_compact(engine, base)  # type: ignore[arg-type]
    assert reason.endswith("RMSprop can't be cut (Adam, AdamW, SGD of torch's can)")
    optimizer = wrap_optimizer(AdamW(model.parameters()), model, hesso_config(), STEPS)
    with pytest.raises(HessoError, match="`model` can't be cut while it trains: model"):
        in_shards.compact(model, optimizer)
