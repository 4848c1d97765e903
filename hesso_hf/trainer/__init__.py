"""Trainer: `HessoTrainer` in place of `Trainer`, and what it asks.

In: what a `Trainer` takes, and a `HessoConfig`.
Out: training as always, checkpoints that resume exactly, and a smaller model at `save_model` and `push_to_hub`.
Which engine runs is asked in one place; teacher and distillation are losses beside the user's own.
"""

from typing import TYPE_CHECKING

from .. import hand_on

if TYPE_CHECKING:
    from .trainer import HessoMixin, HessoTrainer

__all__ = ["HessoMixin", "HessoTrainer"]
__getattr__ = hand_on(__name__, {"HessoMixin": "trainer", "HessoTrainer": "trainer"})
