"""Passes through a model beside those of training: through one that FSDP2 shards too, where all processes make them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .parts import reshard


def gathers_in_hooks(model: nn.Module) -> bool:
    """Whether hooks on the call of the whole model take part in putting its weights together: FSDP2's and ZeRO-3's."""
    return isinstance(model, FSDPModule) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


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
