"""Prune 30% of a model while TRL fine-tunes it on prompts and completions.

    pip install 'hesso_hf[trl]'
    python recipes/trl/sft.py --model Qwen/Qwen3-0.6B --dataset data.jsonl --bf16 True --max_steps 3000

`data.jsonl` has a row `{"prompt": ..., "completion": ...}` for each example; `{"messages": [...]}` or `{"text": ...}`
will do. `--model bundled --use_cpu --bf16 False` tries it on a CPU.
Hardware: one GPU of 40 GB at this size, of which about 36 GB are taken. Tokens: 25 million at most, in 3,000 steps of
8 x 1,024. Hours: about 0.1 on an H100. Memory and hours are estimates of
    hesso-hf plan Qwen/Qwen3-0.6B --batch-size 8 --sequence-length 1024 --gradient-checkpointing --tokens 2.46e7
Not run at full size yet. Expected result: a stock model of 70% of the parameters in OUTPUT_DIR/small.
"""

from __future__ import annotations

from dataclasses import dataclass

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hesso_hf import HessoConfig, HessoMixin
from hesso_hf.bundled import bundled_model_path


class HessoSFT(HessoMixin, SFTTrainer):
    """TRL's trainer, and pruning."""


@dataclass
class Run:
    model: str = "bundled"
    dataset: str = "data.jsonl"
    pruning_ratio: float = 0.3


if __name__ == "__main__":
    run, args = HfArgumentParser([Run, SFTConfig]).parse_args_into_dataclasses()
    args.model_init_kwargs = {"dtype": "float32"}  # weights in fp32 and `bf16: true`, so that small updates count
    trainer = HessoSFT(
        model=str(bundled_model_path()) if run.model == "bundled" else run.model,
        args=args,
        train_dataset=load_dataset("json", data_files=run.dataset, split="train"),
        hesso_config=HessoConfig(pruning_ratio=run.pruning_ratio),
    )
    trainer.train()
    trainer.save_model(f"{args.output_dir}/small")
    trainer.accelerator.end_training()  # leaves the other processes; without it one may abort while it exits
