"""Which basis of the stream a run prunes in: the given one, or the principal one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import HessoConfig
from ..distributed.parts import local, named_parameters
from ..errors import HessoError
from ..hf_models.sizes import HIDDEN, get_size
from ..hf_models.tiny_model import attention_in_fp32
from ..pruning.basis import LEAST_PER_CHANNEL, LEAST_TOKENS, StreamBasis, turn_stream
from ..pruning.plan import PruningPlan
from .measure import Measurer

logger = logging.get_logger(__name__)

CHANNELS = "embedding_channels"
GIVEN = "`stream_basis` ('auto'): the stream stays in its given basis"


def settle_in_basis(
    plan: PruningPlan, model: PreTrainedModel, measurer: Measurer, settle: Callable[[], None], config: HessoConfig,
    hindrance: str = "",
) -> StreamBasis | None:  # fmt: skip
    """Fix a run's sizes in the basis that is wanted; return how the stream was turned, None in the given basis.

    Args:
        settle: measures the split between structures and takes the sizes that cost least.
        config: of the run.
        hindrance: why the model can't be turned, "" where it can.

    Raises:
        HessoError: where `principal` is asked for and can't be had.
    """
    pruned, wanted = CHANNELS in plan.groups.structures, config.stream_basis
    if wanted == "given" or (wanted == "auto" and not pruned):
        settle()
        return None
    if wanted == "auto" and not plan.wants_calibration:  # sizes that no measuring moves are those of either basis
        settle()
        if not _channels_go(plan):
            return None
    kept = named_parameters(model).items() if wanted == "auto" else ()
    before = {name: local(parameter.detach()).to("cpu", copy=True) for name, parameter in kept}
    try:
        if not pruned:
            raise HessoError("no channel of the stream is pruned")
        if reason := hindrance or measurer.why_none():
            raise HessoError(reason)
        tokens = measurer.tokens(_tokens_wanted(model))
        with attention_in_fp32(model):  # autocast comes with Accelerate, later
            basis = turn_stream(model, tokens, tolerance=config.stream_basis_tolerance, loss=measurer.loss)
    except HessoError as error:
        if wanted == "principal":
            raise HessoError(f"`stream_basis` ('principal'): {error}; use 'auto' or 'given'") from error
        logger.warning(f"{GIVEN}: {error}")
        settle()
        return None
    settle()
    if wanted == "principal" or _channels_go(plan):
        logger.info(f"the stream is turned into its principal axes; energy of the first channels: {basis.energy}")
        return basis
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            local(parameter.detach()).copy_(before[name])
    logger.info(f"{GIVEN}: none of its channels goes")
    return None


def _channels_go(plan: PruningPlan) -> bool:
    return plan.target.kept_units[CHANNELS] < plan.target.num_units[CHANNELS]


def _tokens_wanted(model: PreTrainedModel) -> int:
    return max(LEAST_TOKENS, LEAST_PER_CHANNEL * (get_size(model.config, HIDDEN) or 0))
