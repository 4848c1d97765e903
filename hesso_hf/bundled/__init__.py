"""The model that ships inside the package and the text it was trained on.

Both are on every machine that has the package: the text is the Python documentation which CPython carries for
`help()`, the model a byte-level Llama of under 2 MB trained on it by `benchmarks/pretrain_bundled.py`. They let the
tests, the examples and a first try run without a download.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SplitName = Literal["train", "test"]
BUNDLED = "bundled"

# A topic's side follows from its name alone, so a Python release that adds topics moves none of the others: what the
# bundled model was trained on never turns up in the test split of a newer Python under the same name.
NUM_BUCKETS = 9
TEST_BUCKET = 6

# Many topics repeat another one ("for" is a part of "compound"). Eight words in a row hardly recur by chance.
SHINGLE_WORDS = 8
MAX_SHARED_RATIO = 0.1


@dataclass(frozen=True)
class TopicSplit:
    """Topic name to text for the two sides of a hold-out split, each in the order of the names."""

    train: dict[str, str]
    test: dict[str, str]


def bundled_model_path() -> Path:
    """Folder of the bundled model and tokenizer, as `from_pretrained` takes it."""
    return Path(__file__).resolve().parent / "tiny_llama"


def resolve_model(source: str) -> str:
    """Return the bundled model's folder for the name `bundled`, every other source as it is."""
    return str(bundled_model_path()) if source == BUNDLED else source


def split_topics(topics: Mapping[str, str], held_out_bucket: int) -> TopicSplit:
    """Hold out the topics whose hashed name falls into one of the `NUM_BUCKETS` buckets.

    A held-out topic of which more than `MAX_SHARED_RATIO` stands in a training topic too is on neither side: testing
    on it would reward memory, and moving it to the training side could leak it where another Python words it
    differently.

    Raises:
        ValueError: `held_out_bucket` is not a bucket's number.
    """
    if not 0 <= held_out_bucket < NUM_BUCKETS:
        raise ValueError(
            f"`held_out_bucket` ({held_out_bucket}) must be from 0 to {NUM_BUCKETS - 1}; pass a bucket's number"
        )
    train = {name: topics[name] for name in sorted(topics) if _bucket(name) != held_out_bucket}
    held_out = {name: topics[name] for name in sorted(topics) if name not in train}
    train_shingles = {shingle for text in train.values() for shingle in _shingles(text)}
    test = {name: text for name, text in held_out.items() if _shared_ratio(text, train_shingles) <= MAX_SHARED_RATIO}
    return TopicSplit(train=train, test=test)


def python_docs_topics(split: SplitName) -> dict[str, str]:
    """Topic name to text of one split of the Python documentation carried by the running Python.

    Raises:
        ValueError: `split` is neither "train" nor "test".
    """
    from pydoc_data.topics import topics

    if split not in ("train", "test"):
        raise ValueError(f"`split` ({split!r}) must be 'train' or 'test'; pass one of the two")
    sides = split_topics(topics, TEST_BUCKET)
    return sides.train if split == "train" else sides.test


def python_docs_texts(split: SplitName) -> list[str]:
    """Texts of one split of the Python documentation, one for each topic, in the order of the topics' names.

    Raises:
        ValueError: `split` is neither "train" nor "test".
    """
    return list(python_docs_topics(split).values())


def python_docs_dataset(tokenizer: PreTrainedTokenizerBase, split: SplitName, block_size: int) -> Dataset:
    """Python documentation in blocks of `block_size` tokens, with columns `input_ids` and an equal `labels`.

    Every text ends with the tokenizer's eos token; a last block that would be shorter is dropped.

    Raises:
        ValueError: `split` is unknown, `tokenizer` has no eos token, or `block_size` is below 2 or more than the
            split's number of tokens.
    """
    from datasets import Dataset

    if block_size < 2:
        raise ValueError(f"`block_size` ({block_size}) must be at least 2 tokens; raise it")
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` (eos_token None) must have an eos token to join texts with; set its eos_token")
    token_ids: list[int] = []
    for text in python_docs_texts(split):
        # verbose=False: a topic may be longer than the model's context, and is cut into blocks afterwards
        token_ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        token_ids.append(tokenizer.eos_token_id)
    num_blocks = len(token_ids) // block_size
    if num_blocks == 0:
        raise ValueError(
            f"`block_size` ({block_size}) must be at most the {len(token_ids)} tokens of the {split!r} split; lower it"
        )
    blocks = [token_ids[start : start + block_size] for start in range(0, num_blocks * block_size, block_size)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def _bucket(name: str) -> int:
    """Bucket of a topic; the built-in `hash` differs from one process to the next."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % NUM_BUCKETS


def _shingles(text: str) -> list[str]:
    """Every run of `SHINGLE_WORDS` words, whatever the line breaks; the whole of a shorter text."""
    words = text.split()
    num_shingles = max(1, len(words) - SHINGLE_WORDS + 1)
    return [" ".join(words[start : start + SHINGLE_WORDS]) for start in range(num_shingles)]


def _shared_ratio(text: str, other_shingles: set[str]) -> float:
    """Share of a text's shingles that stand in the other texts as well."""
    shingles = _shingles(text)
    return sum(shingle in other_shingles for shingle in shingles) / len(shingles)
