"""HessoTrainer under DeepSpeed's ZeRO-1, 2 and 3, with its real engine in two processes: what one process does."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hesso_hf import HessoConfig, HessoError, export_pruned
from hesso_hf.engines.checkpoint import FOLDER, SHARED_NAME, snapshots_in
from hesso_hf.engines.deepspeed import state as zero_state
from hesso_hf.engines.deepspeed.compaction import why_not_exchange
from hesso_hf.engines.deepspeed.engine import refuse_zero
from hesso_hf.engines.deepspeed.ranges import HeldRange, Master12, Place
from hesso_hf.engines.deepspeed.state import (
    check_trained,
    check_zero_state,
    load_healing,
    load_ranges,
    save_ranges,
    save_zero_state,
)
from hesso_hf.errors import CheckpointMismatchError
from hesso_hf.pruning.saliency import UnitSums
from hesso_hf.pruning.schedule import Schedule
from hesso_hf.pruning.weights.holdings import Holdings
from hesso_hf.structures.groups import KeptUnits
from hesso_hf.trainer.teacher import make_teacher
from tests.support.tiny import VOCAB, backward, process_for, tiny_llama, token_batches
from tests.support.training import hesso_config, trainer

if importlib.util.find_spec("deepspeed") is not None:
    from tests.support import zero_cpu
    from tests.support.zero_cpu import engine
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra `deepspeed` isn't installed"
)

RATIO: dict[str, Any] = {"target_sizes": None, "pruning_ratio": 0.3}
CRIC: dict[str, Any] = {"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2}
CRIC_RUN: dict[str, Any] = {"hesso": CRIC, "steps": 20, "save_strategy": "steps", "save_steps": 3}
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
NAN = {"nan_at": 5, "lr_scheduler_type": "constant"}
STOPPED = {"hesso": CRIC, "steps": 20, "stop_at": 4, "save": False}  # with the weights on trial
WATCHED: dict[str, Any] = {"on_collapse": "pause", "collapse_threshold": 1e9}  # all processes see one loss
TAUGHT: dict[str, Any] = {"hesso": {"distillation_alpha": 0.75} | WATCHED}
TAUGHT_RUN: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5} | TAUGHT
PAUSED: dict[str, Any] = {
    "steps": 30, "save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-3,
    "hesso": {"warmup_steps": 4, "pruning_steps": 6, "on_collapse": "pause", "collapse_threshold": 0.03},
}  # fmt: skip
RAGGED: dict[str, Any] = {"chunk": 3 * VOCAB} | TAUGHT
LONG: dict[str, Any] = {"steps": 200, "hesso": {"warmup_steps": 20, "pruning_steps": 100, "pruning_periods": 5}}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 12}
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
BEST: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-3} | EVALUATED
TIED: dict[str, Any] = {"kind": "gemma2"} | SAVED
CENTRED: dict[str, Any] = {"kind": "phi"} | SAVED  # its norms subtract the mean
EXPERTS: dict[str, Any] = {"kind": "mixtral"} | BEST  # are stored under other names than the model has
ROUTED: dict[str, Any] = {
    "kind": "mixtral",
    "hesso": {"structures": ["experts"], "target_sizes": {"num_experts": 4}},
} | SAVED
DEEP: dict[str, Any] = {"hesso": {"structures": ["layers"], "target_sizes": {"num_hidden_layers": 1}}} | SAVED
UNEVEN: dict[str, Any] = {"hesso": RATIO | {"layer_widths": "per_layer"}} | SAVED
HEALED: dict[str, Any] = {"healing": "auto"}  # and units scored by reconstruction
TURNED: dict[str, Any] = {"stream_basis": "principal"}
LADDER: dict[str, Any] = {"hesso": RATIO | TURNED | HEALED | {"export_at": [0.15], "ladder_recovery": 1}}
REPLAYED: dict[str, Any] = {"hesso": LADDER["hesso"] | {"replay_share": 0.5}, "window": 10}
CUT: dict[str, Any] = {"steps": 14, "save_strategy": "steps", "save_steps": 11}  # all units are gone after step 10
SHRUNK: dict[str, Any] = {"hesso": RATIO | TURNED | HEALED | {"compact": "end"}} | CUT
HALFWAY: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}  # step 6 is in the second of two periods
GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}
ADAMW = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto") | {"torch_adam": True}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


WARMUP: dict[str, Any] = {
    "type": "WarmupLR",
    "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
}


def smaller(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run that goes on with the smaller model."""
    return {"hesso": run.get("hesso", {}) | {"compact": "end"}} | CUT | {k: v for k, v in run.items() if k != "hesso"}


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the runs in two processes; the letters before the dash name the run in one process that they equal."""
    offload, auto = {"offload_param": {"device": "cpu"}}, {"stage3_param_persistence_threshold": "auto"}
    named = TAUGHT["hesso"] | {"distill_from": str(folder / "dense")}
    return {
        "plain-1": {"deepspeed": engine(1)} | SAVED,
        "plain-2": {"deepspeed": engine(2)} | HALFWAY,
        "plain-3": {"deepspeed": engine(3)} | HALFWAY,
        "ladder-2": {"deepspeed": engine(2)} | HALFWAY | LADDER,
        "replayed-3": {"deepspeed": engine(3)} | HALFWAY | REPLAYED,
        "plain-loaded": {"deepspeed": engine(3), "pretrained": str(folder / "dense")},
        "ratio-2": {"hesso": RATIO, "deepspeed": engine(2, zero=OFFLOAD)} | ACCUMULATED,
        "ratio-3": {"hesso": RATIO, "deepspeed": engine(3, zero=OFFLOAD | {"sub_group_size": 3000})}
        | ACCUMULATED
        | HALFWAY,
        "nan-2": {"deepspeed": engine(2)} | NAN,
        "nan-3": {"deepspeed": engine(3)} | NAN,
        "frozen-2": {"frozen": True, "deepspeed": engine(2)} | SAVED,
        "frozen-3": {"frozen": True, "deepspeed": engine(3)} | SAVED,
        "cric-2": {"deepspeed": engine(2)} | CRIC_RUN,
        "cric-3": {"deepspeed": engine(3)} | CRIC_RUN,
        "stopped-2": {"deepspeed": engine(2)} | STOPPED,
        "stopped-3": {"deepspeed": engine(3)} | STOPPED,
        "taught-2": {"deepspeed": engine(2)} | TAUGHT,
        "taught-3": {"deepspeed": engine(3)} | TAUGHT_RUN,
        "taught-offloaded": {"deepspeed": engine(3, zero=OFFLOAD | offload)} | TAUGHT,
        "taught-loaded": {"deepspeed": engine(3, zero=auto), "pretrained": str(folder / "dense"), "hesso": named},
        "ragged-2": {"deepspeed": engine(2)} | RAGGED | ACCUMULATED,
        "ragged-3": {"deepspeed": engine(3)} | RAGGED | ACCUMULATED,
        "paused-2": {"deepspeed": engine(2)} | PAUSED,
        "paused-3": {"deepspeed": engine(3)} | PAUSED,
        "long-2": {"deepspeed": engine(2)} | LONG,
        "long-3": {"deepspeed": engine(3)} | LONG,
        "best-2": {"deepspeed": engine(2)} | BEST,
        "best-3": {"deepspeed": engine(3)} | BEST,
        "tied-2": {"deepspeed": engine(2)} | TIED,
        "tied-3": {"deepspeed": engine(3)} | TIED,
        "centred-2": {"deepspeed": engine(2)} | CENTRED,
        "centred-3": {"deepspeed": engine(3)} | CENTRED,
        "experts-2": {"deepspeed": engine(2)} | EXPERTS,
        "experts-3": {"deepspeed": engine(3, zero=GATHERED)} | EXPERTS,
        "routed-3": {"deepspeed": engine(3)} | ROUTED,
        "deep-2": {"deepspeed": engine(2)} | DEEP,
        "uneven-3": {"deepspeed": engine(3)} | UNEVEN,
        "shrunk-1": {"deepspeed": engine(1)} | SHRUNK,
        "shrunk-2": {"deepspeed": engine(2)} | SHRUNK,
        "shrunk-3": {"deepspeed": engine(3)} | SHRUNK,
        "plaincut-loaded": {"deepspeed": engine(3), "pretrained": str(folder / "dense")} | smaller({}),
        "shrunk-adamw": {"deepspeed": engine(2, optimizer={"type": "AdamW", "params": ADAMW}, scheduler=WARMUP)}
        | SHRUNK,
        "shrunk-offloaded": {"deepspeed": engine(3, zero=OFFLOAD | {"sub_group_size": 3000})} | SHRUNK | ACCUMULATED,
        "masked-3": {"deepspeed": engine(3), "full": True} | SHRUNK,
        "deepcut-2": {"deepspeed": engine(2)} | smaller(DEEP),
        "tiedcut-3": {"deepspeed": engine(3)} | smaller(TIED),
        "centredcut-3": {"deepspeed": engine(3)} | smaller(CENTRED),
        "expertscut-2": {"deepspeed": engine(2)} | smaller(EXPERTS),
        "routedcut-3": {"deepspeed": engine(3)} | smaller(ROUTED),
        "frozencut-3": {"deepspeed": engine(3), "frozen": True} | smaller({}),
        "replayedcut-3": {"deepspeed": engine(3)} | smaller(REPLAYED),
        "bfloat16cut-2": {"deepspeed": engine(2), "bf16": True} | smaller(NAN),
        "bfloat16cut-3": {"deepspeed": engine(3), "bf16": True} | smaller(NAN),
        "adamw-2": {"deepspeed": engine(2, optimizer={"type": "AdamW", "params": ADAMW})},
        "bfloat16-1": {"deepspeed": engine(1), "bf16": True} | NAN | BEST,
        "bfloat16-3": {"deepspeed": engine(3), "bf16": True} | NAN | BEST,
    }


ALONE = {
    "plain": {}, "ratio": {"hesso": RATIO}, "nan": NAN, "frozen": {"frozen": True}, "stopped": STOPPED,
    "cric": {"hesso": CRIC, "steps": 20}, "taught": TAUGHT, "replayed": REPLAYED, "ladder": LADDER,
    "ragged": RAGGED, "long": LONG, "best": BEST, "tied": TIED, "centred": CENTRED,
    "experts": EXPERTS, "paused": PAUSED, "routed": ROUTED, "deep": DEEP, "uneven": UNEVEN, "shrunk": SHRUNK,
    "masked": {"hesso": RATIO | TURNED | HEALED} | CUT, "plaincut": smaller({}), "deepcut": smaller(DEEP),
    "tiedcut": smaller(TIED), "centredcut": smaller(CENTRED), "routedcut": smaller(ROUTED),
    "expertscut": smaller(EXPERTS), "frozencut": smaller({"frozen": True}), "replayedcut": smaller(REPLAYED),
}  # fmt: skip
NAMES = ["plain-1", "plain-2", "plain-3", "replayed-3", "plain-loaded", "ratio-2", "ratio-3", "nan-2", "nan-3",
         "frozen-2", "frozen-3", "cric-2", "cric-3", "stopped-2", "stopped-3", "taught-2", "taught-3",
         "taught-offloaded", "taught-loaded", "ragged-2", "ragged-3", "long-2", "long-3", "best-2", "best-3",
         "tied-2", "tied-3", "centred-2", "centred-3", "experts-2", "experts-3", "paused-2", "paused-3",
         "routed-3", "deep-2", "uneven-3", "ladder-2", "shrunk-1", "shrunk-2", "shrunk-3", "plaincut-loaded",
         "shrunk-offloaded",
         "deepcut-2", "tiedcut-3", "centredcut-3", "expertscut-2", "routedcut-3", "frozencut-3",
         "replayedcut-3", "masked-3"]  # fmt: skip


RESUMED = [
    ("cric-2", 3), ("cric-2", 9), ("cric-3", 3), ("cric-3", 9), ("taught-3", 5), ("paused-3", 10), ("shrunk-2", 11),
    ("shrunk-3", 11), ("plaincut-loaded", 11), ("shrunk-adamw", 11), ("shrunk-offloaded", 11), ("deepcut-2", 12),
    ("frozencut-3", 11), ("replayedcut-3", 11), ("bfloat16cut-3", 11),
]  # fmt: skip


UNIVERSAL: dict[str, Any] = {"checkpoint": {"load_universal": True}}
FEWER = {
    "plain-2": 6, "plain-3": 6, "ratio-3": 6, "best-2": 6, "best-3": 6, "cric-2": 6,
    "cric-3": 6, "paused-2": 5, "paused-3": 5, "shrunk-2": 11, "shrunk-3": 11,
}  # fmt: skip  # go on in one process, from a step
MORE = {"plain-2": 6, "plain-3": 6, "cric-2": 6, "cric-3": 6, "paused-2": 5}  # are begun in one and go on in two


def moved(folder: Path, name: str, begun: Path, step: int, processes: int) -> tuple[str, dict[str, Any]]:
    """Return the job that goes on with a run on another number of processes."""
    options = jobs(folder)[name] | {"folder": str(folder / f"{name}-on-{processes}"), "processes": processes}
    config = options["deepspeed"] | UNIVERSAL
    if "gradient_accumulation_steps" in options:
        options["gradient_accumulation_steps"] = 4 // processes
    return "job", options | {"deepspeed": config, "resume": str(begun / "out" / f"checkpoint-{step}")}


def make_universal(begun: Path, step: int) -> None:
    """Run DeepSpeed's tool as the error says."""
    tag = begun / "out" / f"checkpoint-{step}" / f"global_step{step}"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(tag), "--output_folder", f"{tag}_universal"]
    environment = {**os.environ, **zero_cpu.ENVIRONMENT}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is run: in one process, in two, and what goes on in one."""
    folder = tmp_path_factory.mktemp("zero")
    tiny_llama(seed=5).save_pretrained(folder / "dense")
    alone = [("job", {"folder": str(folder / n), "processes": 1, **options}) for n, options in ALONE.items()]
    alone += [("job", jobs(folder)[name] | {"folder": str(folder / f"{name}-begun"), "processes": 1}) for name in MORE]
    run_jobs(folder / "one", alone, 1)
    for name, step in MORE.items():
        make_universal(folder / f"{name}-begun", step)
    found = [("job", {"folder": str(folder / name), **options}) for name, options in jobs(folder).items()]
    for name, checkpoint in RESUMED:
        source = folder / name / "out" / f"checkpoint-{checkpoint}"
        options = jobs(folder)[name] | {"resume": str(source)}
        found.append(("job", {"folder": str(folder / f"{name}-from-{checkpoint}"), **options}))
    run_jobs(
        folder / "two",
        found + [moved(folder, name, folder / f"{name}-begun", step, 2) for name, step in MORE.items()],
        2,
    )
    for name, step in FEWER.items():
        make_universal(folder / name, step)
    run_jobs(folder / "fewer", [moved(folder, name, folder / name, step, 1) for name, step in FEWER.items()], 1)
    return folder


def run_jobs(where: Path, found: list[tuple[str, dict[str, Any]]], processes: int) -> None:
    done = zero_cpu.launch(where, found, processes)
    assert done.returncode == 0, done.stderr[-4000:]


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for key in ("kept", "target", "cric", "step", "pauses", "fingerprint", "basis"):
        assert found[key] == expected[key], key
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() <= tolerance * weight.abs().max(), name
    assert len(found["norms"]) == len(found["losses"])


BASIC = ("ladder-2", "replayed-3")  # what the default tests run of all this
SMALLER = ("shrunk-2", "shrunk-offloaded")


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ZeRO-2 and ZeRO-3 in two processes, whole and from a checkpoint of the second period, and one process."""
    folder = tmp_path_factory.mktemp("basic")
    alone = {name: ALONE[name] for name in (name.partition("-")[0] for name in (*BASIC, *SMALLER))}
    run_jobs(folder / "one", [("job", {"folder": str(folder / n), "processes": 1, **alone[n]}) for n in alone], 1)
    found = [
        ("job", jobs(folder)[name] | {"folder": str(folder / name), "spoilt": name in BASIC})
        for name in (*BASIC, *SMALLER)
    ]
    for name in (*BASIC, SMALLER[0]):
        source = str(folder / name / "out" / f"checkpoint-{6 if name in BASIC else 11}")
        again = {"folder": str(folder / f"{name}-again"), "resume": source, "save": False, "save_strategy": "no"}
        found.append(("job", jobs(folder)[name] | again))
    run_jobs(folder / "two", found, 2)
    return folder


@needs_deepspeed
@pytest.mark.parametrize("name", BASIC)
def test_zero_trains_goes_on_from_a_checkpoint_and_exports(name: str, basic: Path, tmp_path: Path) -> None:
    assert result(basic / name)["basis"]["tokens"] >= 512
    halfway = torch.load(basic / name / "out" / "checkpoint-6" / FOLDER / SHARED_NAME, weights_only=True)
    assert halfway["healing"], "nothing is healed in the second period"
    assert_equal_one(name, basic)
    for rank in range(2):
        assert_same(result(basic / f"{name}-again", rank), result(basic / name, rank), 0.0)
    assert_small_model_is_the_one_of_one_process(name, basic)
    assert_checkpoint_is_exported_alike(name, basic, tmp_path)
    ours, theirs = (basic / run / "out" / "rung-0.15" for run in (name, name.partition("-")[0]))
    found, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (ours, theirs))
    for (key, mine), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max(), key


@needs_deepspeed
@pytest.mark.parametrize("name", BASIC)
def test_what_zero_trained_is_kept_where_the_small_model_is_another(name: str, basic: Path, tmp_path: Path) -> None:
    for rank in range(2):
        assert f"is saved in {basic / name / 'spoilt-dense'}" in result(basic / name, rank)["said"]
    assert not (basic / name / "spoilt").exists()
    export_pruned(basic / name / "spoilt-dense", tmp_path / "again")
    again, small = (load_file(path / "model.safetensors") for path in (tmp_path / "again", basic / name / "small"))
    assert again.keys() == small.keys()
    assert max(float((again[key] - small[key]).abs().max()) for key in small) < 1e-5


@needs_deepspeed
@pytest.mark.parametrize("name", BASIC)
def test_memory_that_runs_out_on_one_process_at_the_export_costs_no_run(name: str, basic: Path, tmp_path: Path) -> None:
    for rank in range(2):
        lost = result(basic / name, rank)["lost"]
        for where in ("together", "cut"):
            assert f"is saved in {basic / name / where}-dense" in lost[where]
            assert "memory ran out while the smaller model was made" in lost[where]
        assert (lost["streamed"], lost["filled"]) == ("", "")  # the CPU has computed the logits
    export_pruned(basic / name / "together-dense", tmp_path / "again")
    files = tmp_path / "again", basic / name / "small", basic / name / "filled"
    again, small, other = (load_file(path / "model.safetensors") for path in files)
    assert max(float((again[key] - small[key]).abs().max()) for key in small) < 1e-5
    assert all(torch.equal(other[key], small[key]) for key in small)


@needs_deepspeed
@pytest.mark.parametrize("name", SMALLER)
def test_zero_goes_on_with_the_smaller_model(name: str, basic: Path, tmp_path: Path) -> None:
    assert_equal_one(name, basic)
    whole, bucket = result(basic / "ladder-2"), int(5e8)  # numbers that ZeRO-3 keeps room for, gradients on their way
    for rank in range(2):
        found = result(basic / name, rank)
        assert found["compacted"]
        assert not whole["compacted"]
        assert sum(weight.numel() for weight in found["weights"].values()) == found["target"]["parameters_after"]
        room = 0.8 * whole["held"] if name == SMALLER[0] else 1.01 * bucket
        assert found["held"] < room, "something of the larger model is left"
        if name == SMALLER[0]:
            assert_same(result(basic / f"{name}-again", rank), found, 0.0)
    assert_small_model_is_the_one_of_one_process(name, basic)
    if name == SMALLER[0]:
        assert_checkpoint_is_exported_alike(name, basic, tmp_path)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_under_zero_equal_one(name: str, runs: Path) -> None:
    assert_equal_one(name, runs)


def assert_equal_one(name: str, runs: Path) -> None:
    expected = result(runs / name.partition("-")[0])
    for rank in range(2):
        found = result(runs / name, rank)
        assert_same(found, expected, 1e-5)
        if not name.startswith("nan"):
            assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert found["divergences"] == pytest.approx(expected["divergences"], abs=1e-5)
        for key in ("level", "recent") if expected["watch"] else ():
            assert found["watch"][key] == pytest.approx(expected["watch"][key], abs=1e-5)
    assert max(expected["norms"]) > 0 or name.startswith("stopped"), "nothing shrank"


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "plain-1",
        "plain-2",
        "plain-3",
        "plain-loaded",
        "frozen-3",
        "cric-3",
        "tied-2",
        "tied-3",
        "centred-3",
        "experts-3",
    ],
)
def test_the_small_model_is_the_one_of_one_process(name: str, runs: Path) -> None:
    assert_small_model_is_the_one_of_one_process(name, runs)


def assert_small_model_is_the_one_of_one_process(name: str, runs: Path) -> None:
    small = AutoModelForCausalLM.from_pretrained(runs / name / "small")
    expected = AutoModelForCausalLM.from_pretrained(runs / name.partition("-")[0] / "small")
    ids = torch.arange(3, 33).view(2, 15)
    logits = expected(input_ids=ids).logits
    assert (small(input_ids=ids).logits - logits).abs().max() <= 1e-4 * logits.abs().max()
    names = [sorted(path.name for path in (runs / n / "small").iterdir()) for n in (name, name.partition("-")[0])]
    assert names[0] == names[1]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpoint"), RESUMED)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(name: str, checkpoint: int, runs: Path) -> None:
    for rank in range(2):
        assert_same(result(runs / f"{name}-from-{checkpoint}", rank), result(runs / name, rank), 0.0)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_trains_masters_and_the_small_model_is_made_from_them(stage: int, runs: Path) -> None:
    found = result(runs / f"bfloat16-{stage}")
    small = AutoModelForCausalLM.from_pretrained(runs / f"bfloat16-{stage}" / "small")
    assert small.dtype == torch.bfloat16
    assert found["step"] == 11  # one was skipped
    masters = found["weights"]["model.layers.0.mlp.up_proj.weight"]
    units = KeptUnits.from_dict(found["kept"]).kept
    expected = masters[list(units["mlp_channels"][0])][:, list(units["embedding_channels"][0])]
    assert not torch.equal(expected, expected.bfloat16().float()), "the masters are as coarse as what is stored"
    assert torch.equal(small.model.layers[0].mlp.up_proj.weight, expected.bfloat16())


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["best-2", "best-3", "experts-2", "experts-3"])
def test_the_best_model_is_chosen_among_pruned_ones(name: str, runs: Path) -> None:
    found = result(runs / name)
    best, losses = Path(found["best"]), found["evaluations"]
    assert min(losses, key=losses.__getitem__) < 7  # a dense step had the lowest loss of all
    pruned = {step: loss for step, loss in losses.items() if step >= 7}  # in which pruning ended
    assert best.name == f"checkpoint-{min(pruned, key=pruned.__getitem__)}"
    assert losses[int(best.name.rpartition("-")[2])] < losses[12], "the last one is the best, so nothing was loaded"
    for rank in range(2):
        assert result(runs / name, rank)["evaluated"] == pytest.approx(min(pruned.values()), rel=1e-5)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "plain-1",
        "ratio-3",
        "frozen-2",
        "frozen-3",
        "bfloat16-1",
        "bfloat16-3",
        "best-2",
        "best-3",
        "cric-2",
        "cric-3",
        "tied-2",
        "tied-3",
        "centred-2",
        "experts-2",
        "experts-3",
    ],
)
def test_a_checkpoint_is_exported_on_one_process_as_the_run_itself_does(name: str, runs: Path, tmp_path: Path) -> None:
    assert_checkpoint_is_exported_alike(name, runs, tmp_path)


def assert_checkpoint_is_exported_alike(name: str, runs: Path, tmp_path: Path) -> None:
    source = result(runs / name)["best"] or max((runs / name / "out").glob("checkpoint-*"), key=_step)
    with pytest.raises(HessoError, match="--trust-pickles"):
        export_pruned(source, tmp_path)
    export_pruned(source, tmp_path, trust_pickles=True)
    folders = (tmp_path, runs / name / "small")
    small, expected = (AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True) for f in folders)
    assert small.dtype == expected.dtype
    weights = dict(expected.named_parameters())
    for parameter_name, weight in small.named_parameters():
        assert torch.equal(weight, weights.pop(parameter_name)), parameter_name
    assert not weights


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


@needs_deepspeed
@pytest.mark.slow
def test_the_teacher_is_divided_under_zero_3(runs: Path) -> None:
    whole = sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert result(runs / "taught-2")["teacher"] == whole
    for name in ("taught-3", "taught-offloaded"):
        assert result(runs / name)["teacher"] < whole / 10  # but for those too small to be divided


@needs_deepspeed
@pytest.mark.slow
def test_the_runs_that_others_are_compared_with_do_what_they_are_there_for(runs: Path) -> None:
    assert result(runs / "taught")["losses"] != result(runs / "plain")["losses"], "no teacher had a say"
    assert result(runs / "taught")["watch"]["level"]
    assert len(result(runs / "taught")["divergences"]) == 12
    assert result(runs / "paused")["pauses"]
    assert result(runs / "long")["step"] == 200


@needs_deepspeed
@pytest.mark.slow
def test_an_optimizer_of_deepspeeds_config_is_pruned_around_as_well(runs: Path) -> None:
    found, expected = result(runs / "adamw-2"), result(runs / "plain")
    assert found["step"] == 12
    assert [len(layer) for layer in KeptUnits.from_dict(found["kept"]).kept["mlp_channels"]] == [28, 28]
    assert found["target"] == expected["target"]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [*((name, 1) for name in FEWER), *((name, 2) for name in MORE)])
def test_a_run_goes_on_with_another_number_of_processes(name: str, processes: int, runs: Path) -> None:
    step = FEWER[name] if processes == 1 else MORE[name]
    begun = runs / (name if processes == 1 else f"{name}-begun")
    state = torch.load(begun / "out" / f"checkpoint-{step}" / FOLDER / SHARED_NAME, weights_only=True)
    assert state["step"] == step
    if name.startswith(("cric", "paused")):
        assert list(snapshots_in(state)), "there is no snapshot to put together"
    elif not name.startswith("shrunk"):
        assert any(bool(redundant.any()) for redundant in state["redundant"].values()), "nothing is on its way to zero"
    expected = result(runs / name.partition("-")[0])
    for rank in range(processes):
        assert_same(result(runs / f"{name}-on-{processes}", rank), expected, 1e-5)


def written(folder: Path, *, processes: int = 2, stage: int = 2, universal: bool = False, **state: Any) -> Path:
    """Write what `check_zero_state` looks at."""
    (folder / FOLDER).mkdir()
    (folder / "latest").write_text("global_step3")
    if universal:
        (folder / "latest_universal").write_text("global_step3_universal")
    torch.save({"zero": {"processes": processes, "stage": stage}} | state, folder / FOLDER / SHARED_NAME)
    return folder


TOOL = r"`python -m deepspeed.checkpoint.ds_to_universal .*--input_folder .*global_step3 --output_folder .*_universal`"
SETTING = r'set `"checkpoint": {"load_universal": true}` in DeepSpeed\'s config, or resume on 2'


@pytest.mark.parametrize(
    ("found", "load_universal", "named"),
    [
        ({}, False, f"was written by 2 processes, this run has 1; run {TOOL} and {SETTING}"),
        ({"universal": True}, False, f"was written by 2 processes, this run has 1; {SETTING}"),
        ({}, True, rf"`checkpoint.load_universal` \(True\) .*{TOOL}, or leave the setting out to resume on 2"),
        ({"universal": True, "stage": 3}, True, "was written by ZeRO-3, this run is ZeRO-2"),
    ],
)  # fmt: skip
def test_another_number_of_processes_is_refused_with_what_to_do(
    found: Any, load_universal: bool, named: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointMismatchError, match=named):
        check_zero_state(written(tmp_path, **found), 2, load_universal)


@pytest.mark.parametrize(
    ("found", "load_universal"),
    [({"processes": 1}, False), ({"universal": True}, True), ({"processes": 1, "universal": True}, True)],
)
def test_what_deepspeed_can_read_is_taken(found: Any, load_universal: bool, tmp_path: Path) -> None:
    check_zero_state(written(tmp_path, **found), 2, load_universal)


def test_what_all_share_is_written_by_one_process_of_each_disk(tmp_path: Path) -> None:
    process = SimpleNamespace(state_dict=lambda: {"step": 3, "trial": None, "period_start": None})
    for name, writes in (("own", True), ("shared", False)):
        save_zero_state(SimpleNamespace(process=process), tmp_path / name, 2, writes)  # type: ignore[arg-type]
        assert (tmp_path / name / FOLDER / SHARED_NAME).exists() == writes


def test_a_checkpoint_of_another_engine_is_refused(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    torch.save({"step": 3}, tmp_path / FOLDER / SHARED_NAME)
    with pytest.raises(CheckpointMismatchError, match="another engine than DeepSpeed"):
        check_zero_state(tmp_path, 2)


def holdings_of(places: dict[str, Place], length: int) -> Any:
    """Return what one process of ZeRO's holds, in one flat vector."""
    return SimpleNamespace(places=lambda: places, vectors=lambda: [torch.zeros(length)])


def test_a_snapshot_is_put_together_from_the_ranges_of_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"a": torch.arange(1.0, 8.0), "b": torch.arange(10.0, 15.0)}  # 7 and 5 elements: 6 a process
    places = [{"a": Place(0, 0, 0, 6)}, {"a": Place(0, 0, 6, 1), "b": Place(0, 1, 0, 5)}]
    flat = torch.cat(list(whole.values())).split(6)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        state = [{"exp_avg": -flat[rank], "step": torch.tensor(3.0)}]
        snapshot = {"weights": [flat[rank]], "state": state, "options": [{"step": 3}], "random": {"of": rank}}
        save_ranges(tmp_path, {"trial": snapshot}, holdings_of(places[rank], 6))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(zero_state, "world_size", lambda: 3)
    found = load_ranges(tmp_path, 2, holdings_of({"b": Place(0, 0, 1, 4), "a": Place(0, 4, 3, 4)}, 9))["trial"]
    expected = torch.tensor([11.0, 12.0, 13.0, 14.0, 4.0, 5.0, 6.0, 7.0, 0.0])  # what isn't held stays zero
    assert torch.equal(found["weights"][0], expected)
    assert torch.equal(found["state"][0]["exp_avg"], -expected)
    assert found["state"][0]["step"] == 3
    assert (found["options"], found["random"]) == ([{"step": 3}], {"of": 1})
    with pytest.raises(CheckpointMismatchError, match="b: 2 elements of a CRIC snapshot are missing"):
        load_ranges(tmp_path, 2, holdings_of({"b": Place(0, 0, 3, 4)}, 9))


def test_what_heals_is_put_together_from_the_ranges_of_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added, weight = torch.arange(1.0, 13.0).view(3, 4), torch.nn.Parameter(torch.zeros(3, 4))

    def held(start: int, count: int) -> HeldRange:
        found = HeldRange(weight, start, count)
        monkeypatch.setattr(found, "weights", lambda: found.pieces(torch.zeros(count)))
        return found

    for rank, (start, count) in enumerate(((0, 7), (7, 5), (12, 0))):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        places = {"a": Place(0, 0, start, count)} if count else {}
        save_ranges(tmp_path, {}, holdings_of(places, 7), {"a": held(start, count).pieces_of(added)})
    monkeypatch.setattr(zero_state, "world_size", lambda: 2)
    for start, count in ((0, 6), (6, 6), (3, 0)):
        mine = held(start, count)
        found = load_healing(tmp_path, 3, {"a": mine})["a"]
        assert [piece.tolist() for piece in found] == [piece.tolist() for piece in mine.pieces_of(added)]
    (tmp_path / "ranges-00001.pt").rename(tmp_path / "lost")
    torch.save({"snapshots": {}, "places": {}, "healing": {}}, tmp_path / "ranges-00001.pt")
    with pytest.raises(CheckpointMismatchError, match="a: 5 elements of what heals it are missing"):
        load_healing(tmp_path, 3, {"a": held(6, 6)})


def test_frozen_weights_that_deepspeed_would_leave_out_are_named(tmp_path: Path) -> None:
    parameters = dict(tiny_llama().named_parameters())
    check_trained(parameters, tmp_path)
    parameters["model.norm.weight"].requires_grad_(False)
    with pytest.raises(
        CheckpointMismatchError, match=r"frozen parameters such as model.norm.weight .*resume on as many"
    ):
        check_trained(parameters, tmp_path)


@pytest.mark.parametrize(
    ("zero", "named"),
    [
        ({"offload_param": {"device": "cpu"}}, r"`offload_param` \({'device': 'cpu'}\)"),
        ({"zero_quantized_weights": True}, r"`zero_quantized_weights` \(True\)"),
        ({"zero_hpz_partition_size": 8}, r"`zero_hpz_partition_size` \(8\)"),
        ({"offload_param": {"device": "none"}, "offload_optimizer": {"device": "cpu"}}, None),
        ({"offload_param": None, "zero_hpz_partition_size": 1}, None),
    ],
)
def test_what_a_smaller_model_can_not_be_exchanged_under_is_named(zero: dict[str, Any], named: str | None) -> None:
    reason = why_not_exchange(None, {"zero_optimization": {"stage": 3} | zero}, compiles=False)
    assert re.search(named, reason) if named else not reason
    assert "`torch_compile`" in why_not_exchange(None, {"zero_optimization": {}}, compiles=True)
    weight = [torch.nn.Parameter(torch.ones(2))]
    assert "RMSprop" in why_not_exchange(torch.optim.RMSprop(weight), {"zero_optimization": {}}, compiles=False)
    assert not why_not_exchange(torch.optim.SGD(weight), {"zero_optimization": {}}, compiles=False)


@pytest.mark.parametrize(
    ("engine_config", "hesso", "named"),
    [
        ({}, {}, r"`zero_optimization.stage` \(0\)"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "offload_param.device"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, {}, "round_robin_gradients"),
        ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, {}, "checkpoint.load_universal"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, {}, "mics_shard_size"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, {}, "zenflow"),
        ({"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": True}}, {}, "torch_autocast"),
        ({"zero_optimization": {"stage": 2}}, {"cric": True, "cric_mode": "probe"}, r"`cric_mode` \('probe'\)"),
        ({"zero_optimization": {"stage": 2}}, {"prune_vocabulary": True}, "`prune_vocabulary`"),
    ],
)  # fmt: skip
def test_what_does_not_work_is_refused_by_name(engine_config: Any, hesso: Any, named: str) -> None:
    with pytest.raises(HessoError, match=named):
        refuse_zero(engine_config, HessoConfig(pruning_ratio=0.3, **hesso))


class _Flat(Holdings):
    """One process' ZeRO-2 with the optimizer on the host, made by hand: masters and scaled gradients in one vector."""

    def __init__(self, model: PreTrainedModel, loss_scale: float) -> None:
        super().__init__(model.parameters())
        vector = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        vector.grad = loss_scale * torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        self._zero = SimpleNamespace(loss_scale=loss_scale, cpu_offload=True, single_partition_of_fp32_groups=[vector])
        counts = [parameter.numel() for parameter in model.parameters()]
        starts = [sum(counts[:index]) for index in range(len(counts))]
        self._starts = dict(zip(map(id, model.parameters()), starts, strict=True))

    def held(self, name: str, parameter: torch.nn.Parameter) -> Master12:
        """Return where a parameter lies in the vector."""
        return Master12(self._zero, parameter, Place(0, self._starts[id(parameter)], 0, parameter.numel()))


def test_saliency_takes_the_loss_scale_out_of_the_gradients() -> None:
    model = tiny_llama()
    process = process_for(model, {"mlp_channels": 28, "embedding_channels": 48}, Schedule(2, 4, 2, 9))
    backward(model, *token_batches(1))
    sums = []
    for holdings in (Holdings, lambda _: _Flat(model, 1024.0)):
        process.bound.bind(dict(model.named_parameters()), holdings)
        sums.append(UnitSums.zeros(process.bound.groups, ("xg", "g2", "x2"), torch.device("cpu")))
        process.bound.accumulate_(sums[-1])
    for name, terms in sums[0].sums.items():
        for term, values in terms.items():
            torch.testing.assert_close(sums[1].sums[name][term], values, rtol=1e-5, atol=1e-9)


def test_deepspeed_is_not_imported_before_an_engine_is_made() -> None:
    code = "import sys, hesso_hf.trainer.trainer; assert 'deepspeed' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_model_that_was_divided_while_it_was_loaded_is_no_teacher_of_itself(tmp_path: Path) -> None:
    run = trainer(tmp_path, config=hesso_config(distillation_alpha=0.5))
    next(run.model.parameters()).ds_tensor = torch.zeros(3)
    with pytest.raises(HessoError, match=r"`distillation_alpha` \(0.5\): .* name it in `distill_from`"):
        make_teacher(None, run.model, None, run.hesso_engine, "`distillation_alpha` (0.5)")


def test_a_checkpoint_of_zero_needs_deepspeed_or_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else plain(name, *a))
    run = trainer(tmp_path / "out", save_strategy="steps", save_steps=12)
    run.train()
    run.save_model(str(tmp_path / "small"))
    source = tmp_path / "out" / "checkpoint-12"
    (source / "global_step12").mkdir()
    export_pruned(source, tmp_path / "exported")
    small, exported = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("small", "exported"))
    for ours, theirs in zip(small.parameters(), exported.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    (source / "model.safetensors").unlink()
    with pytest.raises(HessoError, match=r"pip install deepspeed`, or run `python zero_to_fp32.py"):
        export_pruned(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()
