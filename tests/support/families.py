"""Small configs of many decoder families, random models of them, and models with random units at zero.

In a small config all sizes differ (heads, key-value heads, head_dim, width, MLP, vocabulary), so that a transposed axis
can't pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from hesso_hf.hf_models.build import model_class_of
from hesso_hf.structures.groups import KeptUnits, PruningGroups, StructureGroups

HEADS, MLP, STREAM = "attention_heads", "mlp_channels", "embedding_channels"
QUERY, EXPERT = "query_heads", "expert_channels"
SEED = 7
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
# Units that tests keep: every config class accepts them, together and alone (72 and 48 divide by 6 and 4 heads).
KEPT = {HEADS: 2, MLP: 37, STREAM: 48, EXPERT: 20}


@dataclass(frozen=True)
class Family:
    """A small config of one model type.

    Attributes:
        sizes: fields that differ from `SIZES`; None leaves the class' default.
        refused: structures that can't be pruned in this class, with what the reason must name.
        kept: units that a test keeps in every layer, where not those of `KEPT`.
        structures: those that tests ask for.
        channels_per_head: embedding channels that go with a unit of heads, where they only shrink together.
        mlp, kv_heads: what the class calls these sizes.
        apart: whether every structure is exported alone too, and not only all together.
    """

    name: str
    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    structures: tuple[str, ...] = (HEADS, MLP, STREAM)
    channels_per_head: int = 0
    mlp: str = "intermediate_size"
    kv_heads: str = "num_key_value_heads"
    apart: bool = True

    @property
    def proved(self) -> tuple[str, ...]:
        """Structures that must be proved."""
        return tuple(name for name in self.structures if name not in self.refused)

    def config(self, **changes: Any) -> PretrainedConfig:
        """Build the config."""
        values = SIZES | {"head_dim": 10} | self.sizes | changes
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        values = {name: value for name, value in (tokens | values).items() if value is not None}
        return CONFIG_MAPPING[self.model_type](**values)

    def units_to_keep(self, structures: tuple[str, ...]) -> dict[str, int]:
        """Return how many units of each structure a test keeps in every layer."""
        return {name: (KEPT | self.kept)[name] for name in structures}


FAMILIES = (
    Family("llama", "llama"),
    Family("mistral", "mistral"),
    Family("ministral", "ministral"),
    Family("qwen2", "qwen2", {"head_dim": None}),
    Family("qwen3", "qwen3"),
    Family("gemma", "gemma"),
    Family("gemma2", "gemma2", {"query_pre_attn_scalar": 10}),
    Family("gemma3_text", "gemma3_text", {"query_pre_attn_scalar": 10}),
    Family("phi", "phi", {"head_dim": None, "partial_rotary_factor": 0.5}),
    Family("phi3", "phi3", {"head_dim": None}),
    Family("olmo", "olmo", {"head_dim": None}),
    Family("olmo2", "olmo2", {"head_dim": None}),
    Family("granite", "granite", {"head_dim": None}),
    Family("smollm3", "smollm3", {"head_dim": None}),
    Family("starcoder2", "starcoder2", {"head_dim": None, "use_bias": True}),
    Family("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, kept={MLP: 40}),
    Family("glm4", "glm4"),
    Family("exaone4", "exaone4", {"head_dim": None}),
    Family("ernie4_5", "ernie4_5", {"use_bias": True}),
    Family("hunyuan_v1_dense", "hunyuan_v1_dense"),
    Family("cohere2", "cohere2", {"head_dim": None}),
)
VARIANTS = (
    Family("llama-tied", "llama", {"tie_word_embeddings": True}),
    Family("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Family("llama-multi-query", "llama", {"num_key_value_heads": 1}, kept={HEADS: 4}),
    Family("llama-multi-head", "llama", {"num_key_value_heads": 6}, kept={HEADS: 4}),
    Family("llama-square", "llama", {"head_dim": None}),
    Family("qwen2-head_dim", "qwen2", {"head_dim": 10}),
    Family("phi3-multi-query", "phi3", {"head_dim": None, "num_key_value_heads": 1}, kept={HEADS: 4}),
)
ALL = {family.name: family for family in (*FAMILIES, *VARIANTS)}


def _coupled(
    name: str, model_type: str, head_dim: int = 12, mlp: str = "n_inner", kv_heads: str = "", **sizes: Any
) -> Family:
    """A class whose head_dim follows hidden_size / num_attention_heads, without key-value heads unless named."""
    plain = {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None, mlp: 52}
    kept = {HEADS: 2, STREAM: 48} if kv_heads else {HEADS: 4, STREAM: 48}
    per_head = 72 // 3 if kv_heads else head_dim
    structures = (HEADS, MLP, STREAM)
    return Family(
        name, model_type, plain | sizes, {}, kept, structures, per_head, mlp, kv_heads or "num_key_value_heads", False
    )


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 28}
_GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {
    "num_key_value_heads": 6, "head_dim": None, "kv_lora_rank": 20, "q_lora_rank": 24, "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip


def _experts(name: str, sizes: dict[str, Any], dense: bool = True, alone: bool = True) -> Family:
    structures = (HEADS, *[MLP] * dense, STREAM, *[EXPERT] * alone)
    kept = {HEADS: 4 if sizes.get("num_key_value_heads") == 6 else 2, MLP: 40}
    return Family(name, name, sizes, {}, kept, structures, apart=False)


OTHERS = (
    Family("nemotron", "nemotron", apart=False),
    Family("cohere-untied", "cohere", {"head_dim": None, "tie_word_embeddings": False}, apart=False),
    _coupled("gpt2", "gpt2"),
    _coupled("gpt2-derived", "gpt2", n_inner=None),
    _coupled("gpt_neox", "gpt_neox", mlp="intermediate_size", intermediate_size=52),
    _coupled("gptj", "gptj", rotary_dim=8),
    _coupled("opt", "opt", mlp="ffn_dim"),
    _coupled("opt-projected", "opt", mlp="ffn_dim", word_embed_proj_dim=40),
    _coupled(
        "gpt_neo", "gpt_neo", mlp="intermediate_size", intermediate_size=52,
        attention_types=[[["global", "local"], 1]],
    ),
    _coupled("gpt_bigcode", "gpt_bigcode"),
    _coupled("falcon-multi-query", "falcon", mlp="ffn_hidden_size"),
    _coupled("falcon-multi-head", "falcon", mlp="ffn_hidden_size", multi_query=False),
    _coupled(
        "falcon-grouped", "falcon", mlp="ffn_hidden_size", kv_heads="num_kv_heads", new_decoder_architecture=True,
        num_kv_heads=3,
    ),
    _coupled(
        "stablelm", "stablelm", mlp="intermediate_size", kv_heads="num_key_value_heads", intermediate_size=52,
        num_key_value_heads=3, partial_rotary_factor=0.5,
    ),
    _experts("deepseek_v2", _LATENT | _EXPERTS | _GROUPS),
    _experts("deepseek_v3", _LATENT | _EXPERTS | _GROUPS),
    _experts("qwen3_moe", _EXPERTS | {"num_experts": 4}, dense=False),
    _experts("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}, alone=False),
    _experts("glm4_moe", _EXPERTS | _GROUPS | {"use_qk_norm": True}),
)  # fmt: skip


def _queries(model_type: str, heads: int, kept: int, **sizes: Any) -> Family:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": 2, **sizes}
    return Family(f"{model_type}-queries", model_type, sizes, kept={QUERY: kept}, structures=(QUERY, MLP, STREAM))


# Models that lose single query heads: three or four for each of two key-value heads, of which one goes.
QUERIES = {
    family.name: family
    for family in (
        _queries("llama", 8, 6, attention_bias=True),
        _queries("qwen3", 8, 6),
        _queries("gemma2", 8, 6, query_pre_attn_scalar=10),
        _queries("phi3", 6, 4, head_dim=None),
        _queries("olmo2", 6, 4, head_dim=None),
    )
}


def random_model(config: PretrainedConfig, seed: int = SEED) -> PreTrainedModel:
    """Build the stock model, in fp32, with random weights, biases and norm weights."""
    torch.manual_seed(seed)
    model = model_class_of(config)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


def random_units(groups: PruningGroups, counts: dict[str, int], seed: int = SEED) -> KeptUnits:
    """Choose which units stay: others in every layer."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, count in counts.items():
        structure = groups.structures[name]
        kept[name] = tuple(_random_layer(structure, count, generator) for _ in structure.layers)
    return KeptUnits({name: groups.structures[name].num_units for name in counts}, kept)


def _random_layer(structure: StructureGroups, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Choose a layer's units that stay, equally many of each pool."""
    size = structure.num_units // structure.pools
    chosen: list[int] = []
    for start in range(0, structure.num_units, size):
        order = torch.randperm(size, generator=generator) + start
        chosen += order[: count // structure.pools].tolist()
    return tuple(sorted(chosen))


def zero_pruned_(model: PreTrainedModel, groups: PruningGroups, kept: KeptUnits) -> None:
    """Set every unit that isn't kept to zero; where norms subtract the stream's mean, take it out of what is kept."""
    parameters = dict(model.named_parameters())
    for name, layers in kept.kept.items():
        structure = groups.structures[name]
        for index, axis in structure.all_axes():
            pruned = torch.ones(structure.num_units, dtype=torch.bool)
            pruned[list(layers[index])] = False
            axis.mask_(parameters[axis.parameter].data, pruned)
    if STREAM in kept.kept and subtracts_mean(model):
        centre_writers_(model, kept.kept[STREAM][0])


WRITERS = (
    "o_proj", "dense", "out_proj", "c_proj", "fc_out", "dense_4h_to_h", "fc2", "down_proj", "project_in",
)  # fmt: skip


def subtracts_mean(model: PreTrainedModel) -> bool:
    """Tell from the names of its modules whether a model's norms are layer norms."""
    return any("LayerNorm" in type(module).__name__ for module in model.modules())


@torch.no_grad()
def centre_writers_(model: PreTrainedModel, channels: tuple[int, ...]) -> None:
    """Subtract, from everything that is added to the stream, its mean over some of the channels."""
    width, index = model.config.hidden_size, torch.tensor(channels)
    done = set()
    for name, module in model.named_modules():
        pieces: list[tuple[torch.Tensor, int]] = []
        if isinstance(module, nn.Embedding):
            pieces = [(module.weight, 1)]
        elif name.endswith(WRITERS) and isinstance(module, nn.Linear | Conv1D):
            pieces = [(module.weight, int(isinstance(module, Conv1D)))]
            pieces += [(module.bias, 0)] if module.bias is not None else []
        for tensor, dim in pieces:
            if tensor.shape[dim] == width and tensor.data_ptr() not in done:
                done.add(tensor.data_ptr())
                chosen = tensor.data.index_select(dim, index)
                tensor.data.index_copy_(dim, index, chosen - chosen.double().mean(dim, keepdim=True).float())


def token_ids(config: PretrainedConfig, length: int = 12) -> torch.Tensor:
    """Return random token ids, shape (2, length), none of them a special token."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, config.vocab_size, (2, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Return fp32 logits of a forward pass without a cache."""
    return model.eval()(input_ids=input_ids, use_cache=False).logits.float()


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max())
