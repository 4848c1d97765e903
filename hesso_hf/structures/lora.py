"""LoRA adapters: which parameters a model with adapters has, and what a frozen matrix and its adapter add up to.

Everything else knows parameters by the names that the model has without adapters. With one, the weight that the model
computes with is W + s * B @ A: scaling a row of it scales that row of W and of B, scaling a column that of W and of A.
Legend: r rank of an adapter.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compat import set_buffer, set_parameter
from ..distributed.parts import full_shape, named_parameters, stock_class
from ..errors import HessoError, UnsupportedStructureError
from ..hf_models.build import build_meta
from ..hf_models.tiny_model import ieee_fp32
from .groups import Axis, PruningGroups

ADAPTER_CONFIG = "adapter_config.json"
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_REFUSED_OPTIONS = {  # fields of LoraConfig, and what to do instead
    "use_dora": "DoRA divides by the columns' norms, which pruning changes; set use_dora=False",
    "lora_bias": "set lora_bias=False; bias='all' or 'lora_only' trains the model's own biases",
    "target_parameters": "name linear layers in target_modules instead",
    "trainable_token_indices": "train the whole embedding with modules_to_save=['embed_tokens'] instead",
    "layer_replication": "layers that share weights can't be pruned one by one; leave it out",
}


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a frozen matrix W (out, in): scaling * B @ A, with B (out, r) and A (r, in).

    Attributes:
        out_factor: name of B.
        in_factor: name of A.
        transposed: whether W is stored as (in, out), as embeddings and GPT-2's matrices are.
    """

    out_factor: str
    in_factor: str
    scaling: float
    transposed: bool

    def along(self, dim: int) -> tuple[str, int]:
        """Return the factor that has the indices of a dimension of W, and on which of its own dimensions."""
        return (self.out_factor, 0) if (dim == 0) != self.transposed else (self.in_factor, 1)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model by the name of the matrix that they add to; none for most models."""

    low_rank: Mapping[str, LowRank]

    @classmethod
    def of(cls, model: nn.Module) -> Adapters:
        """Find the adapters of a model that `base_of` returned."""
        found = {}
        for name, layer in lora_layers(model).items():
            pair = "lora_embedding_" if _is_embedding(layer) else "lora_"
            scaling = layer.scaling[_adapter_name(layer)]
            leaf = "" if _is_embedding(layer) else ".weight"
            transposed = _is_embedding(layer) or layer.fan_in_fan_out
            found[f"{name}.weight"] = LowRank(f"{name}.{pair}B{leaf}", f"{name}.{pair}A{leaf}", scaling, transposed)
        return cls(found)

    def __bool__(self) -> bool:
        return bool(self.low_rank)

    def effective(self, name: str, values: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Return the weight that the model computes with, from the values of parameters by name; a sum is in fp32."""
        added = self.low_rank.get(name)
        if added is None:
            return values(name)
        delta = (values(added.out_factor).float() @ values(added.in_factor).float()) * added.scaling
        return values(name).float() + (delta.T if added.transposed else delta)

    def extend(self, groups: PruningGroups) -> PruningGroups:
        """Return the groups with the adapters' factors in them: what happens to units then happens to these too."""
        if not self.low_rank:
            return groups
        structures = {
            name: replace(structure, axes=tuple(map(self._with_factors, structure.axes)))
            for name, structure in groups.structures.items()
        }
        return replace(groups, structures=structures)

    def _with_factors(self, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        found = list(axes)
        for axis in axes:
            if axis.parameter in self.low_rank:
                factor, dim = self.low_rank[axis.parameter].along(axis.dim)
                found.append(replace(axis, parameter=factor, dim=dim))
        return tuple(found)

    def factors(self, of: Iterable[str] | None = None) -> list[str]:
        """Return the names of all factors, or of those that add to the named weights."""
        chosen = [self.low_rank[name] for name in (self.low_rank if of is None else of) if name in self.low_rank]
        return [name for added in chosen for name in (added.out_factor, added.in_factor)]


NO_ADAPTERS = Adapters({})


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by the names that they have without adapters, and the adapters' factors.

    Of a module that an adapter trains a copy of (`modules_to_save`), it is the copy.
    """
    layers = lora_layers(model)
    adapter = _adapter_name(next(iter(layers.values()))) if layers else ""
    found = {}
    for name, parameter in named_parameters(model).items():
        plain = _plain_name(name, adapter) if layers else name
        if plain is not None:
            found[plain] = parameter
    return found


def _plain_name(name: str, adapter: str) -> str | None:
    """Return a parameter's name without what adapters put into it, None for one that isn't computed with."""
    if ".original_module." in f".{name}":
        return None
    plain = name.replace(".base_layer.", ".").replace(f".modules_to_save.{adapter}.", ".")
    for factor in _FACTORS:
        plain = plain.replace(f".{factor}.{adapter}", f".{factor}")
    return plain


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter, by name; without peft in the process there are none."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def base_of(model: nn.Module) -> Any:
    """Return the transformers model inside a PeftModel, with its adapters in place; any other model as it is."""
    if "peft" not in sys.modules:
        return model
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def with_adapter(
    peft_config: Any, make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a trainer's arguments with the model wrapped, or with `peft_config` where it has that argument itself.

    Args:
        make: the trainer's `__init__`, whose first argument is the model.

    Raises:
        HessoError: where there is no transformers model to wrap, or what is given is no config of PEFT's.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise HessoError(
            f"`peft_config` ({type(peft_config).__name__}) must be a LoraConfig: `peft.LoraConfig(r=8, ...)`"
        )
    if "peft_config" in inspect.signature(make).parameters:
        return args, {**kwargs, "peft_config": peft_config}
    model = args[0] if args else kwargs.get("model")
    if not isinstance(model, PreTrainedModel):
        raise HessoError(
            f"`peft_config` is given with `model` ({type(model).__name__}): it wraps a transformers model; where "
            "`model_init` makes it, or it has an adapter already, leave `peft_config` out"
        )
    wrapped = get_peft_model(model, peft_config)
    return ((wrapped, *args[1:]), kwargs) if args else (args, {**kwargs, "model": wrapped})


@ieee_fp32()
@torch.no_grad()
def dense_model(
    model: PreTrainedModel,
    dtype: torch.dtype | None = None,
    adapters: Adapters | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Return a stock model with the effective weights; what stays as it is shares memory with `model`.

    Args:
        model: with adapters in place.
        dtype: of the weights; by default that of `model`.
        adapters: what is added to the frozen weights; by default all of the model's.
        device: where the weights lie; by default where `model`'s do.
    """
    adapters = Adapters.of(model) if adapters is None else adapters
    parameters, dtype = parameters_of(model), dtype or model.dtype
    device = device or model.device
    dense = build_meta(stock_class(model), copy.deepcopy(model.config))
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in list(dense.named_parameters(remove_duplicate=False)):
        if id(parameter) not in filled:
            value = adapters.effective(name, lambda key: parameters[key].data.to(device))
            filled[id(parameter)] = nn.Parameter(value.to(device, dtype))
        owner, _, leaf = name.rpartition(".")
        set_parameter(dense.get_submodule(owner), leaf, filled[id(parameter)])
    buffers = {_plain_name(name, ""): buffer for name, buffer in model.named_buffers()}
    for name, _ in list(dense.named_buffers(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        set_buffer(dense.get_submodule(owner), leaf, buffers[name].to(device))
    if model.can_generate():
        dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.train(model.training)


def adapted_like(plain: PreTrainedModel, model: PreTrainedModel) -> Any:
    """Return a model of other sizes with adapters as `model` has them, new ones: a PeftModel."""
    from peft import get_peft_model

    configs: Any = model.peft_config
    ((name, config),) = copy.deepcopy(configs).items()
    config.init_lora_weights, config.base_model_name_or_path = True, plain.name_or_path
    return get_peft_model(plain, config, adapter_name=name)


def unset_like(model: PreTrainedModel) -> PreTrainedModel:
    """Return what the class makes of a model's config, adapters in place, on the meta device."""
    plain = build_meta(stock_class(model), copy.deepcopy(model.config))
    return base_of(adapted_like(plain, model)) if lora_layers(model) else plain


def num_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters that the model has without adapters."""
    factors = set(Adapters.of(model).factors())
    own = {p for name, p in parameters_of(model).items() if name not in factors}
    return sum(math.prod(full_shape(p)) for p in own)  # ZeRO-3 holds them in pieces


# -- what is refused --------------------------------------------------------------------------------------------------


def check_adapters(model: nn.Module) -> nn.Module:
    """Return the transformers model to prune where its adapters are plain LoRA; models without any as they are.

    Raises:
        UnsupportedStructureError: for anything else that peft does, naming it and what to do.
    """
    base = base_of(model)
    if base is model:
        if "peft" in sys.modules and (lora_layers(model) or type(model).__name__.startswith("PeftMixed")):
            raise UnsupportedStructureError(
                f"`model` ({type(model).__name__}) has adapters that no PeftModel holds; make it one with "
                "`peft.get_peft_model(model, LoraConfig(...))`, of the model without adapters"
            )
        return model
    _check_configs(model)
    if not isinstance(base, PreTrainedModel):
        return base
    layers = lora_layers(base)
    for name, layer in layers.items():
        _check_layer(name, layer)
    _check_shared(base, layers)
    if not any(parameter.requires_grad for parameter in base.parameters()):
        raise UnsupportedStructureError(
            "`model` (PeftModel): the adapter isn't trainable; load it with `PeftModel.from_pretrained(..., "
            "is_trainable=True)`"
        )
    return base


def _check_configs(model: Any) -> None:
    if len(model.peft_config) > 1 or len(model.active_adapters) != 1:
        raise UnsupportedStructureError(
            f"`model` (PeftModel) has the adapters {list(model.peft_config)}, active {list(model.active_adapters)}: "
            "pruning trains one; merge the others first (`merge_and_unload()`), or remove them (`delete_adapter(name)`)"
        )
    config = next(iter(model.peft_config.values()))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise UnsupportedStructureError(
            f"`peft_config` ({kind}) can't be pruned with: only LoRA can, whose weights add up with the model's; use "
            "`LoraConfig`, or merge this adapter first (`merge_and_unload()`)"
        )
    for option, remedy in _REFUSED_OPTIONS.items():
        if getattr(config, option, None):
            raise UnsupportedStructureError(
                f"`peft_config.{option}` ({getattr(config, option)!r}) isn't supported while pruning: {remedy}"
            )


def _check_layer(name: str, layer: Any) -> None:
    from peft.tuners import lora

    inner = layer.get_base_layer()
    if type(layer) not in (lora.Linear, lora.Embedding) or getattr(inner, "weight", None) is None:
        raise UnsupportedStructureError(
            f"{name}: LoRA on {type(inner).__name__} ({type(layer).__module__}.{type(layer).__name__}) can't be pruned;"
            " leave it out of target_modules. Of a quantised model load the unquantised weights, or call "
            "`model.dequantize()` before `get_peft_model`"
        )
    variant = layer.lora_variant.get(_adapter_name(layer))
    if variant is not None:
        raise UnsupportedStructureError(
            f"{name}: `peft_config` asks for {type(variant).__name__}, whose weight isn't W + s*B*A; use plain LoRA"
        )
    if layer.merged or layer.disable_adapters:
        state = "merged" if layer.merged else "disabled"
        remedy = "unmerge_adapter" if layer.merged else "base_model.enable_adapter_layers"
        raise UnsupportedStructureError(f"{name}: its adapter is {state}; call `model.{remedy}()` before pruning")


def _check_shared(base: PreTrainedModel, layers: dict[str, Any]) -> None:
    """Refuse an adapter on one use of a weight that other modules use without it."""
    uses: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        names = uses[id(layer.get_base_layer().weight)]
        if len(names) > 1:
            raise UnsupportedStructureError(
                f"{name}: LoRA on a weight that is tied ({names}) can't be pruned, the others don't have the adapter; "
                "leave it out of target_modules, or untie the weights first"
            )
    tied = base.config.get_text_config().tie_word_embeddings
    for name, module in base.named_modules() if tied else ():
        if isinstance(getattr(module, "original_module", None), nn.Embedding | nn.Linear):
            raise UnsupportedStructureError(
                f"`peft_config.modules_to_save` trains a copy of {name}, whose weight may be tied; leave it out, or "
                "untie the weights first (`tie_word_embeddings=False`)"
            )


def _adapter_name(layer: Any) -> str:
    return layer.active_adapters[0]


def _is_embedding(layer: Any) -> bool:
    return bool(len(layer.lora_embedding_A))
