"""What a command is given: a model's name, and text (Python's documentation, a file, a Hub data set) cut into blocks.

Names are checked without a framework, so that a mistake is answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundled import python_docs_dataset, python_docs_topics, resolve_model
from ..errors import HessoError, nearest_name

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PYTHON_DOCS = "python-docs"
WIKITEXT2, _WIKITEXT2_SOURCE = (
    "wikitext2",
    ("Salesforce/wikitext", "wikitext-2-raw-v1"),
)  # read as `joined_windows` does
TEXT_LOADERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}


def model_source(name: str) -> str:
    """Return what `from_pretrained` takes: the bundled model's folder for `bundled`, all else as it is.

    Raises:
        HessoError: for a path, which a Hub id can't be, that doesn't exist.
    """
    is_path = name.startswith(("/", ".", "~")) or name.endswith(".json") or name.count("/") > 1
    if is_path and not Path(name).exists():
        raise HessoError(f"no model config found at {name!r}: there is no such file or folder")
    return resolve_model(name)


def check_text_file(dataset: str) -> None:
    """Refuse a text file that doesn't exist.

    Raises:
        HessoError: naming it.
    """
    if Path(dataset).suffix in TEXT_LOADERS and not Path(dataset).exists():
        raise HessoError(f"`dataset` ({dataset!r}): no such file")


def block_size_within(wanted: int | None, default: int, configs: Mapping[str, Any]) -> int:
    """Return the tokens of a block, which every model's context must hold.

    Args:
        wanted: as many; by default those of the shortest context, and at most `default`.
        configs: of each model, by what a message calls it.

    Raises:
        HessoError: naming the model whose context is shorter than what is wanted.
    """
    contexts = {
        name: getattr(config.get_text_config(), "max_position_embeddings", None) for name, config in configs.items()
    }
    for name, context in contexts.items():
        if wanted is not None and context is not None and wanted > context:
            raise HessoError(
                f"`block_size` ({wanted}) is longer than the context of {name} ({context} tokens, its config's "
                "`max_position_embeddings`); lower it"
            )
    return wanted or min(default, *[context or default for context in contexts.values()])


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
    embedded = dataset == PYTHON_DOCS
    if embedded or Path(dataset).is_file():
        allowed = ("train", "test") if embedded else ("train",)
        if split not in allowed:
            raise HessoError(
                f"`split` ({split!r}): {dataset} has only {list(allowed)}; name another file to evaluate on"
            )
    if embedded:
        rows = python_docs_dataset(tokenizer, "test" if split == "test" else "train", block_size)
    else:
        rows = _load(dataset, config_name, split)
        _check_text(rows, dataset, text_column)
    if max_examples is not None:
        rows = rows.select(range(min(max_examples, len(rows))))
    if embedded:
        return rows, (python_docs_dataset(tokenizer, "test", block_size) if held_out_ratio else None)
    if not held_out_ratio:
        return _blocks(rows, tokenizer, block_size, text_column), None
    if len(rows) < 2:
        raise HessoError(f"`dataset` ({dataset!r}) has one example, of which none can be held out: give `eval_dataset`")
    parts = rows.train_test_split(test_size=held_out_ratio, seed=0)
    train, held_out = (_blocks(parts[name], tokenizer, block_size, text_column) for name in ("train", "test"))
    return train, held_out


def joined_windows(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    split: str,
    *,
    config_name: str | None = None,
    text_column: str = "text",
    max_examples: int | None = None,
) -> Dataset:
    """Read all examples as one text, a blank line between them, and cut it into windows: WikiText's usual protocol.

    The tokenizer's special tokens stand once, at the start; what is left at the end is shorter than a window and goes.

    Args:
        dataset: as in `text_blocks`, or `wikitext2`.
        window: tokens.

    Raises:
        HessoError: as `text_blocks`.
    """
    from datasets import Dataset

    if dataset == PYTHON_DOCS:
        texts = list(python_docs_topics("test" if split == "test" else "train").values())
    else:
        source, name = _WIKITEXT2_SOURCE if dataset == WIKITEXT2 else (dataset, config_name)
        rows = _load(source, name, split)
        _check_text(rows, dataset, text_column)
        texts = rows[text_column][:]
    ids = tokenizer("\n\n".join(texts[:max_examples]), verbose=False)["input_ids"]
    if len(ids) < window:
        raise HessoError(
            f"`block_size` ({window}) is more than the tokens of `dataset` ({dataset!r}, {len(ids)}); lower it"
        )
    whole = range(0, len(ids) - window + 1, window)
    return Dataset.from_dict({"input_ids": [ids[start : start + window] for start in whole]})


def _check_text(rows: Any, dataset: str, text_column: str) -> None:
    """Refuse data without rows or without text.

    Raises:
        HessoError: naming the data or the column.
    """
    if len(rows) == 0:
        raise HessoError(f"`dataset` ({dataset!r}) is empty: there is nothing to train on")
    if text_column not in rows.column_names:
        hint = nearest_name(text_column, rows.column_names)
        raise HessoError(f"`text_column` ({text_column!r}) isn't in {dataset}{hint}; columns: {rows.column_names}")
    if not isinstance(rows[0][text_column], str):
        kind = type(rows[0][text_column]).__name__
        raise HessoError(f"`text_column` ({text_column!r}) of {dataset} holds {kind}, not text; name another column")


def held_out_split(dataset: str) -> str:
    """Return the split to evaluate on where none is named: a file is all held out, everything else has a test split."""
    return "train" if Path(dataset).is_file() else "test"


def _load(dataset: str, config_name: str | None, split: str) -> Any:
    from datasets import load_dataset

    path = Path(dataset)
    check_text_file(dataset)
    if path.is_file() and path.suffix not in TEXT_LOADERS:
        raise HessoError(f"`dataset` ({dataset!r}): unknown file type; known: {sorted(TEXT_LOADERS)}")
    if path.is_file() and not path.stat().st_size:
        raise HessoError(f"`dataset` ({dataset!r}) is empty: there is nothing to train on")
    try:
        if path.is_file():
            return load_dataset(TEXT_LOADERS[path.suffix], data_files=str(path), split="train")
        return load_dataset(dataset, config_name, split=split)
    except Exception as error:  # not found, no connection, unknown split, broken lines: of many types
        cause = error.__cause__ or error
        raise HessoError(f"`dataset` ({dataset!r}, split {split!r}) can't be loaded: {cause}") from error


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
