"""Norms: what a vector does is found by trying its module, and which norms follow a writer by running the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hesso_hf.hf_models.build import model_class_of
from hesso_hf.hf_models.tiny_configs import tiny_config
from hesso_hf.hf_models.tiny_model import random_model, token_ids
from hesso_hf.structures.proof.norms import OTHER, VectorRole, has_bare_layernorm, norms_after_writers, vector_role
from hesso_hf.structures.shape_probe import ParameterInfo, describe_parameters
from tests.support.families import ALL

SIZE = 12


class NormWithOffset(nn.Module):
    """RMS norm with w + b, the bias added after the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(SIZE)), nn.Parameter(torch.randn(SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * self.weight + self.bias


class NeedsTwo(nn.Module):
    """A gated norm, which takes more than hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x * gate * self.weight


class Fixed(nn.Module):
    """A vector that is neither a scale nor an offset of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 2.0 * self.weight


class Counts(Fixed):
    """Gives something else than hidden states."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).sum(-1)


def role_of(module: nn.Module, leaf: str = "weight") -> VectorRole:
    with torch.no_grad():
        module.get_parameter(leaf).add_(0.3 * torch.randn(SIZE))
    holder = nn.ModuleDict({"norm": module})
    info = describe_parameters(holder)[f"norm.{leaf}"]
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    role = vector_role(info, module)
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    return role


@pytest.mark.parametrize(
    ("module", "leaf", "expected"),
    [
        (LlamaRMSNorm(SIZE), "weight", VectorRole("scale")),
        (GemmaRMSNorm(SIZE), "weight", VectorRole("scale", shift=1.0)),
        (nn.RMSNorm(SIZE), "weight", VectorRole("scale")),
        (nn.LayerNorm(SIZE), "weight", VectorRole("scale", subtracts_mean=True)),
        (nn.LayerNorm(SIZE), "bias", VectorRole("offset", subtracts_mean=True)),
        (nn.LayerNorm(SIZE).bfloat16(), "weight", VectorRole("scale", subtracts_mean=True)),
        (NormWithOffset(), "weight", VectorRole("scale")),
        (NormWithOffset(), "bias", VectorRole("offset")),
        (NeedsTwo(), "weight", OTHER),
        (Fixed(), "weight", OTHER),
        (Counts(), "weight", OTHER),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_a_vector_does_is_found_by_trying(module: nn.Module, leaf: str, expected: VectorRole):
    assert role_of(module, leaf) == expected


def test_a_bias_of_a_matrix_is_not_tried():
    info = ParameterInfo("out.bias", (SIZE,), "bias", "out", "", "out.bias")
    assert vector_role(info, nn.Linear(3, SIZE)) == OTHER


def tiny_of(name: str):
    config = ALL[name].config()
    tiny = tiny_config(model_class_of(config), config)
    return random_model(model_class_of(tiny), tiny)


@pytest.mark.parametrize(("name", "bare"), [("olmo", True), ("llama", False), ("phi", False), ("olmo2", False)])
def test_a_norm_without_weights_that_subtracts_the_mean_is_found(name: str, bare: bool):
    model = tiny_of(name)
    assert has_bare_layernorm(model, model.config.hidden_size) is bare


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", set()),
        ("phi", set()),
        ("gemma2", {"post_attention_layernorm", "post_feedforward_layernorm"}),
        ("olmo2", {"post_attention_layernorm", "post_feedforward_layernorm"}),
        ("glm4", {"post_self_attn_layernorm", "post_mlp_layernorm"}),
    ],
)
def test_norms_of_what_a_block_writes_are_told_from_those_of_the_stream(name: str, expected: set[str]):
    model = tiny_of(name)
    names = ("self_attn.o_proj", "self_attn.dense", "mlp.down_proj", "mlp.fc2")
    writers = {module for module, _ in model.named_modules() if module.endswith(names)}
    assert writers
    after = norms_after_writers(model, token_ids(model.config), writers)
    assert {module.rpartition(".")[2] for module in after if "norm" in module} == expected
    assert all(not module._forward_hooks for module in model.modules())
