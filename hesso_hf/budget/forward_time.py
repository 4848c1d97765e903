"""Whole forward passes, timed: what a smaller model takes of the full one's time, as a budget of latency counts it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from ..compat import build_model
from ..errors import first_line
from ..hf_models.build import without_advice
from ..hf_models.resize import resized_config
from ..hf_models.sizes import VOCAB, get_size
from ..hf_models.tiny_model import without_cache
from .latency import LatencyTable
from .solver import TargetSizes

logger = logging.get_logger(__name__)

MOST_LOOKS = 4  # sizes that are timed before the nearest are taken
NEAR = 0.01  # of the full model's time: sizes this near to the ratio end the search
FAR = 0.05  # of the full model's time: the nearest sizes farther off are named in a warning
_REPEATS = 6
_AHEAD = 2.0  # times the seconds in which the host launches a pass, that the GPU is busy before it
_SIDE = 4096  # of matrices whose product keeps a GPU busy
_PRODUCT = 1e-4  # seconds that their product takes at the least: 1.4e15 operations per second

Solve = Callable[[bool], list[TargetSizes]]  # by the table's prices; the flag: whether it warns


@dataclass
class ForwardTimes:
    """Times models of given sizes, with random weights, against the full one, in turns.

    On a GPU a pass counts without the time that its launches take, as where a graph of them is replayed.

    Attributes:
        tokens: of the one sequence that is read.
        warns: where a pass fails.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype
    tokens: int
    warns: bool = True
    _full: PreTrainedModel | None = None

    def share(self, sizes: dict[str, int]) -> float | None:
        """Return the smaller model's time as a share of the full one's, None where a pass fails."""
        try:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):  # a run's own numbers don't depend on how often was looked
                if self._full is None:
                    self._full = self._build(self.config)
                return self._share(self._full, self._build(resized_config(self.config, sizes)))
        except Exception as error:  # memory runs out, or the model reads more than tokens
            if self.warns:
                logger.warning(
                    f"`budget_metric` ('latency'): a whole forward pass can't be timed ({type(error).__name__}: "
                    f"{first_line(error)}), so the matrix products alone count"
                )
            return None

    @without_advice()
    def _build(self, config: PretrainedConfig) -> PreTrainedModel:
        gc.collect()  # the model before it
        with torch.device(self.device), no_init_weights():
            model = build_model(self.model_class, config, self.dtype).eval()
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
        launched = _on_host(model, ids)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _keep_busy(self.device, _AHEAD * launched)  # the launches get ahead meanwhile
        start.record()
        _forward(model, ids)
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3


def _keep_busy(device: torch.device, seconds: float) -> None:
    """Give a GPU work for that long or longer; launching it takes little."""
    matrix = torch.zeros(_SIDE, _SIDE, device=device, dtype=torch.float16)
    product = torch.empty_like(matrix)
    for _ in range(1 + int(seconds / _PRODUCT)):
        torch.mm(matrix, matrix, out=product)


def _on_host(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Return the seconds of a forward pass, until its last operation is done."""
    started = time.perf_counter()
    _forward(model, ids)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - started


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    model(**inputs, **without_cache(model))


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
    for look in range(MOST_LOOKS):
        found = solve(not look)
        if any(found[0].sizes == earlier[0].sizes for *_, earlier in looked):
            break
        share = times.share(found[0].sizes)
        if share is None:
            table.beside = 0.0
            return solve(False) if look else found
        looked.append((abs(1 - share - ratio) if ratio is not None else 0.0, share, found))
        if looked[-1][0] <= NEAR:
            break
        table.fit(found[0].kept_units, share)
        beside.append(table.beside)
        table.beside = median(beside)
    off, share, nearest = min(looked, key=lambda item: item[0])
    table.fit(nearest[0].kept_units, share)
    if off > FAR:
        logger.warning(
            f"`pruning_ratio` ({ratio}) of latency: the nearest sizes that were timed take {1 - share:.1%} less time "
            f"than the full model: {nearest[0].sizes}"
        )
    full = float(table({}))
    return [replace(t, cost_before=full, cost_after=float(table(t.kept_units))) for t in nearest]
