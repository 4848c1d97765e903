"""What a training step holds at its highest moment, before the cut and after it: masked, and with the units cut out.

    python benchmarks/compaction_memory.py [--model smollm2|small|stories260K|bundled|FOLDER] [--ratio 0.5]

A step's peak is that of weights, gradients, optimizer state and activations, without teachers. On a GPU its allocator
says it; elsewhere the tensors are counted, without what single operations take within and what HESSO keeps from step to
step (its masks and scales). It hangs on sizes alone, so the run is as short as can be: an even split, nothing healed,
nothing replayed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from compaction import ARMS
from texts import SETTINGS, SMALL, STORIES, Data, find_model, load_data, name_of
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.allocations import Allocations
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "compaction_memory.json"
STEPS, BEFORE = 8, 1  # two before pruning, two of pruning; the step whose peak is taken before the cut
LAST = STEPS - 1


class Peak(TrainerCallback):
    """Takes the peak of some steps.

    Attributes:
        bytes: by the step.
    """

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self._counted: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        if state.global_step not in (BEFORE, LAST):
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        self._held = size_of([*kwargs["model"].parameters(), *_state(kwargs["optimizer"])])
        self._counted = Allocations()
        self._counted.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the peak."""
        step = state.global_step - 1
        if step not in (BEFORE, LAST):
            return
        if torch.cuda.is_available():
            self.bytes[step] = torch.cuda.max_memory_allocated()
            return
        self._counted.__exit__(None, None, None)
        self.bytes[step] = self._held + self._counted.peak


def _state(optimizer: Any) -> list[torch.Tensor]:
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors, each storage once."""
    return sum({each.data_ptr(): each.numel() * each.element_size() for each in tensors}.values())


def peaks(options: argparse.Namespace, arm: str, data: Data) -> dict[str, Any]:
    """Train in one way; return the peaks and the sizes."""
    setting, peak = options.setting, Peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer = HessoTrainer(
            model=AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32),
            args=TrainingArguments(
                output_dir=folder, max_steps=STEPS, per_device_train_batch_size=setting.batch, save_strategy="no",
                report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=data.train,
            callbacks=[peak],
            hesso_config=HessoConfig(
                options.ratio, compact=ARMS[arm], replay_share=0.0, healing="off", stream_basis="given", cric=False,
                calibration_examples=0, quality_examples=0, warmup_steps=2, pruning_steps=2, pruning_periods=2,
            ),
        )  # fmt: skip
        before = trainer.model.num_parameters()
        trainer.train()
        after = trainer.hesso_run.model.num_parameters()
    kept = trainer.pruned_model().num_parameters()
    del trainer
    gc.collect()  # a trainer and what it has refer to each other: the next arm is to find the device empty
    return {
        "arm": arm, "before": peak.bytes[BEFORE], "after": peak.bytes[LAST], "parameters_before": before,
        "parameters_after": after, "parameters_kept": kept,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, small, stories260K, bundled, or a folder")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.folder, name = find_model(options.model, options.data, options.cache), name_of(options.model)
    options.setting = SETTINGS["stories" if name in (STORIES, SMALL) else "docs"]
    data = load_data(options.folder, options.setting, options.data)
    found = {
        "model": name, "ratio": options.ratio, "tokens": options.setting.batch * options.setting.block,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "versions": versions(),
        "runs": [peaks(options, arm, data) for arm in ARMS],
    }  # fmt: skip
    print(json.dumps(found["runs"]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
