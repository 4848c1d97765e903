"""A tokenizer with fewer tokens: its own files rewritten, loaded by its own class, and compared with the full one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UnsupportedStructureError, VerificationError
from .tokenizer_file import Spelling, named_in_post_processor, read_backend, read_spelling
from .tokens import KeptTokens

_BACKEND_FILE, _CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_SETTINGS = ("padding_side", "truncation_side", "name_or_path")
_ROUNDS = 8


@dataclass(frozen=True)
class TokenNeeds:
    """What a tokenizer needs beside the tokens that it is to keep, read from its file once."""

    spelling: Spelling
    fixed: frozenset[int]
    by_id: Mapping[int, str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenNeeds:
        """Read a tokenizer's file.

        Raises:
            UnsupportedStructureError: for a tokenizer that can't be rewritten.
        """
        backend = read_backend(tokenizer)
        spelling = read_spelling(backend)
        added = {token["id"] for token in backend.get("added_tokens") or ()}
        alphabet = spelling.ids_of_parts(spelling.always)
        by_id = {index: token for token, index in spelling.vocab.items()}
        return cls(spelling, frozenset({*added, *tokenizer.all_special_ids, *alphabet}), by_id)

    def closure(self, ids: Iterable[int]) -> set[int]:
        """Return token ids with all those needed: added and special tokens, alphabet, parts of merges."""
        ids = {*ids, *self.fixed}
        return ids | self.spelling.ids_of_parts(self.by_id[index] for index in ids if index in self.by_id)


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: KeptTokens) -> Any:
    """Return a tokenizer of the same class that knows the kept tokens only, under their new ids.

    Raises:
        UnsupportedStructureError: for a tokenizer that can't be rewritten, or whose class reads back something else.

    Example:
        # small = trim_tokenizer(tokenizer, keep_tokens(tokenizer, dataset, model))
    """
    backend = rewrite_backend(read_backend(tokenizer), kept)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _rewrite_files(Path(folder), backend, kept)
        small = type(tokenizer).from_pretrained(folder)
    for name in _SETTINGS:
        setattr(small, name, getattr(tokenizer, name))
    small.init_kwargs["name_or_path"] = tokenizer.name_or_path
    expected = {token: kept.new_ids[old] for token, old in tokenizer.get_vocab().items() if old in kept.new_ids}
    _compare_vocab(small.get_vocab(), expected, f"`tokenizer` ({type(tokenizer).__name__})")
    return small


def rewrite_backend(backend: Mapping[str, Any], kept: KeptTokens) -> dict[str, Any]:
    """Return the contents of a `tokenizer.json` with the kept tokens only; merges stay in their order.

    Raises:
        UnsupportedStructureError: where a token that the tokenizer puts around texts isn't kept.
    """
    spelling = read_spelling(backend)
    new = kept.new_ids
    model = dict(backend["model"])
    stays = {token for token, index in spelling.vocab.items() if index in new}
    missing = (spelling.always | named_in_post_processor(backend.get("post_processor"))) & spelling.vocab.keys() - stays
    if missing:
        raise UnsupportedStructureError(f"`kept` lacks tokens that the tokenizer needs: {sorted(missing)[:4]}")
    if spelling.kind == "Unigram":
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in stays]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        tokens = sorted(stays, key=lambda token: spelling.vocab[token])
        model["vocab"] = {token: new[spelling.vocab[token]] for token in tokens}
    if spelling.kind == "BPE":
        merges = spelling.merges.items()  # in the order of the list
        model["merges"] = [list(pair) for pair, (_, merged) in merges if stays.issuperset((*pair, merged))]
    rewritten = {**backend, "model": model}
    added = [token for token in backend.get("added_tokens") or () if token["id"] in new]
    rewritten["added_tokens"] = [{**token, "id": new[token["id"]]} for token in added]
    rewritten["post_processor"] = _rewrite_post_processor(backend.get("post_processor"), new)
    if backend.get("padding"):
        rewritten["padding"] = {**backend["padding"], "pad_id": new[backend["padding"]["pad_id"]]}
    return rewritten


def check_tokenizer(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Compare how two tokenizers split texts, token by token.

    Raises:
        VerificationError: naming the first text that is split differently.
    """
    for index, text in enumerate(texts):
        before, after = _split(old, text), _split(new, text)
        if before != after:
            at = next((i for i, pair in enumerate(zip(before, after, strict=False)) if len(set(pair)) > 1), 0)
            raise VerificationError(
                f"text {index} ({text[:40]!r}...) is split differently by the smaller tokenizer, from token {at} on: "
                f"{before[at : at + 4]} became {after[at : at + 4]}; keep the tokens of this text too"
            )


def fit_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kept: KeptTokens, texts: Iterable[str] = ()
) -> tuple[KeptTokens, Any]:
    """Trim a tokenizer; where a text is split differently then, keep that text's tokens too and trim again.

    Raises:
        VerificationError: where that doesn't help, naming the first text that is split differently.
    """
    texts = list(texts)
    needs = TokenNeeds.of(tokenizer)
    small = trim_tokenizer(tokenizer, kept)
    for _ in range(_ROUNDS):
        differing = [text for text in texts if _split(tokenizer, text) != _split(small, text)]
        wanted = {index for text in differing for index in tokenizer(text, verbose=False)["input_ids"]}
        more = needs.closure({*kept.kept, *wanted})
        if more <= set(kept.kept):
            break
        kept = KeptTokens(kept.vocab_size, tuple(sorted(more)))
        small = trim_tokenizer(tokenizer, kept)
    check_tokenizer(tokenizer, small, texts)
    return kept, small


def check_saved_tokenizer(folder: Path, expected: PreTrainedTokenizerBase) -> None:
    """Load a saved tokenizer as its users will, and compare its tokens.

    Raises:
        UnsupportedStructureError: naming the first token whose id differs.
    """
    loaded = AutoTokenizer.from_pretrained(folder)
    _compare_vocab(loaded.get_vocab(), expected.get_vocab(), f"AutoTokenizer ({type(loaded).__name__})")


def _split(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text, verbose=False)["input_ids"]))


def _compare_vocab(found: Mapping[str, int], expected: Mapping[str, int], name: str) -> None:
    for token in sorted(found.keys() | expected.keys()):
        if found.get(token) != expected.get(token):
            raise UnsupportedStructureError(
                f"{name} gives token {token!r} the id {found.get(token)} where {expected.get(token)} was written: the "
                "class changes its vocabulary while it loads, so a smaller one can't be trusted"
            )


def _rewrite_files(folder: Path, backend: Mapping[str, Any], kept: KeptTokens) -> None:
    """Write the new backend, drop files with the old vocabulary, and renumber what the configuration lists."""
    for path in folder.iterdir():
        if path.suffix not in (".json", ".jinja") or path.name in ("vocab.json", "added_tokens.json", "tekken.json"):
            path.unlink()
    (folder / _BACKEND_FILE).write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
    path = folder / _CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in config:
        listed = config["added_tokens_decoder"].items()
        config["added_tokens_decoder"] = {str(kept.new_ids[int(old)]): token for old, token in listed}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _rewrite_post_processor(part: Any, new: Mapping[int, int]) -> Any:
    if not part:
        return part
    changed = dict(part)
    if part.get("processors"):
        changed["processors"] = [_rewrite_post_processor(inner, new) for inner in part["processors"]]
    if part["type"] == "TemplateProcessing":
        changed["special_tokens"] = {
            name: {**special, "ids": [new[index] for index in special["ids"]]}
            for name, special in part["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if name in part:
            token, index = part[name]
            changed[name] = [token, new[index]]
    return changed
