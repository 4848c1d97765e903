"""Vocabulary: tokens that the data never uses, and that nothing else needs, leave the model and its tokenizer.

The logits of the tokens that stay don't change, so this needs no training: it is decided before, and done at export.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config.checks import check_integer
from ..errors import HessoError
from ..hf_models.sizes import VOCAB, get_size
from .tokenizer_file import read_backend
from .tokens import KeptTokens, TokenUse, count_tokens, id_columns, sample_sequences
from .trim_embeddings import config_token_ids, rows_elements
from .trim_tokenizer import TokenNeeds, fit_tokenizer

logger = logging.get_logger(__name__)

ROUND_TO = 8
_CHECKED = 256


@dataclass(frozen=True)
class VocabularyInspection:
    """How many tokens a data set uses, and what removing the others would save.

    Attributes:
        tokens: size of the vocabulary, padding rows of the model included.
        seen: tokens that occur in the data.
        needed: others that stay: special tokens, the alphabet, parts of merges, what rounding adds.
        removed: tokens that would go.
        parameters_removed: elements of their rows; None without a model.
    """

    tokens: int
    seen: int
    needed: int
    removed: int
    parameters_removed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def keep_tokens(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    model: PreTrainedModel | None = None,
    *,
    min_count: int = 1,
    round_to: int = ROUND_TO,
    texts: Iterable[str] = (),
) -> KeptTokens:
    """Decide which tokens stay: those in the data, and what the tokenizer and the model's configs need.

    Args:
        dataset: with columns `input_ids` and, if there are any, `labels`; or a `TokenUse` of counts.
        model: whose embeddings will be cut; its vocabulary may be larger than the tokenizer's.
        min_count: tokens seen less often go too; the data are split differently then.
        round_to: multiple that the number of tokens is filled up to, where there are so many.
        texts: more texts that are to be split as before.

    Raises:
        HessoError: for data whose tokens can't be counted, or a tokenizer that can't be rewritten.
        VerificationError: where texts of the data would be split differently.

    Example:
        >>> from hesso_hf.bundled import bundled_model_path
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
        >>> kept = keep_tokens(tokenizer, [tokenizer("for x in range(3): print(x)")], round_to=64)
        >>> len(kept.kept), kept.vocab_size
        (320, 1024)
    """
    for name, value in (("min_count", min_count), ("round_to", round_to)):
        check_integer(name, value)
    needs = TokenNeeds.of(tokenizer)
    use = dataset if isinstance(dataset, TokenUse) else count_tokens(dataset)
    texts = list(texts)
    wanted = use.seen(min_count) | {index for text in texts for index in tokenizer(text, verbose=False)["input_ids"]}
    if model is not None:
        wanted |= config_token_ids(model)
    needed = needs.closure(wanted)
    size = _vocab_size(tokenizer, model)
    kept = KeptTokens(size, tuple(sorted(_fill(needs, needed, use, size, round_to))))
    if min_count == 1 and dataset is not use:
        texts += _texts_of(tokenizer, dataset, kept)
    fitted, _ = fit_tokenizer(tokenizer, kept, texts)
    return fitted


def inspect_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    model: PreTrainedModel | None = None,
    *,
    min_count: int = 1,
    round_to: int = ROUND_TO,
) -> VocabularyInspection:
    """Count how many tokens a data set uses and how many would go; arguments and errors as for `keep_tokens`."""
    use = count_tokens(dataset)
    kept = keep_tokens(tokenizer, use, model, min_count=min_count, round_to=round_to)
    seen = len(use.seen(min_count))
    elements = None if model is None else rows_elements(model) * kept.num_removed
    return VocabularyInspection(kept.vocab_size, seen, len(kept.kept) - seen, kept.num_removed, elements)


def check_countable(tokenizer: Any, train_dataset: Any) -> None:
    """Refuse early what `keep_tokens` would refuse late.

    Raises:
        HessoError: without a tokenizer that can be rewritten, or data whose tokens can be counted.
    """
    if tokenizer is None:
        raise HessoError("`prune_vocabulary` (True) rewrites the tokenizer too: give it as `processing_class` (None)")
    read_backend(tokenizer)
    id_columns(train_dataset, "train_dataset")


def _vocab_size(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None) -> int:
    if model is None:
        return max(tokenizer.get_vocab().values()) + 1
    size = get_size(model.config.get_text_config(), VOCAB)
    if size is None:
        raise HessoError(f"`model` ({type(model).__name__}): {type(model.config).__name__} has no `{VOCAB}`")
    return size


def _fill(needs: TokenNeeds, needed: set[int], use: TokenUse, size: int, round_to: int) -> set[int]:
    """Add tokens up to a multiple of `round_to`: the most frequent ones first, then those with the lowest ids."""
    room = -len(needed) % round_to
    kept = set(needed)
    others = [index for index in needs.by_id.keys() - needed if index < size]
    for index in sorted(others, key=lambda index: (-use.counts.get(index, 0), index)):
        if room == 0:
            break
        more = needs.closure({index}) - kept
        if len(more) <= room:
            kept |= more
            room -= len(more)
    return kept


def _texts_of(tokenizer: PreTrainedTokenizerBase, dataset: Any, kept: KeptTokens) -> list[str]:
    """Return texts of the data that are split into kept tokens only: blocks cut inside a word may not be."""
    texts = []
    for ids in sample_sequences(dataset, _CHECKED):
        text: Any = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if kept.new_ids.keys() >= set(tokenizer(text, verbose=False)["input_ids"]):
            texts.append(text)
    return texts
