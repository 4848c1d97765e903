"""What a trainer asks of FSDP2, which shards parameters as DTensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import fsdp2_prepare_model
from transformers import PreTrainedModel, TrainingArguments

from ...distributed.collectives import world_size
from ...errors import HessoError
from ...export.report import PruningReport
from ..engine import NO_ADAPTERS, NOT_TURNED, PlainEngine, Run, export_options
from .export import Writers, export_sharded, write_dense
from .state import load_pruning_state, save_pruning_state


class Fsdp2Engine(PlainEngine):
    """FSDP2: HESSO is around the optimizer as on one process, on parameters of which each process holds a shard."""

    measures_shards = True
    turns_stream = False

    def refuse(self, adapters: bool) -> None:
        """Refuse FSDP1, and what needs whole parameters."""
        if getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise HessoError("`fsdp_version` (1) keeps flat parameters whose rows can't be told apart; set it to 2")
        if adapters:
            raise HessoError(NO_ADAPTERS)
        if self.config.stream_basis == "principal":
            raise HessoError(NOT_TURNED)
        if self.config.prune_vocabulary:
            raise HessoError(
                "`prune_vocabulary` (True) isn't supported where parameters are sharded; leave it out, and trim the "
                "saved model on one process (`export_pruned(..., vocabulary=keep_tokens(...))`)"
            )

    def prepare(self, run: Run, plain: Callable[[], Any]) -> Any:
        """Shard the model, then measure on the shards and begin on them."""
        if self.args.torch_compile:
            # compiled as a whole, the model isn't the root of what FSDP2 shards: its forwards pass the hooks by
            self.accelerator.state.dynamo_plugin.use_regional_compilation = True
        prepared = plain()
        if run.resume_from is None:
            run.settle_sizes()
            self._renew(run)
        return prepared

    def _renew(self, run: Run) -> None:
        """Begin anew on the parameters that sharding has put in the place of the model's, on the device they are on."""
        self.made_steps.process = run.plan.process(self.made_steps.process.schedule)

    def save(self, run: Run, folder: Path) -> None:
        """Write what torch leaves out: the pruning state, config and tokenizer."""
        if self.args.should_save:
            run.model.config.save_pretrained(folder)
            if run.tokenizer is not None:
                run.tokenizer.save_pretrained(folder)
        save_pruning_state(self.made_steps, run.model, folder, self.args.should_save)

    def load(self, run: Run, folder: Path, plain: Callable[[], None]) -> None:
        """Load the sharded optimizer, then the pruning state beside it."""
        self._renew(run)
        plain()
        load_pruning_state(self.made_steps, run.model, folder)

    def save_dense(self, run: Run, target: Path, plain: Callable[[], None]) -> None:
        """Write the model from the shards, which `plain` would put together on one process."""
        write_dense(run.model, target, run.plan.groups, run.tokenizer, writers(self.args))

    def export(self, run: Run, target: Path) -> PruningReport:
        """Write it from the shards of all."""
        return export_sharded(run.model, target, writers=writers(self.args), **export_options(self, run))

    @property
    def has_weights(self) -> bool:
        """Whether this is the process that loads them for all, where only one does."""
        return not self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading or self.accelerator.is_main_process

    def place_frozen(self, model: PreTrainedModel, student: type) -> tuple[PreTrainedModel, bool]:
        """Shard a model that isn't trained."""
        state: Any = self.accelerator.state
        plugin = state.fsdp_plugin
        # The wrapping that it settles on is the student's, which comes later and may have layers of another class.
        state.fsdp_plugin = copy.copy(plugin)
        if type(model) is not student:
            state.fsdp_plugin.transformer_cls_names_to_wrap = None
        try:
            return fsdp2_prepare_model(self.accelerator, model.requires_grad_(False)), True
        finally:
            state.fsdp_plugin = plugin


def writers(args: TrainingArguments) -> Writers:
    """Return who writes files: all processes into one folder, or those of each node into one of the node's own."""
    if args.save_on_each_node:
        return Writers(args.local_process_index, processes_a_node(args), args.should_save)
    return Writers(args.process_index, world_size(), args.should_save)


def processes_a_node(args: TrainingArguments) -> int:
    """Return how many processes this node has; another one may have more or fewer."""
    shared: list[Any] = [None] * world_size()
    dist.all_gather_object(shared, args.local_process_index)
    first = args.process_index - args.local_process_index
    return sum(rank - position == first for rank, position in enumerate(shared))
