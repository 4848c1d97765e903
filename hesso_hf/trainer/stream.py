"""Which basis of the stream a run prunes in: the given one, or the principal one, by trial removals where asked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..distributed.collectives import from_main
from ..errors import HessoError
from ..hf_models.sizes import HIDDEN, get_size
from ..pruning.basis import LEAST_PER_CHANNEL, LEAST_TOKENS, StreamBasis, turn_of, turn_stream
from ..pruning.plan import PruningPlan
from .measure import NO_EXAMPLES, Measurer

logger = logging.get_logger(__name__)

CHANNELS = "embedding_channels"
GIVEN = "`stream_basis` ('auto'): the stream stays in its given basis"


def settle_in_basis(
    plan: PruningPlan, model: PreTrainedModel, measurer: Measurer, settle: Callable[[], None], wanted: str, tied: float
) -> StreamBasis | None:
    """Fix a run's sizes in the basis that is wanted; return how the stream was turned, None in the given basis.

    Args:
        settle: measures the split between structures and takes the sizes that cost least.
        wanted: `given`, `principal`, or `auto`: the one in which the sizes are expected to cost less.
        tied: nats a token that turning a tied model may cost.

    Raises:
        HessoError: where `principal` is asked for and can't be had.
    """
    if wanted == "given":
        settle()
        return None
    if reason := _refused(plan, model, measurer, wanted):
        if wanted == "principal":
            raise HessoError(f"`stream_basis` ('principal'): {reason}; use 'auto' or 'given'")
        logger.warning(f"{GIVEN}: {reason}")
        settle()
        return None
    before, sizes = None, None
    if wanted == "auto":
        settle()
        before, sizes = plan.expected_rise, (plan.target, plan.curves)
        copies = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
    try:
        basis = turn_stream(model, measurer.tokens(_tokens_wanted(model)), tolerance=tied, loss=measurer.loss)
    except HessoError as error:
        if wanted == "principal":
            raise HessoError(f"`stream_basis` ('principal'): {error}; use 'auto' or 'given'") from error
        logger.warning(f"{GIVEN}: {error}")
        return None
    settle()
    after = plan.expected_rise
    if from_main(before is None or after is None or after + basis.rise < before):
        logger.info(f"the stream is turned into its principal axes; energy of the first channels: {basis.energy}")
        return basis
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(copies[name])
    assert sizes is not None, "another process has measured both bases, so this one has too"
    plan.target, plan.curves = sizes
    logger.info(f"the stream stays in its given basis: a loss of +{before:.3f} is expected there, +{after:.3f} turned")
    return None


def _tokens_wanted(model: PreTrainedModel) -> int:
    return max(LEAST_TOKENS, LEAST_PER_CHANNEL * (get_size(model.config, HIDDEN) or 0))


def _refused(plan: PruningPlan, model: PreTrainedModel, measurer: Measurer, wanted: str) -> str:
    """Return why the stream isn't turned, "" where it can be."""
    if CHANNELS not in plan.groups.structures:
        return "no channel of the stream is pruned"
    if not measurer.has_examples:
        return NO_EXAMPLES
    if wanted == "auto" and not plan.wants_calibration:
        return "no trial removals are made (`calibration_examples`, or a split that is fixed)"
    try:
        turn_of(model)
    except HessoError as error:
        return str(error)
    return ""
