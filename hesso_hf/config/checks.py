"""What a `HessoConfig` refuses: types, ranges and words as tables, then what must fit together."""

from __future__ import annotations

import math
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from ..errors import HessoError
from .names import CRIC_TRIALS, DTYPE_NAMES, INSTEAD_OF, RECONSTRUCTION, SALIENCIES, STRUCTURES, weights_by_name

if TYPE_CHECKING:
    from .hesso_config import HessoConfig

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "budget_metric": ("parameters", "flops", "memory", "latency"),
    "layer_widths": ("uniform", "per_layer"),
    "stream_basis": ("given", "principal", "auto"),
    "healing": ("off", "auto"),
    "compact": ("never", "end", "auto"),
    "export_dtype": (None, *DTYPE_NAMES),
    "lora_export": ("merged", "adapter"),
    "cric_mode": ("path", "probe", "healed"),
    "cric_snapshot": ("cpu", "device"),
    "on_collapse": ("warn", "pause"),
}
_LEAST = {"cric_sampling_steps": 2, "calibration_examples": 0, "quality_examples": 0}  # of the other integers 1
_NEEDS_UNIFORM = {
    "experts": "every layer keeps as many as the config says",
    "layers": "what a dropped layer saves would depend on its width",
}


def check(config: HessoConfig) -> None:
    """Refuse values outside their range, unknown names, and choices that would have no effect.

    Raises:
        HessoError: with the argument, the value, what is allowed, and what to do.
    """
    for part in (
        _check_types, _check_budget, _check_ladder, _check_names, _check_schedule, _check_collapse,
        _check_distillation, _check_replay, _check_idle,
    ):  # fmt: skip
        part(config)


def _check_types(config: HessoConfig) -> None:
    """Refuse what isn't a number where one is needed (YAML reads 5e-1 as text), and words that aren't known."""
    for name, hint in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), get_args(hint) or (hint,)
        if value is None and NoneType in kinds:
            continue
        if float in kinds and str not in kinds and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise HessoError(f"`{name}` ({value!r}) must be a number; in YAML write 0.5 or 5.0e-1")
        if int in kinds and str not in kinds:
            check_integer(name, value, _LEAST.get(name, 1), or_none=NoneType in kinds)
        if bool in kinds and not isinstance(value, bool):
            raise HessoError(f"`{name}` ({value!r}) must be true or false")
    if config.cric != "auto" and not isinstance(config.cric, bool):
        raise HessoError(f"`cric` ({config.cric!r}) must be true, false or 'auto'")
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise HessoError(f"`{name}` ({getattr(config, name)!r}) must be one of {list(allowed)}")


def check_integer(name: str, value: Any, least: int = 1, or_none: bool = False) -> None:
    """Refuse an argument that is no integer, or a smaller one; None is checked by the caller.

    Raises:
        HessoError: with the argument, the value and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise HessoError(f"`{name}` ({value!r}) must be an integer of at least {least}{', or None' if or_none else ''}")


def _check_budget(config: HessoConfig) -> None:
    if config.pruning_ratio is None and not config.target_sizes:
        raise HessoError("HessoConfig needs `pruning_ratio` (a share in (0, 1)) or `target_sizes`; got neither")
    if config.pruning_ratio is not None and not 0.0 < config.pruning_ratio < 1.0:
        raise HessoError(
            f"`pruning_ratio` ({config.pruning_ratio}) must lie strictly between 0 and 1: it is the share removed, "
            "0.5 halves the model"
        )
    if config.target_sizes is not None and not isinstance(config.target_sizes, dict):
        raise HessoError(f"`target_sizes` ({config.target_sizes!r}) must map config sizes to integers")
    for name, size in (config.target_sizes or {}).items():
        check_integer(f"target_sizes[{name!r}]", size)
    if config.layer_widths == "per_layer" and (config.round_to or config.tensor_parallel_size > 1):
        raise HessoError(
            f"`round_to` ({config.round_to}) and `tensor_parallel_size` ({config.tensor_parallel_size}) can't be kept "
            "to in every layer with `layer_widths` ('per_layer'); leave them out or use 'uniform'"
        )


def _check_ladder(config: HessoConfig) -> None:
    given, ratio = config.export_at, config.pruning_ratio
    if given is None:
        return
    if ratio is None:
        raise HessoError(
            f"`export_at` ({given!r}) takes shares on the way to `pruning_ratio`, which isn't given; set it"
        )
    if not isinstance(given, list) or any(isinstance(share, bool) for share in given) or not given:
        raise HessoError(f"`export_at` ({given!r}) must be a list of shares, such as [0.2, 0.3]")
    if sorted({0.0, *given, ratio}) != [0.0, *given, ratio]:
        raise HessoError(
            f"`export_at` ({given}) must ascend between 0 and `pruning_ratio` ({ratio}), whose model is the last one"
        )
    periods, rungs = config.pruning_periods, len(given) + 1
    if periods and periods % rungs:
        raise HessoError(
            f"`pruning_periods` ({periods}) must be a multiple of {rungs}, the shares of `export_at` ({given}) and "
            f"`pruning_ratio` together: take {periods + -periods % rungs}, or leave it out"
        )


def _check_names(config: HessoConfig) -> None:
    if config.saliency is not None:
        weights_by_name("saliency", config.saliency, SALIENCIES)
    if config.structures == "all":
        return
    names = weights_by_name("structures", config.structures, STRUCTURES)
    for name, other in INSTEAD_OF.items():
        if name in names and other in names:
            raise HessoError(
                f"`structures` ({list(names)}) can't have both {name!r} and {other!r}, whose units share weights; "
                "name one of them"
            )
    for name, reason in _NEEDS_UNIFORM.items():
        if name in names and config.layer_widths == "per_layer":
            raise HessoError(
                f"`layer_widths` ('per_layer') can't be combined with `structures` {name!r}: {reason}; use 'uniform', "
                f"or leave {name!r} out"
            )


def _check_schedule(config: HessoConfig) -> None:
    for name, positive in (("warmup_steps", False), ("pruning_steps", True), ("ladder_recovery", False)):
        value = getattr(config, name)
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise HessoError(
                f"`{name}` ({value}) must be a count of steps or, below 1, a share of the run"
                + (", and positive" if positive else "")
            )
        if value >= 1 and value != int(value):
            raise HessoError(f"`{name}` ({value}) must be a whole number of steps, or below 1 for a share")
    if config.pruning_periods and 1 <= config.pruning_steps < config.pruning_periods:
        raise HessoError(
            f"`pruning_steps` ({int(config.pruning_steps)}) must be at least `pruning_periods` "
            f"({config.pruning_periods}); raise pruning_steps or lower pruning_periods"
        )


def why_not_healed(config: HessoConfig) -> str:
    """Return why CRIC can't judge units with the lowest gone and healed, "" where it can."""
    if config.healing == "off":
        return "with `healing` ('off')"
    if config.layer_widths == "per_layer":
        return "with `layer_widths` ('per_layer'): how many units of a layer go isn't known beforehand"
    if config.saliency is not None and set(config.saliency_weights) != {RECONSTRUCTION}:
        return f"with `saliency` ({config.saliency!r}), but with 'reconstruction' alone"
    return ""


def _check_collapse(config: HessoConfig) -> None:
    if config.cric is True and config.cric_mode == "healed" and (reason := why_not_healed(config)):
        raise HessoError(f"`cric_mode` ('healed') can't be had {reason}; change that, or use 'path'")
    if not 0 <= config.cric_tolerance < math.inf:
        raise HessoError(
            f"`cric_tolerance` ({config.cric_tolerance}) must be a count of units or, below 1, a share of those that "
            "are to go"
        )
    if not config.collapse_threshold > 0:
        raise HessoError(f"`collapse_threshold` ({config.collapse_threshold}) must be a positive rise of the loss")


def _check_distillation(config: HessoConfig) -> None:
    alpha = config.distillation_alpha
    if alpha != "auto" and (isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1):
        raise HessoError(
            f"`distillation_alpha` ({alpha!r}) must be 'auto' or lie in [0, 1]: it is the teacher's weight in the "
            "loss, 0 trains without one"
        )
    if not 0 < config.distillation_temperature < math.inf:
        raise HessoError(f"`distillation_temperature` ({config.distillation_temperature}) must be a positive number")
    if config.distill_from is not None and not isinstance(config.distill_from, str):
        raise HessoError(
            f"`distill_from` ({type(config.distill_from).__name__}) must name a folder or a Hub id: save the teacher "
            "and give its folder; None is the model before pruning"
        )


def _check_replay(config: HessoConfig) -> None:
    share = config.replay_share
    if share != "auto" and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1):
        raise HessoError(
            f"`replay_share` ({share!r}) must be 'auto' or lie in [0, 1): it is a share of the tokens trained on"
        )
    if config.replay_dataset is not None and not isinstance(config.replay_dataset, str):
        raise HessoError(
            f"`replay_dataset` ({type(config.replay_dataset).__name__}) must name a file, a folder or a Hub id"
        )


def refuse_what_trainers_do(config: HessoConfig) -> None:
    """Refuse, in a training loop of one's own, what is asked for by name and only a trainer carries out.

    Raises:
        HessoError: with what to do instead.
    """
    asked = {
        "export_at": bool(config.rungs),
        "stream_basis": config.stream_basis == "principal",
        "replay_share": config.replay_share not in ("auto", 0),
        "replay_dataset": config.replay_dataset is not None,
        "distillation_alpha": config.distillation_alpha not in ("auto", 0),
        "distill_from": config.distill_from is not None,
        "prune_vocabulary": config.prune_vocabulary,
        "compact": config.compact == "end",
    }
    for name in (name for name, wanted in asked.items() if wanted):
        raise HessoError(
            f"`{name}` ({getattr(config, name)!r}): a trainer does it, in a loop of your own nothing does; leave it "
            "out, or train with HessoTrainer"
        )


def _check_idle(config: HessoConfig) -> None:
    """Refuse choices that would have no effect."""
    alpha = "with `distillation_alpha` (0); leave that out, or set it to 0.9 for example"
    idle: dict[str, str] = {}
    if config.budget_metric != "latency":
        idle["latency_tokens"] = f"with `budget_metric` ({config.budget_metric!r}); set that too, to 'latency'"
    if not config.rungs:
        idle["ladder_recovery"] = "without `export_at`"
    if not config.reads_examples:
        idle["healing_tokens"] = "with `healing` ('off') where units aren't judged by `reconstruction`"
    if config.stream_basis == "given":
        idle["stream_basis_tolerance"] = "with `stream_basis` ('given')"
    if config.cric_way not in CRIC_TRIALS:
        cric = f"with `cric` ({config.cric!r})" + (" and `cric_mode` ('healed')" if config.cric is True else "")
        idle |= dict.fromkeys(("cric_sampling_steps", "cric_max_cycles", "cric_tolerance"), cric)
        if config.cric is not True:
            idle["cric_mode"] = f"{cric}; set that too, to True"
        if config.on_collapse != "pause":
            idle["cric_snapshot"] = f"{cric}, unless `on_collapse` is 'pause'"
    if config.distillation_alpha == 0:
        idle |= dict.fromkeys(("distillation_temperature", "distill_from"), alpha)
    if config.distillation_alpha == "auto" and config.replay_share == 0 and config.distill_from is None:
        idle["distillation_temperature"] = "with `distillation_alpha` ('auto') where no teacher is at hand"
    if config.replay_share == 0:
        idle["replay_dataset"] = "with `replay_share` (0); set that too, to 'auto' for example"
    for name, reason in idle.items():
        if getattr(config, name) != config.__dataclass_fields__[name].default:
            raise HessoError(f"`{name}` ({getattr(config, name)!r}) does nothing {reason}")
