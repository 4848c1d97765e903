"""A pytest plugin for other packages' trainer suites: HESSO's classes in the place of theirs, stand-ins, outcomes.

Imported without this repository's `tests` package: a suite has one of that name. `compare.py` runs it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import suite_stand_ins

SHORT = {  # for runs of a step or two
    "pruning_ratio": 0.3, "warmup_steps": 0.0, "pruning_steps": 1, "pruning_periods": 1, "calibration_examples": 2,
    "quality_examples": 2, "replay_share": 0.0, "compact": "never",
}  # fmt: skip
NAMES = {
    "transformers": ("Trainer", "Seq2SeqTrainer"),
    "trl": ("SFTTrainer", "DPOTrainer", "RewardTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer"),
}
OWN = ("transformers.", "peft.", "trl.")  # whose models are pruned


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--swap", choices=NAMES, help="put HESSO's classes in the place of this package's trainers")
    parser.addoption("--outcomes", required=True, help="a file for each test's outcome")
    parser.addoption("--hesso", default="{}", help="changes of HessoConfig, as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    import datasets

    datasets.load_dataset = suite_stand_ins.load_dataset_or_stand_in(datasets.load_dataset)
    _shrink()
    if package := config.getoption("--swap"):
        _let_idle()
        _swap(package, SHORT | json.loads(config.getoption("--hesso")))
    config.pluginmanager.register(_Outcomes(Path(config.getoption("--outcomes"))))


class _Outcomes:
    """Writes how each test ended, and of those that failed the last line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self._found[report.nodeid] = [report.outcome, crash.message if crash else ""]

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._found))


def _shrink() -> None:
    """Have what a suite leaves at its default be small: a Llama of 32 channels would have 11,008 in its MLP."""
    from transformers import LlamaConfig

    plain = LlamaConfig.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **({"intermediate_size": 64} | kwargs))

    LlamaConfig.__init__ = __init__


def _swap(package: str, options: dict[str, Any]) -> None:
    root = importlib.import_module(package)
    stocks = {name: getattr(root, name) for name in NAMES[package]}  # all, before one's base is another class
    for name, stock in stocks.items():
        swapped = _swapped(stock, options)
        for module in (sys.modules[stock.__module__], root):
            setattr(module, name, swapped)


def _swapped(stock: type, options: dict[str, Any]) -> type:
    from hesso_hf import HessoConfig, HessoMixin

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super(swapped, self).__init__(*args, **({"hesso_config": HessoConfig(**options)} | kwargs))

    members = {"__init__": __init__, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    swapped = type(stock.__name__, (HessoMixin, stock), members)
    return swapped


def _let_idle() -> None:
    """Let a model of the suite's own, such as one of two numbers, be trained with nothing to prune, and saved whole."""
    import torch
    from transformers import PreTrainedConfig

    from hesso_hf.budget.cost import Cost
    from hesso_hf.budget.target_sizes import TargetSizes
    from hesso_hf.pruning.plan import PruningPlan
    from hesso_hf.pruning.weights.bound_groups import BoundGroups
    from hesso_hf.structures.groups import PruningGroups
    from hesso_hf.trainer import callbacks, progress, run, saving
    from hesso_hf.trainer import trainer as trainers

    class IdlePlan(PruningPlan):
        def check_target(self) -> None: ...

    plain_plan, plain_save = run._prepared, trainers.save_smaller

    def prepared(trainer: Any, model: Any, config: Any) -> PruningPlan:
        if type(model).__module__.startswith(OWN):
            return plain_plan(trainer, model, config)
        if getattr(model, "config", None) is None:
            model.config = PreTrainedConfig()
        for name, value in (("name_or_path", ""), ("get_text_config", lambda: model.config)):  # of a class of its own
            if not hasattr(model.config, name):
                setattr(model.config, name, value)
        count = sum(parameter.numel() for parameter in model.parameters())
        target = TargetSizes({}, {}, {}, "parameters", count, count, count, count)
        return IdlePlan(config, model, PruningGroups({}), Cost("parameters", ((count, ()),), {}), target)

    def save_smaller(engine: Any, its_run: Any, target: Path, plain: Any) -> Any:
        if not isinstance(its_run.plan, IdlePlan):
            return plain_save(engine, its_run, target, plain)
        return saving.save_dense(engine, its_run, target, lambda: plain(str(target)))

    def units_pruned(process: Any) -> Any:
        return plain_count(process) if process.scales else ({}, 0)

    plain_count, plain_device = progress.units_pruned, BoundGroups.device
    progress.units_pruned = callbacks.units_pruned = units_pruned
    BoundGroups.device = property(lambda bound: plain_device.fget(bound) if bound.parameters else torch.device("cpu"))
    run._prepared, trainers.save_smaller = prepared, save_smaller
