"""What was proved isn't proved again, by this process or the next; whatever decides a proof makes it another one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM
from transformers.models.llama import modeling_llama

from hesso_hf.config import DEFAULT_STRUCTURES
from hesso_hf.structures.proof import cache, prove, turn
from hesso_hf.structures.proof.cache import CACHE, cache_folder
from hesso_hf.structures.proof.prove import proved_groups
from hesso_hf.structures.proof.result import Proof, StructureProof
from tests.support import ROOT, forks
from tests.support.checks import propagated
from tests.support.families import ALL
from tests.support.tiny import tiny_llama

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
HELD = Proof({"mlp_channels": StructureProof("mlp_channels", None, None, "there are none", applicable=False)})
MLP = ("mlp_channels",)


class Mine(LlamaForCausalLM):
    """Nobody else's, so that nothing is known of it."""


def config(**changes: int) -> LlamaConfig:
    return LlamaConfig(**(SIZES | {"vocab_size": 57, "num_hidden_layers": 2} | changes))


def test_a_config_is_proved_once() -> None:
    with mock.patch.object(prove, "prove", return_value=HELD) as anew:
        found = [proved_groups(Mine, config(), ("mlp_channels", "attention_heads")) for _ in range(2)]
    assert anew.call_count == 1
    assert found[0] is found[1]


def test_whatever_decides_a_proof_has_it_made_again() -> None:
    class Other(LlamaForCausalLM):
        pass

    eager = config()
    eager._attn_implementation = "eager"
    grouped = config()
    grouped._experts_implementation = "grouped_mm"
    changed = config()
    groups = mock.patch.object(prove, "groups_of", return_value=(mock.sentinel.groups, mock.sentinel.axes))
    with groups, mock.patch.object(prove, "prove", return_value=HELD) as anew:
        proved_groups(Other, config(), MLP)
        proved_groups(Other, changed, ("attention_heads",))
        changed.intermediate_size = 48  # after it was proved as it was
        for case in (changed, config(vocab_size=58), eager, grouped):
            proved_groups(Other, case, ("attention_heads",))
        proved_groups(Mine, eager, ("attention_heads",))
    assert anew.call_count == 7
    assert [call.args[1].intermediate_size for call in anew.call_args_list][2:4] == [48, 40]


# -- from one process to the next -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where proofs are kept; nothing else is remembered."""
    monkeypatch.setenv(CACHE, str(tmp_path))
    return tmp_path / "proofs"


def times_proved(model_class: type = LlamaForCausalLM, made: Any = HELD, **changes: int) -> int:
    """Return how often a case is proved that is asked for twice."""
    with mock.patch.object(prove, "prove", return_value=made) as anew:
        for _ in range(2):
            assert proved_groups(model_class, config(**changes), MLP)[1] == made
    return anew.call_count


ANOTHER = """
import sys
sys.path.insert(0, sys.argv[1])
from unittest import mock
from hesso_hf.structures.proof import prove, turn
from tests.support.tiny import tiny_llama
model = tiny_llama()
with mock.patch.object(prove, "prove", side_effect=[]), mock.patch.object(turn, "prove_turn", side_effect=[]):
    print(prove.proved_groups(type(model), model.config)[1], turn.turn_of(model), sep="|")
"""


def test_another_process_finds_what_was_proved(folder: Path) -> None:
    model = tiny_llama()
    expected = proved_groups(type(model), model.config)[1], turn.turn_of(model)
    assert len(list(folder.iterdir())) == 2
    done = forks.run(ANOTHER, str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "|".join(map(str, expected))


def test_every_kind_of_scheme_comes_back_as_it_was(folder: Path) -> None:
    case = ALL["mixtral"].config()
    names = (*DEFAULT_STRUCTURES, "experts", "layers")
    made = proved_groups(MixtralForCausalLM, case, names)
    assert {type(found.scheme).__name__ for found in made[1].structures.values()} >= {
        "Scheme", "ExpertScheme", "LayerScheme"
    }  # fmt: skip
    with mock.patch.object(prove, "prove", side_effect=AssertionError):
        assert proved_groups(MixtralForCausalLM, case, names) == made


@pytest.mark.parametrize("spoil", ["cut", "changed", "another", "folder"])
def test_what_can_not_be_read_is_proved_anew(spoil: str, folder: Path) -> None:
    assert times_proved() == 1
    (path,) = folder.iterdir()
    told = path.read_text()
    if spoil == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text({"cut": told[:-40], "changed": told.replace("none", "some"), "another": json.dumps([1])}[spoil])
    assert times_proved() == (2 if spoil == "folder" else 1)
    assert [found.name for found in folder.iterdir()] == [path.name]
    assert spoil == "folder" or path.read_text() == told


def test_a_folder_that_can_not_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    for place in (str(tmp_path / "file"), ""):
        monkeypatch.setenv(CACHE, place)
        assert times_proved() == 2


def test_nothing_is_kept_that_may_be_another_proof_in_the_next_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = Proof({"mlp_channels": StructureProof("mlp_channels", None, None, "MemoryError: once")})
    assert times_proved(made=refused) == 2
    assert times_proved(Mine) == 2
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *args: args)  # as fused kernels are put there
        assert times_proved() == 2
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
        assert times_proved() == 2
    with monkeypatch.context() as patch:
        patch.setattr(cache, "attention_of", lambda config: "registered")
        assert times_proved() == 2
    assert not folder.exists()


def test_other_versions_and_other_sources_have_it_proved_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert times_proved() == 1
    for owner, name, value in (
        (cache.transformers, "__version__", "0"), (cache, "_own_digest", lambda: "changed"),
        (cache, "_digest", lambda paths: "changed"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert times_proved() == 1, name
    assert times_proved(vocab_size=58) == 1
    assert len(list(folder.iterdir())) == 5
    assert times_proved() == 0


def test_it_lies_beside_what_others_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hesso_hf" / "proofs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "hesso_hf" / "proofs"


def test_what_takes_long_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*_: Any) -> Proof:
        time.sleep(0.3)
        return HELD

    monkeypatch.setattr(cache, "SLOW", 0.01)
    with mock.patch.object(prove, "prove", slowly), propagated(caplog):
        for _ in range(2):
            proved_groups(LlamaForCausalLM, config(), (*MLP, "expert_channels", "mixer_channels", "layers", "experts"))
    told = {record.getMessage() for record in caplog.records if record.name == cache.__name__}
    assert told == {"proving mlp_channels, layers of LlamaForCausalLM on a tiny model (once per model type)"}
