"""Export under ZeRO: the smaller model is made from the fp32 masters, one parameter at a time.

Every parameter is put together on all processes, cut on the one that writes, and let go before the next. The trained
model's logits, which the smaller one's are compared with, come from a forward pass in fp32 that puts one layer together
at a time.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from ...compat import set_buffer, set_parameter
from ...distributed.collectives import use_each
from ...distributed.parts import named_parameters, whole
from ...export.decision import NOTHING_CUT, Decision
from ...export.parameters import ParameterSource, check_shape
from ...hf_models.tiny_model import logits_of
from ...structures.cut import build_cut, copy_buffers, cut_part, cuts_by_tensor, device_with_room
from ...structures.groups import KeptUnits, PruningGroups
from ...structures.layers import full_names
from .holdings import whole_fp32

_Owner = tuple[nn.Module, str, nn.Parameter]  # a module, and what is its parameter by that name


class ZeroSource(ParameterSource):
    """A model under ZeRO; the smaller one lies on the processes that write.

    Args:
        trained: the model, pruned units at zero.
        writes: whether this process holds and writes the smaller model; the others help to put parameters together.
    """

    def __init__(self, trained: PreTrainedModel, decision: Decision, writes: bool) -> None:
        super().__init__(_without_weights(trained, decision.groups), decision, trained.device, writes)
        self._trained = trained

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return those of a forward pass that puts one layer together at a time."""
        with _streamed(self.model, named_parameters(self._trained)), self.decision.routing(self.model):
            return logits_of(self.model, input_ids)

    def cut(self, kept: KeptUnits) -> PreTrainedModel | None:
        """Cut on the processes that write; the others help to put one parameter after the other together."""
        groups = self.decision.groups
        with contextlib.nullcontext() if self.main else init_empty_weights():  # refused sizes are refused on all
            small = build_cut(self._trained, groups, kept).float()
        parameters, cuts = dict(small.named_parameters()), cuts_by_tensor(groups, kept)
        wanted: dict[str, list[str]] = defaultdict(list)
        for name, origin in full_names(parameters, groups, kept).items():
            wanted[origin].append(name)

        def fill(found: tuple[str, torch.Tensor]) -> None:
            origin, values = found
            for name in wanted[origin]:
                left = cut_part(values, whole(values.shape), cuts.get(origin, ()))
                check_shape(name, left.shape, parameters[name].shape)
                parameters[name].data.copy_(left)

        made = ((name, whole_fp32(parameter)) for name, parameter in named_parameters(self._trained).items())
        use_each(made, fill if self.main else lambda _: None)
        if not self.main:
            return None
        small.to(device_with_room(self.device, 2 * 4 * sum(p.numel() for p in parameters.values())))  # type: ignore[arg-type]
        copy_buffers(small, self._trained, groups, kept)
        return small.eval()


def _without_weights(model: PreTrainedModel, groups: PruningGroups) -> PreTrainedModel:
    """Build the trained model anew in fp32, with its buffers and no weights."""
    with init_empty_weights(include_buffers=False):
        full = build_cut(model, groups, NOTHING_CUT).float()
    full.tie_weights()  # which making the parameters empty has undone
    for module in full.modules():
        for name, buffer in module.named_buffers(recurse=False):
            set_buffer(module, name, buffer.to(model.device))
    copy_buffers(full, model, groups, NOTHING_CUT)
    return full.eval()


@contextlib.contextmanager
def _streamed(full: PreTrainedModel, sources: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put each layer's weights together when it is called, and let them go after it; the rest stays meanwhile."""
    lists = [module for module in full.modules() if isinstance(module, nn.ModuleList)]
    within = {id(module) for outer in lists for child in outer for module in child.modules()}
    blocks = [child for outer in lists if id(outer) not in within for child in outer]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    empty = {id(parameter): name for name, parameter in full.named_parameters()}

    def fill(owners: list[_Owner]) -> None:
        made: dict[int, nn.Parameter] = {}
        for module, leaf, parameter in owners:
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(whole_fp32(sources[empty[id(parameter)]]), requires_grad=False)
            set_parameter(module, leaf, made[id(parameter)])

    def let_go(owners: list[_Owner]) -> None:
        for module, leaf, parameter in owners:
            set_parameter(module, leaf, parameter)

    every = _owners(full)
    with contextlib.ExitStack() as stack:
        stack.callback(let_go, every)
        for block in blocks:
            own = _owners(block)
            stack.callback(block.register_forward_pre_hook(lambda *_, own=own: fill(own)).remove)
            stack.callback(block.register_forward_hook(lambda *_, own=own: let_go(own)).remove)
        fill([owner for owner in every if id(owner[2]) not in inside])
        yield


def _owners(module: nn.Module) -> list[_Owner]:
    return [(part, leaf, p) for part in module.modules() for leaf, p in part.named_parameters(recurse=False)]


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Let `from_pretrained` load a whole model, which ZeRO-3's config would have it shard over all processes."""
    config = hf_deepspeed.deepspeed_config()
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref() if config is not None else None  # type: ignore[misc]
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            hf_deepspeed.set_hf_deepspeed_config(kept)
