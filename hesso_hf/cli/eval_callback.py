"""`EvalCallback`: tasks of lm-eval in the evaluations of a training run."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ..distributed.collectives import from_main, is_main_process
from ..distributed.passes import in_eval
from ..errors import HessoError, first_line
from ..pruning.weights.snapshot import kept_random_state
from .tasks import Tasks

logger = logging.get_logger(__name__)


class EvalCallback(TrainerCallback):
    """Runs tasks of lm-eval at each evaluation of a run, and logs their scores as `eval_<task>_<metric>`.

    They belong to the evaluation's metrics: `metric_for_best_model="eval_piqa_acc"` chooses by them. What is asked is
    the model as it is trained then, adapters in place, units that shrink at their scales. The main process asks it, the
    others wait; where that fails, a warning says why, and training goes on. Random numbers of the run stay what they
    would be. Losses on text need no callback: they are those of the trainer's `eval_dataset`, which can be several by
    name.

    Args:
        trainer: whose model is asked, and who logs.
        tasks: names with commas between them; `paper` for the seven that the paper reports.
        limit: examples of each task at most.
        num_fewshot: examples in a prompt; each task's own number by default.
        batch_size: of the requests.
        include_path: folder with further task files.

    Raises:
        HessoError: where lm-eval isn't installed or has no such task, there is no tokenizer, or no process has the
            whole model (FSDP, ZeRO).

    Example:
        trainer.add_callback(EvalCallback(trainer, "piqa,arc_easy", limit=200))
    """

    def __init__(
        self,
        trainer: Any,
        tasks: str,
        limit: int | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        include_path: str | None = None,
    ) -> None:
        if trainer.hesso_engine.measures_shards:
            raise HessoError(
                f"`tasks` ({tasks!r}): no process has the whole model under FSDP and DeepSpeed; evaluate checkpoints, "
                "or the smaller model, with `hesso-hf eval`"
            )
        if trainer.hesso_run.tokenizer is None:
            raise HessoError(f"`tasks` ({tasks!r}) need the tokenizer: give the trainer `processing_class`")
        self._trainer = trainer
        self._tasks = Tasks(tasks, "tasks", num_fewshot, limit, batch_size, include_path)
        self._asked_at, self._measured = -1, set[frozenset[str]]()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Ask the tasks, log the scores, and add them to the metrics, of several data sets to the first's."""
        measured = frozenset(metrics or ())
        if state.global_step == self._asked_at and measured not in self._measured:
            self._measured.add(measured)  # another data set of the same evaluation
            return
        self._asked_at, self._measured = state.global_step, {measured}
        scores = from_main(self._ask(args.device) if is_main_process() else None)
        if metrics is not None:
            metrics |= scores
        self._trainer.log(scores)

    def _ask(self, device: Any) -> dict[str, float]:
        run = self._trainer.hesso_run
        model: nn.Module = run.whole
        try:
            with in_eval(model), kept_random_state(device), self._trainer.compute_loss_context_manager():
                found = self._tasks.scores(model, run.tokenizer)  # type: ignore[arg-type]
        except Exception as error:  # a task's data can't be had, or its code fails: with any type
            logger.warning(f"{type(error).__name__}: {first_line(error)}: no score of tasks; training goes on")
            return {}
        return {f"eval_{task}_{_named(key)}": value for task, scores in found.items() for key, value in scores.items()
                if "," in key}  # fmt: skip


def _named(key: str) -> str:
    """Return lm-eval's `metric,filter` as part of a name, without the filter that does nothing."""
    metric, _, filtered = key.partition(",")
    return metric if filtered == "none" else f"{metric}_{filtered}"
