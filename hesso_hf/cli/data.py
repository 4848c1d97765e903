"""What a command is given: a model's name, and data (Python's documentation, a file, a data set of the Hub).

Names are checked without a framework, so that a mistake is answered at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundled import python_docs_dataset, resolve_model
from ..config.files import TEXT_LOADERS
from ..errors import HessoError, counted
from .examples import IGNORED, TEXT_COLUMN, Examples, Reading

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PYTHON_DOCS = "python-docs"


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


def read_tokenizer(source: str, chat_template: str | None, trust_remote_code: bool) -> Any:
    """Load a model's tokenizer, with the chat template of the file that is named.

    Raises:
        HessoError: where there is none.
    """
    from ..hf_models.loading import load_tokenizer

    tokenizer = load_tokenizer(source, trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


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


@dataclass(frozen=True)
class Data:
    """Examples with columns `input_ids` and `labels`, and what became of the rows.

    Attributes:
        examples: how they were made.
        train: those to learn from.
        held_out: others, None where none were asked for.
        rows: of the data set that were read.
        shortened: rows that were longer than an example may be, and lost their end.
        empty: rows that were left out: nothing in them is learnt.
    """

    examples: Examples
    train: Dataset
    held_out: Dataset | None
    rows: int
    shortened: int = 0
    empty: int = 0

    def describe(self) -> list[str]:
        """Say in lines what was read."""
        found = self.examples
        lines = [f"{found.source}: {counted(self.rows, 'row')} of {found.describe()}"]
        if self.shortened:
            lines.append(f"  rows longer than `block_size` ({found.block_size}), cut there: {self.shortened:,}")
        if self.empty:
            lines.append(f"  rows left out, since no token to learn from is within `block_size`: {self.empty:,}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        found = self.examples
        return {
            "kind": found.kind, "columns": list(found.columns), "loss": found.learnt, "packing": found.packed,
            "rows": self.rows, "examples": len(self.train),
        }  # fmt: skip


def text_blocks(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    split: str,
    *,
    config_name: str | None = None,
    text_column: str = TEXT_COLUMN,
    max_examples: int | None = None,
    held_out_ratio: float | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Load text and cut it into blocks of `block_size` tokens with columns `input_ids` and `labels`.

    Arguments and errors are those of `read_data`; other data than text is refused.

    Returns:
        The blocks, and the held-out ones or None.
    """
    reading = Reading(block_size, text_column, text_only=True)
    found = read_data(
        dataset, tokenizer, reading, split, config_name=config_name, max_examples=max_examples,
        held_out_ratio=held_out_ratio,
    )  # fmt: skip
    return found.train, found.held_out


def read_data(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    split: str,
    *,
    config_name: str | None = None,
    max_examples: int | None = None,
    needed: int | None = None,
    held_out_ratio: float | None = None,
) -> Data:
    """Load data and make examples of it, the same at every call.

    Args:
        dataset: `python-docs` (embedded), a .jsonl, .json, .txt, .csv or .parquet file, a folder, or a Hub id.
        max_examples: use the first so many rows (of `python-docs`, blocks).
        needed: examples to learn from that are enough: of what isn't a file no more is fetched. `max_examples` goes
            before it.
        held_out_ratio: share of the rows to hold out where the data has no split for it; None holds out none.

    Raises:
        HessoError: for an unknown file type, a missing column, a row that can't be read, or too few tokens.
    """
    embedded = dataset == PYTHON_DOCS
    if embedded or Path(dataset).is_file():
        allowed = ("train", "test") if embedded else ("train",)
        if split not in allowed:
            raise HessoError(
                f"`split` ({split!r}): {dataset} has only {list(allowed)}; name another file to evaluate on"
            )
    if embedded:
        return _python_docs(tokenizer, reading, split, max_examples, held_out_ratio)
    rows, version = load_rows(dataset, config_name, split, max_examples is not None or needed is not None)
    first = next(iter(rows), None)
    if first is None:
        raise HessoError(f"`dataset` ({dataset!r}) is empty: there is nothing to train on")
    examples = Examples.of(dataset, first, tokenizer, reading)
    if version is None:
        if max_examples is not None:
            rows = rows.select(range(min(max_examples, len(rows))))
        read = rows.map(examples.read, with_indices=True, remove_columns=rows.column_names, features=_features())
    else:
        least = math.ceil(1 / held_out_ratio) if held_out_ratio else 1
        if needed is not None:
            needed = math.ceil(needed / (1 - (held_out_ratio or 0)))
        read = _fetched(rows, version, examples, max_examples, needed, least)
    usable = read if examples.cuts else read.filter(_teaches, input_columns="labels")
    counts = {
        "rows": len(read), "empty": len(read) - len(usable),
        "shortened": 0 if examples.cuts else sum(length > reading.block_size for length in read["length"]),
    }  # fmt: skip
    if not held_out_ratio:
        return Data(examples, _packed(usable, examples), None, **counts)
    if len(usable) == 1:
        raise HessoError(f"`dataset` ({dataset!r}) has one example, of which none can be held out: give `eval_dataset`")
    parts = usable.train_test_split(test_size=held_out_ratio, seed=0) if len(usable) else {"train": usable}
    return Data(examples, *(_packed(parts[name], examples) for name in ("train", "test")), **counts)


def _python_docs(
    tokenizer: Any, reading: Reading, split: str, max_examples: int | None, held_out_ratio: float | None
) -> Data:
    size = reading.block_size
    train = python_docs_dataset(tokenizer, "test" if split == "test" else "train", size)
    if max_examples is not None:
        train = train.select(range(min(max_examples, len(train))))
    held_out = python_docs_dataset(tokenizer, "test", size) if held_out_ratio else None
    examples = Examples(PYTHON_DOCS, "text", (TEXT_COLUMN,), "all", True, size, tokenizer)
    return Data(examples, train, held_out, len(train))


def held_out_split(dataset: str) -> str:
    """Return the split to evaluate on where none is named: a file is all held out, everything else has a test split."""
    return "train" if Path(dataset).is_file() else "test"


def load_rows(dataset: str, config_name: str | None, split: str, bounded: bool) -> tuple[Any, str | None]:
    """Return rows and None; where a part is enough of what isn't a file, rows to go through and their version."""
    from datasets import load_dataset, load_dataset_builder

    path = Path(dataset)
    check_text_file(dataset)
    if path.is_file() and path.suffix not in TEXT_LOADERS:
        raise HessoError(f"`dataset` ({dataset!r}): unknown file type; known: {sorted(TEXT_LOADERS)}")
    if path.is_file() and not path.stat().st_size:
        raise HessoError(f"`dataset` ({dataset!r}) is empty: there is nothing to train on")
    try:
        if path.is_file():
            return load_dataset(TEXT_LOADERS[path.suffix], data_files=str(path), split="train"), None
        if bounded and "[" not in split:  # a slice isn't streamed
            builder = load_dataset_builder(dataset, config_name)
            if (Path(builder.cache_dir) / "dataset_info.json").exists():  # it is on this disk, whole
                return load_dataset(dataset, config_name, split=split), builder.cache_dir
            return builder.as_streaming_dataset(split), builder.cache_dir
        return load_dataset(dataset, config_name, split=split), None
    except Exception as error:  # not found, no connection, unknown split, broken lines: of many types
        raise unreadable(dataset, split, error) from error


def unreadable(dataset: str, split: str, error: BaseException) -> HessoError:
    """Return what says that data can't be read, of an error of any type."""
    return HessoError(f"`dataset` ({dataset!r}, split {split!r}) can't be loaded: {error.__cause__ or error}")


def _features() -> Any:
    from datasets import Features, List, Value

    tokens = List(Value("int32"))
    return Features({"input_ids": tokens, "labels": tokens, "length": Value("int32")})


def _teaches(labels: list[int]) -> bool:
    return any(label != IGNORED for label in labels)


def _fetched(
    rows: Any, version: str, examples: Examples, max_rows: int | None, needed: int | None, least: int
) -> Dataset:
    """Read as many rows as are wanted, into a file that other processes and later runs read.

    Args:
        rows: a stream, or all of them.
        version: names where they come from, down to the state of its files.
        needed: examples that are enough, where `max_rows` is None.
        least: rows to read in any case.
    """
    from datasets import Dataset
    from datasets.fingerprint import Hasher

    def read() -> Iterator[dict[str, Any]]:
        enough, size = 0, examples.block_size
        for index, row in enumerate(itertools.islice(rows, max_rows)):
            found = examples.read(row, index)
            yield found
            if examples.packed:
                enough += len(found["input_ids"])
            elif _teaches(found["labels"]):
                enough += size
            if max_rows is None and needed is not None and enough >= needed * size and index + 1 >= least:
                return

    key = Hasher.hash((version, str(rows.split), examples, max_rows, needed, least))
    try:
        return Dataset.from_generator(read, features=_features(), fingerprint=key)
    except Exception as error:  # a row that can't be read comes wrapped; no connection any more: of many types
        if isinstance(error.__cause__, HessoError):
            raise error.__cause__ from error
        raise unreadable(examples.source, str(rows.split), error) from error


def _packed(read: Dataset, examples: Examples) -> Dataset:
    """Return examples to train on: rows that were read, joined where that is asked for.

    Raises:
        HessoError: where there are none.
    """
    found = read.map(examples.pack, batched=True, remove_columns=read.column_names) if examples.packed else read
    if len(found) == 0:
        size = examples.block_size
        if examples.cuts:
            raise HessoError(f"`block_size` ({size}) is more than the tokens of the data; lower it")
        raise HessoError(
            f"`dataset` ({examples.source!r}): no row has a token to learn from within `block_size` ({size}); raise "
            "it, or look at the data"
        )
    return found.remove_columns([name for name in found.column_names if name == "length"])
