"""The survey's column of the stream's basis: representative types again, and that a wrong turn is refused."""

from __future__ import annotations

import json

import pytest
import torch

from hesso_hf.cli.survey import stream_basis
from hesso_hf.cli.survey.stream_basis import survey_basis
from hesso_hf.structures.turn import StreamTurn
from tests.support import ROOT
from tests.support.checks import needs

RECORDED = json.loads((ROOT / "docs" / "architectures.json").read_text(encoding="utf-8"))["model_types"]
# What each stands for, and what it must be.
KINDS = {
    "llama": ("exact", False), "qwen3": ("exact", False),  # RMSNorm, untied by default
    "gemma": ("tied", False), "jetmoe": ("tied", False),  # RMSNorm of 1 + w; vectors that are added to the stream
    "gpt_neox": ("exact", True), "phi": ("exact", True),  # LayerNorm with biases, parallel blocks
    "gpt2": ("tied", True), "opt": ("tied", True), "cohere": ("tied", True),  # Conv1D; positions; no bias, parallel
    "granite": ("exact", False),  # multipliers on embeddings, blocks and logits
    "mixtral": ("exact", False), "phimoe": ("exact", True),  # experts and routers
    "hrm_text": ("exact", False),  # norms without gains, behind the blocks
    "deepseek_v32": ("exact", False),  # an indexer that chooses, without any gradient
    "hy_v4": ("exact", False),  # several copies of the stream
}  # fmt: skip
REFUSED = {
    "gemma2": "post_attention_layernorm.weight scales channels of what is yet to be added to the stream",
    "olmo2": "post_attention_layernorm.weight scales channels of what is yet to be added to the stream",
    "bert": "its embedding channels aren't verified",
}


# test_survey.py surveys these by default, the basis too; hrm_text's turn is proved by structures/proof/test_turn.py.
ELSEWHERE = {"llama", "qwen3", "gemma2", "phi", "gpt2", "opt", "mixtral", "hrm_text"}


def known(names: object) -> list[object]:
    slow = {name: [pytest.mark.slow] for name in ELSEWHERE}
    return [pytest.param(name, marks=[needs(name), *slow.get(name, [])]) for name in names]  # type: ignore[attr-defined]


def test_the_record_says_of_representative_types_what_they_must_be() -> None:
    for model_type, kind in KINDS.items():
        recorded = RECORDED[model_type]["stream_basis"]
        assert (recorded["status"], recorded["centred"], recorded["dtype"]) == (*kind, "fp32")
        assert (recorded["clusters"] > 1) is (recorded["status"] == "tied")
    for model_type, reason in REFUSED.items():
        assert reason in RECORDED[model_type]["stream_basis"]["reason"]


@pytest.mark.parametrize("model_type", known(KINDS))
def test_representative_types_are_turned_as_recorded(model_type: str) -> None:
    found, recorded = survey_basis(model_type), RECORDED[model_type]["stream_basis"]
    assert (found.status, found.centred) == KINDS[model_type], found.reason
    assert found.dtype == recorded["dtype"] == "fp32"
    assert (found.status, found.centred) == (recorded["status"], recorded["centred"])
    assert found.clusters == recorded["clusters"]
    assert (found.clusters > 1) is (found.status == "tied")
    assert found.absolute_error is not None
    assert 0 < found.absolute_error < 1e-5
    assert recorded["absolute_error"] < 1e-5


@pytest.mark.parametrize("model_type", known(REFUSED))
def test_what_keeps_a_type_to_its_given_basis_is_named(model_type: str) -> None:
    found = survey_basis(model_type)
    assert (found.status, found.absolute_error) == ("refused", None)
    assert REFUSED[model_type] in found.reason
    assert RECORDED[model_type]["stream_basis"]["reason"] == found.reason


def test_the_record_has_as_many_types_as_are_promised_and_names_every_refusal() -> None:
    bases = [found["stream_basis"] for found in RECORDED.values()]
    turned = [found for found in bases if found["status"] != "refused"]
    assert len([found for found in turned if found["dtype"] == "fp32"]) >= 60
    assert sum(found["centred"] for found in turned) >= 6
    assert all(found["absolute_error"] < 1e-5 for found in turned)
    assert all(found["reason"] for found in bases if found["status"] == "refused")


@pytest.mark.parametrize("wrong", ["gain left as it is", "a side left out", "gains left in"])
def test_a_turn_that_is_wrong_is_refused_with_its_error(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "gain left as it is":
        monkeypatch.setattr(stream_basis, "make_gain_uniform_", lambda turn, *_: [list(range(turn.width))])
    elif wrong == "a side left out":
        plain = StreamTurn.turn_

        def turned(self: StreamTurn, parameters: dict[str, torch.Tensor], rotation: torch.Tensor) -> None:
            name = self.axes[-1][0]
            before = parameters[name].detach().clone()
            plain(self, parameters, rotation)
            with torch.no_grad():
                parameters[name].copy_(before)

        monkeypatch.setattr(stream_basis, "turn_of", _proved_first(stream_basis.turn_of, "turn_", turned, monkeypatch))
    else:
        nothing = lambda self, parameters: None  # noqa: E731
        monkeypatch.setattr(
            stream_basis, "turn_of", _proved_first(stream_basis.turn_of, "fold_gains_", nothing, monkeypatch)
        )
    found = survey_basis("gpt2")
    assert found.status == "refused"
    assert "the turned model's logits differ by" in found.reason
    assert found.absolute_error is not None
    assert found.absolute_error > 1e-3


def _proved_first(turn_of, method, wrong, monkeypatch):
    """Return a `turn_of` after whose proof a method of the turn is wrong."""

    def found(model):
        proved = turn_of(model)
        monkeypatch.setattr(StreamTurn, method, wrong)
        return proved

    return found


def test_a_type_whose_norms_see_no_hidden_states_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_basis, "stream_covariance", lambda *_: (torch.zeros(2, 2), 24))
    assert "no norm of the stream is given hidden states" in survey_basis("llama").reason
