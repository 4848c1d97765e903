"""The page of the model types: what it counts, shows and lists, and that the committed one is of the committed JSON."""

from __future__ import annotations

import json
from typing import Any

from hesso_hf.cli.survey.page import BasisSurvey, StructureSurvey, one_line, render_architectures, summary
from tests.support import ROOT

DOCS = ROOT / "docs"


def entry(status: Any = "proved", reason: str = "", **values: Any) -> dict[str, Any]:
    return StructureSurvey(status, reason=reason, **values).to_dict()


NONE = entry("not_applicable", "none")
COLUMNS = ("attention_heads", "mlp_channels", "expert_channels", "embedding_channels", "joint")
SURVEY = {
    "versions": {"transformers": "5.0", "torch": "2"},
    "model_types": {
        "a": {
            "attention_heads": entry(coupled=True), "mlp_channels": NONE, "expert_channels": entry(),
            "embedding_channels": entry(coupled=True), "joint": entry("refused", "a|b <c>"),
            "stream_basis": BasisSurvey("exact", 1e-6, "fp64", centred=True).to_dict(),
        },
        "b": {
            "attention_heads": entry("refused", "why"), "mlp_channels": entry(reason="generation not tried: *it*"),
            "expert_channels": NONE, "embedding_channels": entry("refused", "why"), "joint": entry(),
            "stream_basis": BasisSurvey("tied", 1e-6, clusters=4).to_dict(),
        },
        "c": {
            **dict.fromkeys(COLUMNS, NONE),
            "stream_basis": BasisSurvey("refused", reason="why not").to_dict(),
        },
    },
}  # fmt: skip


def test_the_committed_page_is_rendered_from_the_committed_json() -> None:
    survey = json.loads((DOCS / "architectures.json").read_text(encoding="utf-8"))
    assert (DOCS / "architectures.md").read_text(encoding="utf-8") == render_architectures(survey)


def test_counts() -> None:
    assert summary(SURVEY) == (
        "Of 3 causal language model types of Transformers 5.0, 2 have at least one structure verified, 1 all three of "
        "attention heads, MLP or expert channels, and embedding channels; of 1 nothing that they have is refused. "
        "Attention heads are verified for 1, MLP or expert channels for 2, embedding channels for 1. The hidden state "
        "of 2 can be turned into its principal axes, of 1 with LayerNorm and of 1 with tied embeddings."
    )


def test_the_page_has_a_row_for_each_type_and_each_reason_once() -> None:
    lines = render_architectures(SURVEY).splitlines()
    names = " | ".join(name.replace("_", " ") for name in (*COLUMNS, "stream_basis"))
    assert f"| model type | {names} |" in lines
    assert "| `a` | coupled ✓ | – | ✓ | coupled ✓ | refused | exact, LayerNorm, fp64 |" in lines
    assert "| `b` | refused | ✓ | – | refused | ✓ | tied, 4 clusters |" in lines
    assert "| `c` | – | – | – | – | – | refused |" in lines
    assert "| `c` | stream basis | why not |" in lines
    assert r"| `a` | joint | a\|b \<c> |" in lines
    assert "| `b` | attention heads, embedding channels | why |" in lines
    assert r"| `b` | \*it\* |" in lines
    assert [line for line in lines if line.startswith("#")] == [
        "# Model types",
        "## Refused",
        "## Generation not tried",
    ]
    nothing = {"c": {"attention_heads": NONE}}
    fine = render_architectures({**SURVEY, "model_types": nothing})
    assert "##" not in fine


def test_reasons_are_one_short_line_without_paths_or_addresses() -> None:
    assert one_line("a\n  b <X object at 0x7f00ab> /home/me/x/model.py:3") == "a b <X object> model.py:3"
    assert one_line("hidden_size / heads, 1/2, attn/mlp") == "hidden_size / heads, 1/2, attn/mlp"
    assert len(one_line("x" * 300)) == 200


def test_coupled_is_written_only_where_it_says_something() -> None:
    assert "coupled" not in StructureSurvey("proved", 1e-7).to_dict()
    assert StructureSurvey("proved", 1e-7, coupled=True).to_dict()["coupled"] is True
