"""Fine-tune a Hugging Face language model as usual and come out with a smaller one of the same stock class.

The folders in the order of the data flow, each importing only from those before it:

errors, config, bundled: what every folder may use
distributed: which part of a tensor this process holds, and how processes agree
hf_models: config sizes (read, resize, shrink), models on the meta device, tiny models, loading
structures: axes, layouts and groups of units, proved on a tiny model; cutting
vocabulary: tokens that a text never uses
budget: what sizes cost, and the sizes that meet a budget
export: the smaller model, written, verified and published, with its report
pruning: the plan, and what happens around the optimizer's step (HESSO, CRIC)
engines: FSDP2 and DeepSpeed, what they hold of a model and how it is saved from there
trainer: HessoTrainer, its teacher, its callbacks, the Hub
cli: the commands
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget.inspect import inspect_model
    from .cli.eval_callback import EvalCallback
    from .config import HessoConfig
    from .errors import HessoError
    from .export.export import export_pruned
    from .export.run_plot import plot_run
    from .pruning.optimizer import HessoOptimizer
    from .pruning.plan import wrap_optimizer
    from .trainer.trainer import HessoMixin, HessoTrainer
    from .vocabulary.keep import inspect_vocabulary, keep_tokens
    from .vocabulary.tokens import KeptTokens

__version__ = "0.1.0"
__all__ = [
    "EvalCallback",
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
    "plot_run",
    "wrap_optimizer",
]


def hand_on(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that imports its public names when they are first asked for.

    Args:
        package: the package's `__name__`.
        homes: public name to the module of the package that defines it.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find


__getattr__ = hand_on(
    __name__,
    {
        "EvalCallback": "cli.eval_callback",
        "HessoConfig": "config",
        "HessoError": "errors",
        "HessoMixin": "trainer.trainer",
        "HessoOptimizer": "pruning.optimizer",
        "HessoTrainer": "trainer.trainer",
        "KeptTokens": "vocabulary.tokens",
        "export_pruned": "export.export",
        "inspect_model": "budget.inspect",
        "inspect_vocabulary": "vocabulary.keep",
        "keep_tokens": "vocabulary.keep",
        "plot_run": "export.run_plot",
        "wrap_optimizer": "pruning.plan",
    },
)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
