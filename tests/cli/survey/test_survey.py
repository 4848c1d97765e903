"""The survey: representative types again, isolation of crashes and hangs, resuming, the command line."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from hesso_hf.cli.main import main
from hesso_hf.cli.survey import stream_basis
from hesso_hf.cli.survey import survey as survey_module
from hesso_hf.cli.survey.page import BASIS, JOINT, UNTRIED, BasisSurvey, StructureSurvey, TypeSurvey
from hesso_hf.cli.survey.round_trip import Generated, RoundTrips, _compare
from hesso_hf.cli.survey.survey import SurveyFile, model_types, survey_type, survey_types, versions
from hesso_hf.config import STRUCTURES
from hesso_hf.errors import HessoError, VerificationError
from hesso_hf.hf_models.tiny_configs import default_config, tiny_config
from hesso_hf.structures.groups import PruningGroups
from hesso_hf.structures.proof.prove import proved_groups
from hesso_hf.structures.proof.result import TOLERANCE
from tests.support import ROOT

RECORDED = json.loads((ROOT / "docs" / "architectures.json").read_text(encoding="utf-8"))
# One of a kind: grouped queries, norms of heads, norms after blocks, layer norms, a fused attention that is coupled to
# the width, other words for sizes, one key-value head, no positions to learn, experts, latent attention, none.
TYPES = ("llama", "qwen3", "gemma2", "phi", "gpt2", "opt", "falcon", "bloom", "mixtral", "deepseek_v3", "mamba")
# Their likes: tests/export/test_families.py proves and exports them by default.
ALIKE = (
    "mistral", "qwen2", "gemma3_text", "phi3", "olmo2", "cohere2", "starcoder2", "stablelm", "nemotron", "granite",
    "gpt_neox", "gptj", "gpt_neo", "qwen3_moe", "gpt_oss",
)  # fmt: skip
FINE: TypeSurvey = {
    **dict.fromkeys((*STRUCTURES, JOINT), StructureSurvey("proved", 1e-7)), BASIS: BasisSurvey("exact", 1e-7)
}  # fmt: skip


def check_basis(found: BasisSurvey, recorded: dict[str, Any]) -> None:
    """Assert that a stream is turned as recorded, within the same bound, or refused for the same reason."""
    kind = (found.status, found.clusters, found.centred)
    assert kind == tuple(recorded[name] for name in ("status", "clusters", "centred"))
    if found.status == "refused":
        assert found.reason
        assert len(found.reason) <= 200
    else:
        assert found.absolute_error is not None
        assert 0 < found.absolute_error <= 1e-5


def check(model_type: str, found: TypeSurvey) -> None:
    """Assert that a type's survey says what docs/architectures.json says."""
    recorded = RECORDED["model_types"][model_type]
    assert {name: entry.status for name, entry in found.items()} == {
        name: entry["status"] for name, entry in recorded.items()
    }
    assert {name for name in (*STRUCTURES, JOINT) if found[name].coupled} == {
        name for name, entry in recorded.items() if entry.get("coupled")
    }
    check_basis(found[BASIS], recorded[BASIS])
    for entry in (found[name] for name in (*STRUCTURES, JOINT)):
        assert len(entry.reason) <= 200
        assert "\n" not in entry.reason
        if entry.status == "proved":
            assert entry.relative_error is not None
            assert entry.relative_error <= TOLERANCE
            assert not entry.reason or entry.reason.startswith(UNTRIED)
        else:
            assert entry.reason


@pytest.mark.parametrize("model_type", [*TYPES, *(pytest.param(name, marks=pytest.mark.slow) for name in ALIKE)])
def test_representative_types_are_as_recorded(model_type: str) -> None:
    check(model_type, survey_type(model_type))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_types_are_as_recorded() -> None:
    left = set(model_types())
    for model_type, found in survey_types(model_types(), limit=600):
        check(model_type, found)
        left.remove(model_type)
    assert not left


def test_the_record_is_of_the_tested_versions_and_has_every_type_and_structure() -> None:
    """Newer or older ones may be installed beside it, and have other types."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    recorded, installed = RECORDED["versions"], versions()
    assert recorded["hesso_hf"] == installed["hesso_hf"]
    assert all(recorded[name].partition("+")[0] == pinned[name] for name in ("torch", "transformers"))
    if installed == recorded:
        assert list(RECORDED["model_types"]) == model_types()
    for found in RECORDED["model_types"].values():
        assert list(found) == [*STRUCTURES, JOINT, BASIS]


# -- round trips -------------------------------------------------------------------------------------------------------


def llama_trips() -> RoundTrips:
    model_class, config = default_config("llama")
    tiny = tiny_config(model_class, config)
    return RoundTrips(model_class, tiny, proved_groups(model_class, tiny)[0])


def test_a_model_that_reads_back_differently_is_refused_by_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    trips = llama_trips()
    assert trips.run(("mlp_channels",)) <= TOLERANCE
    original = LlamaForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def damaged(cls: Any, *args: Any, **options: Any) -> Any:
        model = original(cls, *args, **options)
        model.model.norm.weight.data *= 1.01
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(damaged))
    with pytest.raises(VerificationError, match=r"logits differ by .*; model\.norm\.weight reads back differently"):
        trips.run(("mlp_channels",))


def test_a_model_that_does_not_reload_is_refused_by_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    trips = llama_trips()

    def broken(cls: Any, *args: Any, **options: Any) -> Any:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(broken))
    with pytest.raises(VerificationError, match="reloading: RuntimeError: size mismatch; the uncut model fails too"):
        trips.run(("mlp_channels",))


def test_a_class_that_can_not_generate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "can_generate", classmethod(lambda cls: False))
    assert llama_trips().untried == f"{UNTRIED}the class doesn't generate"

    def fails(self: Any, *args: Any, **options: Any) -> Any:
        raise KeyError("cache")

    monkeypatch.undo()
    monkeypatch.setattr(LlamaForCausalLM, "generate", fails)
    assert llama_trips().untried == f"{UNTRIED}KeyError: 'cache'"


def test_generation_may_differ_only_between_equal_logits() -> None:
    logits = torch.tensor([[3.0, 3.0, 1.0], [1.0, 2.0, 3.0]])
    expected = Generated(torch.tensor([0, 2]), logits)
    _compare(Generated(torch.tensor([0, 2]), logits + 1e-6), expected)
    _compare(Generated(torch.tensor([1, 0]), torch.stack([logits[0], -logits[1]])), expected)  # a tie at the first
    with pytest.raises(VerificationError, match="new token 2 differ by 2"):
        _compare(Generated(torch.tensor([0, 0]), torch.stack([logits[0], -logits[1]])), expected)


def test_a_failed_round_trip_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: RoundTrips, names: tuple[str, ...]) -> float:
        if names == ("mlp_channels",):
            raise VerificationError("the reloaded model's logits differ by 1.0e+00")
        if len(names) > 1:
            raise IndexError("no\nsuch   unit")
        return 0.0

    monkeypatch.setattr(RoundTrips, "run", fails)
    found = survey_type("llama")
    assert found["mlp_channels"] == StructureSurvey("refused", reason="the reloaded model's logits differ by 1.0e+00")
    assert found["attention_heads"] == StructureSurvey("proved", 0.0)
    assert found[JOINT] == StructureSurvey("refused", reason="zeroing: IndexError: no such unit")


def test_a_type_without_a_tiny_model_is_refused_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model_type: str) -> Any:
        raise OSError("/a/folder/of/mine/config.json is gone")

    for module in (survey_module, stream_basis):
        monkeypatch.setattr(module, "default_config", fails)
    found = survey_type("llama")
    assert list(found) == [*STRUCTURES, JOINT, BASIS]
    assert {found[name] for name in STRUCTURES} == {StructureSurvey("refused", reason="OSError: config.json is gone")}
    assert found[JOINT].status == "not_applicable"
    assert found[BASIS] == BasisSurvey("refused", reason="OSError: config.json is gone")


# -- processes ---------------------------------------------------------------------------------------------------------


def fake(model_type: str) -> TypeSurvey:
    """Do in a survey's process what the name says."""
    if model_type.startswith("hangs"):
        time.sleep(60)
    if model_type == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if model_type == "exits":
        sys.exit(3)
    if model_type == "raises":
        raise RuntimeError("at once")
    print("nobody sees this")
    return FINE


def refusal(found: TypeSurvey) -> str:
    """Return the reason that all structures are refused for."""
    assert {found[name].status for name in (*STRUCTURES, BASIS)} == {"refused"}
    assert found[JOINT].status == "not_applicable"
    (reason,) = {found[name].reason for name in (*STRUCTURES, BASIS)}
    return reason


def test_one_type_that_crashes_does_not_stop_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    types = ["crashes", "one", "exits", "raises", "two"]
    found = dict(survey_types(types, jobs=2, survey=fake))
    assert set(found) == set(types)
    assert found["one"] == found["two"] == FINE
    assert refusal(found["crashes"]) == f"the process ended with exit code {-signal.SIGSEGV}"
    assert refusal(found["exits"]) == "the process ended with exit code 3"
    assert refusal(found["raises"]) == "RuntimeError: at once"
    assert "nobody" not in capfd.readouterr().out


def test_types_that_hang_are_ended_in_time() -> None:
    found = dict(survey_types(["hangs", "hangs more"], jobs=1, limit=0.5, survey=fake))
    assert {refusal(outcome) for outcome in found.values()} == {"not done after 0.5 seconds"}
    assert len(found) == 2


def test_a_survey_that_is_left_ends_its_processes() -> None:
    running = survey_types(["one", "hangs"], jobs=2, survey=fake)
    assert next(running)[0] == "one"
    assert multiprocessing.active_children()
    running.close()
    assert not multiprocessing.active_children()


# -- files and the command line ----------------------------------------------------------------------------------------


def test_resuming_leaves_out_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "survey.json"
    first = SurveyFile(path, ["gpt2", "llama", "gpt2"])
    assert first.left == ["gpt2", "llama"]
    first.add("llama", FINE)
    content = json.loads(path.read_text())
    assert content["versions"] == versions()
    assert content["model_types"]["llama"]["joint"] == {"status": "proved", "relative_error": 1e-7, "reason": ""}
    assert "| `llama` | ✓ |" in path.with_suffix(".md").read_text()
    assert SurveyFile(path, ["gpt2", "llama"], resume=True).left == ["gpt2"]
    assert SurveyFile(path, resume=True).left == [name for name in model_types() if name != "llama"]
    again = SurveyFile(path, ["gpt2"])
    assert again.left == ["gpt2"]
    again.add("gpt2", FINE)
    assert list(json.loads(path.read_text())["model_types"]) == ["gpt2", "llama"]
    assert SurveyFile(path).found == {}
    assert sorted(file.name for file in path.parent.iterdir()) == ["survey.json", "survey.md"]


def test_one_column_is_made_anew_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "survey.json"
    with pytest.raises(HessoError, match=r"`--only` \('stream_basis'\): .* has no 'gpt2'"):
        SurveyFile(path, ["gpt2"], only=BASIS)
    SurveyFile(path, ["gpt2"]).add("gpt2", FINE)
    SurveyFile(path, ["llama"]).add("llama", FINE)
    file = SurveyFile(path, ["llama", "gpt2"], only=BASIS)
    assert file.left == ["llama", "gpt2"]
    file.add("llama", survey_module.refuse_all("it hung"))
    found = json.loads(path.read_text())["model_types"]
    assert list(found["llama"]) == [*STRUCTURES, JOINT, BASIS]
    assert found["llama"][BASIS]["reason"] == "it hung"
    assert {found["llama"][name]["status"] for name in (*STRUCTURES, JOINT)} == {"proved"}
    assert found["gpt2"] == {name: FINE[name].to_dict() for name in found["gpt2"]}
    del found["gpt2"][BASIS]
    path.write_text(json.dumps({"versions": versions(), "model_types": found}))
    assert SurveyFile(path, ["llama", "gpt2"], resume=True, only=BASIS).left == ["gpt2"]


def test_only_a_survey_of_the_same_versions_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "survey.json"
    path.write_text(json.dumps({"versions": {"transformers": "4.0"}, "model_types": {}}))
    for options in ({"resume": True}, {"types": ["llama"]}):
        with pytest.raises(HessoError, match=r"was made with \{'transformers': '4.0'\}"):
            SurveyFile(path, **options)  # type: ignore[arg-type]
    assert SurveyFile(path).left == model_types()
    path.write_text("[]")
    with pytest.raises(HessoError, match="isn't the JSON of a survey"):
        SurveyFile(path, resume=True)
    with pytest.raises(HessoError, match="did you mean 'qwen3'"):
        SurveyFile(path, ["qwen33"])


def test_the_command_writes_both_files_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "survey.json"
    assert main(["survey", "--types", "gpt2", "--output", str(path), "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert "Of 1 causal language model types" in out
    assert str(path.with_suffix(".md")) in out
    found = json.loads(path.read_text())["model_types"]["gpt2"]
    recorded = RECORDED["model_types"]["gpt2"]
    assert {name: entry["status"] for name, entry in found.items()} == {
        name: entry["status"] for name, entry in recorded.items()
    }
    assert found[BASIS]["status"] == "tied"
    found[BASIS] = {}
    path.write_text(json.dumps({"versions": versions(), "model_types": {"gpt2": found}}))
    assert main(["survey", "--types", "gpt2", "--output", str(path), "--only", "stream_basis"]) == 0
    again = json.loads(path.read_text())["model_types"]["gpt2"]
    check_basis(BasisSurvey(**again.pop(BASIS)), recorded[BASIS])
    del found[BASIS]
    assert again == found
    before = path.stat().st_mtime_ns
    assert main(["survey", "--types", "gpt2", "--output", str(path), "--resume"]) == 0
    assert path.stat().st_mtime_ns == before
    assert main(["survey", "--types", "gpt2", "--output", str(path), "--time-limit", "0"]) == 2


def test_coupled_structures_make_their_round_trip_together() -> None:
    names: list[tuple[str, ...]] = []

    class Trips(RoundTrips):
        def run(self, structures: tuple[str, ...]) -> float:
            names.append(structures)
            return super().run(structures)

    model_class, config = default_config("gpt2")
    tiny = tiny_config(model_class, config)
    groups: PruningGroups = proved_groups(model_class, tiny)[0]
    assert set(groups.coupled) == {"attention_heads", "embedding_channels"}
    together = survey_module._together(groups)
    assert set(together[0]) == set(groups.coupled)
    assert Trips(model_class, tiny, groups).run(together[0]) <= TOLERANCE
    assert names == [together[0]]
