"""Peers of HESSO: one-shot cuts of a Llama to the sizes that HESSO chose, each written anew from its paper.

`cut` takes a dense model and examples, and returns an ordinary smaller model, which the stock Trainer then trains.

- Wanda-sp (Wanda, arXiv 2306.11695, by whole units as in FLAP's comparison): a unit's score is the sum over its columns
  of the matrix that reads it (`down_proj`, `o_proj`) of |W_ij| times the norm of activation j.
- FLAP (arXiv 2312.11983): the variance of activation j times the squared norm of column j; the mean of what is cut goes
  into the biases of `down_proj` and `o_proj`. All layers are cut alike (the paper's "UL-UM"), as a stock class is.
  The config's `attention_bias` and `mlp_bias` bring biases of other matrices along, which start at zero.
- OBS: structured Optimal Brain Surgeon, as in ZipLM (arXiv 2302.04089) and SlimGPT (arXiv 2412.18110): units go one by
  one, the one of least w_u^T [(H^-1)_uu]^-1 w_u, and each time the columns left are refitted; H = X^T X + a ridge.
- ShortGPT (arXiv 2403.03853): whole layers, those whose output is most like their input (1 - the mean cosine is least).
- scratch: HESSO's very shape with random weights.

Matrices are taken in the order of the forward pass, so that each is scored on activations of a model cut so far.

A unit is an MLP channel, or a key-value head with its query heads. Where HESSO cuts channels of the hidden state, which
these methods don't know, they get MLP and head sizes with as many parameters (`known_sizes`): the budget solver of this
library splits the cut between the two by trial removals on HESSO's calibration examples, with no channel cut.

Shapes: N tokens, O outputs, C columns of a matrix, U units of C/U columns each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from hesso_hf import HessoConfig
from hesso_hf.errors import HessoError
from hesso_hf.hf_models import build_meta, resized_config
from hesso_hf.pruning.calibration import LossCurves
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.structures.groups import PruningGroups

HEADS, KV_HEADS, MLP, HIDDEN, LAYERS = (
    "num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_size", "num_hidden_layers",
)  # fmt: skip
RIDGE = 1e-2  # times the mean square of an activation, as GPTQ, ZipLM and SlimGPT damp H


@dataclass(frozen=True)
class Choice:
    """Which units of a matrix stay, bool (U,), its weight without the others, (O, C), and what its bias gains, (O,)."""

    kept: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None


Method = Callable[[torch.Tensor, torch.Tensor, int, int], Choice]


def wanda_sp(weight: torch.Tensor, rows: torch.Tensor, units: int, keep: int) -> Choice:
    """Choose by weight times activation norm.

    Args:
        weight: of the matrix that reads the units, (O, C).
        rows: the activations that it reads, (N, C).
    """
    kept = highest((weight.abs().sum(0) * rows.norm(dim=0)).view(units, -1).sum(1), keep)
    return Choice(kept, weight * columns_of(kept, weight))


def flap(weight: torch.Tensor, rows: torch.Tensor, units: int, keep: int) -> Choice:
    """Choose by fluctuation times weight; the bias makes up for the mean (arguments as in `wanda_sp`)."""
    kept = highest((rows.var(0) * weight.square().sum(0)).view(units, -1).sum(1), keep)
    stays = columns_of(kept, weight)
    return Choice(kept, weight * stays, weight @ (rows.mean(0) * ~stays))


def obs(weight: torch.Tensor, rows: torch.Tensor, units: int, keep: int, ridge: float = RIDGE) -> Choice:
    """Take out one unit after the other and refit the columns left (arguments as in `wanda_sp`)."""
    rows = rows.double()
    hessian = rows.T @ rows
    hessian.diagonal().add_(ridge * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    left = weight.double().T.contiguous()  # (C, O): a unit's columns lie together
    width = len(left) // units
    kept, every = torch.ones(units, dtype=torch.bool, device=left.device), torch.arange(units, device=left.device)
    for _ in range(units - keep):
        by_unit = left.view(units, width, -1)
        blocks = inverse.view(units, width, units, width)[every, :, every]
        scores = (torch.cholesky_inverse(torch.linalg.cholesky(blocks)) * (by_unit @ by_unit.mT)).sum((1, 2))
        unit = int(scores.masked_fill(~kept, torch.inf).argmin())
        mine = slice(unit * width, (unit + 1) * width)
        # [(H^-1)_uu]^-1 (H^-1)_u,: (C/U, C); by Cholesky, as LU of large blocks fails on several threads of some CPUs
        across = torch.cholesky_solve(inverse[mine], torch.linalg.cholesky(blocks[unit]))
        left.addmm_(across.T, left[mine].clone(), alpha=-1)
        inverse.addmm_(inverse[:, mine].clone(), across, alpha=-1)
        left[mine], inverse[mine], inverse[:, mine] = 0, 0, 0
        inverse[mine, mine] = torch.eye(width, dtype=inverse.dtype, device=inverse.device)
        kept[unit] = False
    return Choice(kept, left.T.to(weight.dtype))


ONE_SHOT: dict[str, Method] = {"Wanda-sp": wanda_sp, "FLAP": flap, "OBS": obs}
PEERS = (*ONE_SHOT, "ShortGPT", "scratch")


def highest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return which units have the highest scores, bool (U,)."""
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[scores.topk(keep).indices] = True
    return kept


def columns_of(kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return which columns of a matrix stay, bool (C,)."""
    return kept.repeat_interleave(weight.shape[1] // len(kept))


def cut(
    peer: str, model: PreTrainedModel, sizes: Mapping[str, int], ids: torch.Tensor,
    curves: Callable[[PreTrainedModel, PruningGroups], LossCurves],
) -> LlamaForCausalLM:  # fmt: skip
    """Return a smaller model by one of the `PEERS`; the given one stays as it is.

    Args:
        sizes: of the config, that HESSO chose.
        ids: calibration examples, (examples, tokens).
        curves: measures what structures cost on HESSO's calibration examples.

    Raises:
        HessoError: for another class than Llama, or sizes that no method here can reach.
    """
    if type(model) is not LlamaForCausalLM:
        raise HessoError(f"`model` ({type(model).__name__}) must be a LlamaForCausalLM: the peers cut no other class")
    if peer == "scratch":
        return LlamaForCausalLM(resized_config(model.config, dict(sizes)))
    if peer == "ShortGPT":
        return drop_layers(model, parameters_of(model, sizes), ids)
    return cut_units(model, known_sizes(model, sizes, curves), ids, ONE_SHOT[peer])


def parameters_of(model: LlamaForCausalLM, sizes: Mapping[str, int]) -> int:
    """Count the parameters of a model of some sizes."""
    return build_meta(type(model), resized_config(model.config, dict(sizes))).num_parameters()


def known_sizes(
    model: LlamaForCausalLM, sizes: Mapping[str, int], curves: Callable[[PreTrainedModel, PruningGroups], LossCurves]
) -> dict[str, int]:
    """Return head and MLP sizes: those given, or as many parameters' worth where the hidden state is cut too.

    Raises:
        HessoError: where something else is cut.
    """
    full = {name: model.config.to_dict()[name] for name in (HEADS, KV_HEADS, MLP, HIDDEN)}
    wanted = full | sizes
    if wanted.keys() != full.keys() or wanted[HEADS] * full[KV_HEADS] != full[HEADS] * wanted[KV_HEADS]:
        raise HessoError(f"`sizes` ({dict(sizes)}): the peers cut whole key-value heads and MLP channels only")
    if wanted.pop(HIDDEN) == full[HIDDEN]:
        return wanted
    share = 1 - parameters_of(model, sizes) / model.num_parameters()
    plan = PruningPlan.prepare(model, HessoConfig(share, structures=["attention_heads", "mlp_channels"]))
    plan.settle(lambda: curves(model, plan.groups))
    return plan.target.sizes


@torch.no_grad()
def cut_units(model: LlamaForCausalLM, sizes: Mapping[str, int], ids: torch.Tensor, method: Method) -> LlamaForCausalLM:
    """Cut heads and MLP channels, matrix by matrix in one forward pass of all examples."""
    model = copy.deepcopy(model)
    kept: dict[nn.Module, torch.Tensor] = {}

    def choosing(units: int, keep: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def choose(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept[module] = torch.ones(units, dtype=torch.bool, device=args[0].device)
            if keep == units:
                return
            choice = method(module.weight.float(), args[0].flatten(0, -2).float(), units, keep)
            kept[module] = choice.kept
            module.weight.copy_(choice.weight)
            if choice.bias is not None:
                bias = choice.bias if module.bias is None else module.bias + choice.bias
                module.bias = nn.Parameter(bias.to(module.weight.dtype))

        return choose

    config, handles = model.config, []
    for layer in model.model.layers:
        for module, name in ((layer.self_attn.o_proj, KV_HEADS), (layer.mlp.down_proj, MLP)):
            units = config.to_dict()[name]
            handles.append(module.register_forward_pre_hook(choosing(units, sizes[name])))
    run_trunk(model, ids, handles)
    return sliced(model, kept, sizes)


def sliced(
    model: LlamaForCausalLM, kept: Mapping[nn.Module, torch.Tensor], sizes: Mapping[str, int]
) -> LlamaForCausalLM:
    """Return the smaller model without the units that don't stay.

    Args:
        kept: of each `o_proj` and `down_proj`, the units that stay.
    """
    config, state = resized_config(model.config, dict(sizes)), model.state_dict()
    readers = model.model.layers[0]
    config.attention_bias = readers.self_attn.o_proj.bias is not None
    config.mlp_bias = readers.mlp.down_proj.bias is not None
    for index, layer in enumerate(model.model.layers):
        heads, channels = kept[layer.self_attn.o_proj], kept[layer.mlp.down_proj]
        for part, units in (("self_attn", heads), ("mlp", channels)):
            prefix = f"model.layers.{index}.{part}."
            for name in [name for name in state if name.startswith(prefix) and "_proj." in name]:
                reads = name.startswith((f"{prefix}o_proj", f"{prefix}down_proj"))
                if reads and name.endswith("bias"):
                    continue
                dim, tensor = int(reads), state[name]
                stays = units.repeat_interleave(tensor.shape[dim] // len(units))
                state[name] = tensor[:, stays] if reads else tensor[stays]
    small = LlamaForCausalLM(config).to(device=model.device, dtype=model.dtype)
    zeros = {name: torch.zeros_like(bias) for name, bias in small.state_dict().items() if name.endswith("bias")}
    small.load_state_dict(zeros | state)
    return small


@torch.no_grad()
def block_influence(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return how far each layer turns its input: 1 - the mean cosine of input and output, (layers,)."""
    found: list[torch.Tensor] = []

    def compare(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        found.append(1 - nn.functional.cosine_similarity(args[0].float(), output.float(), dim=-1).mean())

    run_trunk(model, ids, [layer.register_forward_hook(compare) for layer in model.model.layers])
    return torch.stack(found)


def drop_layers(model: LlamaForCausalLM, parameters: int, ids: torch.Tensor) -> LlamaForCausalLM:
    """Leave out the layers of least influence, so many that about `parameters` are left, and at least one."""
    layers = len(model.model.layers)
    of_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    gone = min(layers - 1, max(1, round((model.num_parameters() - parameters) / of_layer)))
    kept = block_influence(model, ids).topk(layers - gone).indices.sort().values.tolist()
    small = LlamaForCausalLM(resized_config(model.config, {LAYERS: len(kept)}, layers=kept))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.")}
    for new, old in enumerate(kept):
        layer = model.model.layers[old].state_dict()
        state |= {f"model.layers.{new}.{name}": tensor for name, tensor in layer.items()}
    small.to(device=model.device, dtype=model.dtype).load_state_dict(state)
    return small


def run_trunk(model: LlamaForCausalLM, ids: torch.Tensor, handles: list[Any]) -> None:
    """Run the model without its head, whose logits nobody needs, and take the hooks off."""
    try:
        with in_eval(model):
            model.model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Switch dropout off meanwhile."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
