"""Text for the command line: the embedded Python documentation, local files or a Hub data set, cut into blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundled import python_docs_dataset
from ..errors import HessoError, nearest_name
from .inputs import TEXT_LOADERS, check_text_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PYTHON_DOCS = "python-docs"


def text_blocks(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    split: str,
    *,
    config_name: str | None = None,
    text_column: str = "text",
    max_examples: int | None = None,
    held_out_ratio: float | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Load text and cut it into blocks of `block_size` tokens with columns `input_ids` and `labels`.

    Args:
        dataset: `python-docs` (embedded), a .jsonl, .json, .txt, .csv or .parquet file, or a Hub id.
        held_out_ratio: share of the examples to hold out where the data has no split for it; None holds out none.

    Returns:
        The blocks, and the held-out ones or None.

    Raises:
        HessoError: for an unknown file type, a missing column, or fewer tokens than one block.
    """
    if dataset == PYTHON_DOCS or Path(dataset).is_file():
        allowed = ("train", "test") if dataset == PYTHON_DOCS else ("train",)
        if split not in allowed:
            raise HessoError(
                f"`split` ({split!r}): {dataset} has only {list(allowed)}; name another file to evaluate on"
            )
    if dataset == PYTHON_DOCS:
        train = python_docs_dataset(tokenizer, "test" if split == "test" else "train", block_size)
        if max_examples is not None:
            train = train.select(range(min(max_examples, len(train))))
        return train, (python_docs_dataset(tokenizer, "test", block_size) if held_out_ratio else None)
    rows = _load(dataset, config_name, split)
    if text_column not in rows.column_names:
        hint = nearest_name(text_column, rows.column_names)
        raise HessoError(f"`text_column` ({text_column!r}) isn't in {dataset}{hint}; columns: {rows.column_names}")
    if max_examples is not None:
        rows = rows.select(range(min(max_examples, len(rows))))
    if not held_out_ratio:
        return _blocks(rows, tokenizer, block_size, text_column), None
    parts = rows.train_test_split(test_size=held_out_ratio, seed=0)
    train, held_out = (_blocks(parts[name], tokenizer, block_size, text_column) for name in ("train", "test"))
    return train, held_out


def held_out_split(dataset: str) -> str:
    """Return the split to evaluate on where none is named: a file is all held out, everything else has a test split."""
    return "train" if Path(dataset).is_file() else "test"


def _load(dataset: str, config_name: str | None, split: str) -> Any:
    from datasets import load_dataset

    path = Path(dataset)
    check_text_file(dataset)
    if path.is_file():
        if path.suffix not in TEXT_LOADERS:
            raise HessoError(f"`dataset` ({dataset!r}): unknown file type; known: {sorted(TEXT_LOADERS)}")
        return load_dataset(TEXT_LOADERS[path.suffix], data_files=str(path), split="train")
    try:
        return load_dataset(dataset, config_name, split=split)
    except (OSError, ValueError) as error:  # not found, no connection, unknown configuration or split
        raise HessoError(f"`dataset` ({dataset!r}, split {split!r}) can't be loaded: {error}") from error


def _blocks(rows: Any, tokenizer: PreTrainedTokenizerBase, block_size: int, text_column: str) -> Dataset:
    """Tokenise and join in batches, so that a large data set goes through the disk and not through memory."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = [bos] if bos is not None else []
    end = [eos] if eos is not None and not start else []

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids: list[int] = []
        for text in batch[text_column]:
            ids += [*start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]
        blocks = [ids[i * block_size : (i + 1) * block_size] for i in range(len(ids) // block_size)]
        return {"input_ids": blocks, "labels": blocks}

    blocks = rows.map(cut, batched=True, batch_size=1000, remove_columns=rows.column_names)
    if len(blocks) == 0:
        raise HessoError(f"`block_size` ({block_size}) is more than the tokens of the data; lower it")
    return blocks
