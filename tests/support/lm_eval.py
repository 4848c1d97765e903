"""A stand-in for lm-eval, which is large and isn't needed to see what it is asked."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hesso_hf.cli.tasks import PAPER


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Have a package that knows two tasks and those of the paper; return the list of what it is asked."""
    asked: list[dict[str, Any]] = []
    known = ["lambada", "fixed", *PAPER]

    def task_manager(include_path: str | None) -> SimpleNamespace:
        def match_tasks(names: list[str]) -> list[str]:
            return [name for name in known if name in names]

        return SimpleNamespace(include_path=include_path, all_tasks=known, match_tasks=match_tasks, load=list)

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        asked.append(given)
        value = 0.25 * len(asked)
        scores = {
            "alias": "x",
            "acc,none": value,
            "acc_stderr,none": 0.0123,
            "em,strict": 0.5,
            "em_stderr,strict": "N/A",
        }
        return {
            "results": {task: scores for task in given["tasks"]},
            "n-shot": {task: 0 if task == "fixed" else given["num_fewshot"] for task in given["tasks"]},
        }

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.tasks": {"TaskManager": task_manager},
        "lm_eval.models": {}, "lm_eval.models.huggingface": {"HFLM": SimpleNamespace},
    }  # fmt: skip
    for name, attributes in parts.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return asked
