"""`HessoOptimizer`: HESSO around the step of any torch optimizer, which it never reimplements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers.utils import logging

from ..errors import CheckpointMismatchError, HessoError, TrainingDivergedError
from .process import PruningProcess

logger = logging.get_logger(__name__)

MAX_SKIPPED_STEPS = 3  # non-finite gradients in a row


class HessoOptimizer(Optimizer):
    """Train with `base` and drive the redundant groups of `process` to zero (algorithm 1 of arXiv 2409.09085).

    The gradient that is scored is the one that stands in `.grad` when `observe_gradients` or, where nobody calls that,
    `step` begins: a caller that clips calls it before clipping.

    Args:
        base: any torch optimizer over the model's parameters.
        process: the pruning state, bound to the same parameters.

    Raises:
        HessoError: for an optimizer that evaluates the loss inside its step (LBFGS) or acts in backward hooks.
        TrainingDivergedError: from `step`, when several gradients in a row were not finite.
    """

    def __init__(self, base: Optimizer, process: PruningProcess) -> None:
        check_wrappable(base)
        self.base, self.process = base, process
        state = base.state
        super().__init__(base.param_groups, base.defaults)  # also lands in `base`: both share groups and state
        base.state = state
        self.seconds = 0.0  # spent in HESSO, all steps together; on a GPU the time to enqueue
        self._observed = False
        self._gradient_norm: float | torch.Tensor | None = None
        self._skips = Skips()
        self._awaits_state = False
        for mode in ("train", "eval"):  # schedule-free optimizers keep other weights for evaluation
            if callable(getattr(base, mode, None)):
                setattr(self, mode, getattr(base, mode))

    @property
    def state(self) -> Any:  # type: ignore[override]
        """State of the base optimizer."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Parameter groups of the base optimizer."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Take this step's raw gradients for the saliency; call it after unscaling and before clipping."""
        started = time.perf_counter()
        self.process.observe_gradients()
        self._observed = True
        self._gradient_norm = None
        self.seconds += time.perf_counter() - started

    def report_gradient_norm(self, norm: float | torch.Tensor) -> None:
        """Tell the norm of this step's gradient over all processes, so that `step` needn't compute it."""
        self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def report_loss(self, loss: float | torch.Tensor) -> None:
        """Tell the loss of the coming step, so that a collapse is noticed (`collapse_threshold`)."""
        self.process.report_loss(loss.detach() if isinstance(loss, torch.Tensor) else loss)

    def probe(self, losses: Sequence[Callable[[], torch.Tensor]], loss_scale: float = 1.0) -> None:
        """Let CRIC look along the way to zero without training steps (`cric_mode="probe"`), before a step.

        Does nothing where `process.wants_probe` is false. Weights are as before afterwards; gradients are cleared.

        Args:
            losses: each computes the loss of one batch; the same few batches serve at every point of the way.
            loss_scale: what the losses were multiplied by, in float16.

        Raises:
            HessoError: for no losses, or a gradient that isn't finite.
        """
        if not self.process.wants_probe:
            return
        if not losses:
            raise HessoError("`losses` ([]) of probe(): give at least one function that computes a batch's loss")
        started = time.perf_counter()
        self.zero_grad()
        try:
            self.process.probe(losses, loss_scale)
        finally:
            self.zero_grad()
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of the base optimizer and of HESSO; a non-finite gradient skips both, with a warning."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self.report_loss(loss)
        if not self._observed:
            if self._only_makes_state():
                self.base.step()
                return loss
            self.observe_gradients()
        self._observed = False
        if self._awaits_state:
            raise CheckpointMismatchError(
                "the base optimizer's state was loaded, but not the pruning state: call "
                "`load_pruning_state(optimizer, model, folder)` before training goes on"
            )
        if not self._gradient_is_finite():
            return loss
        started = time.perf_counter()
        self.process.before_step(self.base)
        before_base = time.perf_counter()
        self.base.step()
        after_base = time.perf_counter()
        self.process.after_step(self.base)
        self.seconds += time.perf_counter() - after_base + before_base - started
        return loss

    def _only_makes_state(self) -> bool:
        """Whether a step is torch's own (before it loads or saves distributed state), which only makes empty state."""
        if not self.process.bound.sharded or self.base.state:
            return False
        if any(float(group.get("lr", 1.0)) for group in self.param_groups):
            return False
        return float(self._norm_of_gradients()) == 0.0

    def _norm_of_gradients(self) -> float | torch.Tensor:
        """Return the L2 norm of all gradients together, over all processes where they are sharded."""
        found = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(found) if found else 0.0
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _gradient_is_finite(self) -> bool:
        norm = self.process.fetch_loss_with(
            self._norm_of_gradients() if self._gradient_norm is None else self._gradient_norm
        )
        self._gradient_norm = None
        if math.isfinite(norm):
            self._skips.reset()
            return True
        self._skips.count(self.process.step, norm)
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base optimizer."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state with HESSO's under `hesso`.

        Where parameters are sharded, the pruning state isn't in it: `save_pruning_state` writes it.
        """
        if self.process.bound.sharded:
            return self.base.state_dict()
        return {**self.base.state_dict(), "hesso": self.process.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            CheckpointMismatchError: where there is no pruning state in it, or one of another model or budget.
        """
        state = dict(state_dict)
        pruning = state.pop("hesso", None)
        if pruning is None and self.process.bound.sharded:
            self.base.load_state_dict(state)
            self._awaits_state = True
            return
        if pruning is None:
            raise CheckpointMismatchError(
                "the checkpoint holds no pruning state: it was made without HessoOptimizer; "
                "load its weights as the model and start a new run"
            )
        self.process.check_state_dict(pruning)
        try:
            self.base.load_state_dict(state)
        except (ValueError, KeyError) as error:  # what torch raises for other parameter groups
            raise CheckpointMismatchError(
                f"{error}: the checkpoint's optimizer state doesn't fit this model"
            ) from error
        self.process.load_state_dict(pruning, self.base)

    def load_pruning_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved pruning state; the base optimizer's own is loaded already.

        Raises:
            CheckpointMismatchError: where it belongs to another model, budget or config.
        """
        self.process.load_state_dict(state, self.base)
        self._awaits_state = False

    def __repr__(self) -> str:
        return f"HessoOptimizer({self.base!r})"


class Skips:
    """Counts steps in a row that are skipped since their gradient isn't finite."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def reset(self) -> None:
        """A step was made."""
        self._in_a_row = 0

    def count(self, step: int, norm: float, searching: bool = False) -> None:
        """Warn of a skipped step.

        Args:
            searching: whether a loss scale is lowered with each, which the engine ends by itself.

        Raises:
            TrainingDivergedError: for too many in a row.
        """
        self._in_a_row += 1
        logger.warning(
            f"step {step}: the gradient's norm is {norm}; the step is skipped, base optimizer and pruning alike "
            f"({self._in_a_row} in a row)"
        )
        if self._in_a_row >= MAX_SKIPPED_STEPS and not searching:
            raise TrainingDivergedError(
                f"{self._in_a_row} steps in a row had a gradient norm of {norm} at step {step}; lower the learning "
                "rate, clip the gradients or check the data"
            )


def check_wrappable(base: Optimizer) -> None:
    """Refuse an optimizer whose step isn't the place where the weights change.

    Raises:
        HessoError: for one that evaluates the loss inside its step (LBFGS) or acts in backward hooks.
    """
    if isinstance(base, torch.optim.LBFGS):
        raise HessoError("`optimizer` (LBFGS) evaluates the loss inside its step; use one that steps once per gradient")
    if type(base).__name__ in ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo"):
        raise HessoError(
            f"`optim` ({type(base).__name__}) updates weights in backward hooks, before HESSO can see the gradient; "
            "use one that does it in its step (of GaLore and APOLLO the variant that isn't layer-wise)"
        )
