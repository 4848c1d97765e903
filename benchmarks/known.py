"""Whether language models know a text: by how much their loss on it lies above what they expect it to be.

    python benchmarks/known.py [--data ../shared] [--models small stories260K smollm2 bundled]

By this `distillation_alpha="auto"` decides whether the base model teaches the user's data, with as many tokens
(`surprise` in `hesso_hf/trainer/divergence.py`). The texts are those of `quality.py`: what a model is trained on there,
and the other text; SmolLM2 reads stories too. Losses are nats per token.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from texts import SETTINGS, SMALL, STORIES, Data, find_model, load_data, name_of
from transformers import AutoModelForCausalLM

from hesso_hf.export.report import versions
from hesso_hf.trainer.divergence import IGNORED, surprise
from hesso_hf.trainer.knowledge import KNOWN, KNOWN_TOKENS
from hesso_hf.trainer.teacher import Teacher

RESULTS = Path(__file__).parent / "results" / "known.json"
LONGEST = 512  # tokens of a window
CACHE = Path(__file__).parent / ".cache"
TEXTS = {SMALL: ("stories",), STORIES: ("stories",), "smollm2": ("docs", "stories"), "bundled": ("docs",)}


def batches(blocks: Dataset, longest: int) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Return so many blocks, as inputs with their targets."""
    found, tokens = [], 0
    for block in blocks:
        ids = torch.tensor([block["input_ids"][:longest]])
        found.append(({"input_ids": ids}, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)))
        tokens += ids.numel()
        if tokens >= KNOWN_TOKENS:
            break
    return found


def measured(teacher: Teacher, blocks: Dataset) -> dict[str, float]:
    """Return the loss, and how far it lies above the entropy of what is predicted."""
    rows = batches(blocks, LONGEST)
    total, counted = 0.0, 0
    with torch.no_grad(), teacher.whole() as model:
        for inputs, targets in rows:
            logits = model(**inputs).logits
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            counted += int((targets != IGNORED).sum())
    return {"loss": round(total / counted, 3), "surprise": round(surprise(teacher, rows), 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = []
    for name in options.models:
        folder = find_model(name, options.data, options.cache)
        teacher = Teacher(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        for text in TEXTS[name]:
            data: Data = load_data(folder, SETTINGS[text], options.data)
            parts = {"train": data.train, "in": data.held_out["in"], "out": data.held_out["out"]}
            found = {part: measured(teacher, blocks) for part, blocks in parts.items()}
            runs.append({"model": name_of(name), "text": text, **found})
            print(runs[-1], flush=True)
    result = {"versions": versions(), "known": KNOWN, "tokens": KNOWN_TOKENS, "runs": runs}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
