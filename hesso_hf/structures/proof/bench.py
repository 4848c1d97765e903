"""The bench: a tiny random model of a class, on which candidates for a structure are tried.

Random units of the tiny model are zeroed, the same units are cut out, and the logits compared.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import UnsupportedStructureError
from ...hf_models.tiny_model import forward_logits, logits_of, random_model, relative_error, token_ids
from ..build import build_groups, coupled_units, num_units
from ..cut import cuts_by_tensor, load_cut, zero_units_
from ..groups import AxisName, PruningGroups, Scheme
from ..layout import block_layout
from ..shape_probe import probe_axes
from .experts import ids_for_all_experts
from .norms import norms_after_writers
from .ownership import GradientProbe, layout_of
from .residual_stream import Sides, StreamAxis, stream_axes, writing_modules
from .result import TOLERANCE
from .tiny_case import units_to_keep

Fold = tuple[float, float]  # what is added to a stored value, and what the sum is multiplied by


class Bench:
    """A tiny random model on which schemes are tried.

    Attributes:
        axis_map: its axes; a proof may find that heads and width are coupled after all, or aren't, and change it.
        logits: the whole model's.
        tied: whether the embedding is the output matrix too.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
        self.model_class, self.config = model_class, config
        self.model = random_model(model_class, config)
        self.axis_map = probe_axes(model_class, config)
        self.sizes = self.axis_map.sizes
        self.input_ids = token_ids(config)
        self.logits = logits_of(self.model, self.input_ids)
        self.gradients = GradientProbe(self.model, ids_for_all_experts(config), forward_logits)
        self.tied = not any(info.role == "output" for info in self.axis_map.parameters.values())

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return num_units("embedding_channels", self.sizes)

    def stream(self, axes: list[AxisName]) -> tuple[list[StreamAxis], set[str]]:
        """Describe the axes along the residual stream, and name the norms of what is yet to be added to it."""
        known = stream_axes(self.model, self.axis_map, axes)
        after = norms_after_writers(self.model, self.input_ids, writing_modules(known))
        return self.sides(axes, after).settled(known), after

    def check_reached(self, axes: list[AxisName]) -> None:
        """Refuse axes of what brings images or sound into the stream: no text shows what becomes of that.

        It may be none of these axes, where its size is a config value of its own (PaliGemma's `projection_dim`).

        Raises:
            UnsupportedStructureError: naming the first matrix outside all layers that text doesn't reach.
        """
        for name, dim in [*axes, *((name, 0) for name in self.axis_map.parameters)]:
            info = self.axis_map.parameters[name]
            if not info.layer and len(info.shape) > 1 and bool(self.gradients.dead[name, dim].all()):
                raise UnsupportedStructureError(
                    f"text alone doesn't reach {name}, so nothing shows what the model makes of its channels, and "
                    "hidden_size stays; a class of the text part alone has none"
                )

    def sides(self, axes: list[AxisName], after: set[str]) -> Sides:
        """Return what settles by gradients on which side of these axes the stream is."""
        return Sides(self.gradients, self.axis_map, axes, after, self.width)

    def split(self, axes: list[AxisName]) -> tuple[list[AxisName], list[AxisName]]:
        """Divide the axes that the width moves into those along the stream and those inside the blocks.

        Where all norms let nothing of a channel through, no weight has a gradient at that channel of the stream.
        """
        gates = self._gates(axes)

        def zero(mask: torch.Tensor) -> None:
            for (name, _), fill in gates.items():
                self.gradients.parameters[name].masked_fill_(mask, fill)

        owners = self.gradients.owners(self.width, zero, axes, tuple(gates.items()))
        one_each = block_layout(1)
        along = set(gates) | {axis for axis in axes if layout_of(owners[axis], len(owners[axis])) == one_each}
        along |= {axis for axis in axes if self.gradients.output_axis(axis[0]) in along}  # biases, as weights' rows
        return [axis for axis in axes if axis in along], [axis for axis in axes if axis not in along]

    def _gates(self, axes: list[AxisName]) -> dict[AxisName, float]:
        """Return the vectors of the stream's norms with the value that lets nothing through.

        Where a layer's norms are its own members, a norm further inside (of the queries of all heads) is none of them.
        """
        gates: dict[AxisName, float] = {}
        inner: dict[AxisName, float] = {}
        for axis in stream_axes(self.model, self.axis_map, axes):
            for name, dim in axes:
                info = self.axis_map.parameters[name]
                if (info.pattern, dim) == (axis.pattern, axis.dim) and info.shape == (self.width,):
                    member = info.module.rpartition(".")[0] == info.layer or not info.layer
                    if axis.vector.kind != "other":
                        (gates if member else inner)[name, dim] = -axis.vector.shift
        return gates if any(self.axis_map.parameters[name].layer for name, _ in gates) else gates | inner

    def error_of(self, schemes: dict[str, Scheme]) -> float:
        """Zero random units, cut them out, and return the relative error of the cut model's logits."""
        return Trial(self, schemes).error_of(schemes)

    def groups(self, schemes: dict[str, Scheme]) -> PruningGroups:
        """Build the tiny model's groups."""
        built = {n: build_groups(n, self.axis_map, scheme) for n, scheme in schemes.items()}
        return PruningGroups(built, {}, coupled_units(built, self.axis_map, schemes))


class Trial:
    """One set of units of the tiny model, zeroed under fixed layouts, and the model that is cut to the others.

    Schemes that differ in their powers of c alone are told apart by folding these into what was cut once; the one that
    holds is then cut as an export cuts.
    """

    def __init__(self, bench: Bench, schemes: dict[str, Scheme]) -> None:
        self.bench = bench
        groups = bench.groups(schemes)
        self.kept, small_config = units_to_keep(groups, bench.model_class, bench.config, bench.sizes)
        zeroed = copy.deepcopy(bench.model)
        self.parameters = dict(zeroed.named_parameters())
        zero_units_(self.parameters, groups, self.kept)
        self.logits = logits_of(zeroed, bench.input_ids)
        if relative_error(self.logits, bench.logits) < 100 * TOLERANCE:
            raise UnsupportedStructureError("zeroing its units changes nothing, so no layout can be told from another")
        self.small = bench.model_class(small_config).float().eval()
        plain = bench.groups({name: replace(scheme, powers={}) for name, scheme in schemes.items()})
        load_cut(self.small, self.parameters, plain, self.kept)
        cut = cuts_by_tensor(plain, self.kept)
        self.cut = {name: p.detach().clone() for name, p in self.small.named_parameters() if name in cut}
        owners = {axis: name for name, groups in plain.structures.items() for _, axis in groups.all_axes()}
        self.roots = {
            name: [(owners[axis], math.sqrt(len(units) / total)) for axis, units, total in cut[name]]
            for name in self.cut
        }
        self.folded: dict[str, list[Fold]] = {}  # what the small model's parameters have in them

    def error_of(self, schemes: dict[str, Scheme]) -> float:
        """Cut with the schemes' powers of c and compare logits."""
        self._fold(schemes)
        error = self._error()
        if error > TOLERANCE:
            return error
        self.folded = {}
        load_cut(self.small, self.parameters, self.bench.groups(schemes), self.kept)
        return self._error()

    @torch.no_grad()
    def _fold(self, schemes: dict[str, Scheme]) -> None:
        """Multiply what was cut by the schemes' powers of c."""
        parameters = dict(self.small.named_parameters())
        for name, values in self.cut.items():
            pattern = self.bench.axis_map.parameters[name].pattern
            folds = [
                (schemes[owner].shifts.get(pattern, 0.0), root ** schemes[owner].powers.get(pattern, 0))
                for owner, root in self.roots[name]
            ]
            if self.folded.get(name) == folds:
                continue
            for shift, factor in folds:
                values = (values + shift) * factor - shift if factor != 1.0 else values
            parameters[name].copy_(values)
            self.folded[name] = folds

    def _error(self) -> float:
        logits = logits_of(self.small, self.bench.input_ids)
        if logits.shape != self.logits.shape:
            raise UnsupportedStructureError(f"{type(self.small).__name__} gives these channels out, so all are needed")
        return relative_error(logits, self.logits)
