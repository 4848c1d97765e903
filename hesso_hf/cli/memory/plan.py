"""`hesso-hf plan`: which engine a training run fits, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

from ...hf_models.build import load_config
from .estimate import Estimate, Run, estimate
from .model_sizes import ModelSizes, model_sizes
from .workload import COMPONENTS, ENGINES, GB, HEADROOM, Cluster, Workload

_SHORT = {"parameters": "params", "gradients": "grads", "optimizer": "optim.", "activations": "activ."}
ASSUMED = (
    "Weights are trained as fp32 masters, except LoRA's base; DeepSpeed holds a low-precision model beside them. A "
    f"GPU's peak is that of PyTorch's tensors at the named moment of a step; {HEADROOM:.0%} of its memory is left to "
    "CUDA, NCCL and the allocator. Fused attention, no padding; gradients of one micro-batch unless accumulated."
)


@dataclass(frozen=True)
class MemoryPlan:
    """The estimates of all engines for one model and run."""

    model: str
    sizes: ModelSizes
    workload: Workload
    cluster: Cluster
    engines: dict[str, Estimate]

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
            "engines": {name: found.to_dict() for name, found in self.engines.items()},
            "recommended": self.recommended,
            "accelerate_config": self.config_file,
        }

    def title(self) -> str:
        work, gpus = self.workload, f"{self.cluster.num_gpus} x {self.cluster.gpu_memory / GB:g} GB"
        return (
            f"{self.model}, {self.sizes.parameters:,} parameters, on {gpus}"
            f": micro-batches of {work.batch_size} x {work.sequence_length} tokens, {work.dtype}, {work.optimizer}"
            f"{', gradient checkpointing' * work.gradient_checkpointing}. Peak of one GPU in GB:"
        )

    def header(self) -> list[str]:
        shown = [_SHORT.get(part, part) for part in self._shown()]
        return ["engine", *shown, "peak", "at", "margin", "fits", "batch\nfits", "host\na node"]

    def rows(self) -> list[list[str]]:
        """Return a row an engine, in the order of `header`."""
        rows = []
        for name, found in self.engines.items():
            parts = [_gb(found.parts[part]) for part in self._shown()]
            rows.append([
                ENGINES[name].title, *parts, _gb(found.peak), found.phase, _gb(found.margin),
                "yes" if found.fits else "no", str(found.max_batch_size), _gb(found.host),
            ])  # fmt: skip
        return rows

    def _shown(self) -> list[str]:
        """Return the parts that any engine has."""
        return [part for part in COMPONENTS if any(found.parts[part] for found in self.engines.values())]

    def notes(self) -> list[str]:
        """Return what to say below the table."""
        if self.recommended is None:
            advice = "No engine fits: lower batch size or sequence length, checkpoint gradients, or take more GPUs."
        else:
            engine = ENGINES[self.recommended]
            file = f", with {self.config_file}" if self.config_file else ""
            setting = f" and `{engine.setting}`" if engine.setting else ""
            advice = f"Recommended: {engine.title}{file}{setting}."
        return [advice, ASSUMED]


def plan_memory(
    source: str | PretrainedConfig,
    workload: Workload,
    cluster: Cluster,
    trust_remote_code: bool = False,
    name: str = "",
) -> MemoryPlan:
    """Estimate a model's training from its config alone, under every engine that makes sense on the cluster.

    Raises:
        HessoError: where no config is found, or it doesn't give the sizes.

    Example:
        >>> from transformers import LlamaConfig
        >>> plan_memory(LlamaConfig(), Workload(), Cluster(8, 80e9)).recommended
        'fsdp2'
    """
    config = load_config(source, trust_remote_code)
    sizes = model_sizes(config)
    engines = {
        name: estimate(Run(sizes, engine, workload, cluster))
        for name, engine in ENGINES.items()
        if cluster.num_gpus > 1 or engine.offload or not engine.sharded  # one GPU alone has nothing to share
    }
    return MemoryPlan(name or str(config.model_type), sizes, workload, cluster, engines)


def _gb(value: float) -> str:
    return f"{value / GB:.1f}" if round(abs(value) / GB, 1) or not value else "<0.1"
