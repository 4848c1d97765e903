"""How long a training run takes, by the operations of its matrix products: an estimate, nothing is timed."""

from __future__ import annotations

from .estimate import EstimatedRun
from .workload import TokenPace, Workload

UTILISATION = 0.4  # of a GPU's peak, recomputation counted: assumed


def flop_per_token(workload: Workload, lora: bool) -> float:
    """Return the operations of a token of the data, by each parameter that it passes, replay's share of others added.

    A forward pass takes 2, a checkpointed one 2 more, the backward pass 4, or 2 where weights are frozen (LoRA), and
    the teacher 2 of each token that it reads. Attention's scores aren't counted: at 2,048 tokens they are a few per
    cent.
    """
    trained = 2 * (2 if workload.gradient_checkpointing else 1) + (2 if lora else 4)
    taught = 1.0 if workload.distillation else workload.replay_share
    return (trained + 2 * taught) / (1 - workload.replay_share)


def hours(run: EstimatedRun, pace: TokenPace) -> float:
    """Return the hours of a run whose model stays whole; what is offloaded takes more than that."""
    flop = flop_per_token(run.workload, run.engine.lora) * run.sizes.active_parameters * pace.tokens
    return flop / (run.cluster.num_gpus * pace.device_tflops * 1e12 * UTILISATION) / 3600
