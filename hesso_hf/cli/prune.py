"""`hesso-hf prune`: fine-tune and prune as a recipe says, and save the smaller model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import StoppedError
from .data import held_out_split, text_blocks
from .printing import print_report
from .recipe import Recipe, RunArguments, parse_recipe, recipe_parser

HELP = "fine-tune and prune as a recipe says: hesso-hf prune RECIPE [--flag value]"


def run(flags: list[str]) -> int:
    """Prune as the flags say; 128 + 15 where the run was told to stop."""
    if {"-h", "--help"} & set(flags):
        print("Flags override the recipe's keys.\n")
        recipe_parser().print_help()
        return 0
    file = flags[0] if flags and not flags[0].startswith("-") else None
    recipe = parse_recipe(file, flags[1:] if file else flags)
    from ..distributed.collectives import is_main_process, leave
    from ..trainer.callbacks import EXIT_CODE

    code = 0
    try:
        prune(recipe)
    except StoppedError as stopped:
        code = EXIT_CODE
        if is_main_process():
            print(f"hesso-hf: {stopped}", file=sys.stderr)
    leave()
    return code


def prune(recipe: Recipe) -> None:
    """Fine-tune and prune as a recipe says, save the smaller model, and print its report on the main process.

    Raises:
        StoppedError: where the run was told to stop, and has saved a checkpoint to go on from.
    """
    import torch

    from ..export.checkpoint_state import last_common_checkpoint
    from ..hf_models.build import load_config
    from ..hf_models.loading import load_model, load_tokenizer
    from ..trainer import HessoTrainer

    run = recipe.run
    tokenizer = load_tokenizer(str(run.model), run.trust_remote_code)
    stored = load_config(run.model, run.trust_remote_code).dtype
    if recipe.hesso.export_dtype is None and stored is not None:  # fp32 masters are no reason to store fp32
        recipe.hesso.export_dtype = str(stored).removeprefix("torch.")
    model = load_model(str(run.model), getattr(torch, run.dtype), run.trust_remote_code)
    with recipe.training.main_process_first(desc="cutting the text into blocks"):  # the others read its cache
        train, held_out = _datasets(run, tokenizer)
    trainer = HessoTrainer(
        model=model,
        args=recipe.training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        hesso_config=recipe.hesso,
        peft_config=run.adapter(),
    )
    resume: Any = recipe.training.resume_from_checkpoint
    if resume == "auto":
        resume = last_common_checkpoint(Path(str(recipe.training.output_dir)))
    trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    if trainer.told_to_stop:
        raise StoppedError(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, as it was told to; go on "
            "with `--resume_from_checkpoint auto`"
        )
    loss = trainer.evaluate()["eval_loss"] if held_out is not None else None
    output = Path(run.output) if run.output else Path(str(recipe.training.output_dir)) / "small"
    trainer.save_model(str(output), _internal_call=True)
    if recipe.training.push_to_hub:
        trainer.push_to_hub()
    if trainer.pruning_report is not None:
        print_report(trainer.pruning_report.to_dict(), str(output), loss)


def _datasets(run: RunArguments, tokenizer: Any) -> tuple[Any, Any]:
    """Return the blocks to train on and the held-out ones."""
    named = run.eval_dataset is not None or run.eval_split is not None
    train, held_out = text_blocks(
        str(run.dataset), tokenizer, run.block_size, run.dataset_split, config_name=run.dataset_config,
        text_column=run.text_column, max_examples=run.max_examples, held_out_ratio=None if named else run.eval_ratio,
    )  # fmt: skip
    if named:
        source = run.eval_dataset or str(run.dataset)
        name = run.dataset_config if source == run.dataset else None
        held_out, _ = text_blocks(
            source, tokenizer, run.block_size, run.eval_split or held_out_split(source), config_name=name,
            text_column=run.text_column,
        )  # fmt: skip
    return train, held_out
