"""HESSO around the steps of DeepSpeed's ZeRO optimizer, which calls the base optimizer once a parameter group.

DeepSpeed's step decides whether a gradient is finite, clips it, calls the base optimizer for one flat vector after the
other, and gathers the weights. HESSO looks at the gradient before that, and acts on the masters right before the first
and right after the last of these calls, so that what it changes is gathered with the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...errors import HessoError
from ...pruning.optimizer import Skips
from ...pruning.process import PruningProcess
from .holdings import ZeroHoldings, masters_of


class ZeroSteps:
    """Drives pruning where ZeRO trains: what `HessoOptimizer` is elsewhere.

    Args:
        process: the pruning state.
        noted: counts a micro-batch's loss and returns what the early warning watches.

    Attributes:
        seconds: spent in HESSO, all steps together; on a GPU the time to enqueue.
        holdings: how ZeRO's processes share the parameters, once `attach` has made it.
    """

    def __init__(self, process: PruningProcess, noted: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.process, self.seconds = process, 0.0
        self._noted = noted
        self._skips = Skips()
        self._loss: torch.Tensor | None = None
        self._calls = 0
        self._stepped = False

    @property
    def attached(self) -> bool:
        """Whether DeepSpeed's engine has been made and taken."""
        return hasattr(self, "base")

    def attach(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put HESSO around an engine's steps.

        Args:
            engine: DeepSpeed's.
            parameters: the model's, by name.

        Raises:
            HessoError: where the engine has no ZeRO optimizer over all processes.
        """
        self._zero = engine.optimizer
        if not hasattr(self._zero, "optimizer") or not hasattr(self._zero, "loss_scale"):
            raise HessoError(
                f"DeepSpeed trains with {type(self._zero).__name__}, not with ZeRO; set `zero_optimization.stage` to "
                "1, 2 or 3 in its config"
            )
        self.base: Optimizer = self._zero.optimizer
        self._hooks = (
            self.base.register_step_pre_hook(lambda *_: self._before_call()),
            self.base.register_step_post_hook(lambda *_: self._after_call()),
        )
        self._masters = _Masters(self.base)
        plain_step, plain_backward = self._zero.step, engine.backward
        self._zero.step = lambda *args, **kwargs: self._step(plain_step, *args, **kwargs)
        engine.backward = lambda loss, *args, **kwargs: self._backward(plain_backward, loss, *args, **kwargs)
        if hasattr(self._zero, "check_grad_overflow"):
            self._zero.check_grad_overflow = True  # a step on a gradient that isn't finite is skipped in bfloat16 too
        self.holdings = ZeroHoldings(self._zero)
        bound = self.process.bound
        take = bound.bind if self.process.state.compaction is None else bound.let_go
        take(parameters, lambda _: self.holdings)

    def detach(self) -> None:
        """Let an engine go, which is to make room for one that trains a smaller model."""
        for hook in self._hooks:
            hook.remove()
        del self._zero, self.base, self._masters, self.holdings

    # -- steps ----------------------------------------------------------------------------------------------------

    def _backward(self, plain: Callable[..., Any], loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        noted = self._noted(loss.detach())
        self._loss = noted if self._loss is None else self._loss + noted
        return plain(loss, *args, **kwargs)

    def _step(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        if self._loss is not None:
            self.process.report_loss(self._loss)
            self._loss = None
        self.process.observe_gradients()
        self._masters.refresh()
        self.seconds += time.perf_counter() - started
        self._calls, self._stepped, self.holdings.stepping = 0, False, True
        try:
            result = plain(*args, **kwargs)
        finally:
            self.holdings.stepping = False
        if self._stepped:
            self._skips.reset()
        elif self._zero.overflow:
            self._skips.count(self.process.step, float("inf"), searching=bool(self._zero.dynamic_loss_scale))
        else:
            raise HessoError(
                f"DeepSpeed's step called {type(self.base).__name__} {self._calls} times for {self._vectors} vectors; "
                "this way of stepping isn't supported: leave out ZenFlow and `torch_autocast`"
            )
        return result

    @property
    def _vectors(self) -> int:
        return len(masters_of(self._zero))

    @torch.no_grad()
    def _before_call(self) -> None:
        if not self._calls:
            started = time.perf_counter()
            self.process.before_step(self._masters)
            self.seconds += time.perf_counter() - started
        self._calls += 1

    @torch.no_grad()
    def _after_call(self) -> None:
        if self._calls == self._vectors:
            started = time.perf_counter()
            self.process.after_step(self._masters)
            self._stepped = True
            self.seconds += time.perf_counter() - started

    def load_pruning_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved pruning state; DeepSpeed has loaded its own already.

        Raises:
            CheckpointMismatchError: where it belongs to another model, budget or config.
        """
        self._masters.refresh()
        self.process.load_state_dict(state, self._masters)


class _Masters(Optimizer):
    """The base optimizer's state and all of its groups: in its step DeepSpeed shows it one group at a time."""

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self.refresh()

    def refresh(self) -> None:
        """Take the groups, outside of a step: loading replaces them."""
        self.param_groups = list(self._base.param_groups)

    @property
    def state(self) -> Any:  # type: ignore[override]
        """State of the base optimizer."""
        return self._base.state
