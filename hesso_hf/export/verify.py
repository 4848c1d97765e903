"""Verification: the smaller model gives the trained model's logits, or nothing is published."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from ..errors import VerificationError, first_line
from ..hf_models.tiny_model import SEED, relative_error
from ..structures.experts import EXPERT_UNITS
from ..structures.groups import KeptUnits
from .parameters import ParameterSource

FOLD_TOLERANCE = 1e-4


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


class Verifier:
    """Holds the trained model's fp32 logits on random tokens and compares smaller models with them.

    Where tokens are removed, only kept ones are drawn, and only their logits compared.
    """

    def __init__(self, source: ParameterSource) -> None:
        self._source = source
        self.input_ids = random_tokens(source.model.config).to(source.device)
        vocabulary = source.decision.vocabulary
        if vocabulary is None:
            self.logits = source.logits(self.input_ids)
            return
        tokens = vocabulary.indices(vocabulary.vocab_size, self.input_ids.device)
        self.input_ids %= len(tokens)
        self.logits = source.logits(tokens[self.input_ids])[..., tokens]

    def checked_cut(self) -> tuple[Any, float]:
        """Return the source's smaller model in fp32 and its error.

        Raises:
            VerificationError: on all processes, naming the structures that differ.
        """
        decision = self._source.decision
        small = self._source.together(lambda: self._source.cut(decision.kept))
        error = self.error_of(small)
        if error <= FOLD_TOLERANCE:
            return small, error
        del small
        kept = decision.kept
        alone = {name: KeptUnits({name: kept.num_units[name]}, {name: kept.kept[name]}) for name in kept.kept}
        culprits = ", ".join(f"{name} {self._error_of_cut(units):.1e}" for name, units in alone.items())
        raise VerificationError(
            f"the smaller model's logits differ from the trained model's by {error:.1e} (relative, fp32; allowed "
            f"{FOLD_TOLERANCE:.0e}); alone: {culprits or 'nothing was cut'}. Nothing was published"
        )

    def error_of(self, small: Any, kept: KeptUnits | None = None) -> float:
        """Return the relative error of a smaller model's logits, on all processes.

        Args:
            kept: the units that it keeps; by default those of the decision.
        """
        return self._source.shared(self._source.together(lambda: self._compared(small, kept)))

    def error_as_stored(self, small: Any, dtype: str) -> float:
        """Return the relative error of the logits of the smaller model that was read back, on all processes.

        Raises:
            VerificationError: on all processes, where they aren't finite.
        """
        error = self.error_of(small)
        if not math.isfinite(error):
            raise VerificationError(
                f"stored as {dtype} the smaller model's weights overflow, or what it computes from them does: its "
                "logits aren't finite; take a `dtype` (in a run `export_dtype`) of bfloat16 or float32. Nothing was "
                "published"
            )
        return error

    def _compared(self, small: Any, kept: KeptUnits | None) -> float | None:
        if small is None:  # another process has it
            return None
        gated = kept is not None and EXPERT_UNITS not in kept.kept
        routing = self._source.decision.routing if gated else nullcontext
        try:
            found = self._source.logits_of_cut(small, kept or self._source.decision.kept, self.input_ids, routing)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # kernels and model code refuse sizes with exceptions of any type
            raise VerificationError(
                f"the smaller model can't compute with its sizes: {first_line(error)}; take others with `round_to` or "
                "`target_sizes`"
            ) from error
        return relative_error(found.to(self.logits.device), self.logits)

    def _error_of_cut(self, kept: KeptUnits) -> float:
        """Return the error of what keeps other units, NaN where there is no such model."""
        try:
            return self.error_of(self._source.together(lambda: self._source.cut(kept)), kept)
        except ValueError:  # a config class may refuse one structure's sizes without the others'
            return float("nan")


def random_tokens(config: PretrainedConfig) -> torch.Tensor:
    """Return random token ids, shape (2, T) with T at most 32."""
    text = config.get_text_config()
    length = min(32, getattr(text, "max_position_embeddings", None) or 32)
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, text.vocab_size, (2, length), generator=generator)
