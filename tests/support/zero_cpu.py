"""DeepSpeed's real engine on a CPU with gloo, for the tests: HessoTrainer in several processes."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from hesso_hf import HessoTrainer
from hesso_hf.errors import HessoError, VerificationError
from hesso_hf.structures.in_place import InPlace
from hesso_hf.trainer import replay, teacher
from tests.support import ROOT, forks
from tests.support.moe import moe_model
from tests.support.tiny import tiny_gemma2, tiny_llama, tiny_phi
from tests.support.training import arguments, blocks, hesso_config, said_by_the_dense_model

MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama, "gemma2": tiny_gemma2, "phi": tiny_phi, "mixtral": functools.partial(moe_model, "mixtral"),
}  # fmt: skip
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
_WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference alone, and compiled for a minute
from tests.support import proofs, zero_cpu
from hesso_hf.distributed.collectives import leave
with proofs.made_again():  # as the engine has it
    for name, arguments in json.loads(open(sys.argv[2]).read()):
        getattr(zero_cpu, name)(**arguments)
leave()
"""


def engine(stage: int, **changes: Any) -> dict[str, Any]:
    """Return a DeepSpeed config; what is `auto` comes from the training arguments."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100} | changes.pop("zero", {})
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size")
    options = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": zero, "bf16": {"enabled": "auto"}}
    return dict.fromkeys(names, "auto") | options | changes


class Stop(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, at: int) -> None:
        self._at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say that training is to stop."""
        control.should_training_stop |= state.global_step == self._at


class DivergingTrainer(HessoTrainer):
    """Has a loss that isn't finite in one step, on one process."""

    nan_at = -1

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss, or NaN."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step == self.nan_at and self.model.training and self.args.process_index == 0:
            return loss * float("nan")
        return loss


def ragged(data: Dataset) -> Dataset:
    """Take the labels from the first part of blocks, of another length each."""
    return data.map(lambda row, index: {"labels": [-100] * (index % 5) + row["labels"][index % 5 :]}, with_indices=True)


def build(
    folder: str,
    steps: int,
    processes: int,
    hesso: dict[str, Any] | None,
    deepspeed: Any,
    changes: dict[str, Any],
    pretrained: str | None = None,
    frozen: bool = False,
    kind: str = "llama",
) -> HessoTrainer:
    """Build a trainer on a global batch of 4, of a model in memory or one that is loaded under DeepSpeed's config."""
    options: dict[str, Any] = {
        "adam_epsilon": 1e-4, "learning_rate": 2e-3, "max_grad_norm": 0.5, "max_steps": steps,
        "per_device_train_batch_size": 4 // processes, "deepspeed": deepspeed,
    }  # fmt: skip
    args = arguments(Path(folder) / "out", **(options | changes))
    if pretrained:
        import deepspeed as engine_module

        assert args.device.type == "cpu"  # asking for it joins the processes
        engine_module.init_distributed(dist_backend="gloo")  # which Accelerate does on a GPU
    model = AutoModelForCausalLM.from_pretrained(pretrained) if pretrained else MODELS[kind](seed=5)
    for name, parameter in model.named_parameters() if frozen else ():
        parameter.requires_grad_("layers.1.mlp.down_proj" not in name and "norm" not in name)
    config = hesso_config(**(hesso or {}))
    said = said_by_the_dense_model(MODELS[kind](seed=5))
    return DivergingTrainer(model=model, args=args, train_dataset=blocks(), eval_dataset=said, hesso_config=config)


def job(
    folder: str,
    steps: int = 12,
    processes: int = 2,
    resume: bool | str = False,
    hesso: dict[str, Any] | None = None,
    deepspeed: dict[str, Any] | None = None,
    save: bool = True,
    pretrained: str | None = None,
    frozen: bool = False,
    nan_at: int = -1,
    stop_at: int = -1,
    chunk: int = teacher.CHUNK_LOGITS,
    kind: str = "llama",
    window: int = replay.LONGEST,
    spoilt: bool = False,
    full: bool = False,
    **changes: Any,
) -> None:
    """Train, save the small model, and leave weights and decisions of every process.

    Args:
        spoilt: whether one that is cut wrongly is saved as well.
        full: whether a process has no room for the smaller model while it trains.
    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    before = held()
    run = build(folder, steps, processes, hesso, deepspeed, changes, pretrained, frozen, kind)
    run.nan_at = nan_at
    if chunk != teacher.CHUNK_LOGITS:  # small, so that processes need different numbers of chunks
        run.train_dataset = ragged(run.train_dataset)
    plain_chunk, teacher.CHUNK_LOGITS = teacher.CHUNK_LOGITS, chunk
    plain_window, replay.LONGEST = replay.LONGEST, window  # short ones divide evenly among processes
    run.add_callback(Stop(stop_at))
    plain_put = InPlace.put
    if full and run.args.process_index:
        InPlace.put = Mock(side_effect=torch.OutOfMemoryError)  # type: ignore[method-assign]
    run.train(resume_from_checkpoint=resume or None)
    InPlace.put = plain_put  # type: ignore[method-assign]
    teacher.CHUNK_LOGITS, replay.LONGEST = plain_chunk, plain_window
    evaluations = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    evaluated = run.evaluate()["eval_loss"] if run.args.load_best_model_at_end else None
    if save:
        run.save_model(str(where / "small"))
    process = run.hesso_optimizer.process
    found = {
        "kept": process.kept_units().to_dict(),
        "weights": weights(run),
        "target": run.hesso_plan.target.to_dict(),
        "cric": process.cric_report() is not None,
        "step": process.step,
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "norms": [entry["hesso/redundant_norm"] for entry in run.state.log_history if "loss" in entry],
        "divergences": [
            e[name]
            for name in ("hesso/distillation_loss", "hesso/replay_loss")
            for e in run.state.log_history
            if name in e
        ],
        "watch": process.state_dict()["watch"] if process.config.on_collapse == "pause" else None,  # of all processes
        "pauses": list(process.schedule.pauses),
        "basis": run.hesso_run.record()["stream_basis"],
        "fingerprint": run.distillation.teacher.fingerprint if run.distillation else None,
        "evaluated": evaluated,
        "best": run.state.best_model_checkpoint,
        "evaluations": evaluations,
        "said": said_of_spoilt(run, where / "spoilt") if spoilt else "",
        "lost": said_without_room(run, where) if spoilt else {},
        "compacted": process.state.compaction is not None,
        "held": held() - before,
        "teacher": sum(p.numel() for p in run.distillation.teacher.model.parameters()) if run.distillation else 0,
    }
    torch.save(found, where / f"rank{run.args.process_index}.pt")


def held() -> int:
    """Return how many numbers this process keeps in tensors, whoever refers to them."""
    gc.collect()
    found = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() // 4 for s in (value.untyped_storage() for value in found)}.values())


def said_of_spoilt(run: HessoTrainer, target: Path) -> str:
    """Save a small model that is cut wrongly, and return what is said of it."""
    from hesso_hf.engines.deepspeed import export

    plain = export.cut_part
    export.cut_part = lambda tensor, part, cuts: plain(tensor, part, cuts) * (1.5 if cuts else 1.0)
    try:
        run.save_model(str(target))
    except VerificationError as error:
        return str(error)
    finally:
        export.cut_part = plain
    raise AssertionError("it was saved")


def said_without_room(run: HessoTrainer, where: Path) -> dict[str, str]:
    """Save the small model where memory runs out on one process, by where it does; return what is said of it there."""
    from hesso_hf.engines import streamed
    from hesso_hf.engines.deepspeed import export, gathering

    count, said = len(list(run.hesso_run.model.parameters())), {}
    for name, module, attribute, at, process in (
        ("streamed", gathering, "room_for", 3, 1), ("filled", streamed, "set_parameter", 12, 0),
        ("together", gathering, "room_for", count + 3, 1), ("cut", export, "cut_part", 3, 0),
    ):  # fmt: skip
        plain = getattr(module, attribute)
        failing = functools.partial(
            fails_once, plain, itertools.count(1), at if run.args.process_index == process else 0
        )
        setattr(module, attribute, failing)
        try:
            run.save_model(str(where / name))
            said[name] = ""
        except HessoError as error:
            said[name] = str(error)
        finally:
            setattr(module, attribute, plain)
    return said


def fails_once(plain: Callable[..., Any], calls: Iterator[int], at: int, *args: Any) -> Any:
    """Call what is plain, but run out of memory in one call, counted from 1."""
    if next(calls) == at:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return plain(*args)


def weights(run: HessoTrainer) -> dict[str, torch.Tensor]:
    """Return the whole weights in fp32: ZeRO's masters, and check that the model computes with the same."""
    model = run.accelerator.unwrap_model(run.model)
    if not run.is_deepspeed_enabled:
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    import deepspeed

    from hesso_hf.engines.deepspeed.gathering import whole_fp32

    found = {name: whole_fp32(p).clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            assert torch.equal(found[name].to(p.dtype), p.detach()), name
    return found


def launch(where: Path, jobs: list[tuple[str, dict[str, Any]]], processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run jobs of this module one after the other in several real processes."""
    where.mkdir(parents=True, exist_ok=True)
    (where / "jobs.json").write_text(json.dumps(jobs))
    return forks.run(_WORKER, str(ROOT), str(where / "jobs.json"), processes=processes, env=ENVIRONMENT)
