"""Prune 30% of a model while TRL aligns it with preferences (DPO); the reference stays whole.

    pip install 'hesso_hf[trl]'
    python recipes/trl/dpo.py --model Qwen/Qwen3-0.6B --dataset data.jsonl --bf16 True --max_steps 3000

`data.jsonl` has a row `{"prompt": ..., "chosen": ..., "rejected": ...}` for each pair.
`--model bundled --use_cpu --bf16 False` tries it on a CPU.
Hardware: one GPU of 80 GB at this size, of which about 63 GB are taken, and the reference's weights. Tokens: 49 million
at most, in 3,000 steps of 8 pairs x 1,024. Hours: about 0.2 on an H100, and the reference's passes on top. Memory and
hours are estimates of
    hesso-hf plan Qwen/Qwen3-0.6B --batch-size 16 --sequence-length 1024 --gradient-checkpointing --tokens 4.92e7
Not run at full size yet. Expected result: a stock model of 70% of the parameters in OUTPUT_DIR/small.
"""

from __future__ import annotations

from dataclasses import dataclass

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from hesso_hf import HessoConfig, HessoMixin
from hesso_hf.bundled import bundled_model_path


class HessoDPO(HessoMixin, DPOTrainer):
    """TRL's trainer, and pruning."""


@dataclass
class Run:
    model: str = "bundled"
    dataset: str = "data.jsonl"
    pruning_ratio: float = 0.3


if __name__ == "__main__":
    run, args = HfArgumentParser([Run, DPOConfig]).parse_args_into_dataclasses()
    args.model_init_kwargs = {"dtype": "float32"}  # weights in fp32 and `bf16: true`, so that small updates count
    trainer = HessoDPO(
        model=str(bundled_model_path()) if run.model == "bundled" else run.model,
        args=args,
        train_dataset=load_dataset("json", data_files=run.dataset, split="train"),
        hesso_config=HessoConfig(pruning_ratio=run.pruning_ratio),
    )
    trainer.train()
    trainer.save_model(f"{args.output_dir}/small")
    trainer.accelerator.end_training()  # leaves the other processes; without it one may abort while it exits
