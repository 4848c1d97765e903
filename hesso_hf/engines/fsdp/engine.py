"""What a trainer asks of FSDP2, which shards parameters as DTensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments

from ...distributed.collectives import from_all, world_size
from ...distributed.parts import named_parameters
from ...errors import HessoError
from ...export.decision import NOTHING_CUT, Compaction, Decision
from ...export.report import PruningReport
from ...export.write import Output, write_uncut
from ...pruning.compaction import why_not_compact
from ..engine import PlainEngine, refuse_where_divided, write_divided
from ..run import Run
from .compaction import OPTIMIZERS, compact, why_not_exchange
from .export import ShardedSource, Writers
from .state import load_pruning_state, save_pruning_state


class Fsdp2Engine(PlainEngine):
    """FSDP2: HESSO is around the optimizer as on one process, on parameters of which each process holds a shard."""

    measures_shards = True
    keeps_whole = False

    def refuse(self, adapters: bool) -> None:
        """Refuse FSDP1, and what needs the whole model."""
        if getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise HessoError("`fsdp_version` (1) keeps flat parameters whose rows can't be told apart; set it to 2")
        refuse_where_divided(adapters)
        if self.config.prune_vocabulary:
            raise HessoError(
                "`prune_vocabulary` (True) isn't supported where parameters are sharded; leave it out, and trim the "
                "saved model on one process (`export_pruned(..., vocabulary=keep_tokens(...))`)"
            )

    def prepare(self, run: Run, plain: Callable[[], Any]) -> Any:
        """Shard the model, then choose basis and sizes on the shards, and begin anew on them, where they lie."""
        if self.args.torch_compile:
            # compiled as a whole, the model isn't the root of what FSDP2 shards: its forwards pass the hooks by
            self.accelerator.state.dynamo_plugin.use_regional_compilation = True
        prepared = plain()
        if run.resume_from is None and self.made_steps.process.state.compaction is None:
            run.quality.begin()
            run.settle()
            self._renew(run)
        return prepared

    def _renew(self, run: Run) -> None:
        """Begin anew on the parameters that sharding has put in the place of the model's, on the device they are on."""
        process = self.made_steps.process
        if process.state.compaction is None:
            self.made_steps.process = run.process_on(process.schedule)
        else:
            process.bound.let_go(named_parameters(run.model))

    def why_not_compact(self, base: Optimizer | None, model: nn.Module | None = None) -> str:
        """Return what stands against it in the optimizer, or in how the model is divided."""
        against = why_not_compact(base, self.config.layer_widths, OPTIMIZERS)
        return against or ("" if model is None else why_not_exchange(model))

    def compact(self, run: Run, model: nn.Module) -> Compaction:
        """Exchange the shards for those of the smaller model."""
        return compact(run.model, self.made_steps)

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
        source = ShardedSource(run.model, Decision(run.plan.groups, NOTHING_CUT), writers(self.args))
        write_uncut(source, Output(target, run.model.dtype, run.tokenizer))

    def export(self, run: Run, target: Path) -> PruningReport:
        """Write it from the shards of all."""
        return write_divided(self, run, target, lambda decision: ShardedSource(run.model, decision, writers(self.args)))

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
    if not args.save_on_each_node:
        return Writers(args.process_index, world_size(), args.should_save)
    first = args.process_index - args.local_process_index
    here = sum(rank - position == first for rank, position in enumerate(from_all(args.local_process_index)))
    return Writers(args.local_process_index, here, args.should_save)  # another node may have more processes, or fewer
