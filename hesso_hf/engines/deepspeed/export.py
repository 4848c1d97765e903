"""Export under ZeRO: the smaller model is made from the fp32 masters, one parameter at a time.

Every parameter is put together on all processes, cut on the one that writes, and let go before the next. The trained
model's logits, which the smaller one's are compared with, come from a forward pass in fp32 that puts one layer together
at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations import deepspeed as hf_deepspeed

from ...distributed.collectives import on_all
from ...distributed.parts import named_parameters, whole
from ...export.decision import NOTHING_CUT, Decision
from ...export.parameters import ParameterSource, check_shape
from ...export.report import PruningReport
from ...export.write import DTYPES, Output, write_pruned
from ...hf_models.tiny_model import logits_of
from ...structures.cut import build_cut, copy_buffers, cut_part, cuts_by_tensor, device_with_room
from ...structures.groups import KeptUnits, PruningGroups
from ...structures.layers import full_names
from .holdings import whole_fp32


def export_zero(
    model: PreTrainedModel,
    output_dir: Path,
    *,
    kept_units: KeptUnits,
    groups: PruningGroups,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    dtype: str | None,
    training: Mapping[str, Any],
    writes: bool,
    max_shard_size: str = "5GB",
) -> PruningReport:
    """Write the smaller model of one that ZeRO trains; all processes call it. Raises as `write_pruned` does.

    Args:
        writes: whether this process writes files; the others take part in putting parameters together.
    """
    output = Output(output_dir, DTYPES[dtype] if dtype else model.dtype, tokenizer, max_shard_size)
    with _loading_whole():
        source = on_all(lambda: ZeroSource(model, Decision(groups, kept_units), writes))
        return write_pruned(source, output, training)


class ZeroSource(ParameterSource):
    """A model under ZeRO; the smaller one lies on the processes that write.

    Args:
        trained: the model, pruned units at zero.
        writes: whether this process holds the smaller model.
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
        wanted: dict[str, list[str]] = {}
        for name, origin in full_names(parameters, groups, kept).items():
            wanted.setdefault(origin, []).append(name)

        def fill(origin: str, values: torch.Tensor) -> None:
            for name in wanted.get(origin, ()):
                left = cut_part(values, whole(values.shape), cuts.get(origin, ()))
                check_shape(name, left.shape, parameters[name].shape)
                parameters[name].data.copy_(left)

        _put_together(named_parameters(self._trained), fill if self.main else lambda *_: None)
        if not self.main:
            return None
        small.to(device_with_room(self.device, 2 * 4 * sum(p.numel() for p in parameters.values())))  # type: ignore[arg-type]
        copy_buffers(small, self._trained, groups, kept)
        return small.eval()


def _put_together(parameters: Mapping[str, nn.Parameter], use: Callable[[str, torch.Tensor], None]) -> None:
    """Hand each parameter on as a whole; after an error go on, since the others can't without this process."""
    failed: Exception | None = None
    for name, parameter in parameters.items():
        values = whole_fp32(parameter)
        try:
            if failed is None:
                use(name, values)
        except Exception as error:
            failed = error
    if failed is not None:
        raise failed


def _without_weights(model: PreTrainedModel, groups: PruningGroups) -> PreTrainedModel:
    """Build the trained model anew in fp32, with its buffers and no weights."""
    with init_empty_weights(include_buffers=False):
        full = build_cut(model, groups, NOTHING_CUT).float()
    full.tie_weights()  # which making the parameters empty has undone
    for module in full.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(model.device)
    copy_buffers(full, model, groups, NOTHING_CUT)
    return full.eval()


@contextlib.contextmanager
def _streamed(full: PreTrainedModel, sources: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put each layer's weights together when it is called, and let them go after it; the rest stays meanwhile."""
    blocks = [child for _, lists in _outermost_lists(full) for child in lists]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    empty = {id(parameter): name for name, parameter in full.named_parameters()}
    owners = [(m, leaf, p) for m in full.modules() for leaf, p in m.named_parameters(recurse=False)]
    handles: list[Any] = []

    def fill(module: nn.Module, chosen: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        made: dict[int, nn.Parameter] = {}
        for owner, leaf, parameter in chosen:
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(whole_fp32(sources[empty[id(parameter)]]), requires_grad=False)
            owner._parameters[leaf] = made[id(parameter)]

    def let_go(chosen: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        for owner, leaf, parameter in chosen:
            owner._parameters[leaf] = parameter

    rest = [entry for entry in owners if id(entry[2]) not in inside]
    try:
        for block in blocks:
            members = {id(module) for module in block.modules()}
            own = [entry for entry in owners if id(entry[0]) in members]
            handles.append(block.register_forward_pre_hook(lambda module, _, own=own: fill(module, own)))
            handles.append(block.register_forward_hook(lambda *_, own=own: let_go(own)))
        fill(full, rest)
        yield
    finally:
        for handle in handles:
            handle.remove()
        let_go(owners)


def _outermost_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return [(n, m) for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)]


@contextlib.contextmanager
def _loading_whole() -> Iterator[None]:
    """Let `from_pretrained` load a whole model, which ZeRO-3's config would have it shard over all processes."""
    config = hf_deepspeed.deepspeed_config()
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref() if config is not None else None  # type: ignore[misc]
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            hf_deepspeed.set_hf_deepspeed_config(kept)
