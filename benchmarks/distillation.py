"""Prune half of a model with and without its original as the teacher, at equal training tokens.

    python benchmarks/distillation.py [--data ../shared] [--model stories260K|bundled] [--steps 300] [--seeds 0 1 2]

The runs differ in the loss alone: sizes, schedule, data order and steps are the same. Held-out loss is nats per token
on text that was not trained on. Every run is kept in the result file, so that an interrupted benchmark goes on where it
stopped. Without the stories260K model under --data the bundled one is taken, on the documentation that Python carries.
`--scale tiny` tries the code, not the method.
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
from stories import BATCH, BLOCK, Setting, arguments, load_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.bundled import bundled_model_path, python_docs_dataset
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "distillation.json"
RATIO = 0.5
METHODS: dict[str, dict[str, float]] = {
    "none": {},
    "0.5": {"distillation_alpha": 0.5},
    "0.9": {"distillation_alpha": 0.9},
    "1.0": {"distillation_alpha": 1.0},
    "0.9, T=2": {"distillation_alpha": 0.9, "distillation_temperature": 2.0},
}


def run(method: str, setting: Setting, seed: int) -> dict[str, Any]:
    """Train, save the smaller model, and return its held-out loss."""
    started = time.perf_counter()
    transformers.set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = HessoTrainer(
            model=model,
            args=arguments(setting, seed, folder),
            train_dataset=setting.train,
            hesso_config=HessoConfig(pruning_ratio=RATIO, replay_share=0.0, **METHODS[method]),  # type: ignore[arg-type]
        )
        trainer.train()
        trainer.save_model(f"{folder}/small")
        small = AutoModelForCausalLM.from_pretrained(f"{folder}/small")
    return {
        "method": method,
        "seed": seed,
        "learning_rate": setting.learning_rate,
        "loss": held_out_loss(small, setting.held_out),
        "parameters": sum(parameter.numel() for parameter in small.parameters()),
        "sizes": trainer.hesso_plan.target.sizes,
        "tokens": setting.steps * BATCH * BLOCK,
        "seconds": round(time.perf_counter() - started, 1),
    }


def load(options: argparse.Namespace) -> tuple[str, Setting]:
    """Return the model's name and the setting: stories260K where it is there, else the bundled model."""
    folder = options.data / "models" / "stories260K"
    name = options.model or ("stories260K" if folder.exists() else "bundled")
    if name == "bundled":
        folder = bundled_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "bundled":
        block = 32 if options.scale == "tiny" else BLOCK
        train, held_out = (python_docs_dataset(tokenizer, split, block) for split in ("train", "test"))
    else:
        stories = options.data / "data" / "tinystories"
        train, held_out = (load_blocks(stories / f"{split}.jsonl", tokenizer) for split in ("train", "test"))
    if options.scale == "tiny":
        train = train.select(range(min(16, len(train))))
    held_out = held_out.select(range(min(2 if options.scale == "tiny" else options.held_out_blocks, len(held_out))))
    return name, Setting(folder, train, held_out, options.steps, options.learning_rate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--model", choices=["stories260K", "bundled"], help="stories260K where it is under --data")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="alpha, temperature")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--held-out-blocks", type=int, default=400)
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.scale == "tiny":
        options.steps = min(options.steps, 8)
    name, setting = load(options)
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    entry = result.setdefault(name, {"runs": []})
    if "original_loss" not in entry:
        model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
        entry["original_loss"] = held_out_loss(model, setting.held_out)
    for seed in options.seeds:
        for method in options.methods:
            key = (method, seed, setting.learning_rate, setting.steps * BATCH * BLOCK)
            if any((r["method"], r["seed"], r["learning_rate"], r["tokens"]) == key for r in entry["runs"]):
                continue
            entry["runs"].append(run(method, setting, seed))
            print(json.dumps(entry["runs"][-1]), flush=True)
            write(options.output, result, name)
    return 0


def write(path: Path, result: dict[str, Any], name: str) -> None:
    """Write all runs and, for the setting of the last one, the medians over seeds."""
    entry = result[name]
    alike = [r for r in entry["runs"] if all(r[key] == entry["runs"][-1][key] for key in ("learning_rate", "tokens"))]
    entry["medians"] = {}
    for method in METHODS:
        losses = [r["loss"] for r in alike if r["method"] == method]
        if losses:
            spread = max(losses) - min(losses)
            entry["medians"][method] = {"loss": statistics.median(losses), "spread": spread, "seeds": len(losses)}
    entry |= {"device": "cpu", "versions": versions(), "ratio": RATIO}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
