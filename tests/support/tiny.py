"""Tiny models made from configs, with dimensions that all differ, and the pruning state over them."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from hesso_hf.budget.cost import build_cost
from hesso_hf.budget.solver import solve_budget
from hesso_hf.config import HessoConfig, structures_around
from hesso_hf.hf_models.tiny_model import random_model
from hesso_hf.pruning.process import PruningProcess
from hesso_hf.pruning.schedule import Schedule
from hesso_hf.pruning.token_rows import TokenRows
from hesso_hf.structures.groups import PruningGroups
from hesso_hf.structures.proof.prove import proved_groups
from hesso_hf.structures.shape_probe import AxisMap

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB = 6, 3, 8, 60, 44, 67
QUERIES = 12  # query heads of models in which single ones go: four a key-value head
UNITS = {"attention_heads": KV_HEADS, "mlp_channels": MLP, "embedding_channels": HIDDEN}
SIZE_OF = {
    "attention_heads": "num_key_value_heads",
    "mlp_channels": "intermediate_size",
    "embedding_channels": "hidden_size",
    "query_heads": "num_attention_heads",
}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(seed: int = 1, **changes: Any) -> LlamaForCausalLM:
    """Llama with grouped queries, biases everywhere and an untied output matrix."""
    options = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    return random_model(LlamaForCausalLM, LlamaConfig(**(_SIZES | options | changes)), seed)


def tiny_gemma2(seed: int = 1, **changes: Any) -> Gemma2ForCausalLM:
    """Gemma 2: norms stored as w and used as 1 + w, four of them a layer, tied embeddings."""
    return random_model(Gemma2ForCausalLM, Gemma2Config(**(_SIZES | {"query_pre_attn_scalar": 8} | changes)), seed)


def tiny_phi3(seed: int = 1, **changes: Any) -> Phi3ForCausalLM:
    """Phi-3: fused qkv (three segments) and fused gate_up (stride)."""
    return random_model(Phi3ForCausalLM, Phi3Config(**(_SIZES | changes)), seed)


def tiny_phi(seed: int = 1, **changes: Any) -> PhiForCausalLM:
    """Phi: layer norms with weights and biases, which subtract the stream's mean; an untied output matrix."""
    return random_model(PhiForCausalLM, PhiConfig(**(_SIZES | {"partial_rotary_factor": 0.5} | changes)), seed)


def tiny_olmo(seed: int = 1, **changes: Any) -> OlmoForCausalLM:
    """OLMo: layer norms without weights."""
    return random_model(OlmoForCausalLM, OlmoConfig(**(_SIZES | changes)), seed)


def tiny_gpt2(seed: int = 1, **changes: Any) -> GPT2LMHeadModel:
    """GPT-2: layer norms and a tied output matrix; heads and width only shrink together, 10 channels a head."""
    sizes = {"n_embd": HIDDEN, "n_head": HEADS, "n_inner": MLP, "n_layer": 2, "n_positions": 128, "vocab_size": VOCAB}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return random_model(GPT2LMHeadModel, GPT2Config(**(sizes | tokens | dropout | changes)), seed)


@functools.cache
def _proved(
    model_class: type[PreTrainedModel], config_json: str, names: tuple[str, ...]
) -> tuple[PruningGroups, AxisMap]:
    config = model_class.config_class.from_dict(json.loads(config_json))
    groups, _, axis_map = proved_groups(model_class, config, names)
    return groups, axis_map


def process_for(
    model: PreTrainedModel, kept_units: dict[str, int], schedule: Schedule, **config: Any
) -> PruningProcess:
    """Prove the structures named in `kept_units` and build the pruning state that keeps exactly so many a layer."""
    proved, axis_map = _proved(type(model), model.config.to_json_string(), structures_around(kept_units))
    sizes = {SIZE_OF[name]: kept for name, kept in kept_units.items()}
    if proved.coupled and "attention_heads" in kept_units:
        sizes["num_attention_heads"] = sizes.pop("num_key_value_heads")
    hesso_config = HessoConfig(structures=list(kept_units), target_sizes=sizes, **config)
    groups = proved.select(kept_units, explicit=True)
    cost = build_cost("parameters", groups, axis_map, model.config)
    target = solve_budget(hesso_config, model.config, groups, cost)
    return PruningProcess(dict(model.named_parameters()), groups, target, schedule, hesso_config)


def all_rows(rows: torch.Tensor) -> TokenRows:
    """What a matrix reads, where all tokens count, and all alike."""
    return TokenRows(rows, torch.arange(len(rows)))


def token_batches(count: int, seed: int = 7, shape: tuple[int, int] = (2, 9)) -> list[torch.Tensor]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, shape, generator=generator) for _ in range(count)]


def backward(model: PreTrainedModel, *batches: torch.Tensor) -> None:
    """Put the gradient of the mean loss over `batches` (accumulated one by one) into a clean `.grad`."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        (model(input_ids=batch, labels=batch).loss / len(batches)).backward()
