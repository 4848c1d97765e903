"""The model card: its front matter and its text say what the report says, and the base model's licence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hesso_hf.config.files import CARD_NAME, PAGE_NAME, RECIPE_NAME, REPORT_NAME
from hesso_hf.export.card import card, licence_of
from hesso_hf.export.export import export_pruned
from hesso_hf.export.report import add_evaluation
from tests.cli.test_report import NUMBER, SERVED, SPEEDS, numbers_in, shown_as, small_report
from tests.support.checks import propagated
from tests.support.families import ALL, random_model


def made(report: dict[str, Any], **licence: str) -> ModelCard:
    return ModelCard(card(report | {"licence": licence}, picture=False, page=True))


def test_the_front_matter_says_what_it_came_of_and_how_good_it_is() -> None:
    report = small_report(datasets=["someone/text", "mine.txt"])
    data = made(report, license="other", license_name="mine").data.to_dict()
    results = {(r["dataset"]["type"], m["type"]): m["value"] for r in data.pop("model-index")[0]["results"]
               for m in r["metrics"]}  # fmt: skip
    assert results == {
        ("eval", "loss"): 2.5678, ("eval", "perplexity"): 13.0372, ("a.txt", "loss"): 1.3456, ("piqa", "acc"): 0.6543,
    }  # fmt: skip
    assert data == {
        "base_model": "made/of-words", "base_model_relation": "finetune", "datasets": ["someone/text"],
        "library_name": "transformers", "license": "other", "license_name": "mine", "pipeline_tag": "text-generation",
        "tags": ["pruned", "hesso"],
    }  # fmt: skip


def test_speed_and_peak_memory_are_in_its_table_and_not_in_the_model_index() -> None:
    found = made(small_report(evaluation=small_report()["evaluation"] | {"values": SPEEDS}))
    assert "| peak memory (bytes) | 7,050 | 3,500 |\n| prefill tokens/s, batch 1 | 2,000 | 3,001 |" in found.text
    assert {result.metric_type for result in found.data.eval_results or ()} == {"loss", "perplexity"}


def test_how_to_serve_it_stands_above_what_misreads_it() -> None:
    text = made(small_report(engines=["vLLM", "llama.cpp"], serving=["So does SGLang"])).text
    assert f"```bash\n{SERVED}\n```" in text
    assert text.index(SERVED) < text.index("docs/serving.md") < text.index("- So does SGLang.")
    assert "vllm serve" not in made(small_report()).text
    assert "Only Transformers serves it, with trust_remote_code" in made(small_report(stock_class=False)).text


def test_a_base_model_that_is_no_hub_id_is_not_linked() -> None:
    data = made(small_report(base_model="folder", quality=None, evaluation=None)).data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets", "model-index", "license"} & data.keys()


@pytest.mark.parametrize("serving", [None, ["vLLM takes it for another", "So does SGLang"]], ids=["plain", "served"])
@pytest.mark.parametrize("changes", [{}, {"quality": None, "evaluation": None, "command": None}], ids=["full", "bare"])
def test_its_tables_are_tables_and_its_lists_are_lists(serving: list[str] | None, changes: dict[str, Any]) -> None:
    report = small_report(serving=serving, **changes)
    tokens = MarkdownIt("commonmark").enable("table").parse(made(report).text)
    rows = [token.level for token in tokens if token.type == "tr_open"]
    assert sum(token.type == "table_open" and token.level == 0 for token in tokens) == (1 if changes else 2)
    assert len(rows) == sum(line.startswith("|") for line in made(report).text.splitlines()) - (1 if changes else 2)
    said = [token.content for token in tokens if token.type == "inline" and token.level == 3]
    assert said[: len(serving or ())] == [f"{text}." for text in serving or ()]
    assert not [token for token in tokens if token.type == "inline" and "|---" in token.content]


def test_a_base_model_in_a_folder_gives_its_name_to_the_card() -> None:
    report = small_report(base_model="my-base")
    assert "\n# my-base, pruned\n" in made(report).text
    assert made(report).data.model_name == "my-base, pruned"
    assert "\n# LlamaForCausalLM, pruned\n" in made(small_report(base_model="")).text


def test_its_table_has_before_and_after_and_every_number_is_in_the_report() -> None:
    report = small_report(datasets=["someone/text"])
    text = made(report).text
    for row in (
        "| loss on held-out examples (nats per token) | 2.3456 | 2.5678 |",
        "| perplexity on held-out examples | 10.44 | 13.04 |",
        "| loss on other text (nats per token) | 3.1234 | – |",
        "| piqa acc | – | 0.6543 ± 0.0123 |",
        "- steps: 40",
        "- learning_rate: 0.00123",
        f"[{RECIPE_NAME}]({RECIPE_NAME}) has all that was asked for, as `hesso-hf prune` takes it.",
        "hesso-hf prune a.yaml --max_steps 40",
        "Trained on someone/text.",
        f"[{PAGE_NAME}]({PAGE_NAME})",
    ):
        assert row in text.splitlines() or row in text, row
    values = set(numbers_in({**report, "vocabulary": report["vocabulary"]["tokens"]}))
    shown = NUMBER.findall(text.replace("arXiv 2409.09085", "").replace("abs/2409.09085", ""))
    assert len(shown) > 25
    assert [token for token in shown if not shown_as(token, values)] == []


def test_the_licence_is_the_base_model_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    front = {"license": "other", "license_name": "mine", "license_link": "LICENSE", "tags": ["x"]}
    (tmp_path / CARD_NAME).write_text(f"---\n{yaml.safe_dump(front)}---\ntext")
    assert licence_of(str(tmp_path)) == {name: front[name] for name in ("license", "license_name", "license_link")}
    assert licence_of("") == {}


def test_the_report_has_the_licence_that_the_card_names(tmp_path: Path) -> None:
    model = random_model(ALL["llama"].config())
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / CARD_NAME).write_text("---\nlicense: mit\n---\ntext")
    export_pruned(type(model).from_pretrained(tmp_path / "base"), tmp_path / "small")
    assert json.loads((tmp_path / "small" / REPORT_NAME).read_text())["licence"] == {"license": "mit"}
    assert ModelCard.load(tmp_path / "small" / CARD_NAME).data.license == "mit"


def test_a_licence_that_can_not_be_had_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def offline(*_: Any) -> str:
        raise ConnectionError("no line")

    monkeypatch.setattr("hesso_hf.export.card.hf_hub_download", offline)
    with propagated(caplog):
        assert licence_of("nobody/that-has-a-card") == {}
    assert "nobody/that-has-a-card has no card that does (ConnectionError); set it (`license`)" in caplog.text


def test_an_evaluation_is_added_and_what_the_user_added_stays(tmp_path: Path) -> None:
    report = small_report(evaluation=None)
    (tmp_path / REPORT_NAME).write_text(json.dumps(report))
    mine = made(report, license="mit")
    mine.data.tags.append("mine")
    mine.data.language = "en"
    mine.save(tmp_path / CARD_NAME)
    found = small_report()["evaluation"]
    add_evaluation(tmp_path, found)
    assert json.loads((tmp_path / REPORT_NAME).read_text()) == report | {"evaluation": found}
    after = ModelCard.load(tmp_path / CARD_NAME)
    assert (after.data.language, after.data.license) == ("en", "mit")
    assert after.data.tags == ["pruned", "hesso", "mine"]
    assert {result.metric_value for result in after.data.eval_results or ()} == {2.5678, 13.0372, 1.3456, 0.6543}
    assert "Measured by hesso-hf eval on a.txt, in bfloat16 on cuda:0, batches of 6 x 255 tokens." in after.text
    assert "| – | 0.6543 ± 0.0123 |" in after.text
    assert re.search(r"piqa acc.*0\.6543 ± 0\.0123", (tmp_path / PAGE_NAME).read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CARD_NAME, REPORT_NAME, PAGE_NAME])
