"""What the survey of the model types found, as text: counts, and a page of tables made from its JSON."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

JOINT = "joint"  # the entry beside the structures: all proved ones of `structures="all"` cut at once
BASIS = "stream_basis"  # another one: whether the hidden state can be turned into another basis
UNTRIED = "generation not tried: "
_LONGEST_REASON = 200
_PAGE = """\
# Model types

What can be pruned, tried type by type. `make survey` writes this page and `architectures.json` beside it. Made with
{versions}.

{summary}

A small random model of each type is built from the type's default config. A structure counts as verified after a whole
round trip in fp32: random units are set to zero and cut out, the model is saved, and the stock class reloads it with
`from_pretrained`. Its logits equal the zeroed model's within a relative 1e-5, and so do those of greedy generation with
the cache, token by token. `joint` is the same with all verified structures at once.

- ✓: verified. *coupled ✓*: verified, but heads and embedding channels only shrink together, since the model has no size
  of a head of its own.
- refused: the reason is in the list below. HESSO leaves the structure alone.
- –: the type, or its default config, has no such structure. Query heads are single ones of several that share a
  key-value head.

`stream basis`: whether `stream_basis="principal"` can turn the hidden state into another basis, tried on the model with
random gains and biases in all norms: turned by a random rotation, its fp32 logits are the same within an absolute 1e-5
(with *fp64*: those of the model in fp64, where rounding in fp32 is more than that).

- *exact*, or *exact, LayerNorm* where norms subtract the mean and the rotation keeps it.
- *tied, N clusters*: as exact, once the last norm's gain is uniform within so many clusters of channels, since the
  embedding is the output matrix too. Training measures and limits what that costs.
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


@dataclass(frozen=True)
class BasisSurvey:
    """Whether the stream of one model type can be turned.

    Attributes:
        status: `tied` where the embedding is the output matrix, and the last gain has to be uniform within clusters.
        absolute_error: of the turned model's logits.
        dtype: that the model computed in; fp64 where fp32 alone rounds to more than is allowed.
        clusters: of the last gain of the tiny model, 1 where it isn't tied.
        centred: whether norms subtract the mean, so that the rotation has to keep it.
        reason: one line: why it is refused.
    """

    status: Literal["exact", "tied", "refused"]
    absolute_error: float | None = None
    dtype: Literal["fp32", "fp64"] = "fp32"
    clusters: int = 1
    centred: bool = False
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)


TypeSurvey = dict[str, StructureSurvey | BasisSurvey]


def summary(survey: Mapping[str, Any]) -> str:
    """Return in three sentences of how many model types what is proved; survey is the JSON."""
    types = [(_structures(found, "proved"), _structures(found, "refused")) for found in survey["model_types"].values()]
    heads = [_HEADS in proved for proved, _ in types]
    inner = [bool(_INNER & proved) for proved, _ in types]
    width = [_WIDTH in proved for proved, _ in types]
    some = sum(bool(proved) for proved, _ in types)
    all_three = sum(all(three) for three in zip(heads, inner, width, strict=True))
    unrefused = sum(bool(proved) and not refused for proved, refused in types)
    bases = [found[BASIS] for found in survey["model_types"].values() if BASIS in found]
    turned = [found for found in bases if found["status"] != "refused"]
    return (
        f"Of {len(types)} causal language model types of Transformers {survey['versions']['transformers']}, {some} "
        f"have at least one structure verified, {all_three} all three of attention heads, MLP or expert channels, and "
        f"embedding channels; of {unrefused} nothing that they have is refused. Attention heads are verified for "
        f"{sum(heads)}, MLP or expert channels for {sum(inner)}, embedding channels for {sum(width)}. "
        f"The hidden state of {len(turned)} can be turned into its principal axes, of "
        f"{sum(found['centred'] for found in turned)} with LayerNorm and of "
        f"{sum(found['status'] == 'tied' for found in turned)} with tied embeddings."
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
    return {name for name, entry in found.items() if name not in (JOINT, BASIS) and entry["status"] == status}


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["status"] == "not_applicable":
        return "–"
    if entry["status"] == "refused":
        return "refused"
    if "clusters" in entry:
        turned = f"tied, {entry['clusters']} clusters" if entry["status"] == "tied" else "exact"
        return turned + ", LayerNorm" * entry["centred"] + ", fp64" * (entry["dtype"] == "fp64")
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
