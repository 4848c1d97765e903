"""Perplexity by WikiText's usual protocol: all text as one, cut into windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..bundled import python_docs_topics
from ..errors import HessoError
from .data import PYTHON_DOCS, load_rows, unreadable
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
        if max_examples is not None:
            rows = _first(rows, max_examples, dataset, split)
        if len(rows) == 0:
            raise HessoError(f"`dataset` ({dataset!r}) is empty: there is nothing to measure on")
        Examples.of(dataset, rows[0], tokenizer, Reading(window, text_column, text_only=True))  # refuses others
        texts = rows[text_column][:]
    ids = tokenizer("\n\n".join(texts[:max_examples]), verbose=False)["input_ids"]
    if len(ids) < window:
        raise HessoError(
            f"`block_size` ({window}) is more than the tokens of `dataset` ({dataset!r}, {len(ids)}); lower it"
        )
    whole = range(0, len(ids) - window + 1, window)
    return Dataset.from_dict({"input_ids": [ids[start : start + window] for start in whole]})


def _first(rows: Iterable[Any], count: int, dataset: str, split: str) -> Dataset:
    """Read the first rows of a stream.

    Raises:
        HessoError: where it breaks off.
    """
    from datasets import Dataset

    try:
        return Dataset.from_list(list(itertools.islice(rows, count)))
    except Exception as error:  # no connection, broken lines: of many types
        raise unreadable(dataset, split, error) from error
