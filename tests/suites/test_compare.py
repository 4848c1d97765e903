"""The comparison of other packages' trainer suites with HESSO's classes in place: the tool, and its list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.suites import compare, suite_stand_ins

TOY = """
import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments


class Line(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.slope = torch.nn.Parameter(torch.zeros(()))
        self.post_init()

    def forward(self, x, labels=None):
        return {"loss": ((self.slope * x - labels) ** 2).mean()}


def test_trains(tmp_path):
    rows = [{"x": float(i), "labels": 2.0 * i} for i in range(4)]
    args = TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, save_steps=1, report_to=[], use_cpu=True)
    trainer = Trainer(Line(PreTrainedConfig()), args, train_dataset=rows)
    trainer.train()
    Trainer(Line(PreTrainedConfig()), args, train_dataset=rows).train(resume_from_checkpoint=True)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()
    assert trainer.model.slope != 0


def test_takes_a_config_of_any_class(tmp_path):
    class Plain(torch.nn.Linear):
        config = type("Config", (), {})()

    Trainer(Plain(1, 1), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))


def test_sizes():
    assert LlamaConfig(hidden_size=32).intermediate_size == 64
    assert LlamaConfig(intermediate_size=48).intermediate_size == 48


def test_is_stock():
    assert not hasattr(Trainer, "hesso_counted")
"""


def test_a_test_that_only_the_stock_class_passes_is_found_and_may_be_known(tmp_path: Path) -> None:
    (tmp_path / "test_toy.py").write_text(TOY)
    stock, swapped = (
        compare.run(tmp_path, ["test_toy.py"], tmp_path, *swap) for swap in ((), ("--swap=transformers",))
    )
    assert {test: outcome for test, (outcome, _) in stock.items()} == {
        f"test_toy.py::test_{name}": "passed" for name in ("trains", "takes_a_config_of_any_class", "sizes", "is_stock")
    }
    lines, new = compare.compare(stock, swapped, {})
    assert new == 1
    assert lines[0].startswith("FAILS test_toy.py::test_is_stock: AssertionError")
    assert compare.compare(stock, swapped, {"test_toy.py::test_is_stock": "it asks for the class"})[1] == 0
    lines, _ = compare.compare(stock, swapped, {"test_toy.py::test_trains": "an old reason"})
    assert "passes now, though known to fail: test_toy.py::test_trains" in lines


def test_a_suite_of_which_no_test_runs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, stdout, **__: stdout.write("nothing collected"))
    with pytest.raises(SystemExit, match=r"no test ran.*\n.*nothing collected"):
        compare.run(tmp_path, ["test_toy.py"], tmp_path)


def test_a_test_that_was_not_run_counts_as_failing() -> None:
    assert compare.compare({"a::b": ["passed", ""]}, {}, {})[1] == 1
    assert compare.compare({"a::b": ["failed", "no network"]}, {}, {})[1] == 0


def test_tokenizers_and_processors_of_other_kinds_have_stand_ins_that_are_saved(tmp_path: Path) -> None:
    pieces = suite_stand_ins._pieces("T5ForConditionalGeneration")
    assert pieces.decode(pieces("is it 7?").input_ids, skip_special_tokens=True) == "is it 7?"
    for architecture in suite_stand_ins.PROCESSORS.values():
        for made in suite_stand_ins._processor(architecture):
            made.save_pretrained(tmp_path / architecture)
        assert {"config.json", "preprocessor_config.json"} <= {
            path.name for path in (tmp_path / architecture).iterdir()
        }


def test_every_known_failure_names_a_test_and_gives_a_reason() -> None:
    known = compare.known_failures()
    assert known
    for test, reason in known.items():
        assert re.match(r"tests/\S+\.py::\w+::test_", test), test
        assert re.match(r"(\S+ ){4,}\S+\.$", reason), test
