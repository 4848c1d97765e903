"""The flags of `prune` that most runs need, on one screen and without a framework; `--help-all` lists all."""

from __future__ import annotations

import shutil
import textwrap

# Where it belongs in a recipe, whose fields these are, and flag to meaning.
FLAGS: dict[str, tuple[str, dict[str, str]]] = {
    "model and data": (
        "",
        {
            "model": "folder or Hub id; bundled is the one in here",
            "dataset": "text, messages or prompts: a file or a Hub id",
            "eval_dataset": "held-out data (a twentieth of dataset)",
            "retained_dataset": "other text that the base model knew",
            "block_size": "tokens of an example (1024)",
            "max_examples": "use the first so many rows",
            "max_eval_examples": "held-out examples to evaluate on at most (1000)",
            "output": "of the smaller model (output_dir/small)",
            "peft": "fields of LoraConfig as JSON: train an adapter",
            "dry_run": "a few steps, and what the run would take",
        },
    ),
    "training": (
        "all fields of TrainingArguments",
        {
            "output_dir": "folder of checkpoints and logs",
            "max_steps": "or num_train_epochs (3)",
            "learning_rate": "peak of the schedule (5e-5)",
            "per_device_train_batch_size": "examples a process and forward pass (8)",
            "gradient_accumulation_steps": "forward passes an optimizer step (1)",
            "bf16": "compute in bfloat16",
            "save_steps": "optimizer steps between checkpoints (500)",
            "resume_from_checkpoint": "auto: go on from the last, if there is one",
            "push_to_hub": "publish what is saved",
        },
    ),
    "hesso": (
        "all fields of HessoConfig",
        {
            "pruning_ratio": "share of the parameters to remove",
            "budget_metric": "or of flops, memory, latency (parameters)",
            "structures": "what may go: attention_heads,mlp_channels (all)",
            "export_at": "smaller shares to save a model at too: 0.2,0.3",
            "target_sizes": 'or sizes to end with: {"hidden_size": 1536}',
            "round_to": "multiple that sizes keep to (128 or less)",
            "replay_share": "share of text that the base model wrote (auto)",
            "distillation_alpha": "weight of what a teacher says (auto)",
            "cric": "put the lowest units on trial first (auto)",
        },
    ),
}


def overview() -> str:
    """Return the help: usage, and section by section the flags that most runs need."""
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    lines = [
        "usage: hesso-hf prune [RECIPE] [--flag value ...]",
        "",
        "Flags override the recipe's keys; defaults are in parentheses.",
    ]
    for section, (fields, flags) in FLAGS.items():
        lines += ["", f"{section}: {fields}, among them" if fields else f"{section}:"]
        for name, meaning in flags.items():
            left = f"  --{name}"
            lines += textwrap.wrap(meaning, width, initial_indent=f"{left:<32}", subsequent_indent=" " * 32)
    lines += ["", "All flags with their defaults: hesso-hf prune --help-all"]
    return "\n".join(lines)
