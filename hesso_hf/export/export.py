"""Export: from a trained model, or a checkpoint of one, to a folder with the smaller stock model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..config import OPT_IN, structures_around
from ..distributed.parts import stock_class
from ..errors import HessoError
from ..hf_models.build import load_config, model_class_of
from ..hf_models.sizes import get_size
from ..structures.cut import cut_model, zero_units_
from ..structures.experts import EXPERT_UNITS, num_experts
from ..structures.groups import KeptUnits, PruningGroups
from ..structures.layers import LAYER_UNITS, without_dropped_layers
from ..structures.lora import ADAPTER_CONFIG, Adapters, base_of, dense_model, lora_layers, parameters_of
from ..structures.proof.prove import proved_groups
from ..structures.uneven_layers import layer_list, write_modelling_file
from ..vocabulary.tokens import KeptTokens
from ..vocabulary.trim_embeddings import rows_elements, trim_embeddings
from ..vocabulary.trim_tokenizer import check_saved_tokenizer, trim_tokenizer
from .adapter import cut_base, remove_cut_adapter, save_cut_adapter
from .checkpoint_state import SHARDS_NAME, STATE_NAME, holds_masters, load_masters, load_shards, read_state
from .plots import PLOT_NAME
from .publish import staged_folder
from .report import PruningReport, count_parameters
from .verify import Verification, Verifier

logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_pruned(
    source: str | os.PathLike[str] | nn.Module,
    output_dir: str | os.PathLike[str],
    *,
    kept_units: KeptUnits | None = None,
    groups: PruningGroups | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    training: Mapping[str, Any] | None = None,
    vocabulary: KeptTokens | None = None,
    lora_export: str | None = None,
    trust_pickles: bool = False,
) -> PruningReport:
    """Cut the pruned units out of a model, verify the result and publish it atomically.

    Args:
        source: a model (or a PeftModel with LoRA) whose pruned units are at zero, or a checkpoint folder that training
            wrote.
        output_dir: files of other kinds in it (`checkpoint-*`, ...) are left alone.
        kept_units: the decision; by default what the checkpoint says, or the units that aren't exactly zero.
        groups: the model's groups, where they are at hand already.
        tokenizer: saved along; a checkpoint's own by default.
        dtype: stored dtype, float32, bfloat16 or float16; that of the weights by default.
        training: what the report says about the run.
        vocabulary: the tokens to keep (`keep_tokens`); by default what the checkpoint says, or all.
        lora_export: of a model with adapters, `merged` or `adapter`, as in `HessoConfig`, which is the default.
        trust_pickles: open a checkpoint's pickles, which can run code; only DeepSpeed's need it.

    Raises:
        HessoError: where pruning hasn't finished, a unit to be cut isn't zero, the layers differ unasked, or a
            checkpoint of DeepSpeed's can't be read.
        VerificationError: where the smaller model's logits differ; `output_dir` is untouched then.
    """
    if dtype is not None and dtype not in DTYPES:
        raise HessoError(f"`dtype` ({dtype!r}) must be one of {list(DTYPES)}")
    for name in ("trainer_state.json", "optimizer.pt"):
        if (Path(output_dir) / name).exists() and Path(output_dir).name.startswith("checkpoint-"):
            raise HessoError(f"`output_dir` ({str(output_dir)!r}) is a checkpoint of a run; choose another folder")
    if isinstance(source, nn.Module):
        trained: PreTrainedModel = base_of(source)
    else:
        trained, kept_units, tokenizer, training = _read_checkpoint(
            Path(source), kept_units, tokenizer, training, trust_pickles
        )
    asked = (training or {}).get("hesso_config", {})
    adapted = _lora_export(trained, lora_export, asked)
    model = dense_model(trained, torch.float32) if adapted else trained
    if groups is None:
        groups = _groups_for(model, kept_units)
    kept = _decision(model, groups, kept_units)
    wanted = dtype or asked.get("export_dtype")
    stored = DTYPES[wanted] if wanted else _trained_dtype(trained, source)
    if vocabulary is None and (training or {}).get("vocabulary"):
        vocabulary = KeptTokens.from_dict((training or {})["vocabulary"])
    if vocabulary is not None:
        tokenizer = _trimmed(tokenizer, vocabulary)
    return _export(
        model, groups, kept, Path(output_dir), tokenizer, stored, max_shard_size, training or {}, vocabulary,
        trained if adapted else None, adapted == "adapter",
    )  # fmt: skip


def _decision(model: PreTrainedModel, groups: PruningGroups, kept_units: KeptUnits | None) -> KeptUnits:
    """Return which units stay: what was decided, or those that aren't exactly zero.

    Raises:
        HessoError: where a unit that is to be cut isn't zero, or the layers would differ unasked.
    """
    if kept_units is not None:
        _check_kept(kept_units, groups)
    zero = zero_units(model, groups)
    kept = kept_units or _units_that_live(zero, groups)
    _check_zero(zero, kept)
    for name, layers in kept.kept.items():
        groups.structures[name].check_pools(layers)
    staying = without_dropped_layers(groups, kept).kept
    if kept_units is None and any(len({len(layer) for layer in layers}) > 1 for layers in staying.values()):
        counts = {name: [len(layer) for layer in layers] for name, layers in staying.items()}
        raise HessoError(
            f"the layers differ in how many units aren't zero ({counts}), which no stock class has; pass `kept_units` "
            "to export with a modelling file all the same"
        )
    if kept_units is None and all(
        len(layer) == kept.num_units[name] for name in kept.kept for layer in kept.kept[name]
    ):
        logger.warning("no unit's weights are zero: the model is written as large as it is. Was pruning finished?")
    return kept


def _export(
    model: PreTrainedModel,
    groups: PruningGroups,
    kept: KeptUnits,
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    dtype: torch.dtype,
    max_shard_size: str,
    training: Mapping[str, Any],
    vocabulary: KeptTokens | None,
    adapted: PreTrainedModel | None,
    keep_adapter: bool,
) -> PruningReport:
    """Write the smaller model.

    Args:
        model: all weights, what adapters add included.
        adapted: the trained model, where it has adapters.
        keep_adapter: writes the smaller base model and the adapter apart.
    """
    verifier = Verifier(model, groups, kept, vocabulary, adapted)
    fold_error = verifier.check_fold()
    if adapted is not None and keep_adapter:
        small = cut_base(adapted, groups, kept, dtype, vocabulary)
    else:
        small = cut_model(trim_embeddings(model, vocabulary) if vocabulary else model, groups, kept, dtype)
    with staged_folder(output_dir) as folder:
        small.save_pretrained(folder, max_shard_size=max_shard_size)
        if hasattr(small.config, "layer_sizes"):
            write_modelling_file(folder, type(model).__name__, layer_list(groups))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if vocabulary is not None and isinstance(tokenizer, PreTrainedTokenizerBase):
            check_saved_tokenizer(folder, tokenizer)
        rounding_error = verifier.check_saved(folder, small)
        if adapted is not None and keep_adapter:
            fold_error, rounding_error = save_cut_adapter(folder, adapted, groups, kept, verifier, output_dir)
        name = str(dtype).removeprefix("torch.")
        verification = Verification(fold_error, rounding_error, name, verifier.input_ids.numel())
        report = make_report(model, small, groups, kept, verification, training, vocabulary)
        picture = report.write(folder)
    if not keep_adapter:
        remove_cut_adapter(output_dir)
    if not picture:
        (Path(output_dir) / PLOT_NAME).unlink(missing_ok=True)  # of a model that was here before
    logger.info(f"{report.pruning_ratio:.1%} smaller model saved in {output_dir}, relative error {fold_error:.1e}")
    return report


def _trained_dtype(model: PreTrainedModel, source: str | os.PathLike[str] | nn.Module) -> torch.dtype:
    """Return the dtype that a model was trained in: of ZeRO's fp32 masters that of the copy it computed with."""
    stored = model.config.dtype
    of_masters = not isinstance(source, nn.Module) and holds_masters(Path(source))
    return stored if of_masters and isinstance(stored, torch.dtype) else model.dtype


def _lora_export(model: nn.Module, lora_export: str | None, asked: Mapping[str, Any]) -> str | None:
    """Return how adapters are exported, None where the model has none."""
    if lora_export not in (None, "merged", "adapter"):
        raise HessoError(f"`lora_export` ({lora_export!r}) must be 'merged' or 'adapter'")
    if lora_layers(model):
        return lora_export or asked.get("lora_export", "merged")
    if lora_export is not None:
        raise HessoError(f"`lora_export` ({lora_export!r}): {type(model).__name__} has no LoRA adapter; leave it out")
    return None


def make_report(
    model: PreTrainedModel,
    small: PreTrainedModel,
    groups: PruningGroups,
    kept: KeptUnits,
    verification: Verification,
    training: Mapping[str, Any],
    vocabulary: KeptTokens | None,
) -> PruningReport:
    """Say what was removed from a model, and how exactly."""
    before: dict[str, int] = {}
    for name in kept.kept:
        before |= groups.structures[name].config_sizes(groups.structures[name].num_units)
    return PruningReport(
        model_class=stock_class(model).__name__,
        base_model=model.config.name_or_path or "",
        parameters_before=count_parameters(model),
        parameters_after=count_parameters(small),
        sizes_before=before,
        sizes_after={name: _size_after(small.config, name) for name in before},
        stock=not hasattr(small.config, "layer_sizes"),
        kept_units=without_dropped_layers(groups, kept),
        verification=verification,
        training=training,
        vocabulary=_vocabulary_entry(small, vocabulary) if vocabulary else None,
    )


def _vocabulary_entry(small: PreTrainedModel, vocabulary: KeptTokens) -> dict[str, Any]:
    """Say what went with the tokens: parameters of rows as wide as the smaller model's."""
    tokens = {"before": vocabulary.vocab_size, "after": len(vocabulary.kept)}
    removed = rows_elements(small) * vocabulary.num_removed
    return {"tokens": tokens, "parameters_removed": removed, "kept": list(vocabulary.kept)}


def _trimmed(tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None, vocabulary: KeptTokens) -> Any:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise HessoError(
            f"`tokenizer` ({type(tokenizer).__name__}) must be given with `vocabulary`, and be no processor: the ids "
            "of a smaller vocabulary mean nothing to the full tokenizer"
        )
    return trim_tokenizer(tokenizer, vocabulary)


def _size_after(config: PretrainedConfig, name: str) -> float:
    """Return a size; where layers differ, their mean."""
    layers = [sizes[name] for sizes in getattr(config, "layer_sizes", None) or () if name in sizes]
    return round(sum(layers) / len(layers), 2) if layers else get_size(config, name) or 0


def _groups_for(model: PreTrainedModel, kept: KeptUnits | None) -> PruningGroups:
    """Prove the structures of a decision; without one, also those that must be named where some of them are at zero."""
    if kept is not None:
        named = tuple(kept.kept)
    else:
        possible = {EXPERT_UNITS: num_experts(model.config) is not None, LAYER_UNITS: _has_zero_matrix(model)}
        named = tuple(name for name, asked in possible.items() if asked)
    groups = proved_groups(type(model), model.config, structures_around(named))[0]
    whole = PruningGroups({n: g for n, g in groups.structures.items() if n == "attention_heads"})
    if kept is not None or not whole.structures or zero_units(model, whole)["attention_heads"].any():
        return groups
    single = proved_groups(type(model), model.config, ("query_heads",))[0]
    if not single.structures or not zero_units(model, single)["query_heads"].any():
        return groups
    others = {name: group for name, group in groups.structures.items() if name not in whole.structures}
    return PruningGroups(single.structures | others, groups.refused)


def _has_zero_matrix(model: PreTrainedModel) -> bool:
    """Tell whether a matrix is all zero, as one that writes to the stream is in a layer that does nothing."""
    return any(parameter.dim() > 1 and not parameter.any() for parameter in model.parameters())


@torch.no_grad()
def zero_units(model: PreTrainedModel, groups: PruningGroups) -> dict[str, torch.Tensor]:
    """Return, per structure, which units' effective weights are all exactly zero: shape (L, U), bool."""
    lives = {name: torch.zeros(len(g.layers), g.num_units) for name, g in groups.structures.items()}
    parameters = dict(model.named_parameters())
    for name, axes in groups.by_parameter().items():
        for structure, layer, axis in axes:
            others = [dim for dim in range(parameters[name].dim()) if dim != axis.dim]
            held = parameters[name].data != -axis.shift
            along = held.any(dim=others) if others else held
            lives[structure][layer] += axis.layout.collect(along.float().cpu(), groups.structures[structure].num_units)
    return {name: found == 0 for name, found in lives.items()}


def _units_that_live(zero: Mapping[str, torch.Tensor], groups: PruningGroups) -> KeptUnits:
    """Return the units that aren't zero; of structures that must be named only where one is."""
    named = {name: found for name, found in zero.items() if name not in OPT_IN or bool(found.any())}
    return KeptUnits(
        {name: groups.structures[name].num_units for name in named},
        {name: tuple(tuple((~layer).nonzero().flatten().tolist()) for layer in found) for name, found in named.items()},
    )


def _check_kept(kept: KeptUnits, groups: PruningGroups) -> None:
    """Compare a decision with the model's groups; refuse it by the first difference."""
    for name, layers in kept.kept.items():
        if name not in groups.structures:
            raise HessoError(f"`kept_units` names {name!r}, which isn't proved here; proved: {list(groups.structures)}")
        structure = groups.structures[name]
        if len(layers) != len(structure.layers):
            raise HessoError(f"`kept_units`: {name} has {len(layers)} layers, the model {len(structure.layers)}")
        if kept.num_units[name] != structure.num_units:
            raise HessoError(
                f"`kept_units`: {name} has {kept.num_units[name]} units a layer, the model {structure.num_units}"
            )
        for index, layer in enumerate(layers):
            if not layer or min(layer) < 0 or max(layer) >= structure.num_units:
                raise HessoError(
                    f"`kept_units`: layer {index} of {name} must keep units from 0 to {structure.num_units - 1}, "
                    f"at least one; got {list(layer)[:4]}..."
                )


def _check_zero(zero: Mapping[str, torch.Tensor], kept: KeptUnits) -> None:
    for name, layers in kept.kept.items():
        for index, layer in enumerate(layers):
            cut = torch.ones(kept.num_units[name], dtype=torch.bool)
            cut[list(layer)] = False
            alive = (cut & ~zero[name][index]).nonzero().flatten().tolist()
            if alive:
                raise HessoError(
                    f"{name}: unit {alive[0]} of layer {index} is to be cut but its weights aren't zero; "
                    "finish pruning first, or export the checkpoint in which it was finished"
                )


def _read_checkpoint(
    folder: Path,
    kept: KeptUnits | None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    training: Mapping[str, Any] | None,
    trust_pickles: bool,
) -> tuple[PreTrainedModel, KeptUnits | None, PreTrainedTokenizerBase | ProcessorMixin | None, Mapping[str, Any]]:
    """Load a dense checkpoint and the decision that lies beside it."""
    if not folder.is_dir():
        raise HessoError(f"`source` ({str(folder)!r}) is no folder; give a checkpoint-* folder that training wrote")
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
    if checkpoints and not any(folder.glob("*config.json")):
        raise HessoError(
            f"`source` ({str(folder)!r}) is the folder of a run; give one of its checkpoints: {checkpoints}"
        )
    if (folder / STATE_NAME).exists():
        state = read_state(folder)
        if not state["finished"]:
            raise HessoError(
                f"pruning had not finished in {folder}: step {state['step']} of {state['schedule_end']}; "
                "resume training and export a later checkpoint"
            )
        kept = kept or KeptUnits.from_dict(state["kept_units"])
        training = training or state["training"]
    elif kept is None:
        logger.warning(f"{folder} has no {STATE_NAME}; the units whose weights are exactly zero are cut")
    model = _load_trained(folder, kept, trust_pickles)
    if training and training.get("base_model"):
        model.config.name_or_path = training["base_model"]
    if tokenizer is None and (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, kept, tokenizer, training or {}


def _load_trained(folder: Path, kept: KeptUnits | None, trust_pickles: bool) -> PreTrainedModel:
    """Load a checkpoint's weights; where it holds an adapter only, into the base model that this names.

    Raises:
        HessoError: where the base model can't be told.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        config = load_config(folder)
        model_class = model_class_of(config)
        if holds_masters(folder):
            return load_masters(model_class, config, folder, trust_pickles)
        sharded = (folder / SHARDS_NAME).is_dir()
        return load_shards(model_class, config, folder) if sharded else model_class.from_pretrained(folder)
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base or kept is None:
        missing = "no base model" if kept is not None else "an adapter without a pruning state"
        raise HessoError(f"`source` ({str(folder)!r}) names {missing}; pass the PeftModel itself")
    plain = model_class_of(load_config(base)).from_pretrained(base)
    model: PreTrainedModel = base_of(PeftModel.from_pretrained(plain, folder))
    structures = _groups_for(model, kept)
    zero_units_(parameters_of(model), Adapters.of(model).extend(structures), kept)
    return model
