"""The parts of `gpu.py`: each takes whether it is a dry run, and a folder of its own, and returns plain JSON types."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from overhead import SCALES
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hesso_hf import HessoConfig, HessoOptimizer
from hesso_hf.bundled import python_docs_texts
from hesso_hf.pruning.healing import HEALING_TOKENS, Healer
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.pruning.saliency import no_units
from hesso_hf.pruning.schedule import Schedule
from hesso_hf.pruning.windows import LONGEST

ROOT = Path(__file__).parents[1]
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
}  # fmt: skip
SMALL = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192,
}  # fmt: skip
LENGTH = 2048
CHECKPOINT, STEPS = 10, 30  # of a run that goes on from a checkpoint
SAVING = {"save_strategy": "steps", "save_steps": CHECKPOINT}
# What HESSO may add to a step, of the plain step's time; a period's first step is measured by `period_start`.
GOAL, GOAL_OF_SCORING, GOAL_OF_CRIC = 0.03, 0.10, 0.15
QUALITY = ROOT / "benchmarks" / "results" / "quality_gpu.json"


# -- runs of the real trainer --------------------------------------------------------------------------------------


def llama(sizes: dict[str, int]) -> LlamaForCausalLM:
    """Return a random model, the same at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def _arguments(dry: bool, folder: Path, **changes: Any) -> TrainingArguments:
    """Return arguments for steps under bf16 autocast on a GPU."""
    options: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 2 if dry else 8, "bf16": not dry, "use_cpu": dry, "seed": 1,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10, "learning_rate": 1e-4,
        "remove_unused_columns": False, "dataloader_pin_memory": not dry,
    }  # fmt: skip
    return TrainingArguments(str(folder), **(options | changes))


def make_trainer(
    dry: bool, folder: Path, model: nn.Module | None = None, hesso: dict[str, Any] | None = None,
    length: int | None = None, **changes: Any,
) -> Any:  # fmt: skip
    """Return a HessoTrainer of a small Llama on random tokens."""
    from hesso_hf import HessoTrainer  # where Transformers is too old for it, the other parts work

    model, args = model or llama(TINY if dry else SMALL), _arguments(dry, folder, **changes)
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS * args.per_device_train_batch_size, length or (16 if dry else 256))
    ids = torch.randint(3, 256, shape, generator=generator)
    config: dict[str, Any] = {
        "pruning_ratio": 0.3, "warmup_steps": 4, "pruning_steps": 12, "pruning_periods": 2, "saliency_batches": 2,
        "calibration_examples": 4, "replay_share": 0.0,
    }  # fmt: skip
    return HessoTrainer(
        model=model,
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],  # type: ignore[arg-type]
        hesso_config=HessoConfig(**(config | (hesso or {}))),
    )


def exported(dry: bool, folder: Path, **options: Any) -> dict[str, Any]:
    """Train, write the smaller model, which is verified by that, and return errors and peaks."""
    run = make_trainer(dry, folder / "run", **options)
    _reset_peak()
    run.train()
    training, _ = _peak(), _reset_peak()
    run.save_model(str(folder / "small"))
    report = run.pruning_report
    assert report is not None
    assert report.verification is not None
    return {
        "fold_error": report.verification.fold_error,
        "rounding_error": report.verification.rounding_error,
        "training_peak_bytes": training,
        "export_peak_bytes": _peak(),
        "loss": run.state.log_history[-1].get("train_loss"),
    }


def trained_weights(dry: bool, folder: Path, resume: bool = False, **changes: Any) -> list[torch.Tensor]:
    """Return the weights that training ends with."""
    run = make_trainer(dry, folder, **changes)
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{CHECKPOINT}") if resume else None)
    return [parameter.detach().cpu().clone() for parameter in run.model.parameters()]


def _difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(one, other, strict=True))


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -- the parts -----------------------------------------------------------------------------------------------------


def tests(dry: bool, folder: Path) -> dict[str, Any]:
    """Run the tests that need CUDA."""
    where = "tests/pruning/test_cuda.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", where]
    return {"summary": _called([*command, *(["--collect-only"] if dry else [])])}


def overhead(tokens: int) -> Callable[[bool, Path], dict[str, Any]]:
    """Return the part that measures HESSO's share of a step of the 1B model, bf16, fused AdamW, by phase."""

    def part(dry: bool, folder: Path) -> dict[str, Any]:
        device = torch.device("cpu" if dry else "cuda")
        sizes, length = (TINY, 8) if dry else (SCALES["1b"], LENGTH)
        with device:
            model = llama(sizes).train()
        if tokens > 4 * LENGTH:
            model.gradient_checkpointing_enable()
        config = HessoConfig(pruning_ratio=0.4, calibration_examples=0, saliency_batches=2, healing="off")
        plan = PruningPlan.prepare(model, config)
        base = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        optimizer = HessoOptimizer(base, plan.process(Schedule(6, 12, 2, 10**6)))
        batch = torch.randint(3, sizes["vocab_size"], (2 if dry else tokens // length, length), device=device)
        steps: dict[str, list[tuple[float, float]]] = {}
        for number in range(24):
            kind, whole, own = _timed_step(model, batch, optimizer)
            if number:  # the first makes the base optimizer's state
                steps.setdefault(kind, []).append((whole, own))
        found = {
            kind: {
                "step_seconds": median(whole for whole, _ in times),
                "hesso_seconds": median(own for _, own in times),
                "steps": len(times),
                **_judged(kind, median(own / (whole - own) for whole, own in times)),
            }
            for kind, times in steps.items()
        }
        parameters = {"parameters": model.num_parameters(), "tensors": len(list(model.parameters()))}
        return {"tokens_per_step": batch.numel(), "steps": found, "peak_bytes": _peak()} | parameters

    return part


def _timed_step(model: PreTrainedModel, batch: torch.Tensor, optimizer: HessoOptimizer) -> tuple[str, float, float]:
    """Train a step; return its kind, its seconds, and those of HESSO's parts, the GPU waited for around each."""
    process, own, kind = optimizer.process, 0.0, _kind(optimizer)

    def timed(call: Callable[[], None]) -> float:
        started = _now(batch.device)
        call()
        return _now(batch.device) - started

    started = _now(batch.device)
    optimizer.zero_grad()
    with torch.autocast(batch.device.type, torch.bfloat16):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    own += timed(process.observe_gradients) + timed(lambda: process.before_step(optimizer.base))
    optimizer.base.step()
    own += timed(lambda: process.after_step(optimizer.base))
    return kind, _now(batch.device) - started, own


def _kind(optimizer: HessoOptimizer) -> str:
    """Name the kind of the coming step."""
    process = optimizer.process
    schedule, step = process.schedule, process.step
    if process.wants_probe:
        return "CRIC's probe"
    if process.trial is not None and schedule.sampling_step(step) is not None:
        return "CRIC's sample"
    position = schedule.period_step(step)
    if position is not None and position.t == 0:
        return f"first of a period, period {position.index + 1}"
    kind = schedule.phase(step) if position is None else f"shrinking, period {position.index + 1}"
    return kind + ", scored" * schedule.scoring_window(step, process.config.saliency_batches)


def _judged(kind: str, share: float) -> dict[str, Any]:
    """Compare HESSO's share of a step of a kind with the goal for it, where there is one."""
    if kind.startswith("first") or kind == "CRIC's probe":
        return {"share": share}
    goal = GOAL_OF_CRIC if "CRIC" in kind else GOAL_OF_SCORING if "scored" in kind else GOAL
    return {"share": share, "goal": goal, "reached": share <= goal}


class _Times(TrainerCallback):
    """Times a trainer's optimizer steps by their kind, the GPU waited for before and after each."""

    def __init__(self, run: Any = None) -> None:
        self.run = run  # None for a plain trainer
        self.seconds: dict[str, list[float]] = {}

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._kind = "plain" if self.run is None else _kind(self.run.hesso_optimizer)
        self._started = _now(args.device)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:  # the first makes the optimizer's state
            self.seconds.setdefault(self._kind, []).append(_now(args.device) - self._started)


def trainer_steps(hesso: dict[str, Any]) -> Callable[[bool, Path], dict[str, Any]]:
    """Return the part that compares a HessoTrainer's steps of the 1B model with a plain trainer's, by phase."""

    def part(dry: bool, folder: Path) -> dict[str, Any]:
        sizes, length, batch = (TINY, 16, 2) if dry else (SCALES["1b"], LENGTH, 4)
        known = {"per_device_train_batch_size": batch}
        run = make_trainer(dry, folder / "run", llama(sizes), {"compact": "never"} | hesso, length, **known)
        ours = _Times(run)
        run.add_callback(ours)
        _reset_peak()
        run.train()
        data = run.train_dataset
        found = {"replay": run.replay is not None, "peak_bytes": _peak(), "tokens_per_step": batch * length}
        ours.run = run = None
        _reset_peak()
        plain = _Times()
        args = _arguments(dry, folder / "plain", max_steps=8, **known)
        Trainer(llama(sizes), args, train_dataset=data, callbacks=[plain]).train()
        usual = median(plain.seconds["plain"])
        steps = {
            kind: {"step_seconds": median(times), "steps": len(times), **_judged(kind, median(times) / usual - 1)}
            for kind, times in ours.seconds.items()
        }
        return found | {"plain_step_seconds": usual, "steps": steps}

    return part


def period_start(dry: bool, folder: Path) -> dict[str, Any]:
    """Time what a period of the 1B model begins with: what errors matter, what units cost, what refits the others."""
    device = torch.device("cpu" if dry else "cuda")
    sizes, rows, length = (TINY, 4, 16) if dry else (SCALES["1b"], HEALING_TOKENS // LONGEST, LONGEST)
    with device:
        model = llama(sizes).train()
        ids = torch.randint(3, sizes["vocab_size"], (rows, length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plan = PruningPlan.prepare(model, HessoConfig(pruning_ratio=0.4, calibration_examples=0))
    bound = plan.process(Schedule(6, 12, 2, 10**6)).bound
    healer, pruned, marked = Healer(model, batch), *(no_units(bound.shapes(), device) for _ in range(2))
    for units in marked.values():
        units[:, : units.shape[1] // 4] = True
    going = {name: units.shape[1] // 4 for name, units in marked.items()}
    seconds: dict[str, float] = {}
    _reset_peak()

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = _now(device)
        found = call()
        seconds[name] = _now(device) - started
        return found

    for _ in range(2):  # of the second time: the first finds libraries and memory
        fisher = timed("fisher", lambda: healer.fisher(bound))
        # judged as the model is, looked at with the lowest gone, judged again
        timed("look ahead", lambda: healer.look_ahead(bound, pruned, going, fisher))  # noqa: B023
        timed("corrections", lambda: healer.corrections(bound, marked, pruned, fisher))  # noqa: B023
    return {"seconds": seconds, "tokens": ids.numel(), "matrices": len(healer.readers(bound)), "peak_bytes": _peak()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(dry: bool, folder: Path) -> dict[str, Any]:
    """Compare the peaks of a run with what `hesso-hf plan` says."""
    import memory

    shape, batch, length = ("tiny", 3, 160) if dry else ("1b", 4, LENGTH)
    kinds = (memory.MeasuredHesso,) if dry else (memory.Measured, memory.MeasuredHesso)
    return {"runs": [memory.measure(shape, "bf16 autocast", kind, batch, length, not dry) for kind in kinds]}


def determinism(full: bool) -> Callable[[bool, Path], dict[str, Any]]:
    """Return the part that compares a run with another one, and with one that goes on from a checkpoint.

    With full_determinism both must be equal; it stays on in its process.
    """

    def part(dry: bool, folder: Path) -> dict[str, Any]:
        whole = trained_weights(dry, folder / "one", full_determinism=full, **SAVING)
        resumed = trained_weights(dry, folder / "one", resume=True, full_determinism=full, **SAVING)
        other = trained_weights(dry, folder / "other", full_determinism=full)
        found = {
            "two runs differ by": _difference(whole, other),
            "resumed differs by": _difference(whole, resumed),
        }
        if full and any(found.values()):
            raise SystemExit(f"full_determinism isn't deterministic: {found}")
        return found

    return part


def tf32(dry: bool, folder: Path) -> dict[str, Any]:
    """Train with TF32 on; the verification must not be disturbed."""
    return exported(dry, folder, bf16=False, **({} if dry else {"tf32": True}))


def compiled(dry: bool, folder: Path) -> dict[str, Any]:
    """Train a compiled model, and one whose routers choose among experts."""
    options = {"torch_compile": True, **({"torch_compile_backend": "eager"} if dry else {})}
    sizes = (TINY if dry else SMALL) | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    experts = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    hesso = {"structures": ["experts"], "pruning_ratio": None, "target_sizes": {"num_experts": 6}}
    return {
        "llama": exported(dry, folder / "llama", **options),
        "experts": exported(dry, folder / "experts", model=experts, hesso=hesso, **options),
    }


def fp16(dry: bool, folder: Path) -> dict[str, Any]:
    """Train with a loss scale, which a CPU hasn't."""
    return exported(dry, folder, bf16=False, fp16=not dry)


def cric(dry: bool, folder: Path) -> dict[str, Any]:
    """Let CRIC look, by training steps and by gradients alone."""
    path = {"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2}
    return {
        "path": exported(dry, folder / "path", hesso=path),
        "probe": exported(dry, folder / "probe", hesso={"cric": True, "cric_mode": "probe"}),
    }


def lora(dry: bool, folder: Path) -> dict[str, Any]:
    """Train adapters on the 1B model in bf16, which shows the peak of scoring and of the export."""
    if importlib.util.find_spec("peft") is None:
        return {"skipped": "peft isn't installed"}
    from peft import LoraConfig, get_peft_model

    model = llama(TINY if dry else SCALES["1b"]).to(torch.bfloat16)
    return exported(dry, folder, model=get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")))


def fsdp2(dry: bool, folder: Path) -> dict[str, Any]:
    """Train under FSDP2 in one process, over NCCL or, in a dry run, over gloo with the tests' stand-in for a GPU."""
    environment = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}",
    }  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    _called([*launcher, __file__, str(folder), str(int(dry))], environment)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def _fsdp2_job(folder: Path, dry: bool) -> None:
    if dry:
        from tests.support import fsdp_cpu

        fsdp_cpu.start()
    found = exported(dry, folder) | {"backend": torch.distributed.get_backend()}
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def speed(dry: bool, folder: Path) -> dict[str, Any]:
    """Let the 1B model and smaller ones read and write, in bf16 with a compiled static cache (`speed.py`)."""
    output = folder / "speed.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "--output", str(output)]
    if dry:
        _called(
            [*command, "--model", "tiny", "--prompt", "8", "--new-tokens", "2", "--repeats", "1", "--ratios", "0.5"]
        )
    else:
        _called([*command, "--model", "llama-1b", "--dtype", "bfloat16", "--cache", "static", "--new-tokens", "64"])
    return json.loads(output.read_text(encoding="utf-8"))["models"]


def quality(dry: bool, folder: Path) -> dict[str, Any]:
    """Prune SmolLM2 and compare (`quality.py`), as far as the minutes reach; a later call goes on."""
    script, output = str(ROOT / "benchmarks" / "quality.py"), folder / "quality.json" if dry else QUALITY
    command = [sys.executable, script, "--output", str(output), "--methods", "dense", "hesso"]
    if dry:
        wiki = folder / "data" / "wikitext2" / "wiki.test.raw"
        wiki.parent.mkdir(parents=True)
        wiki.write_text("".join(python_docs_texts("test"))[:20_000], encoding="utf-8")
        command += ["--model", "bundled", "--text", "docs", "--data", str(folder), "--cache", str(folder / "cache")]
        command += ["--block", "32", "--batch", "4", "--calibration-examples", "4", "--windows", "2", "--blocks", "2"]
        command += ["--tokens", "1280"]
    said = _called([*command, "--minutes", "7"])
    if "put off" in said:
        raise SystemExit("not finished: call again to go on from its checkpoint")
    return json.loads(output.read_text(encoding="utf-8"))["medians"]


def _called(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Return the end of what a command says.

    Raises:
        SystemExit: with that, where it fails.
    """
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, errors="replace", env=os.environ | (environment or {})
    )
    said = (done.stdout + done.stderr)[-3000:]
    if done.returncode:
        raise SystemExit(said)
    return said


PARTS: dict[str, Callable[[bool, Path], dict[str, Any]]] = {
    "tests": tests,
    "overhead_8k": overhead(4 * LENGTH),
    "overhead_16k": overhead(8 * LENGTH),
    "period_start": period_start,
    "trainer_healed": trainer_steps({}),
    "trainer_defaults": trainer_steps({"replay_share": 0.25}),
    "trainer_cric_path": trainer_steps({"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2}),
    "trainer_cric_probe": trainer_steps({"cric": True, "cric_mode": "probe"}),
    "memory": peak_memory,
    "full_determinism": determinism(True),
    "plain_determinism": determinism(False),
    "tf32": tf32,
    "compile": compiled,
    "fp16": fp16,
    "cric": cric,
    "lora": lora,
    "fsdp2": fsdp2,
    "speed": speed,
    "quality": quality,
}

if __name__ == "__main__":
    _fsdp2_job(Path(sys.argv[1]), bool(int(sys.argv[2])))
