"""Export under ZeRO: the smaller model is made from the fp32 masters, one parameter at a time.

Every parameter is put together on all processes, cut on the one that writes, and let go before the next. The trained
model's logits, which the smaller one's are compared with, come from a forward pass in fp32 that puts one layer together
at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations import deepspeed as hf_deepspeed

from ...distributed.collectives import from_main, on_all
from ...distributed.parts import named_parameters, stock_class, whole
from ...errors import VerificationError
from ...export.export import DTYPES, make_report
from ...export.plots import PLOT_NAME
from ...export.publish import staged_folder
from ...export.report import PruningReport
from ...export.verify import FOLD_TOLERANCE, Verification, kept_mask, verification_tokens
from ...hf_models.tiny_model import logits_of, relative_error
from ...structures.cut import build_cut, copy_buffers, cut_part, cuts_by_tensor, device_with_room
from ...structures.experts import EXPERT_UNITS
from ...structures.groups import KeptUnits, PruningGroups
from ...structures.layers import full_names
from ...structures.router_gates import routed_by
from ...structures.uneven_layers import layer_list, write_modelling_file
from .holdings import whole_fp32

NOTHING = KeptUnits({}, {})


def export_zero(
    model: PreTrainedModel,
    output_dir: Path,
    *,
    kept_units: KeptUnits,
    groups: PruningGroups,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    dtype: str | None,
    training: Mapping[str, Any],
    writes: bool,
    max_shard_size: str = "5GB",
) -> PruningReport:
    """Write the smaller model of one that ZeRO trains, as `export_pruned` does; all processes call it.

    Args:
        writes: whether this process writes files; the others take part in putting parameters together.

    Raises:
        HessoError: on all processes, where one fails; `output_dir` is untouched then.
        VerificationError: where the smaller model's logits differ.
    """
    stored = DTYPES[dtype] if dtype else model.dtype
    with _loading_whole():
        exported = on_all(lambda: ZeroExport(model, groups, kept_units, writes))
        report = on_all(
            lambda: exported.write(output_dir, stored, tokenizer, training, max_shard_size) if writes else None
        )
    return from_main(report)


class ZeroExport:
    """The smaller model in fp32 on the process that writes, checked against the trained one.

    Args:
        model: the trained model under ZeRO, pruned units at zero.
        groups: its structures.
        kept: the decision.
        writes: whether this process holds the smaller model.
    """

    def __init__(self, model: PreTrainedModel, groups: PruningGroups, kept: KeptUnits, writes: bool) -> None:
        self._groups, self._kept = groups, kept
        self._experts = groups.structures[EXPERT_UNITS] if EXPERT_UNITS in kept.kept else None
        self._mask = kept_mask(kept, EXPERT_UNITS) if EXPERT_UNITS in kept.kept else None
        self.input_ids = verification_tokens(model)
        self.full = _without_weights(model, groups)
        with _streamed(self.full, named_parameters(model)), routed_by(self.full, self._experts, self._mask):
            self.logits = logits_of(self.full, self.input_ids)
        self.small = self._filled(model, writes)
        self.fold_error = self._error(self.small) if self.small is not None else 0.0

    def _filled(self, model: PreTrainedModel, writes: bool) -> PreTrainedModel | None:
        """Return the smaller model, where this process writes; the others help to put parameters together."""
        small = build_cut(model, self._groups, self._kept).float() if writes else None
        parameters = dict(small.named_parameters()) if small is not None else {}
        wanted: dict[str, list[str]] = {}
        for name, origin in full_names(parameters, self._groups, self._kept).items():
            wanted.setdefault(origin, []).append(name)
        cuts = cuts_by_tensor(self._groups, self._kept)
        for origin, parameter in named_parameters(model).items():
            values = whole_fp32(parameter)
            for name in wanted.get(origin, ()):
                kept = cut_part(values, whole(values.shape), cuts.get(origin, ()))
                if kept.shape != parameters[name].shape:
                    raise VerificationError(f"{name} is {tuple(kept.shape)} after cutting, not as the smaller model's")
                parameters[name].data.copy_(kept)
        if small is not None:
            small.to(device_with_room(model.device, 2 * 4 * sum(p.numel() for p in small.parameters())))  # type: ignore[arg-type]
            copy_buffers(small, model, self._groups, self._kept)
            small.eval()
        return small

    def _error(self, small: PreTrainedModel) -> float:
        with routed_by(small, None if EXPERT_UNITS in self._kept.kept else self._experts, self._mask):
            found = logits_of(small, self.input_ids.to(small.device))
            return relative_error(found.to(self.logits.device), self.logits)

    def write(
        self,
        target: Path,
        dtype: torch.dtype,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
        training: Mapping[str, Any],
        max_shard_size: str,
    ) -> PruningReport:
        """Write the smaller model's files, compare what lies on disk with what was to be written, and publish.

        Raises:
            VerificationError: where its logits or a tensor on disk differ.
        """
        assert self.small is not None
        if not self.fold_error <= FOLD_TOLERANCE:
            raise VerificationError(
                f"the smaller model's logits differ from the trained model's by {self.fold_error:.1e} (relative, fp32; "
                f"allowed {FOLD_TOLERANCE:.0e}). Nothing was published"
            )
        small = self.small.to(dtype)  # type: ignore[arg-type, call-arg]
        with staged_folder(target) as folder:
            small.save_pretrained(folder, max_shard_size=max_shard_size)
            if hasattr(small.config, "layer_sizes"):
                write_modelling_file(folder, stock_class(self.full).__name__, layer_list(self._groups))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            error = self._error(self._reloaded(folder, small))
            name = str(dtype).removeprefix("torch.")
            verification = Verification(self.fold_error, error, name, self.input_ids.numel())
            report = make_report(self.full, small, self._groups, self._kept, verification, training, None)
            picture = report.write(folder)
        if not picture:
            (target / PLOT_NAME).unlink(missing_ok=True)  # of a model that was here before
        return report

    def _reloaded(self, folder: Path, expected: PreTrainedModel) -> PreTrainedModel:
        uneven = hasattr(expected.config, "layer_sizes")
        loader: Any = AutoModelForCausalLM if uneven else type(expected)
        options = {"trust_remote_code": True} if uneven else {}
        found = loader.from_pretrained(folder, attn_implementation=expected.config._attn_implementation, **options)
        parameters = dict(found.named_parameters())
        for name, tensor in expected.named_parameters():
            if name not in parameters or not torch.equal(parameters[name].cpu(), tensor.cpu()):
                raise VerificationError(f"{name} reads back from {folder} differently than it was written")
        return found.to(expected.device).eval()


def _without_weights(model: PreTrainedModel, groups: PruningGroups) -> PreTrainedModel:
    """Build the trained model anew in fp32, with its buffers and no weights."""
    with init_empty_weights(include_buffers=False):
        full = build_cut(model, groups, NOTHING).float()
    full.tie_weights()  # which making the parameters empty has undone
    for module in full.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(model.device)
    copy_buffers(full, model, groups, NOTHING)
    return full.eval()


@contextlib.contextmanager
def _streamed(full: PreTrainedModel, sources: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put each layer's weights together when it is called, and let them go after it; the rest stays meanwhile."""
    blocks = [child for _, lists in _outermost_lists(full) for child in lists]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    empty = {id(parameter): name for name, parameter in full.named_parameters()}
    owners = [(m, leaf, p) for m in full.modules() for leaf, p in m.named_parameters(recurse=False)]
    handles: list[Any] = []

    def fill(module: nn.Module, chosen: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        made: dict[int, nn.Parameter] = {}
        for owner, leaf, parameter in chosen:
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(whole_fp32(sources[empty[id(parameter)]]), requires_grad=False)
            owner._parameters[leaf] = made[id(parameter)]

    def let_go(chosen: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        for owner, leaf, parameter in chosen:
            owner._parameters[leaf] = parameter

    rest = [entry for entry in owners if id(entry[2]) not in inside]
    try:
        for block in blocks:
            members = {id(module) for module in block.modules()}
            own = [entry for entry in owners if id(entry[0]) in members]
            handles.append(block.register_forward_pre_hook(lambda module, _, own=own: fill(module, own)))
            handles.append(block.register_forward_hook(lambda *_, own=own: let_go(own)))
        fill(full, rest)
        yield
    finally:
        for handle in handles:
            handle.remove()
        let_go(owners)


def _outermost_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return [(n, m) for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)]


@contextlib.contextmanager
def _loading_whole() -> Iterator[None]:
    """Let `from_pretrained` load a whole model, which ZeRO-3's config would have it shard over all processes."""
    config = hf_deepspeed.deepspeed_config()
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref() if config is not None else None  # type: ignore[misc]
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            hf_deepspeed.set_hf_deepspeed_config(kept)
