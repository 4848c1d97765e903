"""What `hesso-hf prune` looks at before it trains: all that it will write to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..config import HessoConfig
from ..errors import HessoError, counted, first_line
from ..export.storage import check_not_base, check_writable
from ..hf_models.build import check_next_tokens, load_config
from ..trainer.saving import checkpoint_bytes
from ..trainer.teacher import check_teacher
from .recipe import Recipe
from .report import SMALL_NAME


def output_of(recipe: Recipe) -> Path:
    """Return the folder for the smaller model."""
    return Path(recipe.run.output) if recipe.run.output else Path(str(recipe.training.output_dir)) / SMALL_NAME


def check_places(recipe: Recipe) -> None:
    """Check what can be told before anything is loaded: folders, the teacher, and the repository that is pushed to.

    Raises:
        HessoError: naming the argument, the place and the remedy.
    """
    output, output_dir, base = output_of(recipe), Path(str(recipe.training.output_dir)), Path(str(recipe.run.model))
    written = {"output_dir": output_dir, "output": output}
    for argument, folder in written.items():
        check_writable(argument, folder)
        if argument == "output" or recipe.training.push_to_hub:  # which saves in `output_dir` what it pushes
            check_not_base(folder, base if base.is_dir() else None, recipe.hesso.overwrite_base)
    check_writable("output", output.absolute().parent)  # where it is put together
    check_teacher(recipe.hesso.distill_from)
    if recipe.training.push_to_hub and recipe.training.process_index == 0:
        check_hub(recipe.training)


def config_of(recipe: Recipe) -> PretrainedConfig:
    """Return the model's config.

    Raises:
        HessoError: where there is none, or the model isn't one to train on text.
    """
    run = recipe.run
    config = load_config(run.model, run.trust_remote_code)
    check_next_tokens(config, str(run.model), "train it in Python (`HessoTrainer`), with its own data")
    return config


def check_hub(training: TrainingArguments) -> None:
    """Make the repository that is pushed to, or check that it can be written.

    Raises:
        HessoError: where there is no token, it has no right to write, or the Hub can't be reached.
    """
    from huggingface_hub import HfApi

    name = training.hub_model_id or Path(str(training.output_dir)).absolute().name
    api = HfApi(token=training.hub_token)
    try:
        repo = api.create_repo(name, private=training.hub_private_repo, exist_ok=True).repo_id
        api.auth_check(repo, write=True)
    except Exception as error:  # a bad name, no token, no right, no connection: the client has no type for all
        raise HessoError(
            f"`push_to_hub` (True): {name!r} can't be written on the Hub ({first_line(error)}); log in with a token "
            "that may write (`hf auth login`, `hub_token`), name another `hub_model_id`, or leave `push_to_hub` out"
        ) from error


def disk_needs(recipe: Recipe, trainer: Any) -> list[tuple[str, Path, int]]:
    """Estimate what the run will write, now that its sizes are known: what, where, bytes."""
    run, output_dir = trainer.hesso_run, Path(str(recipe.training.output_dir))
    stored = _bytes_a_parameter(recipe.hesso, run.model)
    model = run.plan.target.parameters_after * stored
    parts = [("the smaller model", output_of(recipe), model)]
    if run.plan.rungs:
        parts.append(("those on the way", output_dir, sum(rung.parameters_after for rung in run.plan.rungs) * stored))
    if recipe.training.push_to_hub:
        parts.append(("the one that is pushed", output_dir, model))
    if count := num_checkpoints(recipe.training, run.count_steps()):
        parts.append((counted(count, "checkpoint"), output_dir, count * checkpoint_bytes(run.model)))
    return parts


def _bytes_a_parameter(config: HessoConfig, model: Any) -> int:
    return {"float32": 4, None: model.dtype.itemsize}.get(config.export_dtype, 2)


def num_checkpoints(training: TrainingArguments, total_steps: int) -> int:
    """Return how many checkpoints lie on the disk at once: the oldest is removed after the newest is written."""
    if training.save_strategy == SaveStrategy.NO:
        return 1 if training.enable_jit_checkpoint else 0
    every = training.save_steps if training.save_steps >= 1 else max(1, math.ceil(total_steps * training.save_steps))
    saved = math.ceil(total_steps / every)
    if training.save_strategy == SaveStrategy.EPOCH:
        saved = math.ceil(training.num_train_epochs)
    return min(saved, training.save_total_limit + 1) if training.save_total_limit else saved
