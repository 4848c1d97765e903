"""Schemes to try for a structure: layouts from the gradients, powers of c guessed, the likeliest first.

The model code may derive constants from the width: multi-head latent attention may scale its queries by
sqrt(hidden_size / q_lora_rank). With fewer channels that factor is smaller, and a weight off the stream has to be as
much larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import UnsupportedStructureError
from ...hf_models.build import build_meta
from ...hf_models.resize import copy_with
from ...hf_models.sizes import HEADS, HIDDEN, KV_HEADS, ConfigSizes
from ...hf_models.tiny_model import logits_of, relative_error
from ..groups import AxisName, Branch, Scheme
from ..layout import Layout, layout_with_rest
from ..shape_probe import AxisMap, ParameterInfo
from .bench import Bench
from .branches import discover_branches
from .norms import has_bare_layernorm
from .residual_stream import StreamAxis, inner_powers, stream_axes, stream_powers, written_patterns

_EXACT, _FELT = 1e-6, 1e-3  # relative errors of logits


def schemes_of(
    bench: Bench,
    branches: list[Branch],
    units: int,
    axes: list[AxisName],
    granule: int = 1,
    per_channel: int = 0,
    bundle: int = 1,
) -> Iterator[Scheme]:
    """Yield schemes with these branches' layouts: units of each layer first, then those that all layers share."""
    known = stream_axes(bench.model, bench.axis_map, axes)
    shifts = {axis.pattern: axis.vector.shift for axis in known if axis.vector.shift}
    for shared in (False, True):
        for powers in inner_powers(known):
            yield Scheme(
                tuple(branches), units // bundle, shifts, powers, shared=shared, granule=granule,
                per_channel=per_channel, bundle=bundle,
            )  # fmt: skip


def stream_schemes(bench: Bench, axes: list[AxisName]) -> Iterator[Scheme]:
    """Schemes for the residual stream: layouts by the slope, powers by the stream's structure."""
    units = bench.width
    layouts: dict[AxisName, Layout] = {}
    for name, dim in axes:
        info = bench.axis_map.parameters[name]
        runs, rest = divmod(info.shape[dim], units)
        layouts[info.pattern, dim] = layout_with_rest(runs, 1, rest)
    known, after = bench.stream(axes)
    coupled = bench.axis_map.coupled_head_dim is not None
    found = constants_by_width(bench.model_class, bench.config, bench.sizes, coupled)
    against = powers_against(bench.model, bench.input_ids, bench.axis_map, found) if found else {}
    for info in bench.axis_map.parameters.values():
        if info.pattern in against:
            layouts[info.pattern, 0] = layout_with_rest(0, 1, info.shape[0])
    shifts = {axis.pattern: axis.vector.shift for axis in known if axis.vector.shift}
    centred = _subtracts_mean(bench, known)
    branch = Branch(("residual stream", 0), layouts)
    more = partial(bench.sides(axes, after).further_places, known)
    for powers in stream_powers(known, after, bench.tied, centred, more):
        writers = written_patterns(known, powers) if centred else frozenset()
        yield Scheme((branch,), units, shifts, powers | against, writers)


def _subtracts_mean(bench: Bench, axes: list[StreamAxis]) -> bool:
    """Tell whether the norms of the stream subtract the mean.

    Raises:
        UnsupportedStructureError: where some do and some don't.
    """
    kinds = {axis.vector.subtracts_mean: axis for axis in axes if axis.vector.kind == "scale"}
    bare = has_bare_layernorm(bench.model, bench.width)
    if len(kinds) == 2 or (bare and False in kinds):
        raise UnsupportedStructureError(
            f"some norms of the stream subtract its mean ({kinds[True].info.module if True in kinds else 'one'}), "
            f"others don't ({kinds[False].info.module})"
        )
    return bare or True in kinds


def mlp_by_width(bench: Bench, axes: list[AxisName]) -> Scheme:
    """Return the scheme of an MLP, or a mixer, whose channels are so many for each channel of the stream.

    Raises:
        UnsupportedStructureError: where they aren't.
    """
    width = bench.width
    sizes = {bench.axis_map.parameters[name].shape[dim] for name, dim in axes}
    units = min(sizes)
    if units % width:
        raise UnsupportedStructureError(f"{axes[0][0]} dimension {axes[0][1]} follows neither heads nor the stream")
    branches = discover_branches(bench.gradients, bench.axis_map, axes, units, 1)
    return next(schemes_of(bench, branches, units, axes, per_channel=units // width))


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
