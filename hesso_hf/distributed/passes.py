"""Passes through a model beside those of training: through one that FSDP2 shards too, where all processes make them."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .parts import reshard


def gathers_in_hooks(model: nn.Module) -> bool:
    """Whether hooks on the call of the whole model take part in putting its weights together: FSDP2's and ZeRO-3's."""
    return isinstance(model, FSDPModule) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def run_up_to_head(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Run a model for what hooks see in its layers: neither a loss is computed, nor logits if that can be helped.

    Args:
        inputs: what its forward takes.
    """
    if model.config.is_encoder_decoder and "labels" in inputs:  # of which the whole model makes what its decoder reads
        model(**inputs)
        return
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    if not gathers_in_hooks(model):
        model.base_model(**inputs)
        return
    # what lies in no layer is gathered where the whole model is called: its head is computed, of as little as may be
    one = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    model(**inputs, **one)


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Have a model compute as in evaluation; each of its modules is in the mode that it was in afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Have layers that checkpoint their activations in training do so in evaluation too, without dropout all the same.

    Transformers' layers do it in training mode alone; what they compute within is left in evaluation mode.
    """

    def in_evaluation(layer: Any) -> Callable[..., Any]:
        plain = layer._gradient_checkpointing_func

        def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
            def quietly(*inner: Any) -> Any:
                layer.training = False
                try:
                    return function(*inner)
                finally:
                    layer.training = True

            return plain(quietly, *args)

        return checkpoint

    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if layer.gradient_checkpointing]
    before = [(layer, layer.training, layer._gradient_checkpointing_func) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer._gradient_checkpointing_func = True, in_evaluation(layer)
        yield
    finally:
        for layer, training, function in before:
            layer.training, layer._gradient_checkpointing_func = training, function


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Make passes without dropout, in which hooks see every module; mode and shards are as before afterwards."""
    # what was compiled in place, layers or the model, passes hooks by that came later
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with in_eval(model), eager:
            yield
    except Exception:
        if isinstance(model, FSDPModule):
            model.reset_iter_state()  # it is within a pass
        raise
    finally:
        reshard(model)  # weights may change before the next pass
