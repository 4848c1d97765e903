"""Train a model whole, with its pruned units masked to the end, and with them cut out when pruning ends: time, loss.

    python benchmarks/compaction.py [--model stories260K|small|bundled|FOLDER] [--widths 0 40] [--seeds 0 1 2]

The text is `quality.py`'s for the model. `before` and `recovery` are the median times of a step before pruning and
after it, `seconds` is the whole run, `loss` that on held-out text, in nats per token. `dense` is plain fine-tuning of
as many tokens; the other two go the same way until the cut. Where channels of the stream go (a width that is given; 0
takes the sizes that are measured), tensors take a factor at the cut, and steps of the same length are longer in
proportion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from texts import SETTINGS, SMALL, STORIES, Data, Setting, find_model, load_data, name_of
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "compaction.json"
ARMS = {"masked": "never", "compacted": "end"}


class Clock(TrainerCallback):
    """Takes the time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End, before anything is cut or saved."""
        self.seconds.append(time.perf_counter() - self._began)


def common(options: argparse.Namespace, setting: Setting, data: Data, seed: int, folder: str) -> dict[str, Any]:
    """Return what all trainers are made with."""
    transformers.set_seed(seed)
    return {
        "model": AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32),
        "args": TrainingArguments(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=setting.batch,
            learning_rate=setting.learning_rate, lr_scheduler_type="cosine", warmup_steps=2, seed=seed,
            data_seed=seed, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        ),
        "train_dataset": data.train,
        "callbacks": [Clock()],
    }  # fmt: skip


def dense_run(options: argparse.Namespace, setting: Setting, data: Data, seed: int) -> dict[str, Any]:
    """Train as the stock trainer does; return what it took and came to."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(**(made := common(options, setting, data, seed, folder)))
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    model, steps = made["model"], made["callbacks"][0].seconds
    return {
        "arm": "dense", "seed": seed, "seconds": round(seconds, 2), "recovery": round(statistics.median(steps), 4),
        "before": round(statistics.median(steps[:2]), 4), "parameters": model.num_parameters(),
        "loss": round(held_out_loss(model, data.held_out["in"], batch_size=4), 4),
    }  # fmt: skip


def one_run(
    options: argparse.Namespace, setting: Setting, data: Data, arm: str, seed: int, width: int
) -> dict[str, Any]:
    """Train in one way; return what it took and came to."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = HessoTrainer(
            **(made := common(options, setting, data, seed, folder)),
            hesso_config=HessoConfig(
                options.ratio, compact=ARMS[arm], replay_share=0.0,
                target_sizes={"hidden_size": width} if width else None,
                calibration_examples=setting.calibration_examples,
            ),
        )  # fmt: skip
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        small = trainer.pruned_model()
    process, clock = trainer.hesso_optimizer.process, made["callbacks"][0]  # type: ignore[union-attr]
    recovery = clock.seconds[process.schedule.end :]
    return {
        "width": width, "arm": arm, "seed": seed, "seconds": round(seconds, 2),
        "recovery": round(statistics.median(recovery), 4), "before": round(statistics.median(clock.seconds[:2]), 4),
        "parameters": small.num_parameters(), "trained": trainer.hesso_run.model.num_parameters(),
        "loss": round(held_out_loss(small, data.held_out["in"], batch_size=4), 4),
        "cut_error": process.state.compaction.error if process.state.compaction else None,
        "kept": process.target.sizes,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=STORIES, help="stories260K, small, bundled, or a folder")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--widths", type=int, nargs="+", default=[0, 40], help="channels of the stream that stay")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder = find_model(options.model, options.data, options.cache)
    name = name_of(options.model)
    setting = SETTINGS["stories" if name in (STORIES, SMALL) else "docs"]
    if options.learning_rate is not None:
        setting = replace(setting, learning_rate=options.learning_rate)
    data = load_data(options.folder, setting, options.data)
    runs, keys = [], ("before", "recovery", "seconds", "loss")
    for seed in options.seeds:
        runs.append({"model": name, **dense_run(options, setting, data, seed)})
        print(json.dumps(runs[-1]), flush=True)
    for width in options.widths:
        for seed in options.seeds:
            for arm in ARMS:
                runs.append({"model": name, **one_run(options, setting, data, arm, seed, width)})
                print(json.dumps(runs[-1]), flush=True)
    medians = {
        f"width {width or 'measured'}, {arm}": {
            key: statistics.median(run[key] for run in runs if (run.get("width"), run["arm"]) == (width, arm))
            for key in keys
        }
        for width in options.widths
        for arm in ARMS
    }
    medians["dense"] = {key: statistics.median(run[key] for run in runs if run["arm"] == "dense") for key in keys}
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "threads": options.threads,
        "steps": options.steps, "ratio": options.ratio, "setting": asdict(setting),
        "versions": versions(), "medians": medians, "runs": runs,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
