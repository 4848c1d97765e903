"""Devices: pruning state lies where the parameters are, wherever they were when the optimizer was wrapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from hesso_hf import HessoConfig, wrap_optimizer
from hesso_hf.pruning.healing import Healer
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.pruning.saliency import no_units
from hesso_hf.pruning.schedule import Schedule
from tests.support import pretend_device
from tests.support.lora import tiny_lora
from tests.support.moe import moe_model
from tests.support.tiny import tiny_llama, tiny_phi, token_batches

STEPS = 20
CRIC = {"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tiny_llama, {}),
    "cric on the device": (tiny_llama, CRIC | {"cric_snapshot": "device"}),
    "norms that centre": (tiny_phi, {}),
    "experts": (
        lambda: moe_model("mixtral", experts_implementation="eager"),
        {"structures": ["experts"], "pruning_ratio": 0.25},
    ),
    "adapter": (tiny_lora, {}),
}


def wrapped(case: str, moved: bool = False) -> tuple[nn.Module, HessoOptimizer]:
    """Wrap an optimizer on the CPU, or of a model that was moved before."""
    build, changes = CASES[case]
    options = {"pruning_ratio": 0.4, "round_to": 1, "warmup_steps": 2, "pruning_steps": 4, "pruning_periods": 2}
    model = build()
    if moved:
        model.to(pretend_device.DEVICE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = torch.optim.AdamW(trained, lr=1e-2)
    return model, wrap_optimizer(base, model, HessoConfig(**(options | changes)), STEPS)


def train(model: nn.Module, optimizer: HessoOptimizer, first: int, last: int) -> None:
    for batch in token_batches(STEPS)[first:last]:
        ids = batch.to(pretend_device.DEVICE)
        optimizer.process.prepare_gradients()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def result(model: nn.Module, optimizer: HessoOptimizer) -> dict[str, torch.Tensor]:
    scales = optimizer.process.scales
    assert {value.device.type for value in scales.values()} == {"pretend"}
    assert any(bool((value == 0).any()) for value in scales.values())
    weights = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    return weights | {f"scales of {name}": value.cpu() for name, value in scales.items()}


def moved_after(case: str) -> list[dict[str, torch.Tensor]]:
    """Move a model before and after the optimizer is wrapped."""
    found = []
    for moved in (True, False):
        model, optimizer = wrapped(case, moved)
        if not moved:
            model.to(pretend_device.DEVICE)
        train(model, optimizer, 0, STEPS)
        found.append(result(model, optimizer))
    return found


def resumed(case: str) -> list[dict[str, torch.Tensor]]:
    """Train on, and go on from what was saved on the way in a model that is moved after the optimizer was wrapped."""
    model, optimizer = wrapped(case, moved=True)
    train(model, optimizer, 0, 4)
    saved = tree_map_only(torch.Tensor, lambda value: value.cpu().clone(), [model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, 4, STEPS)
    again, loaded = wrapped(case)
    again.load_state_dict(saved[0])
    again.to(pretend_device.DEVICE)
    loaded.load_state_dict(saved[1])
    train(again, loaded, 4, STEPS)
    return [result(model, optimizer), result(again, loaded)]


def healed(place: str) -> dict[str, torch.Tensor]:
    """Return what a period begins with where units are healed, found on a device."""
    model = tiny_llama().to(place)  # type: ignore[arg-type]
    bound = PruningPlan.prepare(model, HessoConfig(pruning_ratio=0.1)).process(Schedule(0, 4, 1, STEPS)).bound
    ids = torch.cat(token_batches(2)).to(place)
    healer = Healer(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    pruned, marked = (no_units(bound.shapes(), ids.device) for _ in range(2))
    for units in marked.values():
        units[:, 0] = True
    fisher = healer.fisher(bound)
    assert fisher.rows.keys() == {reader.name for reader in healer.readers(bound)}, "a backward pass failed"
    found = {f"norms of {name}": norms for name, norms in fisher.norms.items()}
    found |= {f"costs of {name}": costs for name, costs in healer.costs(bound, pruned, fisher=fisher).items()}
    found |= {name: whole for name, (whole,) in healer.corrections(bound, marked, pruned, fisher).items()}
    assert {value.device.type for value in found.values()} == {torch.device(place).type}
    return {name: value.cpu() for name, value in found.items()}


def test_a_period_begins_on_the_device_as_on_the_cpu():
    expected, found = healed("cpu"), pretend_device.apart(healed, pretend_device.DEVICE)
    assert expected.keys() == found.keys()
    assert all(
        torch.allclose(found[name].to(value.dtype), value, rtol=1e-3, atol=1e-6) for name, value in expected.items()
    )


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_moved_after_the_optimizer_was_wrapped_is_pruned_alike(case: str):
    expected, found = pretend_device.apart(moved_after, case)
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("case", ["cric on the device", "adapter"])
def test_a_saved_state_is_loaded_to_where_the_parameters_are(case: str):
    expected, found = pretend_device.apart(resumed, case)
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]
