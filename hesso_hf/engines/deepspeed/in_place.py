"""A smaller model in the place of one that ZeRO trains, or of one that ZeRO-3 divided while it was loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from ...distributed.parts import named_parameters
from ...export.decision import Compaction, Decision
from ...pruning.process import PruningProcess
from ...structures.cut import build_cut, copy_buffers
from ...structures.groups import KeptUnits
from ...structures.in_place import InPlace
from ...structures.layers import full_names
from ...structures.router_gates import remove_gates


class ZeroInPlace(InPlace):
    """A smaller model in the place of one that ZeRO trains.

    Args:
        made: what takes the place of each parameter that stays.
    """

    def __init__(self, model: PreTrainedModel, made: Mapping[nn.Parameter, nn.Parameter]) -> None:
        super().__init__(model)
        self._made = made

    def _put_parameters(self, values: Mapping[nn.Parameter, torch.Tensor]) -> None:
        assert values.keys() == self._made.keys()
        divided = {old: new for old, new in self._made.items() if hasattr(old, "ds_tensor")}
        super()._put_parameters({old: new.data for old, new in self._made.items() if old not in divided})
        for module, leaf, old in list(_owners(self._model)):
            if old in divided:
                self._undo.append(lambda m=module, n=leaf, p=old: m._parameters.update({n: p}))  # type: ignore[misc]
                module._parameters[leaf] = divided[old]


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for leaf in module._parameters:
            parameter = dict.get(module._parameters, leaf)  # ZeRO-3's own dictionary gathers what is asked of it
            if parameter is not None:
                yield module, leaf, parameter


def without_values(model: PreTrainedModel, decision: Decision) -> PreTrainedModel:
    """Return the smaller model with its buffers, but parameters that have shapes alone."""
    with init_empty_weights():
        small = build_cut(model, decision.groups, decision.kept)
    small.tie_weights()  # which tensors without values forget
    copy_buffers(small, model, decision.groups, decision.kept)
    return small


@torch.no_grad()
def shrink_divided(model: PreTrainedModel, process: PruningProcess, compaction: Compaction, kept: KeptUnits) -> None:
    """Make a model that ZeRO-3 divided while it was loaded as small as a checkpoint's, whose values are loaded later.

    Args:
        kept: the checkpoint's decision.
    """
    decision, larger = Decision(process.groups, kept), named_parameters(model)
    small, made = without_values(model, decision), dict[nn.Parameter, nn.Parameter]()
    for name, origin in full_names(parameters := named_parameters(small), decision.groups, kept).items():
        old: Any = larger[origin]
        zeros = torch.zeros(parameters[name].shape, dtype=old.dtype, device=model.device)
        made[old] = nn.Parameter(zeros, requires_grad=old.requires_grad)
        old.convert_to_zero_parameters(param_list=[made[old]])
    place = ZeroInPlace(model, made)
    place.put(small, decision.groups, kept)
    place.keep()
    remove_gates(model)
    process.let_go(compaction, named_parameters(model))
