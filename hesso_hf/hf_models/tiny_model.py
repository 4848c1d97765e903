"""Tiny random models: weights that hide no mistake, token ids, and logits in fp32."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from ..compat import attention_of, set_attention, supports_sdpa
from .sizes import VOCAB, get_size, raw_value

SEED = 20240915


SHAPE = (2, 12)


def random_model(model_class: type[PreTrainedModel], config: PretrainedConfig, seed: int = SEED) -> PreTrainedModel:
    """Build a model with random weights, biases and norm weights, in fp32 on the CPU; zeros would hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


@contextlib.contextmanager
def ieee_fp32() -> Iterator[None]:
    """For a while, take fp32 products in fp32 indeed, whatever TF32 or bf16 a run allows for its speed.

    TF32 moves logits by ten times what a comparison allows. The settings that name a kind of product overrule the
    general ones and are changed only where they do, so that all are as before afterwards.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    settings = [backends, cudnn]  # the general ones come first
    settings += [backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    before: list[tuple[Any, str]] = []
    try:
        for setting in settings:
            if setting.fp32_precision != "ieee":
                before.append((setting, setting.fp32_precision))
                setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in reversed(before):
            setting.fp32_precision = value


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the fp32 logits of a forward pass without a cache, in the weights' own dtype."""
    return forward_logits(model, input_ids)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def forward_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the fp32 logits of a forward pass without a cache, with a gradient where one is wanted.

    Models without an output matrix give their last hidden states; an encoder-decoder reads the ids on both sides. The
    class' forward is called, since mixed-precision training wraps the instance's in autocast.
    """
    if len(input_ids) > 1 and reads_single_rows(model):
        return torch.cat([forward_logits(model, row) for row in input_ids.split(1)])
    inputs = inputs_of(model, input_ids)
    with attention_in_fp32(model), ieee_fp32():
        # FSDP2 gathers in hooks on the call; Accelerate replaces `forward` on the instance, with autocast around it
        output = model(**inputs) if isinstance(model, FSDPModule) else type(model).forward(model, **inputs)
    found = output.get("logits")
    return (found if found is not None else output["last_hidden_state"]).float()


def reads_single_rows(model: PreTrainedModel) -> bool:
    """Whether a model refuses several rows, whose ends it can't tell: a classifier without a padding token."""
    pad = raw_value(model.config.get_text_config(), "pad_token_id")
    return pad is None and type(model).__name__.endswith("ForSequenceClassification")


def inputs_of(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, Any]:
    """Return what a forward pass without a cache takes: an encoder-decoder reads the ids on both sides."""
    inputs: dict[str, Any] = {"input_ids": input_ids, **without_cache(model)}
    if model.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(type(model).forward).parameters:
        inputs["decoder_input_ids"] = input_ids
    return inputs


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return what tells a model's forward not to fill a cache, nothing where it has none."""
    accepted = inspect.signature(type(model).forward).parameters
    takes = "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return {"use_cache": False} if takes else {}


@contextlib.contextmanager
def attention_in_fp32(model: nn.Module) -> Iterator[None]:
    """For a while, let a model compute attention where its flash attention can't: in fp32, and on the CPU."""
    configs: dict[int, PretrainedConfig] = {}  # a model in it comes after those that it is in
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and is_flash_attention_requested(config):
            configs[id(config)] = config
    before = {key: attention_of(config) for key, config in configs.items()}
    first = next(model.parameters())
    unfit = first.dtype == torch.float32 or first.device.type == "cpu"
    with_sdpa = all(supports_sdpa(m) for m in model.modules() if isinstance(m, PreTrainedModel))
    try:
        for config in configs.values() if unfit else ():
            set_attention(config, "sdpa" if with_sdpa else "eager")
        yield
    finally:
        for key, name in before.items():
            set_attention(configs[key], name)


def token_ids(config: PretrainedConfig, rows: int = SHAPE[0]) -> torch.Tensor:
    """Return random token ids, shape (rows, 12), none of them a special one."""
    vocab = get_size(config, VOCAB)
    assert vocab is not None
    return torch.randint(3, vocab, (rows, SHAPE[1]), generator=torch.Generator().manual_seed(SEED))
