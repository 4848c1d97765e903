"""Discovery: the owners of every index, read off the gradients of small models in which they are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hesso_hf.errors import UnsupportedStructureError
from hesso_hf.structures.groups import AxisName, Branch
from hesso_hf.structures.layout import Layout, Segment, block_layout
from hesso_hf.structures.proof import ownership as discovery
from hesso_hf.structures.proof.branches import Search, discover_branches
from hesso_hf.structures.proof.ownership import NOBODY, GradientProbe
from hesso_hf.structures.shape_probe import AxisMap, describe_parameters

WIDTH, DIM, VOCAB = 14, 4, 19
HEADS, KV_HEADS = 6, 3
UNITS = 5  # channels of the MLPs

Block = tuple[str, int]  # q, k or v, and the number of the head


class RmsNorm(nn.Module):
    """Divides by the root of the mean square over everything, as OLMo-2's norm of the queries."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Grouped attention over (batch, tokens, heads, DIM); consecutive query heads share a key-value head."""
    k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], 2) for part in (k, v))
    return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


class Fused(nn.Module):
    """Attention with one matrix for queries, keys and values, whose blocks of rows come in any order."""

    def __init__(self, order: list[Block]) -> None:
        super().__init__()
        self.order = order
        self.qkv = nn.Linear(WIDTH, len(order) * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = dict(zip(self.order, self.qkv(x).split(DIM, -1), strict=True))
        q, k, v = (
            torch.stack([blocks[kind, head] for head in range(count)], 2)
            for kind, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        return self.out(attend(q, k, v).flatten(2))


class Separate(nn.Module):
    """Attention with separate matrices, and norms over all heads at once if asked for."""

    def __init__(self, norm: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * DIM, bias) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.q_norm, self.k_norm = (RmsNorm(n * DIM) if norm else nn.Identity() for n in (HEADS, KV_HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x))
        return self.out(attend(*(part.unflatten(-1, (-1, DIM)) for part in parts)).flatten(2))


class Gated(nn.Module):
    """An MLP with gate and up in one matrix: one after the other, or in turns."""

    def __init__(self, in_turns: bool) -> None:
        super().__init__()
        self.in_turns = in_turns
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * UNITS), nn.Linear(UNITS, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.in_turns else both.chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """Two experts, every one of which sees all tokens, as three-dimensional weights without modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2, 2 * UNITS, WIDTH))
        self.down_proj = nn.Parameter(torch.empty(2, WIDTH, UNITS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = torch.zeros_like(x)
        for up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            gate, linear = F.linear(x, up).chunk(2, -1)
            found = found + F.linear(F.relu(gate) * linear, down)
        return found


class Mixer(nn.Module):
    """A state-space mixer's bones: the channels are read by the output and by a projection of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.own, self.leave = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, 3), nn.Linear(UNITS, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = F.silu(self.enter(x))
        return self.leave(channels * self.own(channels).sum(-1, keepdim=True))


class Model(nn.Module):
    """Blocks on a residual stream."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        stream = self.embed(input_ids)
        for block in self.layers:
            stream = stream + block(stream)
        return self.head(stream)


IDS = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def probe_of(model: nn.Module) -> GradientProbe:
    return GradientProbe(model, IDS, lambda tried, ids: tried(ids))


def discovered(model: nn.Module, axes: list[AxisName], units: int, granule: int = 1) -> list[Branch]:
    """Discover branches; axes are named as in the first layer and meant in all."""
    every = [(name.replace("layers.0", f"layers.{i}"), dim) for name, dim in axes for i in range(len(model.layers))]
    return discover_branches(probe_of(model), AxisMap(describe_parameters(model), {}, {}), every, units, granule)


def spread(branches: list[Branch], units: int) -> dict[str, list[int]]:
    """Return the owner of every index of every axis, by the parameter's name within its block."""
    return {
        f"{pattern.removeprefix('layers.*.')}[{dim}]": layout.expand(torch.arange(units), fixed_value=NOBODY).tolist()
        for branch in branches
        for (pattern, dim), layout in branch.layouts.items()
    }


def blocks(kind: str, count: int) -> list[Block]:
    return [(kind, head) for head in range(count)]


GROUP = HEADS // KV_HEADS
ORDERS = {
    "q|k|v": blocks("q", HEADS) + blocks("k", KV_HEADS) + blocks("v", KV_HEADS),
    "v|q|k": blocks("v", KV_HEADS) + blocks("q", HEADS) + blocks("k", KV_HEADS),
    "per group": [
        block for j in range(KV_HEADS) for block in [*(("q", j * GROUP + i) for i in range(GROUP)), ("k", j), ("v", j)]
    ],
    "key and value in turns": blocks("q", HEADS) + [block for j in range(KV_HEADS) for block in (("k", j), ("v", j))],
}
ATTENTION_AXES = [("layers.0.qkv.weight", 0), ("layers.0.qkv.bias", 0), ("layers.0.out.weight", 1)]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_rows_of_fused_queries_keys_and_values_are_found_in_any_order(order: list[Block]):
    found = spread(discovered(Model(Fused(order), Fused(order)), ATTENTION_AXES, KV_HEADS, DIM), KV_HEADS)
    owners = [head // GROUP if kind == "q" else head for kind, head in order for _ in range(DIM)]
    columns = [head // GROUP for head in range(HEADS) for _ in range(DIM)]
    assert found == {"qkv.weight[0]": owners, "qkv.bias[0]": owners, "out.weight[1]": columns}


def test_layers_of_one_kind_must_agree():
    orders = [ORDERS["q|k|v"], ORDERS["v|q|k"]]
    with pytest.raises(UnsupportedStructureError, match=r"no gradient ties layers\.\*\.qkv"):
        discovered(Model(*(Fused(order) for order in orders)), ATTENTION_AXES[:2], KV_HEADS, DIM)


def test_units_in_another_order_than_their_number_are_not_guessed_at():
    """Rows that no layout describes stay with nobody, so that the model can't be cut to the smaller shape."""
    order = blocks("q", HEADS) + blocks("k", KV_HEADS)[::-1] + blocks("v", KV_HEADS)
    (branch,) = discovered(Model(Fused(order)), ATTENTION_AXES, KV_HEADS, DIM)
    layout = branch.layouts["layers.*.qkv.weight", 0]
    assert layout.per_unit * KV_HEADS < layout.size(KV_HEADS)


SEPARATE_AXES = [(f"layers.0.{name}.{leaf}", 0) for name in "qkv" for leaf in ("weight", "bias")]
SEPARATE_AXES.append(("layers.0.out.weight", 1))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norms over all heads"])
def test_grouped_queries_share_the_unit_of_their_key_value_head(norm: bool):
    axes = SEPARATE_AXES + [(f"layers.0.{name}_norm.weight", 0) for name in "qk"] * norm
    found = spread(discovered(Model(Separate(norm)), axes, KV_HEADS, DIM), KV_HEADS)
    queries = [j for j in range(KV_HEADS) for _ in range(GROUP * DIM)]
    keys = [j for j in range(KV_HEADS) for _ in range(DIM)]
    rows = {"q": queries, "k": keys, "v": keys}
    expected = {f"{name}.{leaf}[0]": rows[name] for name in "qkv" for leaf in ("weight", "bias")}
    expected |= {f"{name}_norm.weight[0]": rows[name] for name in "qk"} if norm else {}
    assert found == expected | {"out.weight[1]": queries}


def test_what_a_norm_divides_by_counts_as_a_constant(monkeypatch: pytest.MonkeyPatch):
    """Else every head would depend on every other through the norm over all of them."""
    monkeypatch.setattr(discovery, "_MEANS", set())
    probe = probe_of(Model(Separate(norm=True)))

    def zero(mask: torch.Tensor) -> None:
        parameter = probe.parameters["layers.0.v.weight"]
        parameter[mask.repeat_interleave(DIM)] = 0.0

    name = ("layers.0.q.weight", 0)
    assert (probe.owners(KV_HEADS, zero, [name])[name] != NOBODY).sum() == 0


def test_a_bias_of_the_keys_has_no_gradient_and_takes_the_layout_of_their_weight():
    """It moves all scores of a query alike, which the softmax doesn't see."""
    model = Model(Separate())
    probe, layout = probe_of(model), block_layout(GROUP * DIM)

    def zero(mask: torch.Tensor) -> None:
        probe.parameters["layers.0.out.weight"][:, layout.expand(mask, fixed_value=False)] = 0.0

    axes = [("layers.0.k.weight", 0), ("layers.0.k.bias", 0)]
    probe.vanished(axes)
    weight, bias = (probe.parameters[name].grad for name, _ in axes)
    assert weight is not None
    assert bias is not None
    assert bias.abs().max() < 1e-5 * weight.abs().max()  # rounding noise
    owners = probe.owners(KV_HEADS, zero, axes)
    assert owners[axes[0]].tolist() == [j for j in range(KV_HEADS) for _ in range(DIM)]
    (branch,) = discovered(model, SEPARATE_AXES, KV_HEADS, DIM)
    assert branch.layouts["layers.*.k.bias", 0] == branch.layouts["layers.*.k.weight", 0] == block_layout(DIM)


def test_what_several_units_share_belongs_to_nobody():
    """A key-value head goes with all its query heads, so with no single one."""
    probe = probe_of(Model(Fused(ORDERS["q|k|v"])))

    def zero(mask: torch.Tensor) -> None:
        probe.parameters["layers.0.out.weight"][:, mask.repeat_interleave(DIM)] = 0.0

    name = ("layers.0.qkv.weight", 0)
    owners = probe.owners(HEADS, zero, [name])[name].tolist()
    assert owners == [j for j in range(HEADS) for _ in range(DIM)] + [NOBODY] * (2 * KV_HEADS * DIM)


def test_owners_are_found_without_changing_the_weights():
    model = Model(Gated(in_turns=False))
    probe = probe_of(model)

    def zero(mask: torch.Tensor) -> None:
        probe.parameters["layers.0.down.weight"][:, mask] = 0.0

    probe.owners(UNITS, zero, [("layers.0.gate_up.weight", 0)])
    for name, parameter in model.named_parameters():
        assert torch.equal(probe.parameters[name], parameter), name
        assert parameter.grad is None


@pytest.mark.parametrize(
    ("make", "pattern", "expected"),
    [
        (lambda: Gated(in_turns=False), "gate_up.weight", "stride(2x1)"),
        (lambda: Gated(in_turns=True), "gate_up.weight", "block(2)"),
        (Experts, "gate_up_proj", "stride(2x1)"),
    ],
    ids=["one after the other", "in turns", "experts"],
)
def test_gate_and_up_in_one_matrix(make: Callable[[], nn.Module], pattern: str, expected: str):
    down = ("layers.0.down_proj", 2) if make is Experts else ("layers.0.down.weight", 1)
    rows = 1 if make is Experts else 0
    (branch,) = discovered(Model(make(), make()), [(f"layers.0.{pattern}", rows), down], UNITS)
    assert {str(name): str(layout) for (name, _), layout in branch.layouts.items()} == {
        f"layers.*.{pattern}": expected,
        down[0].replace("0", "*"): "block(1)",
    }


def test_a_channel_at_rest_is_found_too():
    """Behind a ReLU that never opens nothing has a gradient; it leaks meanwhile."""
    model = Model(Experts())
    with torch.no_grad():  # the gates of three channels are closed for every token
        model.embed.weight.abs_()
        model.layers[0].gate_up_proj[:, :3] = -model.layers[0].gate_up_proj[:, :3].abs()
    axes = [("layers.0.gate_up_proj", 1), ("layers.0.down_proj", 2)]
    (branch,) = discovered(model, axes, UNITS)
    assert str(branch.layouts["layers.*.gate_up_proj", 1]) == "stride(2x1)"


def test_channels_that_feed_their_own_projections_are_found_by_all_readers_at_once():
    axes = [("layers.0.enter.weight", 0), ("layers.0.enter.bias", 0)]
    axes += [("layers.0.own.weight", 1), ("layers.0.leave.weight", 1)]
    branches = discovered(Model(Mixer(), Mixer()), axes, UNITS)
    assert len(branches) == 1
    assert {name: str(layout) for (name, _), layout in branches[0].layouts.items()} == {
        f"layers.*.{name}": "block(1)" for name in ("enter.weight", "enter.bias", "own.weight", "leave.weight")
    }


class Gained(Mixer):
    """A mixer whose channels take three factors after its own projection has read them."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__()
        self.gain, self.gate, self.skip = (nn.Parameter(torch.empty(UNITS, 1)) for _ in range(3))
        self.extra = nn.ParameterList(nn.Parameter(torch.empty(1)) for _ in range(extra))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = F.silu(self.enter(x))
        after = channels * self.own(channels).sum(-1, keepdim=True)
        return self.leave(after * (self.gain * self.gate)[:, 0] + channels * self.skip[:, 0])


def test_mixers_in_layers_of_two_kinds_are_told_apart():
    """Both kinds' last matrices together reach more axes than both matrices of one kind, but not what enters."""
    model = Model(nn.ModuleDict({"mixer": Gained()}), nn.ModuleDict({"mixer": Gained(extra=1)}))
    for layer in model.layers:
        layer.forward = layer["mixer"].forward
    names = ("enter.weight", "enter.bias", "gain", "gate", "skip", "own.weight", "leave.weight")
    axes = [(f"layers.{i}.mixer.{name}", int(name in names[-2:])) for i in range(2) for name in names]
    branches = discover_branches(probe_of(model), AxisMap(describe_parameters(model), {}, {}), axes, UNITS, 1)
    assert sorted(len(branch.layouts) for branch in branches) == [7, 7]
    assert all(len({pattern.split(".")[1] for pattern, _ in branch.layouts}) == 1 for branch in branches)


class Averaged(nn.Module):
    """An MLP that reads the mean of two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.other, self.leave = nn.Linear(WIDTH, UNITS), nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(torch.stack([self.enter(x), self.other(x)], -2).mean(dim=-2))


def test_a_mean_on_the_way_is_no_statistic_of_a_norm():
    axes = [("layers.0.enter.weight", 0), ("layers.0.other.weight", 0), ("layers.0.leave.weight", 1)]
    model = Model(Averaged(), Averaged())
    assert not any(mask.any() for mask in probe_of(model).vanished(axes).values())
    (branch,) = discovered(model, axes, UNITS)
    assert {str(layout) for layout in branch.layouts.values()} == {"block(1)"}


class Pair(nn.Module):
    """Two MLPs of equal size in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Gated(in_turns=False), Gated(in_turns=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def test_two_blocks_of_one_layer_have_units_of_their_own():
    names = ("first.gate_up", "first.down", "second.gate_up", "second.down")
    axes = [(f"layers.0.{name}.weight", int(name.endswith("down"))) for name in names]
    branches = discovered(Model(Pair(), Pair()), axes, UNITS)
    found = [{name.removeprefix("layers.*."): str(layout) for (name, _), layout in b.layouts.items()} for b in branches]
    expected = [
        {"first.down.weight": "block(1)", "first.gate_up.weight": "stride(2x1)"},
        {"second.down.weight": "block(1)", "second.gate_up.weight": "block(2)"},
    ]
    assert len(found) == 2
    assert all(branch in found for branch in expected)


def test_a_wrong_layout_of_the_reader_is_corrected_by_what_it_reads():
    model = Model(Separate(bias=False))
    parameters = describe_parameters(model)
    axes = [axis for axis in SEPARATE_AXES if axis[0] in parameters]
    remaining = {(parameters[name].pattern, dim): [(name, dim)] for name, dim in axes}
    out, values = ("layers.*.out.weight", 1), ("layers.*.v.weight", 0)
    wrong = Branch(out, {out: Layout((Segment(GROUP, DIM),)), values: block_layout(DIM)})
    found = Search(probe_of(model), AxisMap(parameters, {}, {}), remaining, KV_HEADS).confirmed(wrong)
    assert found.layouts[out] == block_layout(GROUP * DIM)


def test_the_reader_may_be_strided():
    """Query head h reads key-value head h % K: the units lie in runs of all heads."""

    class Striding(Separate):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (part.unflatten(-1, (-1, DIM)) for part in (self.q(x), self.k(x), self.v(x)))
            return self.out(attend(q, k.repeat(1, 1, GROUP, 1), v.repeat(1, 1, GROUP, 1)).flatten(2))

    (branch,) = discovered(Model(Striding()), SEPARATE_AXES, KV_HEADS, DIM)
    found = {name.removeprefix("layers.*."): str(layout) for (name, _), layout in branch.layouts.items()}
    assert found["out.weight"] == found["q.weight"] == f"stride({GROUP}x{DIM})"
    assert found["k.weight"] == found["v.weight"] == f"block({DIM})"


class WithTable(Gated):
    """Has a table as long as the channels that mixes them all."""

    def __init__(self) -> None:
        super().__init__(in_turns=False)
        self.table = nn.Parameter(torch.empty(UNITS, UNITS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.table.sum()


def test_an_axis_that_belongs_to_nobody_is_named():
    axes = [("layers.0.gate_up.weight", 0), ("layers.0.down.weight", 1), ("layers.0.table", 1)]
    with pytest.raises(UnsupportedStructureError, match=r"no gradient ties layers\.\*\.table dimension 1 to single"):
        discovered(Model(WithTable()), axes, UNITS)


def test_an_axis_that_belongs_to_nobody_may_be_left_over():
    model = Model(WithTable())
    axes = [("layers.0.gate_up.weight", 0), ("layers.0.down.weight", 1), ("layers.0.table", 1)]
    axis_map = AxisMap(describe_parameters(model), {}, {})
    (branch,) = discover_branches(probe_of(model), axis_map, axes, UNITS, 1, leaves_some=True)
    assert {name for name, _ in branch.layouts} == {"layers.*.gate_up.weight", "layers.*.down.weight"}


def test_layers_of_several_lengths_are_refused():
    model = Model(Gated(in_turns=False), Gated(in_turns=False))
    model.layers[1].down = nn.Linear(2 * UNITS, WIDTH)
    model.layers[1].gate_up = nn.Linear(WIDTH, 4 * UNITS)
    with pytest.raises(UnsupportedStructureError, match=r"layers\.1\.down\.weight dimension 1 has another length"):
        discovered(model, [("layers.0.gate_up.weight", 0), ("layers.0.down.weight", 1)], UNITS)


@pytest.mark.parametrize(
    ("take", "constant"),
    [
        (lambda x: x.mean(-1, keepdim=True), True),
        (lambda x: torch.mean(x, dim=2, keepdim=True), True),
        (lambda x: x.var(dim=(1, 2), keepdim=True), True),
        (lambda x: x.mean(-1), False),  # a norm keeps the dimension, to divide by it
        (lambda x: x.mean(), False),
        (lambda x: x.mean(-2, keepdim=True), False),  # of the copies of a stream: what flows through it isn't a norm's
        (lambda x: torch.mean(x, dim=(0, 1)), False),
    ],
)
def test_only_means_over_channels_count_as_constants(take: Callable[[torch.Tensor], torch.Tensor], constant: bool):
    x = torch.randn(2, 3, 4, requires_grad=True)
    with discovery._ConstantStatistics():
        assert take(x).requires_grad is not constant
