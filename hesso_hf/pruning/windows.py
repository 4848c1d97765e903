"""Examples as the one batch that a healer reads: windows of their tokens.

Shapes: n examples, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

LONGEST = 512  # tokens of a row: a batch of 16 has as many as are worth reading
WIDEST = 4  # times the mean length: what is padded is computed too


def unreadable(examples: list[Mapping[str, Any]]) -> str:
    """Return why a healer can't work on single examples, "" where it can."""
    for example in examples:
        if "input_ids" not in example:
            return f"the examples hold {sorted(example)}, no `input_ids`"
        other = [key for key, value in example.items() if torch.is_tensor(value) and _is_signal(value)]
        if other:
            return f"the examples hold `{other[0]}`, and it gives the model tokens alone"
        mask, ids = example.get("attention_mask"), example["input_ids"]
        if mask is not None and mask.shape != ids.shape:
            return f"`attention_mask` is {tuple(mask.shape)} for `input_ids` of {tuple(ids.shape)}, not one per token"
    return ""


def _is_signal(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.dim() > 2


def padded(examples: list[Mapping[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Put the tokens of single examples, (n, T) each, into one batch that is padded on the right.

    Of a long row a window is taken, of the first row at its beginning, of the last at its end, of others between.
    """
    rows: list[torch.Tensor] = []
    for example in examples:
        ids = example["input_ids"].to(device)
        mask = example.get("attention_mask", torch.ones_like(ids)).to(device)
        rows += [row[real.bool()] for row, real in zip(ids, mask, strict=True) if bool(real.any())]
    width = min(LONGEST, math.ceil(WIDEST * sum(map(len, rows)) / max(1, len(rows))))
    for index, row in enumerate(rows):
        start = max(0, len(row) - width) * index // max(1, len(rows) - 1)
        rows[index] = row[start : start + width]
    batch = {"input_ids": rows, "attention_mask": [torch.ones_like(row) for row in rows]}
    return {name: nn.utils.rnn.pad_sequence(each, batch_first=True) for name, each in batch.items()}
