"""Fine-tune a Hugging Face language model as usual and come out with a smaller one of the same stock class.

The modules in the order of the data flow, each importing only from those before it: errors, config, layout,
layer_lists, per_layer_sizes, sizes, division, probe, shards, groups, shrink, tiny, discovery, norms, streams, sides,
constants, experts, routing, depth, outcome, per_layer, cut, expert_trial, depth_proof, proof, cost, latency, budget,
inspection, strategies, model_sizes, memory, planning, schedule, saliency, agreement, snapshot, adapters, frozen, held,
bound, calibration, ranking, cric, trial, collapse, process, optimizer, shard_state, zero, zero_ranges, zero_universal,
zero_steps, plan, tokens, spelling, retokenize, embeddings, vocabulary, verify, adapter_export, publish, plots, card,
checkpoint, export, shard_export, zero_export, progress, hub, engines, preemption, teacher, distillation,
trainer, and then the command line's.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import HessoConfig
    from .errors import HessoError
    from .export import export_pruned
    from .inspection import inspect_model
    from .optimizer import HessoOptimizer
    from .plan import wrap_optimizer
    from .tokens import KeptTokens
    from .trainer import HessoMixin, HessoTrainer
    from .vocabulary import inspect_vocabulary, keep_tokens

__version__ = "0.1.0"
__all__ = [
    "HessoConfig",
    "HessoError",
    "HessoMixin",
    "HessoOptimizer",
    "HessoTrainer",
    "KeptTokens",
    "export_pruned",
    "inspect_model",
    "inspect_vocabulary",
    "keep_tokens",
    "wrap_optimizer",
]

_HOME = {
    "HessoConfig": "config",
    "HessoError": "errors",
    "HessoMixin": "trainer",
    "HessoOptimizer": "optimizer",
    "HessoTrainer": "trainer",
    "KeptTokens": "tokens",
    "export_pruned": "export",
    "inspect_model": "inspection",
    "inspect_vocabulary": "vocabulary",
    "keep_tokens": "vocabulary",
    "wrap_optimizer": "plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
