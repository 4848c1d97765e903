"""Pushing to the Hub: the smaller model with its card, never a dense one in its place."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.utils import logging

logger = logging.get_logger(__name__)

_NOT_PUBLISHED = ["_*", "*/*", "training_args.bin", "optimizer.*", "scheduler.pt", ".*"]


def upload(
    trainer: Trainer, message: str | None, token: str | None, revision: str | None, blocking: bool = True
) -> Any:
    """Upload what lies in a trainer's `output_dir`, with neither checkpoints nor what only training needs."""
    return HfApi().upload_folder(  # type: ignore[call-overload]
        repo_id=trainer.hub_model_id,
        folder_path=trainer.args.output_dir,
        commit_message=message,
        token=token,
        run_as_future=not blocking,
        ignore_patterns=_NOT_PUBLISHED,
        delete_patterns=["*.safetensors", "*.safetensors.index.json"],  # shards of an earlier push
        revision=revision,
    )


def upload_on_the_way(trainer: Trainer) -> None:
    """Upload during training, which goes on where that fails: what was to be uploaded is saved, and comes again."""
    step = trainer.state.global_step
    try:
        upload(trainer, f"Training in progress, step {step}", trainer.args.hub_token, trainer.args.hub_revision)
    except Exception as error:  # no connection, no right any more: the client has no type for all
        logger.warning(f"nothing is pushed to the Hub after step {step}: {type(error).__name__}: {error}")
