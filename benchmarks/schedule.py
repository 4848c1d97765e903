"""When units go: pruning periods, their length, recovery between them, and the learning rate, at equal training tokens.

    python benchmarks/schedule.py [--data ../shared] [--steps 100] [--seeds 0 1] [--ratios 0.3 0.5 0.7]

stories260K is pruned by HESSO's defaults with each schedule, without replay, and measured on held-out stories
(nats per token). Shares are of the run. Every run is kept in the result file, so that an interrupted benchmark goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from stories import BATCH, BLOCK, Setting, arguments, load_setting
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.report import versions
from hesso_hf.pruning.schedule import Schedule, resolve_schedule

RESULTS = Path(__file__).parent / "results" / "schedule.json"
KEY = ("schedule", "ratio", "seed", "steps")
SCHEDULES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "at once": {"pruning_steps": 1, "pruning_periods": 1},
    "one period": {"pruning_periods": 1},
    "six periods": {"pruning_periods": 6},
    "until a fifth, three periods": {"pruning_steps": 0.18},
    "until a fifth, six periods": {"pruning_steps": 0.18, "pruning_periods": 6},
    "from a tenth for a quarter, ten periods": {"warmup_steps": 0.1, "pruning_steps": 0.25, "pruning_periods": 10},
    "until a half, five periods": {"pruning_steps": 0.48, "pruning_periods": 5},
    "learning rate warmed up after each period": {},
}
REWARMED = "learning rate warmed up after each period"


class Rewarming(HessoTrainer):
    """Warms the learning rate up anew after each pruning period, over as many steps as the run's warm-up."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Multiply the run's schedule by ramps that begin where a period ends."""
        stock = super().create_scheduler(num_training_steps, optimizer)
        assert isinstance(stock, LambdaLR)
        schedule, ramp = resolve_schedule(self.hesso_config, num_training_steps), max(1, self.args.warmup_steps)
        factors = [lambda step, plain=plain: plain(step) * rewarmed(schedule, step, ramp) for plain in stock.lr_lambdas]
        stock.lr_lambdas = factors
        return stock


def rewarmed(schedule: Schedule, step: int, ramp: float) -> float:
    """Return what the learning rate is multiplied by at a step: it grows from 0 to 1 after a period's end."""
    since = [step - period.end for period in schedule.periods if step >= period.end]
    return min(1.0, (min(since) + 1) / ramp) if since else 1.0


def run(name: str, ratio: float, setting: Setting, seed: int) -> dict[str, Any]:
    """Prune once; return the held-out loss."""
    started = time.perf_counter()
    transformers.set_seed(seed)
    trainer_class = Rewarming if name == REWARMED else HessoTrainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32),
            args=arguments(setting, seed, folder),
            train_dataset=setting.train,
            hesso_config=HessoConfig(pruning_ratio=ratio, replay_share=0.0, **SCHEDULES[name]),
        )
        trainer.train()
        trainer.save_model(f"{folder}/small")
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/small")
    found = {"schedule": name, "ratio": ratio, "seed": seed, "steps": setting.steps}
    found |= {"loss": round(held_out_loss(model, setting.held_out), 4), "sizes": trainer.hesso_plan.target.sizes}
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def main() -> int:
    options = parse()
    setting = load_setting(options)
    if setting is None:
        return 0
    result = json.loads(options.output.read_text()) if options.output.exists() else {"runs": []}
    for seed in options.seeds:
        for ratio in options.ratios:
            for name in options.schedules:
                key = (name, ratio, seed, options.steps)
                if any(tuple(entry[part] for part in KEY) == key for entry in result["runs"]):
                    continue
                result["runs"].append(run(name, ratio, setting, seed))
                print(json.dumps(result["runs"][-1]), flush=True)
                write(options.output, result["runs"], options.learning_rate)
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out-blocks", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def write(path: Path, runs: list[dict[str, Any]], learning_rate: float) -> None:
    """Write all runs and the medians over seeds."""
    medians: dict[str, Any] = {}
    for key in sorted({(entry["ratio"], entry["steps"], entry["schedule"]) for entry in runs}):
        alike = [entry["loss"] for entry in runs if (entry["ratio"], entry["steps"], entry["schedule"]) == key]
        name = f"{key[0]:.0%} removed, {key[1]} steps, {key[2]}"
        medians[name] = {"loss": round(statistics.median(alike), 4), "seeds": len(alike)}
    head = {
        "device": "cpu", "versions": versions(), "tokens_a_step": BATCH * BLOCK, "learning_rate": learning_rate,
        "medians": medians,
    }  # fmt: skip
    path.write_text(json.dumps(head | {"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
