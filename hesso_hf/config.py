"""The user's choices: what is pruned, how much, when, and by which saliency."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from .errors import HessoError, nearest_name

StructureName = Literal[
    "attention_heads",
    "mlp_channels",
    "expert_channels",
    "mixer_channels",
    "embedding_channels",
    "query_heads",
    "experts",
    "layers",
]
SaliencyName = Literal["magnitude", "avg_magnitude", "cosine_similarity", "taylor_first_order", "taylor_second_order"]
STRUCTURES: tuple[str, ...] = get_args(StructureName)
INSTEAD_OF = {"query_heads": "attention_heads"}  # their units are parts of the other's
OPT_IN = (*INSTEAD_OF, "experts", "layers")  # pruned only where they are named
DEFAULT_STRUCTURES = tuple(name for name in STRUCTURES if name not in OPT_IN)  # what 'all' stands for
SALIENCIES: tuple[str, ...] = get_args(SaliencyName)
DEFAULT_SALIENCY = "taylor_second_order"
CRIC_SALIENCY = {"taylor_first_order": 1.0, "taylor_second_order": 3.0}  # the path's integral, and its curvature
BUDGET_METRICS = ("parameters", "flops", "memory", "latency")


@dataclass
class HessoConfig:
    """Configuration of pruning with HESSO (arXiv 2409.09085).

    Steps are optimizer steps: a value of 1 or more is a count, a value below 1 a share of the run.

    Raises:
        HessoError: (a `ValueError`) for a value outside its range or an unknown name, when the config is made.

    Example:
        >>> HessoConfig(pruning_ratio=0.5, structures=["attention_heads", "mlp_channels"]).pruning_ratio
        0.5
    """

    pruning_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the budget metric to remove, in (0, 1); of the model's parameters by default."},
    )
    budget_metric: str = field(
        default="parameters",
        metadata={"help": "What pruning_ratio is a share of: parameters, flops, memory or latency."},
    )
    structures: dict | str | None = field(
        default="all",
        metadata={
            "help": "What may be pruned: 'all' that is proved for the architecture, a list of attention_heads (or "
            "query_heads, single ones), mlp_channels, embedding_channels, experts and layers (whole ones, like experts "
            "never part of 'all'), or a dict of each one's share of the removed parameters."
        },
    )
    target_sizes: dict | str | None = field(
        default=None,
        metadata={"help": 'Config sizes to end with, as {"intermediate_size": 4096}; without a ratio, exactly these.'},
    )
    layer_widths: str = field(
        default="uniform",
        metadata={"help": "uniform: every layer keeps as many units (a stock class); per_layer: ranked across layers."},
    )
    round_to: int | None = field(
        default=None,
        metadata={"help": "Multiple that MLP and embedding channels, and tokens, keep to (default 8 or less)."},
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "Ordinary steps before the first scoring (steps)."})
    pruning_steps: float = field(default=0.15, metadata={"help": "Length of all pruning periods together (steps)."})
    pruning_periods: int | None = field(
        default=None, metadata={"help": "Number of pruning periods (default 3, fewer in very short runs)."}
    )
    saliency: dict | str | None = field(
        default=None,
        metadata={
            "help": "Saliency criterion, or a dict of weights: magnitude, avg_magnitude, cosine_similarity, "
            "taylor_first_order, taylor_second_order (default taylor_second_order; with cric, both Taylor terms)."
        },
    )
    saliency_batches: int = field(
        default=8, metadata={"help": "Steps before a scoring over which gradients are averaged (steps)."}
    )
    cric: bool = field(
        default=False,
        metadata={"help": "Look along the way to zero before deciding (CRIC): some steps after warm-up go into that."},
    )
    cric_mode: str = field(
        default="path",
        metadata={"help": "path: train while CRIC's units shrink; probe: only take gradients there, on a few batches."},
    )
    cric_sampling_steps: int | None = field(
        default=None, metadata={"help": "Samples on the way to zero in one CRIC cycle (default 8 at most) (steps)."}
    )
    cric_max_cycles: int | None = field(default=None, metadata={"help": "CRIC cycles at most (default 4 at most)."})
    cric_tolerance: float = field(
        default=0.02,
        metadata={"help": "CRIC ends when so few units newly look redundant; below 1 a share of those to be removed."},
    )
    cric_snapshot: str = field(
        default="cpu", metadata={"help": "Where weights and optimizer state to return to are kept: cpu or device."}
    )
    collapse_threshold: float = field(
        default=3.0,
        metadata={"help": "Rise of the training loss over its level before pruning that is called a collapse."},
    )
    on_collapse: str = field(
        default="warn", metadata={"help": "warn, or pause: return to the period's start and mark fewer units."}
    )
    calibration_examples: int = field(
        default=16,
        metadata={"help": "Examples on which the split between structures is measured; 0 splits evenly."},
    )
    distillation_alpha: float = field(
        default=0.0,
        metadata={"help": "Weight of the divergence from a teacher in the loss, in [0, 1]; 0 is without a teacher."},
    )
    distillation_temperature: float = field(
        default=1.0,
        metadata={"help": "What teacher's and student's logits are divided by before they are compared."},
    )
    distill_from: str | None = field(
        default=None,
        metadata={"help": "Teacher with the same tokenizer, a folder or Hub id; by default the model before pruning."},
    )
    prune_vocabulary: bool = field(
        default=False,
        metadata={"help": "Remove tokens that train_dataset never uses from the saved model and its tokenizer."},
    )
    export_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Stored dtype of the smaller model: float32, bfloat16, float16; default that of the weights."
        },
    )
    lora_export: str = field(
        default="merged",
        metadata={
            "help": "What is saved after training with LoRA: merged, one smaller model; adapter, the smaller base "
            "model, and the adapter cut to it in the folder `adapter` there."
        },
    )
    tensor_parallel_size: int = field(
        default=1, metadata={"help": "Heads and channels stay divisible by this many tensor-parallel ranks."}
    )

    def __post_init__(self) -> None:
        # `| str | None` lets HfArgumentParser take JSON, a comma list or a name; None means the default
        self.structures = "all" if self.structures is None else _parse(self.structures)
        self.target_sizes = _parse(self.target_sizes)
        self.saliency = _parse(self.saliency)
        self._check_types()
        self._check_budget()
        self._check_structures()
        self._check_schedule()
        self._check_collapse()
        self._check_distillation()
        if self.saliency is not None:
            _weights_by_name("saliency", self.saliency, SALIENCIES)

    @property
    def saliency_weights(self) -> dict[str, float]:
        """Weight of each saliency criterion in use."""
        if self.saliency is None and self.cric:
            return dict(CRIC_SALIENCY)
        return self.calibration_weights

    @property
    def calibration_weights(self) -> dict[str, float]:
        """Weight of each criterion where the split between structures is measured, the same with CRIC as without."""
        return _weights_by_name("saliency", self.saliency or DEFAULT_SALIENCY, SALIENCIES)

    @property
    def structure_names(self) -> tuple[str, ...]:
        """Structures asked for; for 'all' those that needn't be named."""
        if self.structures == "all":
            return DEFAULT_STRUCTURES
        return tuple(_weights_by_name("structures", self.structures, STRUCTURES))

    @property
    def structure_shares(self) -> dict[str, float] | None:
        """Each structure's share of the removed parameters where the user gave one, summing to one; else None."""
        if not isinstance(self.structures, dict):
            return None
        total = sum(self.structures.values())
        return {name: share / total for name, share in self.structures.items()}

    @property
    def pinned_sizes(self) -> dict[str, int]:
        """`target_sizes`, empty where none are given."""
        return dict(self.target_sizes) if isinstance(self.target_sizes, dict) else {}

    def choices(self) -> dict[str, Any]:
        """Return what a run's sums and scales depend on."""
        names = ["saliency_batches", "layer_widths", "on_collapse"]
        names += [name for name in self.to_dict() if name.startswith("cric") and name != "cric_snapshot"]
        return {"saliency": self.saliency_weights} | {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HessoConfig:
        """Build a config from a mapping.

        Raises:
            HessoError: for a key that no field has, naming the nearest known one.
        """
        known = list(cls.__dataclass_fields__)
        for key in values:
            if key not in known:
                raise HessoError(f"unknown key `{key}` for HessoConfig{nearest_name(key, known)}; known: {known}")
        return cls(**values)

    def _check_types(self) -> None:
        """Refuse what isn't a number where one is needed: YAML reads 5e-1 as text."""
        numbers = ("pruning_ratio", "warmup_steps", "pruning_steps", "cric_tolerance", "collapse_threshold")
        for name in (*numbers, "distillation_alpha", "distillation_temperature"):
            value = getattr(self, name)
            optional = name == "pruning_ratio" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise HessoError(f"`{name}` ({value!r}) must be a number; in YAML write 0.5 or 5.0e-1")
        for name, least in (
            ("pruning_periods", 1), ("round_to", 1), ("cric_sampling_steps", 2), ("cric_max_cycles", 1)
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise HessoError(f"`{name}` ({value!r}) must be an integer of at least {least}, or None")
        for name, least in (("saliency_batches", 1), ("tensor_parallel_size", 1), ("calibration_examples", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise HessoError(f"`{name}` ({value!r}) must be an integer of at least {least}")

    def _check_budget(self) -> None:
        if self.pruning_ratio is None and not self.target_sizes:
            raise HessoError("HessoConfig needs `pruning_ratio` (a share in (0, 1)) or `target_sizes`; got neither")
        if self.pruning_ratio is not None and not 0.0 < self.pruning_ratio < 1.0:
            raise HessoError(
                f"`pruning_ratio` ({self.pruning_ratio}) must lie strictly between 0 and 1: it is the share removed, "
                "0.5 halves the model"
            )
        if self.budget_metric not in BUDGET_METRICS:
            raise HessoError(f"`budget_metric` ({self.budget_metric!r}) must be one of {list(BUDGET_METRICS)}")
        if self.target_sizes is not None and not isinstance(self.target_sizes, dict):
            raise HessoError(f"`target_sizes` ({self.target_sizes!r}) must map config sizes to integers")
        for name, size in (self.target_sizes or {}).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise HessoError(f"`target_sizes[{name!r}]` ({size!r}) must be an integer of at least 1")
        if self.layer_widths not in ("uniform", "per_layer"):
            raise HessoError(f"`layer_widths` ({self.layer_widths!r}) must be 'uniform' or 'per_layer'")
        if self.layer_widths == "per_layer" and (self.round_to or self.tensor_parallel_size > 1):
            raise HessoError(
                f"`round_to` ({self.round_to}) and `tensor_parallel_size` ({self.tensor_parallel_size}) can't be kept "
                "to in every layer with `layer_widths` ('per_layer'); leave them out or use 'uniform'"
            )
        if not isinstance(self.prune_vocabulary, bool):
            raise HessoError(f"`prune_vocabulary` ({self.prune_vocabulary!r}) must be true or false")
        if self.export_dtype not in (None, "float32", "bfloat16", "float16"):
            raise HessoError(f"`export_dtype` ({self.export_dtype!r}) must be float32, bfloat16 or float16")

        if self.lora_export not in ("merged", "adapter"):
            raise HessoError(f"`lora_export` ({self.lora_export!r}) must be 'merged' or 'adapter'")

    def _check_structures(self) -> None:
        if self.structures == "all":
            return
        names = _weights_by_name("structures", self.structures, STRUCTURES)
        for name, other in INSTEAD_OF.items():
            if name in names and other in names:
                raise HessoError(
                    f"`structures` ({list(names)}) can't have both {name!r} and {other!r}, whose units share weights; "
                    "name one of them"
                )
        if "experts" in names and self.layer_widths == "per_layer":
            raise HessoError(
                "`layer_widths` ('per_layer') can't be combined with `structures` 'experts': every layer keeps as many "
                "as the config says; use 'uniform', or leave 'experts' out"
            )
        if "layers" in names and self.layer_widths == "per_layer":
            raise HessoError(
                "`layer_widths` ('per_layer') can't be combined with `structures` 'layers': what a dropped layer saves "
                "would depend on its width; use 'uniform', or leave 'layers' out"
            )

    def _check_schedule(self) -> None:
        for name, least in (("warmup_steps", 0), ("pruning_steps", None)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (least is None and value == 0):
                raise HessoError(
                    f"`{name}` ({value}) must be a count of steps or, below 1, a share of the run"
                    + (", and positive" if least is None else "")
                )
            if value >= 1 and value != int(value):
                raise HessoError(f"`{name}` ({value}) must be a whole number of steps, or below 1 for a share")
        if self.pruning_periods and 1 <= self.pruning_steps < self.pruning_periods:
            raise HessoError(
                f"`pruning_steps` ({int(self.pruning_steps)}) must be at least `pruning_periods` "
                f"({self.pruning_periods}); raise pruning_steps or lower pruning_periods"
            )

    def _check_collapse(self) -> None:
        if not isinstance(self.cric, bool):
            raise HessoError(f"`cric` ({self.cric!r}) must be true or false")
        for name, allowed in (
            ("cric_mode", ("path", "probe")),
            ("cric_snapshot", ("cpu", "device")),
            ("on_collapse", ("warn", "pause")),
        ):
            if getattr(self, name) not in allowed:
                raise HessoError(f"`{name}` ({getattr(self, name)!r}) must be one of {list(allowed)}")
        if not 0 <= self.cric_tolerance < math.inf:
            raise HessoError(
                f"`cric_tolerance` ({self.cric_tolerance}) must be a count of units or, below 1, a share of those that "
                "are to go"
            )
        if not self.collapse_threshold > 0:
            raise HessoError(f"`collapse_threshold` ({self.collapse_threshold}) must be a positive rise of the loss")
        idle = ["cric_mode", "cric_sampling_steps", "cric_max_cycles", "cric_tolerance"] if not self.cric else []
        if not self.cric and self.on_collapse != "pause":
            idle.append("cric_snapshot")
        for name in idle:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                reader = "`cric` (False)" + (" or `on_collapse` 'pause'" if name == "cric_snapshot" else "")
                raise HessoError(f"`{name}` ({getattr(self, name)!r}) does nothing without {reader}")

    def _check_distillation(self) -> None:
        if not 0 <= self.distillation_alpha <= 1:
            raise HessoError(
                f"`distillation_alpha` ({self.distillation_alpha}) must lie in [0, 1]: it is the teacher's weight in "
                "the loss, 0 trains without one"
            )
        if not 0 < self.distillation_temperature < math.inf:
            raise HessoError(f"`distillation_temperature` ({self.distillation_temperature}) must be a positive number")
        if self.distill_from is not None and not isinstance(self.distill_from, str):
            raise HessoError(
                f"`distill_from` ({type(self.distill_from).__name__}) must name a folder or a Hub id: save the teacher "
                "and give its folder; None is the model before pruning"
            )
        for name in ("distillation_temperature", "distill_from"):
            if self.distillation_alpha == 0 and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise HessoError(
                    f"`{name}` ({getattr(self, name)!r}) does nothing with `distillation_alpha` (0); set that too, "
                    "to 0.9 for example"
                )


def structures_around(names: Iterable[str]) -> tuple[str, ...]:
    """Return the structures that may be pruned together with `names`: the default ones, some replaced, some added."""
    names = list(names)
    instead = {INSTEAD_OF[name]: name for name in names if name in INSTEAD_OF}
    added = [name for name in OPT_IN if name in names and name not in INSTEAD_OF]
    return (*(instead.get(name, name) for name in DEFAULT_STRUCTURES), *added)


def _parse(value: Any) -> Any:
    """Turn a JSON string (from a command line) into what it says; leave everything else alone."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise HessoError(f"{value!r} is not valid JSON: {error}") from error
    if isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _weights_by_name(argument: str, value: Any, known: tuple[str, ...]) -> dict[str, float]:
    """Normalise a name, a list of names or a dict of weights to a dict; refuse unknown names."""
    if isinstance(value, str):
        value = [value]
    weights = dict(value) if isinstance(value, dict) else dict.fromkeys(value or (), 1.0)
    if not weights:
        raise HessoError(f"`{argument}` ({value!r}) must name at least one of {list(known)}")
    for name, weight in weights.items():
        if name not in known:
            raise HessoError(
                f"`{argument}`: unknown name {name!r}{nearest_name(name, list(known))}; known: {list(known)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise HessoError(f"`{argument}[{name!r}]` ({weight!r}) must be a positive number")
    return {name: float(weight) for name, weight in weights.items()}
