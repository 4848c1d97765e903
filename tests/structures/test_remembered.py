"""What a process has proved it doesn't prove again; whatever decides a proof makes it another one."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from hesso_hf.structures.groups import PruningGroups
from hesso_hf.structures.proof import prove
from hesso_hf.structures.proof.prove import proved_groups
from tests.support.checks import propagated

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}


class Mine(LlamaForCausalLM):
    """Nobody else's, so that nothing is known of it."""


def config(**changes: int) -> LlamaConfig:
    return LlamaConfig(**(SIZES | {"vocab_size": 57, "num_hidden_layers": 2} | changes))


def test_a_config_is_proved_once_and_the_log_says_what_is_proved(caplog: pytest.LogCaptureFixture) -> None:
    found = PruningGroups({}), mock.sentinel.proof, mock.sentinel.axes
    log = caplog.at_level(logging.INFO, logger=prove.__name__)
    with mock.patch.object(prove, "prove_anew", return_value=found) as anew, propagated(caplog), log:
        for _ in range(2):
            assert proved_groups(Mine, config(), ("mlp_channels", "attention_heads")) is found
    assert anew.call_count == 1
    told = {record.getMessage() for record in caplog.records if record.name == prove.__name__}
    assert told == {"proving on a tiny Mine how its units are cut: mlp_channels, attention_heads"}


def test_whatever_decides_a_proof_has_it_made_again() -> None:
    class Other(LlamaForCausalLM):
        pass

    eager = config()
    eager._attn_implementation = "eager"
    grouped = config()
    grouped._experts_implementation = "grouped_mm"
    changed = config()
    with mock.patch.object(prove, "prove_anew") as anew:
        proved_groups(Other, config(), ("mlp_channels",))
        proved_groups(Other, changed, ("attention_heads",))
        changed.intermediate_size = 48  # after it was proved as it was
        for case in (changed, config(vocab_size=58), eager, grouped):
            proved_groups(Other, case, ("attention_heads",))
        proved_groups(Mine, eager, ("attention_heads",))
    assert anew.call_count == 7
    assert [call.args[1].intermediate_size for call in anew.call_args_list][2:4] == [48, 40]
