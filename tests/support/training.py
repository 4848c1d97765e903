"""Short runs of the real trainer on tiny models, shared by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainingArguments

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.hf_models.tiny_model import logits_of
from tests.support.tiny import VOCAB, tiny_llama

LENGTH = 10


def blocks(count: int = 64, seed: int = 3) -> Dataset:
    """Random token blocks with columns `input_ids` and `labels`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, LENGTH), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def said_by_the_dense_model(model: PreTrainedModel | None = None) -> Dataset:
    """Blocks labelled with the untrained dense model's own predictions, on which nothing can beat it."""
    data = blocks(8, seed=5)
    ids = torch.tensor(data["input_ids"])
    said = logits_of(model or tiny_llama(), ids).argmax(-1)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": [[-100, *row[:-1]] for row in said.tolist()]})


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Quiet training arguments for a CPU."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 11,
    }
    return TrainingArguments(**(options | changes))


# The paper's method without what comes on top of it by default, as what is compared step by step needs it.
ALONE: dict[str, Any] = {
    "stream_basis": "given", "healing": "off", "replay_share": 0.0, "distillation_alpha": 0.0, "compact": "never",
}  # fmt: skip


def hesso_config(**changes: Any) -> HessoConfig:
    """Prune all three structures in two periods, steps 2 to 6 of 12, by HESSO alone."""
    options: dict[str, Any] = {
        **ALONE,
        "target_sizes": {"num_key_value_heads": 2, "intermediate_size": 28, "hidden_size": 48},
        "warmup_steps": 2,
        "pruning_steps": 5,
        "pruning_periods": 2,
        "saliency_batches": 2,
    }
    return HessoConfig(**(options | changes))


def trainer(
    folder: Path,
    model: PreTrainedModel | None = None,
    config: HessoConfig | None = None,
    trainer_class: type = HessoTrainer,
    data: Dataset | None = None,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> HessoTrainer:
    """Build a trainer over a tiny Llama."""
    return trainer_class(
        model=model or tiny_llama(),
        args=arguments(folder, **changes),
        train_dataset=data or blocks(),
        hesso_config=config or hesso_config(),
        **(options or {}),
    )


def logged(run: HessoTrainer, name: str) -> list[float]:
    """Return a metric at every logged step."""
    return [entry[name] for entry in run.state.log_history if name in entry]
