"""Compaction: the smaller model in the place of the one that trains, the same function, with its optimizer's state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer, RMSprop
from torch.optim import Adafactor as TorchAdafactor
from transformers import Adafactor, PreTrainedModel

from hesso_hf import HessoConfig, HessoOptimizer, export_pruned, wrap_optimizer
from hesso_hf.compat import attention_of, experts_of, forward_hooks
from hesso_hf.errors import CheckpointMismatchError, HessoError, VerificationError
from hesso_hf.export.export import cut_pruned
from hesso_hf.pruning.compaction import compact
from hesso_hf.pruning.phases import Phase, phase_of
from hesso_hf.structures.in_place import InPlace, set_data
from tests.support.moe import moe_model
from tests.support.tiny import (
    VOCAB,
    backward,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_phi,
    tiny_phi3,
    token_batches,
)

SIZES = {"num_key_value_heads": 2, "intermediate_size": 28, "hidden_size": 48}
NO_CHANNELS = {"num_key_value_heads": 2, "intermediate_size": 28}


def tied_llama(**changes: Any) -> PreTrainedModel:
    return tiny_llama(tie_word_embeddings=True, **changes)


# model, what is pruned to which sizes
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, int], list[str] | str]] = {
    "llama, tied": (tied_llama, SIZES, "all"),
    "gemma2": (tiny_gemma2, SIZES, "all"),
    "phi3": (tiny_phi3, SIZES, "all"),
    "phi": (tiny_phi, SIZES, "all"),
    "gpt2": (tiny_gpt2, {"num_attention_heads": 4, "intermediate_size": 28}, "all"),
    "qwen3_moe": (
        lambda: moe_model("qwen3_moe"),
        {"num_experts": 5, "moe_intermediate_size": 12, "hidden_size": 48},
        ["experts", "expert_channels", "embedding_channels"],
    ),
    "layers": (
        lambda: tiny_llama(num_hidden_layers=4),
        {"num_hidden_layers": 2, **NO_CHANNELS},
        ["layers", "attention_heads", "mlp_channels"],
    ),
}


def pruned(
    model: PreTrainedModel,
    sizes: dict[str, int] = SIZES,
    structures: Any = "all",
    make: Callable[..., Optimizer] = AdamW,
    **options: Any,
) -> HessoOptimizer:
    """Train a model to the end of its last period."""
    config = HessoConfig(
        target_sizes=sizes, structures=structures, stream_basis="given", healing="off", replay_share=0.0,
        warmup_steps=1, pruning_steps=2, pruning_periods=1, saliency_batches=1,
    )  # fmt: skip
    optimizer = wrap_optimizer(make(model.parameters(), **({"lr": 1e-2} | options)), model, config, 12)
    train(model, optimizer, 3)
    return optimizer


def train(model: PreTrainedModel, optimizer: Optimizer, steps: int, seed: int = 7) -> None:
    for batch in token_batches(steps, seed):
        backward(model, batch)
        optimizer.step()
    model.zero_grad(set_to_none=True)


def loss_of(model: PreTrainedModel) -> float:
    (batch,) = token_batches(1, seed=99, shape=(4, 17))
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch).loss)


def fresh(model: PreTrainedModel) -> PreTrainedModel:
    """A stock model of the same config and weights."""
    stock = type(model)(copy.deepcopy(model.config)).eval()
    stock.load_state_dict(model.state_dict())
    return stock


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_cut_where_it_stands_and_computes_the_same(family: str) -> None:
    make, sizes, structures = FAMILIES[family]
    model = make()
    optimizer = pruned(model, sizes, structures)
    if family == "qwen3_moe":
        model.set_experts_implementation("eager")
    objects, before = {id(module) for module in model.modules()}, loss_of(model)
    parameters, dense = {id(p) for p in model.parameters()}, model.config
    written = dense.to_dict()
    found = compact(model, optimizer)
    assert abs(loss_of(model) - before) < 1e-5
    assert found.error < 1e-5
    assert model.num_parameters() == optimizer.process.target.parameters_after < found.parameters_before
    assert {id(module) for module in model.modules()} <= objects
    assert {id(parameter) for parameter in model.parameters()} <= parameters
    assert dense.to_dict() == written  # which other models may share
    for chosen in (experts_of, attention_of):
        assert chosen(model.config) == chosen(dense)
    assert not any(hooks for module in model.modules() for hooks in forward_hooks(module))  # no gates on routers
    # what the config says is what there is, down to the last attribute
    stock = fresh(model)
    ids = token_batches(1)[0]
    assert torch.equal(stock(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    assert torch.equal(stock.generate(ids, **options), model.generate(ids, **options))
    train(model, optimizer, 1)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in optimizer.state} == {id(parameter) for parameter in held}
    for parameter, state in optimizer.state.items():
        assert all(value.shape == parameter.shape for key, value in state.items() if key != "step")


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (AdamW, {}), (AdamW, {"fused": True}), (Adam, {"amsgrad": True}), (SGD, {"momentum": 0.9}),
        (RMSprop, {"momentum": 0.5, "centered": True}),
    ],
    ids=["AdamW", "fused AdamW", "amsgrad", "SGD", "RMSprop"],
)  # fmt: skip
def test_where_nothing_takes_a_factor_the_run_goes_on_as_the_masked_one(
    make: type[Optimizer], options: dict[str, Any]
) -> None:
    runs = []
    for cuts in (False, True):
        model = tiny_llama()
        optimizer = pruned(model, NO_CHANNELS, ["attention_heads", "mlp_channels"], make, lr=1e-3, **options)
        if cuts:
            compact(model, optimizer)
        train(model, optimizer, 5, seed=21)
        runs.append((model, optimizer))
    (masked, its), (model, _) = runs
    small = cut_pruned(masked, kept_units=its.process.kept_units(), groups=its.process.groups)
    for (name, ours), theirs in zip(model.named_parameters(), small.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5, name


@pytest.mark.parametrize("make", [tied_llama, tiny_gemma2], ids=["llama", "gemma2"])
def test_what_an_optimizer_keeps_is_scaled_as_the_gradient_is(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    optimizer = pruned(model)
    (batch,) = token_batches(1, seed=31)
    backward(model, batch)
    optimizer.process.observe_gradients()  # masks the pruned units'
    for parameter in model.parameters():
        state, gradient = optimizer.state[parameter], parameter.grad
        assert gradient is not None
        state["exp_avg"], state["exp_avg_sq"] = gradient.clone(), gradient.square()
    compact(model, optimizer)
    backward(model, batch)
    for name, parameter in model.named_parameters():
        state, gradient = optimizer.state[parameter], parameter.grad
        assert gradient is not None
        for value, expected in ((state["exp_avg"], gradient), (state["exp_avg_sq"], gradient.square())):
            assert (value - expected).abs().max() < 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize(
    ("make", "row", "col", "keepdim"),
    [(Adafactor, "exp_avg_sq_row", "exp_avg_sq_col", False), (TorchAdafactor, "row_var", "col_var", True)],
    ids=["transformers", "torch"],
)
def test_means_over_rows_and_columns_are_those_of_the_smaller_gradient(
    make: type[Optimizer], row: str, col: str, keepdim: bool
) -> None:
    model = tied_llama()
    options = {"scale_parameter": False, "relative_step": False} if make is Adafactor else {}
    optimizer = pruned(model, make=make, lr=1e-3, **options)
    (batch,) = token_batches(1, seed=31)
    backward(model, batch)
    optimizer.process.observe_gradients()
    for parameter in (each for each in model.parameters() if each.dim() == 2):
        assert parameter.grad is not None
        squares, state = parameter.grad.square(), optimizer.state[parameter]
        assert state[row].shape == squares.mean(-1, keepdim).shape
        state[row], state[col] = squares.mean(-1, keepdim), squares.mean(-2, keepdim)
    compact(model, optimizer)
    backward(model, batch)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.grad is not None
            state, squares = optimizer.state[parameter], parameter.grad.square()
            for value, expected in ((state[row], squares.mean(-1, keepdim)), (state[col], squares.mean(-2, keepdim))):
                assert (value - expected).abs().max() < 1e-5 * expected.abs().max(), name
    train(model, optimizer, 1, seed=21)


def test_momenta_that_are_made_orthogonal_are_cut_too() -> None:
    model = tiny_llama()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    optimizer = pruned(model, make=lambda *_, **options: Muon(matrices, **options))
    compact(model, optimizer)
    for parameter in matrices:
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    train(model, optimizer, 1, seed=21)


def test_nothing_is_left_to_do_once_the_units_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    optimizer = pruned(model)
    compact(model, optimizer)
    process = optimizer.process
    for name in ("mask_weights_", "mask_gradients_", "mask_state_", "centre_", "multiply_", "accumulate_"):
        monkeypatch.setattr(process.bound, name, lambda *_, **__: pytest.fail("a unit was touched"))
    train(model, optimizer, 2)
    assert type(phase_of(process.run)) is Phase
    assert process.bound.axes == process.bound.held == {}
    assert process.kept_units().num_units["mlp_channels"] == 44
    assert "cut at step 3" in str(process.state)


def test_hooks_patched_attributes_and_graphs_that_are_held_survive() -> None:
    model, calls = tiny_llama(), []
    optimizer = pruned(model)
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append("hook"))
    plain = model.forward
    model.forward = lambda *args, **kwargs: calls.append("patched") or plain(*args, **kwargs)
    model.gradient_checkpointing_enable()
    model.model.layers[0].self_attn.attention_dropout = 0.25  # by hand: no size says so
    model.config.use_cache, model.config.name_or_path = False, "someone/base"
    held = model(token_batches(1)[0]).logits.sum()
    model.train().model.layers[1].eval()
    compact(model, optimizer)
    calls.clear()
    assert [module.training for module in model.modules()] == [
        name.startswith("model.layers.1") is False for name, _ in model.named_modules()
    ]
    train(model, optimizer, 1)
    assert calls.count("hook") == 2  # once more in the recomputation
    assert calls.count("patched") == 1
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    assert (model.config.use_cache, model.config.name_or_path) == (False, "someone/base")
    assert held.grad_fn is not None


def test_the_dtype_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama().to(torch.bfloat16)
    optimizer = pruned(model)
    before = loss_of(model)
    compact(model, optimizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert abs(loss_of(model) - before) < 0.02  # the factors are rounded
    train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("family", "spoilt"),
    [
        ("gpt2", "hesso_hf.structures.in_place.InPlace._set_attributes"),  # its code raises then
        ("gemma2", "hesso_hf.structures.in_place.set_buffer"),
        ("layers", "hesso_hf.pruning.compaction.InPlace.put"),
    ],
)
def test_a_cut_that_computes_something_else_is_taken_back(
    family: str, spoilt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, *pruning = FAMILIES[family]
    model = make()
    optimizer = pruned(model, *pruning)
    twin, put = copy.deepcopy(model), InPlace.put

    def put_other(place: InPlace, small: PreTrainedModel, *decision: Any) -> None:
        small.get_output_embeddings().weight.data.mul_(1.01)
        put(place, small, *decision)

    with monkeypatch.context() as patch:
        patch.setattr(spoilt, put_other if family == "layers" else lambda *_: None)
        with pytest.raises(VerificationError, match=r"isn't the same when it is cut in memory|can't compute"):
            compact(model, optimizer)
    assert model.config is not None
    assert model.config.to_dict() == twin.config.to_dict()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in twin.named_modules()]
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    ids = token_batches(1)[0]
    assert torch.equal(model(ids).logits, twin(ids).logits)
    train(model, optimizer, 1)  # goes on masked
    assert cut_pruned(model, kept_units=optimizer.process.kept_units(), groups=optimizer.process.groups)
    compact(model, optimizer)


def test_sizes_that_kernels_cannot_compute_are_named_and_nothing_changes() -> None:
    """Rows of fused experts are whole 16 bytes, four numbers in fp32."""
    model = moe_model("qwen3_moe")
    optimizer = pruned(model, {"moe_intermediate_size": 10}, ["expert_channels"])
    before = loss_of(model)
    with pytest.raises(VerificationError, match="the smaller model can't compute with its sizes: strides should be"):
        compact(model, optimizer)
    assert loss_of(model) == before


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    model = tiny_llama()

    class Own(SGD):
        pass

    optimizer = pruned(model, NO_CHANNELS, ["attention_heads", "mlp_channels"], Own)
    with pytest.raises(HessoError, match=r"the state of .*Own can't be cut \(Adam, AdamW, SGD"):
        compact(model, optimizer)
    optimizer.base.__class__ = SGD
    compact(model, optimizer)
    with pytest.raises(HessoError, match="the model was cut already"):
        compact(model, optimizer)
    model = tiny_llama()
    config = HessoConfig(
        target_sizes=NO_CHANNELS, structures=["attention_heads", "mlp_channels"], healing="off", saliency_batches=1,
        warmup_steps=1, pruning_steps=2, pruning_periods=1,
    )  # fmt: skip
    early = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, config, 12)
    with pytest.raises(HessoError, match="is at step 0, pruning ends at 3: cut the model when pruning has finished"):
        compact(model, early)
    with pytest.raises(CheckpointMismatchError, match="cut out of the model in only one"):
        early.load_state_dict(optimizer.state_dict())


def test_an_export_after_the_cut_says_what_was_removed_of_the_full_model(tmp_path: Path) -> None:
    model = tiny_llama()
    before, structures = model.num_parameters(), ["attention_heads", "mlp_channels"]
    optimizer = pruned(model, NO_CHANNELS, structures)
    expected, target = optimizer.process.kept_units(), optimizer.process.target
    compact(model, optimizer)
    del optimizer
    report = export_pruned(model, tmp_path)
    assert (report.parameters_before, report.parameters_after) == (before, target.parameters_after)
    assert report.pruning_ratio == pytest.approx(target.ratio)
    assert report.kept_units == expected
    assert {name: report.sizes_after[name] for name in NO_CHANNELS} == NO_CHANNELS
    wrap_optimizer(SGD(model.parameters()), model, HessoConfig(0.1, structures=structures), 12)  # pruned once more
    assert export_pruned(model, tmp_path).parameters_before == target.parameters_after


def test_a_parameter_takes_values_of_another_shape_while_a_graph_knows_the_old_one() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    held = (torch.ones(2, 3) @ parameter.T).sum()
    set_data(parameter, parameter.data[:2].clone())
    (torch.ones(2, 3) @ parameter.T).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.shape == (2, 3)
    assert held.requires_grad


def test_the_vocabulary_is_as_it_was() -> None:
    model = tied_llama()
    compact(model, pruned(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == VOCAB
