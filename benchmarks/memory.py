"""How near the estimates of `hesso-hf plan` come to the memory that training takes, and what HESSO does to both.

    python benchmarks/memory.py [--device cuda] [--shapes 1b --batch-size 4 --length 2048]

On a GPU a 1.2B Llama is trained at sequence length 2048 under bf16 autocast, by the Trainer and by HessoTrainer in one
run: tokens per second, and the peak of `torch.cuda.max_memory_allocated` at each moment of a step. On a CPU four small
Llamas go the same way; the peak is that of the tensors made within a step, tracked one by one, on top of the parameters
and the optimizer state. `ratio` is estimate / measurement.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from overhead import SCALES, Allocations
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.memory.estimate import EstimatedRun
from hesso_hf.cli.memory.model_sizes import model_sizes
from hesso_hf.cli.memory.workload import ENGINES, Cluster, Workload
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "memory.json"
SMALL = ("256", "320", "384", "512")
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 60, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 131,
    },
    "256": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 2000,
    },
    "320": {
        "hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 6, "num_attention_heads": 5,
        "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 4000,
    },
    "384": {
        "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 1000,
    },
    "512": {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8000,
    },
    "1b": SCALES["1b"],
}  # fmt: skip
# name: dtype of the weights, bf16 autocast, gradient checkpointing
SETTINGS = {
    "bf16 autocast": (torch.float32, True, False),
    "bf16 autocast, checkpointing": (torch.float32, True, True),
    "fp32": (torch.float32, False, False),
    "bf16 weights": (torch.bfloat16, True, False),
}
MOMENTS = ("forward", "backward", "step")
STEPS = 12  # of HessoTrainer; the Trainer needs fewer where nothing is timed


class Meter:
    """The peak of a device's memory between two marks; on a CPU what is made in between on top of `base` bytes."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._tracker: Allocations | None = None
        self.peaks: dict[str, int] = {}

    def start(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._tracker = Allocations()
            self._tracker.__enter__()

    def mark(self, moment: str, base: int) -> None:
        """Give what was reached since the last mark to a moment, and begin the next."""
        if self._cuda:
            reached = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            assert self._tracker is not None
            reached = self._tracker.peak + base
            self._tracker.peak = self._tracker.now
        self.peaks[moment] = max(self.peaks.get(moment, 0), reached)

    def stop(self) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            self._tracker = None


class Measured(Trainer):
    """A Trainer whose steps, but for the first, which makes the optimizer's state, are measured."""

    def meter_steps(self) -> None:
        self.meter = Meter(self.args.device)
        self.bytes: dict[str, int] = {}
        self.add_callback(StepTimes(self))

    def resident(self) -> int:
        """Bytes of the parameters and of the optimizer's state."""
        states = self.optimizer.state.values()
        held = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        self.bytes["parameters"] = _bytes(self.model.parameters())
        self.bytes["optimizer"] = _bytes(value for value in held if value.dim())
        return self.bytes["parameters"] + _bytes(held)

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        if not self.state.global_step:
            return super().training_step(*args, **options)
        self.meter.start()
        loss = super().training_step(*args, **options)
        self.meter.mark("backward", self.resident())
        self.bytes["gradients"] = _bytes(p.grad for p in self.model.parameters() if p.grad is not None)
        return loss

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        if self.state.global_step:
            self.meter.mark("forward", self.resident())
        return loss


class MeasuredHesso(Measured, HessoTrainer):
    """The same around HessoTrainer."""


class StepTimes(TrainerCallback):
    """Ends a measured step, and keeps the seconds of every one but the first two."""

    def __init__(self, trainer: Measured) -> None:
        self.trainer, self.seconds, self._started = trainer, [], 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._started = _now(args.device)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step:
            self.trainer.meter.mark("step", self.trainer.resident())
            self.trainer.meter.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step > 2:
            self.seconds.append(_now(args.device) - self._started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: 1b on a GPU, the small ones else")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    batch, length = options.batch_size or (4 if cuda else 2), options.length or (2048 if cuda else 256)
    entries = []
    for shape in options.shapes or (["1b"] if cuda else SMALL):
        for setting in SETTINGS:
            for trainer in (Measured, MeasuredHesso) if setting.startswith("bf16 autocast") else (Measured,):
                entries.append(measure(shape, setting, trainer, batch, length, cuda))
                print(json.dumps(entries[-1]), flush=True)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    stored = json.loads(options.output.read_text()) if options.output.exists() else {}
    stored[name] = {"device": name, "versions": versions(), "runs": entries}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(shape: str, setting: str, kind: type[Measured], batch: int, length: int, cuda: bool) -> dict[str, Any]:
    """Train a few steps and compare each moment's peak with its estimate."""
    dtype, autocast, checkpointing = SETTINGS[setting]
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=shape == "1b", max_position_embeddings=length)
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        model = LlamaForCausalLM(config).to(dtype)
    steps = STEPS if cuda or kind is MeasuredHesso else 3
    ids = torch.randint(0, config.vocab_size, (steps * batch, length))
    more: dict[str, Any] = {}
    if kind is MeasuredHesso:
        alone: dict[str, Any] = {"calibration_examples": 0, "healing": "off", "replay_share": 0.0}
        more["hesso_config"] = HessoConfig(pruning_ratio=0.3, compact="never", **alone)  # as large as it ever is
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch, bf16=autocast, use_cpu=not cuda,
            gradient_checkpointing=checkpointing, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_strategy="no", remove_unused_columns=False,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = kind(model=model, args=arguments, train_dataset=rows, **more)  # type: ignore[arg-type]
        trainer.meter_steps()
        trainer.train()
    times = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StepTimes))
    workload = Workload(batch, length, checkpointing, "bfloat16" if autocast else "float32")
    entry = {
        "shape": shape,
        "parameters": model.num_parameters(),
        "setting": setting,
        "trainer": "HessoTrainer" if kind is MeasuredHesso else "Trainer",
        "workload": asdict(workload),
        # on a CPU the tracker's own time is most of it
        "tokens_per_second": batch * length / median(times.seconds) if cuda else None,
        **_compared(config, workload, dtype, trainer),
    }
    del trainer, model
    gc.collect()
    return entry


def _compared(config: LlamaConfig, workload: Workload, dtype: torch.dtype, trainer: Measured) -> dict[str, Any]:
    """Set the estimate beside the measurement; weights in bf16 alone are what ZeRO-1 has beside its masters."""
    masters = dtype == torch.float32
    engine = ENGINES["ddp" if masters else "zero1"]
    moments = EstimatedRun(model_sizes(config), engine, workload, Cluster(1, 80e9)).moments()
    resident = trainer.bytes["parameters"] + trainer.bytes["optimizer"]
    estimated: dict[str, float] = {}
    for name, parts in moments.items():
        flow = {
            part: value for part, value in parts.items() if part in ("gradients", "activations", "logits", "buffers")
        }
        if not masters:  # DeepSpeed's bucket and fp32 gradients aren't there
            flow["buffers"] = 0.0
        total = sum(flow.values()) + (parts["parameters"] + parts["optimizer"] if masters else resident)
        moment = name.partition(",")[0]
        estimated[moment] = max(estimated.get(moment, 0.0), total)
    measured: dict[str, float] = dict(trainer.meter.peaks)
    kept = [moment for moment in MOMENTS if masters or moment != "step"]
    for found in (estimated, measured):
        found["peak"] = max(found[moment] for moment in kept)
    if masters:
        estimated |= {"parameters": moments["step"]["parameters"], "optimizer": moments["step"]["optimizer"]}
        estimated["gradients"] = moments["step"]["gradients"]
        measured |= trainer.bytes
    names = [name for name in estimated if name in measured and (masters or name != "step")]
    above = [found["peak"] - resident for found in (estimated, measured)]
    return {
        "estimated": {name: round(estimated[name]) for name in names},
        "measured": {name: round(measured[name]) for name in names},
        "ratio": {name: estimated[name] / measured[name] for name in names}
        | {"peak above parameters and state": above[0] / above[1]},
    }


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
