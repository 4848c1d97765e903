"""How much a model minds an error behind a matrix: the Fisher information of what the matrix puts out.

With g the gradient, of one token, of -log p(y) by the matrix' output, and y drawn from the model's own predictions p,
G = E[g g^T]; an error E of the matrix (O, C), whose inputs have the second moment A, costs tr(G E A E^T) / 2. These are
the two factors of K-FAC (arXiv 1503.05671), by which LLM Surgeon (arXiv 2312.17244) prunes too. They take all tokens'
gradients for alike, which they are not: behind an attention sink, whose stream is far larger than others' (massive
activations, arXiv 2402.17762), an error is nothing. So a token counts in A by |g|, a token that has none by little.
Shapes: N tokens, T those of an example, O outputs, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..hf_models.tiny_model import reads_single_rows
from .saliency import float_sums

TOKENS = 1024  # of the gradients of a matrix about so many are kept, of the others the norms
TOGETHER = 128  # tokens that a pass takes of examples of one length, for short ones cost a pass each otherwise
DAMPING = 1e-2  # times the mean: what no gradient was seen for is little, not nothing


@dataclass
class OutputFisher:
    """What gradients of a model's outputs say, by the name of a matrix; of what isn't there all errors count alike.

    Attributes:
        rows: g of some tokens, (N, O).
        norms: |g| of all tokens, (N,).
    """

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, torch.Tensor] = field(default_factory=dict)

    def of_errors(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return what has the squared norms, by column, that errors W cost: G^(1/2) W, up to a rotation.

        Args:
            weight: W, (O, C), fp32 or fp64.
        """
        if name not in self.rows:
            return weight
        rows = self.rows[name].to(float_sums(weight.device))
        information = rows.T @ rows / len(rows)
        information.diagonal().add_(DAMPING * information.diagonal().mean())
        return torch.linalg.cholesky(information).T.to(weight.dtype) @ weight

    def scale_of(self, name: str, tokens: int) -> torch.Tensor | None:
        """Return what tokens' rows of what a matrix reads are multiplied by, (N,): squares are weighed by |g|.

        Args:
            tokens: N; where other ones were looked at all count alike, None.
        """
        norms = self.norms.get(name)
        if norms is None or len(norms) != tokens:
            return None
        return ((norms / norms.mean() + DAMPING) / (1 + DAMPING)).sqrt()


@torch.enable_grad()
def output_fisher(
    model: PreTrainedModel, examples: list[torch.Tensor], modules: Mapping[str, nn.Module]
) -> OutputFisher:
    """Look at the gradients behind a model's matrices; those without any that are finite and not zero are left out.

    No parameter's `.grad` is touched, and labels are drawn with a generator of their own.

    Args:
        examples: token ids, (1, T) each.
    """
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    generator = torch.Generator(examples[0].device).manual_seed(0)
    every, signs = max(1, sum(example.numel() for example in examples) // TOKENS), None

    def watch(name: str, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: note(name, g.detach().flatten(0, -2)))

    def note(name: str, g: torch.Tensor) -> None:
        rows[name].append(g[::every].clone() if signs is None else signs.to(g.dtype) @ g)
        squares[name][-1] = squares[name][-1] + g.float().square().sum(1)  # of a matrix that is used twice, both

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(lambda _, __, output, name=name: watch(name, output)))
        groups = _of_one_length(examples, 0 if reads_single_rows(model) else TOGETHER)
        for group in groups:
            ids = torch.cat([examples[index] for index in group])
            for parts in squares.values():
                parts.append(torch.zeros((), device=ids.device))
            with _grown_from_embeddings(model) as leaves:
                logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
                signs = _signs(ids, every, generator) if logits is not None and logits.dim() < 3 else None
                if isinstance(logits, torch.Tensor) and logits.requires_grad:
                    torch.autograd.grad(logits, leaves, _by_drawn_labels(logits, generator), allow_unused=True)
    norms = {name: _in_order(squares[name], groups).sqrt() for name in modules if rows[name]}
    kept = {name: torch.cat(rows[name]) for name in norms}
    sizes = [torch.stack([kept[name].float().abs().sum(), norms[name].sum()]) for name in norms]
    found = torch.stack(sizes).tolist() if sizes else []  # fetched at once
    seen = [name for name, (some, every_one) in zip(norms, found, strict=True) if some > 0 and every_one < math.inf]
    return OutputFisher({name: kept[name] for name in seen}, {name: norms[name] for name in seen})


def _of_one_length(examples: list[torch.Tensor], tokens: int) -> list[list[int]]:
    """Group examples of one length, by their places, up to so many tokens; so none is padding."""
    by_length: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        by_length.setdefault(example.numel(), []).append(index)
    groups = []
    for length, places in by_length.items():
        size = max(1, tokens // length)
        groups += [places[start : start + size] for start in range(0, len(places), size)]
    return groups


def _in_order(parts: list[torch.Tensor], groups: list[list[int]]) -> torch.Tensor:
    """Return what was found of the tokens of groups of examples in the examples' order, (N,)."""
    found: dict[int, torch.Tensor] = {}
    for part, group in zip(parts, groups, strict=True):
        if part.dim():
            found |= zip(group, part.chunk(len(group)), strict=True)
        else:  # the matrix had none of these tokens
            found |= dict.fromkeys(group, part[None])
    return torch.cat([found[index] for index in sorted(found)])


def _signs(ids: torch.Tensor, every: int, generator: torch.Generator) -> torch.Tensor | None:
    """Return what adds examples' gradients up to a few, each by a random sign, (n, N): E[S^T S] = n / N.

    Behind an answer to the whole example most of its tokens may have none, and single ones be missed.
    """
    if every == 1:
        return None
    few = -(-ids.numel() // every)
    drawn = torch.rand(few, ids.numel(), generator=generator, device=ids.device)
    return (2 * drawn.round() - 1) / math.sqrt(ids.numel())


@contextmanager
def _grown_from_embeddings(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Have gradients go as far as the embeddings, whatever is frozen; yields these, as the forward pass makes them."""
    leaves: list[torch.Tensor] = []

    def cut_off(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # which may be changed in place

    with model.get_input_embeddings().register_forward_hook(cut_off):
        yield leaves


@torch.no_grad()
def _by_drawn_labels(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the gradient of -log p(y) by logits (..., C), y drawn from p; C = 1 is a mean with a spread of 1."""
    if logits.shape[-1] == 1:
        return torch.randn(logits.shape, generator=generator, device=logits.device).to(logits.dtype)
    p = logits.float().softmax(-1)
    drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(*p.shape[:-1], 1)
    return p.scatter_add_(-1, drawn, -torch.ones_like(drawn, dtype=p.dtype)).to(logits.dtype)
