"""Pushing to the Hub: the smaller model with its card, never a dense one in its place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import Trainer
from transformers.utils import logging

from ..engines.deepspeed.steps import ZeroSteps
from ..export.report import CARD_NAME, REPORT_NAME
from ..pruning.optimizer import HessoOptimizer
from ..pruning.process import PruningProcess

logger = logging.get_logger(__name__)

_NOT_PUBLISHED = ["_*", "*/*", "training_args.bin", "optimizer.*", "scheduler.pt", ".*"]

if TYPE_CHECKING:
    _TrainerBase = Trainer
else:
    _TrainerBase = object


class HubMixin(_TrainerBase):
    """What a trainer with a `hesso_optimizer` uploads, and when."""

    hesso_optimizer: HessoOptimizer | ZeroSteps | None
    _saving_checkpoint: bool

    @property
    def _process(self) -> PruningProcess:
        assert self.hesso_optimizer is not None, "create_optimizer makes it"
        return self.hesso_optimizer.process

    @property
    def _output_dir(self) -> str:
        assert self.args.output_dir is not None  # TrainingArguments fills it in
        return self.args.output_dir

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Any:
        """Save the smaller model in `output_dir` and upload it with its card; a dense one is never pushed."""
        if self.hesso_optimizer is None or not self.hesso_optimizer.process.finished:
            logger.warning("nothing is pushed to the Hub: pruning hasn't finished, the model is still dense")
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return self._upload(commit_message, token, revision or self.args.hub_revision, blocking)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keep the pruned model's own card and add what is given (`tags`, `language`, `license`, ...)."""
        path = Path(self._output_dir) / CARD_NAME
        if not (Path(self._output_dir) / REPORT_NAME).exists():
            super().create_model_card(*args, **kwargs)
            return
        if not self.is_world_process_zero():
            return
        card = ModelCard.load(path)
        for name, value in kwargs.items():
            if name == "tags":
                given = [value] if isinstance(value, str) else list(value)
                card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *given]))
            elif value is not None and name != "model_name":
                setattr(card.data, name, value)
        card.save(path)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the smaller model with a checkpoint, once there is one; a dense model is never pushed in its place."""
        if not self._process.finished:
            logger.warning("nothing is pushed to the Hub yet: the model is still dense")
            return
        if self.args.hub_strategy == "end":
            return
        self._saving_checkpoint = False
        self.save_model(_internal_call=True)  # by all processes: they wait for the one that writes
        if self.is_world_process_zero():
            message = f"Training in progress, step {self.state.global_step}"
            self._upload(message, self.args.hub_token, self.args.hub_revision, True)

    def _upload(self, message: str | None, token: str | None, revision: str | None, blocking: bool) -> Any:
        return HfApi().upload_folder(  # type: ignore[call-overload]
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=message,
            token=token,
            run_as_future=not blocking,
            ignore_patterns=_NOT_PUBLISHED,
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],  # shards of an earlier push
            revision=revision,
        )
