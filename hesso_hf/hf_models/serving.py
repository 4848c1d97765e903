"""Which engines serve a smaller model, and which take a size for another than its config states.

What is said here was seen with small models of unusual sizes; docs/serving.md has the table, with versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .sizes import EXPERT_MLP, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, get_size, head_dim_of


@dataclass(frozen=True)
class Derives:
    """An engine that computes head_dim from other sizes, whatever the config states.

    Attributes:
        model_types: for which it does.
        then: what becomes of the model.
        layers: the numbers of layers by which it knows the models that it does so for; all where there is none.
    """

    engine: str
    model_types: tuple[str, ...]
    then: str
    layers: tuple[int, ...] = ()

    def misreads(self, text: PretrainedConfig) -> bool:
        """Whether it does so for a model."""
        return text.model_type in self.model_types and (not self.layers or get_size(text, LAYERS) in self.layers)


VLLM, LLAMA_CPP = "vLLM", "llama.cpp"
DERIVES_HEAD_DIM = (
    Derives("CTranslate2", ("llama",), "computes something else, without a message"),
    Derives(VLLM, ("qwen2",), "computes something else, without a message"),
    Derives(LLAMA_CPP, ("qwen2",), "refuses the model"),
    Derives(LLAMA_CPP, ("gemma2",), "computes something else, without a message", (46,)),  # of 27B
    Derives(LLAMA_CPP, ("gemma3_text",), "computes something else, without a message", (62,)),
)
TRIED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")  # model types, in both of them
VLLM_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
GGUF_ROWS = 32  # q8_0 quantises so many neighbours together


def served_by(config: PretrainedConfig) -> list[str]:
    """Return the engines that were seen to read a causal language model of this type, and don't misread these sizes.

    Args:
        config: the smaller model's.
    """
    if config.model_type not in TRIED:
        return []
    misread = {each.engine for each in DERIVES_HEAD_DIM if _head_dim_is_stated(config) and each.misreads(config)}
    if head_dim_of(config) not in VLLM_HEAD_DIMS:
        misread.add(VLLM)
    return [engine for engine in (VLLM, LLAMA_CPP) if engine not in misread]


def _head_dim_is_stated(text: PretrainedConfig) -> bool:
    """Tell whether head_dim is another than hidden size / heads, so that only the config says it."""
    heads, hidden, head_dim = get_size(text, HEADS), get_size(text, HIDDEN), head_dim_of(text)
    return bool(heads and hidden and head_dim and heads * head_dim != hidden)


def not_served_as_they_are(config: PretrainedConfig, before: Mapping[str, int] | None = None) -> list[str]:
    """Return what a smaller model's sizes are to engines that don't read all of them, one sentence for each engine.

    Args:
        config: the smaller model's.
        before: the full model's sizes, where they differ or may have.
    """
    text = config.get_text_config(decoder=True)
    heads, hidden, head_dim = get_size(text, HEADS), get_size(text, HIDDEN), head_dim_of(text)
    found = []
    if heads and hidden and head_dim and heads * head_dim != hidden:
        group = heads // (get_size(text, KV_HEADS) or heads) or 1
        suit = _that_suit(group, head_dim, hidden, {HEADS: heads, HIDDEN: hidden} | dict(before or {}))
        found += [
            f"{each.engine} computes {HEAD_DIM} of {text.model_type} as {HIDDEN} / {HEADS} ({hidden} / {heads}), "
            f"though the config says {head_dim}, and {each.then}; {suit}"
            for each in DERIVES_HEAD_DIM
            if each.misreads(text)
        ]
    odd = {name: size for name in (HIDDEN, MLP, EXPERT_MLP) if (size := get_size(text, name)) and size % GGUF_ROWS}
    if odd and text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        named = " and ".join(f"{name} ({size})" for name, size in odd.items())
        found.append(
            f"llama.cpp quantises rows in blocks of {GGUF_ROWS} (q8_0) or 256 (k-quants), and {named} "
            f"{'are no multiples' if len(odd) > 1 else 'is no multiple'} of these; set `round_to` to a multiple of "
            f"{GGUF_ROWS}"
        )
    return found


def _that_suit(group: int, head_dim: int, hidden: int, before: Mapping[str, int]) -> str:
    """Say which sizes of heads and width an engine would serve that computes the one from the other.

    Args:
        group: query heads of one key-value head.
        hidden: the smaller model's.
        before: the full model's sizes.
    """
    fit = max(group, hidden // head_dim // group * group)
    whole = (fit, fit * head_dim) == (before[HEADS], before[HIDDEN])  # of which nothing would be pruned
    fit -= group * whole
    if not fit:
        return "it would serve heads and width that stay whole: leave both out of `structures`"
    return (
        f"it would serve, for example, {HEADS} {fit} and {KV_HEADS} {fit // group} with {HIDDEN} {fit * head_dim} "
        f"(`target_sizes`){', or heads and width that stay whole (`structures`)' * whole}"
    )
