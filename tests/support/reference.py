"""HESSO written from its description (arXiv 2409.09085), slowly: one Python loop over units with explicit indices.

The oracle of the fast one; it shares no code with `hesso_hf`. Every unit is gathered into one flat vector of weights
and one of gradients, and every formula is applied to those vectors.
"""

from __future__ import annotations

import copy
import functools
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA2_NORMS = (*LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Slice:
    """Some indices of one dimension of one parameter; the model uses the stored value plus `offset`."""

    parameter: str
    dim: int
    indices: tuple[int, ...]
    offset: float = 0.0


Unit = list[Slice]
Structures = dict[str, list[list[Unit]]]  # structure -> layer -> unit
Key = tuple[str, int, int]  # structure, layer, unit


def decoder_units(model: PreTrainedModel, norms: Iterable[str] = LLAMA_NORMS, norm_offset: float = 0.0) -> Structures:
    """List every unit of a Llama-like decoder (Llama, Mistral, Gemma 2), in the order of the fast implementation."""
    config: PretrainedConfig = model.config
    present = {name for name, _ in model.named_parameters()}
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layers = [f"model.layers.{index}" for index in range(config.num_hidden_layers)]

    def existing(unit: Unit) -> Unit:  # biases and an untied output matrix may be missing
        return [piece for piece in unit if piece.parameter in present]

    def head_unit(layer: str, kv_head: int) -> Unit:
        queries_per_kv = heads // kv_heads
        q_rows: list[int] = []
        for query in range(kv_head * queries_per_kv, (kv_head + 1) * queries_per_kv):
            q_rows += [query * head_dim + i for i in range(head_dim)]
        kv_rows = [kv_head * head_dim + i for i in range(head_dim)]
        unit: Unit = []
        for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
            unit.append(Slice(f"{layer}.self_attn.{name}.weight", 0, tuple(rows)))
            unit.append(Slice(f"{layer}.self_attn.{name}.bias", 0, tuple(rows)))
        return [*unit, Slice(f"{layer}.self_attn.o_proj.weight", 1, tuple(q_rows))]

    def query_unit(layer: str, head: int) -> Unit:
        rows = tuple(range(head * head_dim, (head + 1) * head_dim))
        queries = [Slice(f"{layer}.self_attn.q_proj.{leaf}", 0, rows) for leaf in ("weight", "bias")]
        return [*queries, Slice(f"{layer}.self_attn.o_proj.weight", 1, rows)]

    def mlp_unit(layer: str, channel: int) -> Unit:
        unit = [
            Slice(f"{layer}.mlp.{name}.{leaf}", 0, (channel,))
            for name in ("gate_proj", "up_proj")
            for leaf in ("weight", "bias")
        ]
        return [*unit, Slice(f"{layer}.mlp.down_proj.weight", 1, (channel,))]

    def stream_unit(channel: int) -> Unit:
        unit = [Slice("model.embed_tokens.weight", 1, (channel,)), Slice("lm_head.weight", 1, (channel,))]
        unit.append(Slice("model.norm.weight", 0, (channel,), norm_offset))
        for layer in layers:
            unit += [Slice(f"{layer}.{norm}.weight", 0, (channel,), norm_offset) for norm in norms]
            for reader in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
                unit.append(Slice(f"{layer}.{reader}.weight", 1, (channel,)))
            for writer in ("self_attn.o_proj", "mlp.down_proj"):
                unit.append(Slice(f"{layer}.{writer}.weight", 0, (channel,)))
                unit.append(Slice(f"{layer}.{writer}.bias", 0, (channel,)))
        return unit

    return {
        "attention_heads": [[existing(head_unit(layer, j)) for j in range(kv_heads)] for layer in layers],
        "query_heads": [[existing(query_unit(layer, j)) for j in range(heads)] for layer in layers],
        "mlp_channels": [[existing(mlp_unit(layer, j)) for j in range(config.intermediate_size)] for layer in layers],
        "embedding_channels": [[existing(stream_unit(j)) for j in range(config.hidden_size)]],
    }


def fused_units(model: PreTrainedModel) -> Structures:
    """List every unit of Phi-3: q, k and v are rows of one matrix, one after the other, and so are gate and up."""
    config: PretrainedConfig = model.config
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    fused = {
        "q_proj": ("qkv_proj", 0),
        "k_proj": ("qkv_proj", queries),
        "v_proj": ("qkv_proj", queries + keys),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", config.intermediate_size),
    }
    present = {name for name, _ in model.named_parameters()}

    def fuse(piece: Slice) -> Slice | None:
        for separate, (name, start) in fused.items():
            if f".{separate}." in piece.parameter:
                parameter = piece.parameter.replace(separate, name)
                rows = tuple(start + row for row in piece.indices) if piece.dim == 0 else piece.indices
                return Slice(parameter, piece.dim, rows) if parameter in present else None
        return piece

    class Separate:
        """The model as if its matrices were separate; columns of a fused one are listed once."""

        def __init__(self) -> None:
            self.config = config

        def named_parameters(self) -> list[tuple[str, None]]:
            names = set(present)
            for name in present:
                for separate, (matrix, _) in fused.items():
                    names.add(name.replace(matrix, separate))
            return [(name, None) for name in names]

    units: Structures = {}
    for structure, layers in decoder_units(Separate()).items():  # type: ignore[arg-type]
        units[structure] = [
            [list(dict.fromkeys(found for piece in unit if (found := fuse(piece)) is not None)) for unit in layer]
            for layer in layers
        ]
    return units


PHI = {  # Phi's names for what Llama calls otherwise
    "self_attn.dense": "self_attn.o_proj", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj",
    "final_layernorm": "norm",
}  # fmt: skip


def phi_units(model: PreTrainedModel) -> tuple[Structures, dict[str, int]]:
    """List every unit of Phi, and what writes to its stream: parameter and the dimension along the channels."""
    real = {name: name for name, _ in model.named_parameters()}
    for name in list(real):
        for phi, llama in PHI.items():
            if f"{phi}." in name:
                real[name.replace(phi, llama)] = name

    class Renamed:
        """The model as if its modules had Llama's names."""

        def __init__(self) -> None:
            self.config = model.config

        def named_parameters(self) -> list[tuple[str, None]]:
            return [(name, None) for name in real]

    def rename(piece: Slice) -> Slice:
        return Slice(real[piece.parameter], piece.dim, piece.indices, piece.offset)

    units: Structures = {
        structure: [[[rename(piece) for piece in unit] for unit in layer] for layer in layers]
        for structure, layers in decoder_units(Renamed(), ("input_layernorm",)).items()  # type: ignore[arg-type]
    }
    width = model.config.hidden_size
    for channel, unit in enumerate(units["embedding_channels"][0]):  # a norm has a bias here
        unit += [Slice(n, 0, (channel,)) for n in real if n == real[n] and n.endswith("layernorm.bias")]
    writers = {name: 0 for name in real if real[name] == name and (".dense." in name or ".fc2." in name)}
    assert all(model.get_parameter(name).shape[0] == width for name in writers)
    return units, writers | {"model.embed_tokens.weight": 1}


_tensor = functools.cache(torch.tensor)  # of indices: the same ones are asked for at every step


def piece_of(tensor: torch.Tensor, piece: Slice) -> torch.Tensor:
    """Copy a slice's values out of a tensor of the parameter's shape."""
    return tensor.index_select(piece.dim, _tensor(piece.indices))


def write_piece(tensor: torch.Tensor, piece: Slice, values: torch.Tensor) -> None:
    """Put values into a slice."""
    tensor.index_copy_(piece.dim, _tensor(piece.indices), values)


def fill_piece(tensor: torch.Tensor, piece: Slice, value: float) -> None:
    """Put one value into all of a slice."""
    tensor.index_fill_(piece.dim, _tensor(piece.indices), value)


@torch.no_grad()
def flat_weights(parameters: dict[str, nn.Parameter], unit: Unit) -> torch.Tensor:
    """All (effective) weights of a unit as one float64 vector."""
    return torch.cat([piece_of(parameters[s.parameter], s).flatten().double() + s.offset for s in unit])


@torch.no_grad()
def flat_gradients(parameters: dict[str, nn.Parameter], unit: Unit) -> torch.Tensor:
    """The gradients of a unit's weights as one float64 vector, zero for frozen ones."""
    pieces = []
    for piece in unit:
        parameter = parameters[piece.parameter]
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        pieces.append(piece_of(gradient, piece).flatten().double())
    return torch.cat(pieces)


class Gathering:
    """`flat_weights` of all units at once: where their elements lie in the vector of all parameters."""

    def __init__(self, parameters: dict[str, nn.Parameter], units: dict[Key, Unit]) -> None:
        ends = np.cumsum([parameter.numel() for parameter in parameters.values()])
        places = {
            name: torch.arange(end - parameter.numel(), end).view(parameter.shape)
            for (name, parameter), end in zip(parameters.items(), ends.tolist(), strict=True)
        }
        found = [torch.cat([piece_of(places[s.parameter], s).flatten() for s in unit]) for unit in units.values()]
        self.keys, self.sizes, self.places = list(units), [len(unit) for unit in found], torch.cat(found)
        offsets = {name: torch.zeros(parameter.shape) for name, parameter in parameters.items()}
        for piece in {piece for unit in units.values() for piece in unit}:
            fill_piece(offsets[piece.parameter], piece, piece.offset)
        self.offsets = self._vector(offsets.values())

    def weights(self, tensors: Iterable[torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Each unit's (effective) weights as one float64 vector."""
        return self._split(self._vector(tensors) + self.offsets)

    def gradients(self, parameters: Iterable[nn.Parameter]) -> dict[Key, torch.Tensor]:
        """The gradients of each unit's weights, zero for frozen ones."""
        return self.plain(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)

    def plain(self, tensors: Iterable[torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Each unit's elements of tensors of the parameters' shapes, in the parameters' order."""
        return self._split(self._vector(tensors))

    def _vector(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.detach().flatten().double() for tensor in tensors])

    def _split(self, vector: torch.Tensor) -> dict[Key, torch.Tensor]:
        return dict(zip(self.keys, vector[self.places].split(self.sizes), strict=True))


def saliency_of(criterion: str, steps: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Apply one criterion to one unit's (weights, gradients) at several steps."""
    n = len(steps)
    x_dot_g = sum(float(x @ g) for x, g in steps)
    x_norm2 = sum(float(x @ x) for x, _ in steps)
    g_norm2 = sum(float(g @ g) for _, g in steps)
    if criterion == "magnitude":
        return (x_norm2 / n) ** 0.5
    if criterion == "avg_magnitude":
        return (x_norm2 / n) ** 0.5 / steps[0][0].numel() ** 0.5
    if criterion == "cosine_similarity":
        return 1.0 - x_dot_g / (x_norm2 * g_norm2) ** 0.5
    if criterion == "taylor_first_order":
        return abs(x_dot_g / n)
    if criterion in ("taylor_second_order", "reconstruction"):  # the latter's stand-in where nothing is healed
        return 0.5 * sum(float(((x * g) ** 2).sum()) for x, g in steps) / n
    raise ValueError(criterion)


class ReferenceHesso:
    """Algorithm 1 around the step of any optimizer.

    Args:
        removed: units to remove a layer, per structure.
        across_layers: whether the units of all layers compete, and as many go in total.
        kv_heads: key-value heads per layer; as many query heads of each go.
        writers: parameters that write to a stream of mean zero, with the dimension along its channels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: Optimizer,
        units: Structures,
        removed: dict[str, int],
        warmup_steps: int,
        pruning_steps: int,
        pruning_periods: int,
        saliency: dict[str, float],
        saliency_batches: int = 8,
        across_layers: bool = False,
        kv_heads: int = 1,
        writers: dict[str, int] | None = None,
    ) -> None:
        self.writers = writers or {}
        self.kv_heads, self.heads = kv_heads, len(units["query_heads"][0])
        self.parameters = dict(model.named_parameters())
        self.base, self.removed, self.saliency, self.across_layers = base, removed, saliency, across_layers
        self.units: dict[Key, Unit] = {
            (name, layer, j): unit
            for name in removed
            for layer, row in enumerate(units[name])
            for j, unit in enumerate(row)
        }
        self.gathering = Gathering(self.parameters, self.units)
        self.periods: list[tuple[int, int]] = []  # first step and length of each
        length = pruning_steps // pruning_periods
        for period in range(pruning_periods):
            last = period == pruning_periods - 1
            self.periods.append((warmup_steps + period * length, pruning_steps - period * length if last else length))
        self.redundant: set[Key] = set()
        self.pruned: set[Key] = set()
        self.history: deque[dict[Key, tuple[torch.Tensor, torch.Tensor]]] = deque(maxlen=saliency_batches)
        self.scored: dict[Key, float] = {}  # at the last scoring
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """One step of the base optimizer on the gradients that stand in `.grad`, and of HESSO."""
        for key in self.pruned:
            self._fill(key, gradients=True)
        if self.steps <= self.periods[-1][0]:
            self.observe()
        for period, (start, _) in enumerate(self.periods):
            if self.steps == start:
                self._mark(period)
                self.history.clear()
        with torch.enable_grad():
            self.base.step()
        for start, length in self.periods:
            t = self.steps - start
            if 0 <= t < length:
                for key in self.units:
                    if key in self.redundant:
                        self._multiply(key, (length - t - 1) / (length - t))
                if t == length - 1:
                    self.pruned |= self.redundant
                    self.redundant = set()
        for key in self.pruned:
            self._fill(key)
        if self.steps >= self.periods[0][0]:
            self._centre()
        self.steps += 1

    def _centre(self) -> None:
        """Take the mean out of what is written to the stream: all of it, in the first period 1/(T-t) at step t."""
        share, scales = 1.0, {key[2]: 1.0 for key in self.units if key[0] == "embedding_channels"}
        for period, (start, length) in enumerate(self.periods):
            t = self.steps - start
            if 0 <= t < length:
                share = 1.0 / (length - t) if period == 0 else 1.0
                scales |= {
                    key[2]: (length - t - 1) / length for key in self.redundant if key[0] == "embedding_channels"
                }
        scales |= {key[2]: 0.0 for key in self.pruned if key[0] == "embedding_channels"}
        for name, dim in self.writers.items():
            tensor = self.parameters[name].data
            total = tensor.double().sum(dim)
            for channel, scale in scales.items():
                old = tensor.select(dim, channel)
                old.copy_(old.double() - share * scale * total / sum(scales.values()))

    def observe(self) -> None:
        """Remember every unit's weights and gradient of this step."""
        parameters = self.parameters.values()
        weights, gradients = self.gathering.weights(parameters), self.gathering.gradients(parameters)
        self.history.append({key: (weights[key], gradients[key]) for key in self.units})

    def scores(self) -> dict[Key, float]:
        """Weighted sum of the criteria of all kept units, each divided by its norm over those that compete."""
        kept = [key for key in self.units if key not in self.pruned]
        total = dict.fromkeys(kept, 0.0)
        for criterion, weight in self.saliency.items():
            values = {key: saliency_of(criterion, [step[key] for step in self.history]) for key in kept}
            for rivals in self._competitions(kept):
                norm = sum(values[key] ** 2 for key in rivals) ** 0.5
                for key in rivals:
                    total[key] += weight * values[key] / norm
        return total

    def _competitions(self, keys: list[Key]) -> list[list[Key]]:
        """Split units into those that compete with each other."""
        groups: dict[tuple[str, int, int], list[Key]] = {}
        for key in keys:
            place = (-1, -1) if self.across_layers else (key[1], self._kv_head(key))
            groups.setdefault((key[0], *place), []).append(key)
        return list(groups.values())

    def _kv_head(self, key: Key) -> int:
        """The key-value head that a query head belongs to; -1 for other units."""
        return key[2] // (self.heads // self.kv_heads) if key[0] == "query_heads" else -1

    def _teams(
        self, keys: list[Key], scores: dict[Key, float], among: set[Key] | None = None, first: Iterable[Key] = ()
    ) -> list[list[Key]]:
        """Units that go together, the lowest in front, `first` before all others; of `among` only.

        A unit is a team of its own, but across layers as many query heads go of all key-value heads of a layer: the
        lowest of each are a team, the second lowest of each, and so on. Where some have no unit, the fuller go first.
        """
        runs: dict[tuple[int, int], list[Key]] = {}
        for key in keys:
            runs.setdefault((key[1], self._kv_head(key)), []).append(key)
        teams: dict[tuple[int, int], list[Key]] = {}
        for (layer, _), run in runs.items():
            going = [key for key in run if among is None or key in among]
            for rank, key in enumerate(sorted(going, key=lambda key: (key not in first, scores[key]))):
                if not self.across_layers or rank < len(run) - 1:  # no layer may lose its last unit
                    teams.setdefault((layer, rank), []).append(key)

        def place(team: list[Key]) -> tuple[bool, int, float]:
            return (not any(key in first for key in team), -len(team), sum(scores[key] for key in team))

        return sorted(teams.values(), key=place)

    def _number(self, everyone: list[Key], share: Fraction = Fraction(1)) -> int:
        """How many teams of a competition go."""
        structure, layers = everyone[0][0], len({layer for _, layer, _ in everyone})
        runs = self.kv_heads if structure == "query_heads" else 1
        return round(Fraction(self.removed[structure] * layers, runs) * share)

    def _mark(self, period: int) -> None:
        scores = self.scored = self.scores()
        for everyone in self._competitions(list(self.units)):
            rivals = [key for key in everyone if key not in self.pruned]
            teams = self._teams(rivals, scores)
            gone = (len(everyone) - len(rivals)) // len(teams[0])
            marked = self._number(everyone, Fraction(period + 1, len(self.periods))) - gone
            self.redundant |= {key for team in teams[:marked] for key in team}

    def _multiply(self, key: Key, factor: float) -> None:
        for piece in self.units[key]:
            tensor = self.parameters[piece.parameter].data
            values = piece_of(tensor, piece)
            write_piece(tensor, piece, (values + piece.offset) * factor - piece.offset)

    def _fill(self, key: Key, gradients: bool = False) -> None:
        """Set a unit's weights and optimizer state, or its gradients, to zero."""
        for piece in self.units[key]:
            parameter = self.parameters[piece.parameter]
            tensors = [(parameter.grad, 0.0)] if gradients else [(parameter.data, -piece.offset)]
            if not gradients:
                tensors += [(value, 0.0) for value in self.base.state.get(parameter, {}).values()]
            for tensor, zero in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.shape == parameter.shape:
                    fill_piece(tensor, piece, zero)


@dataclass(frozen=True)
class Sample:
    """What was seen at one point on the way to zero: each criterion's value of each unit."""

    cycle: int
    values: dict[str, dict[Key, float]]


class ReferenceCric(ReferenceHesso):
    """Algorithm 2 between the warm-up and the periods of `ReferenceHesso`, with the whole history of all samples.

    Args:
        warmup_steps: the first cycle begins with this step, counted from 0.
        cycle_steps: S, samples in a cycle.
        max_cycles: cycles at most.
        tolerance: newcomers a structure with which the search ends; below 1 a share of the units that go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: Optimizer,
        units: Structures,
        removed: dict[str, int],
        warmup_steps: int,
        pruning_steps: int,
        pruning_periods: int,
        saliency: dict[str, float],
        saliency_batches: int = 8,
        across_layers: bool = False,
        kv_heads: int = 1,
        *,
        cycle_steps: int,
        max_cycles: int,
        tolerance: float,
    ) -> None:
        counts = (warmup_steps, pruning_steps, pruning_periods)
        super().__init__(model, base, units, removed, *counts, saliency, saliency_batches, across_layers, kv_heads)
        self.first_step, self.cycle_steps, self.max_cycles = warmup_steps, cycle_steps, max_cycles
        self.tolerance = tolerance
        self.violating: list[set[Key]] = []  # V_c of every cycle
        self.shrinking: list[set[Key]] = []  # T_c of every cycle
        self.waiting: set[Key] = set()  # newcomers that weren't in a violating set yet
        self.cycle_of: dict[Key, int] = {}  # H: units whose cycle is over
        self.samples: list[Sample] = []
        self.decided: set[Key] | None = None
        self.final: dict[Key, float] = {}
        self.start_of_all = self.periods
        self.periods = [(start + cycle_steps * max_cycles, length) for start, length in self.periods]

    @torch.no_grad()
    def step(self) -> None:
        """One step of the base optimizer on the gradients that stand in `.grad`, and of CRIC or HESSO."""
        if self.steps < self.first_step or self.decided is not None:
            super().step()
            return
        t = (self.steps - self.first_step) % self.cycle_steps
        if not self.violating:
            self.observe()
            self.violating.append(self._lowest(self.scores()))
            self.shrinking.append(self.violating[0])
            self._remember()
        self._sample(t)
        with torch.enable_grad():
            self.base.step()
        for key in self.shrinking[-1]:
            self._multiply(key, (self.cycle_steps - t - 1) / (self.cycle_steps - t))
        if t == self.cycle_steps - 1:
            self._return()
            self._end_cycle()
        self.steps += 1

    def scores(self) -> dict[Key, float]:
        """Scores of HESSO before CRIC; of the means over samples once it has decided."""
        return super().scores() if self.decided is None else self.final

    # -- the way to zero ----------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        self.weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.state = {p: copy.deepcopy(self.base.state[p]) for p in self._trained() if p in self.base.state}
        self.random = (random.getstate(), np.random.get_state(), torch.get_rng_state())

    def _return(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.weights[name])
        for parameter in self._trained():
            self.base.state.pop(parameter, None)
            if parameter in self.state:
                self.base.state[parameter] = copy.deepcopy(self.state[parameter])
        random.setstate(self.random[0])
        np.random.set_state(self.random[1])
        torch.set_rng_state(self.random[2])

    def _trained(self) -> list[Any]:
        return [parameter for group in self.base.param_groups for parameter in group["params"]]

    def _sample(self, t: int) -> None:
        """Value all units at this point, and let those that would be removed from here wait for a cycle."""
        cycle, left = len(self.violating) - 1, (self.cycle_steps - t) / self.cycle_steps
        parameters = self.parameters.values()
        weights, gradients = self.gathering.weights(parameters), self.gathering.gradients(parameters)
        ways = self._ways(self._remaining(left))
        values: dict[str, dict[Key, float]] = {criterion: {} for criterion in self.saliency}
        for key in self.units:
            x = ways[key[0]][key] if key in self.shrinking[-1] else weights[key]
            g = gradients[key]
            for criterion in self.saliency:
                signed = criterion == "taylor_first_order"
                values[criterion][key] = -float(x @ g) if signed else saliency_of(criterion, [(x, g)])
        self.samples.append(Sample(cycle, values))
        for key in self._lowest(self._combined(values)):
            if key not in self.violating[-1] and key not in self.cycle_of:
                self.waiting.add(key)

    def _remaining(self, left: float) -> dict[str, dict[str, torch.Tensor]]:
        """For each structure and parameter, what the structure's shrinking units leave of each element."""
        remaining: dict[str, dict[str, torch.Tensor]] = {}
        for key in self.shrinking[-1]:
            for piece in self.units[key]:
                shape = self.parameters[piece.parameter].shape
                of_structure = remaining.setdefault(key[0], {})
                scales = of_structure.setdefault(piece.parameter, torch.ones(shape, dtype=torch.float64))
                fill_piece(scales, piece, left)
        return remaining

    def _ways(self, remaining: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[Key, torch.Tensor]]:
        """For each structure, the whole way of its units from the snapshot to zero, as those of others leave it."""
        way = self.gathering.weights(self.weights.values())
        ways = {}
        for structure in self.removed:
            left = {name: torch.ones_like(weights, dtype=torch.float64) for name, weights in self.weights.items()}
            for other, scales in remaining.items():
                for name in scales if other != structure else ():
                    left[name] *= scales[name]
            shares = self.gathering.plain(left.values())
            ways[structure] = {key: way[key] * shares[key] for key in self.units}
        return ways

    # -- cycles -------------------------------------------------------------------------------------------------------

    def _end_cycle(self) -> None:
        for key in self.violating[-1]:
            self.cycle_of[key] = len(self.violating) - 1
        means = self._combined(self.means())
        few = True
        for structure, count in self.removed.items():
            layers = len({layer for name, layer, _ in self.units if name == structure})
            allowed = self.tolerance if self.tolerance >= 1 else self.tolerance * count * layers
            few = few and len([key for key in self.waiting if key[0] == structure]) <= allowed
        if few or len(self.violating) == self.max_cycles:
            self.final, self.decided = means, self._lowest(means)
            begin = self.steps + 1 - self.first_step
            self.periods = [(start + begin, length) for start, length in self.start_of_all]
            return
        violating = self._lowest(means, self.waiting)
        self.waiting -= violating
        self.violating.append(violating)
        self.shrinking.append(self._lowest(means, first=violating))

    def means(self) -> dict[str, dict[Key, float]]:
        """Each criterion's mean: of a unit of the history over the samples of its own cycle, else over all samples."""
        found: dict[str, dict[Key, float]] = {criterion: {} for criterion in self.saliency}
        for key in self.units:
            own = [sample for sample in self.samples if sample.cycle == self.cycle_of.get(key, sample.cycle)]
            for criterion in self.saliency:
                found[criterion][key] = sum(sample.values[criterion][key] for sample in own) / len(own)
        return found

    def _combined(self, values: dict[str, dict[Key, float]]) -> dict[Key, float]:
        total = dict.fromkeys(self.units, 0.0)
        for criterion, weight in self.saliency.items():
            for rivals in self._competitions(list(self.units)):
                norm = sum(values[criterion][key] ** 2 for key in rivals) ** 0.5
                for key in rivals:
                    total[key] += weight * values[criterion][key] / norm
        return total

    def _lowest(self, scores: dict[Key, float], among: set[Key] | None = None, first: Iterable[Key] = ()) -> set[Key]:
        """The K lowest of each competition, `first` before all others; of `among` only, where there are fewer."""
        found: set[Key] = set()
        for everyone in self._competitions(list(self.units)):
            for team in self._teams(everyone, scores, among, first)[: self._number(everyone)]:
                found |= set(team)
        return found
