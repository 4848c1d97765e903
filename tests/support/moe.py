"""Tiny mixture-of-experts models of many classes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.families import SIZES, random_model

_LATENT = {
    "num_key_value_heads": 6, "q_lora_rank": 14, "kv_lora_rank": 18, "qk_rope_head_dim": 8, "qk_nope_head_dim": 10,
    "v_head_dim": 12, "moe_intermediate_size": 20, "first_k_dense_replace": 1, "num_hidden_layers": 3,
}  # fmt: skip
_GROUPED = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2}
# model type -> sizes: every model has a vocabulary of 97, 6 heads and 72 hidden channels
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28,
    },
    "qwen3_moe": {"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "deepseek_v2": _LATENT | _GROUPED | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT | _GROUPED,
    "glm4_moe": _GROUPED | {
        "head_dim": 12, "moe_intermediate_size": 20, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 12},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 20, "moe_layer_start_index": 0},
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 12},
}  # fmt: skip
KEPT = {"deepseek_v2": 9, "deepseek_v3": 9, "glm4_moe": 8, "qwen3_moe": 5}  # of others 4


def moe_model(name: str, seed: int = 5, **changes: Any) -> PreTrainedModel:
    """Build a random model of a family; its correction biases are random too, as training leaves them."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = tokens | SIZES | FAMILIES[name] | changes
    model = random_model(CONFIG_MAPPING[name](**sizes), seed)
    for buffer_name, buffer in model.named_buffers():
        if "correction" in buffer_name:
            buffer.normal_(0.0, 0.5)
    return model


def moe_tokens(length: int = 16) -> torch.Tensor:
    """Random token ids, shape (3, length)."""
    return torch.randint(3, SIZES["vocab_size"], (3, length), generator=torch.Generator().manual_seed(3))
