"""Train a Llama of 1.2M parameters from nothing, whose output matrix is its own: the basis of its stream turns freely.

    python benchmarks/pretrain_small.py FOLDER [--data ../shared]

It learns stories and plays, so that `quality.py --model small`, which trains it on stories, sees what it forgets of the
plays. Takes some twenty minutes of one core; held-out losses are in `quality.py`'s result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import transformers
from datasets import concatenate_datasets
from pretrain_bundled import END_OF_TEXT, train_tokenizer
from replay import shakespeare
from stories import BLOCK, load_blocks
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

STEPS, BATCH, LEARNING_RATE = 1000, 16, 3e-3


def pretrain(folder: Path, data: Path, steps: int = STEPS) -> None:
    """Write model and tokenizer to a folder.

    Args:
        data: that has `data/tinystories` and `data/tinyshakespeare.txt`.
    """
    stories, plays = data / "data" / "tinystories" / "train.jsonl", data / "data" / "tinyshakespeare.txt"
    told = [json.loads(line)["text"] for line in stories.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer([*told, plays.read_text(encoding="utf-8")])
    tokenizer.bos_token = END_OF_TEXT
    train = concatenate_datasets([load_blocks(stories, tokenizer), shakespeare(plays, tokenizer)[0]]).shuffle(seed=0)
    transformers.set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=2 * BLOCK, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine", warmup_steps=steps // 30, weight_decay=0.1, seed=0, logging_steps=100,
            save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model=model, args=args, train_dataset=train).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="that has data/")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    pretrain(options.folder, options.data, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
