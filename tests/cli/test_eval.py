"""`hesso-hf eval`: models side by side, what is measured of each, and what is refused before anything is."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from matplotlib.container import BarContainer
from tokenizers import normalizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hesso_hf.budget.cost import build_cost
from hesso_hf.bundled import bundled_model_path
from hesso_hf.cli import comparison_plot, evaluate, joined
from hesso_hf.cli.allocations import Allocations
from hesso_hf.cli.commands import eval_flags
from hesso_hf.cli.comparison import evaluation_of
from hesso_hf.cli.data import text_blocks
from hesso_hf.cli.main import main
from hesso_hf.cli.tasks import PAPER
from hesso_hf.config.files import PAGE_NAME, REPORT_NAME
from hesso_hf.structures.proof.prove import proved_groups
from tests.cli.test_report import small_report
from tests.support import ROOT
from tests.support.lm_eval import stand_in
from tests.support.tiny import tiny_llama

TEXT, CONTEXT = ["--dataset", "text.jsonl"], 128  # tokens that `small` reads at once; `bundled` reads 512
SIZES = ["parameters", "bytes on disk", "FLOPs per token", "peak memory"]
SHORT = [*TEXT, "--block-size", "16", "--batch-size", "3", "--limit", "4", "--new-tokens", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a smaller model of the bundled one's tokenizer, what doesn't compare, and text."""
    made = tmp_path_factory.mktemp("eval")
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    for name in ("small", "damaged"):
        tiny_llama(vocab_size=1024).save_pretrained(made / name)
        tokenizer.save_pretrained(made / name)
    (made / "damaged" / "model.safetensors").write_bytes(b"no weights")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tiny_llama(vocab_size=1024).save_pretrained(made / "lower")
    tokenizer.save_pretrained(made / "lower")
    (made / "tasks").mkdir()
    (made / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"Sentence number {i}. " * 40, "short": "a"}) for i in range(9))
    )
    return made


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what is computed anew here is on the CPU


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the stand-in for lm-eval is asked."""
    return stand_in(monkeypatch)


def result(argv: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["eval", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_two_models_are_measured_on_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "bundled", "small", *SHORT, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["models"]
    blocks, _ = text_blocks("text.jsonl", AutoTokenizer.from_pretrained("small"), 16, "train", max_examples=4)
    ids = torch.tensor(blocks["input_ids"][:])
    for row, name, source in zip(found, ("bundled", "small"), (bundled_model_path(), Path("small")), strict=True):
        model = AutoModelForCausalLM.from_pretrained(source)
        assert row["model"] == name
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert row["bytes"] == (source / "model.safetensors").stat().st_size
        assert row["tokens"] == len(ids) * 15
        with torch.no_grad():
            loss = float(model.float()(input_ids=ids, labels=ids).loss)
        assert abs(row["loss"] - loss) < 1e-5
        assert row["tokens_per_second"] > 0
    assert [row["dtype"] for row in found] == ["float32", "float32"], "speeds in different ones don't compare"
    assert "the models are stored in bfloat16 and float32; all are measured in float32 (`--dtype`" in printed.err


def test_models_that_write_nothing_or_read_on_two_sides_have_sizes_and_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_llama(vocab_size=1024).config
    config.pad_token_id = None  # of which a classifier reads single rows
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=1024, **sizes)).save_pretrained(tmp_path / "translator")
    names = [str(tmp_path / name) for name in ("classifier", "translator")]
    found = result([*names, "--block-size", "16", "--batch-size", "2", "--new-tokens", "2"], capsys)["models"]
    for row in found:
        assert row["tokens_per_second"] > 0
        assert row["peak_memory"] > 0
    assert found[0]["tokens_written_per_second"] is None
    assert found[1]["tokens_written_per_second"] > 0


@pytest.mark.parametrize("kind", ["pairs", "chat"])
def test_what_prune_learns_of_a_row_is_what_is_measured(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, said = [f"Is {'very ' * n}true?" for n in range(3)], [" Yes.", " It is not so.", " No, not at all."]
    rows: list[dict[str, Any]] = [{"prompt": a, "completion": b} for a, b in zip(asked, said, strict=True)]
    if kind == "chat":
        roles = ("user", "assistant")
        rows = [
            {"messages": [{"role": role, "content": text} for role, text in zip(roles, row.values(), strict=True)]}
            for row in rows
        ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["small", "--dataset", str(tmp_path / "rows.jsonl"), "--block-size", "64", "--no-speed", "--batch-size", "2"]
    if kind == "chat":
        answer = "{% generation %}{{ m.content }}{% endgeneration %}"
        template = f"{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ m.content }}}}{{% else %}}{answer}"
        (tmp_path / "chat.jinja").write_text(f"{template}{{% endif %}}{{% endfor %}}")
        argv += ["--chat-template", str(tmp_path / "chat.jinja")]
    assert main(["eval", *argv, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert f"3 rows of {'pairs' if kind == 'pairs' else 'conversations'} in" in printed.err
    tokenizer, model = AutoTokenizer.from_pretrained("small"), AutoModelForCausalLM.from_pretrained("small")
    losses = []
    for before, after in zip(asked, said, strict=True):
        ids = tokenizer(before + after, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        if kind == "pairs":
            ids, start = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], start + 1
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="none").tolist()
    assert found["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_line_on_stderr_says_which_stage_runs(
    lm_eval: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "bundled", "small", *SHORT, "--new-tokens", "2", "--tasks", "lambada", "--dtype", "float32"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    said = [line.removeprefix("hesso-hf: ") for line in printed.err.splitlines() if line.startswith("hesso-hf: ")]
    assert said == [
        "reading text.jsonl",
        "fetching tasks lambada",
        "loading bundled, small",
        "speed of reading, the models in turn, alone and 3 at once",
        "speed of writing 2 tokens, the same way",
        *(
            f"model {number} of 2, {name}: {stage}"
            for number, name in ((1, "bundled"), (2, "small"))
            for stage in ("peak memory", "loss on 73 examples", "tasks lambada")
        ),
    ]
    assert "hesso-hf: " not in printed.out
    assert main([*argv, "--no-speed", "--json"]) == 0
    assert "hesso-hf: " not in capsys.readouterr().err


def test_pairs_are_not_joined_and_messages_need_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Why?", "completion": " So."}))
    assert main(["eval", "small", "--dataset", str(rows), "--joined"]) == 2
    assert "has `prompt` and `completion`, and text alone is read here" in capsys.readouterr().err
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}]}))
    assert main(["eval", "small", "--dataset", str(rows)]) == 2
    assert "the tokenizer of the model no chat template: name a file with one by `chat_template`" in (
        capsys.readouterr().err
    )


def test_one_model_has_its_measures_at_the_top(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(["bundled", *SHORT, "--dtype", "float32", "--device", "cpu"], capsys)
    assert found["tokens"] > 0
    assert abs(found["perplexity"] - evaluate.perplexity(found["loss"])) < 1e-9
    assert (found["dtype"], found["device"], found["batch_size"]) == ("float32", "cpu", 3)
    assert "tasks" not in found


def test_blocks_are_by_default_as_long_as_every_model_reads(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TEXT, "--batch-size", "1", "--limit", "1", "--new-tokens", "0"]
    assert result(["bundled", *flags], capsys)["block_size"] == 256
    assert result(["bundled", "small", *flags], capsys)["models"][0]["block_size"] == CONTEXT


def test_without_text_and_tasks_it_is_sizes_and_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "read_tokenizer", lambda *_: pytest.fail("nothing is read"))
    asked, plain = [], evaluate.tokens_written_per_second

    def written(models: list[Any], *how: int) -> list[float]:
        asked.append(how)
        return plain(models, *how)

    monkeypatch.setattr(evaluate, "tokens_written_per_second", written)
    found = result(["bundled", "small", "--block-size", "12", "--batch-size", "2", "--new-tokens", "3"], capsys)
    assert asked[:2] == [(1, 8, 3), (2, 8, 3)]  # as many as a block has: 8 of the prompt, the first one, 3 more
    for row in found["models"]:
        assert 0 < row["memory"] - 4 * row["parameters"] < 200  # the rotary embedding's frequencies
        assert all(row[key] > 0 for key in ("first_token_seconds", "tokens_written_per_second"))
        assert "loss" not in row
    monkeypatch.setattr("transformers.LlamaForCausalLM.can_generate", lambda self: self.config.hidden_size == 60)
    assert main(["eval", "bundled", "small", "--block-size", "4", "--new-tokens", "9"]) == 0
    said = capsys.readouterr()
    assert "2 tokens are written, not 9: with the prompt they fill a block of 4" in said.err
    line = next(line for line in said.out.splitlines() if "first token (s)" in line)
    assert re.search(r" - .* 0\.\d+", line)


def test_table_and_files_have_a_column_for_each_model_and_the_change_against_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm_eval: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "held_out_loss", lambda model, *_: 2.0 if model.num_parameters() > 500_000 else 2.5)
    flags = ["bundled", "small", *SHORT, "--tasks", "lambada"]
    assert main(["eval", *flags, "--output", str(tmp_path / "found.md")]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    page = (tmp_path / "found.md").read_text()
    lines = {
        "| measure | bundled | small |",
        "| dtype | float32 | float32 |",
        "| parameters | 869,504 | 156,908 (-82.0%) |",
        "| loss (nats per token) | 2.0000 | 2.5000 (+0.5000) |",
        "| perplexity | 7.3891 | 12.1825 (+64.9%) |",
        "| lambada acc | 0.2500 ± 0.0123 | 0.5000 ± 0.0123 (+0.2500) |",
        "| lambada em (strict) | 0.5000 | 0.5000 |",
    }
    assert lines <= set(page.splitlines())
    assert "stderr" not in page
    for line in lines:
        for cell in line.strip("| ").split(" | "):
            assert cell in printed
    lm_eval.clear()
    found = result([*flags, "--output", str(tmp_path / "found.json")], capsys)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    scores = {"acc,none": 0.25, "acc_stderr,none": 0.0123, "em,strict": 0.5}
    assert found["models"][0]["tasks"] == {"lambada": scores}


def test_a_smaller_model_s_card_page_and_report_take_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm_eval: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "held_out_loss", lambda model, *_: 2.0 if model.num_parameters() > 500_000 else 2.5)
    monkeypatch.setattr(evaluate, "tokens_per_second", lambda models, *_: [math.inf] * len(models))
    small = shutil.copytree("small", tmp_path / "small")
    (small / REPORT_NAME).write_text(json.dumps(small_report(evaluation=None)))
    assert main(["eval", "bundled", str(small), *SHORT, "--tasks", "lambada", "--card"]) == 0
    assert "tokens_per_second isn't a finite number, and is left out of the card" in capsys.readouterr().err
    found = json.loads((small / REPORT_NAME).read_text())["evaluation"]
    assert (found["dataset"], found["block_size"], found["dtype"]) == ("text.jsonl", 16, "float32")
    peak = found["values"].pop("peak_memory")
    assert peak["after"] < peak["before"]
    assert found["values"] == {
        "loss": {"before": 2.0, "after": 2.5}, "perplexity": {"before": math.exp(2.0), "after": math.exp(2.5)},
        "lambada acc": {"before": 0.25, "after": 0.5}, "lambada em (strict)": {"before": 0.5, "after": 0.5},
    }  # fmt: skip
    assert found["errors"]["lambada acc"] == {"before": 0.0123, "after": 0.0123}
    assert "| lambada acc | 0.2500 ± 0.0123 | 0.5000 ± 0.0123 |" in (small / "README.md").read_text()
    assert found["limit"] == 4
    for page in ("README.md", PAGE_NAME):
        assert "tokens, at most 4 examples of each." in (small / page).read_text()
    assert "lambada acc" in (small / PAGE_NAME).read_text()
    assert main(["eval", str(small), *SHORT, "--card"]) == 0
    assert json.loads((small / REPORT_NAME).read_text())["evaluation"]["values"]["loss"] == {"after": 2.5}


def test_models_that_do_not_fit_together_are_measured_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    together, speeds = list[int](), evaluate._speeds

    def no_room_for_two(models: Any, *args: Any) -> Any:
        together.append(len(models))
        if len(models) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return speeds(models, *args)

    monkeypatch.setattr(evaluate, "_speeds", no_room_for_two)
    assert main(["eval", "bundled", "small", *SHORT, "--output", "found.json"]) == 0
    assert together == [2, 1, 1]
    said = capsys.readouterr()
    assert "don't fit on cpu together: each is measured alone, at another moment than the others" in said.err
    assert "model 2 of 2, small: loss on" in said.err
    rows = json.loads(Path("found.json").read_text())["models"]
    assert [row["model"] for row in rows] == ["bundled", "small"]
    assert all(row["tokens_per_second"] > 0 and row["loss"] > 0 for row in rows)


def test_what_was_measured_before_a_later_model_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([2.5])
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *_: next(losses, None) or sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        main(["eval", "bundled", "small", *SHORT, "--no-speed", "--output", "part.json"])
    said = capsys.readouterr()
    assert "eval breaks off; what was measured until then" in said.err
    assert re.search(r"measure +bundled +small", said.out)
    assert "; broken off, not all was measured" in said.out
    part = json.loads(Path("part.json").read_text())
    assert part["complete"] is False
    assert [row.get("loss") for row in part["models"]] == [2.5, None]
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        main(["eval", "bundled", "small", *SHORT, "--no-speed", "--output", "part.svg", "--json"])
    part = json.loads(capsys.readouterr().out)
    assert [row["parameters"] > 0 for row in part["models"]] == [True, True]
    assert "loss" not in part["models"][0]
    assert Path("part.svg").stat().st_size > 1000


def test_a_picture_of_what_broke_off_leaves_out_what_one_model_lacks(
    lm_eval: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = evaluate.Tasks.scores
    monkeypatch.setattr(
        evaluate.Tasks, "scores", lambda self, *given: sys.exit("killed") if lm_eval else scores(self, *given)
    )
    flags = ["--tasks", "lambada", "--no-speed", "--output", "part.svg"]
    with pytest.raises(SystemExit, match="killed"):
        main(["eval", "bundled", "small", *flags])
    said = capsys.readouterr()
    assert "parameters" in said.out
    assert "lambada" not in said.out + Path("part.svg").read_text()


def test_what_was_measured_together_stays_where_models_are_measured_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second doesn't fit beside the first, which is broken off when it is measured again."""
    found: list[Any] = [2.5, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]

    def held_out_loss(*given: Any) -> float:
        value = found.pop(0) if found else sys.exit("killed")
        if isinstance(value, Exception):
            raise value
        return float(value)

    monkeypatch.setattr(evaluate, "held_out_loss", held_out_loss)
    with pytest.raises(SystemExit, match="killed"):
        main(["eval", "bundled", "small", *SHORT, "--no-speed", "--json"])
    assert [row.get("loss") for row in json.loads(capsys.readouterr().out)["models"]] == [2.5, None]


def test_a_batch_that_does_not_fit_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def held_out_loss(*args: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(evaluate, "held_out_loss", held_out_loss)
    assert main(["eval", "bundled", "small", *SHORT, "--no-speed"]) == 2
    said = capsys.readouterr().err
    assert "a model and a batch don't fit on the device (CUDA out of memory. Tried to allocate 2 GiB): give a" in said


def test_tasks_are_asked_of_every_model_as_the_flags_say(
    lm_eval: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Models that read text as other tokens compare by tasks."""
    flags = ["--num-fewshot", "2", "--limit", "5", "--batch-size", "3", "--block-size", "16", "--include-path", "tasks"]
    assert main(["eval", "small", "lower", "--tasks", "fixed, paper", *flags]) == 0
    assert "hesso-hf: fixed sets its own number of examples, 0: not 2" in capsys.readouterr().err
    for asked, name in zip(lm_eval, ("small", "lower"), strict=True):
        assert asked["tasks"] == ["fixed", *PAPER]
        assert (asked["num_fewshot"], asked["limit"]) == (2, 5)
        assert asked["task_manager"].include_path == "tasks"
        assert asked["model"].batch_size == 3
        assert asked["model"].pretrained.config.name_or_path == name
        assert asked["model"].tokenizer.name_or_path == name


def test_a_size_on_disk_that_is_not_known_compares_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "weights_bytes", lambda folder: 0 if folder.name == "small" else 700)
    output = tmp_path / "found.md"
    assert main(["eval", "small", "bundled", *SHORT, "--output", str(output)]) == 0
    assert "| bytes on disk | - | 700 |" in output.read_text().splitlines()
    capsys.readouterr()
    assert result(["small", *SHORT], capsys)["bytes"] is None


def test_joined_text_is_read_by_the_wikitext_protocol(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All text in one, windows of the context that don't overlap, the mean loss of the tokens that are predicted."""
    asked, texts = [], [json.loads(line)["text"] for line in Path("text.jsonl").read_text().splitlines()]

    def hub(*source: object, bounded: bool) -> tuple[Dataset, None]:
        asked.append(source)
        return Dataset.from_dict({"text": texts}), None

    monkeypatch.setattr(joined, "load_rows", hub)
    assert main(["eval", "small", "--dataset", "wikitext2", "--no-speed", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    assert "windows of 128 tokens: perplexities of 2,048 don't compare" in said.err
    model, tokenizer = (kind.from_pretrained("small") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids[0]
    windows = [ids[start : start + CONTEXT] for start in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    assert abs(found["perplexity"] - math.exp(sum(losses) / len(losses))) < 1e-2
    assert found["tokens"] == len(windows) * (CONTEXT - 1) > 5 * CONTEXT
    assert "tokens_per_second" not in found
    monkeypatch.undo()
    flags = ["--dataset", "python-docs", "--joined", "--limit", "2", "--block-size", "32", "--no-speed"]
    assert result([str(bundled_model_path()), *flags], capsys)["joined"]


def test_of_joined_text_no_more_is_fetched_than_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": "some words " * 40} for _ in range(3))
        raise AssertionError("a fourth row is fetched")

    def hub(*_: object, bounded: bool) -> tuple[IterableDataset, None]:
        assert bounded
        return IterableDataset.from_generator(rows), None

    monkeypatch.setattr(joined, "load_rows", hub)
    flags = ["small", "--dataset", "wikitext2", "--no-speed", "--limit"]
    assert result([*flags, "3"], capsys)["tokens"] > CONTEXT
    assert main(["eval", *flags, "4"]) == 2
    assert "`dataset` ('wikitext2', split 'test') can't be loaded: a fourth row is fetched" in capsys.readouterr().err


def test_operations_are_those_of_a_budget_and_of_the_layers_as_they_are() -> None:
    model = tiny_llama()
    groups, _, axis_map = proved_groups(type(model), model.config)
    assert evaluate.flops_per_token(model) == build_cost("flops", groups, axis_map, model.config).full
    layer, before = model.model.layers[1].mlp.up_proj, evaluate.flops_per_token(model)
    layer.weight = torch.nn.Parameter(layer.weight[1:])
    assert evaluate.flops_per_token(model) == before - 2 * layer.in_features


def test_peak_memory_is_a_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = SimpleNamespace(device=torch.device("cuda"), get_memory_footprint=lambda: 5, can_generate=lambda: True)
    worked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: worked.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1700 if len(worked) == 3 else 0)
    monkeypatch.setattr(evaluate, "tokens_per_second", lambda _, *how: worked.append(how))
    monkeypatch.setattr(evaluate, "tokens_written_per_second", lambda _, *how: worked.append(how))
    assert evaluate.peak_memory(model, 4, 32, 8) == 705
    assert worked == ["reset", (4, 32, 1), (4, 23, 8, 1)]


def test_on_a_cpu_the_tensors_of_the_work_are_added_up() -> None:
    with Allocations() as made:
        first = torch.ones(1000)
        (first + 1).sum()
        second = first.view(10, 100).clone()
        del first, second
        torch.ones(100)
    assert (made.now, made.peak) == (0, 8000 + 4), "1,000 numbers twice, and their sum"
    model, small = tiny_llama(), tiny_llama(intermediate_size=7)
    peak, less = (evaluate.peak_memory(each, 4, 32, 8) for each in (model, small))
    logits = 4 * 4 * 32 * model.config.vocab_size
    assert logits < peak - model.get_memory_footprint() < 10 * logits
    assert less < peak


@pytest.mark.parametrize("name", ["found.svg", "found.png"])
def test_a_picture_compares_the_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lm_eval: list[dict[str, Any]]
) -> None:
    drawn: list[Any] = []
    plain = comparison_plot.draw_comparison
    monkeypatch.setattr(comparison_plot, "draw_comparison", lambda found: drawn.append(plain(found)) or drawn[-1])
    output = tmp_path / name
    assert main(["eval", "bundled", "small", *SHORT, "--tasks", "lambada", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"<?xml" if name.endswith("svg") else b"\x89PNG")
    size, speed, perplexity, tasks = drawn[0].axes
    assert [label.get_text() for label in size.get_yticklabels()] == SIZES
    assert [round(bars[0].get_width(), 3) for bars in bars_of(size)] == [1.0, 0.18]
    assert [label.get_text() for label in speed.get_yticklabels()] == ["prefill, batch 1", "prefill, batch 3"]
    assert all(bars[0].get_width() > 1 for bars in bars_of(perplexity))
    assert [[bar.get_width() for bar in bars] for bars in bars_of(tasks)] == [[0.25, 0.5], [0.5, 0.5]]


def bars_of(axes: Any) -> list[Any]:
    """Return the bars of each model."""
    return [found for found in axes.containers if isinstance(found, BarContainer)]


def test_the_real_lm_eval_asks_a_task_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "The sky is", "choices": ["blue", "a pipe"], "answer": 0}\n' * 3)
    (tmp_path / "own.yaml").write_text(
        f"task: own_choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'own.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    flags = ["--include_path", str(tmp_path), "--limit", "2", "--no-speed"]
    scores = result(["small", "--tasks", "own_choice", *flags], capsys)["tasks"]["own_choice"]
    assert scores["acc,none"] in (0.0, 1.0)
    assert "acc_stderr,none" in scores
    (tmp_path / "own.jsonl").unlink()
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["eval", "small", "--tasks", "own_choice", *flags]) == 2
    assert re.search(
        r"`--tasks` \('own_choice'\) can't be loaded \(\w+Error: .*\); leave it out", capsys.readouterr().err
    )
    assert main(["eval", "small", "--tasks", "own_choise", *flags]) == 2
    assert "lm-eval has no such task (did you mean 'own_choice'?)" in capsys.readouterr().err


def test_every_flag_is_in_the_documentation() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    eval_flags(parser)
    page = (ROOT / "docs" / "cli.md").read_text().partition("| flag of `eval` |")[2]
    flags = [option for action in parser._actions for option in action.option_strings]
    assert len(flags) >= 13
    assert [flag for flag in flags if f"`{flag}`" not in page] == []


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate.device_of(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert evaluate.device_of(None) == torch.device("cuda")
    assert evaluate.device_of("cpu") == torch.device("cpu")


REFUSED: dict[str, tuple[list[str], str]] = {
    "a model that can't be loaded": (["small", "damaged", *SHORT], "`model` ('damaged') can't be loaded: "),
    "a model that isn't there": (["small", "./nowhere", *SHORT], "no model config found at './nowhere'"),
    "a model named twice": (["small", "bundled", "small", *SHORT], "`model` ('small') is named more than once"),
    "other tokens": (["small", "lower", *SHORT], "`model` ('lower') reads `dataset` ('text.jsonl') as other tok"),
    "blocks beyond one context": (
        ["bundled", "small", *TEXT, "--block-size", "129"],
        "`block_size` (129) is longer than the context of `model` ('small') (128 tokens",
    ),
    "a block of one token": (["small", *TEXT, "--block-size", "1"], "`--block-size` (1) must be at least 2"),
    "no batch": (["small", *TEXT, "--batch-size", "0"], "`--batch-size` (0) must be at least 1"),
    "no examples": (["small", *TEXT, "--limit", "0"], "`--limit` (0) must be at least 1"),
    "few-shot below zero": (["small", "--tasks", "x", "--num-fewshot", "-1"], "`--num-fewshot` (-1) must be at"),
    "few-shot of no task": (["small", *TEXT, "--num-fewshot", "2"], "`--num-fewshot` (2) does nothing without"),
    "fewer than no tokens": (["small", "--new-tokens", "-1"], "`--new-tokens` (-1) must be at least 0"),
    "a split of no data": (["small", "--tasks", "x", "--split", "test"], "`--split` ('test') does nothing without"),
    "no such folder of tasks": (["small", "--tasks", "x", "--include-path", "no"], "`--include-path` ('no') is no f"),
    "an unknown task": (["small", "--tasks", "lambada,arc_esy"], "('arc_esy'): lm-eval has no such task (did you mean"),
    "an unknown ending": (["small", *TEXT, "--output", "found.csv"], "`--output` ('found.csv') must end in .json,"),
    "a picture of one model": (["small", "--output", "found.svg"], "compares models: name two or more"),
    "a folder under two names": (["small", "./small", *SHORT], "a folder is named twice: "),
    "a limit of nothing": (["small", "--limit", "5"], "`--limit` (5) does nothing without `--dataset` or `--tasks`"),
    "joined without text": (["small", "--joined"], "`--joined` (True) does nothing without `--dataset`"),
    "a configuration of no data": (["small", "--dataset-config", "x"], "`--dataset-config` ('x') does nothing with"),
    "a window that the text doesn't fill": (
        ["small", *TEXT, "--joined", "--limit", "1", "--block-size", "128", "--text-column", "short"],
        "`block_size` (128) is more than the tokens of `dataset` ('text.jsonl', 1)",
    ),
    "no folder for the output": (["small", *TEXT, "--output", "no/found.md"], "there is no folder 'no'; make it first"),
    "an unknown device": (["small", *SHORT, "--device", "gpu"], "`--device` ('gpu') can't be used: "),
    "a device that isn't there": (["small", *SHORT, "--device", "cuda:99"], "`--device` ('cuda:99') can't be used: "),
    "a device that holds nothing": (["small", *SHORT, "--device", "meta"], "`--device` ('meta') can't be used: "),
}  # fmt: skip


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_before_anything_is_measured(
    mistake: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, expected = REFUSED[mistake]
    monkeypatch.setattr(evaluate, "tokens_per_second", lambda *_: pytest.fail("a model was measured"))
    assert main(["eval", *argv]) == 2
    assert expected in capsys.readouterr().err


def test_tasks_without_lm_eval_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main(["eval", "small", "--tasks", "paper"]) == 2
    assert "`--tasks` needs lm-eval: pip install 'hesso_hf[eval]'" in capsys.readouterr().err


def test_a_model_that_writes_beside_one_that_does_not_has_no_speed_to_compare() -> None:
    how = {"dtype": "float32", "device": "cpu", "batch_size": 1, "block_size": 8, "tokens_per_second": 2.0}
    base, small = ({**how, "peak_memory": 9, "first_token_seconds": seconds} for seconds in (None, 0.5))
    compared = ["peak_memory", "tokens_per_second"]
    assert list(evaluation_of(base, small, None)["values"]) == compared
    assert list(evaluation_of(None, small, None)["values"]) == [*compared, "first_token_seconds"]
