"""A dense model that is saved as one: its config says so, and `save_pretrained` of the model in memory warns.

Nor does that replace the base model unasked.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from ..errors import HessoError
from ..export.storage import check_not_base
from ..pruning.process import PruningProcess
from ..structures.cut import MARK

if TYPE_CHECKING:
    from .run import PruningRun

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def marked_dense(model: PreTrainedModel, process: PruningProcess | None) -> Iterator[None]:
    """Have what is saved of a model's config meanwhile say that the model isn't the smaller one, where it isn't."""
    config: PretrainedConfig = model.config
    if process is not None and process.state.compaction is not None:
        yield
        return
    before = vars(config).get(MARK)
    setattr(config, MARK, {"holds": "dense", "smaller": "hesso-hf export THIS_FOLDER small"})
    try:
        yield
    finally:
        vars(config).pop(MARK)
        if before is not None:
            setattr(config, MARK, before)


class WarningSave:
    """Stands for `save_pretrained` of the model that a trainer prunes, and warns where it writes the dense one.

    It knows the model weakly, and in copies and pickles of the model there is the class' own method.

    Args:
        run: whose model it is; without it, once the trainer is gone, nothing tells that no unit is at zero.
        overwrite_base: whether it may replace the base model, which an adapter that lies beside it doesn't.
    """

    def __init__(self, run: PruningRun, overwrite_base: bool) -> None:
        self._owner, self._base, self._run = weakref.ref(run.whole), weakref.ref(run.model), weakref.ref(run)
        self._spared = None if overwrite_base or run.whole is not run.model else run.base_folder

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner(), "save_pretrained")  # the class' own: what is being copied has no other yet

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save; the trainer's own saving, which marks the config, says itself what it saves.

        Raises:
            HessoError: where it would replace the base model.
        """
        folder = args[0] if args else kwargs.get("save_directory")
        if folder is not None:
            check_not_base(Path(folder), self._spared, asked=False)
        owner, base, run = self._owner(), self._base(), self._run()
        plain = types.MethodType(type(cast(Any, owner)).save_pretrained, owner)
        process = None if run is None else run.process
        if base is None or MARK in vars(base.config) or (process is not None and not _is_masked(process)):
            return plain(*args, **kwargs)
        logger.warning(
            "`save_pretrained` writes the dense model, its pruned units at zero: `trainer.save_model(folder)` writes "
            "the smaller one, `trainer.pruned_model()` returns it, and `hesso-hf export` makes it of a checkpoint"
        )
        with marked_dense(base, process):
            return plain(*args, **kwargs)


def _is_masked(process: PruningProcess) -> bool:
    """Whether there are pruned units in the model."""
    return process.state.compaction is None and any(bool((scales == 0).any()) for scales in process.scales.values())


def warn_where_saved(run: PruningRun, overwrite_base: bool) -> None:
    """Have `save_pretrained` of a run's model warn while its pruned units are at zero, and spare the base model."""
    vars(run.model.config).pop(MARK, None)  # of a checkpoint that is the base of this run
    guarded = WarningSave(run, overwrite_base)
    setattr(run.whole, "save_pretrained", guarded)  # noqa: B010 - not what a type checker takes for a method


def check_checkpoints_spare(
    base: Path | None, training: TrainingArguments, asked: bool, resumed: Path | None = None
) -> None:
    """Refuse to write checkpoints beside a base model that is one of them, which may replace it or let it go.

    Args:
        base: the folder that it was read from, None where that is no folder.
        asked: that it be replaced.
        resumed: the checkpoint that the run goes on from, which may be the base.

    Raises:
        HessoError: naming the folder.
    """
    output_dir = Path(training.output_dir or "")
    written = training.save_strategy != SaveStrategy.NO
    if base is None or asked or not written or not base.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        return
    if resumed is not None and resumed.samefile(base):
        return
    if output_dir.exists() and base.parent.exists() and base.parent.samefile(output_dir):
        raise HessoError(
            f"`output_dir` ({str(output_dir)!r}) is where the base model lies, as {base.name}, which this run's "
            "checkpoints would replace or `save_total_limit` remove: name another folder, or say that this is meant by "
            "`HessoConfig(overwrite_base=True)`"
        )
