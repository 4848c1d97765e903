"""Is the split between structures that looks best before training the best one after it?

    python benchmarks/split.py [--data ../shared] [--steps 100] [--seeds 0]

stories260K is cut to half of its parameters in several ways: KV heads, channels of the stream and MLP channels. The
held-out loss (nats per token) is measured right after the cut, with what stays healed and without, and after training.
What HESSO itself chooses is among them, as `chosen`. Every run is kept in the result file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from stories import BATCH, BLOCK, Setting, arguments, load_setting
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "split.json"
SIZES = ("num_key_value_heads", "hidden_size", "intermediate_size")
SPLITS = ((4, 64, 36), (2, 64, 68), (1, 64, 84), (4, 56, 56), (2, 56, 88), (4, 48, 80), (2, 48, 120))
AT_ONCE = {"warmup_steps": 1, "pruning_steps": 1, "pruning_periods": 1}


def run(setting: Setting, seed: int, learning_rate: float, **choices: Any) -> tuple[float, dict[str, int]]:
    """Cut and train; return the held-out loss of the smaller model, and its sizes."""
    transformers.set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(setting, seed, folder)
        args.learning_rate = learning_rate
        config = HessoConfig(replay_share=0.0, **choices)
        trainer = HessoTrainer(model=model, args=args, train_dataset=setting.train, hesso_config=config)
        trainer.train()
        trainer.save_model(f"{folder}/small")
        small = AutoModelForCausalLM.from_pretrained(f"{folder}/small")
    sizes = trainer.hesso_plan.target.sizes
    return round(held_out_loss(small, setting.held_out), 4), {name: sizes[name] for name in SIZES}


def measure(setting: Setting, seed: int, rate: float, split: tuple[int, ...] | None) -> dict[str, Any]:
    """Measure one split; None lets HESSO choose."""
    wanted: dict[str, Any] = (
        {"pruning_ratio": 0.5} if split is None else {"target_sizes": dict(zip(SIZES, split, strict=True))}
    )
    trained, sizes = run(setting, seed, rate, **wanted)
    cut = Setting(setting.model, setting.train, setting.held_out, 3, rate)
    at_once = {"target_sizes": sizes, **AT_ONCE}
    losses = {healing: run(cut, seed, 0.0, healing=healing, **at_once)[0] for healing in ("auto", "off")}
    found = {"healed": losses["auto"], "unhealed": losses["off"], "trained": trained, "sizes": sizes}
    return {"split": "chosen" if split is None else "/".join(map(str, split)), "seed": seed, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out-blocks", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    setting = load_setting(options)
    if setting is None:
        return 0
    runs = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    for seed in options.seeds:
        for split in (None, *SPLITS):
            name = "chosen" if split is None else "/".join(map(str, split))
            if any((entry["split"], entry["seed"]) == (name, seed) for entry in runs):
                continue
            runs.append(measure(setting, seed, options.learning_rate, split))
            print(json.dumps(runs[-1]), flush=True)
            head = {
                "device": "cpu", "versions": versions(), "steps": options.steps, "tokens_a_step": BATCH * BLOCK,
                "learning_rate": options.learning_rate,
            }  # fmt: skip
            options.output.write_text(json.dumps(head | {"runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
