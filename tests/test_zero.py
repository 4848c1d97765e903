"""HessoTrainer under DeepSpeed's ZeRO-1, 2 and 3, with its real engine in two processes: what one process does."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, HessoError
from hesso_hf.errors import CheckpointMismatchError
from hesso_hf.groups import KeptUnits
from hesso_hf.shard_state import FOLDER, SHARED_NAME
from hesso_hf.zero_steps import check_zero_state, refuse_zero

if importlib.util.find_spec("deepspeed") is not None:
    import zero_cpu
    from zero_cpu import engine
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra `deepspeed` isn't installed"
)

RATIO: dict[str, Any] = {"target_sizes": None, "pruning_ratio": 0.3}
CRIC: dict[str, Any] = {"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2}
CRIC_RUN: dict[str, Any] = {"hesso": CRIC, "steps": 20, "save_strategy": "steps", "save_steps": 3}
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
NAN = {"nan_at": 5, "lr_scheduler_type": "constant"}
STOPPED = {"hesso": CRIC, "steps": 20, "stop_at": 4, "save": False}  # with the weights on trial
TAUGHT: dict[str, Any] = {"hesso": {"distillation_alpha": 0.75}}
ADAMW = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto") | {"torch_adam": True}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the runs in two processes; the letters before the dash name the run in one process that they equal."""
    return {
        "plain-1": {"deepspeed": engine(1)},
        "plain-2": {"deepspeed": engine(2)},
        "plain-3": {"deepspeed": engine(3)},
        "plain-loaded": {"deepspeed": engine(3), "pretrained": str(folder / "dense")},
        "ratio-2": {"hesso": RATIO, "deepspeed": engine(2, zero=OFFLOAD)} | ACCUMULATED,
        "ratio-3": {"hesso": RATIO, "deepspeed": engine(3, zero=OFFLOAD | {"sub_group_size": 3000})} | ACCUMULATED,
        "nan-2": {"deepspeed": engine(2)} | NAN,
        "nan-3": {"deepspeed": engine(3)} | NAN,
        "frozen-2": {"frozen": True, "deepspeed": engine(2)},
        "frozen-3": {"frozen": True, "deepspeed": engine(3)},
        "cric-2": {"deepspeed": engine(2)} | CRIC_RUN,
        "cric-3": {"deepspeed": engine(3)} | CRIC_RUN,
        "stopped-2": {"deepspeed": engine(2)} | STOPPED,
        "stopped-3": {"deepspeed": engine(3)} | STOPPED,
        "taught-2": {"deepspeed": engine(2)} | TAUGHT,
        "taught-3": {"deepspeed": engine(3)} | TAUGHT,
        "adamw-2": {"deepspeed": engine(2, optimizer={"type": "AdamW", "params": ADAMW})},
        "bfloat16-1": {"deepspeed": engine(1), "bf16": True} | NAN,
        "bfloat16-3": {"deepspeed": engine(3), "bf16": True} | NAN,
    }


ALONE = {
    "plain": {}, "ratio": {"hesso": RATIO}, "nan": NAN, "frozen": {"frozen": True}, "stopped": STOPPED,
    "cric": {"hesso": CRIC, "steps": 20}, "taught": TAUGHT,
}  # fmt: skip
NAMES = ["plain-1", "plain-2", "plain-3", "plain-loaded", "ratio-2", "ratio-3", "nan-2", "nan-3", "frozen-2",
         "frozen-3", "cric-2", "cric-3", "stopped-2", "stopped-3", "taught-2", "taught-3"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is run, in one launch of two processes and one of one."""
    from tiny import tiny_llama

    folder = tmp_path_factory.mktemp("zero")
    tiny_llama(seed=5).save_pretrained(folder / "dense")
    found = [("job", {"folder": str(folder / name), **options}) for name, options in jobs(folder).items()]
    for name, checkpoint in (("cric-2", 3), ("cric-2", 9), ("cric-3", 3), ("cric-3", 9)):
        source = folder / name / "out" / f"checkpoint-{checkpoint}"
        options = jobs(folder)[name] | {"resume": str(source)}
        found.append(("job", {"folder": str(folder / f"{name}-from-{checkpoint}"), **options}))
    done = zero_cpu.launch(folder / "two", found)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = [("job", {"folder": str(folder / n), "processes": 1, **options}) for n, options in ALONE.items()]
    done = zero_cpu.launch(folder / "one", alone, processes=1)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for key in ("kept", "target", "cric", "step"):
        assert found[key] == expected[key], key
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() <= tolerance * weight.abs().max(), name
    assert len(found["norms"]) == len(found["losses"])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_under_zero_equal_one(name: str, runs: Path) -> None:
    expected = result(runs / name.partition("-")[0])
    for rank in range(2):
        found = result(runs / name, rank)
        assert_same(found, expected, 1e-5)
        if not name.startswith("nan"):
            assert max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)) <= 1e-5
    assert max(expected["norms"]) > 0 or name.startswith("stopped"), "nothing shrank"


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain-1", "plain-2", "plain-3", "plain-loaded", "frozen-3", "cric-3"])
def test_the_small_model_is_the_one_of_one_process(name: str, runs: Path) -> None:
    small = AutoModelForCausalLM.from_pretrained(runs / name / "small")
    expected = AutoModelForCausalLM.from_pretrained(runs / name.partition("-")[0] / "small")
    ids = torch.arange(3, 33).view(2, 15)
    logits = expected(input_ids=ids).logits
    assert (small(input_ids=ids).logits - logits).abs().max() <= 1e-4 * logits.abs().max()
    names = [sorted(path.name for path in (runs / n / "small").iterdir()) for n in (name, name.partition("-")[0])]
    assert names[0] == names[1]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [3, 9])
@pytest.mark.parametrize("name", ["cric-2", "cric-3"])
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
def test_an_optimizer_of_deepspeeds_config_is_pruned_around_as_well(runs: Path) -> None:
    found, expected = result(runs / "adamw-2"), result(runs / "plain")
    assert found["step"] == 12
    assert [len(layer) for layer in KeptUnits.from_dict(found["kept"]).kept["mlp_channels"]] == [28, 28]
    assert found["target"] == expected["target"]


@needs_deepspeed
@pytest.mark.slow
def test_another_number_of_processes_is_refused(runs: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match="was written by ZeRO-3 on 2 processes, this run is ZeRO-3 on 1"):
        check_zero_state(runs / "cric-3" / "out" / "checkpoint-3", 3)


def test_a_checkpoint_of_another_engine_is_refused(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    torch.save({"step": 3}, tmp_path / FOLDER / SHARED_NAME)
    with pytest.raises(CheckpointMismatchError, match="another engine than DeepSpeed"):
        check_zero_state(tmp_path, 2)


@pytest.mark.parametrize(
    ("engine_config", "hesso", "named"),
    [
        ({}, {}, r"`zero_optimization.stage` \(0\)"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "offload_param.device"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, {}, "round_robin_gradients"),
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


def test_deepspeed_is_not_imported_before_an_engine_is_made() -> None:
    code = "import sys, hesso_hf.trainer; assert 'deepspeed' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
