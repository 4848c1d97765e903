"""The bundled model, its tokenizer and the split of the documentation it was trained on."""

from __future__ import annotations

import collections
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hesso_hf.bundled import (
    bundled_model_path,
    python_docs_dataset,
    python_docs_texts,
    python_docs_topics,
    split_topics,
)

BLOCK_SIZE = 256
MAX_FOLDER_BYTES = 2_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(bundled_model_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32)


def eight_word_runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}


def test_split_shares_no_topic_and_holds_out_a_tenth():
    train, test = python_docs_topics("train"), python_docs_topics("test")
    assert not train.keys() & test.keys()
    num_train, num_test = (sum(map(len, side.values())) for side in (train, test))
    assert 0.05 < num_test / (num_train + num_test) < 0.15


def test_held_out_texts_do_not_stand_in_the_training_texts():
    train_runs = set().union(*map(eight_word_runs, python_docs_texts("train")))
    for name, text in python_docs_topics("test").items():
        runs = eight_word_runs(text)
        assert len(runs & train_runs) <= 0.15 * len(runs), name


def test_split_depends_on_neither_the_order_nor_the_hash_seed():
    topics = python_docs_topics("train")
    forwards, backwards = split_topics(topics, 3), split_topics(dict(reversed(topics.items())), 3)
    assert list(forwards.train.items()) == list(backwards.train.items())
    assert list(forwards.test.items()) == list(backwards.test.items())

    program = "from hesso_hf.bundled import python_docs_topics; print(*python_docs_topics('test'))"
    other = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert other.stdout.split() == list(python_docs_topics("test"))


def test_near_duplicate_of_a_training_topic_is_on_neither_side():
    held_out = list(python_docs_topics("test"))[:2]
    topics = {held_out[0]: "one two three four five six seven eight nine ten", held_out[1]: "of its own " * 9}
    topics["for"] = "zero one two three four five six seven eight nine ten eleven"
    sides = split_topics(topics, 6)
    assert list(sides.train) == ["for"]
    assert list(sides.test) == [held_out[1]]


@pytest.mark.parametrize("split", ["train", "test"])
def test_dataset_is_the_joined_texts_in_equal_blocks(tokenizer: PreTrainedTokenizerBase, split: str):
    dataset = python_docs_dataset(tokenizer, split, 128)
    assert dataset.column_names == ["input_ids", "labels"]
    blocks = dataset["input_ids"][:]
    assert {len(block) for block in blocks} == {128}
    assert dataset["labels"][:] == blocks
    joined = "".join(text + tokenizer.eos_token for text in python_docs_texts(split))
    decoded = tokenizer.decode([token for block in blocks for token in block])
    assert joined.startswith(decoded.rstrip("\N{REPLACEMENT CHARACTER}"))
    num_left_over = len(tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]) - 128 * len(dataset)
    assert 0 <= num_left_over < 128


def test_mistakes_are_named(tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(ValueError, match=r"`split` \('valid'\)"):
        python_docs_texts("valid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`block_size` \(1\)"):
        python_docs_dataset(tokenizer, "test", 1)
    with pytest.raises(ValueError, match=r"`block_size` \(1000000\)"):
        python_docs_dataset(tokenizer, "test", 1_000_000)
    with pytest.raises(ValueError, match="`held_out_bucket`"):
        split_topics({}, 9)
    without_eos = AutoTokenizer.from_pretrained(bundled_model_path(), eos_token=None)
    with pytest.raises(ValueError, match="eos token"):
        python_docs_dataset(without_eos, "test", BLOCK_SIZE)


def test_folder_is_small_and_whole():
    files = {path.name: path.stat().st_size for path in bundled_model_path().iterdir()}
    assert sum(files.values()) < MAX_FOLDER_BYTES
    assert files.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_model_fits_the_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    config = model.config
    assert config.vocab_size == len(tokenizer) == 1024
    assert config.num_key_value_heads < config.num_attention_heads
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    stored = AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype="auto")
    assert stored.dtype == torch.bfloat16


def test_held_out_loss_is_far_below_unigram_guessing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    train_blocks = python_docs_dataset(tokenizer, "train", BLOCK_SIZE)["input_ids"][:]
    test_blocks = python_docs_dataset(tokenizer, "test", BLOCK_SIZE)["input_ids"][::3]
    counts = collections.Counter(token for block in train_blocks for token in block)
    total = sum(counts.values()) + len(tokenizer)
    targets = [token for block in test_blocks for token in block[1:]]
    unigram_loss = -sum(math.log((counts[token] + 1) / total) for token in targets) / len(targets)

    with torch.no_grad():
        input_ids = torch.tensor(test_blocks)
        loss = model(input_ids=input_ids, labels=input_ids).loss.item()
    assert unigram_loss < math.log(len(tokenizer))
    assert loss < 0.8 * unigram_loss


def test_model_continues_a_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    inputs = tokenizer("The statement", return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("The statement")


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn  x   # two  blanks\n\n\n",
        " leading, trailing \t\r\n ",
        "Zürich, ångström, e\u0301, Ελλάδα, 漢字, العربية, 👩\u200d👩\u200d👧, \x00\x7f\ufeff\U0010ffff",
        "don't , isn 't . <|endoftext|> <|pad|>",
        "",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer: PreTrainedTokenizerBase, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
