"""The data of `hesso-hf prune`: which tokens are learnt, how examples are made, how much of a data set is fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hesso_hf.bundled import bundled_model_path
from hesso_hf.cli.data import Data, read_data
from hesso_hf.cli.examples import Examples, Padding, Reading
from hesso_hf.cli.main import main
from hesso_hf.cli.prune import datasets_of
from hesso_hf.cli.recipe import parse_recipe
from hesso_hf.errors import HessoError

MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WITH_TOOLS = "{{ tools[0].name }}{{ lead }}" + MARKED.replace(
    "m.content }}", "m.content }}{{ m.tool_calls is defined }}"
)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, ANSWERED = said("user", "What is 2 and 3?"), said("assistant", "It is 5.")
TALK = [said("system", "Be short."), ASKED, ANSWERED, said("user", "And 4?"), said("assistant", "9 then.")]
PAIR = {"prompt": "What is 2 and 3?", "completion": " It is 5."}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(bundled_model_path())


def learnt(tokenizer: Any, example: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != -100])


END = "<|endoftext|>"
LEARNT: dict[str, tuple[dict[str, Any], dict[str, Any], str, str, str]] = {
    # row, options, template, all that is read, what is learnt of it
    "messages": (
        {"messages": TALK}, {}, MARKED,
        f"<system>Be short.<user>What is 2 and 3?<assistant>It is 5.{END}<user>And 4?<assistant>9 then.{END}",
        f"It is 5.{END}9 then.{END}",
    ),
    "messages, all of them": (
        {"messages": [ASKED, ANSWERED]}, {"assistant_only_loss": False}, MARKED,
        f"<user>What is 2 and 3?<assistant>It is 5.{END}", f"user>What is 2 and 3?<assistant>It is 5.{END}",
    ),
    "messages that nothing marks": (
        {"messages": [ASKED, ANSWERED]}, {}, UNMARKED,
        f"<user>What is 2 and 3?<assistant>It is 5.{END}", f"user>What is 2 and 3?<assistant>It is 5.{END}",
    ),
    "messages in another column": (
        {"talk": [ASKED, ANSWERED]}, {"text_column": "talk"}, MARKED,
        f"<user>What is 2 and 3?<assistant>It is 5.{END}", f"It is 5.{END}",
    ),
    "messages with tools, options and keys that others have": (
        {"messages": [ASKED | {"tool_calls": None}, ANSWERED], "tools": [{"name": "add"}],
         "chat_template_kwargs": {"lead": "!"}}, {}, WITH_TOOLS,
        f"add!<user>What is 2 and 3?False<assistant>It is 5.{END}", f"It is 5.{END}",
    ),
    "a pair": (PAIR, {}, "", f"{END}What is 2 and 3? It is 5.{END}", f" It is 5.{END}"),
    "a pair whose tokens merge": (
        {"prompt": "What is 2 and 3? ", "completion": "It is 5."}, {}, "",
        f"{END}What is 2 and 3? It is 5.{END}", f" It is 5.{END}",
    ),
    "a pair, all of it": (
        PAIR, {"completion_only_loss": False}, "",
        f"{END}What is 2 and 3? It is 5.{END}", f"What is 2 and 3? It is 5.{END}",
    ),
    "a pair that begins and ends itself": (
        {"prompt": f"{END}What is 2 and 3?", "completion": f" It is 5.{END}"}, {}, "",
        f"{END}What is 2 and 3? It is 5.{END}", f" It is 5.{END}",
    ),
    "a pair of messages": (
        {"prompt": [ASKED], "completion": [ANSWERED]}, {}, UNMARKED,
        f"<user>What is 2 and 3?<assistant>It is 5.{END}", f"It is 5.{END}",
    ),
    "text": (
        {"text": "One two.", "messages": TALK}, {"packing": False}, "", f"{END}One two.{END}", f"One two.{END}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEARNT)
def test_which_tokens_of_a_row_are_learnt(case: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row, options, template, everything, wanted = LEARNT[case]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    found = Examples.of("data", row, tokenizer, Reading(64, **options)).read(row, 0)
    assert tokenizer.decode(found["input_ids"]) == everything
    assert learnt(tokenizer, found) == wanted
    assert len(found["labels"]) == len(found["input_ids"]) == found["length"]
    said_so = "doesn't mark" in Examples.of("data", row, tokenizer, Reading(64, **options)).describe()
    assert said_so == (case == "messages that nothing marks")
    taught = [(a, b) for a, b in zip(found["input_ids"], found["labels"], strict=True) if b != -100]
    assert all(token == label for token, label in taught)


def read(rows: list[dict[str, Any]], folder: Path, tokenizer: Any, **options: Any) -> Data:
    path, ratio = folder / "data.jsonl", options.pop("held_out_ratio", None)
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_data(str(path), tokenizer, Reading(**options), "train", held_out_ratio=ratio)


def test_rows_that_are_too_long_are_shortened_and_those_that_teach_nothing_then_are_counted(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [PAIR, {"prompt": "a b c " * 99, "completion": "d"}, {"prompt": "e", "completion": "f g h " * 99}]
    data = read(rows, tmp_path, tokenizer, block_size=40)
    assert (data.rows, data.shortened, data.empty, len(data.train)) == (3, 2, 1, 2)
    assert [len(ids) <= 40 for ids in data.train["input_ids"]] == [True, True]
    assert "cut there: 2\n" in "\n".join([*data.describe(), ""])
    assert "within `block_size`: 1" in data.describe()[-1]
    assert data.to_dict() == {
        "kind": "prompt-completion", "columns": ["prompt", "completion"], "loss": "completion", "packing": False,
        "rows": 3, "examples": 2,
    }  # fmt: skip
    with pytest.raises(HessoError, match=r"no row has a token to learn from within `block_size` \(4\); raise it"):
        read(rows[1:2], tmp_path, tokenizer, block_size=4)


def test_packing_puts_whole_rows_together(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} and {i}: ", "completion": f"twice {i}. " * (1 + i % 3)} for i in range(20)]
    alone = read(rows, tmp_path, tokenizer, block_size=64).train
    packed = read(rows, tmp_path, tokenizer, block_size=64, packing=True).train
    assert 1 < len(packed) < 20
    assert max(map(len, packed["input_ids"])) <= 64
    for name in ("input_ids", "labels"):
        assert list(chain(*packed[name])) == list(chain(*alone[name]))
    whole = {tuple(ids) for ids in alone["input_ids"]}
    for ids in packed["input_ids"]:
        while ids:  # what is left begins with a row
            row = next(row for row in whole if tuple(ids[: len(row)]) == row)
            ids = ids[len(row) :]


def test_padding_is_neither_read_nor_learnt(tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Padding(tokenizer)(rows)
    assert {name: part.tolist() for name, part in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 1, 1]], "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }  # fmt: skip
    assert all(part.dtype == torch.int64 for part in batch.values())


# -- what is fetched --------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set as one of the Hub is read, which can't be read to its end."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        rows = [{"text": f"Row {row} of shard {shard}. " * 9} for row in range(300)]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "train-2.jsonl").write_text('{"text": \n')
    return str(folder)


FETCHED: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Data], bool]]] = {
    "the first rows": ({"max_examples": 30, "needed": 9999}, {}, lambda data: data.rows == 30),
    "as many blocks as are needed": (
        {"needed": 50}, {}, lambda data: 50 <= len(data.train) < 60 and data.rows < 50,
    ),
    "as many examples as are needed": (
        {"needed": 50}, {"packing": False}, lambda data: len(data.train) == data.rows == 50,
    ),
    "and some to hold out": (
        {"needed": 45, "held_out_ratio": 0.1}, {"packing": False},
        lambda data: (len(data.train), len(data.held_out or [])) == (45, 5),
    ),
    "enough rows to hold one out": (
        {"needed": 1, "held_out_ratio": 0.05}, {}, lambda data: data.rows == 20 and data.held_out is not None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FETCHED)
def test_no_more_is_fetched_than_a_run_takes(case: str, shards: str, tokenizer: Any) -> None:
    asked, options, fits = FETCHED[case]
    assert fits(read_data(shards, tokenizer, Reading(32, **options), "train", **asked))


def test_without_a_bound_all_is_fetched(shards: str, tokenizer: Any) -> None:
    with pytest.raises(HessoError, match=r"can't be loaded: JSON parse error"):
        read_data(shards, tokenizer, Reading(32), "train")
    (Path(shards) / "train-2.jsonl").unlink()
    assert read_data(shards, tokenizer, Reading(32), "train").rows == 600


def test_what_is_fetched_is_the_same_at_every_call_and_read_once(
    shards: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch() -> Data:
        other = AutoTokenizer.from_pretrained(bundled_model_path())
        return read_data(shards, other, Reading(32), "train", needed=50, held_out_ratio=0.1)

    first = fetch()
    with monkeypatch.context() as patch:
        patch.setattr(Examples, "read", lambda *_: pytest.fail("a row was read again"))
        again = fetch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "anew")
    (Path(shards) / "train-2.jsonl").unlink()
    datasets.load_dataset(shards)  # all of it is on the disk then
    anew = fetch()
    for data in (again, anew):
        assert data.train[:] == first.train[:]
        assert data.held_out is not None
        assert first.held_out is not None
        assert data.held_out[:] == first.held_out[:]
    (Path(shards) / "train-0.jsonl").write_text('{"text": "Other words."}\n' * 400)
    assert fetch().train[:] != first.train[:], "a data set that changed is read again"


def test_a_row_that_can_t_be_read_is_named_where_it_is_streamed(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    rows = [PAIR, PAIR | {"completion": ""}]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(HessoError, match=r"data'\), row 2: `completion` is empty"):
        read_data(str(tmp_path / "data"), tokenizer, Reading(32), "train", needed=9)


def test_a_recipe_reads_what_its_steps_and_evaluations_take(
    shards: str, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--model", "bundled", "--dataset", shards, "--max_steps", "3", "--per_device_train_batch_size", "4",
        "--gradient_accumulation_steps", "2", "--packing", "false", "--pruning_ratio", "0.5", "--use_cpu", "true",
    ]  # fmt: skip
    data, held_out = datasets_of(parse_recipe(None, flags), tokenizer, 32)
    assert (data.rows, len(data.train), len(held_out)) == (26, 24, 2)
    flags += ["--eval_split", "train", "--retained_dataset", "python-docs", "--max_eval_examples", "7"]
    data, held_out = datasets_of(parse_recipe(None, flags), tokenizer, 32)
    assert (len(data.train), len(held_out["held_out"]), len(held_out["retained"])) == (24, 7, 7)
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"  examples to train on: 24; to evaluate on: 7; of `retained_dataset`: 7 of \d+ \(`max_eval_examples`\)", said
    )


# -- from the command line --------------------------------------------------------------------------------------------


def test_conversations_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    """One loss is said once: the table's, and after it that of all held-out examples where these are more."""
    rows = [
        {"messages": [said("user", f"What is {i} and 1?"), said("assistant", f"It is {i + 1}.")]} for i in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chat.jinja").write_text(MARKED)
    flags = [
        "prune", "--model", "bundled", "--dataset", str(tmp_path / "chat.jsonl"), "--output_dir", str(tmp_path / "run"),
        "--chat_template", str(tmp_path / "chat.jinja"), "--max_steps", "4", "--pruning_ratio", "0.3",
        "--per_device_train_batch_size", "2", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true",
        "--save_strategy", "no", "--calibration_examples", "0", "--stream_basis", "given", "--healing", "off",
        "--eval_ratio", "0.25", "--max_eval_examples", "6", "--quality_examples", "2",
    ]  # fmt: skip
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "chat.jsonl: 40 rows of conversations in `messages`, loss on the assistant's tokens; each row to an" in out
    assert "examples to train on: 30; to evaluate on: 6 of 10 (`max_eval_examples`)\n" in out
    assert "losses measured on: " not in out, "one line says it"
    assert out.count("eval_loss") == 0
    line = (
        r"^6 held-out examples: the table's losses are of 2 of these; on all of them the smaller model has \d\.\d{4} n"
    )
    assert len(re.findall(line, out, re.MULTILINE)) == 1
    small = tmp_path / "run" / "small"
    report = json.loads((small / "pruning_report.json").read_text())
    assert (report["data"]["kind"], report["data"]["loss"], report["data"]["rows"]) == ("messages", "assistant", 40)
    assert report["quality"]["eval_loss"]["tokens"] < 2 * 10, "what the user asks isn't counted"
    assert AutoTokenizer.from_pretrained(small).chat_template == MARKED
    assert AutoModelForCausalLM.from_pretrained(small).num_parameters() < 869_504 * 0.75
    assert main([*flags, "--output_dir", str(tmp_path / "all"), "--quality_examples", "6"]) == 0
    out = capsys.readouterr().out
    assert "losses measured on: held-out examples (6)\n" in out
    assert "on all of them" not in out, "the table is of all of them"
