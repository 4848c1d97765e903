"""What a tokenizer needs to spell: the tokens that must stay for the others to be formed and for any text to be valid.

Removing a token changes how text is split. It changes nothing for a text whose tokens all stay if

- BPE: each token formed on the way to one that stays, stays too. Of the merges that are possible at some moment the
  earliest in the list is applied; with fewer merges to choose from, that one is still there and still the earliest.
- Unigram: the piece with the lowest score stays, as it sets the price of an unknown character. The best path is among
  those that are left, and every one of them costs what it did.
- WordPiece: nothing. The longest piece that matches is among those that are left.

All other text needs single characters, or the bytes that stand for them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedStructureError

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_LONGEST_LITERAL = 16  # of the other parts' strings; a longer one is no literal but a table
_ASCII = tuple(map(chr, range(128)))


@dataclass(frozen=True)
class Spelling:
    """The model part of a tokenizer.

    Attributes:
        kind: BPE, Unigram, WordPiece or WordLevel.
        vocab: token to id, without the added tokens that the model doesn't know.
        merges: for BPE, the pair to its rank and what it becomes.
        always: tokens that any text may need.
    """

    kind: str
    vocab: Mapping[str, int]
    merges: Mapping[tuple[str, str], tuple[int, str]]
    always: frozenset[str]
    prefix: str = ""
    suffix: str = ""

    def parts(self, token: str) -> set[str]:
        """Return the tokens that are formed on the way to `token`, itself among them; {token} where no merge is."""
        if self.kind != "BPE" or token in BYTE_TOKENS:
            return {token}
        symbols = _letters(token, self.prefix, self.suffix)
        formed = set(symbols)
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            ranked = [(self.merges[pair][0], at) for at, pair in enumerate(pairs) if pair in self.merges]
            if not ranked:
                return {token}  # a special token, or one that only stands for a whole word
            at = min(ranked)[1]
            symbols[at : at + 2] = [self.merges[pairs[at]][1]]
            formed.add(symbols[at])
        return formed | {token}

    def ids_of_parts(self, tokens: Iterable[str]) -> set[int]:
        """Return the ids of tokens of the model, and of those that are formed on the way to them."""
        return {self.vocab[part] for token in tokens for part in self.parts(token) if part in self.vocab}


def _letters(token: str, prefix: str, suffix: str) -> list[str]:
    """Split a token into the single characters that it stands for, marked inside a word and at its end."""
    starts = prefix if token != prefix and token.startswith(prefix) else ""
    ends = suffix if token != suffix and token.endswith(suffix) else ""
    core = token.removeprefix(starts).removesuffix(ends)
    letters = [(prefix if at else starts) + letter for at, letter in enumerate(core)]
    if letters:
        letters[-1] += ends
    return letters


def read_spelling(tokenizer_json: Mapping[str, Any]) -> Spelling:
    """Read the model part of a `tokenizer.json`.

    Raises:
        UnsupportedStructureError: for an unknown kind of model, or words without a token for the unknown ones.
    """
    model = tokenizer_json["model"]
    kind = model.get("type")
    if kind not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
        raise UnsupportedStructureError(f"the tokenizer's model is of the unknown type {kind!r}: it can't be rewritten")
    if kind == "Unigram":
        vocab = {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    else:
        vocab = dict(model["vocab"])
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    merges = {}
    for rank, merge in enumerate(model.get("merges") or ()):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        merges[first, second] = (rank, first + second[len(prefix) :])
    always = _unknown(model) | _alphabet(model, vocab, prefix, suffix) | _literals(tokenizer_json)
    if kind == "WordLevel" and not always & vocab.keys():
        raise UnsupportedStructureError("the tokenizer knows whole words only, and has no token for an unknown one")
    if kind == "Unigram":
        always.add(min(model["vocab"], key=lambda piece: piece[1])[0])
    return Spelling(kind, vocab, merges, frozenset(always & vocab.keys()), prefix, suffix)


def _unknown(model: Mapping[str, Any]) -> set[str]:
    if model["type"] == "Unigram":
        return set() if model.get("unk_id") is None else {model["vocab"][model["unk_id"]][0]}
    return {model["unk_token"]} if model.get("unk_token") else set()


def _alphabet(model: Mapping[str, Any], vocab: Mapping[str, int], prefix: str, suffix: str) -> set[str]:
    """Return the characters that spell every text the tokenizer could spell."""
    if model["type"] == "WordLevel":
        return set()
    if model.get("byte_fallback") and all(token in vocab for token in BYTE_TOKENS):
        return {*BYTE_TOKENS, *_ASCII}  # every other character can be spelled in bytes
    marks = {"", prefix} if model["type"] != "Unigram" else {""}
    single = {
        token
        for token in vocab
        for mark in marks
        if token.startswith(mark) and len(token.removeprefix(mark).removesuffix(suffix)) == 1
    }
    bytes_in_use = set(BYTE_TOKENS) if model.get("byte_fallback") else set()
    return single | bytes_in_use | _irreplaceable(vocab, single, model["type"], prefix)


def _irreplaceable(vocab: Mapping[str, int], single: set[str], kind: str, prefix: str) -> set[str]:
    """Return the pieces with a character that can't be spelled alone: nothing else can take their place."""
    if kind == "BPE":  # all that it forms, it forms of single characters
        return set()
    return {token for token in vocab if token != prefix and not single.issuperset(_letters(token, prefix, ""))}


def _literals(tokenizer_json: Mapping[str, Any]) -> set[str]:
    """Return what the other parts write and read: characters that stand for spaces, tokens around a text."""
    found: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, str) and len(value) <= _LONGEST_LITERAL:
            found.update((value, *value))
        elif isinstance(value, Mapping):
            for key, part in value.items():
                if key != "type":
                    walk(part)
        elif isinstance(value, list):
            for part in value:
                walk(part)

    for name in ("normalizer", "pre_tokenizer", "decoder"):
        walk(tokenizer_json.get(name))
    found |= {token["content"] for token in tokenizer_json.get("added_tokens") or ()}
    found |= named_in_post_processor(tokenizer_json.get("post_processor"))
    padding = tokenizer_json.get("padding")
    return found | ({padding["pad_token"]} if padding else set())


def named_in_post_processor(part: Any) -> set[str]:
    """Return the tokens that a post-processor puts around a text."""
    if not part:
        return set()
    found: set[str] = set()
    for inner in part.get("processors") or ():
        found |= named_in_post_processor(inner)
    if part["type"] == "TemplateProcessing":
        found |= {token for special in part["special_tokens"].values() for token in special["tokens"]}
    return found | {part[name][0] for name in ("sep", "cls") if name in part}


def read_backend(tokenizer: Any) -> dict[str, Any]:
    """Return the `tokenizer.json` of a tokenizer.

    Raises:
        UnsupportedStructureError: for one without such a file (written in Python), or with code of its own.
    """
    kind = type(tokenizer)
    if not kind.__module__.startswith("transformers.") or getattr(kind, "_auto_class", None) is not None:
        raise UnsupportedStructureError(
            f"`tokenizer` ({kind.__name__} of {kind.__module__}) has code of its own, which may rely on its ids; only "
            "Transformers' own tokenizer classes can be rewritten"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedStructureError(
            f"`tokenizer` ({kind.__name__}) has no tokenizer.json that could be rewritten: it is a slow one, written "
            "in Python, or a processor; give a fast one (TokenizersBackend)"
        )
    return json.loads(backend.to_str())
