"""Round trips: a tiny model is zeroed, cut, saved and reloaded by its stock class, and must say what it said before."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...compat import attention_of
from ...errors import HessoError, VerificationError
from ...export.decision import kept_mask
from ...hf_models.tiny_model import SEED, ieee_fp32, logits_of, random_model, relative_error, token_ids
from ...structures.cut import cut_model, zero_units_
from ...structures.experts import EXPERT_UNITS
from ...structures.groups import PruningGroups
from ...structures.proof.result import TOLERANCE
from ...structures.proof.tiny_case import units_to_keep
from ...structures.router_gates import routed_by
from .page import UNTRIED, one_line

_PROMPT, _NEW_TOKENS = 8, 8


@dataclass(frozen=True)
class Generated:
    """Greedily generated tokens, shape (_NEW_TOKENS,), and the logits that each was chosen by, (_NEW_TOKENS, V)."""

    tokens: torch.Tensor
    logits: torch.Tensor


class RoundTrips:
    """A tiny random model of a class, on which sets of structures make their round trips.

    Attributes:
        untried: why generation isn't compared, empty where it is.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig, groups: PruningGroups) -> None:
        self.groups, self.config = groups, config
        self.dense = random_model(model_class, config)
        self.input_ids = token_ids(config)
        self.untried = self._why_not_generate()

    def run(self, names: tuple[str, ...]) -> float:
        """Make the round trip with random units of these structures and return the relative error of the logits.

        Raises:
            VerificationError: naming the stage that failed and the first difference.
        """
        groups = self.groups.select(names, explicit=True)
        kept, _ = units_to_keep(groups, type(self.dense), self.config)
        zeroed = copy.deepcopy(self.dense)
        zero_units_(dict(zeroed.named_parameters()), groups, kept)
        with _stage("cutting"):
            small = cut_model(zeroed, groups, kept, torch.float32)
        experts = groups.structures.get(EXPERT_UNITS)
        with routed_by(zeroed, experts, kept_mask(kept, EXPERT_UNITS) if experts is not None else None):
            return self._compare(zeroed, small)

    def _compare(self, zeroed: PreTrainedModel, small: PreTrainedModel) -> float:
        expected = logits_of(zeroed, self.input_ids)
        try:
            reloaded = _reload(small)
            with _stage("running the reloaded model"):
                error = relative_error(logits_of(reloaded, self.input_ids), expected)
        except VerificationError as failure:
            raise VerificationError(f"{failure}{self._of_the_dense_model()}") from failure
        if not error <= TOLERANCE:
            difference = _first_difference(small, reloaded) or self._of_the_dense_model() or "; all tensors are equal"
            raise VerificationError(f"the reloaded model's logits differ by {error:.1e}{difference}")
        if not self.untried:
            with _stage("generating"):
                _compare(_generate(reloaded, self.input_ids), _generate(zeroed, self.input_ids))
        return error

    def _of_the_dense_model(self) -> str:
        """Tell whether the uncut model fails to reload as well, which is then no matter of cutting."""
        try:
            reloaded = _reload(self.dense)
            error = relative_error(logits_of(reloaded, self.input_ids), logits_of(self.dense, self.input_ids))
        except Exception as failure:  # model code may fail with any exception type
            return f"; the uncut model fails too: {describe(failure)}"
        found = _first_difference(self.dense, reloaded)
        return "" if error <= TOLERANCE else f"; those of the uncut model differ by {error:.1e}{found}"

    def _why_not_generate(self) -> str:
        if not self.dense.can_generate():
            return f"{UNTRIED}the class doesn't generate"
        try:
            _generate(self.dense, self.input_ids)
        except Exception as failure:  # model code may fail with any exception type
            return one_line(UNTRIED + describe(failure))
        return ""


def describe(error: BaseException) -> str:
    """Return an exception as text, with its type where that isn't one of the library's own."""
    return str(error) if isinstance(error, HessoError) else f"{type(error).__name__}: {error}"


def _reload(model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        with _stage("saving"):
            model.save_pretrained(folder)
        with _stage("reloading"):
            options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention_of(model.config)}
            return type(model).from_pretrained(folder, **options).eval()


def _first_difference(expected: PreTrainedModel, found: PreTrainedModel) -> str:
    """Name the first tensor that reads back differently, empty where none does."""
    read = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    for name, tensor in [*expected.named_parameters(), *expected.named_buffers()]:
        if name not in read or not torch.equal(read[name], tensor):
            return f"; {name} reads back differently"
    return ""


@ieee_fp32()
@torch.no_grad()
def _generate(model: PreTrainedModel, input_ids: torch.Tensor) -> Generated:
    """Generate greedily with the cache, from the first tokens of the first row."""
    prompt = input_ids[:1, :_PROMPT]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        found = model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, num_beams=1, use_cache=True,
            min_new_tokens=_NEW_TOKENS, max_new_tokens=_NEW_TOKENS, pad_token_id=0, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    return Generated(found.sequences[0, -_NEW_TOKENS:], torch.stack([step[0] for step in found.logits]).float())


def _compare(found: Generated, expected: Generated) -> None:
    """Compare step by step, to the first token that differs: after it the two answer different prompts.

    Raises:
        VerificationError: where a step's logits differ. A token alone may, where two have the same logit.
    """
    for step, logits in enumerate(expected.logits):
        error = relative_error(found.logits[step], logits)
        if not error <= TOLERANCE:
            raise VerificationError(f"with the cache the logits of new token {step + 1} differ by {error:.1e}")
        if found.tokens[step] != expected.tokens[step]:
            return


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Turn whatever model code raises into an error that says what was being done."""
    try:
        yield
    except Exception as error:  # model code may fail with any exception type
        raise VerificationError(f"{name}: {describe(error)}") from error
