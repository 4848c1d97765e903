"""Perplexity by WikiText's usual protocol: all text as one, cut into windows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ..bundled import python_docs_topics
from ..errors import HessoError
from .data import PYTHON_DOCS, load_rows
from .examples import TEXT_COLUMN, Examples, Reading

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

WIKITEXT2, _WIKITEXT2_SOURCE = "wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1")


def joined_windows(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    split: str,
    *,
    config_name: str | None = None,
    text_column: str = TEXT_COLUMN,
    max_examples: int | None = None,
) -> Dataset:
    """Read all examples as one text, a blank line between them, and cut it into windows.

    The tokenizer's special tokens stand once, at the start; what is left at the end is shorter than a window and goes.

    Args:
        dataset: as in `data.text_blocks`, or `wikitext2`.
        window: tokens.

    Raises:
        HessoError: as `text_blocks`.
    """
    from datasets import Dataset

    if dataset == PYTHON_DOCS:
        texts = list(python_docs_topics("test" if split == "test" else "train").values())
    else:
        source, name = _WIKITEXT2_SOURCE if dataset == WIKITEXT2 else (dataset, config_name)
        rows, _ = load_rows(source, name, split, bounded=max_examples is not None)
        first = next(iter(rows), None)
        if first is None:
            raise HessoError(f"`dataset` ({dataset!r}) is empty: there is nothing to measure on")
        Examples.of(dataset, first, tokenizer, Reading(window, text_column, text_only=True))  # refuses what isn't text
        texts = [row[text_column] for row in itertools.islice(rows, max_examples)]
    ids = tokenizer("\n\n".join(texts[:max_examples]), verbose=False)["input_ids"]
    if len(ids) < window:
        raise HessoError(
            f"`block_size` ({window}) is more than the tokens of `dataset` ({dataset!r}, {len(ids)}); lower it"
        )
    whole = range(0, len(ids) - window + 1, window)
    return Dataset.from_dict({"input_ids": [ids[start : start + window] for start in whole]})
