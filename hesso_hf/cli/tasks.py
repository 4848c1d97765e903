"""lm-eval's tasks: found before anything is measured, and then asked of models."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedModel

from ..errors import HessoError, first_line, nearest_name

PAPER = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # its seven tasks


class Tasks:
    """Tasks by name, `paper` for its seven, and how they are asked.

    Args:
        asked: names with commas between them.
        argument: what an error calls them.
        num_fewshot: examples in a prompt; the task's own number by default.
        limit: examples of each task at most.

    Raises:
        HessoError: where lm-eval isn't installed, or has no such task.
    """

    def __init__(
        self,
        asked: str,
        argument: str,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        include_path: str | None = None,
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise HessoError(f"`{argument}` needs lm-eval: pip install 'hesso_hf[eval]'") from error
        self._argument = argument
        self._num_fewshot, self._limit, self._batch_size = num_fewshot, limit, batch_size
        self._manager = TaskManager(include_path=include_path)
        names = asked.replace(" ", "").split(",")
        self._names = [task for name in names for task in (PAPER if name == "paper" else (name,))]
        for name in self._names:
            if not self._manager.match_tasks([name]):
                hint = nearest_name(name, self._manager.all_tasks)
                raise HessoError(
                    f"`{argument}` ({name!r}): lm-eval has no such task{hint}; `lm-eval ls tasks` lists them"
                )

    def fetch(self) -> None:
        """Have the data of all tasks here before anything is measured: what can't be had is told then.

        Raises:
            HessoError: naming the task.
        """
        manager = self._manager
        load = manager.load if hasattr(manager, "load") else manager.load_task_or_group  # of lm-eval's older releases
        for name in manager.match_tasks(self._names):
            try:
                load([name])
            except Exception as error:  # no connection, no right, code of the task's own: of any type
                said = f"{type(error).__name__}: {first_line(error)}"
                raise HessoError(f"`{self._argument}` ({name!r}) can't be loaded ({said}); leave it out") from error

    def scores(self, model: PreTrainedModel, tokenizer: Any) -> dict[str, dict[str, float | int]]:
        """Return the numbers of each task: values, and standard errors where lm-eval has some."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        wanted = self._num_fewshot
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self._batch_size),
            tasks=self._manager.match_tasks(self._names), num_fewshot=wanted, limit=self._limit,
            task_manager=self._manager,
        )  # fmt: skip
        for task, shots in results["n-shot"].items():
            if wanted is not None and shots != wanted:
                print(f"hesso-hf: {task} sets its own number of examples, {shots}: not {wanted}", file=sys.stderr)
        return {
            task: {key: value for key, value in scores.items() if isinstance(value, float | int)}
            for task, scores in results["results"].items()
        }
