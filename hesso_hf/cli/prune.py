"""`hesso-hf prune`: fine-tune and prune as a recipe says, and save the smaller model."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import HessoError, StoppedError
from . import finishing
from .data import PYTHON_DOCS, Data, block_size_within, held_out_split, read_data, read_tokenizer
from .examples import Padding, Reading
from .overview import overview
from .printing import by_share, print_report, print_table
from .recipe import Recipe, RunArguments, parse_recipe, recipe_parser

BLOCK_SIZE = 1024  # tokens, where nothing is said and the model's context has as many
LOGS = 50  # of a run, about
LOSSES = {
    "eval_loss": "held-out examples", "eval_held_out_loss": "held-out examples",
    "eval_retained_loss": "examples of other text",
}  # of which a run measures the loss, by the name that it logs it under # fmt: skip
INTERRUPTED = 128 + 2  # what a shell says of a process that Ctrl-C ended
PART_OF_SWEEP = "HESSO_HF_PART_OF_SWEEP"  # environment variable: a sweep started this run, and says how it goes on
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

    code, started = 0, time.time()
    try:
        prune(recipe)
    except StoppedError as stopped:
        code = EXIT_CODE
        if is_main_process():
            print(f"hesso-hf: {stopped}", file=sys.stderr)
    except KeyboardInterrupt:
        if is_main_process() and PART_OF_SWEEP not in os.environ:
            print(f"\nhesso-hf: {_interrupted(recipe, flags, started)}", file=sys.stderr)
        return INTERRUPTED
    leave()
    return code


def _interrupted(recipe: Recipe, flags: list[str], started: float) -> str:
    """Say what there is to go on from, and how; or that the smaller model is saved."""
    from ..config.files import REPORT_NAME
    from ..export.checkpoint_state import last_checkpoint
    from .origin import launched
    from .preflight import output_of

    output = output_of(recipe)
    if (output / REPORT_NAME).exists() and (output / REPORT_NAME).stat().st_mtime >= started:
        return f"interrupted after the smaller model was saved in {output}: nothing but what follows that is missing"
    output_dir = Path(str(recipe.training.output_dir))
    last = last_checkpoint(output_dir)
    found = f"goes on from {last}" if last else f"starts anew, since there is no checkpoint in {output_dir} yet"
    asked = [] if recipe.training.resume_from_checkpoint == "auto" else ["--resume_from_checkpoint", "auto"]
    command = shlex.join([*launched(), "prune", *flags, *asked])
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
    from ..hf_models.loading import load_model
    from .dry_run import dry_run, quiet
    from .origin import origin_of
    from .preflight import check_places, config_of, disk_needs, output_of

    asked, run, output = recipe, recipe.run, output_of(recipe)
    recipe = quiet(asked) if run.dry_run else asked
    check_places(recipe)
    config = config_of(recipe)
    tokenizer = read_tokenizer(str(run.model), run.chat_template, run.trust_remote_code)
    stored, block_size = config.dtype, block_size_within(run.block_size, BLOCK_SIZE, {"`model`": config})
    if recipe.hesso.export_dtype is None and stored is not None:  # fp32 masters are no reason to store fp32
        recipe.hesso.export_dtype = str(stored).removeprefix("torch.")
    model = load_model(str(run.model), getattr(torch, run.dtype), run.trust_remote_code)
    with recipe.training.main_process_first(desc="reading the data"):  # the others read its cache
        data, held_out = datasets_of(recipe, tokenizer, block_size)
    trainer = _trainer(recipe, model, tokenizer, data.train, held_out)
    trainer.hesso_run.origin = origin_of(recipe) | {"data": data.to_dict()}
    if run.eval_tasks is not None:
        _add_tasks(trainer, asked)
    _choose_logging_steps(recipe, trainer)
    needs = disk_needs(asked, trainer)
    check_room(needs)
    if run.dry_run:
        dry_run(trainer, needs)
        return
    resume: Any = recipe.training.resume_from_checkpoint
    if resume == "auto":
        resume = last_common_checkpoint(Path(str(recipe.training.output_dir)))
    unwritten = finishing.train(trainer, str(resume) if isinstance(resume, Path) else resume)
    if trainer.told_to_stop:
        raise StoppedError(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, as it was told to; go on "
            "with `--resume_from_checkpoint auto`"
        )
    finishing.save(trainer, output, unwritten)
    if trainer.pruning_report is not None:
        told_below = all(compared < count for compared, count in _examples_of(trainer).values())
        print_report(trainer.pruning_report.to_dict(), str(output), tells_examples=not told_below)
        _print_ladder(trainer, output)
    if held_out is not None:
        _print_losses(trainer)
    if recipe.training.push_to_hub:
        _push(trainer, output)


def _add_tasks(trainer: Any, recipe: Recipe) -> None:
    """Have the tasks of lm-eval scored that a recipe names.

    Raises:
        HessoError: where nothing is evaluated during training, and for what `EvalCallback` refuses.
    """
    from .eval_callback import EvalCallback

    run, strategy = recipe.run, recipe.training.eval_strategy
    if strategy == "no":
        raise HessoError(
            f"`eval_tasks` ({run.eval_tasks!r}) are scored when a run evaluates, and `eval_strategy` (no) says never: "
            "set `--eval_strategy epoch`, or `steps` and `--eval_steps`; `hesso-hf eval` scores what is saved"
        )
    trainer.add_callback(EvalCallback(trainer, str(run.eval_tasks), run.eval_tasks_limit))


def _push(trainer: Any, output: Path) -> None:
    """Push the smaller model, which is saved by now."""
    try:
        trainer.push_to_hub()
    except Exception as error:  # no connection, no right any more: the client has no type for all
        said = f"{type(error).__name__}: {finishing.told(error)}"
        raise HessoError(
            f"`push_to_hub` (True): the smaller model is saved in {output}, and pushing it failed ({said}); push "
            f"it again: `hf upload {trainer.hub_model_id} {output}`"
        ) from error


def _choose_logging_steps(recipe: Recipe, trainer: Any) -> None:
    """Where nothing is said, log `LOGS` times: many runs are shorter than Transformers' own 500 steps."""
    if "logging_steps" not in recipe.given.get("training", {}):
        recipe.training.logging_steps = min(500, max(1, trainer.hesso_run.count_steps() // LOGS))


def _print_ladder(trainer: Any, output: Path) -> None:
    """Print a table of the models that were saved on the way, and the last one."""
    from ..config.files import REPORT_NAME

    folders = trainer.hesso_run.ladder.folders
    if not folders:
        return
    folders[trainer.hesso_config.pruning_ratio] = output
    found = {share: json.loads((folder / REPORT_NAME).read_text()) for share, folder in folders.items()}
    print_table(f"{', '.join(map(str, folders.values()))}, by the share to remove", *by_share(found))


def _examples_of(trainer: Any) -> dict[str, tuple[int, int]]:
    """Return for each held-out loss on how many examples the table has it, and how many there are."""
    data, shown = trainer.eval_dataset, trainer.hesso_run.quality.record() or {}
    parts = (
        {f"eval_{name}_loss": part for name, part in data.items()} if isinstance(data, dict) else {"eval_loss": data}
    )
    return {key: (shown.get(key, {}).get("examples", 0), len(part)) for key, part in parts.items() if part is not None}


def _print_losses(trainer: Any) -> None:
    """Evaluate, and print what comes out on the main process, where the table above isn't of all these examples."""
    from transformers import PrinterCallback

    from .eval_callback import EvalCallback

    trainer.remove_callback(PrinterCallback)  # it would print the same once more
    trainer.remove_callback(EvalCallback)  # losses alone are wanted
    measured = trainer.evaluate()
    for key, (compared, count) in _examples_of(trainer).items():
        if key in measured and compared < count and trainer.is_world_process_zero():
            among = f"the table's losses are of {compared:,} of these; " if compared else ""
            model = "dense" if trainer.pruning_report is None else "smaller"
            on_all = f"on all of them the {model} model has {measured[key]:.4f} nats per token"
            print(f"{count:,} {LOSSES[key]}: {among}{on_all}")


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
            data_collator=Padding(tokenizer),
            peft_config=recipe.run.adapter(),
        )
    except HessoError:
        raise
    except ValueError as error:
        raise HessoError(f"`training`: {error}") from error
    return trainer


def datasets_of(recipe: Recipe, tokenizer: Any, block_size: int) -> tuple[Data, Any]:
    """Return the data to train on and the held-out examples, by name where there are others beside these."""
    run, training = recipe.run, recipe.training
    reading = Reading(block_size, run.text_column, run.packing, run.completion_only_loss, run.assistant_only_loss)
    named = run.eval_dataset is not None or run.eval_split is not None
    needed = None
    if training.max_steps > 0:
        needed = training.max_steps * training.train_batch_size * training.gradient_accumulation_steps
        needed *= training.world_size
    data = read_data(
        str(run.dataset), tokenizer, reading, run.dataset_split, config_name=run.dataset_config,
        max_examples=run.max_examples, needed=needed, held_out_ratio=None if named else run.eval_ratio,
    )  # fmt: skip
    _check_options(run, data)
    held_out: Any = data.held_out

    def held_out_of(source: str, split: str, config_name: str | None = None) -> Any:
        limit = run.max_eval_examples
        return read_data(source, tokenizer, reading, split, config_name=config_name, needed=limit).train

    if named:
        source = run.eval_dataset or str(run.dataset)
        name = run.dataset_config if source == run.dataset else None
        held_out = held_out_of(source, run.eval_split or held_out_split(source), name)
    parts: dict[str, Any] = {"held_out": held_out}
    if run.retained_dataset is not None:
        parts["retained"] = held_out_of(run.retained_dataset, held_out_split(run.retained_dataset))
    counts = {name: len(part) for name, part in parts.items()}
    parts = {name: part.select(range(min(len(part), run.max_eval_examples))) for name, part in parts.items()}
    if training.process_index == 0:
        print("\n".join([*data.describe(), _examples_said(data, parts, counts)]))
    return data, parts if run.retained_dataset is not None else parts["held_out"]


def _examples_said(data: Data, parts: dict[str, Any], counts: dict[str, int]) -> str:
    """Say how many examples there are for what."""
    said = [f"  examples to train on: {len(data.train):,}"]
    for name, part in parts.items():
        of = f" of {counts[name]:,} (`max_eval_examples`)" if len(part) < counts[name] else ""
        said.append(f"{'of `retained_dataset`' if name == 'retained' else 'to evaluate on'}: {len(part):,}{of}")
    return "; ".join(said)


def _check_options(run: RunArguments, data: Data) -> None:
    """Refuse options of other kinds of data.

    Raises:
        HessoError: naming the option.
    """
    if run.packing is False and run.dataset == PYTHON_DOCS:
        raise HessoError(f"`packing` (False): {PYTHON_DOCS} is cut into blocks; leave it out")
    kinds = {"completion_only_loss": "prompt-completion", "assistant_only_loss": "messages"}
    for name, kind in kinds.items():
        if getattr(run, name) is not None and data.examples.kind != kind:
            raise HessoError(
                f"`{name}` ({getattr(run, name)}) does nothing: {data.examples.source} is read as "
                f"{data.examples.kind}, not {kind}; leave it out"
            )
