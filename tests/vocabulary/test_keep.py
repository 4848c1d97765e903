"""Vocabulary: fewer tokens, the same splits of the data, any text still valid, the same logits of what stays."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertTokenizer,
    GenerationConfig,
    LlamaTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from hesso_hf import HessoConfig, HessoTrainer, KeptTokens, export_pruned, inspect_vocabulary, keep_tokens
from hesso_hf.bundled import bundled_model_path, python_docs_texts
from hesso_hf.errors import HessoError, UnsupportedStructureError, VerificationError
from hesso_hf.hf_models.tiny_model import random_model
from hesso_hf.trainer import forecast
from hesso_hf.vocabulary.tokenizer_file import BYTE_TOKENS, read_backend, read_spelling
from hesso_hf.vocabulary.tokens import TokenUse, count_tokens
from hesso_hf.vocabulary.trim_embeddings import config_token_ids, rows_elements, trim_embeddings, vocabulary_axes
from hesso_hf.vocabulary.trim_tokenizer import (
    check_saved_tokenizer,
    check_tokenizer,
    fit_tokenizer,
    rewrite_backend,
    trim_tokenizer,
)
from tests.support.checks import propagated
from tests.support.tiny import tiny_gemma2, tiny_llama
from tests.support.training import arguments, hesso_config

TRAINING = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Pruning removes units; the units that stay are trained on, then saved.",
    "Der Fuchs läuft über die Straße; naïve café façade, 12 345.67 km.",
    "def add(first, second):\n    return first + second  # the sum\n",
    "Быстрая лиса прыгает. 日本語の文字 and emoji 😀 too.",
]
SEEN = [*TRAINING[:2], "the unseen rest of these texts goes:  unit, quick, sun.\n"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
EXTRA = AddedToken("<|tool|>", special=False, normalized=False)
KINDS = ("byte_bpe", "metaspace_bpe", "spaced_bpe", "suffix_bpe", "unigram", "byte_unigram", "wordpiece", "wordlevel")


def _train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(TRAINING * 3, trainer)
    return tokenizer


def _byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL, "<|start|>", "<|end|>"]
    return _train(tokenizer, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet))


def _metaspace_bpe() -> Tokenizer:
    """As Llama 2: the whole text is one word, and characters that no token has are spelled in bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return _train(tokenizer, trainers.BpeTrainer(vocab_size=520, special_tokens=[*SPECIAL, *BYTE_TOKENS]))


def _spaced_bpe() -> Tokenizer:
    """As Gemma: a normaliser writes the spaces; no bytes, so that each character has to stay."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return _train(tokenizer, trainers.BpeTrainer(vocab_size=260, special_tokens=SPECIAL))


def _suffix_bpe() -> Tokenizer:
    """As CLIP: characters at the end of a word have a mark."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return _train(tokenizer, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, end_of_word_suffix="</w>"))


def _unigram(extra: tuple[str, ...] = (), **options: Any) -> Tokenizer:
    """Each piece of a word with up to six characters, by how often it occurs; characters are the cheapest."""
    words = ["▁" + word for text in TRAINING for word in text.split(" ")]
    pieces = [word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, min(i + 6, len(word)) + 1)]
    counts = Counter(piece for piece in pieces if not {*piece[1:]} & {"▁"})
    many = [(piece, math.log(counts[piece] / len(pieces)) - 3 * (len(piece) == 1)) for piece in sorted(counts)]
    vocab = [*((token, 0.0) for token in SPECIAL), *many, *((token, -20.0) for token in extra)]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _train(tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))


def _wordlevel() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _train(tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL))


def _shuffled(backend: dict[str, Any]) -> Tokenizer:
    """Number the tokens anew, so that those that stay, special ones too, lie anywhere between those that go."""
    model = backend["model"]
    added = [token for token in backend["added_tokens"] if token["content"] not in BYTE_TOKENS]
    listed = isinstance(model["vocab"], list)
    tokens = [entry[0] for entry in model["vocab"]] if listed else sorted(model["vocab"])
    order = random.Random(8).sample(range(len(tokens)), len(tokens))
    ids = dict(zip(tokens, order, strict=True))
    if listed:
        model["unk_id"] = ids["<unk>"]
        model["vocab"] = sorted(model["vocab"], key=lambda entry: ids[entry[0]])
    else:
        model["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
    backend["added_tokens"] = sorted([token | {"id": ids[token["content"]]} for token in added], key=lambda t: t["id"])
    return Tokenizer.from_str(json.dumps(backend))


@functools.cache
def backend_of(kind: str) -> str:
    if kind == "byte_unigram":
        tokenizer = _unigram(BYTE_TOKENS, byte_fallback=True)
    else:
        tokenizer = globals()[f"_{kind}"]()
    tokenizer = _shuffled(json.loads(tokenizer.to_str()))
    tokenizer.add_tokens([EXTRA])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ids
    )
    return tokenizer.to_str()


def tokenizer_of(kind: str) -> Any:
    if kind == "bundled":
        return AutoTokenizer.from_pretrained(bundled_model_path())
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend_of(kind)),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
    )  # fmt: skip


def rows(tokenizer: Any, texts: list[str]) -> list[dict[str, Any]]:
    return [dict(tokenizer(text)) for text in texts]


@functools.cache
def trimmed(kind: str) -> tuple[Any, Any, KeptTokens]:
    """A tokenizer, the smaller one and what it keeps of what `SEEN` uses."""
    full = tokenizer_of(kind)
    texts = python_docs_texts("test")[:1] if kind == "bundled" else SEEN
    kept = keep_tokens(full, rows(full, texts), round_to=1)
    return full, trim_tokenizer(full, kept), kept


def random_texts(count: int, seed: int = 5) -> list[str]:
    """Words of the training texts, other scripts, emoji, combining and control characters, in random order."""
    draw = random.Random(seed)
    words = " ".join(TRAINING).split(" ")
    ranges = ((32, 126), (0, 31), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x4E00, 0x4FFF), (0xAC00, 0xAD00))
    spans = (*ranges, (0x1F300, 0x1F64F), (0x2000, 0x206F), (0xE000, 0xE010), (0x10000, 0x10FFF), (0x2580, 0x2584))

    def piece() -> str:
        choice = draw.random()
        if choice < 0.4:
            return draw.choice(words)
        if choice < 0.55:
            return " " * draw.randint(1, 4)
        return "".join(chr(draw.randint(*draw.choice(spans))) for _ in range(draw.randint(1, 5)))

    return ["".join(piece() for _ in range(draw.randint(1, 9))) for _ in range(count)]


def decoded(tokenizer: Any, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# -- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "bundled"])
def test_the_data_are_split_as_before_under_new_ids(kind: str) -> None:
    full, small, kept = trimmed(kind)
    assert len(kept.kept) < 0.93 * kept.vocab_size  # else the test says nothing
    texts = python_docs_texts("test")[:1] if kind == "bundled" else SEEN
    for text in texts:
        old, new = full(text)["input_ids"], small(text)["input_ids"]
        assert new == [kept.new_ids[index] for index in old]
        assert full.convert_ids_to_tokens(old) == small.convert_ids_to_tokens(new)
    pair = full(SEEN[0], SEEN[1])["input_ids"]
    assert kind == "bundled" or small(SEEN[0], SEEN[1])["input_ids"] == [kept.new_ids[index] for index in pair]


@pytest.mark.parametrize("kind", [*KINDS, "bundled"])
def test_texts_of_kept_tokens_are_split_as_before_whatever_they_are(kind: str) -> None:
    """The claim behind it all: a text whose tokens all stay is split the same, seen or not."""
    full, small, kept = trimmed(kind)
    vocab = [token for token, index in full.get_vocab().items() if index in kept.new_ids]
    draw = random.Random(3)
    same = 0
    for _ in range(400):
        ids = [full.convert_tokens_to_ids(draw.choice(vocab)) for _ in range(draw.randint(1, 12))]
        text = full.decode(ids, skip_special_tokens=True)
        old = full(text)["input_ids"]
        if kept.new_ids.keys() >= set(old):
            assert small(text)["input_ids"] == [kept.new_ids[index] for index in old], text
            same += 1
    assert same > 20


@pytest.mark.parametrize("kind", [*KINDS, "bundled"])
def test_any_text_is_valid_and_reads_as_it_did(kind: str) -> None:
    full, small, kept = trimmed(kind)
    round_trips = split_anew = 0
    for text in random_texts(500):
        old, new = full(text)["input_ids"], small(text)["input_ids"]
        assert all(0 <= index < len(kept.kept) for index in new)
        if kind == "wordlevel":  # a word that is gone is unknown: nothing else could spell it
            continue
        assert decoded(small, text) == decoded(full, text)
        if full.unk_token_id is not None:
            assert old.count(full.unk_token_id) == new.count(small.unk_token_id), text
        round_trips += decoded(full, text) == text
        split_anew += full.convert_ids_to_tokens(old) != small.convert_ids_to_tokens(new)
    assert split_anew > 100 or kind == "wordlevel"
    assert round_trips > 300 or kind not in ("byte_bpe", "metaspace_bpe", "byte_unigram", "bundled")


@pytest.mark.parametrize("kind", [*KINDS, "bundled"])
def test_the_smaller_tokenizer_saves_and_loads(kind: str, tmp_path: Path) -> None:
    full, small, kept = trimmed(kind)
    assert type(small) is type(full)
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert sorted(loaded.get_vocab().values()) == list(range(len(kept.kept)))
    assert loaded.special_tokens_map == full.special_tokens_map
    assert loaded.padding_side == full.padding_side == "left"
    for text in [*SEEN, *random_texts(20), "<s>a<|tool|>b</s>"]:
        assert loaded(text)["input_ids"] == small(text)["input_ids"]
    batch = loaded(["a", "the quick fox"], padding=True)["input_ids"]
    assert batch[0][0] == loaded.pad_token_id == kept.new_ids[full.pad_token_id]


def test_special_and_added_tokens_stay_one_token() -> None:
    full, small, _ = trimmed("byte_bpe")
    text = "<s>the<|tool|>fox</s><|start|>"
    assert small.tokenize(text) == full.tokenize(text)
    assert small.convert_ids_to_tokens(small("a", "b")["input_ids"])[0] == "<s>"
    assert small.decode(small("the fox")["input_ids"], skip_special_tokens=True) == "the fox"


def test_merges_keep_their_order_and_reach_every_kept_token() -> None:
    full, small, _ = trimmed("byte_bpe")
    old, new = (read_backend(tokenizer)["model"] for tokenizer in (full, small))
    order = [tuple(merge) for merge in old["merges"]]
    assert [order.index(tuple(merge)) for merge in new["merges"]] == sorted(
        order.index(tuple(merge)) for merge in new["merges"]
    )
    spelling = read_spelling(read_backend(small))
    formed = {token for token in new["vocab"] if len(token) > 1 and token not in full.added_tokens_encoder}
    assert formed
    assert all(len(spelling.parts(token)) > 1 for token in formed)


def test_parts_are_those_of_the_actual_derivation() -> None:
    """`abab` is reached over `ab`, although `ba` and `bab` are tokens too."""
    merges = [("a", "b"), ("b", "a"), ("ba", "b"), ("ab", "ab"), ("a", "bab")]
    vocab = {token: index for index, token in enumerate(["a", "b", "ab", "ba", "bab", "abab"])}
    model = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    spelling = read_spelling(json.loads(model.to_str()))
    assert spelling.parts("abab") == {"a", "b", "ab", "abab"}
    assert spelling.parts("bab") == {"bab"}  # never reached: b + ab has no merge
    assert model.encode("bab").tokens == ["b", "ab"]


def test_a_word_that_stands_whole_needs_no_merges() -> None:
    """Llama 3's `ignore_merges`: a word that is a token is taken as it is, though merges don't lead there."""
    vocab = {token: index for index, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c"), ("a", "b")], ignore_merges=True))
    full = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    kept = keep_tokens(full, [{"input_ids": full("abc")["input_ids"]}], round_to=1)
    assert trim_tokenizer(full, kept).tokenize("abc") == ["abc"]
    assert sorted(trim_tokenizer(full, kept).get_vocab()) == ["<s>", "a", "abc", "b", "c"]


def test_the_cheapest_piece_of_a_unigram_stays() -> None:
    """It sets what an unknown character costs; without it `a` and an unknown `b` would beat `ab`."""
    vocab = [
        ("<unk>", 0.0),
        ("a", -1.0),
        ("ab", -13.0),
        ("b", -14.0),
        ("zzz", -90.0),
        *((t, -1.0) for t in BYTE_TOKENS),
    ]
    backend = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    full = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    kept = keep_tokens(full, rows(full, ["ab"]), round_to=1)
    assert 4 in kept.new_ids
    assert trim_tokenizer(full, kept).tokenize("ab") == ["ab"]


def test_a_piece_with_a_character_that_no_other_has_stays() -> None:
    vocab = [("<unk>", 0.0), ("a", -1.0), ("aß", -2.0), ("aa", -3.0)]
    full = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(vocab, 0)), unk_token="<unk>")
    kept = keep_tokens(full, rows(full, ["a"]), round_to=1)
    assert kept.kept == (0, 1, 2, 3)  # `aa` as the one with the lowest score
    words = {token: index for index, token in enumerate(["<unk>", "a", "##a", "aa", "aß", "##aa"])}
    full = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece(words, unk_token="<unk>")))
    assert keep_tokens(full, [{"input_ids": [1]}], round_to=1).kept == (0, 1, 2, 4)


def test_the_sign_for_a_space_stays_though_no_token_seen_has_it() -> None:
    """Spelled in bytes it would read back as a sign, not as a space."""
    full = tokenizer_of("metaspace_bpe")
    unseen = [index for token, index in full.get_vocab().items() if "▁" not in token][:40]
    kept = keep_tokens(full, [{"input_ids": unseen}], round_to=1)
    assert decoded(trim_tokenizer(full, kept), "a b  c") == "a b  c"


def test_tokens_around_a_text_stay_though_they_are_not_special() -> None:
    backend = Tokenizer(models.WordPiece({"x": 0, "<unk>": 1, "[END]": 2, "a": 3, "##a": 4}, unk_token="<unk>"))
    backend.post_processor = processors.BertProcessing(("[END]", 2), ("[END]", 2))
    full = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    small = trim_tokenizer(full, KeptTokens(5, (0, 1, 2, 3, 4)))
    assert keep_tokens(full, [{"input_ids": [3]}], round_to=1).kept == (0, 1, 2, 3, 4)
    assert small("aa")["input_ids"] == full("aa")["input_ids"]
    words = Tokenizer(models.WordLevel({"x": 0, "<unk>": 1, "END": 2, "a": 3}, unk_token="<unk>"))
    words.post_processor = processors.RobertaProcessing(("END", 2), ("END", 2))
    full = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    kept = keep_tokens(full, [{"input_ids": [3]}], round_to=1)
    assert kept.kept == (1, 2, 3)
    assert trim_tokenizer(full, kept)("a")["input_ids"] == [1, 2, 1]


def test_numbers_in_the_file_are_changed_wherever_they_stand() -> None:
    """Padding that a call left in the file, and a post-processor inside a sequence of them."""
    full = tokenizer_of("byte_bpe")
    kept = trimmed("byte_bpe")[2]
    backend = read_backend(full)
    end = full.eos_token_id
    padding = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_type_id": 0}
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", end], "cls": ["</s>", end]}
    backend["padding"] = {**padding, "pad_id": full.pad_token_id, "pad_token": "<pad>"}
    backend["post_processor"] = {"type": "Sequence", "processors": [roberta, backend["post_processor"]]}
    before = copy.deepcopy(backend)
    found = rewrite_backend(backend, kept)
    new_end = kept.new_ids[end]
    assert new_end != end
    assert found["padding"] == {**padding, "pad_id": kept.new_ids[full.pad_token_id], "pad_token": "<pad>"}
    inner, template = found["post_processor"]["processors"]
    assert inner["sep"] == inner["cls"] == ["</s>", new_end]
    assert template["special_tokens"]["</s>"]["ids"] == [new_end]
    assert backend == before


def class_tokenizers() -> dict[str, Any]:
    """Tokenizers of Transformers' own classes, which build their backends themselves."""
    bpe, pieces = (json.loads(backend_of(kind))["model"] for kind in ("metaspace_bpe", "unigram"))
    words = json.loads(backend_of("wordpiece"))["model"]["vocab"]
    names = {"<unk>": "[UNK]", "<s>": "[CLS]", "</s>": "[SEP]", "<pad>": "[PAD]"}
    return {
        "llama": LlamaTokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]], add_bos_token=True),
        "t5": T5Tokenizer(vocab=[tuple(piece) for piece in pieces["vocab"]], extra_ids=3, bos_token=None),
        "bert": BertTokenizer(vocab={names.get(word, word): index for word, index in words.items()}),
    }


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_classes_that_build_their_own_backend(name: str, tmp_path: Path) -> None:
    full = class_tokenizers()[name]
    kept = keep_tokens(full, rows(full, SEEN), round_to=8)
    assert len(kept.kept) % 8 == 0
    assert len(kept.kept) < kept.vocab_size
    small = trim_tokenizer(full, kept)
    assert type(small) is type(full)
    small.save_pretrained(tmp_path)
    for tokenizer in (small, type(full).from_pretrained(tmp_path)):
        check_tokenizer(full, tokenizer, SEEN)
        for text in random_texts(50):
            assert max(tokenizer(text)["input_ids"]) < len(kept.kept)
            assert decoded(tokenizer, text) == text or decoded(full, text) != text


def test_texts_can_be_kept_beside_the_data() -> None:
    full = tokenizer_of("byte_bpe")
    data = rows(full, SEEN)
    small = trim_tokenizer(full, keep_tokens(full, data, round_to=1))
    with pytest.raises(VerificationError, match=r"text 1 \('def add"):
        check_tokenizer(full, small, [SEEN[0], TRAINING[3]])
    more = keep_tokens(full, data, round_to=1, texts=[TRAINING[3]])
    check_tokenizer(full, trim_tokenizer(full, more), [*SEEN, TRAINING[3]])
    repaired, tokenizer = fit_tokenizer(full, keep_tokens(full, data, round_to=1), [TRAINING[3]])
    assert repaired == more
    check_tokenizer(full, tokenizer, [*SEEN, TRAINING[3]])


def test_a_sample_of_the_data_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the parts of merges were forgotten, the data would be split differently: that is seen before training."""
    full = tokenizer_of("byte_bpe")
    data = rows(full, SEEN)
    monkeypatch.setattr("hesso_hf.vocabulary.tokenizer_file.Spelling.parts", lambda self, token: {token})
    with pytest.raises(VerificationError, match="is split differently by the smaller tokenizer, from token"):
        keep_tokens(full, data, round_to=1)


def test_rounding_fills_up_with_the_lowest_ids_and_rare_tokens_can_go() -> None:
    full = tokenizer_of("byte_bpe")
    data = rows(full, [SEEN[0]] * 2 + [SEEN[1]])
    exact, filled = (keep_tokens(full, data, round_to=number) for number in (1, 64))
    assert len(filled.kept) == -(-len(exact.kept) // 64) * 64
    assert set(exact.kept) < set(filled.kept)
    added = sorted(set(filled.kept) - set(exact.kept))
    others = sorted(set(range(exact.vocab_size)) - set(exact.kept))
    assert added[:5] == others[:5]
    often = keep_tokens(full, data, round_to=1, min_count=2)
    assert set(often.kept) < set(exact.kept)
    assert len(keep_tokens(full, data, round_to=100_000).kept) == full.vocab_size + 1  # no more than there are


def test_a_saved_tokenizer_is_loaded_as_its_users_will(tmp_path: Path) -> None:
    full, small, _ = trimmed("byte_bpe")
    small.save_pretrained(tmp_path)
    check_saved_tokenizer(tmp_path, small)
    full.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedStructureError, match=r"AutoTokenizer .* gives token .* the id"):
        check_saved_tokenizer(tmp_path, small)


def test_settings_of_the_tokenizer_come_along(tmp_path: Path) -> None:
    full = tokenizer_of("metaspace_bpe")
    full.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    full.model_max_length = 77
    full.truncation_side = "left"
    full(["a", "the quick"], padding=True, truncation=True, max_length=4)  # leaves traces in the file
    small = trim_tokenizer(full, keep_tokens(full, rows(full, SEEN)))
    small.save_pretrained(tmp_path)
    for tokenizer in (small, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.model_max_length == 77
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "the fox"}], tokenize=False)
        assert chat == "the fox</s>"
        backend = read_backend(tokenizer)
        assert backend["padding"] is None or backend["padding"]["pad_id"] == tokenizer.pad_token_id
    assert small.truncation_side == "left"
    assert small.name_or_path == full.name_or_path


def test_refused_tokenizers_are_named() -> None:
    class Custom(PreTrainedTokenizerFast):
        pass

    own = Custom(tokenizer_object=Tokenizer.from_str(backend_of("byte_bpe")))
    with pytest.raises(UnsupportedStructureError, match=r"Custom of tests\.vocabulary\.test_keep"):
        keep_tokens(own, [{"input_ids": [1]}])
    from transformers import ByT5Tokenizer

    with pytest.raises(UnsupportedStructureError, match=r"ByT5Tokenizer.*slow"):
        keep_tokens(ByT5Tokenizer(), [{"input_ids": [1]}])
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>"))
    with pytest.raises(UnsupportedStructureError, match="whole words only"):
        keep_tokens(PreTrainedTokenizerFast(tokenizer_object=words), [{"input_ids": [1]}])


def test_a_decision_that_lacks_the_alphabet_is_refused() -> None:
    full = tokenizer_of("byte_bpe")
    with pytest.raises(UnsupportedStructureError, match="lacks tokens that the tokenizer needs"):
        trim_tokenizer(full, KeptTokens(full.vocab_size + 1, tuple(range(40))))


def test_ids_of_the_config_that_no_token_has_stay() -> None:
    """Padding rows of the model: one of them is its end of text."""
    full = tokenizer_of("byte_bpe")
    model = tiny_llama(vocab_size=len(full) + 9, eos_token_id=len(full) + 4)
    kept = keep_tokens(full, rows(full, SEEN), model, round_to=1)
    assert kept.kept[-1] == len(full) + 4
    small = trim_tokenizer(full, kept)
    assert len(small) == len(kept.kept) - 1
    assert trim_embeddings(model, kept).config.eos_token_id == len(small)
    with pytest.raises(HessoError, match="does the tokenizer belong to the model"):
        keep_tokens(full, rows(full, SEEN), tiny_llama(vocab_size=len(full) - 1))


# -- the data ---------------------------------------------------------------------------------------------------------


def test_counts_of_inputs_and_labels() -> None:
    columns = {"input_ids": [[5, 5, 0], [2]], "labels": [[-100, 9, 5], [-100]], "mask": [[1, 1, 1], [1]]}
    expected = {0: 1, 2: 1, 5: 3, 9: 1}
    dataset = Dataset.from_dict(columns)
    assert count_tokens(dataset).counts == expected
    assert count_tokens(dataset.with_format("torch")).counts == expected
    assert (
        count_tokens([{name: torch.tensor(columns[name][i]) for name in columns} for i in range(2)]).counts == expected
    )
    assert count_tokens(dataset.select([1])).counts == {2: 1}
    pairs = Dataset.from_dict({"chosen_input_ids": [[1, 2]], "rejected_input_ids": [[3]]})
    assert set(count_tokens(pairs).counts) == {1, 2, 3}
    assert TokenUse.of([[4, 4], [-100]]).seen(2) == {4}


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"text": ["a"]}), r"no column `input_ids`.*columns: \['text'\].*tokenise it first"),
        (Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset(), "no map-style data set.*streaming=False"),
        (Dataset.from_dict({"input_ids": []}), "is empty"),
        (["a text"], "no column `input_ids`"),
        (None, "no map-style data set"),
    ],
)
def test_data_that_cannot_be_counted(dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_tokens(dataset)


def test_inspection_counts_what_would_go() -> None:
    full, _, kept = trimmed("byte_bpe")
    model = tiny_llama(vocab_size=full.vocab_size + 11)  # padded
    found = inspect_vocabulary(full, rows(full, SEEN), model, round_to=1)
    assert found.tokens == full.vocab_size + 11
    assert found.seen + found.needed == len(kept.kept) == found.tokens - found.removed
    assert found.seen == len(count_tokens(rows(full, SEEN)).counts)
    small = trim_embeddings(model, keep_tokens(full, rows(full, SEEN), model, round_to=1))
    assert found.parameters_removed == model.num_parameters() - small.num_parameters()
    assert inspect_vocabulary(full, rows(full, SEEN)).parameters_removed is None


@pytest.mark.parametrize("kept", [(), (3, 1), (1, 1), (-1, 2), (5, 9)])
def test_decisions_are_checked(kept: tuple[int, ...]) -> None:
    with pytest.raises(HessoError, match="`kept`"):
        KeptTokens(9, kept)


def test_decisions_survive_json() -> None:
    kept = KeptTokens(9, (1, 4, 8))
    assert KeptTokens.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept
    assert (kept.new_ids, kept.num_removed) == ({1: 0, 4: 1, 8: 2}, 6)


# -- the model --------------------------------------------------------------------------------------------------------

KEPT = KeptTokens(67, (0, 1, 2, 7, 8, 20, 33, 34, 60, 66))
_PHI = {"vocab_size": 67, "hidden_size": 48, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny_models() -> dict[str, Any]:
    opt = {"vocab_size": 67, "hidden_size": 48, "ffn_dim": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "llama_untied": tiny_llama,
        "llama_tied": lambda: tiny_llama(tie_word_embeddings=True),
        "gemma2": tiny_gemma2,
        "phi": lambda: random_model(PhiForCausalLM, PhiConfig(**_PHI, **_IDS)),
        "opt": lambda: random_model(OPTForCausalLM, OPTConfig(**opt, word_embed_proj_dim=36, **_IDS)),
    }


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def new_ids(shape: tuple[int, int] = (2, 9), kept: KeptTokens = KEPT) -> torch.Tensor:
    return torch.randint(0, len(kept.kept), shape, generator=torch.Generator().manual_seed(4))


def assert_same_logits(small: PreTrainedModel, full: PreTrainedModel, kept: KeptTokens, atol: float = 1e-6) -> None:
    ids, old = new_ids(kept=kept), torch.tensor(kept.kept)
    expected = logits(full, old[ids])[..., old]
    assert expected.std() > 0.1
    assert (logits(small, ids) - expected).abs().max() <= atol * expected.abs().max()


@pytest.mark.parametrize("name", list(tiny_models()))
def test_logits_are_those_at_the_kept_tokens(name: str, tmp_path: Path) -> None:
    model = tiny_models()[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    small = trim_embeddings(model, KEPT)
    assert_same_logits(small, model, KEPT)
    assert small.config.vocab_size == 10
    assert model.num_parameters() - small.num_parameters() == rows_elements(model) * KEPT.num_removed
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, new_ids()), logits(small, new_ids()))
    assert loaded.get_input_embeddings().num_embeddings == 10
    assert model.config.to_dict() == config
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_axes_are_found_by_shape() -> None:
    axes = {
        name: vocabulary_axes(type(model), model.config) for name, model in ((n, m()) for n, m in tiny_models().items())
    }
    both = {("model.embed_tokens.weight", 0), ("lm_head.weight", 0)}
    assert set(axes["llama_untied"]) == both
    assert set(axes["llama_tied"]) == {("model.embed_tokens.weight", 0)}
    assert set(axes["phi"]) == {*both, ("lm_head.bias", 0)}


def test_ids_get_their_new_numbers_wherever_they_stand() -> None:
    model = tiny_llama(eos_token_id=[33, 66], decoder_start_token_id=8, image_token_id=-1, sep_token_id=4096)
    model.generation_config = GenerationConfig(
        eos_token_id=[33, 66], bos_token_id=7, pad_token_id=20, forced_bos_token_id=34, suppress_tokens=[5, 33, -1],
        begin_suppress_tokens=[60], bad_words_ids=[[33, 34], [5, 33]], sequence_bias=[[[7], -1.5], [[7, 9], 2.0]],
    )  # fmt: skip
    small = trim_embeddings(model, KEPT)
    assert (small.config.eos_token_id, small.config.bos_token_id, small.config.pad_token_id) == ([6, 9], 1, 0)
    assert (small.config.decoder_start_token_id, small.config.sep_token_id, small.config.image_token_id) == (
        4,
        4096,
        -1,
    )
    settings = small.generation_config
    assert (settings.eos_token_id, settings.bos_token_id, settings.pad_token_id) == ([6, 9], 3, 5)
    assert settings.forced_bos_token_id == 7
    assert (settings.suppress_tokens, settings.begin_suppress_tokens) == ([6, -1], [8])
    assert (settings.bad_words_ids, settings.sequence_bias) == ([[6, 7]], [[[3], -1.5]])
    assert config_token_ids(model) == {33, 66, 7, 20, 34, 0, 1, 8}
    assert model.generation_config.eos_token_id == [33, 66]
    model.generation_config = None
    assert config_token_ids(model) == {33, 66, 0, 1, 8}
    assert trim_embeddings(model, KEPT).config.vocab_size == 10


def test_generation_ends_at_the_renumbered_end() -> None:
    """Greedy generation gives the same tokens where the full model only ever prefers kept ones."""
    model = tiny_llama(eos_token_id=66)
    with torch.no_grad():
        others = [index for index in range(67) if index not in KEPT.new_ids]
        model.lm_head.weight[others] = 0
    model.generation_config = GenerationConfig(eos_token_id=66, pad_token_id=0, max_new_tokens=12)
    small = trim_embeddings(model, KEPT)
    prompt = new_ids((6, 4))
    old = torch.tensor(KEPT.kept)
    full = model.generate(old[prompt], do_sample=False)
    full = torch.cat([full, full.new_zeros(6, 16 - full.shape[1])], 1)
    found = small.generate(prompt, do_sample=False)
    found = old[torch.cat([found, found.new_zeros(6, 16 - found.shape[1])], 1)]
    same = (full == found).all(1)
    assert same.sum() >= 4
    assert (full[same] == 66).any()  # ended early
    assert same.all() or (logits(model, full[~same]).argmax(-1)[..., None] == old).any(-1).all()


def test_per_layer_embeddings_are_cut_too() -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=67, vocab_size_per_layer_input=60, hidden_size=48, intermediate_size=[44, 44], num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=12, laurel_rank=4,
        num_kv_shared_layers=0, layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0, 0.0], **_IDS,
    )  # fmt: skip
    model = random_model(Gemma3nForCausalLM, config)
    try:
        logits(model, torch.tensor([[66]]))  # which lies behind the second table
    except IndexError:
        pytest.skip("this Transformers looks up tokens in the second table that lie behind it")
    small = trim_embeddings(model, KEPT)
    assert small.config.vocab_size_per_layer_input == 8  # 60 and 66 lay behind the table
    assert small.model.embed_tokens_per_layer.num_embeddings == 8
    assert_same_logits(small, model, KEPT, 1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_sequence_to_sequence_models_are_cut_as_well(name: str) -> None:
    """BART has a bias in a buffer."""
    if name == "t5":
        sizes = {"d_model": 48, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4}
        config: Any = T5Config(vocab_size=67, decoder_start_token_id=0, **sizes)
        model: Any = random_model(T5ForConditionalGeneration, config)
    else:
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 44, "d_model": 48}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 44, "max_position_embeddings": 80}
        config = BartConfig(vocab_size=67, decoder_start_token_id=2, **_IDS, **heads, **layers)
        model = random_model(BartForConditionalGeneration, config)
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(2))
    small = trim_embeddings(model, KEPT)
    ids, old = new_ids(), torch.tensor(KEPT.kept)
    with torch.no_grad():
        found = small(input_ids=ids, decoder_input_ids=ids).logits
        expected = model(input_ids=old[ids], decoder_input_ids=old[ids]).logits[..., old]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_models_that_cannot_be_cut_are_named() -> None:
    with pytest.raises(UnsupportedStructureError, match="decides on 9 tokens, LlamaForCausalLM has `vocab_size` 67"):
        trim_embeddings(tiny_llama(), KeptTokens(9, (1, 2)))

    class Padded(PhiForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, 2 * config.vocab_size)

    with pytest.raises(UnsupportedStructureError, match=r"lm_head.weight of Padded.*isn't one row a token"):
        vocabulary_axes(Padded, PhiConfig(**_PHI))

    class Fixed(PhiForCausalLM):
        def __init__(self, config: Any) -> None:
            config = copy.deepcopy(config)
            config.vocab_size = 64
            super().__init__(config)

    with pytest.raises(UnsupportedStructureError, match="no parameter of Fixed"):
        vocabulary_axes(Fixed, PhiConfig(**_PHI))


# -- end to end -------------------------------------------------------------------------------------------------------


def blocks_of(tokenizer: Any) -> Dataset:
    ids = [index for text in SEEN * 8 for index in tokenizer(text)["input_ids"]]
    cut = [ids[start : start + 10] for start in range(0, len(ids) - 10, 10)]
    return Dataset.from_dict({"input_ids": cut, "labels": cut})


def run(folder: Path, tokenizer: Any, model: PreTrainedModel, config: HessoConfig, **options: Any) -> HessoTrainer:
    trainer = HessoTrainer(
        model=model, args=arguments(folder, **options), train_dataset=blocks_of(tokenizer), processing_class=tokenizer,
        hesso_config=config,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("tied", [True, False])
def test_the_trainer_saves_a_smaller_vocabulary(tied: bool, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = tiny_llama(vocab_size=len(tokenizer) + 5, tie_word_embeddings=tied, **ids)
    full_size = len(tokenizer) + 5
    config = hesso_config(
        prune_vocabulary=True, compact="end" if tied else "never",
        target_sizes={"num_key_value_heads": 2, "intermediate_size": 28},
    )  # fmt: skip
    trainer = run(tmp_path / "run", tokenizer, model, config, save_strategy="steps", save_steps=12)
    assert trainer.model.config.vocab_size == full_size  # training sees the whole vocabulary
    trainer.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "small")
    kept = trainer.kept_tokens
    assert kept is not None
    assert kept == keep_tokens(tokenizer, blocks_of(tokenizer), model)
    assert small.config.vocab_size == len(loaded) == len(kept.kept) < full_size
    assert_same_logits(small, trainer.model.eval(), kept, 1e-5)
    check_tokenizer(tokenizer, loaded, SEEN)
    assert (small.config.eos_token_id, small.config.pad_token_id) == (loaded.eos_token_id, loaded.pad_token_id)
    prompt = loaded("the quick", return_tensors="pt")
    assert small.generate(prompt["input_ids"], max_new_tokens=4, do_sample=False).max() < len(kept.kept)
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    entry = report["vocabulary"]
    assert entry["tokens"] == {"before": full_size, "after": len(kept.kept)}
    assert entry["kept"] == list(kept.kept)
    assert entry["parameters_removed"] == kept.num_removed * 60 * (1 if tied else 2)
    removed = report["parameters"]["before"] - report["parameters"]["after"] - entry["parameters_removed"]
    whole = trainer.hesso_plan.target.parameters_after
    assert removed == report["parameters"]["before"] - whole
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"| tokens | {full_size} | {len(kept.kept)} |" in card
    assert "split into more tokens" in " ".join(card.split())
    export_pruned(tmp_path / "run" / "checkpoint-12", tmp_path / "later")  # the checkpoint knows what is kept
    later = AutoModelForCausalLM.from_pretrained(tmp_path / "later")
    assert later.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(later.state_dict()[key], value) for key, value in small.state_dict().items())


def test_embedding_channels_and_tokens_go_together(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("metaspace_bpe")
    model = tiny_llama(vocab_size=len(tokenizer))
    trainer = run(tmp_path / "run", tokenizer, model, hesso_config(prune_vocabulary=True, round_to=4))
    trainer.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    kept = trainer.kept_tokens
    assert kept is not None
    assert (
        forecast.Forecast(trainer)
        .before()[0]
        .startswith(f"vocabulary: {len(tokenizer)} -> {small.config.vocab_size} tokens, ")
    )
    assert small.get_input_embeddings().weight.shape == (len(kept.kept), 48)
    assert len(kept.kept) % 4 == 0
    assert_same_logits(small, trainer.model.eval(), kept, 1e-4)


def test_a_vocabulary_that_is_needed_whole_is_not_spoken_of_as_pruned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    every = Dataset.from_dict({"input_ids": [list(range(len(tokenizer)))] * 8})
    trainer = HessoTrainer(
        model=tiny_llama(vocab_size=len(tokenizer)), args=arguments(tmp_path), train_dataset=every,
        processing_class=tokenizer, hesso_config=hesso_config(prune_vocabulary=True),
    )  # fmt: skip
    with propagated(caplog):
        trainer.create_optimizer()
    assert f"need all {len(tokenizer)} tokens, so all stay" in caplog.text
    assert not any("vocabulary" in line for line in forecast.Forecast(trainer).before())
    assert trainer.hesso_run.record()["vocabulary"] is None


def test_uneven_layers_with_fewer_tokens_load(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    config = HessoConfig(
        pruning_ratio=0.2, structures=["mlp_channels"], layer_widths="per_layer", prune_vocabulary=True, warmup_steps=2,
        pruning_steps=4, pruning_periods=2, saliency_batches=2,
    )  # fmt: skip
    trainer = run(tmp_path / "run", tokenizer, tiny_llama(vocab_size=len(tokenizer)), config)
    trainer.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    assert trainer.kept_tokens is not None
    assert_same_logits(small, trainer.model.eval(), trainer.kept_tokens, 1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small")) == small.config.vocab_size


def test_export_by_hand_and_its_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("unigram")
    model = random_model(PhiForCausalLM, PhiConfig(**{**_PHI, "vocab_size": len(tokenizer)}, **_IDS))
    kept = keep_tokens(tokenizer, rows(tokenizer, SEEN), model)
    with pytest.raises(HessoError, match=r"`tokenizer`.*must be given with `vocabulary`"):
        export_pruned(model, tmp_path / "small", vocabulary=kept)
    report = export_pruned(model, tmp_path / "small", vocabulary=kept, tokenizer=tokenizer)
    assert report.verification.fold_error < 1e-6
    assert report.parameters_before - report.parameters_after == kept.num_removed * (48 * 2 + 1)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert_same_logits(small, model, kept)

    def wrong(model: PreTrainedModel, kept: KeptTokens) -> PreTrainedModel:
        shifted = trim_embeddings(model, kept)
        shifted.lm_head.bias.data.copy_(shifted.lm_head.bias.data.roll(1))
        return shifted

    monkeypatch.setattr("hesso_hf.export.parameters.trim_embeddings", wrong)
    with pytest.raises(VerificationError, match="logits differ"):
        export_pruned(model, tmp_path / "other", vocabulary=kept, tokenizer=tokenizer)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processing_class": None}, "`prune_vocabulary` .*`processing_class`"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, "`train_dataset` .*no column `input_ids`"),
        ({"train_dataset": Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset()}, "`train_dataset`.*stream"),
    ],
)
def test_what_the_trainer_refuses_before_any_work(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_bpe")
    given = {"processing_class": tokenizer, "train_dataset": blocks_of(tokenizer), **options}
    with pytest.raises(HessoError, match=message):
        HessoTrainer(
            model=tiny_llama(vocab_size=len(tokenizer)), args=arguments(tmp_path),
            hesso_config=hesso_config(prune_vocabulary=True), **given,
        )  # fmt: skip


def test_the_whole_vocabulary_stays_by_default() -> None:
    assert HessoConfig(pruning_ratio=0.5).prune_vocabulary is False
    with pytest.raises(HessoError, match="`prune_vocabulary`"):
        HessoConfig(pruning_ratio=0.5, prune_vocabulary="yes")
