"""What pruning during a fine-tuning forgets, and what replay keeps, at equal training tokens.

    python benchmarks/replay.py [--data ../shared] [--steps 100] [--seeds 0 1] [--ratios 0.5]

`unknown`: stories260K, which knows TinyStories, learns Shakespeare; `known`: the same model after it learnt both, on
TinyStories. Held-out loss in nats per token: `in` on text like that trained on, `out` on the other text, which the base
model knew. Replay takes the place of user tokens: a share of 0.25 leaves six of a batch's eight blocks. `dense` is the
model fine-tuned without pruning. Every run is kept in the result file, so that an interrupted benchmark goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, concatenate_datasets
from stories import BATCH, BLOCK, Setting, arguments, load_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "replay.json"
KEY = ("domain", "arm", "ratio", "seed", "steps")
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "magnitude": {"saliency": "magnitude"},
    "distillation 0.9": {"distillation_alpha": 0.9},
    "healing": {"healing": "auto"},
    "healing, taylor": {"healing": "auto", "saliency": "taylor_second_order"},
    "share 0.25": {"replay_share": 0.25},
    "healing, share 0.125": {"healing": "auto", "replay_share": 0.125},
    "healing, share 0.25": {"healing": "auto", "replay_share": 0.25},  # the default
    "healing, share 0.5": {"healing": "auto", "replay_share": 0.5},
    "healing, share 0.25, distillation 0.9": {"healing": "auto", "replay_share": 0.25, "distillation_alpha": 0.9},
    "healing, share 0.25, principal": {"healing": "auto", "replay_share": 0.25, "stream_basis": "principal"},
}
ALONE = {"stream_basis": "given", "healing": "off", "replay_share": 0.0}
BOTH_STEPS = 1200


@dataclass(frozen=True)
class Domain:
    """A base model, text to train it on, held-out text like that, and held-out text that it knew."""

    model: Path
    train: Dataset
    held_out: Dataset
    other: Dataset


def shakespeare(path: Path, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Cut the plays into blocks to train on and, from the last tenth, held-out ones."""
    text = path.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = BLOCK - 1
    blocks = [[tokenizer.bos_token_id, *ids[start : start + size]] for start in range(0, len(ids) - size, size)]
    edge = len(blocks) * 9 // 10
    first, last = blocks[:edge], blocks[edge:]
    return tuple(Dataset.from_dict({"input_ids": part, "labels": part}) for part in (first, last))  # type: ignore[return-value]


def base_of_both(setting: Setting, plays: Dataset, folder: Path) -> Path:
    """Train stories260K on both kinds of text, once; a base model that knows them."""
    if not folder.exists():
        transformers.set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
        alike = setting.train.select(range(min(len(plays), len(setting.train))))
        mixed = concatenate_datasets([alike, plays]).shuffle(seed=0)
        setting = replace(setting, steps=BOTH_STEPS, learning_rate=2e-3)
        with tempfile.TemporaryDirectory() as scratch:
            Trainer(model=model, args=arguments(setting, 0, scratch), train_dataset=mixed).train()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(setting.model).save_pretrained(folder)
    return folder


def run(domain: Domain, arm: str, ratio: float, seed: int, steps: int, learning_rate: float) -> dict[str, Any]:
    """Train once; return both held-out losses."""
    started = time.perf_counter()
    transformers.set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(domain.model, dtype=torch.float32)
    setting = Setting(domain.model, domain.train, domain.held_out, steps, learning_rate)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(setting, seed, folder)
        if arm == "dense":
            Trainer(model=model, args=args, train_dataset=domain.train).train()
        else:
            args.per_device_train_batch_size = round(BATCH * (1 - ARMS[arm].get("replay_share", 0.0)))
            tokenizer = AutoTokenizer.from_pretrained(domain.model)
            trainer = HessoTrainer(
                model=model, args=args, train_dataset=domain.train, processing_class=tokenizer,
                hesso_config=HessoConfig(pruning_ratio=ratio, **(ALONE | ARMS[arm])),
            )  # fmt: skip
            trainer.train()
            trainer.save_model(f"{folder}/small")
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/small")
    return {
        "arm": arm,
        "ratio": ratio,
        "seed": seed,
        "steps": steps,
        "in": round(held_out_loss(model, domain.held_out), 4),
        "out": round(held_out_loss(model, domain.other), 4),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache", help="for the model of both")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5])
    parser.add_argument("--domains", nargs="+", default=["unknown", "known"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out-blocks", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = options.data / "models" / "stories260K"
    if not folder.exists():
        print(f"SKIPPED: {folder} isn't there; this benchmark needs the stories260K model and its text")
        return 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = options.data / "data" / "tinystories"
    stories, held_out = (load_blocks(text / f"{name}.jsonl", tokenizer) for name in ("train", "test"))
    held_out = held_out.select(range(min(options.held_out_blocks, len(held_out))))
    plays, held_plays = shakespeare(options.data / "data" / "tinyshakespeare.txt", tokenizer)
    held_plays = held_plays.select(range(min(options.held_out_blocks, len(held_plays))))
    setting = Setting(folder, stories, held_out, options.steps, options.learning_rate)
    result = json.loads(options.output.read_text()) if options.output.exists() else {"runs": [], "base": {}}
    domains = {"unknown": Domain(folder, plays, held_plays, held_out)}
    if "known" in options.domains:
        both = base_of_both(setting, plays, options.cache / "both")
        domains["known"] = Domain(both, stories, held_out, held_plays)
    for name, domain in domains.items():
        if name not in result["base"]:
            model = AutoModelForCausalLM.from_pretrained(domain.model, dtype=torch.float32)
            losses = {"in": held_out_loss(model, domain.held_out), "out": held_out_loss(model, domain.other)}
            result["base"][name] = {side: round(loss, 4) for side, loss in losses.items()}
    for seed in options.seeds:
        for name in options.domains:
            arms = [("dense", 0.0)] + [(arm, ratio) for ratio in options.ratios for arm in options.arms]
            for arm, ratio in arms:
                key = (name, arm, ratio, seed, options.steps)
                if any(tuple(entry[part] for part in KEY) == key for entry in result["runs"]):
                    continue
                found = run(domains[name], arm, ratio, seed, options.steps, options.learning_rate)
                result["runs"].append({"domain": name} | found)
                print(json.dumps(result["runs"][-1]), flush=True)
                write(options.output, result, options.learning_rate)
    write(options.output, result, options.learning_rate)
    return 0


def write(path: Path, result: dict[str, Any], learning_rate: float) -> None:
    """Write all runs and the medians over seeds."""
    medians: dict[str, Any] = {}
    parts = ("domain", "ratio", "steps", "arm")
    for key in sorted({tuple(entry[part] for part in parts) for entry in result["runs"]}):
        alike = [entry for entry in result["runs"] if tuple(entry[part] for part in parts) == key]
        name = f"{key[0]}, {key[1]:.0%} removed, {key[2]} steps, {key[3]}"
        medians[name] = {side: round(statistics.median(entry[side] for entry in alike), 4) for side in ("in", "out")}
        medians[name]["seeds"] = len(alike)
    head = {
        "device": "cpu", "versions": versions(), "tokens_a_step": BATCH * BLOCK, "learning_rate": learning_rate,
        "base": result["base"], "medians": medians,
    }  # fmt: skip
    path.write_text(json.dumps(head | {"runs": result["runs"]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
