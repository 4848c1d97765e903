"""Optimizers that keep their state in few bits: it is cut as the parameter is, and stays in few bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from hesso_hf import HessoOptimizer
from hesso_hf.errors import HessoError
from hesso_hf.pruning.compaction import compact
from hesso_hf.pruning.optimizer_state import cut_values, factor_of, numbers_of, state_powers
from hesso_hf.structures.cut import cuts_by_tensor
from tests.pruning.test_compaction import pruned, train
from tests.support.few_bits import BLOCK, Codes, in_codes, in_numbers
from tests.support.tiny import tiny_llama

# An MLP's matrices, (128, 64) and (112, 48) when they are cut, are large enough for few bits, and whole blocks.
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
SIZES = {"hidden_size": 48, "intermediate_size": 112}
LARGE = 4096


class StandIn(Optimizer):
    """Adam's moments in few bits where a parameter is large."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def _new_buffer(self, parameter: torch.Tensor, signed: bool) -> torch.Tensor:
        few = parameter.numel() >= LARGE and parameter.numel() % BLOCK == 0
        return Codes(torch.zeros_like(parameter)) if few else torch.zeros_like(parameter)

    def begin(self, parameter: torch.Tensor) -> dict[str, Any]:
        return {"exp_avg": self._new_buffer(parameter, True), "exp_avg_sq": self._new_buffer(parameter, False)}

    def keep(self, state: dict[str, Any], key: str, values: torch.Tensor) -> None:
        state[key].copy_(values)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.update({} if state else self.begin(parameter))
                first, second = list(state_powers(self))[:2]
                mean, square = (numbers_of(state, key) for key in (first, second))
                self.keep(state, first, mean := 0.9 * mean + 0.1 * parameter.grad)
                self.keep(state, second, square := 0.9 * square + 0.1 * parameter.grad.square())
                parameter.sub_(mean / (square.sqrt() + 1e-3), alpha=group["lr"])


class AdamW8bit(StandIn):
    """As torchao has it: such tensors."""


AdamW8bit.__module__ = "torchao.optim.adam"


class Blocks(StandIn):
    """As bitsandbytes has it: codes, and beside them scales and what the codes stand for."""

    optimizer_name, is_paged = "adam", False

    def begin(self, parameter: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for number in (1, 2):
            zeros = torch.zeros_like(parameter)
            state[f"state{number}"] = zeros
            if parameter.numel() >= LARGE:
                state[f"state{number}"], state[f"absmax{number}"] = in_codes(zeros)
                state[f"qmap{number}"] = torch.arange(256.0)
        return state

    def keep(self, state: dict[str, Any], key: str, values: torch.Tensor) -> None:
        number = key[-1]
        if f"qmap{number}" in state:
            state[key], state[f"absmax{number}"] = in_codes(values)
        else:
            state[key] = values


Blocks.__module__ = "bitsandbytes.optim.adamw"


def functions_of_bitsandbytes() -> ModuleType:
    def quantize_blockwise(values: torch.Tensor, code: Any, blocksize: int, nested: bool) -> Any:
        assert (blocksize, nested, len(code)) == (BLOCK, False, 256)
        codes, scales = in_codes(values)
        return codes, SimpleNamespace(absmax=scales)

    def dequantize_blockwise(codes: torch.Tensor, absmax: torch.Tensor, code: Any, blocksize: int) -> Any:
        assert (blocksize, len(code)) == (BLOCK, 256)
        return in_numbers(codes, absmax)

    module = ModuleType("bitsandbytes.functional")
    module.__dict__.update(quantize_blockwise=quantize_blockwise, dequantize_blockwise=dequantize_blockwise)
    return module


def torchao_adamw(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Optimizer]:
    optim = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # a minute for each shape
    return getattr(optim, name)  # type: ignore[no-any-return]


def made(kind: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Optimizer]:
    if kind == "as torchao":
        return AdamW8bit
    if kind == "as bitsandbytes":
        monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functions_of_bitsandbytes())
        return Blocks
    if kind == "bitsandbytes":
        return pytest.importorskip("bitsandbytes").optim.AdamW8bit  # type: ignore[no-any-return]
    return torchao_adamw(kind, monkeypatch)


KINDS = [
    "as torchao", "as bitsandbytes",
    *(pytest.param(kind, marks=pytest.mark.engines) for kind in ("bitsandbytes", "AdamW8bit", "AdamW4bit", "AdamWFp8")),
]  # fmt: skip


def numbers(optimizer: HessoOptimizer) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    base = optimizer.base
    return {p: {key: numbers_of(base.state[p], key).clone() for key in state_powers(base) if key in base.state[p]}
            for group in base.param_groups for p in group["params"]}  # fmt: skip


def is_in_few_bits(values: Any) -> bool:
    return hasattr(values, "codes") or values.dtype == torch.uint8


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_cut_and_stays_in_few_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(**WIDE)
    optimizer = pruned(model, SIZES, make=made(kind, monkeypatch), lr=1e-3)
    base, process = optimizer.base, optimizer.process
    cuts = cuts_by_tensor(process.groups, process.kept_units())
    before = {name: numbers(optimizer)[parameter] for name, parameter in model.named_parameters()}
    compact(model, optimizer)
    few = set()
    for name, parameter in model.named_parameters():
        state, axes = base.state[parameter], cuts.get(name, ())
        for key, power in state_powers(base).items():
            if key in state:
                expected = cut_values(before[name][key], axes, parameter.dim()) / factor_of(axes) ** power
                found = numbers_of(state, key)
                assert found.shape == parameter.shape
                coarse = {"AdamW4bit": 0.2, "AdamWFp8": 0.05}.get(kind, 0.02)
                assert (found - expected).abs().max() <= coarse * expected.abs().max(), (name, key)
                few |= {name} if is_in_few_bits(state[key]) else set()
    assert {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"} <= few
    assert "model.norm.weight" not in few
    train(model, optimizer, 2)
    kept = [base.state[parameter][key] for parameter in model.parameters() for key in list(state_powers(base))[:2]]
    assert sum(map(is_in_few_bits, kept)) == 2 * len(few)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_what_is_paged_or_unknown_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(**WIDE)
    optimizer = pruned(model, SIZES, make=made("as bitsandbytes", monkeypatch), lr=1e-3)
    weights = [parameter.clone() for parameter in model.parameters()]
    base: Any = optimizer.base
    base.is_paged = True
    with pytest.raises(HessoError, match=r"the state of bitsandbytes\.optim\.adamw\.Blocks is paged"):
        compact(model, optimizer)
    base.is_paged, base.optimizer_name = False, "ademamix"  # two means in one tensor
    with pytest.raises(HessoError, match=r"Blocks can't be cut \(Adam, AdamW, .*and those of torchao and bitsandbytes"):
        compact(model, optimizer)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), weights, strict=True))
    base.optimizer_name = "adam"
    compact(model, optimizer)
