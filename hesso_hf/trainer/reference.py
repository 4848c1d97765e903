"""Reference models of preference and reinforcement learning: one must not change while the trained model is pruned."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from ..errors import HessoError
from ..structures.lora import base_of

REFERENCE = "ref"  # the adapter that TRL puts beside one that was trained before


def settle_reference(trainer: Trainer) -> None:
    """Refuse a reference that changes with the trained model: one that follows it, or has its base in common with it.

    Rows that are pruned of an adapter's base are the reference's rows too. Where its log-probabilities were all
    computed already, it isn't needed any more, and its adapter is removed.

    Raises:
        HessoError: saying what to do instead.
    """
    model: Any = trainer.model
    if vars(trainer.args).get("sync_ref_model"):
        raise HessoError(
            "`sync_ref_model` (True) mixes the trained weights into the reference, one by one: in a basis that is "
            "turned and with units that are pruned they mean other things than the reference's own; leave it out"
        )
    if vars(trainer).get("ref_model", model) is not None or base_of(model) is model:
        return  # the trainer has no reference, or one of its own
    args = vars(trainer.args)
    if args.get("precompute_ref_log_probs"):
        if REFERENCE in model.peft_config:
            model.delete_adapter(REFERENCE)
    elif args.get("beta"):
        instead = "`precompute_ref_log_probs=True`, or give a `ref_model`"
        raise HessoError(
            f"{type(trainer).__name__}'s reference is the base model of the adapter, which is pruned with it and so "
            f"would change; set {instead if 'precompute_ref_log_probs' in args else '`beta=0.0`'}"
        )
