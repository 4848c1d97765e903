"""How fast a pruned model reads and writes, against the dense one: does it get as much faster as it gets smaller?

    python benchmarks/speed.py [--model smollm2-135m|llama-1b] [--ratios 0.3 0.5] [--dtype float32] [--threads 2]

Sizes are those that the budget's solver takes with an even split: with its own rounding, with `round_to=1`, and with a
budget of latency. Weights are random, since speed doesn't depend on them. `budgeted` is tokens per second of the
forward pass that such a budget is timed on, `forward` of one sequence as long as the prompt, `first_token` seconds
until a prompt's first token is there, `written` the tokens per second that `generate` writes after it, by batch size.
All models take turns, and `ratios` are against the dense model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hesso_hf import HessoConfig
from hesso_hf.budget.forward_time import ForwardTimes
from hesso_hf.cli.speed import first_token_seconds, tokens_per_second, tokens_written_per_second
from hesso_hf.export.report import versions
from hesso_hf.hf_models.resize import resized_config
from hesso_hf.pruning.calibration import LossCurves
from hesso_hf.pruning.plan import PruningPlan

RESULTS = Path(__file__).parent / "results" / "speed.json"
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 256, "tie_word_embeddings": True,
    },
}  # fmt: skip
# How sizes are chosen, by what a table calls it.
CHOICES: dict[str, dict[str, Any]] = {
    "": {},
    ", any size": {"round_to": 1},
    ", of the time": {"budget_metric": "latency"},
}


def build(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the dense model, with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(device=device, dtype=dtype).eval()


def smaller(dense: PreTrainedModel, config: HessoConfig) -> PreTrainedModel:
    """Return a model of the sizes that a budget comes to, with random weights."""
    plan = PruningPlan.prepare(dense, config)
    plan.settle(lambda: LossCurves({}, {}))
    small = type(dense)(resized_config(dense.config, plan.target.sizes))
    return small.to(device=dense.device, dtype=dense.dtype).eval()


def as_budgeted(models: list[PreTrainedModel], repeats: int) -> list[float]:
    """Return each model's tokens per second in the pass that a budget of latency is timed on."""
    dense, tokens = models[0], HessoConfig(0.5).latency_tokens
    clock = ForwardTimes(type(dense), dense.config, dense.device, dense.dtype, tokens)
    turns = [[clock.seconds(model) for model in models] for _ in range(repeats + 1)]
    return [tokens / median(seconds) for seconds in zip(*turns[1:], strict=True)]


def measure(models: dict[str, PreTrainedModel], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return by model what was measured, all models in turns."""
    everyone, how, cache = list(models.values()), options.repeats, options.cache
    found: dict[str, list[float]] = {
        "budgeted": as_budgeted(everyone, 3 * how),
        "forward": tokens_per_second(everyone, 1, options.prompt, how),
        "first_token": first_token_seconds(everyone, options.prompt, how, cache),
    }
    for batch in options.batches:
        found[f"written, batch {batch}"] = tokens_written_per_second(
            everyone, batch, options.written_prompt, options.new_tokens, how, cache
        )
    rows = {}
    for index, (name, model) in enumerate(models.items()):
        values = {key: of[index] for key, of in found.items()}
        against = {key: of[index] / of[0] if key != "first_token" else of[0] / of[index] for key, of in found.items()}
        config = model.config
        rows[name] = {
            "parameters": model.num_parameters(), "bytes": model.get_memory_footprint(),
            "sizes": {key: getattr(config, key) for key in ("hidden_size", "intermediate_size", "num_attention_heads",
                                                            "num_key_value_heads")},
            "measured": {key: float(f"{value:.4g}") for key, value in values.items()},
            "ratios": {
                "parameters": round(everyone[0].num_parameters() / model.num_parameters(), 3),
                **{key: round(value, 3) for key, value in against.items()},
            },
        }  # fmt: skip
        print(name, json.dumps(rows[name]["ratios"]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the forward pass and of the prompt")
    parser.add_argument("--written-prompt", type=int, default=32, help="tokens before those that are written")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cache", choices=["static"], help="as `generate` takes it; default: one that grows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    dense = build(MODELS[options.model], device, dtype)
    models = {"dense": dense}
    for ratio in options.ratios:
        for name, choice in CHOICES.items():
            models[f"{ratio:.0%} removed{name}"] = smaller(dense, HessoConfig(ratio, **choice))
    found = {
        "model": options.model, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": options.threads, "dtype": options.dtype, "budgeted": HessoConfig(0.5).latency_tokens,
        "prompt": options.prompt,
        "written_prompt": options.written_prompt, "new_tokens": options.new_tokens, "cache": options.cache,
        "repeats": options.repeats,
        "versions": versions(), "models": measure(models, options),
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
