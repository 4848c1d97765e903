"""Prune a real language model (stories260K) at 20, 30 and 50% and compare with baselines at equal training tokens.

    python benchmarks/stories.py [--data ../shared] [--steps 300] [--seeds 0 1 2]

For each ratio: HESSO with its defaults; one-shot cuts by magnitude and by first-order Taylor at step 8, fine-tuned for
the rest; the small shape trained from scratch. All train on the same number of tokens with the same schedule, and the
cut models have the same sizes; the dense model is fine-tuned too. Held-out loss is nats per token on text that was not
trained on. Every run is kept in the result file, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.report import versions
from hesso_hf.hf_models.resize import resized_config

RESULTS = Path(__file__).parent / "results" / "stories.json"
BLOCK, BATCH = 256, 8


@dataclass(frozen=True)
class Setting:
    """Everything a run needs beside its method."""

    model: Path
    train: Dataset
    held_out: Dataset
    steps: int
    learning_rate: float


def load_blocks(path: Path, tokenizer: Any, block: int = BLOCK) -> Dataset:
    """Read stories, each after `<s>`, and cut the stream into blocks of so many tokens."""
    ids: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    blocks = [ids[i * block : (i + 1) * block] for i in range(len(ids) // block)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def arguments(setting: Setting, seed: int, folder: str) -> TrainingArguments:
    """Training arguments that all methods share."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=setting.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=setting.steps // 30,
        seed=seed,
        data_seed=seed,
        logging_steps=setting.steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def run(method: str, setting: Setting, seed: int, ratio: float | None, sizes: dict[str, int] | None) -> dict[str, Any]:
    """Train once; return the held-out loss, parameters and sizes."""
    started = time.perf_counter()
    transformers.set_seed(seed)
    config = AutoConfig.from_pretrained(setting.model)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(setting, seed, folder)
        if method == "scratch":
            assert sizes is not None
            model = AutoModelForCausalLM.from_config(resized_config(config, sizes), dtype=torch.float32)
            Trainer(model=model, args=args, train_dataset=setting.train).train()
        elif method == "dense":
            model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
            Trainer(model=model, args=args, train_dataset=setting.train).train()
        else:
            model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
            trainer = HessoTrainer(
                model=model, args=args, train_dataset=setting.train, hesso_config=hesso(method, ratio, sizes)
            )
            trainer.train()
            trainer.save_model(f"{folder}/small")
            sizes = trainer.hesso_plan.target.sizes
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/small")
    return {
        "method": method,
        "ratio": ratio,
        "seed": seed,
        "learning_rate": setting.learning_rate,
        "loss": held_out_loss(model, setting.held_out),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sizes": sizes,
        "tokens": setting.steps * BATCH * BLOCK,
        "seconds": round(time.perf_counter() - started, 1),
    }


def hesso(method: str, ratio: float | None, sizes: dict[str, int] | None) -> HessoConfig:
    """Return HESSO's defaults, or a one-shot cut at the first step to the sizes that HESSO chose."""
    if method == "hesso":
        return HessoConfig(pruning_ratio=ratio)
    saliency = {"one_shot_magnitude": "magnitude", "one_shot_taylor": "taylor_first_order"}[method]
    return HessoConfig(target_sizes=sizes, saliency=saliency, warmup_steps=8, pruning_steps=1, pruning_periods=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--held-out-blocks", type=int, default=400)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = options.data / "models" / "stories260K"
    if not model.exists():
        print(f"SKIPPED: {model} isn't there; this benchmark needs the stories260K model and the TinyStories text")
        return 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    stories = options.data / "data" / "tinystories"
    held_out = load_blocks(stories / "test.jsonl", tokenizer)
    held_out = held_out.select(range(min(options.held_out_blocks, len(held_out))))
    train = load_blocks(stories / "train.jsonl", tokenizer)
    setting = Setting(model, train, held_out, options.steps, options.learning_rate)
    runs = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    original = held_out_loss(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), held_out)
    for seed in options.seeds:
        for ratio, method in plan(options.ratios):
            key = (method, ratio, seed, setting.learning_rate, setting.steps * BATCH * BLOCK)
            if any((r["method"], r["ratio"], r["seed"], r["learning_rate"], r["tokens"]) == key for r in runs):
                continue
            sizes = next(
                (r["sizes"] for r in runs if (r["method"], r["ratio"], r["seed"]) == ("hesso", ratio, seed)), None
            )
            runs.append(run(method, setting, seed, ratio, sizes))
            print(json.dumps(runs[-1]), flush=True)
            write(options.output, original, runs)
    write(options.output, original, runs)
    return 0


def plan(ratios: list[float]) -> list[tuple[float | None, str]]:
    """List (ratio, method); HESSO first, since the others take its sizes."""
    methods = ("hesso", "one_shot_magnitude", "one_shot_taylor", "scratch")
    return [(None, "dense"), *((ratio, method) for ratio in sorted(ratios, reverse=True) for method in methods)]


def write(path: Path, original: float, runs: list[dict[str, Any]]) -> None:
    """Write all runs and the medians over seeds."""
    medians: dict[str, dict[str, Any]] = {}
    alike = [r for r in runs if all(r[key] == runs[-1][key] for key in ("learning_rate", "tokens"))]
    for ratio, method in {(r["ratio"], r["method"]) for r in alike}:
        losses = [r["loss"] for r in alike if (r["ratio"], r["method"]) == (ratio, method)]
        parameters = {r["parameters"] for r in alike if (r["ratio"], r["method"]) == (ratio, method)}
        medians.setdefault(str(ratio), {})[method] = {
            "median_loss": statistics.median(losses),
            "spread": max(losses) - min(losses),
            "seeds": len(losses),
            "parameters": sorted(parameters),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "model": "stories260K",
        "device": "cpu",
        "original_loss": original,
        "versions": versions(),
        "medians": {key: dict(sorted(medians[key].items())) for key in sorted(medians)},
        "runs": runs,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
