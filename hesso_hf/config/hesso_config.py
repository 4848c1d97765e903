"""The user's choices: what is pruned, how much, when, and by which saliency."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .checks import check, why_not_healed
from .names import (
    AUTO_CRIC,
    CRIC_SALIENCY,
    CRIC_TRIALS,
    DEFAULT_SALIENCY,
    DEFAULT_STRUCTURES,
    RECONSTRUCTION,
    SALIENCIES,
    STRUCTURES,
    names_checked,
    number,
    numbers,
    parse,
    truth,
    weights_by_name,
)


def _option(default: Any, meaning: str, **flag: Any) -> Any:
    """Return a field with the help that a command line shows, and what else its flag takes."""
    return field(default=default, metadata={"help": meaning} | flag)


@names_checked
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

    pruning_ratio: float | None = _option(
        None, "Share of the budget metric to remove, in (0, 1); of the model's parameters by default."
    )
    budget_metric: str = _option(
        "parameters", "What pruning_ratio is a share of: parameters, flops, memory or latency."
    )
    latency_tokens: int = _option(
        128, "Tokens of the forward pass that is timed for a budget of latency; 1 is a step of writing."
    )
    export_at: list | str | None = _option(
        None,
        "Shares below pruning_ratio at which a model is saved on the way, as `rung-SHARE` in output_dir.",
    )
    ladder_recovery: float = _option(0.0, "Ordinary steps after a cut to one of export_at, before its save (steps).")
    structures: dict | str | None = _option(
        "all",
        "What may be pruned: 'all' that is verified for the architecture, a list of attention_heads (or "
        "query_heads, single ones), mlp_channels, embedding_channels, experts and layers (whole ones, like experts "
        "never part of 'all'), or a dict of each one's share of the removed parameters.",
    )
    target_sizes: dict | str | None = _option(
        None, 'Config sizes to end with, as {"intermediate_size": 4096}; without a ratio, exactly these.'
    )
    layer_widths: str = _option(
        "uniform", "uniform: every layer keeps as many units (a stock class); per_layer: ranked across layers."
    )
    round_to: int | None = _option(
        None, "Multiple that MLP and embedding channels, and tokens, keep to (default 128 or less, by the size)."
    )
    stream_basis: str = _option(
        "auto",
        "given: channels of the stream as the checkpoint has them; principal: the model is first turned, its function "
        "unchanged, into the principal axes of its hidden states; auto: principal where that is exact and channels "
        "go.",
    )
    stream_basis_tolerance: float = _option(
        0.05, "Rise of the loss that turning may cost, with tied embeddings or weights below fp32 (nats per token)."
    )
    healing: str = _option(
        "auto",
        "auto: what marked units contribute is refitted into those that stay, where that lowers the error on held-out "
        "tokens; off: training alone makes up for it.",
    )
    healing_tokens: int | None = _option(
        None, "Tokens of the training data on which units are judged and healed; by default as the matrices need."
    )
    warmup_steps: float = _option(0.02, "Ordinary steps before the first scoring (steps).")
    pruning_steps: float = _option(0.08, "Length of all pruning periods together (steps).")
    pruning_periods: int | None = _option(None, "Number of pruning periods (default 3, fewer in very short runs).")
    compact: str = _option(
        "auto",
        "When the model in memory becomes the smaller one: end, at the end of the last pruning period, after which "
        "steps and checkpoints are the smaller model's; auto: the same where that can be had; never: when it is saved.",
    )
    saliency: dict | str | None = _option(
        None,
        "Saliency criterion, or a dict of weights: magnitude, avg_magnitude, cosine_similarity, "
        "taylor_first_order, taylor_second_order, reconstruction (default reconstruction, and taylor_second_order "
        "where nothing is healed; with cric by path or probe, both Taylor terms).",
    )
    saliency_batches: int = _option(8, "Steps before a scoring over which gradients are averaged (steps).")
    # a bool or "auto"; HfArgumentParser can't take `bool | str`, and needs to be told that a flag alone is true
    cric: int | str | None = _option(
        "auto",
        "Look along the way to zero before deciding (CRIC): true, false, or auto, by cric_mode healed where units are "
        "judged by reconstruction alone.",
        nargs="?",
        const="true",
    )
    cric_mode: str = _option(
        "path",
        "path: train while CRIC's units shrink, in some steps after warm-up; probe: only take gradients there, on a "
        "few batches; healed: each period judges units again as the model is once the lowest are gone and healed.",
    )
    cric_sampling_steps: int | None = _option(
        None, "Samples on the way to zero in one CRIC cycle (default 8 at most) (steps)."
    )
    cric_max_cycles: int | None = _option(None, "CRIC cycles at most (default 4 at most).")
    cric_tolerance: float = _option(
        0.02, "CRIC ends when so few units newly look redundant; below 1 a share of those to be removed."
    )
    cric_snapshot: str = _option("cpu", "Where weights and optimizer state to return to are kept: cpu or device.")
    collapse_threshold: float = _option(
        3.0, "Rise of the training loss over its level before pruning that is called a collapse."
    )
    on_collapse: str = _option("warn", "warn, or pause: return to the period's start and mark fewer units.")
    calibration_examples: int = _option(
        16, "Examples on which the split between structures is measured; 0 splits evenly."
    )
    quality_examples: int = _option(
        64, "Examples of each eval_dataset on which base model and smaller one are compared; 0 is without."
    )
    distillation_alpha: float | str | None = _option(
        "auto",
        "Weight of the divergence from a teacher in the loss on the user's data, in [0, 1]; 0 is without, auto takes "
        "0.9 where the base model, which replay keeps, knows the data, or with `distill_from`, while the student isn't "
        "ahead.",
    )
    distillation_temperature: float = _option(
        1.0, "What teacher's and student's logits are divided by before they are compared."
    )
    distill_from: str | None = _option(
        None, "Teacher with the same tokenizer, a folder or Hub id; by default the model before pruning."
    )
    replay_share: float | str | None = _option(
        "auto",
        "Share of the tokens trained on that is text written by the base model before training, on which the student "
        "stays near the base model; 0 is without, auto takes 0.25 where there can be some, 0.125 where the base model "
        "teaches the user's data too.",
    )
    replay_dataset: str | None = _option(
        None, "Text for replay instead of what the model writes: a file, a folder or a Hub id."
    )
    prune_vocabulary: bool = _option(
        False, "Remove tokens that train_dataset never uses from the saved model and its tokenizer."
    )
    export_dtype: str | None = _option(
        None, "Stored dtype of the smaller model: float32, bfloat16, float16; default that of the weights."
    )
    lora_export: str = _option(
        "merged",
        "What is saved after training with LoRA: merged, one smaller model; adapter, the smaller base "
        "model, and the adapter cut to it in the folder `adapter` there.",
    )
    overwrite_base: bool = _option(
        False, "Let a save replace the files of the folder that the base model was read from; else it is refused."
    )
    tensor_parallel_size: int = _option(1, "Heads and channels stay divisible by this many tensor-parallel ranks.")

    def __post_init__(self) -> None:
        # `| str | None` lets HfArgumentParser take JSON, a comma list or a name; None means the default
        self.structures = "all" if self.structures is None else parse("structures", self.structures)
        self.target_sizes = parse("target_sizes", self.target_sizes)
        self.export_at = numbers("export_at", self.export_at)
        self.saliency = parse("saliency", self.saliency)
        self.replay_share = "auto" if self.replay_share is None else number(self.replay_share)
        self.cric = "auto" if self.cric is None else truth(self.cric)
        self.distillation_alpha = "auto" if self.distillation_alpha is None else number(self.distillation_alpha)
        check(self)

    @property
    def saliency_weights(self) -> dict[str, float]:
        """Weight of each saliency criterion in use."""
        if self.saliency is None and self.cric is True and self.cric_mode in CRIC_TRIALS:
            return dict(CRIC_SALIENCY)
        default = DEFAULT_SALIENCY if self.healing == "off" else RECONSTRUCTION
        return weights_by_name("saliency", self.saliency or default, SALIENCIES)

    @property
    def reads_examples(self) -> bool:
        """Whether units are judged or healed by what matrices read of examples."""
        return self.healing != "off" or RECONSTRUCTION in self.saliency_weights

    @property
    def cric_way(self) -> str | None:
        """How CRIC looks along the way to zero: path, probe or healed; None where it doesn't."""
        if self.cric != "auto":
            return self.cric_mode if self.cric else None
        return None if why_not_healed(self) else AUTO_CRIC

    @property
    def calibration_weights(self) -> dict[str, float]:
        """Weight of each criterion where the split between structures is measured, the same with CRIC as without."""
        return weights_by_name("saliency", self.saliency or DEFAULT_SALIENCY, SALIENCIES)

    @property
    def rungs(self) -> tuple[float, ...]:
        """`export_at`, empty where nothing is saved on the way."""
        return tuple(self.export_at) if isinstance(self.export_at, list) else ()

    @property
    def structure_names(self) -> tuple[str, ...]:
        """Structures asked for; for 'all' those that needn't be named."""
        if self.structures == "all":
            return DEFAULT_STRUCTURES
        return tuple(weights_by_name("structures", self.structures, STRUCTURES))

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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def paper(cls, pruning_ratio: float, **changes: Any) -> HessoConfig:
        """Return the paper's method alone, whatever the defaults are: HESSO with CRIC in path mode, and nothing beside.

        Args:
            changes: other fields.
        """
        alone: dict[str, Any] = {
            "stream_basis": "given", "healing": "off", "replay_share": 0.0, "distillation_alpha": 0.0,
            "compact": "never", "cric": True, "cric_mode": "path",
        }  # fmt: skip
        return cls(pruning_ratio=pruning_ratio, **(alone | changes))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HessoConfig:
        """Build a config from a mapping.

        Raises:
            HessoError: for a key that no field has, naming the nearest known one.
        """
        return cls(**values)
