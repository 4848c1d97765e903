"""What is published beside the weights: `pruning_report.json` and the model card."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..distributed.parts import stock_class
from ..hf_models.sizes import get_size
from ..structures.groups import KeptUnits
from ..structures.uneven_layers import uneven_sizes
from ..vocabulary.tokens import KeptTokens
from ..vocabulary.trim_embeddings import rows_elements
from .decision import Decision
from .plots import PLOT_NAME, draw_cric
from .verify import Verification

logger = logging.get_logger(__name__)

REPORT_NAME = "pruning_report.json"
CARD_NAME = "README.md"


@dataclass(frozen=True)
class PruningReport:
    """Everything that says how a smaller model came about.

    Attributes:
        sizes_before, sizes_after: config sizes that changed; means where layers differ.
        stock: whether the model is of a stock class, not one with a modelling file for uneven layers.
        training: config, schedule, steps and history of the run, empty for a bare export.
        vocabulary: tokens and parameters removed with them, and the old ids of the kept ones; None for a whole one.
    """

    model_class: str
    base_model: str
    parameters_before: int
    parameters_after: int
    sizes_before: dict[str, int]
    sizes_after: dict[str, float]
    kept_units: KeptUnits
    verification: Verification
    stock: bool
    training: Mapping[str, Any]
    vocabulary: Mapping[str, Any] | None

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
        return cls(
            model_class=stock_class(model).__name__,
            base_model=model.config.name_or_path or "",
            parameters_before=compaction.parameters_before if compaction else model.num_parameters(),
            parameters_after=small.num_parameters(),
            sizes_before=before,
            sizes_after={name: _size_after(small.config, name) for name in before},
            stock=not uneven_sizes(small.config),
            kept_units=decision.kept_units,
            verification=verification,
            training=training,
            vocabulary=_vocabulary_entry(small, vocabulary) if vocabulary else None,
        )

    @property
    def pruning_ratio(self) -> float:
        """Share of the parameters that was removed."""
        return 1 - self.parameters_after / self.parameters_before

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        shown = _shown(self.training)
        return {
            "model_class": self.model_class,
            "base_model": _public(self.base_model),
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "pruning_ratio": self.pruning_ratio,
            "sizes": {"before": self.sizes_before, "after": self.sizes_after},
            "verification": asdict(self.verification),
            **{key: value for key, value in shown.items() if key not in ("base_model", "vocabulary")},
            **({} if self.vocabulary is None else {"vocabulary": self.vocabulary}),
            "kept_units": self.kept_units.to_dict(),
            "versions": versions(),
        }

    def write(self, folder: Path) -> None:
        """Write the report, the model card and, where CRIC was used, a picture of what it did."""
        cric = self.training.get("cric")
        picture = _drawn(cric, folder / PLOT_NAME) if cric else False
        (folder / REPORT_NAME).write_text(
            json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        (folder / CARD_NAME).write_text(self._card(picture), encoding="utf-8")

    def _card(self, picture: bool) -> str:
        """Return the model card: front matter for the Hub and a description, with a picture of CRIC's cycles or not."""
        rows = "\n".join(
            f"| `{name}` | {self.sizes_before[name]} | {after} |" for name, after in self.sizes_after.items()
        )
        if self.vocabulary is not None:
            tokens = self.vocabulary["tokens"]
            rows = f"| tokens | {tokens['before']:,} | {tokens['after']:,} |\n{rows}"
        base, shown = _repo_id(self.base_model), _shown(self.training)
        distillation, replay, compaction = (shown.get(name) for name in ("distillation", "replay", "compaction"))
        return _CARD.format(
            report=self,
            checked=self.verification,
            base=f"base_model: {base}\n" if base else "",
            name=base or self.model_class,
            kind=_STOCK if self.stock else _UNEVEN,
            options="" if self.stock else ", trust_remote_code=True",
            rows=rows,
            tokens="" if self.vocabulary is None else _FEWER_TOKENS,
            distilled=_DISTILLED.format(**distillation) if distillation else "",
            replayed=_REPLAYED.format(**replay) if replay else "",
            zeros="" if compaction else " with its pruned units at zero",
            compacted=_COMPACTED.format(**compaction) if compaction else "",
            file=REPORT_NAME,
            picture=f"\n![What CRIC tried and corrected]({PLOT_NAME})\n" if picture else "",
        )


def _drawn(cric: Mapping[str, Any], path: Path) -> bool:
    """Draw the picture; a plotting library that fails must not cost the model."""
    try:
        return draw_cric(cric, path)
    except Exception as error:
        logger.warning(f"{path.name} isn't drawn: {type(error).__name__}: {error}")
        path.unlink(missing_ok=True)
        return False


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


def _repo_id(base_model: str) -> str:
    """Return a Hub id as it is, and "" for a path of this machine, which is nobody else's business."""
    is_id = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", base_model) and not Path(base_model).exists()
    return base_model if is_id else ""


def _public(model: str) -> str:
    """Return a Hub id as it is, and of a path the folder's name."""
    return _repo_id(model) or Path(model).name


def _shown(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's account with its teacher and replay by the names that others may see."""
    found = dict(training)
    for name, part, entry in (("distill_from", "distillation", "teacher"), ("replay_dataset", "replay", "source")):
        config = found.get("hesso_config") or {}
        if config.get(name):
            public = _public(config[name])
            found["hesso_config"] = {**config, name: public}
            if found.get(part):
                found[part] = {**found[part], entry: public}
    if compaction := found.get("compaction"):  # its other entries are the report's own
        found["compaction"] = {name: compaction[name] for name in ("step", "error")}
    return found


_STOCK = "It is of a stock class, and loads with plain Transformers and nothing else."
_UNEVEN = (
    "Its layers differ in width (means are given below), so it comes with a short modelling file of its own and loads "
    "with `trust_remote_code=True`."
)
_FEWER_TOKENS = (
    "Tokens that the training data never used were removed from the model and its tokenizer: other text is split into "
    "more tokens, and ids differ from those of the original tokenizer. "
)
_DISTILLED = "It learnt from {teacher} as the teacher (distillation weight {alpha}, temperature {temperature}). "
_REPLAYED = (
    "{share:.0%} of the tokens trained on were replay, written by {source}, on which it stays near the original model. "
)
_COMPACTED = (
    "The pruned units, at zero by then, were cut out after step {step} of the training, with a relative error of "
    "{error:.1e}; the smaller model was trained from there on. "
)
_CARD = """---
library_name: transformers
tags:
- pruned
- hesso
{base}---

# {name}, pruned

{report.pruning_ratio:.1%} of the parameters were removed by structured pruning with HESSO
([arXiv 2409.09085](https://arxiv.org/abs/2409.09085)) while the model was fine-tuned. {distilled}{replayed}{kind}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/model"{options})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")
```

| | before | after |
|---|---:|---:|
| parameters | {report.parameters_before:,} | {report.parameters_after:,} |
{rows}

The logits of the exported model were compared with those of the trained model{zeros}: relative
error {checked.fold_error:.1e} in fp32, {checked.rounding_error:.1e} after rounding to {checked.dtype}. \
{compacted}{tokens}\
Kept units, schedule and versions are in
`{file}`.
{picture}"""
