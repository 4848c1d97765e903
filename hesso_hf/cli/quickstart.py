"""Quickstart: prune a model by half while fine-tuning it, and compare with the original and a one-shot cut."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

from ..bundled import BUNDLED, resolve_model
from ..config import HessoConfig
from ..export.write import DTYPES
from ..hf_models.build import load_config
from ..hf_models.loading import load_model, load_tokenizer
from ..trainer.trainer import HessoTrainer
from .data import text_blocks
from .evaluate import held_out_loss, perplexity, weights_bytes
from .speed import tokens_per_second

PROMPT_TOKENS, SAMPLE_TOKENS = 12, 30

# Runs where hesso_hf has never been imported: the smaller model needs nothing but transformers.
_FRESH_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompt, folders = json.loads(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for name, folder in folders.items():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(sys.argv[3]), do_sample=False,
                         repetition_penalty=1.3, pad_token_id=0)
    found[name] = {"sample": tokenizer.decode(out[0, len(prompt):]), "parameters": model.num_parameters()}
assert "hesso_hf" not in sys.modules
print("RESULT" + json.dumps(found))
"""


class PlanAlone(PrinterCallback):
    """Has a trainer print its plan and what the first steps took, and no logs."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print none."""


@dataclass(frozen=True)
class QuickstartRow:
    """One model of the comparison; `tokens_per_second` is forward throughput, medians of alternating runs."""

    name: str
    parameters: int
    bytes: int
    perplexity: float
    tokens_per_second: float


def run_quickstart(options: Namespace) -> tuple[list[QuickstartRow], dict[str, str]]:
    """Fine-tune and prune with HESSO and, for as many steps, after a one-shot cut by magnitude; reload and compare.

    Args:
        options: the flags of `hesso-hf quickstart`.

    Returns:
        A row per model (original, HESSO, one-shot), and how each goes on with a text; both also in `results.json`.
    """
    # a mistake shows before anything is written; without replay all see equally many tokens
    config = HessoConfig(pruning_ratio=options.ratio, replay_share=0.0, quality_examples=32)
    source = resolve_model(options.model or BUNDLED)
    config.export_dtype = str(load_config(source).dtype or "float32").removeprefix("torch.")  # all stored alike
    tokenizer = load_tokenizer(source)
    train, held_out = text_blocks(
        options.dataset, tokenizer, options.block_size, "train", text_column=options.text_column, held_out_ratio=0.1
    )
    assert held_out is not None
    output = Path(options.output)
    folders = {"original": output / "original", "HESSO": output / "hesso", "one-shot magnitude": output / "one-shot"}
    load_model(source, DTYPES[config.export_dtype]).save_pretrained(folders["original"])
    tokenizer.save_pretrained(folders["original"])

    texts = train, held_out
    sizes = _train(options, source, tokenizer, texts, config, folders["HESSO"], PlanAlone())
    print("to compare: a cut by magnitude to the same sizes at once, then as many steps of training")
    one_shot = replace(
        config, pruning_ratio=None, target_sizes=sizes, saliency="magnitude", healing="off", stream_basis="given",
        warmup_steps=0, pruning_steps=1, pruning_periods=1,
    )  # fmt: skip
    _train(options, source, tokenizer, texts, one_shot, folders["one-shot magnitude"])

    models = {name: load_model(str(folder), torch.float32) for name, folder in folders.items()}
    speeds = tokens_per_second(list(models.values()), options.batch_size, options.block_size)
    rows = []
    for (name, model), speed in zip(models.items(), speeds, strict=True):
        loss = held_out_loss(model, held_out, options.batch_size)
        rows.append(QuickstartRow(name, model.num_parameters(), weights_bytes(folders[name]), perplexity(loss), speed))
    prompt = held_out[0]["input_ids"][:PROMPT_TOKENS]
    samples = _fresh_process(prompt, folders, rows)
    flags = {name: value for name, value in vars(options).items() if name not in ("command", "work")}
    results = {"options": flags, "rows": [asdict(row) for row in rows], "samples": samples}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return rows, samples


def _train(
    options: Namespace,
    source: str,
    tokenizer: Any,
    texts: tuple[Any, Any],
    config: HessoConfig,
    folder: Path,
    *shown_by: PrinterCallback,
) -> dict[str, int]:
    """Train on the first of two texts, measure on the other and save; return the config sizes that were pruned to."""
    args = TrainingArguments(
        output_dir=str(folder.parent / "runs" / folder.name), max_steps=options.steps, seed=0,
        per_device_train_batch_size=options.batch_size, learning_rate=options.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=max(1, options.steps // 20),
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = HessoTrainer(
        model=load_model(source, torch.float32),  # fp32 masters, whatever the stored dtype
        args=args,
        train_dataset=texts[0],
        eval_dataset=texts[1],
        processing_class=tokenizer,
        hesso_config=config,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in shown_by:
        trainer.add_callback(callback)
    trainer.train()
    trainer.save_model(str(folder))
    return trainer.hesso_plan.target.sizes


def _fresh_process(prompt: list[int], folders: dict[str, Path], rows: list[QuickstartRow]) -> dict[str, str]:
    """Reload every model in a process without hesso_hf and let it continue a held-out text."""
    arguments = [json.dumps(prompt), json.dumps(folders, default=str), str(SAMPLE_TOKENS)]
    done = subprocess.run([sys.executable, "-c", _FRESH_PROCESS, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the smaller models don't load in a fresh process:\n{done.stderr}")
    found = json.loads(done.stdout.partition("RESULT")[2])
    for row in rows:
        assert found[row.name]["parameters"] == row.parameters
    return {name: entry["sample"] for name, entry in found.items()}
