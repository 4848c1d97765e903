"""Models of several sizes from one run: what those saved on the way, and the last one, lose against runs of their own.

    python benchmarks/ladder.py [--data ../shared] [--steps 100] [--seeds 0 1]

stories260K is pruned to a half by HESSO's defaults, without replay, with models saved on the way after some recovery
each, and measured on held-out stories (nats per token). Beside each stands a run of its own to the same share, once of
as many steps as had been made when the model was saved, and once of all the ladder's steps. Every run is kept in the
result file, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from stories import BATCH, BLOCK, Setting, arguments, load_setting
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "ladder.json"
SHARES, LAST = (0.2, 0.35), 0.5
RECOVERIES = (0.0, 0.1, 0.2)


def pruned(setting: Setting, seed: int, **hesso: Any) -> dict[str, dict[str, float]]:
    """Prune once; return steps and held-out loss of each model that is saved, by its share."""
    transformers.set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = HessoTrainer(
            model=AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32),
            args=arguments(setting, seed, folder),
            train_dataset=setting.train,
            hesso_config=HessoConfig(replay_share=0.0, **hesso),
        )
        trainer.train()
        trainer.save_model(f"{folder}/small")
        saves = trainer.hesso_optimizer.process.schedule.rung_saves
        folders = {f"{share:g}": path for share, path in trainer.hesso_run.ladder.folders.items()}
        folders[f"{hesso['pruning_ratio']:g}"] = Path(folder) / "small"
        return {
            share: {"steps": steps, "loss": loss_of(path, setting)}
            for (share, path), steps in zip(folders.items(), (*saves, setting.steps), strict=True)
        }


def loss_of(folder: Path, setting: Setting) -> float:
    """Return a saved model's held-out loss."""
    return round(held_out_loss(AutoModelForCausalLM.from_pretrained(folder), setting.held_out), 4)


def climb(setting: Setting, seed: int, recovery: float) -> dict[str, Any]:
    """Return what a ladder's models reach, and runs of their own of as many steps."""
    ladder = pruned(setting, seed, pruning_ratio=LAST, export_at=list(SHARES), ladder_recovery=recovery)
    own = {}
    for share, found in ladder.items():
        if found["steps"] < setting.steps:
            own[share] = pruned(replace(setting, steps=int(found["steps"])), seed, pruning_ratio=float(share))[share]
    return {"recovery": recovery, "ladder": ladder, "of as many steps": own}


def main() -> int:
    options = parse()
    setting = load_setting(options)
    if setting is None:
        return 0
    result = json.loads(options.output.read_text()) if options.output.exists() else {"runs": []}
    done = {(entry["seed"], entry["recovery"], entry["steps"]) for entry in result["runs"]}
    for seed in options.seeds:
        for recovery in (None, *options.recoveries):
            if (seed, recovery, options.steps) in done:
                continue
            started = time.perf_counter()
            found = climb(setting, seed, recovery) if recovery is not None else alone(setting, seed)
            found |= {"seed": seed, "steps": options.steps, "seconds": round(time.perf_counter() - started, 1)}
            result["runs"].append(found)
            print(json.dumps(found), flush=True)
            write(options.output, result["runs"], options.learning_rate)
    return 0


def alone(setting: Setting, seed: int) -> dict[str, Any]:
    """Return what runs of their own reach with all the steps."""
    own = {f"{share:g}": pruned(setting, seed, pruning_ratio=share)[f"{share:g}"] for share in (*SHARES, LAST)}
    return {"recovery": None, "of all steps": own}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--recoveries", type=float, nargs="+", default=list(RECOVERIES))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out-blocks", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def write(path: Path, runs: list[dict[str, Any]], learning_rate: float) -> None:
    """Write all runs and the medians over seeds: by recovery, share and which run, loss and steps."""
    found: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for run in runs:
        name = "runs of their own" if run["recovery"] is None else f"recovery {run['recovery']:g}"
        for kind in ("ladder", "of as many steps", "of all steps"):
            for share, entry in run.get(kind, {}).items():
                rows = found.setdefault(name, {}).setdefault(share, {}).setdefault(kind, [])
                rows.append((entry["loss"], entry["steps"]))
    medians = {
        name: {
            share: {
                kind: {"loss": round(statistics.median(loss for loss, _ in rows), 4), "steps": rows[0][1],
                       "seeds": len(rows)}
                for kind, rows in kinds.items()
            }
            for share, kinds in shares.items()
        }
        for name, shares in found.items()
    }  # fmt: skip
    head = {
        "device": "cpu", "versions": versions(), "tokens_a_step": BATCH * BLOCK, "learning_rate": learning_rate,
        "medians": medians,
    }  # fmt: skip
    path.write_text(json.dumps(head | {"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
