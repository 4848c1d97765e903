"""Two collapses of one-point saliencies, and what looking along the way to zero (CRIC) keeps of them.

    python benchmarks/collapse.py [--data ../shared] [--models bundled stories260K] [--seeds 0 1 2]

- plain: the model as it is.
- rescaled: half of the MLP channels and of the heads are rescaled by up to 100 without changing the function (up row
  and v rows over a, down column and o columns times a), so that the size of a weight says nothing.
- stationary: the model is first trained on a small set, in full batches, until its gradient there is nearly zero.

From each of them every method removes the same share of the parameters with the same sizes. *Trained*: on the same
number of tokens; CRIC's sampling steps count, and the batches of the probe are taken off its steps. *Untrained*: with a
learning rate of zero, so that the choice of units is all that counts; HESSO sees 40 batches of gradients, CRIC fewer.

The optimizer's steps are scaled with each rescaled channel (`RescaledAdamW`), so that training is the same on the
rescaled model and what is compared is the choice of units; `--plain-adamw` trains it with AdamW as it is. Held-out loss
is nats per token. Runs are kept in the result file, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from stories import load_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback, TrainingArguments

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.bundled import bundled_model_path, python_docs_dataset
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.config import SALIENCIES
from hesso_hf.export.report import versions
from hesso_hf.pruning.cric_state import PROBE_BATCH_SIZE, PROBE_BATCHES, PROBE_CYCLES, PROBE_SAMPLES

RESULTS = Path(__file__).parent / "results" / "collapse.json"
BLOCK, BATCH = 128, 8
CHOICE_STEPS = 240  # room for CRIC in the runs without training
LARGEST_FACTOR = 100.0
SMALL_SET = 16  # blocks of the stationary point, all of them in every batch
# avg_magnitude ranks as magnitude does: all units of a structure have the same number of elements
CRITERIA = tuple(name for name in SALIENCIES if name != "avg_magnitude")
KEY = ("model", "start", "method", "seed", "trained")
METHODS = ("one_shot_magnitude", *(f"hesso_{name}" for name in CRITERIA), "cric", "cric_probe")
LOOKS = {  # label, colour, line
    "one_shot_magnitude": ("one-shot, magnitude", "#999999", ":o"),
    "hesso_magnitude": ("HESSO, magnitude", "#555555", "--o"),
    "hesso_cosine_similarity": ("HESSO, cosine", "#c2a5cf", "--o"),
    "hesso_taylor_first_order": ("HESSO, first-order Taylor", "#fdae61", "--o"),
    "hesso_taylor_second_order": ("HESSO, default (second-order)", "#2c7bb6", "-o"),
    "cric": ("HESSO-CRIC, path", "#1b7837", "-o"),
    "cric_probe": ("HESSO-CRIC, probe", "#7fbf7b", "-o"),
}
STARTS = ("plain", "rescaled", "stationary")


@dataclass(frozen=True)
class Setting:
    """A model, its text and how it is trained."""

    name: str
    folder: Path
    train: Dataset
    held_out: Dataset
    steps: int
    learning_rate: float


class RescaledAdamW(torch.optim.AdamW):
    """AdamW whose steps are scaled with the rescaled channels: equal training of equal functions.

    Adam's step doesn't depend on the size of the gradient, so a weight that was divided by a needs one a times smaller.
    """

    def __init__(self, parameters: Any, factors: dict[torch.Tensor, torch.Tensor], **options: Any) -> None:
        super().__init__(parameters, **options)
        self._factors = factors

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step as AdamW does, and scale what moved."""
        before = {parameter: parameter.detach().clone() for parameter in self._factors}
        loss = super().step(closure)
        for parameter, factor in self._factors.items():
            parameter.copy_(before[parameter] + (parameter - before[parameter]) * factor)
        return loss


def rescale_(model: PreTrainedModel, seed: int) -> dict[torch.Tensor, torch.Tensor]:
    """Rescale half of the MLP channels and heads, in place; return each changed parameter's factors."""
    generator = torch.Generator().manual_seed(seed)
    config, factors = model.config, {}

    def drawn(count: int) -> torch.Tensor:
        chosen = torch.randperm(count, generator=generator)[: count // 2]
        found = torch.ones(count)
        found[chosen] = torch.exp(torch.rand(len(chosen), generator=generator) * math.log(LARGEST_FACTOR))
        return found

    for layer in model.model.layers:
        mlp, attention = layer.mlp, layer.self_attn
        channels = drawn(config.intermediate_size)
        factors[mlp.up_proj.weight], factors[mlp.down_proj.weight] = 1 / channels[:, None], channels[None]
        heads = drawn(config.num_key_value_heads).repeat_interleave(attention.head_dim)
        queries = heads.view(-1, attention.head_dim).repeat_interleave(attention.num_key_value_groups, 0).flatten()
        factors[attention.v_proj.weight], factors[attention.o_proj.weight] = 1 / heads[:, None], queries[None]
    with torch.no_grad():
        for parameter, factor in factors.items():
            parameter.mul_(factor)
    return factors


class HeldOutCurve(TrainerCallback):
    """Measures the held-out loss every so many steps, on some blocks."""

    def __init__(self, model: PreTrainedModel, held_out: Dataset, every: int) -> None:
        self._model, self._blocks, self._every = model, held_out.select(range(min(40, len(held_out)))), every
        self.points: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after every so many steps and after the last."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self.points.append((state.global_step, round(held_out_loss(self._model, self._blocks), 4)))
            self._model.train()


class StopWhenPruned(TrainerCallback):
    """Ends a run as soon as all units are at zero."""

    trainer: HessoTrainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop once pruning has finished."""
        control.should_training_stop = self.trainer._process.finished


class Benchmark:
    """Runs every method from every start of one model."""

    def __init__(self, setting: Setting, options: argparse.Namespace) -> None:
        self.setting, self.options = setting, options
        self._stationary: dict[int, tuple[dict[str, torch.Tensor], dict[str, float]]] = {}

    def run(self, start: str, method: str, seed: int, trained: bool) -> dict[str, Any]:
        """Prune once; return held-out losses over the steps, and what CRIC did."""
        transformers.set_seed(seed)
        began = time.perf_counter()
        model, facts = self._load(), {}
        factors: dict[torch.Tensor, torch.Tensor] = {}
        data, batch, rate = self.setting.train, BATCH, self.setting.learning_rate
        if start == "rescaled":
            factors = rescale_(model, seed)
            factors = {} if self.options.plain_adamw else factors
        elif start == "stationary":
            state, facts = self.stationary(seed)
            model.load_state_dict(state)
            data, batch, rate = self.small_set(seed), SMALL_SET, self.options.stationary_learning_rate
        steps = self.options.stationary_steps if start == "stationary" else self.setting.steps
        if not trained:
            steps, rate = CHOICE_STEPS, 0.0
        config = self.config(method, trained)
        examples = PROBE_CYCLES * PROBE_SAMPLES * PROBE_BATCHES * PROBE_BATCH_SIZE
        spent = math.ceil(examples / batch) if method == "cric_probe" and trained else 0
        curve = HeldOutCurve(model, self.setting.held_out, every=max(1, steps // 8))
        with tempfile.TemporaryDirectory() as folder:
            trainer = HessoTrainer(
                model=model,
                args=self.arguments(folder, steps - spent, batch, rate, seed),
                train_dataset=data,
                hesso_config=config,
                callbacks=[curve if trained else StopWhenPruned()],
                optimizers=(RescaledAdamW(model.parameters(), factors, lr=rate, weight_decay=0.0, eps=1e-12), None),
            )
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, StopWhenPruned):
                    callback.trainer = trainer
            trainer.train()
        if start == "stationary":
            facts = facts | {"small_set_loss": held_out_loss(model, data)}
        report = trainer.hesso_run.record()["cric"]
        return {
            "model": self.setting.name,
            "start": start,
            "method": method,
            "seed": seed,
            "trained": trained,
            "loss": held_out_loss(model, self.setting.held_out),
            "curve": curve.points,
            "tokens": steps * batch * BLOCK if trained else 0,
            "steps": steps - spent,
            "sizes": trainer.hesso_plan.target.sizes,
            "parameter_ratio": trainer.hesso_plan.target.parameter_ratio,
            "cric": _brief(report),
            "facts": facts,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def config(self, method: str, trained: bool) -> HessoConfig:
        """Return a method's configuration; sizes, schedule and structures are the same for all."""
        options: dict[str, Any] = {
            "pruning_ratio": self.options.ratio,
            "calibration_examples": 0,
            "healing": "off",
            "replay_share": 0.0,
        }
        if not trained:
            options |= {"warmup_steps": 8, "pruning_steps": 3, "pruning_periods": 3}
            if not method.startswith("cric"):  # CRIC sees 8 before it and 12 in its cycles
                options |= {"warmup_steps": 40, "saliency_batches": 40}
        if method == "one_shot_magnitude":
            warmup = 8 if trained else 40
            options |= {"saliency": "magnitude", "warmup_steps": warmup, "pruning_steps": 1, "pruning_periods": 1}
        elif method.startswith("hesso_"):
            options |= {"saliency": method.removeprefix("hesso_")}
        else:
            options |= {"cric": True, "cric_mode": "probe" if method == "cric_probe" else "path"}
        return HessoConfig(**options)

    def arguments(self, folder: str, steps: int, batch: int, rate: float, seed: int) -> TrainingArguments:
        """Training arguments that all methods share."""
        return TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 30),
            seed=seed,
            data_seed=seed,
            logging_steps=10 * steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            max_grad_norm=0.0,  # clipping would depend on the size of the rescaled gradients
        )

    # -- the stationary point -------------------------------------------------------------------------------------

    def small_set(self, seed: int) -> Dataset:
        """Return the blocks of the stationary point: others for every seed."""
        return self.setting.train.shuffle(seed=seed).select(range(SMALL_SET))

    def stationary(self, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Train on the small set until the gradient is nearly zero; once per seed."""
        if seed not in self._stationary:
            model = self._load()
            ids = torch.tensor(self.small_set(seed)["input_ids"])
            facts = {
                "gradient_norm_before": gradient_norm(model, ids),
                "loss_before": float(model(ids, labels=ids).loss.detach()),
            }
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=self.options.stationary_learning_rate, weight_decay=0.0
            )
            steps = self.options.stationary_training_steps
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.0)
            for _ in range(steps):
                optimizer.zero_grad()
                model(ids, labels=ids).loss.backward()
                optimizer.step()
                schedule.step()
            facts |= {"gradient_norm": gradient_norm(model, ids), "loss": float(model(ids, labels=ids).loss.detach())}
            facts["held_out_loss"] = held_out_loss(model, self.setting.held_out)
            self._stationary[seed] = ({key: value.clone() for key, value in model.state_dict().items()}, facts)
        return self._stationary[seed]

    def _load(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.setting.folder, dtype=torch.float32)


def gradient_norm(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return the L2 norm of the loss gradient on a batch."""
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    return norm


def _brief(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what a result keeps of CRIC's report: sizes and counts, no lists of units."""
    if report is None:
        return None
    kept = ("first", "violating", "num_corrected")
    structures = {name: {key: found[key] for key in kept} for name, found in report["structures"].items()}
    return {key: report[key] for key in ("mode", "cycles", "samples", "max_cycles")} | {"structures": structures}


def settings(options: argparse.Namespace) -> list[Setting]:
    """Return the models that are there."""
    found = []
    if "bundled" in options.models:
        folder = bundled_model_path()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train = python_docs_dataset(tokenizer, "train", block_size=BLOCK)
        held_out = python_docs_dataset(tokenizer, "test", block_size=BLOCK)
        steps = options.steps or 200  # it costs twice as much a step
        found.append(Setting("bundled", folder, train, _some(held_out), steps, options.learning_rate))
    if "stories260K" in options.models:
        folder, text = options.data / "models" / "stories260K", options.data / "data" / "tinystories"
        if not folder.exists():
            print(f"SKIPPED: {folder} isn't there; only the bundled model is measured")
            return found
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train = load_blocks(text / "train.jsonl", tokenizer, BLOCK)
        held_out = load_blocks(text / "test.jsonl", tokenizer, BLOCK)
        steps = options.steps or 300
        found.append(Setting("stories260K", folder, train, _some(held_out), steps, options.learning_rate))
    return found


def _some(held_out: Dataset) -> Dataset:
    return held_out.select(range(min(200, len(held_out))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--models", nargs="+", default=["bundled", "stories260K"])
    parser.add_argument("--starts", nargs="+", default=list(STARTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of each run; by default 300, and 200 for the bundled model")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--stationary-steps", type=int, default=100)
    parser.add_argument("--stationary-learning-rate", type=float, default=1e-3)
    parser.add_argument("--stationary-training-steps", type=int, default=300)
    parser.add_argument("--plain-adamw", action="store_true", help="train the rescaled model with AdamW as it is")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    runs = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    for setting in settings(options):
        benchmark = Benchmark(setting, options)
        for start, method, seed, trained in plan(options):
            key = (setting.name, start, method, seed, trained)
            if any(tuple(r[name] for name in KEY) == key for r in runs):
                continue
            runs.append(benchmark.run(start, method, seed, trained))
            print({name: runs[-1][name] for name in (*KEY, "loss", "seconds")}, flush=True)
            write(options.output, runs)
    if runs:
        write(options.output, runs)
        draw(runs, options.output.with_suffix(".png"))
    return 0


def plan(options: argparse.Namespace) -> list[tuple[str, str, int, bool]]:
    """List (start, method, seed, trained), those without training first.

    On the rescaled model the criteria that its factors can't move train exactly as on the plain one: three methods do.
    """
    few = ("one_shot_magnitude", "hesso_magnitude", "cric")
    return [
        (start, method, seed, trained)
        for trained in (False, True)
        for seed in options.seeds
        for start in options.starts
        for method in options.methods
        if not trained or start != "rescaled" or method in few
    ]


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the held-out loss over the steps: one panel for each model and start, medians over seeds."""
    from matplotlib.figure import Figure

    models = sorted({run["model"] for run in runs})
    starts = [start for start in STARTS if any(run["start"] == start for run in runs)]
    figure = Figure(figsize=(4.6 * len(starts), 3.6 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(starts), squeeze=False)
    for row, model in zip(axes, models, strict=True):
        for axis, start in zip(row, starts, strict=True):
            for method, (label, colour, style) in LOOKS.items():
                key = (model, start, method, True)
                found = [r["curve"] for r in runs if (r["model"], r["start"], r["method"], r["trained"]) == key]
                if found:
                    steps = [step for step, _ in found[0]]
                    losses = [statistics.median(curve[i][1] for curve in found) for i in range(len(steps))]
                    axis.plot(steps, losses, style, color=colour, label=label, linewidth=1.6, markersize=3)
            axis.set_title(f"{model}, {start}", fontsize=11)
            axis.set_xlabel("step")
            axis.set_ylabel("held-out loss (nats per token)")
            axis.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=90)


def write(path: Path, runs: list[dict[str, Any]]) -> None:
    """Write all runs and, per model and start, the medians over seeds."""
    medians: dict[str, dict[str, dict[str, Any]]] = {}
    for model, start, method, trained in sorted({(r["model"], r["start"], r["method"], r["trained"]) for r in runs}):
        key = (model, start, method, trained)
        found = [r for r in runs if (r["model"], r["start"], r["method"], r["trained"]) == key]
        losses = [r["loss"] for r in found]
        column = start if trained else f"{start}, untrained"
        medians.setdefault(model, {}).setdefault(column, {})[method] = {
            "median_loss": statistics.median(losses),
            "spread": max(losses) - min(losses),
            "seeds": len(losses),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"device": "cpu", "versions": versions(), "medians": medians, "runs": runs}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
