"""`hesso-hf prune`: fine-tune and prune as a recipe says, and save the smaller model."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ..errors import HessoError, StoppedError
from .data import block_size_within, held_out_split, text_blocks
from .overview import overview
from .printing import by_share, print_report, print_table
from .recipe import Recipe, RunArguments, parse_recipe, recipe_parser

BLOCK_SIZE = 1024  # tokens, where nothing is said and the model's context has as many
LOSSES = {
    "eval_loss": "held-out loss", "eval_held_out_loss": "held-out loss", "eval_retained_loss": "loss on other text",
}  # fmt: skip
INTERRUPTED = 128 + 2  # what a shell says of a process that Ctrl-C ended
HELP = "fine-tune and prune as a recipe says: hesso-hf prune RECIPE [--flag value]"


def run(flags: list[str]) -> int:
    """Prune as the flags say; 128 + 15 where the run was told to stop, 128 + 2 at Ctrl-C."""
    if {"-h", "--help"} & set(flags):
        print(overview())
        return 0
    if "--help-all" in flags:
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
    except KeyboardInterrupt:
        if is_main_process():
            print(f"\nhesso-hf: {_interrupted(recipe, flags)}", file=sys.stderr)
        return INTERRUPTED
    leave()
    return code


def _interrupted(recipe: Recipe, flags: list[str]) -> str:
    """Say what there is to go on from, and how."""
    from ..export.checkpoint_state import last_checkpoint

    output_dir = Path(str(recipe.training.output_dir))
    last = last_checkpoint(output_dir)
    found = f"goes on from {last}" if last else f"starts anew, since there is no checkpoint in {output_dir} yet"
    command = shlex.join(["hesso-hf", "prune", *flags, "--resume_from_checkpoint", "auto"])
    return f"interrupted; this {found}:\n  {command}"


def prune(recipe: Recipe) -> None:
    """Fine-tune and prune as a recipe says, save the smaller model, and print its report on the main process.

    Everything that will be written to is looked at before training, and the smaller model is saved before anything that
    could fail after it. A dry run ends after a few steps and saves none.

    Raises:
        StoppedError: where the run was told to stop, and has saved a checkpoint to go on from.
    """
    import torch

    from ..export.checkpoint_state import last_common_checkpoint
    from ..export.storage import check_room
    from ..hf_models.build import load_config
    from ..hf_models.loading import load_model, load_tokenizer
    from .dry_run import dry_run, quiet
    from .origin import origin_of
    from .preflight import check_places, disk_needs, output_of

    asked, run, output = recipe, recipe.run, output_of(recipe)
    recipe = quiet(asked) if run.dry_run else asked
    check_places(recipe)
    tokenizer = load_tokenizer(str(run.model), run.trust_remote_code)
    config = load_config(run.model, run.trust_remote_code)
    stored, block_size = config.dtype, block_size_within(run.block_size, BLOCK_SIZE, {"`model`": config})
    if recipe.hesso.export_dtype is None and stored is not None:  # fp32 masters are no reason to store fp32
        recipe.hesso.export_dtype = str(stored).removeprefix("torch.")
    model = load_model(str(run.model), getattr(torch, run.dtype), run.trust_remote_code)
    with recipe.training.main_process_first(desc="cutting the text into blocks"):  # the others read its cache
        train, held_out = _datasets(run, tokenizer, block_size)
    trainer = _trainer(recipe, model, tokenizer, train, held_out)
    trainer.hesso_run.origin = origin_of(recipe)
    needs = disk_needs(asked, trainer)
    check_room(needs)
    if run.dry_run:
        dry_run(trainer, needs)
        return
    resume: Any = recipe.training.resume_from_checkpoint
    if resume == "auto":
        resume = last_common_checkpoint(Path(str(recipe.training.output_dir)))
    trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    if trainer.told_to_stop:
        raise StoppedError(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, as it was told to; go on "
            "with `--resume_from_checkpoint auto`"
        )
    trainer.save_model(str(output), _internal_call=True)
    if trainer.pruning_report is not None:
        print_report(trainer.pruning_report.to_dict(), str(output))
        _print_ladder(trainer, output)
    if held_out is not None:
        _print_losses(trainer)
    if recipe.training.push_to_hub:
        try:
            trainer.push_to_hub()
        except Exception as error:  # no connection, no right any more: the client has no type for all
            raise HessoError(
                f"`push_to_hub` (True): the smaller model is saved in {output}, and pushing it failed "
                f"({type(error).__name__}: {error}); push it again: `hf upload {trainer.hub_model_id} {output}`"
            ) from error


def _print_ladder(trainer: Any, output: Path) -> None:
    """Print a table of the models that were saved on the way, and the last one."""
    from ..export.report import REPORT_NAME

    folders = trainer.hesso_run.ladder.folders
    if not folders:
        return
    folders[trainer.hesso_config.pruning_ratio] = output
    found = {share: json.loads((folder / REPORT_NAME).read_text()) for share, folder in folders.items()}
    print_table(f"{', '.join(map(str, folders.values()))}, by the share to remove", *by_share(found))


def _print_losses(trainer: Any) -> None:
    """Evaluate, and print what comes out on the main process."""
    measured = trainer.evaluate()
    for key, name in LOSSES.items():
        if key in measured and trainer.is_world_process_zero():
            print(f"{name}: {measured[key]:.4f} nats a token")


def _trainer(recipe: Recipe, model: Any, tokenizer: Any, train: Any, held_out: Any) -> Any:
    """Make the trainer, and say what `Trainer` itself refuses of the arguments."""
    from ..trainer import HessoTrainer

    if recipe.training.device.type == "cpu":
        recipe.training.dataloader_pin_memory = False  # which is for a GPU alone, and warned of where there is none
    if isinstance(held_out, dict) and recipe.training.metric_for_best_model in ("loss", "eval_loss"):
        recipe.training.metric_for_best_model = "held_out_loss"
    try:
        trainer = HessoTrainer(
            model=model,
            args=recipe.training,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            hesso_config=recipe.hesso,
            peft_config=recipe.run.adapter(),
        )
    except HessoError:
        raise
    except ValueError as error:
        raise HessoError(f"`training`: {error}") from error
    return trainer


def _datasets(run: RunArguments, tokenizer: Any, block_size: int) -> tuple[Any, Any]:
    """Return the blocks to train on and the held-out ones, by name where there is other text beside these."""
    named = run.eval_dataset is not None or run.eval_split is not None
    train, held_out = text_blocks(
        str(run.dataset), tokenizer, block_size, run.dataset_split, config_name=run.dataset_config,
        text_column=run.text_column, max_examples=run.max_examples, held_out_ratio=None if named else run.eval_ratio,
    )  # fmt: skip
    if named:
        source = run.eval_dataset or str(run.dataset)
        name = run.dataset_config if source == run.dataset else None
        held_out, _ = text_blocks(
            source, tokenizer, block_size, run.eval_split or held_out_split(source), config_name=name,
            text_column=run.text_column,
        )  # fmt: skip
    if run.retained_dataset is not None:
        retained, _ = text_blocks(
            run.retained_dataset, tokenizer, block_size, held_out_split(run.retained_dataset),
            text_column=run.text_column,
        )  # fmt: skip
        held_out = {"held_out": held_out, "retained": retained}
    return train, held_out
