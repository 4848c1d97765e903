"""Verification: the smaller model gives the trained model's logits, or nothing is published."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import VerificationError
from ..hf_models.tiny_model import logits_of, relative_error
from ..structures.cut import cut_model, zero_units_
from ..structures.experts import EXPERT_UNITS
from ..structures.groups import KeptUnits, PruningGroups
from ..structures.lora import Adapters, parameters_of
from ..structures.router_gates import routed_by
from ..vocabulary.tokens import KeptTokens
from ..vocabulary.trim_embeddings import trim_embeddings

FOLD_TOLERANCE = 1e-4
_SEED = 20240915


@dataclass(frozen=True)
class Verification:
    """Relative errors max |a - b| / max |b| of the smaller model's logits b against the trained model's.

    Attributes:
        fold_error: in fp32, before any rounding: what cutting and folding did.
        rounding_error: of the reloaded model in its stored dtype: what rounding did on top.
        dtype: stored dtype.
        tokens: number of random tokens compared.
    """

    fold_error: float
    rounding_error: float
    dtype: str
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


class Verifier:
    """Holds the trained model's fp32 logits on random tokens and compares smaller models with them.

    Where tokens are removed, only kept ones are drawn, and only their logits compared.

    Args:
        model: what is cut.
        trained: where that isn't the model itself: it with its adapters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: PruningGroups,
        kept: KeptUnits,
        vocabulary: KeptTokens | None = None,
        trained: PreTrainedModel | None = None,
    ) -> None:
        self.groups, self.kept, self.vocabulary = groups, kept, vocabulary
        self.input_ids = verification_tokens(model)
        self._model = _in_fp32(model, groups, kept)
        self._experts = groups.structures[EXPERT_UNITS] if EXPERT_UNITS in kept.kept else None
        self._kept_experts = kept_mask(kept, EXPERT_UNITS) if EXPERT_UNITS in kept.kept else None
        reference = self._model if trained is None else _in_fp32(trained, groups, kept)
        with routed_by(reference, self._experts, self._kept_experts):  # a checkpoint's model has no gates
            if vocabulary is None:
                self.logits = _evaluate(reference, self.input_ids)
                return
            tokens = vocabulary.indices(vocabulary.vocab_size, self.input_ids.device)
            self.input_ids %= len(tokens)
            self.logits = _evaluate(reference, tokens[self.input_ids])[..., tokens]
        self._model = trim_embeddings(self._model, vocabulary)

    def check_fold(self) -> float:
        """Compare the fp32 fold.

        Raises:
            VerificationError: naming the structures that differ.
        """
        return self._allowed(self._fold_error(self.kept))

    def check_logits(self, small: Any) -> float:
        """Compare a smaller model in fp32 that was made otherwise, as `check_fold` does."""
        return self._allowed(self.error_of(small))

    def error_of(self, small: Any) -> float:
        """Return the relative error of a smaller model's logits."""
        place = next(small.parameters()).device  # it may not fit where the trained model is
        return relative_error(_evaluate(small, self.input_ids.to(place)).to(self.logits.device), self.logits)

    def _allowed(self, error: float) -> float:
        if not error <= FOLD_TOLERANCE:
            raise VerificationError(
                f"the smaller model's logits differ from the trained model's by {error:.1e} (relative, fp32; allowed "
                f"{FOLD_TOLERANCE:.0e}); {self._culprits()}. Nothing was published"
            )
        return error

    def check_saved(self, folder: Path, expected: PreTrainedModel) -> float:
        """Reload a folder through the stock class, compare every tensor, and return the error of its logits.

        Raises:
            VerificationError: naming the first tensor that isn't what was saved.
        """
        # the modelling file of uneven layers is this library's own; every other model loads as a stock class
        uneven = hasattr(expected.config, "layer_sizes")
        loader: Any = AutoModelForCausalLM if uneven else type(expected)
        options = {"trust_remote_code": True} if uneven else {}
        attention = expected.config._attn_implementation
        reloaded = loader.from_pretrained(folder, attn_implementation=attention, **options).eval()
        found = dict(reloaded.named_parameters()) | dict(reloaded.named_buffers())
        cut = [axis.parameter for group in self.groups.structures.values() for axes in group.buffers for axis in axes]
        buffers = dict(expected.named_buffers())
        for name, tensor in (*expected.named_parameters(), *((name, buffers[name]) for name in cut)):
            if name not in found or not torch.equal(found[name].cpu(), tensor.cpu().to(found[name].dtype)):
                raise VerificationError(f"{name} reads back from {folder} differently than it was written")
        return self.error_of(reloaded.to(expected.device))

    def _fold_error(self, kept: KeptUnits) -> float:
        small = cut_model(self._model, self.groups, kept, torch.float32)
        with routed_by(small, None if EXPERT_UNITS in kept.kept else self._experts, self._kept_experts):
            return self.error_of(small)

    def _culprits(self) -> str:
        """Cut one structure at a time."""
        errors = {}
        for name in self.kept.kept:
            alone = KeptUnits({name: self.kept.num_units[name]}, {name: self.kept.kept[name]})
            try:
                errors[name] = self._fold_error(alone)
            except ValueError as refusal:  # a config class may refuse one structure's sizes without the others'
                errors[name] = float("nan")
                del refusal
        return "alone: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def kept_mask(kept: KeptUnits, structure: str) -> torch.Tensor:
    """Return which units stay, shape (L, U), bool."""
    layers = kept.kept[structure]
    mask = torch.zeros(len(layers), kept.num_units[structure], dtype=torch.bool)
    for row, units in zip(mask, layers, strict=True):
        row[list(units)] = True
    return mask


def verification_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Return random token ids, shape (2, T) with T at most 32."""
    text = model.config.get_text_config()
    length = min(32, getattr(text, "max_position_embeddings", None) or 32)
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, text.vocab_size, (2, length), generator=generator).to(model.device)


def _in_fp32(model: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> PreTrainedModel:
    """Return the model, or an fp32 copy of it in which what rounding left of the stream's mean is taken out."""
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return model
    model = copy.deepcopy(model).float()
    zero_units_(parameters_of(model), Adapters.of(model).extend(groups), kept)
    return model


def _evaluate(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    was_training = model.training
    try:
        return logits_of(model.eval(), input_ids)
    finally:
        model.train(was_training)
