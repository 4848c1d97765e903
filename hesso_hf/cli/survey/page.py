"""What the survey of the model types found, as text: counts, and a page of tables made from its JSON."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

JOINT = "joint"  # the entry beside the structures: all proved ones of `structures="all"` cut at once
UNTRIED = "generation not tried: "
_LONGEST_REASON = 200
_PAGE = """\
# Model types

What can be pruned, tried type by type. `make survey` writes this page and `architectures.json` beside it. Made with
{versions}.

{summary}

A small random model of each type is built from the type's default config. A structure counts as proved after a whole
round trip in fp32: random units are set to zero and cut out, the model is saved, and the stock class reloads it with
`from_pretrained`. Its logits equal the zeroed model's within a relative 1e-5, and so do those of greedy generation with
the cache, token by token. `joint` is the same with all proved structures at once.

- ✓: proved. *coupled ✓*: proved, but heads and embedding channels only shrink together, since the model has no size of
  a head of its own.
- refused: the reason is in the list below. HESSO leaves the structure alone.
- –: the type, or its default config, has no such structure. Query heads are single ones of several that share a
  key-value head.
"""
_HEADS, _INNER, _WIDTH = "attention_heads", frozenset({"mlp_channels", "expert_channels"}), "embedding_channels"

Status = Literal["proved", "refused", "not_applicable"]


@dataclass(frozen=True)
class StructureSurvey:
    """What came out for one structure of one model type.

    Attributes:
        relative_error: of the reloaded smaller model's logits against the zeroed model's, or of the best failed proof.
        reason: one line: why it is refused or not applicable, or what was left out of the round trip.
        coupled: heads and width only shrink together.
    """

    status: Status
    relative_error: float | None = None
    reason: str = ""
    coupled: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types; `coupled` only where it says something."""
        return {name: value for name, value in asdict(self).items() if name != "coupled" or value}


def summary(survey: Mapping[str, Any]) -> str:
    """Return in two sentences of how many model types what is proved; survey is the JSON."""
    types = [(_structures(found, "proved"), _structures(found, "refused")) for found in survey["model_types"].values()]
    heads = [_HEADS in proved for proved, _ in types]
    inner = [bool(_INNER & proved) for proved, _ in types]
    width = [_WIDTH in proved for proved, _ in types]
    some = sum(bool(proved) for proved, _ in types)
    all_three = sum(all(three) for three in zip(heads, inner, width, strict=True))
    unrefused = sum(bool(proved) and not refused for proved, refused in types)
    return (
        f"Of {len(types)} causal language model types of Transformers {survey['versions']['transformers']}, {some} "
        f"have at least one structure proved, {all_three} all three of attention heads, MLP or expert channels, and "
        f"embedding channels; of {unrefused} nothing that they have is refused. Attention heads are proved for "
        f"{sum(heads)}, MLP or expert channels for {sum(inner)}, embedding channels for {sum(width)}."
    )


def render_architectures(survey: Mapping[str, Any]) -> str:
    """Return the survey's JSON as a Markdown page."""
    types = survey["model_types"]
    names = list(dict.fromkeys(name for found in types.values() for name in found))
    header = ["model type", *[name.replace("_", " ") for name in names]]
    rows = [[f"`{kind}`", *[_cell(found.get(name)) for name in names]] for kind, found in types.items()]
    versions = ", ".join(f"{name} {version}" for name, version in survey["versions"].items())
    page = _PAGE.format(versions=versions, summary=textwrap.fill(summary(survey), 120, break_on_hyphens=False))
    return "\n".join([page, *_table(header, rows), *_refusals(types), *_untried(types)]) + "\n"


def one_line(text: str) -> str:
    """Shorten a reason to one line without paths or addresses, which differ from run to run."""
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))
    text = re.sub(r"(?<![\w.])(/[\w.+-]+){2,}/", "", text)
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1].rstrip() + "…"


def _structures(found: Mapping[str, Any], status: Status) -> set[str]:
    return {name for name, entry in found.items() if name != JOINT and entry["status"] == status}


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["status"] == "not_applicable":
        return "–"
    if entry["status"] == "refused":
        return "refused"
    return "coupled ✓" if entry.get("coupled") else "✓"


def _refusals(types: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind, found in types.items():
        by_reason: dict[str, list[str]] = {}
        for name, entry in found.items():
            if entry["status"] == "refused":
                by_reason.setdefault(entry["reason"], []).append(name.replace("_", " "))
        rows += [[f"`{kind}`", ", ".join(names), _escaped(reason)] for reason, names in by_reason.items()]
    return ["", "## Refused", "", *_table(["model type", "structures", "reason"], rows)] if rows else []


def _untried(types: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind, found in types.items():
        reasons = {entry["reason"] for entry in found.values() if entry["reason"].startswith(UNTRIED)}
        rows += [[f"`{kind}`", _escaped(reason.removeprefix(UNTRIED))] for reason in sorted(reasons)]
    if not rows:
        return []
    text = "Proved by the logits alone: already the uncut model of these types can't generate by itself."
    return ["", "## Generation not tried", "", text, "", *_table(["model type", "reason"], rows)]


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def _escaped(text: str) -> str:
    return re.sub(r"([|<*\\])", r"\\\1", text)
