"""Whole forward passes, timed: what a smaller model takes of the full one's time, as a budget of latency counts it."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from ..distributed.collectives import from_main, is_main_process, on_all
from ..errors import BudgetError, HessoError, first_line
from ..hf_models.build import without_advice
from ..hf_models.resize import resized_config
from ..hf_models.sizes import VOCAB, get_size
from ..hf_models.tiny_model import inputs_of
from .latency import LatencyTable, wait_for
from .solver import MEETS, UNREACHABLE
from .target_sizes import TargetSizes

logger = logging.get_logger(__name__)

MOST_LOOKS = 4  # sizes that are timed before the nearest are taken
_REPEATS = 6
_AHEAD = 2.0  # times the seconds in which the host launches a pass, that the GPU is busy before it
_LONGEST_AHEAD = 0.05  # seconds: no pass takes longer to launch
_SIDE = 4096  # of matrices whose product keeps a GPU busy

Solve = Callable[[], list[TargetSizes]]  # by the table's prices


@dataclass
class ForwardTimes:
    """Times models of given sizes, with random weights, against the full one, in turns.

    On a GPU a pass counts without the time that its launches take, as where a graph of them is replayed.

    Attributes:
        tokens: of the one sequence that is read.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype
    tokens: int
    _full: PreTrainedModel | None = None
    _product: float = 0.0  # seconds of the one that keeps a GPU busy

    def check(self) -> None:
        """Refuse more tokens than the model reads, which a GPU can't recover from.

        Raises:
            HessoError: naming the context.
        """
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and self.tokens > context:
            raise HessoError(
                f"`latency_tokens` ({self.tokens}) is longer than the context of the model ({context} tokens); lower it"
            )

    def share(self, sizes: dict[str, int]) -> float | None:
        """Return the smaller model's time as a share of the full one's, None with a warning where a pass fails."""
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):  # a run's own numbers don't depend on how often was looked
                if self._full is None:
                    self._full = self._build(self.config)
                return self._share(self._full, self._build(resized_config(self.config, sizes)))
        except Exception as error:  # memory runs out, or the model reads more than tokens
            logger.warning(
                f"`budget_metric` ('latency'): a whole forward pass can't be timed ({type(error).__name__}: "
                f"{first_line(error)}), so the matrix products alone count"
            )
            return None

    def close(self) -> None:
        """Give back the memory."""
        self._full = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @without_advice()
    def _build(self, config: PretrainedConfig) -> PreTrainedModel:
        gc.collect()  # the model before it
        # the class itself: `from_config` would set the config's dtype, and divide the model where ZeRO-3 trains
        with torch.device(self.device), no_init_weights(), _default_dtype(self.dtype):
            model = self.model_class(copy.deepcopy(config)).eval()
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.02, 0.02)  # what is in unused memory may take longer to compute with
        return model

    def _share(self, full: PreTrainedModel, small: PreTrainedModel) -> float:
        times: list[tuple[float, float]] = []
        for _ in range(_REPEATS + 1):
            times.append((self.seconds(full), self.seconds(small)))
        before, after = (min(column) for column in zip(*times[1:], strict=True))  # the least disturbed ones
        return after / before

    def seconds(self, model: PreTrainedModel) -> float:
        """Time one pass of a model (seconds)."""
        vocabulary = get_size(self.config, VOCAB) or 1
        ids = torch.randint(0, vocabulary, (1, self.tokens), device=self.device)
        if self.device.type != "cuda":
            return _on_host(model, ids)
        with torch.cuda.device(self.device):
            self._product = self._product or _on_gpu(lambda: _multiply(self.device, 9), lambda: None) / 9
            launched = min(_AHEAD * _on_host(model, ids), _LONGEST_AHEAD)
            ahead = 1 + int(launched / self._product)
            return _on_gpu(lambda: _forward(model, ids), lambda: _multiply(self.device, ahead))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _on_gpu(work: Callable[[], None], before: Callable[[], None]) -> float:
    """Return the seconds that the current GPU works, launched while it is busy with something else."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _multiply(device: torch.device, times: int) -> None:
    """Keep a GPU busy with what takes little to launch."""
    matrix = torch.zeros(_SIDE, _SIDE, device=device, dtype=torch.float16)
    product = torch.empty_like(matrix)
    for _ in range(times):
        torch.mm(matrix, matrix, out=product)


def _on_host(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return the seconds of a forward pass, until its last operation is done."""
    wait_for(ids.device)
    started = time.perf_counter()
    _forward(model, ids)
    wait_for(ids.device)
    return time.perf_counter() - started


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(**inputs_of(model, ids))


def solve_by_time(solve: Solve, table: LatencyTable, times: ForwardTimes, ratio: float | None) -> list[TargetSizes]:
    """Find sizes that take `1 - ratio` of the full model's time, as whole passes are timed.

    Sizes are solved by the table's prices, timed, and what passes take beside the products is set so that the table
    prices these sizes as they were timed (the median of all that were); with that they are solved again. The nearest
    of them are taken.

    Args:
        solve: finds the target and the sizes on the way to it by the table's prices.
        ratio: None where the sizes are given, and are only timed.

    Raises:
        BudgetError: where no sizes come near the ratio.
    """
    looked: list[tuple[float, float, list[TargetSizes]]] = []
    beside: list[float] = []
    while len(looked) < MOST_LOOKS:
        try:
            found = solve()
        except BudgetError:  # by what was timed, unless it is the first
            if not looked or min(off for off, *_ in looked) > UNREACHABLE:
                raise
            break
        if any(found[0].sizes == earlier[0].sizes for *_, earlier in looked):
            break
        share = times.share(found[0].sizes)
        if share is None:
            table.beside = 0.0
            return solve()
        looked.append((abs(1 - share - ratio) if ratio is not None else 0.0, share, found))
        if looked[-1][0] <= MEETS:
            break
        table.fit(found[0].kept_units, share)
        beside.append(table.beside)
        table.beside = median(beside)
    off, share, nearest = min(looked, key=lambda item: item[0])
    table.fit(nearest[0].kept_units, share)
    full = float(table({}))
    if off > MEETS:
        _name_missed(ratio, off, nearest[0].sizes, share)
    on_the_way = [replace(rung, cost_before=full, cost_after=float(table(rung.kept_units))) for rung in nearest[1:]]
    return [replace(nearest[0], cost_before=full, cost_after=share * full), *on_the_way]


def solve_on_main(solve: Solve, table: LatencyTable, times: ForwardTimes, ratio: float | None) -> list[TargetSizes]:
    """Do what `solve_by_time` does on the main process, and give the others what it finds: no two time alike.

    Raises:
        HessoError: on all processes; a BudgetError on the main one where no sizes come near the ratio.
    """

    def timed() -> list[TargetSizes] | None:
        try:
            return solve_by_time(solve, table, times, ratio) if is_main_process() else None
        finally:
            times.close()

    return from_main(on_all(timed, "find sizes by their time"))


def _name_missed(ratio: float | None, off: float, sizes: dict[str, int], share: float) -> None:
    """Say what was timed where that isn't what was asked for; refuse it where it is far from that."""
    within = UNREACHABLE if off > UNREACHABLE else MEETS
    message = (
        f"`pruning_ratio` ({ratio}) of latency can't be met within {within:.0%}: of the sizes that were timed the "
        f"nearest save {1 - share:.1%}: {sizes}"
    )
    if off > UNREACHABLE:
        raise BudgetError(
            f"{message}. Choose another ratio, more structures or more `latency_tokens`, on a machine that does "
            "nothing else meanwhile"
        )
    logger.warning(f"{message}. These are taken.")
