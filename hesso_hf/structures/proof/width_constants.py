"""Constants that the model code derives from the width, and the weights that make up for them.

Multi-head latent attention may scale its queries by sqrt(hidden_size / q_lora_rank): with fewer channels that factor is
smaller, and a weight off the stream has to be as much larger.
"""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...hf_models.build import build_meta
from ...hf_models.resize import copy_with
from ...hf_models.sizes import HEADS, HIDDEN, KV_HEADS, ConfigSizes
from ...hf_models.tiny_model import logits_of, relative_error
from ..shape_probe import AxisMap, ParameterInfo

_EXACT, _FELT = 1e-6, 1e-3


def constants_by_width(
    model_class: type[PreTrainedModel], config: PretrainedConfig, sizes: ConfigSizes, coupled: bool
) -> dict[tuple[str, str], int]:
    """Return (module, attribute) of each number that goes with a power of c, and the power; c**2 is the width's.

    Args:
        coupled: whether the number of heads goes with the width.
    """
    names = (HIDDEN, HEADS, KV_HEADS) if coupled else (HIDDEN,)
    doubled = {name: 2 * size for name in names if (size := sizes.get(name))}
    try:
        wider = dict(build_meta(model_class, copy_with(config, doubled, sizes)).named_modules())
    except Exception:  # model code may refuse the sizes with any exception type: then nothing is known
        return {}
    found: dict[tuple[str, str], int] = {}
    for name, module in build_meta(model_class, copy_with(config, {}, sizes)).named_modules():
        for attribute, value in vars(module).items():
            other = vars(wider[name]).get(attribute) if name in wider else None
            if isinstance(value, float) and isinstance(other, float) and value > 0 and other > 0:
                power = 2 * math.log2(other / value)
                if round(power) and abs(power - round(power)) < 1e-6:
                    found[name, attribute] = round(power)
    return found


@torch.no_grad()
def powers_against(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    axis_map: AxisMap,
    constants: dict[tuple[str, str], int],
) -> dict[str, int]:
    """Find, by trying, the vectors off the stream that make up for constants: pattern to the power of c.

    Norms' weights are tried that are used as they are stored; a constant that none makes up for is left.
    """
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    before = logits_of(model, input_ids)
    found: dict[tuple[str, str], int] = {}
    for (name, attribute), power in constants.items():
        inside = _vectors(axis_map, name)
        if any((info.pattern, attribute) in found for info in inside):
            continue
        value = getattr(modules[name], attribute)
        setattr(modules[name], attribute, 2 * value)
        try:
            if relative_error(logits_of(model, input_ids), before) < _FELT:
                continue
            for info in inside:
                parameter = parameters[info.name]
                parameter.mul_(0.5)
                exact = relative_error(logits_of(model, input_ids), before) < _EXACT
                parameter.mul_(2.0)
                if exact:
                    found[info.pattern, attribute] = -power
                    break
        finally:
            setattr(modules[name], attribute, value)
    powers: dict[str, int] = {}
    for (pattern, _), power in found.items():
        powers[pattern] = powers.get(pattern, 0) + power
    return powers


def _vectors(axis_map: AxisMap, module: str) -> list[ParameterInfo]:
    """List the norms' vectors of a module that no size of the config moves."""
    infos = [info for info in axis_map.parameters.values() if info.name.startswith(f"{module}.")]
    return [info for info in infos if info.role == "norm" and (info.name, 0) not in axis_map.slopes]
