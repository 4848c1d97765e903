"""The model card of a smaller model, out of its report."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, hf_hub_download, metadata_load
from transformers.utils import logging

from ..config.files import CARD_NAME, PAGE_NAME, PLOT_NAME, RECIPE_NAME, REPORT_NAME
from .page.measures import OF_THE_MACHINE
from .page.quality import evaluated_on, evaluation_rows, measured_on, quality_rows
from .page.served import loader_of, serving_commands, serving_note
from .page.words import taught_by, text_of

logger = logging.get_logger(__name__)

_LICENCE = ("license", "license_name", "license_link")


def card(report: Mapping[str, Any], picture: bool, page: bool) -> str:
    """Return the card: front matter for the Hub and a description.

    Args:
        report: what `pruning_report.json` says.
        picture: whether there is one of CRIC's cycles.
        page: whether there is one to link.
    """
    distillation, replay, tokens = report.get("distillation"), report.get("replay"), report.get("vocabulary")
    compaction = report.get("compaction")
    checked, stock = report["verification"], report["stock_class"]
    text = _CARD.format(
        name=_name(report),
        ratio=report["pruning_ratio"],
        kind=_STOCK if stock else _UNEVEN,
        loader=loader_of(report),
        options="" if stock else ", trust_remote_code=True",
        rows="\n".join(f"| {' | '.join(row)} |" for row in _rows(report)),
        measured=_measured(report),
        checked=checked,
        tokens="" if tokens is None else _FEWER_TOKENS,
        distilled=_DISTILLED.format(**distillation) if distillation and taught_by(distillation) else "",
        replayed=_REPLAYED.format(**replay) if replay else "",
        zeros="" if compaction else " with its pruned units at zero",
        compacted=_COMPACTED.format(**compaction) if compaction else "",
        file=REPORT_NAME,
        page=f"; [{PAGE_NAME}]({PAGE_NAME}) shows all of it" if page else "",
        picture=f"\n![What CRIC tried and corrected]({PLOT_NAME})\n" if picture else "",
        made=_made(report),
        serving=_serving(report),
    )
    return f"---\n{_metadata(report).to_yaml()}\n---\n\n{text}"


def licence_of(base_model: str) -> dict[str, Any]:
    """Return the base model's licence as its own card has it, {} where it can't be told, which is warned of."""
    return dict(_licence_of(base_model)) if base_model else {}


@functools.cache  # it may be asked over a network, and a run may save often
def _licence_of(base_model: str) -> tuple[tuple[str, Any], ...]:
    local = Path(base_model)
    try:
        path = local / CARD_NAME if local.is_dir() else hf_hub_download(base_model, CARD_NAME)
        data, why = metadata_load(path) or {}, ""
    except Exception as error:  # no card, no connection, no right: the client has no type for all
        data, why = {}, f" ({type(error).__name__})"
    found = {name: data[name] for name in _LICENCE if data.get(name)}
    if not found:
        say = logger.info if local.is_dir() else logger.warning  # few folders have a card; what is on the Hub has one
        say(f"the card names no licence: {base_model} has no card that does{why}; set it (`license`)")
    return tuple(found.items())


def _base(report: Mapping[str, Any]) -> str:
    """Return the base model's Hub id, "" where there is none: of a folder a report has the name alone."""
    return report["base_model"] if "/" in report["base_model"] else ""


def _name(report: Mapping[str, Any]) -> str:
    """Return what the base model is called: its Hub id or its folder's name, else its class."""
    return report["base_model"] or report["model_class"]


def _metadata(report: Mapping[str, Any]) -> ModelCardData:
    base, results = _base(report), list(_results(report))
    return ModelCardData(
        library_name="transformers",
        tags=["pruned", "hesso"],
        pipeline_tag="text-generation" if report["model_class"].endswith("ForCausalLM") else None,
        base_model=base or None,
        base_model_relation="finetune" if base else None,
        datasets=[name for name in report.get("datasets") or () if "/" in name] or None,
        eval_results=results or None,
        model_name=f"{_name(report)}, pruned" if results else None,
        **report.get("licence", {}),
    )


def _results(report: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Yield what the smaller model was measured to be, for the Hub's model-index."""
    for key, found in (report.get("quality") or {}).items():
        for measure, value in found.get("after", {}).items():
            yield EvalResult("text-generation", key.removesuffix("_loss"), text_of(key), measure, value)
    evaluation = report.get("evaluation") or {}
    for name, values in evaluation.get("values", {}).items():
        task, _, metric = name.partition(" ")
        data, metric = (task, metric) if metric else (evaluation["dataset"], name)
        if name not in OF_THE_MACHINE:
            yield EvalResult("text-generation", data, data, metric, values["after"])


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield what is compared: a name, before, after."""
    counts, sizes = report["parameters"], report["sizes"]
    yield "parameters", f"{counts['before']:,}", f"{counts['after']:,}"
    if report.get("vocabulary"):
        tokens = report["vocabulary"]["tokens"]
        yield "tokens", f"{tokens['before']:,}", f"{tokens['after']:,}"
    for name, after in sizes["after"].items():
        yield f"`{name}`", str(sizes["before"][name]), str(after)
    yield from quality_rows(report)


def _measured(report: Mapping[str, Any]) -> str:
    """Say of which models and on what the losses are, and what was measured afterwards."""
    text = ""
    if on := measured_on(report):
        text += (
            "\nLosses and perplexities are those of the base model and of the trained one,\n"
            f"on the same examples: {on}.\n"
        )
    if report.get("evaluation"):
        rows = "\n".join(f"| {' | '.join(row)} |" for row in evaluation_rows(report))
        text += f"\n{evaluated_on(report)}\n\n| | before | after |\n|---|---:|---:|\n{rows}\n"
    return text


def _serving(report: Mapping[str, Any]) -> str:
    """Say how the model is served, and which engines misread it."""
    commands, misread = "\n".join(serving_commands(report)), report.get("serving") or ()
    parts = [f"```bash\n{commands}\n```\n"] if commands else []
    parts.append(f"{serving_note(not report['stock_class'])}\n")
    parts += ["\n".join(f"- {said}." for said in misread) + "\n"] if misread else []
    return "\n".join(["", *parts])


def _made(report: Mapping[str, Any]) -> str:
    """Return the command and the hyperparameters, as far as they are known."""
    command, given = report.get("command"), report.get("hyperparameters") or {}
    names = report.get("datasets") or ()
    parts = [f"Trained on {', '.join(names)}.\n"] if names else []
    parts += [f"```bash\n{command}\n```\n"] if command else []
    if report.get("recipe"):
        parts.append(f"[{RECIPE_NAME}]({RECIPE_NAME}) has all that was asked for, as `hesso-hf prune` takes it.\n")
    given = {"steps": report.get("steps"), **given} if given else {}
    parts += ["\n".join(f"- {name}: {value}" for name, value in given.items()) + "\n"] if given else []
    return "\n".join(["\n## How it was made\n", *parts]) if parts else ""


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
_CARD = """# {name}, pruned

{ratio:.1%} of the parameters were removed by structured pruning with HESSO
([arXiv 2409.09085](https://arxiv.org/abs/2409.09085)) while the model was fine-tuned. {distilled}{replayed}{kind}

```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("path/to/this/model"{options})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/model")
```
{serving}
| | before | after |
|---|---:|---:|
{rows}
{measured}
The logits of the exported model were compared with those of the trained model{zeros}: relative
error {checked[fold_error]:.1e} in fp32, {checked[rounding_error]:.1e} after rounding to {checked[dtype]}. \
{compacted}{tokens}\
Kept units, schedule and versions are in
`{file}`{page}.
{picture}{made}"""
