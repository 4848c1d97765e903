"""Norms: what the vectors along a structure's axes do, found by trying the modules that own them.

A norm's weight may be used as w or as 1 + w, a bias is added, and a norm that subtracts the mean over all channels
counts zeroed ones too; everything else of the shape of a vector is taken as it is.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ...hf_models.tiny_model import SEED, forward_logits
from ..shape_probe import ParameterInfo

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class VectorRole:
    """What a one-dimensional parameter does.

    Attributes:
        kind: `scale` of a norm, `offset` of a norm, or `other`.
        shift: what the model adds to the stored value of a scale (1 where 1 + w is used).
        subtracts_mean: whether the norm subtracts the mean over all channels.
    """

    kind: Literal["scale", "offset", "other"]
    shift: float = 0.0
    subtracts_mean: bool = False


OTHER = VectorRole("other")


@torch.no_grad()
def vector_role(info: ParameterInfo, module: nn.Module) -> VectorRole:
    """Try a copy of the module that owns a vector on random hidden states; what can't be tried so is `other`."""
    if info.role != "norm":
        return OTHER
    norm, leaf = copy.deepcopy(module).float(), info.name.rpartition(".")[2]
    probe = torch.randn(2, 3, info.shape[0], generator=torch.Generator().manual_seed(SEED))
    try:
        before = norm(probe)
        if not isinstance(before, torch.Tensor) or before.shape != probe.shape:
            return OTHER
        vector = norm.get_parameter(leaf)
        subtracts = _subtracts_mean(norm, probe)
        vector.add_(1.0)
        added = norm(probe) - before
        if bool((added - 1.0).abs().max() < 1e-4):
            return VectorRole("offset", 0.0, subtracts)
        for name, other in norm.named_parameters(recurse=False):
            if name != leaf:
                other.zero_()
        for stored, shift in ((0.0, 0.0), (-1.0, 1.0)):
            vector.fill_(stored)
            if not norm(probe).any():
                return VectorRole("scale", shift, subtracts)
    except Exception:  # a module that needs more than hidden states is no norm of them
        return OTHER
    return OTHER


@torch.no_grad()
def has_bare_layernorm(model: PreTrainedModel, channels: int) -> bool:
    """Tell whether a norm without weights, and so without an axis to find it by, subtracts the mean over channels."""
    probe = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(SEED))
    for module in model.modules():
        if "norm" in type(module).__name__.lower() and not list(module.parameters()) and not list(module.children()):
            try:
                if _subtracts_mean(module, probe):
                    return True
            except Exception as error:  # it takes other inputs, so it isn't a norm of the stream
                logger.info(f"{type(module).__name__} isn't called with hidden states alone: {error}")
    return False


def _subtracts_mean(norm: nn.Module, probe: torch.Tensor) -> bool:
    shifted = norm(probe + 3.0)
    return bool((shifted - norm(probe)).abs().max() < 1e-4 * shifted.abs().max())


@torch.no_grad()
def norms_after_writers(model: PreTrainedModel, input_ids: torch.Tensor, writers: set[str]) -> set[str]:
    """Return the names of modules whose input is the output of a block that writes to the stream, not the stream.

    Args:
        writers: names of the modules that own a writer.
    """
    layers = {id(layer) for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module}
    names = {module: name for name, module in model.named_modules()}
    written: dict[int, torch.Tensor] = {}
    found: set[str] = set()

    def note(module: nn.Module, args: tuple, output: object) -> None:
        name = names[module]
        if args and isinstance(args[0], torch.Tensor) and id(args[0]) in written:
            found.add(name)
        if any(writer == name or writer.startswith(f"{name}.") for writer in writers):
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor):
                written[id(first)] = first  # held, so that no other tensor gets its id

    embeddings = model.get_input_embeddings()
    with ExitStack() as hooks:
        for module, name in names.items():
            holds_layers = any(isinstance(child, nn.ModuleList) for child in module.children())
            if name and module is not embeddings and id(module) not in layers and not holds_layers:
                hooks.enter_context(module.register_forward_hook(note))
        forward_logits(model, input_ids)
    return found


@torch.no_grad()
def norm_of_the_stream(model: PreTrainedModel, input_ids: torch.Tensor, norms: set[str]) -> str | None:
    """Return the name of a norm whose output is the stream itself: a layer that has norms of its own is given it.

    Args:
        norms: names of the norms along the stream.
    """
    modules = dict(model.named_modules())
    listed = {layer for module in modules.values() if isinstance(module, nn.ModuleList) for layer in module}
    layers = [layer for layer in listed if {modules[name] for name in norms} & set(layer.modules())]
    normed: dict[str, torch.Tensor] = {}
    found: list[str] = []

    def note(name: str, module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, torch.Tensor):
            normed[name] = output

    def compare(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(given, torch.Tensor):
            found.extend(name for name, output in normed.items() if torch.equal(output, given))

    with ExitStack() as hooks:
        for name in sorted(norms):
            hooks.enter_context(modules[name].register_forward_hook(partial(note, name)))
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(compare, with_kwargs=True))
        forward_logits(model, input_ids)
    return found[0] if found else None
