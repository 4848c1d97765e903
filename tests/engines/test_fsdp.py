"""HessoTrainer under Accelerate's FSDP2, with real processes: same units, small model from shards, resume, kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from hesso_hf import HessoConfig, HessoTrainer, export_pruned
from hesso_hf.distributed.parts import local, named_parameters, plain_name, whole_of
from hesso_hf.engines.checkpoint import FOLDER
from hesso_hf.engines.fsdp import export as fsdp_export
from hesso_hf.errors import HessoError, VerificationError
from hesso_hf.export.checkpoint_state import last_checkpoint
from hesso_hf.hf_models.loading import load_model
from tests.support import fsdp_cpu, killing
from tests.support.forks import Forked
from tests.support.fsdp_cpu import Job
from tests.support.tiny import tiny_llama
from tests.support.training import ALONE, blocks, hesso_config, said_by_the_dense_model, trainer

LONG = 40  # steps: 27 of them after the last period
TURNED = 1e-4  # what weights may differ by where axes are computed from sums that differ in the last bits
LOADED_BY_ONE = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
RATIO = {
    "pruning_ratio": 0.3,
    "warmup_steps": 4,
    "pruning_steps": 9,
    "pruning_periods": 3,
    "calibration_examples": 4,
    **ALONE,
}
# in a basis of its own, scored by reconstruction, healed
HEALED = {name: value for name, value in RATIO.items() if name != "healing"} | {"stream_basis": "principal"}
# turned, and turned back, since no channel is to go
GIVEN_UP = RATIO | {"stream_basis": "auto", "target_sizes": {"hidden_size": 60}}


class Watch(TrainerCallback):
    """Notes the weights that training begins with, and the names of the matrices that are healed."""

    def __init__(self) -> None:
        self.begun: dict[str, torch.Tensor] = {}
        self.healed: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy what is there."""
        self.begun = {name: whole_of(p.detach()).clone() for name, p in named_parameters(kwargs["model"]).items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what is added in this period."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.healed |= optimizer.process.state.healing.keys()


def build(folder: str, steps: int, processes: int, hesso: dict[str, Any] | None = None, **changes: Any) -> HessoTrainer:
    """Build a trainer on a global batch of 4."""
    config = HessoConfig(**hesso) if hesso else hesso_config()
    options = {"adam_epsilon": 1e-4, "learning_rate": 2e-3, "max_grad_norm": 0.5}
    return trainer(
        Path(folder) / "out", config=config, max_steps=steps, per_device_train_batch_size=4 // processes,
        **(options | changes),
    )  # fmt: skip


def job(
    folder: str, steps: int, processes: int, resume: bool = False, stored: str | None = None, **options: Any
) -> None:
    """Train, save the small model, and leave weights and decisions of every process."""
    watch = Watch()
    if stored:
        options["model"] = load_model(stored, torch.float32)
        with safe_open(Path(stored) / "model.safetensors", framework="pt") as file:
            loaded = torch.equal(options["model"].lm_head.weight, file.get_tensor("lm_head.weight"))
        assert loaded == (processes == 1 or dist.get_rank() == 0), "which process has weights"
    run = build(folder, steps, processes, options={"eval_dataset": blocks(5, seed=9), "callbacks": [watch]}, **options)
    run.train(resume_from_checkpoint=resume or None)
    run.save_model(str(Path(folder) / "small"))
    weights = {n: p.detach() for n, p in run.accelerator.unwrap_model(run.model).named_parameters()}
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}
    torch.save(
        {
            "kept": run.hesso_optimizer.process.kept_units().to_dict(),
            "weights": whole,
            "kind": type(run.model).__name__,
            "target": run.hesso_plan.target.to_dict(),
            "basis": run.hesso_run.basis.to_dict() if run.hesso_run.basis else None,
            "healed": sorted(watch.healed),
            "begun": watch.begun,
        },
        Path(folder) / f"rank{run.args.process_index}.pt",
    )


CRIC = {
    "target_sizes": {"num_key_value_heads": 2, "intermediate_size": 28, "hidden_size": 48},
    "warmup_steps": 2, "pruning_steps": 5, "pruning_periods": 2, "saliency_batches": 2,
    "cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2,
    **ALONE, "healing": "auto", "stream_basis": "principal",
}  # fmt: skip
STEPS = 20


class OwnNumbers(TrainerCallback):
    """Lets each process draw random numbers of its own, as dropout does where data differ in shape."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seed, where the data's order is settled and no random state was loaded."""
        if state.global_step == 0:
            torch.manual_seed(50 + args.process_index)


class SaveAfter(TrainerCallback):
    """Writes checkpoints after certain steps."""

    def __init__(self, steps: Iterable[int]) -> None:
        self._steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, where it is one of the steps."""
        if state.global_step in self._steps:
            control.should_save = True


def cric_run(
    folder: str, processes: int, dropout: float = 0.0, saved: Iterable[int] = (), **changes: Any
) -> HessoTrainer:
    """Build a CRIC run in which processes draw random numbers of their own.

    Args:
        saved: steps after which it writes a checkpoint.
    """
    model = tiny_llama(seed=4, attention_dropout=dropout)
    callbacks = {"callbacks": [OwnNumbers(), SaveAfter(saved)]}
    return build(folder, STEPS, processes, model=model, hesso=CRIC, options=callbacks, **changes)


def state_of(run: HessoTrainer) -> dict[str, torch.Tensor]:
    """Return all that a process holds of weights and optimizer state, and the decision."""
    found: dict[str, torch.Tensor] = {}
    base = run.hesso_optimizer.base
    for name, parameter in named_parameters(run.accelerator.unwrap_model(run.model)).items():
        found[name] = local(parameter.detach()).clone()
        for key, value in base.state[parameter].items():
            found[f"{name} {key}"] = local(torch.as_tensor(value)).clone()
    return found | {f"scales {name}": scales for name, scales in run.hesso_optimizer.process.scales.items()}


def resumed_job(folder: str, processes: int, steps: list[int], dropout: float = 0.0) -> None:
    """Train without interruption, then again from some of the checkpoints, and compare bit for bit."""
    whole = cric_run(f"{folder}/whole", processes, dropout, saved=[*steps, 4, STEPS])
    whole.train()
    expected = state_of(whole)
    for step in steps:
        output = Path(f"{folder}/from-{step}/out")
        if whole.args.process_index == 0:
            shutil.copytree(f"{folder}/whole/out/checkpoint-{step}", output / f"checkpoint-{step}")
        dist.barrier()
        again = cric_run(f"{folder}/from-{step}", processes, dropout)
        again.train(resume_from_checkpoint=True)
        found = state_of(again)
        assert found.keys() == expected.keys()
        different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
        assert not different, (step, different)
    print("RESUMED", flush=True)


def one_job(folder: str, processes: int) -> None:
    """Go on from a checkpoint to the end, and save the small model."""
    run = cric_run(folder, processes)
    run.train(resume_from_checkpoint=True)
    run.save_model(f"{folder}/small")
    torch.save({"kind": type(run.model).__name__}, f"{folder}/rank{run.args.process_index}.pt")


def best_job(folder: str, processes: int) -> None:
    """Evaluate and save every fourth step, and go back to the best model at the end."""
    run = build(
        folder, 16, processes, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, options={"eval_dataset": said_by_the_dense_model()},
    )  # fmt: skip
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    found = {"best": run.state.best_model_checkpoint, "losses": losses, "loss": run.evaluate()["eval_loss"]}
    run.save_model(f"{folder}/small")
    torch.save(found, f"{folder}/rank{run.args.process_index}.pt")


def spoilt_job(folder: str, processes: int) -> None:
    """Save a small model that is cut wrongly, and one for which there is no memory; leave what is said of them."""
    run = build(folder, 16, processes, hesso=GIVEN_UP)
    run.train()
    plain = fsdp_export.cut_part

    def without_memory(tensor: Any, part: Any, cuts: Any) -> Any:
        if cuts:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(tensor, part, cuts)

    said = {}
    try:
        fsdp_export.cut_part = lambda tensor, part, cuts: plain(tensor, part, cuts) * (1.5 if cuts else 1.0)
        with pytest.raises(VerificationError) as caught:
            run.save_model(f"{folder}/small")
        said["small"], fsdp_export.cut_part = str(caught.value), without_memory
        with pytest.raises(HessoError, match="memory ran out") as lost:
            run.save_model(f"{folder}/large")
        said["large"] = str(lost.value)
    finally:
        fsdp_export.cut_part = plain
    torch.save(said, f"{folder}/rank{run.args.process_index}.pt")


def jobs(folder: Path) -> list[Job]:
    """Return what two processes do under FSDP2, one after the other."""
    short, healed = ({"steps": 16, "hesso": hesso} for hesso in (GIVEN_UP, HEALED))
    taught = {"steps": 16, "hesso": HEALED | {"distillation_alpha": 0.5}}
    return [
        Job(__name__, "job", folder / "two", {"steps": LONG, "hesso": HEALED}),
        Job(__name__, "job", folder / "compiled", healed | {"torch_compile": True, "torch_compile_backend": "eager"}),
        Job(__name__, "job", folder / "bf16", healed | {"bf16": True}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}),
        Job(__name__, "job", folder / "offloaded", short, {"FSDP_OFFLOAD_PARAMS": "true"}),
        Job(__name__, "job", folder / "loaded", taught | {"stored": str(folder / "stored")}, LOADED_BY_ONE),
        Job(__name__, "best_job", folder / "best"),
        Job(__name__, "spoilt_job", folder / "spoilt"),
        Job(__name__, "resumed_job", folder / "resumed", {"steps": [3, 11]}),  # in a CRIC cycle, in a period
        Job(__name__, "killed_job", folder / "not-killed", {"saves": False}),
        Job(__name__, "stopped_job", folder / "not-stopped", {"pause": 0.0}),
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that needs no processes of its own, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    tiny_llama(seed=4).save_pretrained(folder / "stored")
    done = fsdp_cpu.run_jobs(folder, jobs(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("RESUMED") == 2
    return folder


def assert_equal_one(folder: Path, alone: Path, kind: str, tolerance: float = 1e-5, **options: Any) -> None:
    """Compare two processes with one: sizes, units, weights within a tolerance of each tensor's largest."""
    alone.mkdir()
    job(str(alone), processes=1, **options)
    expected = torch.load(alone / "rank0.pt", weights_only=True)
    for rank in range(2):
        found = torch.load(folder / f"rank{rank}.pt", weights_only=True)
        assert found["kind"] == kind
        assert found["target"] == expected["target"]
        assert found["kept"] == expected["kept"]
        assert (found["basis"], found["healed"]) == (expected["basis"], expected["healed"])
        weights = {plain_name(name): weight for name, weight in found["weights"].items()}
        for name, weight in expected["weights"].items():
            assert (weights[name] - weight).abs().max() <= tolerance * weight.abs().max(), name
    measured = [
        json.loads((place / "small" / "pruning_report.json").read_text())["quality"]["eval_loss"]
        for place in (folder, alone)
    ]
    for when in ("before", "after"):
        assert abs(measured[0][when]["loss"] - measured[1][when]["loss"]) <= tolerance


def test_two_processes_under_fsdp_equal_one(two: Path, tmp_path: Path) -> None:
    assert_equal_one(two / "two", tmp_path / "one", "FSDPLlamaForCausalLM", TURNED, steps=LONG, hesso=HEALED)
    found = torch.load(two / "two" / "rank0.pt", weights_only=True)
    assert found["basis"] is not None
    assert {name.split(".")[-2] for name in found["healed"]} == {"down_proj", "o_proj"}
    small = AutoModelForCausalLM.from_pretrained(two / "two" / "small")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "small")
    ids = torch.arange(3, 33).view(2, 15)
    logits = expected(input_ids=ids).logits
    assert (small(input_ids=ids).logits - logits).abs().max() <= 1e-4 * logits.abs().max()
    assert sorted(path.name for path in (two / "two" / "small").iterdir()) == sorted(
        path.name for path in (tmp_path / "one" / "small").iterdir()
    )


@pytest.mark.parametrize(("name", "hesso", "tolerance"), [("compiled", HEALED, TURNED), ("offloaded", GIVEN_UP, 1e-5)])
def test_compiled_blocks_and_offloaded_parameters_are_pruned_alike(
    name: str, hesso: dict[str, Any], tolerance: float, two: Path, tmp_path: Path
) -> None:
    assert_equal_one(two / name, tmp_path / "one", "FSDPLlamaForCausalLM", tolerance, steps=16, hesso=hesso)
    begun, given = (
        torch.load(two / name / "rank1.pt", weights_only=True)["begun"],
        dict(tiny_llama().named_parameters()),
    )
    assert all(torch.equal(begun[name], weight) for name, weight in given.items()) == (hesso is GIVEN_UP)
    AutoModelForCausalLM.from_pretrained(two / name / "small")


def test_weights_that_one_process_loads_reach_the_others_and_the_teacher(two: Path, tmp_path: Path) -> None:
    options = {"steps": 16, "hesso": HEALED | {"distillation_alpha": 0.5}, "stored": str(two / "stored")}
    assert_equal_one(two / "loaded", tmp_path / "one", "FSDPLlamaForCausalLM", TURNED, **options)


def test_bfloat16_with_fp32_masters_and_checkpointed_activations(two: Path) -> None:
    found = torch.load(two / "bf16" / "rank0.pt", weights_only=True)
    assert all("_checkpoint_wrapped_module" in name for name in found["weights"] if ".layers." in name)
    assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}
    full = torch.load(two / "compiled" / "rank0.pt", weights_only=True)
    assert found["healed"]
    assert set(found["healed"]) <= set(full["healed"])  # where rounding leaves little to gain, a matrix stays as it is
    assert found["basis"]["energy"] == pytest.approx(full["basis"]["energy"], abs=0.01)
    report = json.loads((two / "bf16" / "small" / "pruning_report.json").read_text())
    assert report["verification"]["fold_error"] <= 1e-5
    AutoModelForCausalLM.from_pretrained(two / "bf16" / "small")


@pytest.mark.parametrize("name", ["small", "large"])
def test_what_was_trained_is_kept_where_the_small_model_is_another_or_has_no_room(
    name: str, two: Path, tmp_path: Path
) -> None:
    dense = two / "spoilt" / f"{name}-dense"
    for rank in range(2):
        assert f"is saved in {dense}" in torch.load(two / "spoilt" / f"rank{rank}.pt", weights_only=True)[name]
    assert not (two / "spoilt" / name).exists()
    export_pruned(dense, tmp_path / "again")
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path / "again", two / "offloaded" / "small")]
    assert max(float((files[0][name] - files[1][name]).abs().max()) for name in files[1]) < 1e-5


def test_the_best_model_is_one_of_the_pruned_ones(two: Path) -> None:
    for rank in range(2):
        found = torch.load(two / "best" / f"rank{rank}.pt", weights_only=True)
        best, pruned = int(found["best"].rpartition("-")[2]), {n: x for n, x in found["losses"].items() if n >= 7}
        assert found["losses"][best] == min(pruned.values())
        assert found["losses"][4] < found["losses"][best], "none that isn't pruned would be better"
        assert best < 16, "the last one is the best one: nothing was loaded"
        assert found["loss"] == pytest.approx(found["losses"][best], rel=1e-5)
    small = AutoModelForCausalLM.from_pretrained(two / "best" / "small")
    assert small.config.intermediate_size == 28


def test_interrupted_equals_uninterrupted_under_ddp(tmp_path: Path) -> None:
    done = fsdp_cpu.run(tmp_path / "two", __name__, "resumed_job", sharded=False, steps=[3], dropout=0.2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("RESUMED") == 2


def test_interrupted_equals_uninterrupted_and_other_numbers_of_processes_go_on(two: Path, tmp_path: Path) -> None:
    checkpoint = two / "resumed" / "whole" / "out" / "checkpoint-4"
    assert last_checkpoint(checkpoint.parent) == checkpoint.parent / f"checkpoint-{STEPS}"
    with safe_open(checkpoint.parent / "checkpoint-11" / FOLDER / "parts-00001.safetensors", framework="pt") as file:
        assert any(key.startswith("healing/") for key in file.keys()), "nothing was healed"  # noqa: SIM118
    (tmp_path / "one" / "out").mkdir(parents=True)
    shutil.copytree(checkpoint, tmp_path / "one" / "out" / "checkpoint-4")
    done = fsdp_cpu.run(tmp_path / "one", __name__, "one_job", processes=1)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "random-trial" not in done.stderr  # process 0 has its own
    alone = torch.load(tmp_path / "one" / "rank0.pt", weights_only=True)
    export_pruned(two / "resumed" / "whole" / "out" / f"checkpoint-{STEPS}", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "small")
    assert alone["kind"] == "FSDPLlamaForCausalLM"
    for (name, ours), theirs in zip(small.named_parameters(), exported.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def killed_job(folder: str, processes: int, saves: bool = True) -> None:
    """Train and save, from the last checkpoint where there is one, and leave what each process holds.

    Args:
        saves: whether a checkpoint is written after every step.
    """
    killing.arm()
    run = cric_run(folder, processes, dropout=0.2, saved=range(STEPS + 1) if saves else (), save_total_limit=3)
    run.train(resume_from_checkpoint=last_checkpoint(Path(folder) / "out") is not None or None)
    run.save_model(f"{folder}/small")
    torch.save(state_of(run), f"{folder}/final{run.args.process_index}.pt")


def check_kills(folder: Path, alone: Path, events: list[str], seed: int) -> None:
    """Kill a run again and again at events, let it end, and compare it with one that was left alone."""
    generator, fresh = random.Random(seed), 0
    job = Job(__name__, "killed_job", folder / "killed")

    def start(env: dict[str, str]) -> Forked:
        return fsdp_cpu.start_jobs(folder / "killed", [job], env=env)

    for event in events:
        rank = generator.randrange(2) if event.partition(":")[0] in killing.ON_ALL_RANKS else 0
        while not killing.run_and_kill(start, folder / "mark", event, rank):
            shutil.rmtree(folder / "killed" / "out")  # it ended before: begin anew, where it comes to that
            shutil.rmtree(folder / "killed" / "small")
            fresh += 1
            assert fresh < 4, f"{event} is never reached"
    done = fsdp_cpu.run(folder / "killed", __name__, "killed_job", saves=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        expected = torch.load(alone / f"final{rank}.pt", weights_only=True)
        found = torch.load(folder / "killed" / f"final{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]
    AutoModelForCausalLM.from_pretrained(folder / "killed" / "small")
    assert not list((folder / "killed").glob(".small*"))


def test_kill_9_while_the_pruning_state_is_written(two: Path, tmp_path: Path) -> None:
    check_kills(tmp_path, two / "not-killed", ["parts:4"], seed=4)  # on the way through a CRIC cycle


@pytest.mark.slow
def test_kill_9_at_many_random_events(two: Path, tmp_path: Path) -> None:
    generator = random.Random(5)
    kinds = [kind for kind in killing.EVENTS if kind != "small model"]
    events = [f"{kind}:{generator.randint(1, 4)}" for kind in 3 * kinds]  # a run goes on by at most three steps each
    generator.shuffle(events)
    check_kills(tmp_path, two / "not-killed", [*events[:18], "small model:1", "small model:1"], seed=5)


def test_one_process_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    done = fsdp_cpu.run(tmp_path / "run", __name__, "dying_job")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "process 1 ended with -9" in done.stderr


def dying_job(folder: str, processes: int) -> None:
    """Train; process 1 dies in step 5."""
    run = cric_run(folder, processes)
    plain = run.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        if run.state.global_step == 5 and run.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    run.training_step = training_step
    run.train()


def node_job(folder: str, processes: int) -> None:
    """Train on one of two nodes, and save the small model on the node's own disk."""
    run = build(folder, 16, processes, hesso=RATIO, save_on_each_node=True)
    run.train()
    run.save_model(f"{folder}/small")


@pytest.mark.slow
def test_every_node_saves_a_whole_model_of_its_own(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = []
    for rank in range(2):
        where = ["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        folder = tmp_path / f"node{rank}"
        line = fsdp_cpu.command(folder, [Job(__name__, "node_job", folder)], node=[*where, f"--master_port={port}"])
        env = {**os.environ, **fsdp_cpu.ENVIRONMENT}
        nodes.append(subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env))
    errors = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-4000:]
    names = [sorted(path.name for path in (tmp_path / f"node{rank}" / "small").iterdir()) for rank in range(2)]
    assert names[0] == names[1]
    assert {"config.json", "README.md", "pruning_report.json"} <= set(names[0])
    files = [(tmp_path / f"node{rank}" / "small" / "model.safetensors").read_bytes() for rank in range(2)]
    assert files[0] == files[1]
    for rank in range(2):
        AutoModelForCausalLM.from_pretrained(tmp_path / f"node{rank}" / "small")


def stopped_job(folder: str, processes: int, pause: float = 0.5) -> None:
    """Train slowly, with a checkpoint only when told to stop; or go on from it."""
    run = cric_run(folder, processes, enable_jit_checkpoint=True)
    plain = run.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not last:
            time.sleep(pause)
            (Path(folder) / f"step{run.args.process_index}").write_text(str(run.state.global_step))
        return plain(*args, **kwargs)

    run.training_step = training_step
    last = last_checkpoint(Path(folder) / "out")
    run.train(resume_from_checkpoint=str(last) if last else None)
    if run.state.global_step == STEPS:
        torch.save(state_of(run), f"{folder}/final{run.args.process_index}.pt")


@pytest.mark.parametrize("sharded", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fsdp", "ddp"])
def test_a_run_that_is_told_to_stop_saves_and_can_go_on(sharded: bool, two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    run = fsdp_cpu.start_jobs(folder, [Job(__name__, "stopped_job", folder)], sharded=sharded)
    while run.poll() is None and not (folder / "step1").exists():
        time.sleep(0.1)
    run.terminate()
    errors = run.completed().stderr
    saved = last_checkpoint(folder / "out")
    assert saved is not None, errors[-3000:]
    assert [path.name for path in (folder / "out").iterdir()] == [saved.name], "a second one takes as long again"
    assert int(saved.name.rpartition("-")[2]) < STEPS
    assert not (saved / "checkpoint-is-incomplete.txt").exists()
    alone = two / "not-stopped" if sharded else tmp_path / "alone"
    for where in (folder,) if sharded else (folder, alone):
        done = fsdp_cpu.run(where, __name__, "stopped_job", sharded=sharded, pause=0.0)
        assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        found, expected = (torch.load(w / f"final{rank}.pt", weights_only=True) for w in (folder, alone))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
