"""`hesso-hf plan`: which engine a training run fits and how long it takes, as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ...hf_models.build import load_config
from .estimate import Estimate, EstimatedRun, estimate
from .hours import UTILISATION, flop_per_token, hours
from .model_sizes import ModelSizes, model_sizes
from .workload import COMPONENTS, ENGINES, GB, HEADROOM, Cluster, TokenPace, Workload

# What a part of the peak is called in the table, and what it is.
PARTS = {
    "parameters": ("weights", "fp32 masters; a low-precision model beside them (DeepSpeed), or frozen (LoRA's base)"),
    "gradients": ("gradients", "of the weights that are trained, as far as they are there at that moment"),
    "optimizer": ("optimizer", "its state; AdamW has two numbers a weight"),
    "snapshot": ("snapshot", "CRIC's copy of weights and optimizer state"),
    "teacher": ("teacher", "the original model in bf16, for replay or distillation"),
    "activations": ("activations", "what layers keep for the backward pass"),
    "logits": ("logits", "the loss and its gradient, by token and vocabulary entry"),
    "buffers": ("buffers", "autocast's bf16 weights, layers and gradients that engines gather, HESSO's scores"),
    "healing": ("healing", "what refits the units that stay, in the first step of each pruning period"),
}
ASSUMED = (
    f"Memory is that of PyTorch's tensors; {HEADROOM:.0%} of a GPU is left to CUDA, NCCL and the allocator. Fused "
    "attention, no padding; gradients of one micro-batch unless accumulated. All of this is estimated from the config."
)


@dataclass(frozen=True)
class MemoryPlan:
    """The estimates of all engines for one model and run."""

    model: str
    sizes: ModelSizes
    workload: Workload
    cluster: Cluster
    engines: dict[str, Estimate]
    pace: TokenPace
    hours: dict[str, float]

    @property
    def recommended(self) -> str | None:
        """The simplest engine that fits; LoRA, which trains something else, is the last."""
        return next((name for name, found in self.engines.items() if found.fits), None)

    @property
    def config_file(self) -> str | None:
        """The accelerate configuration of the recommended engine; None also where one GPU needs none."""
        if self.recommended is None or (self.cluster.num_gpus == 1 and not ENGINES[self.recommended].offload):
            return None
        return ENGINES[self.recommended].config_file(self.cluster.num_gpus // self.cluster.ranks_per_node)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "model": self.model,
            "parameters": self.sizes.parameters,
            "workload": asdict(self.workload),
            "cluster": asdict(self.cluster),
            "pace": asdict(self.pace) | {"utilisation": UTILISATION},
            "engines": {name: found.to_dict() | {"hours": self.hours[name]} for name, found in self.engines.items()},
            "recommended": self.recommended,
            "accelerate_config": self.config_file,
        }

    def title(self) -> str:
        work, gpus = self.workload, f"{self.cluster.num_gpus} x {self.cluster.gpu_memory / GB:g} GB"
        return (
            f"{self.model}, {self.sizes.parameters:,} parameters, on {gpus}"
            f": micro-batches of {work.batch_size} x {work.sequence_length} tokens, {work.dtype}, {work.optimizer}"
            f"{', gradient checkpointing' * work.gradient_checkpointing}"
        )

    def choice(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and a row an engine of the table to choose by."""
        header = ["engine", "fits", "GB of\neach GPU", "GB left", "largest\nbatch", "main memory\n(GB a node)", "hours"]
        rows = []
        for name, found in self.engines.items():
            more = "over " * bool(ENGINES[name].offload)
            rows.append([
                ENGINES[name].title, "yes" if found.fits else "no", _gb(found.peak), _gb(found.margin),
                str(found.max_batch_size), _gb(found.host), f"{more}{_hours(self.hours[name])}",
            ])  # fmt: skip
        return header, rows

    def peaks(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and a row an engine of what lies in a GPU's memory at its highest moment."""
        header = ["engine", "moment", *[PARTS[part][0] for part in self._shown()], "in all"]
        rows = []
        for name, found in self.engines.items():
            parts = [_gb(found.parts[part]) for part in self._shown()]
            rows.append([ENGINES[name].title, found.phase, *parts, _gb(found.peak)])
        return header, rows

    def _shown(self) -> list[str]:
        """Return the parts that any engine has."""
        return [part for part in COMPONENTS if any(found.parts[part] for found in self.engines.values())]

    def meanings(self) -> list[str]:
        """Return what the parts that are shown are."""
        return [f"{name}: {meaning}" for name, meaning in (PARTS[part] for part in self._shown())]

    def notes(self) -> list[str]:
        """Return what to say below the tables."""
        if self.recommended is None:
            advice = "No engine fits: lower batch size or sequence length, checkpoint gradients, or take more GPUs."
            if any(found.margin >= 0 for found in self.engines.values()):
                advice = "No engine fits: the GPUs have room, but a node's main memory (--host-memory) is too small."
        else:
            engine = ENGINES[self.recommended]
            file = f", with {self.config_file}" if self.config_file else ""
            setting = f" and `{engine.setting}`" if engine.setting else ""
            advice = f"Recommended: {engine.title}{file}{setting}."
        pace, flop = self.pace, flop_per_token(self.workload, lora=False)
        lasting = (
            f"Hours: estimated, for {pace.tokens / 1e9:.3g} billion tokens of data (--tokens), at {flop:.1f} "
            f"operations per parameter and token, {UTILISATION:.0%} of {pace.device_tflops:g} TFLOP/s per GPU "
            "(--device-tflops)."
        )
        notes = [advice, lasting, ASSUMED]
        if not self.sizes.vocabulary:
            notes.append("A model without an output matrix writes no text: it has no replay, and no teacher.")
        if self.workload.healing:
            healed = [ENGINES[name].title for name in self.engines if ENGINES[name].heals]
            notes.insert(
                2,
                f"Healing is counted where matrices are whole: {' and '.join(healed)} (--healing off: without). Under "
                "FSDP2 and DeepSpeed, matrices for which the main process's GPU has no room aren't healed.",
            )
        return notes


def plan_memory(
    source: str | PretrainedConfig,
    workload: Workload,
    cluster: Cluster,
    trust_remote_code: bool = False,
    name: str = "",
    pace: TokenPace | None = None,
) -> MemoryPlan:
    """Estimate a model's training from its config alone, under every engine that makes sense on the cluster.

    A classifier, which writes no text, is estimated without replay and a teacher.

    Args:
        pace: by default a billion tokens on H100s.

    Raises:
        HessoError: where no config is found, or it doesn't give the sizes.

    Example:
        >>> from transformers import LlamaConfig
        >>> plan_memory(LlamaConfig(), Workload(), Cluster(8, 80e9)).recommended
        'fsdp2'
    """
    config = load_config(source, trust_remote_code)
    sizes, pace = model_sizes(config, trust_remote_code), pace or TokenPace()
    if not sizes.vocabulary:
        workload = replace(workload, distillation=False, replay_share=0.0)
    runs = {
        name: EstimatedRun(sizes, engine, workload, cluster)
        for name, engine in ENGINES.items()
        if cluster.num_gpus > 1 or engine.offload or not engine.sharded  # one GPU alone has nothing to share
    }
    engines = {name: estimate(run) for name, run in runs.items()}
    lasting = {name: hours(run, pace) for name, run in runs.items()}
    return MemoryPlan(name or str(config.model_type), sizes, workload, cluster, engines, pace, lasting)


def _hours(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _gb(value: float) -> str:
    return f"{value / GB:.1f}" if round(abs(value) / GB, 1) or not value else "<0.1"
