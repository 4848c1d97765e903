"""Export of an adapter: the smaller base model by itself, and the adapter cut to it.

A's columns are cut and folded as those of the matrix that it adds to are, B's rows as its rows.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..distributed.parts import whole
from ..errors import UnsupportedStructureError
from ..structures.cut import cut_model, cut_part, cuts_by_tensor
from ..structures.groups import KeptUnits
from ..structures.layers import full_names
from ..structures.lora import NO_ADAPTERS, Adapters, adapted_like, base_of, dense_model, parameters_of
from ..vocabulary.trim_embeddings import trim_embeddings
from .decision import Decision
from .parameters import WholeSource, check_stored, fp32_place

ADAPTER_FOLDER = "adapter"
_BY_LAYER = ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")


class AdapterSource(WholeSource):
    """A model with adapters, of which the smaller base model and the adapter cut to it are written apart.

    `cut` returns both together, a PeftModel.

    Args:
        final: where the smaller base model will lie.
    """

    def __init__(self, model: PreTrainedModel, decision: Decision, final: Path | str) -> None:
        super().__init__(model, decision)
        self._final = str(final)

    def _base(self, kept: KeptUnits, dtype: torch.dtype) -> PreTrainedModel:
        """Cut the frozen weights alone, without what the adapter adds."""
        trained, vocabulary = self._trained, self.decision.vocabulary
        base = dense_model(trained, torch.float32, NO_ADAPTERS, fp32_place(trained))
        return cut_model(trim_embeddings(base, vocabulary) if vocabulary else base, self.decision.groups, kept, dtype)

    @torch.no_grad()
    def cut(self, kept: KeptUnits) -> Any:
        """Cut both, and put the adapter into the smaller base model.

        Raises:
            UnsupportedStructureError: where the adapter's config says by layer what the smaller model has other layers
                for, or it adds to what has one row a token.
        """
        small, trained, groups = self._base(kept, torch.float32), self._trained, self.decision.groups
        # the adapter and its card name this model as their base
        small.name_or_path = small.config.name_or_path = self._final
        tuned = adapted_like(small, trained)
        config = tuned.active_peft_config
        by_layer = [option for option in _BY_LAYER if getattr(config, option, None)]
        if by_layer and any(full != own for own, full in full_names(parameters_of(small), groups, kept).items()):
            raise UnsupportedStructureError(
                f"`lora_export` ('adapter'): layers were dropped, and `peft_config.{by_layer[0]}` counts those of the "
                "full model; use 'merged'"
            )
        adapters, full, own = Adapters.of(trained), parameters_of(trained), parameters_of(base_of(tuned))
        cuts = cuts_by_tensor(adapters.extend(groups), kept)
        for factor, origin in full_names(Adapters.of(base_of(tuned)).factors(), groups, kept).items():
            if origin not in adapters.factors():
                raise UnsupportedStructureError(f"{factor}: the trained model has no adapter {origin}; use 'merged'")
            tensor = full[origin].detach()
            tensor = cut_part(tensor, whole(tensor.shape), cuts.get(origin, ()))
            if tensor.shape != own[factor].shape:
                raise UnsupportedStructureError(
                    f"{factor} has shape {tuple(tensor.shape)} after cutting, the smaller model "
                    f"{tuple(own[factor].shape)}; with removed tokens an adapter can't be on what has one row a token: "
                    "use 'merged'"
                )
            own[factor].data = tensor.to(own[factor].device, full[origin].dtype, copy=True)
        return tuned.eval()

    def save(self, small: Any, folder: Path, dtype: torch.dtype, max_shard_size: str) -> PreTrainedModel:
        """Write the base model in `dtype`, and the adapter in its own into a folder beside it; return the base."""
        base = super().save(self._base(self.decision.kept, dtype), folder, dtype, max_shard_size)
        with warnings.catch_warnings():  # PEFT looks for the base where it will lie
            warnings.filterwarnings("ignore", message="Could not find a config file")
            small.save_pretrained(folder / ADAPTER_FOLDER)
        return base

    def read_back(self, small: Any, written: PreTrainedModel, folder: Path, dtype: torch.dtype) -> Any:
        """Load the base as any other model, and the adapter into it."""
        from peft import PeftModel

        reloaded = super().read_back(small, written, folder, dtype)
        tuned = PeftModel.from_pretrained(reloaded, folder / ADAPTER_FOLDER)
        expected, read = parameters_of(base_of(small)), parameters_of(base_of(tuned))
        for name in Adapters.of(base_of(small)).factors():
            check_stored(name, read.get(name), expected[name], folder)
        return tuned.eval()
