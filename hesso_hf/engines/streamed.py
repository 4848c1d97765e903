"""A forward pass of a model that no process has whole: one layer is put together at a time, on the main process.

The main process computes and tells which parameters it takes next, and all put those together. So where it runs out of
memory, or anything else fails, none of the others waits for it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..compat import set_buffer, set_parameter
from ..distributed.collectives import from_all, from_main, is_main_process, on_all, use_each
from ..export.parameters import Routing
from ..hf_models.tiny_model import logits_of
from ..structures.cut import build_cut, copy_buffers
from ..structures.groups import KeptUnits, PruningGroups

logger = logging.get_logger(__name__)

Whole = Callable[[nn.Parameter], torch.Tensor]  # puts a parameter together on all processes, or raises on all
_Owner = tuple[nn.Module, str, nn.Parameter]  # a module, and what is its parameter by that name


def without_weights(model: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> PreTrainedModel:
    """Build a model's class anew in fp32, with the kept units' sizes, the model's buffers and no weights."""
    with init_empty_weights(include_buffers=False):
        full = build_cut(model, groups, kept).float()
    full.tie_weights()  # which making the parameters empty has undone
    _put_buffers(full, model.device)
    copy_buffers(full, model, groups, kept)
    return full.eval()


def streamed(
    full: PreTrainedModel,
    sources: Mapping[str, nn.Parameter],
    whole: Whole,
    input_ids: torch.Tensor,
    routing: Routing,
) -> torch.Tensor:
    """Return a model's logits, on the CPU; where the device of `input_ids` has no room, the CPU computes.

    Args:
        full: as `without_weights` makes it; the main process computes with it.
        sources: the parameters by the names that they have in `full`.
        routing: of a model, what its forward pass is done in.

    Raises:
        Exception: on all processes, where one fails.
    """
    try:
        return _streamed_on(full, sources, whole, input_ids, routing)
    except Exception as error:  # all processes have one, of whatever type
        if not any(from_all(isinstance(error, torch.OutOfMemoryError))):
            raise
        error.__traceback__ = None  # whose frames hold layers
    gc.collect()
    logger.warning(f"{input_ids.device} has no room for a layer in fp32: its logits are computed on the CPU")
    return _streamed_on(full, sources, whole, input_ids.cpu(), routing)


def _streamed_on(
    full: PreTrainedModel,
    sources: Mapping[str, nn.Parameter],
    whole: Whole,
    input_ids: torch.Tensor,
    routing: Routing,
) -> torch.Tensor:
    def lead() -> torch.Tensor:
        try:
            with _filled_in_time(full, sources, whole, input_ids.device), routing(full):
                return logits_of(full, input_ids).cpu()
        finally:
            _told()

    def follow() -> None:
        failed: Exception | None = None
        while names := _told():
            try:
                for name in names:
                    whole(sources[name])
            except Exception as error:  # the main process has one too, and says that it is over
                failed = error
        if failed is not None:
            raise failed

    result: torch.Tensor | None = on_all(lead if is_main_process() else follow, "compute logits")
    return from_main(result)


@contextlib.contextmanager
def _filled_in_time(
    full: PreTrainedModel, sources: Mapping[str, nn.Parameter], whole: Whole, place: torch.device
) -> Iterator[None]:
    """Put each layer's weights together when it is called, and let them go after it; the rest stays meanwhile."""
    lists = [module for module in full.modules() if isinstance(module, nn.ModuleList)]
    within = {id(module) for outer in lists for child in outer for module in child.modules()}
    blocks = [child for outer in lists if id(outer) not in within for child in outer]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    empty = {id(parameter): name for name, parameter in full.named_parameters()}

    def fill(owners: list[_Owner]) -> None:
        names = list(dict.fromkeys(empty[id(parameter)] for *_, parameter in owners))
        if not names:  # which would say that it is over
            return
        _told(names)
        made: dict[str, nn.Parameter] = {}

        def keep(found: tuple[str, torch.Tensor]) -> None:
            made[found[0]] = nn.Parameter(found[1].to(place), requires_grad=False)

        use_each(((name, whole(sources[name])) for name in names), keep)
        for module, leaf, parameter in owners:
            set_parameter(module, leaf, made[empty[id(parameter)]])

    def let_go(owners: list[_Owner]) -> None:
        for module, leaf, parameter in owners:
            set_parameter(module, leaf, parameter)

    every = _owners(full)
    with contextlib.ExitStack() as stack:
        _put_buffers(full, place)
        stack.callback(let_go, every)
        for block in blocks:
            own = _owners(block)
            stack.callback(block.register_forward_pre_hook(lambda *_, own=own: fill(own)).remove)
            stack.callback(block.register_forward_hook(lambda *_, own=own: let_go(own)).remove)
        fill([owner for owner in every if id(owner[2]) not in inside])
        yield


def _owners(module: nn.Module) -> list[_Owner]:
    return [(part, leaf, p) for part in module.modules() for leaf, p in part.named_parameters(recurse=False)]


def _told(names: list[str] | None = None) -> list[str]:
    """Tell, or on the other processes hear, which parameters come next; none when it is over."""
    return from_main(names or [])


def _put_buffers(model: PreTrainedModel, place: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            set_buffer(module, name, buffer.to(place))
