"""The sizes of a model that its memory depends on, counted on the meta device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...errors import HessoError
from ...hf_models.build import build_meta, class_to_build
from ...hf_models.sizes import EXPERT_MLP, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MLP, ConfigSizes
from ...pruning.readers import columns_of
from ...structures.experts import experts_per_token, num_experts


@dataclass(frozen=True)
class ModelSizes:
    """Counts of elements.

    Attributes:
        parameters: all, tied ones once; `active_parameters` those that one token passes, of experts the chosen ones.
        layers: modules that are wrapped, checkpointed and gathered as one (`_no_split_modules`).
        layer_parameters: elements of the largest such layer; `layer_matrices` those of its matrices.
        matrix_parameters: elements of all matrices that a product reads: the layers' and the output matrix.
        embedding_parameters, head_parameters: of the input and the output matrix, the same one where they are tied; a
            classifier's output isn't counted, a few rows that see one token of each example.
        untied_embedding: of an input matrix of its own, whose gradient comes last.
        largest_matrix: elements of the largest matrix.
        factored: sum of rows and columns of every matrix, and of all vectors: Adafactor's state.
        mlp_width: MLP channels that one token passes.
        query_width, kv_width: heads times head_dim, and key-value heads times head_dim.
        linear_inputs, lora_width: of one layer's matrices the input widths; of all layers', input and output widths.
        widest_input: of the linear layers in a layer, among which those are that healing refits.
        vocabulary: outputs of a token; none for a classifier.
    """

    parameters: int
    active_parameters: int
    layers: int
    layer_parameters: int
    layer_matrices: int
    matrix_parameters: int
    embedding_parameters: int
    head_parameters: int
    untied_embedding: int
    largest_matrix: int
    factored: int
    hidden: int
    mlp_width: int
    gated: bool
    heads: int
    query_width: int
    kv_width: int
    vocabulary: int
    linear_inputs: int
    lora_width: int
    widest_input: int


def model_sizes(config: PretrainedConfig, trust_remote_code: bool = False) -> ModelSizes:
    """Count a model's sizes from its config.

    Raises:
        HessoError: where the config doesn't give a width of layers, heads or MLP, or the class has no layers, or reads
            no tokens.
    """
    model = build_meta(class_to_build(config, trust_remote_code), config)
    layers = _layers(model)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # none: a classifier
    if not layers or not isinstance(embedding, nn.Embedding):
        raise HessoError(f"{type(model).__name__} has no layers that read tokens: its memory isn't known")
    head_parameters = head.weight.numel() if head is not None else 0
    tied = head is not None and head.weight is embedding.weight
    sizes, experts = ConfigSizes.of(config), num_experts(config)
    mlp = (sizes.get(EXPERT_MLP) if experts else None) or sizes.get(MLP)
    needed = {HIDDEN: sizes.get(HIDDEN), HEADS: sizes.get(HEADS), HEAD_DIM: sizes.head_dim, MLP: mlp}
    for name, value in needed.items():
        if not value:
            raise HessoError(f"{type(config).__name__} has no integer `{name}`: the memory of activations isn't known")
    hidden, heads, head_dim, mlp = (int(value or 0) for value in needed.values())
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    parameters = sum(math.prod(shape) for shape in shapes)
    largest = max(layers, key=_elements)
    matrices = [sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in layers]
    linear = [[tuple(p.shape) for p in layer.parameters() if p.dim() == 2] for layer in layers]
    return ModelSizes(
        parameters=parameters,
        active_parameters=round(parameters - _unused_by_a_token(config) * sum(map(_elements_of_experts, layers))),
        layers=len(layers),
        layer_parameters=_elements(largest),
        layer_matrices=max(matrices),
        matrix_parameters=sum(matrices) + head_parameters,
        embedding_parameters=embedding.weight.numel(),
        head_parameters=head_parameters,
        untied_embedding=0 if tied else embedding.weight.numel(),
        largest_matrix=max(math.prod(shape) for shape in shapes if len(shape) > 1),
        factored=sum(math.prod(shape[:-2]) * sum(shape[-2:]) for shape in shapes),
        hidden=hidden,
        mlp_width=mlp * ((experts_per_token(config) or experts) if experts else 1),
        gated=_is_gated(largest, hidden, mlp),
        heads=heads,
        query_width=heads * head_dim,
        kv_width=(sizes.get(KV_HEADS) or heads) * head_dim,
        vocabulary=head.weight.shape[0] if head is not None else 0,
        linear_inputs=max(sum(shape[1] for shape in shapes) for shapes in linear),
        lora_width=sum(sum(shape) for shapes in linear for shape in shapes),
        widest_input=max(filter(None, map(columns_of, largest.modules())), default=0),
    )


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that engines wrap one by one, which are numbered; of nested ones the outer."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        wrapped = type(module).__name__ in (model._no_split_modules or ()) and name.rpartition(".")[2].isdigit()
        if wrapped and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _elements_of_experts(layer: nn.Module) -> int:
    return sum(p.numel() for name, p in layer.named_parameters() if ".experts." in f".{name}.")


def _unused_by_a_token(config: PretrainedConfig) -> float:
    """Return the share of a layer's experts that a token isn't routed to."""
    experts = num_experts(config)
    return 1 - (experts_per_token(config) or experts) / experts if experts else 0.0


def _is_gated(layer: nn.Module, hidden: int, width: int) -> bool:
    """Tell whether an MLP multiplies two products: it has three matrices then, or one of them is twice as long."""
    elements = 0
    for parameter in layer.parameters():
        ends = tuple(parameter.shape)[-2:]
        if parameter.dim() > 1 and hidden in ends and {width, 2 * width} & set(ends):
            elements += ends[0] * ends[1]
    return elements > 2.5 * hidden * width
