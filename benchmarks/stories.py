"""TinyStories in blocks, and the training arguments that the benchmarks on stories260K share."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainingArguments

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


def load_setting(options: Namespace) -> Setting | None:
    """Read stories260K's text as a benchmark's flags say; None, and why, where the model isn't there."""
    folder, text = options.data / "models" / "stories260K", options.data / "data" / "tinystories"
    if not folder.exists():
        print(f"SKIPPED: {folder} isn't there; this benchmark needs the stories260K model and its text")
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, held_out = (load_blocks(text / f"{part}.jsonl", tokenizer) for part in ("train", "test"))
    held_out = held_out.select(range(min(options.held_out_blocks, len(held_out))))
    return Setting(folder, train, held_out, options.steps, options.learning_rate)


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
