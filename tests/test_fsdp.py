"""HessoTrainer under Accelerate's FSDP2, with real processes: same units, small model from shards, resume, kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp_cpu
import torch
from training import hesso_config, trainer
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, HessoTrainer

RATIO = {"pruning_ratio": 0.3, "warmup_steps": 4, "pruning_steps": 9, "pruning_periods": 3}


def build(folder: str, steps: int, processes: int, hesso: dict[str, Any] | None = None, **changes: Any) -> HessoTrainer:
    """Build a trainer on a global batch of 4."""
    config = HessoConfig(**hesso) if hesso else hesso_config()
    options = {"adam_epsilon": 1e-4, "learning_rate": 2e-3, "max_grad_norm": 0.5}
    return trainer(
        Path(folder) / "out", config=config, max_steps=steps, per_device_train_batch_size=4 // processes,
        **(options | changes),
    )  # fmt: skip


def job(folder: str, steps: int, processes: int, resume: bool = False, **options: Any) -> None:
    """Train, save the small model, and leave weights and decisions of every process."""
    run = build(folder, steps, processes, **options)
    run.train(resume_from_checkpoint=resume or None)
    run.save_model(str(Path(folder) / "small"))
    weights = {n: p.detach() for n, p in run.accelerator.unwrap_model(run.model).named_parameters()}
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}
    torch.save(
        {
            "kept": run.hesso_optimizer.process.kept_units().to_dict(),
            "weights": whole,
            "kind": type(run.model).__name__,
            "target": run.hesso_plan.target.to_dict(),
        },
        Path(folder) / f"rank{run.args.process_index}.pt",
    )


def test_two_processes_under_fsdp_equal_one(tmp_path: Path) -> None:
    done = fsdp_cpu.run(tmp_path / "two", "test_fsdp", "job", steps=20, hesso=RATIO)
    assert done.returncode == 0, done.stderr[-4000:]
    (tmp_path / "one").mkdir()
    job(str(tmp_path / "one"), 20, 1, hesso=RATIO)
    alone = torch.load(tmp_path / "one" / "rank0.pt", weights_only=True)
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True)
        assert found["kind"] == "FSDPLlamaForCausalLM"
        assert found["target"] == alone["target"]
        assert found["kept"] == alone["kept"]
        for name, weight in alone["weights"].items():
            assert (found["weights"][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "small")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "small")
    ids = torch.arange(3, 33).view(2, 15)
    logits = expected(input_ids=ids).logits
    assert (small(input_ids=ids).logits - logits).abs().max() <= 1e-4 * logits.abs().max()
    assert sorted(p.name for p in (tmp_path / "two" / "small").iterdir()) == sorted(
        p.name for p in (tmp_path / "one" / "small").iterdir()
    )
