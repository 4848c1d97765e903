"""Tiny models with LoRA adapters whose B isn't zero, shared by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hesso_hf import HessoTrainer
from tests.support.tiny import tiny_llama
from tests.support.training import trainer

RANK = 5
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_config(**changes: Any) -> LoraConfig:
    """LoRA on queries, values and the MLP's output."""
    options: dict[str, Any] = {"r": RANK, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return LoraConfig(**(options | changes))


def tiny_lora(model: PreTrainedModel | None = None, seed: int = 2, **changes: Any) -> PeftModel:
    """Wrap a tiny model, a Llama by default, and draw all factors at random."""
    torch.manual_seed(seed)
    tuned = get_peft_model(model or tiny_llama(), lora_config(**changes))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0.0, 0.1)
    return tuned


def lora_run(folder: Path, model: PreTrainedModel | None = None, lora: Any = None, **changes: Any) -> HessoTrainer:
    """Build the tests' trainer over a tiny model with adapters."""
    return trainer(folder, tiny_lora(model, **(lora or {})), **changes)  # type: ignore[arg-type]
