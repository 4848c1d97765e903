"""Ranks decide alike: their states are compared by a checksum, and decisions come from rank 0."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers.utils import logging

from ..compat import default_store
from ..errors import HessoError

logger = logging.get_logger(__name__)

LONGEST_WORK = 12 * 3600.0  # seconds: a smaller model of any size is written in less
PATIENCE = 60.0  # seconds until the main process says that it waits
_LAST_WORK = 1.0  # seconds for gloo's threads to drop work that is done, when they can't be joined

_T = TypeVar("_T")
_meetings = itertools.count()  # all processes come to all of them, in the same order


def world_size() -> int:
    """Return the number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process' number, 0 without torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def check_agreement(values: torch.Tensor, salt: int = 0) -> None:
    """Compare a checksum of `values` (and a number) over all ranks.

    Raises:
        HessoError: on every rank, where they differ.
    """
    if world_size() == 1:
        return
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    positions = torch.arange(1, values.numel() + 1, device=values.device, dtype=dtype)
    checksum = (values.flatten().to(dtype) * positions).sum() + salt
    extremes = torch.stack([checksum, -checksum])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if bool(extremes[0] != -extremes[1]):
        raise HessoError("the processes disagree about which units are pruned; does every rank train the same model?")


def broadcast_decisions_(decisions: list[torch.Tensor]) -> None:
    """Overwrite decisions with rank 0's, in place, in one broadcast."""
    if world_size() == 1:
        return
    bits = torch.cat([decision.flatten().to(torch.uint8) for decision in decisions])
    dist.broadcast(bits, src=0)
    for decision, part in zip(decisions, bits.split([d.numel() for d in decisions]), strict=True):
        decision.copy_(part.view(decision.shape))


def broadcast_(tensors: list[torch.Tensor]) -> None:
    """Overwrite tensors with rank 0's."""
    for tensor in tensors if world_size() > 1 else ():
        dist.broadcast(tensor, src=0)


def summed_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks."""
    if world_size() > 1:
        meet()
        dist.all_reduce(values)
    return values


def meet() -> None:
    """Wait for all processes, however long one of them works: collectives give up after half an hour.

    Raises:
        HessoError: after so long that one must have been lost.
    """
    if world_size() == 1:
        return
    key, pause, waited, next_warning = f"hesso_meeting_{next(_meetings)}", 0.001, 0.0, PATIENCE
    store = default_store()
    here = store.add(key, 1)
    while here < world_size():
        if waited > next_warning and is_main_process():
            next_warning *= 4
            logger.warning(
                f"the main process has waited for {world_size() - here} of {world_size()} processes for {waited:.0f} "
                "s: saving and resuming take all. Is `save_model` called on each of them?"
            )
        if waited > LONGEST_WORK:
            raise HessoError(f"only {here} of {world_size()} processes came to the same point in {waited / 3600:.0f} h")
        time.sleep(pause)
        waited, pause = waited + pause, min(0.1, 2 * pause)
        here = store.add(key, 0)


def barrier() -> None:
    """Wait for all processes."""
    meet()
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    """Leave the other processes at the end of a script that went well.

    Without it a thread of gloo can outlive the interpreter, and the process aborts after its work is done. Whatever
    still refers to the group keeps the threads: a trainer's DDP, or a module imported after the group was made that
    has it as a default argument (DeepSpeed's). They are given a second to let go of the last work. Not for errors: the
    others may be waiting for this process, and it for them.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a trainer refers to itself, and DDP's reducer in it to the group, which would outlive this
        group = weakref.ref(dist.group.WORLD)
        dist.destroy_process_group()
        gc.collect()
        if group() is not None:
            time.sleep(_LAST_WORK)


def mean_over_ranks(value: float | torch.Tensor, device: torch.device) -> float:
    """Return the mean of a number over all ranks, the same on each."""
    if world_size() == 1:
        return float(value)
    shared = torch.as_tensor(value, device=device).detach().double().clone()
    dist.all_reduce(shared)
    return float(shared) / world_size()


def max_over_ranks(value: int, device: torch.device) -> int:
    """Return the largest of a number over all ranks."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def from_all(value: _T) -> list[_T]:
    """Return every process' value on every rank, in the ranks' order; all wait for it."""
    if world_size() == 1:
        return [value]
    meet()
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, value)
    return told


def common(values: set[_T]) -> set[_T]:
    """Return what all processes have; all wait for it."""
    return set.intersection(*from_all(values))


def from_main(value: _T | None) -> _T:
    """Return rank 0's value on every rank, where the others may have none; all wait for it."""
    shared: list[Any] = [value]
    meet()
    if world_size() > 1:
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


def on_all(work: Callable[[], _T], doing: str = "save the smaller model") -> _T:
    """Do something on every process; where one fails, all raise.

    Args:
        doing: what an error says that another process could not do.
    """
    result, failed = _tried(work)
    told = from_all(f"{type(failed).__name__}: {failed}" if failed else None)
    if failed is not None:
        raise failed
    others = [message for message in told if message is not None]
    if others:
        raise HessoError(f"another process could not {doing}: {others[0]}")
    return result


def all_or_none(work: Callable[[], _T], device: torch.device) -> _T:
    """Do a part of something that all processes do, where the next part is a collective; where one fails, all raise.

    Unlike `on_all` it takes one number from each as long as all goes well.

    Args:
        device: that the processes' collectives work on.
    """
    result, failed = _tried(work)
    if max_over_ranks(int(failed is not None), device):
        on_all(lambda: _raise(failed), "do its part")
    return result


def _tried(work: Callable[[], _T]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # the other processes must hear of any
        return None, error


def _raise(failed: Exception | None) -> None:
    if failed is not None:
        raise failed


def use_each(made: Iterable[_T], use: Callable[[_T], object]) -> None:
    """Use what all processes make together, one after the other; after an error go on making, as the others must."""
    failed: Exception | None = None
    for value in made:
        try:
            if failed is None:
                use(value)
        except Exception as error:  # a disk may be full
            failed = error
    if failed is not None:
        raise failed
