"""Which basis of the stream a run prunes in: the given one, or the principal one."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import HessoError
from ..hf_models.sizes import HIDDEN, get_size
from ..pruning.basis import LEAST_PER_CHANNEL, LEAST_TOKENS, StreamBasis, turn_stream
from ..pruning.plan import PruningPlan
from .measure import Measurer

logger = logging.get_logger(__name__)

CHANNELS = "embedding_channels"
GIVEN = "`stream_basis` ('auto'): the stream stays in its given basis"


def turned_where_wanted(
    plan: PruningPlan, model: PreTrainedModel, measurer: Measurer, wanted: str, tolerance: float
) -> StreamBasis | None:
    """Turn a model's stream into its principal axes; return how, None where it stays in its given basis.

    Args:
        wanted: `given`, `principal`, or `auto`: principal where that can be had and channels may go.
        tolerance: nats a token that turning may cost, with tied embeddings or weights below fp32.

    Raises:
        HessoError: where `principal` is asked for and can't be had.
    """
    pruned = CHANNELS in plan.groups.structures
    if wanted == "given" or (wanted == "auto" and not pruned):
        return None
    try:
        if not pruned:
            raise HessoError("no channel of the stream is pruned")
        if reason := measurer.why_none():
            raise HessoError(reason)
        basis = turn_stream(model, measurer.tokens(_tokens_wanted(model)), tolerance=tolerance, loss=measurer.loss)
    except HessoError as error:
        if wanted == "principal":
            raise HessoError(f"`stream_basis` ('principal'): {error}; use 'auto' or 'given'") from error
        logger.warning(f"{GIVEN}: {error}")
        return None
    logger.info(f"the stream is turned into its principal axes; energy of the first channels: {basis.energy}")
    return basis


def _tokens_wanted(model: PreTrainedModel) -> int:
    return max(LEAST_TOKENS, LEAST_PER_CHANNEL * (get_size(model.config, HIDDEN) or 0))
