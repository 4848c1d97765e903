"""Shape probe: which dimension of which parameter does each config size determine?

The model is built on the meta device from its config and again with one size changed; every dimension that moved is an
axis of that size and the slope is its stride. No forward pass, no weights, no table per architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..hf_models.build import build_meta
from ..hf_models.resize import copy_with
from ..hf_models.sizes import EXPERT_MLP, HEADS, HIDDEN, KV_HEADS, MLP, ConfigSizes, text_config_of
from .groups import AxisName

Role = Literal["matrix", "bias", "norm", "embedding", "output", "other"]
Slopes = dict[AxisName, Fraction]
PROBED_SIZES = (HEADS, KV_HEADS, MLP, EXPERT_MLP, HIDDEN)


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of the model: where it sits and what its owner is.

    Attributes:
        layer: name of the outermost list's member that holds it (`model.layers.3`), "" outside any.
        pattern: the name with every index of a module list replaced by `*`, the same for all layers that have the same
            parameters; where layers of several kinds make up the list, a digest of these behind it tells them apart.
        tied: whether it is an embedding that is the output matrix too.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    module: str
    layer: str
    pattern: str
    tied: bool = False

    @property
    def kind(self) -> str:
        """The part of the pattern that stands for the layer, "" outside any."""
        return ".".join(self.pattern.split(".")[: self.layer.count(".") + 1]) if self.layer else ""


@dataclass(frozen=True)
class AxisMap:
    """What the probe found: for each (parameter, dim) the slopes, in indices per one more of each config size.

    Attributes:
        coupled_head_dim: that of a model in which it follows hidden_size / num_attention_heads, so that both shrink
            together; None of others.
        picky: whether the class refuses sizes that its config class accepts.
        sizes: those of the config that was probed.
    """

    parameters: dict[str, ParameterInfo]
    slopes: dict[AxisName, dict[str, Fraction]]
    failed: dict[str, str]
    coupled_head_dim: int | None = None
    picky: bool = False
    sizes: ConfigSizes = field(default_factory=ConfigSizes)

    def moving(self, sizes: Iterable[str]) -> dict[AxisName, dict[str, Fraction]]:
        """Return the axes that at least one of `sizes` moves."""
        wanted = set(sizes)
        return {axis: found for axis, found in self.slopes.items() if wanted & set(found)}


def probe_axes(model_class: type[PreTrainedModel], config: PretrainedConfig, couple: bool = True) -> AxisMap:
    """Find the axes of every probed config size by comparing parameter shapes on the meta device.

    With `couple` it looks for heads and width that only shrink together.
    """
    sizes = ConfigSizes.of(config)
    parameters = describe_parameters(build_meta(model_class, copy_with(config, {}, sizes)))
    axis_map, picky = AxisMap(parameters, {}, {}, sizes=sizes), False
    for size in PROBED_SIZES:
        if sizes.get(size) is None:
            continue
        try:
            changed, refused = _slopes_of(model_class, config, axis_map, size)
        except Exception as error:  # model code may refuse a size with any exception type
            axis_map.failed[size] = f"{type(error).__name__}: {error}"
            continue
        picky = picky or refused
        for axis, slope in changed.items():
            axis_map.slopes.setdefault(axis, {})[size] = slope
    axis_map = replace(axis_map, picky=picky)
    follows = couple and _heads_follow_width(axis_map.slopes)
    return coupled_axes(model_class, config, axis_map) if follows else axis_map


def _heads_follow_width(slopes: dict[AxisName, dict[str, Fraction]]) -> bool:
    """Tell whether heads and width only change together: another number of heads alone leaves their rows as they are.

    Where head_dim is rounded down (7 heads at width 60), one head more even makes fewer rows. Both sides of the weights
    that write the queries follow the width then.
    """
    by_heads = [found[HEADS] for found in slopes.values() if HEADS in found]
    by_width = [name for (name, _), found in slopes.items() if HIDDEN in found]
    both_sides = len(set(by_width)) < len(by_width)
    return both_sides and not (by_heads and min(by_heads) > 0 and any(_is_whole(slope) for slope in by_heads))


def coupled_axes(model_class: type[PreTrainedModel], config: PretrainedConfig, axis_map: AxisMap) -> AxisMap:
    """Return the map of a model whose heads and width shrink together, if the width is a number of heads.

    The axes of `hidden_size` are then those that move when heads and width grow together, so that head_dim stays.
    """
    heads, hidden, kv_heads = (axis_map.sizes.get(name) for name in (HEADS, HIDDEN, KV_HEADS))
    if not heads or not hidden or hidden % heads:
        return axis_map
    head_dim, group = hidden // heads, heads // kv_heads if kv_heads and heads % kv_heads == 0 else 1
    changes = {HEADS: heads + group, HIDDEN: hidden + group * head_dim}
    if kv_heads and kv_heads > 1:
        changes[KV_HEADS] = kv_heads + 1
    try:
        moved = _moved(model_class, config, axis_map, changes, group * head_dim)
    except Exception:  # model code may refuse the sizes with any exception type; the width's own axes serve then
        return replace(axis_map, coupled_head_dim=head_dim)
    slopes = {axis: {s: n for s, n in found.items() if s != HIDDEN} for axis, found in axis_map.slopes.items()}
    for axis, slope in moved.items():
        slopes.setdefault(axis, {})[HIDDEN] = slope
    left = {axis: found for axis, found in slopes.items() if found}
    return replace(axis_map, slopes=left, coupled_head_dim=head_dim)


def describe_parameters(model: nn.Module) -> dict[str, ParameterInfo]:
    """Describe each (untied) parameter by the kind of module that owns it."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    output_matrix = getattr(output, "weight", None)
    owners = dict(model.named_modules())
    found = {}
    for name, parameter in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        owner = owners[module_name]
        role = _role(owner, leaf, owner is output)
        place = layer_and_pattern(name, owners)
        tied = role == "embedding" and parameter is output_matrix
        found[name] = ParameterInfo(name, tuple(parameter.shape), role, module_name, *place, tied)
    types = getattr(text_config_of(model.config), "layer_types", None) if isinstance(model, PreTrainedModel) else None
    return _with_kinds(found, types or ())


def _with_kinds(parameters: dict[str, ParameterInfo], types: Sequence[str]) -> dict[str, ParameterInfo]:
    """Tell the patterns of layers apart that have other parameters than the rest of their list, or other shapes.

    `types` is what the config calls each layer.
    """
    members: dict[str, set[str]] = {}
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for info in parameters.values():
        if info.layer:
            members.setdefault(info.layer, set()).add(info.pattern)
            shapes.setdefault(info.pattern, set()).add(info.shape)
    if any(len(found) > 1 for found in shapes.values()):
        for layer, patterns in members.items():
            index = layer.rpartition(".")[2]
            if index.isdigit() and int(index) < len(types):
                patterns.add(f"({types[int(index)]})")
    kinds: dict[str, set[frozenset[str]]] = {}
    for layer, patterns in members.items():
        kinds.setdefault(layer.rpartition(".")[0], set()).add(frozenset(patterns))
    several = {name for name, found in kinds.items() if len(found) > 1}
    named = {}
    for name, info in parameters.items():
        if info.layer.rpartition(".")[0] in several:
            # by what it consists of, so that the name is the same in a model with other kinds beside
            digest = hashlib.sha256("|".join(sorted(members[info.layer])).encode()).hexdigest()[:6]
            parts = info.pattern.split(".")
            parts[info.layer.count(".")] = f"*{digest}"
            info = replace(info, pattern=".".join(parts))
        named[name] = info
    return named


def _slopes_of(
    model_class: type[PreTrainedModel], config: PretrainedConfig, axis_map: AxisMap, size: str
) -> tuple[Slopes, bool]:
    """Return the slopes of the axes that a size moves, and whether the class refused some step."""
    errors: list[Exception] = []
    uneven: Slopes | None = None
    for step in _steps(axis_map.sizes, size):
        try:
            moved = _moved(model_class, config, axis_map, {size: axis_map.sizes.by_name[size] + step}, step)
        except Exception as error:  # the next step may suit a divisibility check of the model code
            errors.append(error)
            continue
        if all(map(_is_whole, moved.values())) and moved.keys() >= (uneven or {}).keys():
            return moved, bool(errors)
        uneven = moved if uneven is None else uneven
    if uneven is not None:
        return uneven, bool(errors)
    raise errors[0]


def _steps(sizes: ConfigSizes, size: str) -> list[int]:
    """Increments to try: one, then ones that keep heads divisible by key-value heads, and the width by the heads.

    MLPs grow by two first: some read half as many channels as their size says.
    """
    kv_heads, heads, value = sizes.get(KV_HEADS) or 1, sizes.get(HEADS) or 1, sizes.by_name[size]
    first = 2 if size in (MLP, EXPERT_MLP) else 1
    return list(dict.fromkeys([first, 1, {HEADS: kv_heads, HIDDEN: heads}.get(size, value), value]))


def _moved(
    model_class: type[PreTrainedModel], config: PretrainedConfig, axis_map: AxisMap, changes: dict[str, int], step: int
) -> Slopes:
    """Return the axes that other sizes make longer or shorter, and by how much for one more, if `step` is so many."""
    model = build_meta(model_class, copy_with(config, changes, axis_map.sizes))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if shapes.keys() != axis_map.parameters.keys():
        raise ValueError("the set of parameters itself changes with the size")
    before = {name: info.shape for name, info in axis_map.parameters.items()}
    return {axis: Fraction(more, step) for axis, more in growth(before, shapes).items()}


def growth(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> dict[AxisName, int]:
    """Return by how much dimensions of tensors differ, given their shapes by name; those that don't are left out."""
    return {
        (name, dim): long - short
        for name, shape in before.items()
        for dim, (short, long) in enumerate(zip(shape, after[name], strict=True))
        if long != short
    }


def _is_whole(slope: Fraction) -> bool:
    return slope.denominator == 1


def _role(owner: nn.Module, leaf: str, is_output: bool) -> Role:
    own = dict(owner.named_parameters(recurse=False))
    widest = max(parameter.dim() for parameter in own.values())
    if own[leaf].dim() == 1:
        return "bias" if widest > 1 else "norm"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    return "output" if is_output else "matrix"


def layer_and_pattern(name: str, owners: dict[str, nn.Module]) -> tuple[str, str]:
    """Return the outermost list's member that holds a tensor (`model.layers.3`), "" outside any, and the pattern.

    Only indices into lists of alike modules are replaced: those of a sequence (`ffn.0`, `ffn.2`) tell members apart.
    """
    parts = name.split(".")
    in_lists = [
        index for index, part in enumerate(parts)
        if part.isdigit() and isinstance(owners.get(".".join(parts[:index])), nn.ModuleList)
    ]  # fmt: skip
    layer = ".".join(parts[: in_lists[0] + 1]) if in_lists else ""
    return layer, ".".join("*" if index in in_lists else part for index, part in enumerate(parts))
