"""The basis of the stream: the principal axes of a model's own hidden states, before anything is scored.

The channels that a checkpoint happens to have are not its own: norms of root mean squares compute the same in every
orthogonal basis. In the principal one, few channels hold most of what the norms see, and the others cost little.
Legend: D channels of the stream, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..distributed.collectives import from_main, rank, summed_over_ranks, world_size
from ..distributed.parts import is_sharded, local, named_parameters, plain_name, rewrite_, whole_of
from ..distributed.passes import evaluating, run_up_to_head
from ..errors import HessoError
from ..hf_models.tiny_model import ieee_fp32, without_cache
from ..structures.lora import Adapters, parameters_of
from ..structures.proof.turn import turn_of
from ..structures.turn import StreamTurn, keeping_ones
from ..structures.turned_base import check_trained, turn_tensors
from .calibration import BatchLoss
from .saliency import float_sums

logger = logging.get_logger(__name__)

CLUSTERS = 4  # of a tied model's last gain
TOLERANCE = 0.05  # nats per token that making that gain uniform within clusters may cost
LEAST_TOKENS, LEAST_PER_CHANNEL = 16384, 8
LOSS_TOKENS = 4096  # for what that costs: a difference on the same text, which takes fewer tokens than the axes
FAR = 3.0  # quartile ranges beyond the quartiles, from where a gain is a cluster by itself


@dataclass(frozen=True)
class StreamBasis:
    """How a model's stream was turned.

    Attributes:
        error: relative error of the tiny model's logits, turned by a random rotation.
        tokens: number of tokens whose hidden states were taken.
        clusters: blocks of channels that Q turns within; 1 where the embedding isn't the output matrix.
        rise: of the loss, nats per token, by making a tied model's last gain uniform within the clusters, and by
            rounding weights below fp32.
        energy: share of what the norms see that the first 1/8, 1/4, 1/2 and 3/4 of the new channels hold.
        tensors: with adapters, what the frozen base is turned by anew; it isn't part of the record.
    """

    error: float
    tokens: int
    clusters: int
    rise: float
    energy: dict[str, float]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, without the tensors."""
        return {name: value for name, value in asdict(replace(self, tensors={})).items() if name != "tensors"}


def turn_stream(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    clusters: int = CLUSTERS,
    tolerance: float = TOLERANCE,
    loss: BatchLoss | None = None,
) -> StreamBasis:
    """Turn a model in memory into the principal axes of its own hidden states; its function stays.

    The model is an ordinary dense one of its class afterwards. Parameters keep their identity, so an optimizer may hold
    them already, but not have stepped. Where FSDP2 has divided the model, all processes call it, with the same batches.

    Args:
        batches: what the model's forward takes, with at least max(16,384, 8 D) tokens that aren't padding; with labels
            where the embedding is the output matrix too, or weights are below fp32.
        clusters: into how many clusters of like values the last norm's gain is put where it is tied.
        tolerance: nats per token that this, and rounding weights below fp32, may cost on some of the batches, about
            4,096 tokens.
        loss: of a model and a batch, a scalar; by default what its forward returns for the batch.

    Raises:
        UnsupportedStructureError: where another basis isn't exact for the class, with the reason.
        HessoError: where `tolerance` would be passed, or a weight lies on the meta device. The model is as before.
    """
    batches = list(batches)
    stream, error = turn_of(model)
    parameters, adapters = parameters_of(model), Adapters.of(model)
    if adapters:
        check_trained(stream, parameters)
    turn = stream.with_adapters(adapters)
    if any(parameter.is_meta for parameter in parameters.values()):
        raise HessoError("`model` has weights on the meta device; load them before the stream is turned")
    turn.check_gains(parameters)
    total, tokens = stream_covariance(model, stream, batches)
    if not total.any():
        raise HessoError("`batches`: no norm of the stream was given hidden states, so there is no basis to turn into")
    if tokens < (wanted := max(LEAST_TOKENS, LEAST_PER_CHANNEL * turn.width)):
        logger.warning(
            f"the stream's basis ({turn.width} channels) is measured on only {tokens:,} tokens; with {wanted:,} or "
            "more it is more reliable"
        )
    some = batches[:: max(1, tokens // LOSS_TOKENS)]
    measured = partial(mean_loss, model, some, loss or _own_loss)
    blocks, rotation, rise = _turn_within_(turn, parameters, total, clusters, tolerance, measured)
    last_gain = parameters[turn.tied_norm.scale] if turn.tied_norm else None
    tensors = turn_tensors(rotation, last_gain) if adapters else {}
    return StreamBasis(error, tokens, len(blocks), rise, _energy(total, rotation), tensors)


@torch.no_grad()
def stream_covariance(
    model: PreTrainedModel, turn: StreamTurn, batches: Iterable[Mapping[str, torch.Tensor]]
) -> tuple[torch.Tensor, int]:
    """Sum x x^T over the inputs of all norms of the stream, each x scaled to a root mean square of 1.

    Where processes hold parts of the model each takes some of the batches, which are the same on all of them.

    Returns:
        The sum, shape (D, D), fp64, on the CPU, and the number of tokens that went into it for each norm.
    """
    sums: dict[torch.device, torch.Tensor] = {}  # where they are computed, since a transfer for each norm costs more
    seen = torch.zeros(1, dtype=torch.float64)
    batches, shared = list(batches), is_sharded(named_parameters(model).values())
    first, step = (rank(), world_size()) if shared else (0, 1)
    names = {norm.scale for norm in (*turn.norms, *([turn.tied_norm] if turn.tied_norm else []))}
    names = names or {name for name, dim in turn.axes if name.endswith("weight")}  # norms without weights
    owners = {name.rpartition(".")[0] for name in names}
    norms = [module for name, module in model.named_modules() if plain_name(name) in owners]
    run = run_up_to_head if set(norms) <= set(model.base_model.modules()) else _run_whole
    current: list[torch.Tensor | None] = [None]
    counts = True

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
            return
        hidden = args[0]
        if hidden.shape[-1] != turn.width:
            return
        mask = current[0]
        if mask is not None and mask.shape == hidden.shape[:-1]:
            hidden = hidden[mask.to(hidden.device)]
        if counts:
            if (device := hidden.device) not in sums:
                sums[device] = torch.zeros(turn.width, turn.width, dtype=float_sums(device), device=device)
            sums[device].add_(_outer(hidden.reshape(-1, turn.width), turn.centred))

    with _hooked(norms, note), evaluating(model), ieee_fp32():
        for start in range(0, len(batches), step):
            counts = start + first < len(batches)  # with none left for it a process still takes part in the pass
            batch = batches[start + first if counts else start]
            mask = batch.get("attention_mask")
            current[0] = mask.bool() if mask is not None and mask.dim() == 2 else None
            seen += counts * (int(current[0].sum()) if current[0] is not None else batch["input_ids"].numel())
            run(model, {**_on(model.device, batch), **without_cache(model)})
    total = torch.zeros(turn.width, turn.width, dtype=torch.float64)
    for found in sums.values():
        total += found.cpu()
    if shared:
        found = summed_over_ranks(torch.cat([total.flatten(), seen]).to(model.device)).cpu()
        total, seen = found[:-1].view_as(total), found[-1:]
    return total, int(seen)


@contextmanager
def _hooked(modules: Iterable[nn.Module], note: Callable[..., None]) -> Iterator[None]:
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(note))
        yield


def _run_whole(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    model(**inputs)


def _outer(hidden: torch.Tensor, centred: bool) -> torch.Tensor:
    """Return sum of x x^T, shape (D, D), of rows x scaled to a root mean square of 1: fp64 on the CPU, fp32 elsewhere.

    Most GPUs have a fraction of their speed in fp64, and rounding is far below what other tokens would change.
    """
    rows = hidden.to(torch.float64 if hidden.device.type == "cpu" else torch.float32)
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    rows = rows * torch.rsqrt(rows.square().mean(1, keepdim=True).clamp_min(1e-30))
    return rows.T @ rows


def principal_rotation(total: torch.Tensor, centred: bool, blocks: list[list[int]]) -> torch.Tensor:
    """Return Q, shape (D, D), fp64: within each block of channels the eigenvectors of `total`, largest first.

    Signs are fixed (an eigenvector's largest entry is positive), so that the same sums give the same basis.
    """
    rotation = torch.zeros_like(total)
    for block in blocks:
        index = torch.tensor(block)
        found = total[index[:, None], index]
        if centred:
            ones = torch.ones(len(block), 1, dtype=total.dtype)
            others = torch.linalg.qr(torch.cat([ones, torch.eye(len(block), dtype=total.dtype)], dim=1))[0][:, 1:]
            vectors = keeping_ones(others @ _eigenvectors(others.T @ found @ others)) if len(block) > 1 else ones
        else:
            vectors = _eigenvectors(found)
        rotation[index[:, None], index] = vectors
    return rotation


def _eigenvectors(matrix: torch.Tensor) -> torch.Tensor:
    vectors = torch.linalg.eigh(matrix)[1].flip(1)
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def gain_clusters(gain: torch.Tensor, clusters: int) -> list[list[int]]:
    """Put channels into clusters of like gain; a gain far from all others is a cluster by itself.

    Args:
        gain: shape (D,).
    """
    low, high = gain.quantile(0.25), gain.quantile(0.75)
    reach = FAR * (high - low)
    near = ((gain >= low - reach) & (gain <= high + reach)).nonzero().flatten()
    values, order = gain[near].sort()
    centres = values.quantile(torch.linspace(0, 1, 2 * clusters + 1, dtype=values.dtype)[1::2])
    for _ in range(100):
        member = (values[:, None] - centres).abs().argmin(1)
        moved = torch.stack(
            [values[member == k].mean() if (member == k).any() else centres[k] for k in range(clusters)]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    found = [near[order[member == k]].sort().values.tolist() for k in range(clusters)]
    alone = [[index] for index in range(len(gain)) if index not in set(near.tolist())]
    return [block for block in found if block] + alone


@torch.no_grad()
def make_gain_uniform_(turn: StreamTurn, parameters: Mapping[str, torch.Tensor], clusters: int) -> list[list[int]]:
    """Make a tied model's last gain uniform within clusters, in place; return the blocks that Q may turn within."""
    if turn.tied_norm is None:
        return [list(range(turn.width))]
    gain = parameters[turn.tied_norm.scale]
    uniform = whole_of(gain).double()
    blocks = gain_clusters(uniform.cpu() + turn.tied_norm.shift, clusters)
    for block in blocks:
        uniform[block] = uniform[block].mean()
    rewrite_(gain, 0, lambda _: uniform)
    return blocks


@torch.no_grad()
def _turn_within_(
    turn: StreamTurn,
    parameters: Mapping[str, torch.Tensor],
    total: torch.Tensor,
    clusters: int,
    tolerance: float,
    measured: Callable[[], float],
) -> tuple[list[list[int]], torch.Tensor, float]:
    """Turn into the axes of `total`; return the blocks that Q turns within, Q, and what that costs in loss.

    In fp32 only a tied model's uniform gain costs anything, below it rounding may as well.

    Raises:
        HessoError: where it costs more than `tolerance`; the parameters are as before.
    """
    coarse = [parameter.dtype for parameter in parameters.values() if parameter.dtype.itemsize < 4]
    changed = list(parameters) if coarse else [turn.tied_norm.scale] if turn.tied_norm else []
    before = {name: local(parameters[name].detach()).to("cpu", copy=True) for name in changed}
    lost = measured() if changed else 0.0
    blocks = make_gain_uniform_(turn, parameters, clusters)
    rotation = from_main(principal_rotation(total, turn.centred, blocks))  # sums may differ in the last bit
    if coarse:
        turn.turn_(parameters, rotation)
    rise = measured() - lost if changed else 0.0
    if not rise <= tolerance:
        for name, values in before.items():
            local(parameters[name].detach()).copy_(values)
        if turn.tied_norm:
            reason = "the last norm's gains differ too much to turn a model whose embedding is its output matrix too"
            remedy = f"raise `clusters` ({clusters}) or untie the embedding"
        else:
            reason, remedy = f"turned weights rounded to {coarse[0]} cost too much", "load the model in float32"
        raise HessoError(f"{reason}: loss +{rise:.3f} nats per token, {tolerance} allowed; {remedy}")
    if not coarse:
        turn.turn_(parameters, rotation)
    return blocks, rotation, rise


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Iterable[Any], loss: BatchLoss) -> float:
    """Return the mean of the batches' losses that are finite, without dropout."""
    with evaluating(model):
        found = [float(loss(model, batch)) for batch in batches]
    finite = [value for value in found if math.isfinite(value)]
    if not finite:
        raise HessoError("`batches` give no finite loss; give `labels` along, or `loss`")
    return sum(finite) / len(finite)


def _own_loss(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "labels" not in batch:
        raise HessoError("`batches` have no `labels`, which tell what the turn costs this model; or give `loss`")
    return model(**_on(model.device, batch)).loss


def _energy(total: torch.Tensor, rotation: torch.Tensor) -> dict[str, float]:
    along = (rotation.T @ total @ rotation).diagonal().sort(descending=True).values
    return {
        f"{share:g}": round(float(along[: max(1, round(share * len(along)))].sum() / along.sum()), 4)
        for share in (0.125, 0.25, 0.5, 0.75)
    }


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch on a device; packed ones hold numbers too (the longest sequence)."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
