"""The peers that HESSO is compared with: each keeps what its score says, and makes up for the rest as it should."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from hesso_hf.errors import HessoError
from hesso_hf.pruning.calibration import LossCurves
from tests.support import ROOT
from tests.support.tiny import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MLP, VOCAB, tiny_gemma2, tiny_llama

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 26, "hidden_size": HIDDEN}
GROUP = HEADS // KV_HEADS * HEAD_DIM  # columns of `o_proj` a key-value head


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers

    return peers


def examples(count: int = 5, length: int = 31) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(7))


def no_curves(*args: object) -> LossCurves:
    raise AssertionError("nothing has to be measured where the hidden state isn't cut")


def activations(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what every `o_proj` and `down_proj` reads, by name, (N, C)."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: found.__setitem__(name, args[0].flatten(0, -2))
                )
            )
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def kept_by(small: torch.Tensor, full: torch.Tensor) -> list[int]:
    """Return which rows of a matrix a smaller one has."""
    return [int((full == row).all(1).nonzero().item()) for row in small]


def channels_of(small: LlamaForCausalLM, full: LlamaForCausalLM, layer: int) -> list[int]:
    return kept_by(small.model.layers[layer].mlp.up_proj.weight, full.model.layers[layer].mlp.up_proj.weight)


def heads_of(small: LlamaForCausalLM, full: LlamaForCausalLM, layer: int) -> list[int]:
    rows = kept_by(small.model.layers[layer].self_attn.k_proj.weight, full.model.layers[layer].self_attn.k_proj.weight)
    return [row // HEAD_DIM for row in rows[::HEAD_DIM]]


def zeroed(model: LlamaForCausalLM, heads: list[list[int]], channels: list[list[int]]) -> LlamaForCausalLM:
    """Return a copy in which the units that aren't named say nothing."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, head, channel in zip(model.model.layers, heads, channels, strict=True):
            layer.self_attn.o_proj.weight[:, [c for c in range(HEADS * HEAD_DIM) if c // GROUP not in head]] = 0
            layer.mlp.down_proj.weight[:, [c for c in range(MLP) if c not in channel]] = 0
    return model


def with_biases(model: LlamaForCausalLM, small: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a copy that has the biases of a smaller model where units are read."""
    model = copy.deepcopy(model)
    for layer, other in zip(model.model.layers, small.model.layers, strict=True):
        layer.self_attn.o_proj.bias = torch.nn.Parameter(other.self_attn.o_proj.bias.clone())
        layer.mlp.down_proj.bias = torch.nn.Parameter(other.mlp.down_proj.bias.clone())
    return model


def wanda_score(weight: torch.Tensor, rows: torch.Tensor, column: int) -> float:
    return sum(abs(float(w)) for w in weight[:, column]) * float(rows[:, column].square().sum()) ** 0.5


def flap_score(weight: torch.Tensor, rows: torch.Tensor, column: int) -> float:
    said = rows[:, column]
    return float(((said - said.mean()) ** 2).sum() / (len(said) - 1)) * sum(float(w) ** 2 for w in weight[:, column])


@pytest.mark.parametrize(("peer", "score"), [("Wanda-sp", wanda_score), ("FLAP", flap_score)])
def test_the_units_of_highest_score_stay_and_nothing_else_changes(peers: ModuleType, peer: str, score) -> None:
    model, ids = tiny_llama(), examples()
    before = copy.deepcopy(model.state_dict())
    small = peers.cut(peer, model, SIZES, ids, no_curves)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    heads = [heads_of(small, model, layer) for layer in range(2)]
    channels = [channels_of(small, model, layer) for layer in range(2)]
    cut_so_far = zeroed(model, heads, channels)
    for layer in range(2):  # scored on what the model that is cut so far says
        for name, units, width, kept in (
            ("self_attn.o_proj", KV_HEADS, GROUP, heads[layer]), ("mlp.down_proj", MLP, 1, channels[layer]),
        ):  # fmt: skip
            name = f"model.layers.{layer}.{name}"
            reference = with_biases(cut_so_far, small) if peer == "FLAP" else cut_so_far
            rows, weight = activations(reference, ids)[name], before[f"{name}.weight"]
            scores = [sum(score(weight, rows, unit * width + i) for i in range(width)) for unit in range(units)]
            best = sorted(range(units), key=lambda unit: -scores[unit])[: len(kept)]
            assert sorted(best) == sorted(kept), name
    reference = with_biases(cut_so_far, small) if peer == "FLAP" else cut_so_far
    with torch.no_grad():
        assert torch.allclose(small(ids).logits, reference(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("biases", [False, True])
def test_flap_adds_the_mean_of_what_is_cut_to_the_biases(peers: ModuleType, biases: bool) -> None:
    model, ids = tiny_llama(attention_bias=biases, mlp_bias=biases), examples()
    small = peers.cut("FLAP", model, SIZES, ids, no_curves)
    assert small.config.attention_bias
    assert small.config.mlp_bias
    heads = [heads_of(small, model, layer) for layer in range(2)]
    channels = [channels_of(small, model, layer) for layer in range(2)]
    rows = activations(with_biases(zeroed(model, heads, channels), small), ids)
    for layer in range(2):
        own, new = model.model.layers[layer], small.model.layers[layer]
        columns = [c for c in range(HEADS * HEAD_DIM) if c // GROUP not in heads[layer]]
        unread = [c for c in range(MLP) if c not in channels[layer]]
        for name, full, found, gone in (
            ("mlp.down_proj", own.mlp.down_proj, new.mlp.down_proj, unread),
            ("self_attn.o_proj", own.self_attn.o_proj, new.self_attn.o_proj, columns),
        ):
            said = (rows[f"model.layers.{layer}.{name}"][:, gone] @ full.weight[:, gone].T).mean(0).detach()
            before = full.bias if biases else torch.zeros(HIDDEN)
            assert float(said.abs().max()) > 1e-3
            assert torch.allclose(found.bias, before + said, atol=1e-5, rtol=0), name
        for name in ("gate_proj", "up_proj") if not biases else ():
            assert not getattr(new.mlp, name).bias.any()


@pytest.mark.parametrize(("units", "keep"), [(9, 4), (3, 2), (9, 9)])
def test_obs_refits_by_least_squares_and_goes_by_the_least_error(peers: ModuleType, units: int, keep: int) -> None:
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(50, 9, generator=draw, dtype=torch.float64) @ torch.randn(9, 9, generator=draw).double()
    weight = torch.randn(5, 9, generator=draw, dtype=torch.float64)
    choice = peers.obs(weight, rows, units, keep, ridge=1e-12)
    stays, width = choice.kept.repeat_interleave(9 // units), 9 // units
    assert int(choice.kept.sum()) == keep
    assert not choice.weight[:, ~stays].any()
    best = torch.linalg.lstsq(rows[:, stays], rows @ weight.T).solution.T
    assert torch.allclose(choice.weight[:, stays], best, atol=1e-7, rtol=0)
    left = list(range(units))
    while len(left) > keep:  # one after the other, each time the one without which least squares lose the least
        errors = {}
        for unit in left:
            columns = [other * width + i for other in left if other != unit for i in range(width)]
            fit = torch.linalg.lstsq(rows[:, columns], rows @ weight.T).solution
            errors[unit] = float((rows[:, columns] @ fit - rows @ weight.T).square().sum())
        left.remove(min(errors, key=errors.__getitem__))
    assert choice.kept.nonzero().flatten().tolist() == left


def test_obs_with_a_ridge_changes_the_columns_left_by_what_the_ridge_allows(peers: ModuleType) -> None:
    draw = torch.Generator().manual_seed(4)
    rows, weight = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((40, 7), (5, 7)))
    choice = peers.obs(weight, rows, 7, 3, ridge=0.5)
    damping = 0.5 * rows.square().sum(0).mean()
    stays = choice.kept
    change = weight[:, ~stays] @ rows[:, ~stays].T @ rows[:, stays]
    change = change @ torch.linalg.inv(rows[:, stays].T @ rows[:, stays] + damping * torch.eye(3, dtype=torch.float64))
    assert torch.allclose(choice.weight[:, stays], weight[:, stays] + change, atol=1e-10, rtol=0)


def test_obs_lowers_the_error_that_a_plain_cut_leaves(peers: ModuleType) -> None:
    model, ids = tiny_llama(), examples(8)
    small = peers.cut("OBS", model, SIZES, ids, no_curves)
    kept = channels_of(small, model, 0)
    gone = [channel for channel in range(MLP) if channel not in kept]
    mixed = copy.deepcopy(model)
    mixed.model.layers[0].self_attn.load_state_dict(
        zeroed_attention(model, small, heads_of(small, model, 0)).state_dict()
    )
    rows = activations(mixed, ids)["model.layers.0.mlp.down_proj"]
    full = model.model.layers[0].mlp.down_proj.weight
    plain = (rows[:, gone] @ full[:, gone].T).square().sum()
    healed = (rows @ full.T - rows[:, kept] @ small.model.layers[0].mlp.down_proj.weight.T).square().sum()
    assert float(healed) < 0.9 * float(plain)


def zeroed_attention(model: LlamaForCausalLM, small: LlamaForCausalLM, heads: list[int]) -> torch.nn.Module:
    """Return the first layer's attention with the refitted columns of the heads that stay, and none of the others."""
    attention = copy.deepcopy(model.model.layers[0].self_attn)
    stays = [c for c in range(HEADS * HEAD_DIM) if c // GROUP in heads]
    with torch.no_grad():
        attention.o_proj.weight.zero_()
        attention.o_proj.weight[:, stays] = small.model.layers[0].self_attn.o_proj.weight
    return attention


def test_shortgpt_drops_the_layers_that_turn_their_input_least(peers: ModuleType) -> None:
    model, ids = tiny_llama(num_hidden_layers=5), examples()
    with torch.no_grad():
        for layer, size in zip(model.model.layers, (1.0, 0.02, 0.9, 0.01, 0.05), strict=True):
            layer.self_attn.o_proj.weight.mul_(size)
            layer.mlp.down_proj.weight.mul_(size)
            layer.self_attn.o_proj.bias.mul_(size)
            layer.mlp.down_proj.bias.mul_(size)
        states: list[torch.Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in model.model.layers
        ]
        handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
        model(ids)
        for handle in handles:
            handle.remove()
    influence = [1 - float(F.cosine_similarity(one, other, dim=-1).mean()) for one, other in itertools.pairwise(states)]
    assert torch.allclose(peers.block_influence(model, ids), torch.tensor(influence), atol=1e-6, rtol=0)
    kept = sorted(sorted(range(5), key=lambda index: -influence[index])[:3])
    assert kept != [0, 1, 2]
    of_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    for off in (-0.4, 0.4):
        small = peers.drop_layers(model, round(model.num_parameters() - (2 + off) * of_layer), ids)
        assert small.num_parameters() == model.num_parameters() - 2 * of_layer
        for new, old in zip(small.model.layers, kept, strict=True):
            expected = model.model.layers[old].state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in new.state_dict().items())
    assert torch.equal(small.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_every_peer_is_a_stock_model_of_the_sizes_asked_for(peers: ModuleType, tied: bool, tmp_path: Path) -> None:
    model, ids = tiny_llama(tie_word_embeddings=tied, num_hidden_layers=3), examples()
    wanted = peers.parameters_of(model, SIZES)
    for peer in peers.PEERS:
        small = peers.cut(peer, model, SIZES, ids, no_curves)
        small.save_pretrained(tmp_path / peer)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / peer)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, small(ids).logits)
        if peer == "ShortGPT":
            assert small.config.num_hidden_layers == 2
        else:
            assert {name: small.config.to_dict()[name] for name in SIZES} == SIZES
            assert small.num_parameters() == wanted


def test_where_the_hidden_state_is_cut_the_peers_have_as_many_parameters_without_it(peers: ModuleType) -> None:
    model, ids = tiny_llama(intermediate_size=176, num_hidden_layers=3), examples()
    narrow = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 120, "hidden_size": 48}
    measured = []

    def curves(given: LlamaForCausalLM, groups: object) -> LossCurves:
        measured.append(set(groups.structures))  # type: ignore[attr-defined]
        return LossCurves(
            {"attention_heads": (1 / 3, 2 / 3), "mlp_channels": (0.5, 0.75)},
            {"attention_heads": (5.0, 9.0), "mlp_channels": (0.1, 0.2)},
        )

    small = peers.cut("Wanda-sp", model, narrow, ids, curves)
    assert measured == [{"attention_heads", "mlp_channels"}]
    assert small.config.hidden_size == HIDDEN
    assert small.config.num_key_value_heads == 3  # heads are dear by the curves
    wanted = peers.parameters_of(model, narrow)
    assert abs(small.num_parameters() - wanted) < 0.01 * model.num_parameters()
    assert peers.cut("scratch", model, narrow, ids, curves).num_parameters() == wanted


def test_what_the_peers_cannot_cut_is_refused(peers: ModuleType) -> None:
    with pytest.raises(HessoError, match=r"`model` \(Gemma2ForCausalLM\)"):
        peers.cut("OBS", tiny_gemma2(), SIZES, examples(), no_curves)
    with pytest.raises(HessoError, match=r"`sizes`.*whole key-value heads"):
        peers.cut("OBS", tiny_llama(), SIZES | {"num_attention_heads": 2}, examples(), no_curves)
    with pytest.raises(HessoError, match="`sizes`"):
        peers.cut("OBS", tiny_llama(), SIZES | {"head_dim": 4}, examples(), no_curves)
