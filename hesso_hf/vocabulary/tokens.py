"""Which tokens a data set uses, and which ones a smaller vocabulary keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..errors import HessoError

_BATCH = 1000


@dataclass(frozen=True)
class TokenUse:
    """How often each token id occurs; ids that don't occur are left out."""

    counts: Mapping[int, int]

    @classmethod
    def of(cls, sequences: Iterable[Any]) -> TokenUse:
        """Count the ids in lists, arrays or tensors; negative ones (ignored labels, -100) are no tokens."""
        counts: Counter[int] = Counter()
        for sequence in sequences:
            ids, occurrences = np.unique(np.asarray(sequence, dtype=np.int64), return_counts=True)
            counts.update(dict(zip(ids.tolist(), occurrences.tolist(), strict=True)))
        return cls({token: counts[token] for token in sorted(counts) if token >= 0})

    def seen(self, min_count: int = 1) -> set[int]:
        """Return the ids that occur at least so often."""
        return {token for token, count in self.counts.items() if count >= min_count}


@dataclass(frozen=True)
class KeptTokens:
    """The decision: which of a vocabulary's ids stay; the new id of a token is its place among them.

    Attributes:
        vocab_size: number of ids before.
        kept: old ids, sorted.

    Raises:
        HessoError: where the ids aren't sorted, or outside the vocabulary.

    Example:
        >>> KeptTokens(8, (0, 3, 5)).new_ids
        {0: 0, 3: 1, 5: 2}
    """

    vocab_size: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.kept or list(self.kept) != sorted(set(self.kept)):
            raise HessoError(f"`kept` ({list(self.kept[:4])}...) must be sorted token ids, each once, at least one")
        if self.kept[0] < 0 or self.kept[-1] >= self.vocab_size:
            raise HessoError(
                f"`kept` (ids {self.kept[0]} to {self.kept[-1]}) must lie in the vocabulary of {self.vocab_size} "
                "tokens; does the tokenizer belong to the model?"
            )

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """Old id to new id."""
        return {old: new for new, old in enumerate(self.kept)}

    @property
    def num_removed(self) -> int:
        """Number of ids that go."""
        return self.vocab_size - len(self.kept)

    def indices(self, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the kept ids below `size` as a tensor: a table may cover only the first part of a vocabulary."""
        kept = torch.tensor(self.kept, dtype=torch.long, device=device)
        return kept[kept < size]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"vocab_size": self.vocab_size, "kept": list(self.kept)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KeptTokens:
        """Read what `to_dict` wrote."""
        return cls(int(values["vocab_size"]), tuple(map(int, values["kept"])))


def count_tokens(dataset: Any) -> TokenUse:
    """Count the tokens of all columns with token ids: `input_ids`, `labels`, and `chosen_input_ids` and the like.

    Args:
        dataset: a `datasets.Dataset`, or anything with a length whose items are mappings.

    Raises:
        HessoError: for a stream, an empty data set, or one without `input_ids`.
    """
    columns = id_columns(dataset)
    if hasattr(dataset, "with_format") and hasattr(dataset, "iter"):  # datasets.Dataset: whole columns at once
        arrow = dataset.with_format("arrow").iter(batch_size=_BATCH)
        return TokenUse.of(_flat(batch.column(name)) for batch in arrow for name in columns)
    return TokenUse.of(dataset[index][name] for index in range(len(dataset)) for name in columns)


def id_columns(dataset: Any, argument: str = "dataset") -> list[str]:
    """Return the columns of a data set, by messages called `argument`, that hold token ids.

    Raises:
        HessoError: as `count_tokens` does.
    """
    kind = type(dataset).__name__
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise HessoError(
            f"`{argument}` ({kind}) is no map-style data set: the tokens of a stream can't all be counted before "
            "training; load it with streaming=False, or keep the whole vocabulary"
        )
    if len(dataset) == 0:
        raise HessoError(f"`{argument}` ({kind}) is empty: there are no tokens to keep")
    names: Any = getattr(dataset, "column_names", None) or (list(dataset[0]) if isinstance(dataset[0], Mapping) else [])
    found = [name for name in names if name.endswith(("input_ids", "labels"))]
    if not any(name.endswith("input_ids") for name in found):
        raise HessoError(
            f"`{argument}` ({kind}) has no column `input_ids` whose tokens could be counted (columns: "
            f"{list(names) or 'none'}); tokenise it first, for instance with "
            "`dataset.map(lambda row: tokenizer(row['text']))`"
        )
    return found


def sample_sequences(dataset: Any, count: int) -> Iterator[list[int]]:
    """Yield the tokens of up to `count` examples spread over a data set, ignored labels left out."""
    columns = [name for name in id_columns(dataset) if name.endswith("input_ids")]
    for index in range(0, len(dataset), max(1, -(-len(dataset) // count))):
        row = dataset[index]
        for name in columns:
            ids = np.asarray(row[name], dtype=np.int64).ravel()
            yield ids[ids >= 0].tolist()


def _flat(column: Any) -> np.ndarray:
    """Return all ids of an arrow column of lists, of any depth."""
    values = column.combine_chunks()
    while hasattr(values.type, "value_type"):
        values = values.flatten()
    return values.drop_null().to_numpy(zero_copy_only=False)
