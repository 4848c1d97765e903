"""A dense model that is saved as one: its config says so, and `save_pretrained` of the model in memory warns."""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

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
    """

    def __init__(self, run: PruningRun) -> None:
        self._owner, self._base, self._run = weakref.ref(run.whole), weakref.ref(run.model), weakref.ref(run)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner(), "save_pretrained")  # the class' own: what is being copied has no other yet

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save; the trainer's own saving, which marks the config, says itself what it saves."""
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


def warn_where_saved(run: PruningRun) -> None:
    """Have `save_pretrained` of a run's model warn while its pruned units are at zero."""
    vars(run.model.config).pop(MARK, None)  # of a checkpoint that is the base of this run
    setattr(run.whole, "save_pretrained", WarningSave(run))  # noqa: B010 - not what a type checker takes for a method
