"""A smaller model in a larger one's place: down to the last attribute what its class makes of its config."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hesso_hf.hf_models.build import model_class_of
from hesso_hf.structures.cut import cut_model
from hesso_hf.structures.in_place import InPlace
from hesso_hf.structures.proof.prove import proved_groups
from tests.support.families import (
    ALL,
    OTHERS,
    QUERIES,
    Family,
    logits,
    random_model,
    random_units,
    token_ids,
    zero_pruned_,
)

EVERY = ALL | QUERIES | {family.name: family for family in OTHERS}
QUICK = ("gemma3_text", "falcon-grouped", "opt-projected", "deepseek_v3")
OWN = {"_parameters", "_buffers", "_modules", "training", "config", "generation_config"}  # compared otherwise, or kept


def attributes(model: nn.Module) -> dict[str, dict[str, object]]:
    """What each module holds that is a number, a word or a shape."""
    plain = (bool, int, float, str, tuple, list)
    return {
        name: {key: value for key, value in vars(module).items() if key not in OWN and isinstance(value, plain)}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, f in EVERY.items()],
)
def test_a_family_is_cut_where_it_stands(family: Family) -> None:
    model = random_model(family.config())
    groups = proved_groups(model_class_of(model.config), model.config, family.structures)[0]
    kept = random_units(groups, family.units_to_keep(family.proved))
    zero_pruned_(model, groups, kept)
    twin, ids = copy.deepcopy(model), token_ids(model.config)
    expected = logits(model, ids)
    place = InPlace(model)
    place.put(cut_model(model, groups, kept, torch.float32), groups, kept)
    error = (logits(model, ids) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    assert model.num_parameters() < twin.num_parameters()
    stock = type(model)(copy.deepcopy(model.config)).eval()
    stock.load_state_dict(model.state_dict())
    assert torch.equal(logits(stock, ids), logits(model, ids))
    assert attributes(stock) == attributes(model)
    for (name, buffer), theirs in zip(stock.named_buffers(), model.buffers(), strict=True):
        assert buffer.shape == theirs.shape, name
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    place.undo()
    assert torch.equal(logits(model.eval(), ids), expected)
    assert attributes(model) == attributes(twin)
    assert model.config.to_dict() == twin.config.to_dict()
