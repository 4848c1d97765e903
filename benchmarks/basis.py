"""Pruning in the given basis of the stream against the principal one, at equal training tokens.

    python benchmarks/basis.py [--data ../shared] [--steps 100] [--seeds 0 1 2] [--models tied untied]

stories260K (tied embeddings; `untied` gives its output matrix a tensor of its own first) is pruned by HESSO's defaults
with each `stream_basis`, without replay. Held-out loss in nats per token: `in` on stories like those trained on, `out`
on Shakespeare, which neither saw. Every run is kept in the result file, so that an interrupted benchmark goes on where
it stopped.
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
from datasets import Dataset
from stories import BATCH, BLOCK, Setting, arguments, load_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "basis.json"
KEY = ("model", "basis", "ratio", "seed", "steps")


def load(folder: Path, kind: str) -> PreTrainedModel:
    """Load stories260K, its output matrix apart from the embedding where `kind` is untied."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "tied":
        return model
    config = type(model.config)(**(model.config.to_dict() | {"tie_word_embeddings": False}))
    untied = type(model)(config)
    weights = dict(model.state_dict())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    untied.load_state_dict(weights)
    return untied


def run(kind: str, basis: str, ratio: float, setting: Setting, seed: int, other: Dataset) -> dict[str, Any]:
    """Prune once; return both held-out losses."""
    started = time.perf_counter()
    transformers.set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = HessoTrainer(
            model=load(setting.model, kind),
            args=arguments(setting, seed, folder),
            train_dataset=setting.train,
            hesso_config=HessoConfig(pruning_ratio=ratio, stream_basis=basis, replay_share=0.0),
        )
        trainer.train()
        trainer.save_model(f"{folder}/small")
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/small")
    record = trainer.hesso_run.record()["stream_basis"]
    return {
        "model": kind,
        "basis": basis,
        "ratio": ratio,
        "seed": seed,
        "steps": setting.steps,
        "in": held_out_loss(model, setting.held_out),
        "out": held_out_loss(model, other),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sizes": trainer.hesso_plan.target.sizes,
        "turned": record,
        "seconds": round(time.perf_counter() - started, 1),
    }


def shakespeare(path: Path, tokenizer: Any, blocks: int) -> Dataset:
    """Cut the text into blocks of tokens."""
    ids = tokenizer(path.read_text(encoding="utf-8")[: 6 * blocks * BLOCK], add_special_tokens=False, verbose=False)
    found = ids["input_ids"]
    cut = [[tokenizer.bos_token_id, *found[i * (BLOCK - 1) : (i + 1) * (BLOCK - 1)]] for i in range(blocks)]
    return Dataset.from_dict({"input_ids": cut, "labels": cut})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--models", nargs="+", default=["tied", "untied"])
    parser.add_argument("--bases", nargs="+", default=["given", "principal"])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out-blocks", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = options.data / "models" / "stories260K"
    if not folder.exists():
        print(f"SKIPPED: {folder} isn't there; this benchmark needs the stories260K model and its text")
        return 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = load_blocks(options.data / "data" / "tinystories" / "test.jsonl", tokenizer)
    held_out = held_out.select(range(min(options.held_out_blocks, len(held_out))))
    train = load_blocks(options.data / "data" / "tinystories" / "train.jsonl", tokenizer)
    other = shakespeare(options.data / "data" / "tinyshakespeare.txt", tokenizer, options.held_out_blocks)
    setting = Setting(folder, train, held_out, options.steps, options.learning_rate)
    result = json.loads(options.output.read_text()) if options.output.exists() else {"runs": []}
    dense = load(folder, "tied")
    result["original"] = {"in": held_out_loss(dense, held_out), "out": held_out_loss(dense, other)}
    for seed in options.seeds:
        for kind in options.models:
            for ratio in options.ratios:
                for basis in options.bases:
                    key = (kind, basis, ratio, seed, options.steps)
                    if any(tuple(entry[name] for name in KEY) == key for entry in result["runs"]):
                        continue
                    result["runs"].append(run(kind, basis, ratio, setting, seed, other))
                    print(json.dumps(result["runs"][-1]), flush=True)
                    write(options.output, result, options.learning_rate)
    write(options.output, result, options.learning_rate)
    return 0


def write(path: Path, result: dict[str, Any], learning_rate: float) -> None:
    """Write all runs and the medians over seeds."""
    medians: dict[str, Any] = {}
    for key in sorted({(r["model"], r["ratio"], r["steps"], r["basis"]) for r in result["runs"]}):
        alike = [r for r in result["runs"] if (r["model"], r["ratio"], r["steps"], r["basis"]) == key]
        name = f"{key[0]}, {key[1]:.0%} removed, {key[2]} steps, {key[3]}"
        medians[name] = {side: round(statistics.median(r[side] for r in alike), 4) for side in ("in", "out")}
        medians[name]["seeds"] = len(alike)
        medians[name]["turned"] = sum(r["turned"] is not None for r in alike)
    head = {
        "device": "cpu", "versions": versions(), "tokens_a_step": BATCH * BLOCK, "learning_rate": learning_rate,
        "medians": medians,
    }  # fmt: skip
    path.write_text(json.dumps(head | {"original": result["original"], "runs": result["runs"]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
