"""Export under ZeRO: the smaller model is made from the fp32 masters, one parameter at a time.

Every parameter is put together on all processes, cut on the one that writes, and let go before the next. The trained
model's logits, which the smaller one's are compared with, come from a forward pass in fp32 that puts one layer together
at a time.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from ...distributed.collectives import use_each
from ...distributed.parts import named_parameters, whole
from ...export.decision import NOTHING_CUT, Decision
from ...export.parameters import ParameterSource, check_shape
from ...structures.cut import build_cut, copy_buffers, cut_part, cuts_by_tensor, device_with_room
from ...structures.groups import KeptUnits
from ...structures.layers import full_names
from ..streamed import streamed, without_weights
from .gathering import whole_fp32


class ZeroSource(ParameterSource):
    """A model under ZeRO; the smaller one lies on the processes that write.

    Args:
        trained: the model, pruned units at zero.
        writes: whether this process holds and writes the smaller model; the others help to put parameters together.
    """

    def __init__(self, trained: PreTrainedModel, decision: Decision, writes: bool) -> None:
        super().__init__(without_weights(trained, decision.groups, NOTHING_CUT), decision, trained.device, writes)
        self._trained = trained

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return those of a forward pass that puts one layer together at a time."""
        return streamed(self.model, named_parameters(self._trained), whole_fp32, input_ids, self.decision.routing)

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
