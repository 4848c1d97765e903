"""What the subcommands of `hesso-hf` do; `cli` parses and prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bundled import resolve_model
from ..errors import HessoError, StoppedError
from ..export.checkpoint_state import last_common_checkpoint
from ..export.plots import draw_cric
from ..export.report import REPORT_NAME
from ..hf_models.build import load_config
from ..hf_models.loading import load_model, load_tokenizer
from ..trainer.trainer import HessoTrainer
from .data import held_out_split, text_blocks
from .evaluate import held_out_loss, perplexity
from .recipe import Recipe, RunArguments
from .survey.survey import SurveyFile, survey_types


@dataclass(frozen=True)
class PruneResult:
    """What `hesso-hf prune` reports."""

    output: Path
    report: dict[str, Any]
    held_out_loss: float | None


def prune(recipe: Recipe) -> PruneResult | None:
    """Fine-tune and prune as a recipe says, and save the smaller model; None on all but the main process.

    Raises:
        StoppedError: where the run was told to stop, and has saved a checkpoint to go on from.
    """
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
    if trainer.pruning_report is None:
        return None
    return PruneResult(output, trainer.pruning_report.to_dict(), loss)


def _datasets(run: RunArguments, tokenizer: Any) -> tuple[Any, Any]:
    options: dict[str, Any] = {"text_column": run.text_column}
    named = run.eval_dataset is not None or run.eval_split is not None
    train, held_out = text_blocks(
        str(run.dataset), tokenizer, run.block_size, run.dataset_split, config_name=run.dataset_config,
        max_examples=run.max_examples, held_out_ratio=None if named else run.eval_ratio, **options,
    )  # fmt: skip
    if named:
        source = run.eval_dataset or str(run.dataset)
        name = run.dataset_config if source == run.dataset else None
        held_out, _ = text_blocks(
            source, tokenizer, run.block_size, run.eval_split or held_out_split(source), config_name=name, **options
        )  # fmt: skip
    return train, held_out


def evaluate(
    model: str, dataset: str | None, tasks: str | None, split: str | None, block_size: int, text_column: str,
    include_path: str | None, limit: int | None, trust_remote_code: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure a model's held-out perplexity on text and its scores on lm-eval tasks.

    Raises:
        HessoError: where neither is asked for, or tasks are and lm-eval isn't installed.
    """
    if dataset is None and tasks is None:
        raise HessoError("`eval` needs `--dataset` (text for the perplexity) or `--tasks` (lm-eval); got neither")
    model = resolve_model(model)
    found: dict[str, Any] = {}
    if dataset is not None:
        tokenizer = load_tokenizer(model)
        split = split or held_out_split(dataset)
        blocks, _ = text_blocks(
            dataset, tokenizer, block_size, split, text_column=text_column, max_examples=limit
        )  # fmt: skip
        loss = held_out_loss(load_model(model, torch.float32, trust_remote_code), blocks)
        found |= {"loss": loss, "perplexity": perplexity(loss), "tokens": len(blocks) * (block_size - 1)}
    if tasks is not None:
        found["tasks"] = _lm_eval(model, tasks.split(","), include_path, limit, trust_remote_code)
    return found


def _lm_eval(
    model: str, tasks: list[str], include_path: str | None, limit: int | None, trust_remote_code: bool
) -> dict[str, Any]:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HessoError("`--tasks` needs lm-eval: pip install 'hesso_hf[eval]'") from error
    results = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={model},trust_remote_code={trust_remote_code}", tasks=tasks, limit=limit,
        task_manager=TaskManager(include_path=include_path),
    )  # fmt: skip
    return {task: {key: value for key, value in scores.items() if isinstance(value, float | int)}
            for task, scores in results["results"].items()}  # fmt: skip


def read_report(folder: str) -> dict[str, Any]:
    """Read the pruning report of a smaller model.

    Raises:
        HessoError: where the folder has none.
    """
    path = Path(folder) / REPORT_NAME
    if not path.is_file():
        raise HessoError(f"{folder} has no {REPORT_NAME}: it isn't a model that was pruned and saved by hesso_hf")
    return json.loads(path.read_text(encoding="utf-8"))


def plot_report(report: dict[str, Any], path: str) -> None:
    """Draw what CRIC did, from a pruning report.

    Raises:
        HessoError: where CRIC wasn't used, for a picture of another kind, or without matplotlib.
    """
    if not report.get("cric"):
        raise HessoError("`--plot` draws what CRIC did, and this model was pruned without it (`cric` in HessoConfig)")
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise HessoError(f"`--plot` ({path!r}) must end in .png, .svg or .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise HessoError(f"`--plot` ({path!r}): there is no folder {str(Path(path).parent)!r}; make it first")
    if not draw_cric(report["cric"], Path(path)):
        raise HessoError("`--plot` needs matplotlib: pip install 'hesso_hf[plots]'")


def survey(
    types: Sequence[str] | None, output: Path, jobs: int, resume: bool, time_limit: float,
    show: Callable[[int, int, str], None],
) -> dict[str, Any]:  # fmt: skip
    """Survey model types and write what is found after each; return the JSON's content.

    Args:
        show: called with the number of types done, of all, and the name of the last one done.

    Raises:
        HessoError: for an unknown type, a count that isn't positive, or an output that can't be gone on with.
    """
    for name, value in (("jobs", jobs), ("time-limit", time_limit)):
        if value <= 0:
            raise HessoError(f"`--{name}` ({value}) must be above zero")
    file = SurveyFile(output, types, resume)
    for done, (model_type, found) in enumerate(survey_types(file.left, jobs, time_limit), 1):
        file.add(model_type, found)
        show(done, len(file.left), model_type)
    return file.content
