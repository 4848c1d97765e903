"""Parameter sources: a trained model, wherever its parameters lie, and what the writer asks of it."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..compat import attention_of
from ..distributed.collectives import from_main, on_all
from ..distributed.parts import stock_class
from ..distributed.passes import in_eval
from ..errors import VerificationError
from ..hf_models.build import build_meta, own_loader_of
from ..hf_models.loading import without_bars
from ..hf_models.tiny_model import logits_of
from ..structures.cut import cut_model, device_with_room, zero_units_
from ..structures.groups import KeptUnits
from ..structures.lora import Adapters, dense_model, lora_layers, parameters_of
from ..structures.uneven_layers import uneven_sizes
from ..vocabulary.trim_embeddings import trim_embeddings
from .decision import Decision

_T = TypeVar("_T")
Routing = Callable[[nn.Module], AbstractContextManager[Any]]


class ParameterSource(ABC):
    """A trained model and the decision on it. All processes that hold parts of it make every call.

    What `cut` returns, the smaller model in fp32, may lie on all of them, on some (None on the others) or in parts.

    Attributes:
        model: whose class, config and number of parameters are those of the trained model.
        device: where inputs go.
        main: whether this process makes, completes and publishes a folder.
    """

    def __init__(self, model: PreTrainedModel, decision: Decision, device: torch.device, main: bool = True) -> None:
        self.model, self.decision, self.device, self.main = model, decision, device, main

    def together(self, work: Callable[[], _T]) -> _T:
        """Do a part of the work; where it fails on one of several processes, all of them raise."""
        return on_all(work)

    def shared(self, value: _T | None) -> _T:
        """Return what the main process has on all processes."""
        return from_main(value)

    def common_folder(self, folder: Path | None) -> Path:
        """Return the folder that this process writes into, if any: the one that its main process has made."""
        return folder or Path()

    @abstractmethod
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the trained model's logits in fp32, experts to be cut left out by its routers."""

    @abstractmethod
    def cut(self, kept: KeptUnits) -> Any:
        """Return the smaller model in fp32 that keeps these units and the tokens of the decision."""

    def logits_of_cut(self, small: Any, kept: KeptUnits, input_ids: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return the logits of what `cut` returned for these units; where it lies in parts all processes call it.

        Args:
            routing: of a model, what its forward pass is done in.
        """
        place = next(small.parameters()).device  # it may not fit where the trained model is
        with routing(small):
            return logits_of(small.eval(), input_ids.to(place))

    def save(self, small: Any, folder: Path, dtype: torch.dtype, max_shard_size: str) -> Any:
        """Write the smaller model's weights and configs, rounded to `dtype`; return the model that was written.

        Where it lies whole on the main process, that is `small` itself, its parameters rounded in place.
        """
        if not self.main:
            return None
        for parameter in small.parameters():  # not the buffers
            parameter.data = parameter.data.to(dtype)
        with without_bars():
            small.save_pretrained(folder, max_shard_size=max_shard_size)
        return small

    def read_back(self, small: Any, written: Any, folder: Path, dtype: torch.dtype) -> Any:
        """Compare what lies on disk with what was written, and return the smaller model as it was stored.

        Where it lies whole on the main process, a stock class loads it there, to the written one's device.

        Args:
            small: what `cut` returned.
            written: what `save` returned.

        Raises:
            VerificationError: naming the first tensor that isn't what was saved.
        """
        if not self.main:
            return None
        # the modelling file of uneven layers is this library's own; every other model loads as a stock class
        uneven = bool(uneven_sizes(written.config))
        loader: Any = getattr(transformers, own_loader_of(written.config)) if uneven else type(written)
        options = {"trust_remote_code": True} if uneven else {}
        with without_bars():
            reloaded = loader.from_pretrained(folder, attn_implementation=attention_of(written.config), **options)
        found = dict(reloaded.named_parameters()) | dict(reloaded.named_buffers())
        for name, tensor in (*written.named_parameters(), *self.cut_buffers(written)):
            check_stored(name, found.get(name), tensor, folder)
        return reloaded.to(written.device).eval()

    def cut_buffers(self, small: nn.Module) -> list[tuple[str, torch.Tensor]]:
        """Return the smaller model's buffers that units lie on."""
        groups, buffers = self.decision.groups.structures.values(), dict(small.named_buffers())
        cut = [axis.parameter for group in groups for axes in group.buffers for axis in axes]
        return [(name, buffers[name]) for name in cut if name in buffers]


class LoneSource(ParameterSource):
    """What one process exports alone: the others know nothing of it."""

    def together(self, work: Callable[[], _T]) -> _T:
        return work()

    def shared(self, value: _T | None) -> _T:
        assert value is not None
        return value


class WholeSource(LoneSource):
    """A model that lies whole on one process.

    There is one fp32 copy of it at a time: with adapters the reference's first, then the merged one.

    Args:
        model: as it was trained, its adapters in place.
    """

    def __init__(self, model: PreTrainedModel, decision: Decision) -> None:
        self._trained, self._adapted = model, bool(lora_layers(model))
        dense = build_meta(stock_class(model), copy.deepcopy(model.config)) if self._adapted else model
        super().__init__(dense, decision, model.device)

    @functools.cached_property
    def _copy(self) -> PreTrainedModel:
        return _in_fp32(self._trained, self.decision)

    @functools.cached_property
    def _full(self) -> PreTrainedModel:
        """What is cut: adapters merged, without the tokens that go."""
        trained, vocabulary = self._trained, self.decision.vocabulary
        full = dense_model(trained, torch.float32, device=fp32_place(trained)) if self._adapted else self._copy
        return trim_embeddings(full, vocabulary) if vocabulary else full

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return them; the model's mode stays as it is, and a copy with adapters is let go."""
        model = _in_fp32(self._trained, self.decision) if self._adapted else self._copy
        with in_eval(model), self.decision.routing(model):  # a checkpoint's model has no gates
            return logits_of(model, input_ids.to(model.device)).to(self.device)

    def cut(self, kept: KeptUnits) -> PreTrainedModel:
        """Cut it on its device, or on the CPU where that has no room."""
        return cut_model(self._full, self.decision.groups, kept, torch.float32)


def check_stored(name: str, found: torch.Tensor | None, written: torch.Tensor, folder: Path) -> None:
    """Compare a tensor on disk with what was written.

    Raises:
        VerificationError: where it isn't the same, or isn't there.
    """
    if found is None or not torch.equal(found.cpu(), written.cpu().to(found.dtype)):
        raise VerificationError(f"{name} reads back from {folder} differently than it was written")


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Compare the shape of what is left of a tensor with the smaller model's.

    Raises:
        VerificationError: where they differ.
    """
    if tuple(found) != tuple(expected):
        raise VerificationError(f"{name} is {tuple(found)} after cutting, not {tuple(expected)}")


def fp32_place(model: PreTrainedModel) -> torch.device:
    """Return where a copy of a model in fp32 goes: to its device, or to the CPU where that has no room."""
    return device_with_room(model.device, 4 * sum(parameter.numel() for parameter in model.parameters()))


def _in_fp32(model: PreTrainedModel, decision: Decision) -> PreTrainedModel:
    """Return the model, or an fp32 copy of it in which what rounding left of the stream's mean is taken out."""
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return model
    place = fp32_place(model)
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    memo: dict[int, torch.Tensor] = {
        id(tensor): tensor.detach().to(place, torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for tensor in tensors
    }
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in model.parameters()}
    model = copy.deepcopy(model, memo)
    zero_units_(parameters_of(model), Adapters.of(model).extend(decision.groups), decision.kept)
    return model
