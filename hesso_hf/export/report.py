"""What is published beside the weights: `pruning_report.json` and the model card."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, metadata_load
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..config.files import CARD_NAME, PAGE_NAME, PLOT_NAME, RECIPE_NAME, REPORT_NAME
from ..distributed.parts import stock_class
from ..hf_models.build import own_loader_of
from ..hf_models.serving import not_served_as_they_are, served_by
from ..hf_models.sizes import get_size
from ..structures.groups import KeptUnits
from ..structures.uneven_layers import uneven_sizes
from ..vocabulary.tokens import KeptTokens
from ..vocabulary.trim_embeddings import rows_elements
from .card import card, licence_of
from .decision import Decision
from .page.page import write_page
from .plots import draw_cric, has_cycles
from .verify import Verification

logger = logging.get_logger(__name__)

SHOWING = (PLOT_NAME, PAGE_NAME, RECIPE_NAME)  # files that not every smaller model has


@dataclass(frozen=True)
class PruningReport:
    """Everything that says how a smaller model came about.

    Attributes:
        sizes_before, sizes_after: config sizes that changed; means where layers differ.
        own_loader: class of Transformers' that loads a model with a modelling file for uneven layers, None for one of
            a stock class.
        training: config, schedule, steps and history of the run, empty for a bare export.
        vocabulary: tokens and parameters removed with them, and the old ids of the kept ones; None for a whole one.
        engines: that serve it as it is.
        serving: of engines that take one of its sizes for another.
        seconds: that `writing` and `verification` took; not part of what is published.
    """

    model_class: str
    base_model: str
    parameters_before: int
    parameters_after: int
    sizes_before: dict[str, int]
    sizes_after: dict[str, float]
    kept_units: KeptUnits
    verification: Verification
    own_loader: str | None
    training: Mapping[str, Any]
    vocabulary: Mapping[str, Any] | None
    engines: tuple[str, ...]
    serving: tuple[str, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        small: PreTrainedModel,
        decision: Decision,
        verification: Verification,
        training: Mapping[str, Any],
    ) -> PruningReport:
        """Say what was removed from a model, and how exactly."""
        vocabulary, compaction, before = decision.vocabulary, decision.compaction, decision.sizes_before
        model_class, stock = stock_class(model).__name__, not uneven_sizes(small.config)
        return cls(
            model_class=model_class,
            base_model=model.config.name_or_path or "",
            parameters_before=compaction.parameters_before if compaction else model.num_parameters(),
            parameters_after=small.num_parameters(),
            sizes_before=before,
            sizes_after={name: _size_after(small.config, name) for name in before},
            own_loader=None if stock else own_loader_of(small.config),
            kept_units=decision.kept_units,
            verification=verification,
            training=training,
            vocabulary=_vocabulary_entry(small, vocabulary) if vocabulary else None,
            engines=tuple(served_by(small.config)) if stock and model_class.endswith("ForCausalLM") else (),
            serving=tuple(not_served_as_they_are(small.config, before)),
        )

    @property
    def stock(self) -> bool:
        """Whether the model is of a stock class."""
        return self.own_loader is None

    @property
    def pruning_ratio(self) -> float:
        """Share of the parameters that was removed."""
        return 1 - self.parameters_after / self.parameters_before

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        shown = _shown(self.training)
        return {
            "model_class": self.model_class,
            "base_model": public_name(self.base_model),
            "stock_class": self.stock,
            **({"loader": self.own_loader} if self.own_loader else {}),
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "pruning_ratio": self.pruning_ratio,
            "sizes": {"before": self.sizes_before, "after": self.sizes_after},
            "verification": asdict(self.verification),
            **({"engines": list(self.engines)} if self.engines else {}),
            **({"serving": list(self.serving)} if self.serving else {}),
            **{key: value for key, value in shown.items() if key not in ("base_model", "vocabulary")},
            **({} if self.vocabulary is None else {"vocabulary": self.vocabulary}),
            "kept_units": self.kept_units.to_dict(),
            "versions": versions(),
        }

    def write(self, folder: Path) -> None:
        """Write the report, the page and the card that show it, and what there is: the recipe, a picture of CRIC."""
        cric, report, licence = self.training.get("cric"), self.to_dict(), licence_of(self.base_model)
        picture = has_cycles(cric) and _shown_in(folder / PLOT_NAME, lambda path: draw_cric(cric, path))
        if report.get("recipe"):
            recipe = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
            (folder / RECIPE_NAME).write_text(f"# {report['command']}\n{recipe}", encoding="utf-8")
        _write(report | ({"licence": licence} if licence else {}), folder, picture)


def add_to_card(folder: Path, given: Mapping[str, Any]) -> None:
    """Add what is given (`tags`, `language`, `license`, ...) to the card in a folder."""
    found = ModelCard.load(folder / CARD_NAME)
    for name, value in given.items():
        if name == "tags":
            tags = [value] if isinstance(value, str) else list(value)
            found.data.tags = list(dict.fromkeys([*(found.data.tags or []), *tags]))
        elif value is not None and name != "model_name":
            setattr(found.data, name, value)
    found.save(folder / CARD_NAME)


def add_evaluation(folder: Path, found: Mapping[str, Any]) -> None:
    """Write what a smaller model was measured to be into its report, its page and its card, which keeps what it has.

    Args:
        found: `values` by name, before and after, and how they were measured, plain JSON types.
    """
    report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8")) | {"evaluation": dict(found)}
    has = metadata_load(folder / CARD_NAME) or {} if (folder / CARD_NAME).exists() else {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as made:
        _write(report, Path(made), (folder / PLOT_NAME).exists())
        add_to_card(Path(made), {name: value for name, value in has.items() if name != "model-index"})
        for path in Path(made).iterdir():
            os.replace(path, folder / path.name)


def _write(report: Mapping[str, Any], folder: Path, picture: bool) -> None:
    """Write a report, and the page and the card that show it."""
    text = json.dumps(report, indent=1, allow_nan=False)
    (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
    read = json.loads(text)
    page = _shown_in(folder / PAGE_NAME, lambda path: write_page(read, path))
    (folder / CARD_NAME).write_text(card(read, picture, page), encoding="utf-8")


def _shown_in(path: Path, draw: Callable[[Path], object]) -> bool:
    """Write what shows a report into a file, and tell whether it is there: what fails here must not cost the model."""
    try:
        draw(path)
    except Exception as error:
        logger.warning(f"{path.name} isn't written: {type(error).__name__}: {error}")
        path.unlink(missing_ok=True)
    return path.exists()


def _vocabulary_entry(small: PreTrainedModel, vocabulary: KeptTokens) -> dict[str, Any]:
    """Say what went with the tokens: parameters of rows as wide as the smaller model's."""
    tokens = {"before": vocabulary.vocab_size, "after": len(vocabulary.kept)}
    removed = rows_elements(small) * vocabulary.num_removed
    return {"tokens": tokens, "parameters_removed": removed, "kept": list(vocabulary.kept)}


def _size_after(config: PretrainedConfig, name: str) -> float:
    """Return a size; where layers differ, their mean."""
    layers = [sizes[name] for sizes in uneven_sizes(config) if name in sizes]
    return round(sum(layers) / len(layers), 2) if layers else get_size(config, name) or 0


def versions() -> dict[str, str]:
    """Return the versions of this library and of what it ran on."""
    found = {"python": platform.python_version()}
    for package in ("hesso_hf", "torch", "transformers", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # running from a source tree that isn't installed
            found[package] = str(import_module(package).__version__)
    return found


def public_name(model: str) -> str:
    """Return a Hub id as it is, and of a path, which is nobody else's business, the folder's name."""
    is_id = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", model) and not Path(model).exists()
    return model if is_id else Path(model).name


def _shown(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's account with its teacher and replay by the names that others may see."""
    found = dict(training)
    for name, part, entry in (("distill_from", "distillation", "teacher"), ("replay_dataset", "replay", "source")):
        config = found.get("hesso_config") or {}
        if config.get(name):
            public = public_name(config[name])
            found["hesso_config"] = {**config, name: public}
            if found.get(part):
                found[part] = {**found[part], entry: public}
    if compaction := found.get("compaction"):  # its other entries are the report's own
        found["compaction"] = {name: compaction[name] for name in ("step", "error")}
    return found
