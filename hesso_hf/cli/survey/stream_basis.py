"""Whether the stream of a model type can be turned: its tiny model is, as training turns it, and must say the same."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import HessoError
from ...hf_models.tiny_configs import default_config
from ...hf_models.tiny_model import SEED, logits_of, random_model, token_ids
from ...pruning.basis import CLUSTERS, make_gain_uniform_, stream_covariance, turn_of
from ...structures.proof.tiny_case import covering_config
from ...structures.turn import StreamTurn, random_rotation
from .page import BasisSurvey, one_line
from .round_trip import describe

TOLERANCE = 1e-5  # of the logits, absolute
_SEED = SEED + 2  # other weights, gains and biases than those of the proof


def survey_basis(model_type: str) -> BasisSurvey:
    """Turn a type's tiny model by a random rotation. Nothing is raised."""
    try:
        return _turned(*default_config(model_type))
    except Exception as error:  # model code may fail with any exception type
        return BasisSurvey("refused", reason=one_line(describe(error)))


def _turned(model_class: type[PreTrainedModel], config: PretrainedConfig) -> BasisSurvey:
    tiny = covering_config(model_class, config)
    model, input_ids = random_model(model_class, tiny, _SEED), token_ids(tiny)
    turn, _ = turn_of(model)
    if not stream_covariance(model, turn, [{"input_ids": input_ids}])[0].any():
        raise HessoError("no norm of the stream is given hidden states, so there are no principal axes to turn into")
    error, blocks = _error(model, turn, input_ids)
    dtype: Literal["fp32", "fp64"] = "fp32"
    if not error <= TOLERANCE:  # fp32 may round as much in the model itself
        model = random_model(model_class, tiny, _SEED).double()
        model.set_experts_implementation("eager")  # others don't know fp64
        dtype, (error, blocks) = "fp64", _error(model, turn, input_ids)
    if not error <= TOLERANCE:
        return BasisSurvey("refused", error, dtype, reason=f"the turned model's logits differ by {error:.1e}")
    return BasisSurvey("tied" if turn.tied_norm else "exact", error, dtype, len(blocks), turn.centred)


def _error(model: PreTrainedModel, turn: StreamTurn, input_ids: torch.Tensor) -> tuple[float, list[list[int]]]:
    """Turn a model by a random rotation; return the largest difference of its logits, and the blocks turned within."""
    parameters = dict(model.named_parameters())
    blocks = make_gain_uniform_(turn, parameters, CLUSTERS)
    expected = logits_of(model, input_ids)
    turn.turn_(parameters, random_rotation(turn.width, turn.centred, blocks, _SEED))
    difference = float((logits_of(model, input_ids) - expected).abs().max())
    return float(f"{difference:.1e}"), blocks
