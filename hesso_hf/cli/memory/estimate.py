"""How much memory a training run takes, by engine, from a config alone: pure functions, nothing is allocated.

The peak of one GPU is the largest of three moments of a step: the loss (`forward`), the backward pass, the optimizer's
step. What lies in memory at each is summed from the terms below; the sources of each are named with it. Bytes
throughout; activations are those of a decoder with pre-norms under a fused attention, which stores no T x T scores.
Legend: B batch, T tokens, M = B T, L layers, D hidden size, Q and K width of all query and key-value heads, H heads,
I MLP width that a token passes (with experts: of those it is routed to), V vocabulary, N parameters, G GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...errors import HessoError
from .engines import ENGINES, Engine
from .model_sizes import ModelSizes

GB = 1e9
HEADROOM = 0.08  # of a GPU: CUDA's context, NCCL's buffers, and what the caching allocator can't use
PROCESS = 4 * GB  # host memory of a process before any weight: Python, CUDA and NCCL (assumed)
HESSO = 0.005  # of the weights: scores and scales, measured by benchmarks/overhead.py
DEEPSPEED_BUCKET = 5e8  # elements: the default of DeepSpeed's `reduce_bucket_size`
DEEPSPEED_LIVE = 1e9  # elements: the default of `stage3_max_live_parameters` and `sub_group_size`
MAX_BATCH = 4096

OptimizerName = Literal["adamw", "adamw_8bit", "adafactor", "sgd"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "adamw_8bit", "adafactor", "sgd")
DTYPES = ("bfloat16", "float32")
COMPONENTS = (
    "parameters", "gradients", "optimizer", "snapshot", "teacher", "activations", "logits", "buffers",
)  # fmt: skip
Parts = dict[str, float]


@dataclass(frozen=True)
class Workload:
    """What is trained how, apart from the engine.

    Attributes:
        dtype: that of the computation; the trained weights (LoRA's base aside) are fp32 masters in any case.
        accumulates: whether gradients of an earlier micro-batch lie in memory during the forward pass.
        cric: none, or where CRIC's snapshot of weights and optimizer state is kept.
        distillation: whether a teacher, the original model in bf16, runs beside it.
    """

    batch_size: int = 1
    sequence_length: int = 2048
    gradient_checkpointing: bool = False
    dtype: str = "bfloat16"
    optimizer: OptimizerName = "adamw"
    accumulates: bool = False
    cric: Literal["none", "cpu", "device"] = "none"
    distillation: bool = False
    lora_rank: int = 16

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "lora_rank"):
            if getattr(self, name) < 1:
                raise HessoError(f"`{name}` ({getattr(self, name)}) must be at least 1")
        for name, allowed in (("dtype", DTYPES), ("optimizer", OPTIMIZERS), ("cric", ("none", "cpu", "device"))):
            if getattr(self, name) not in allowed:
                raise HessoError(f"`{name}` ({getattr(self, name)!r}) must be one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Cluster:
    """GPUs, their memory (bytes), how many one node has, and its main memory (bytes; None: as much as is needed)."""

    num_gpus: int
    gpu_memory: float
    gpus_per_node: int = 8
    host_memory: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_gpus", "gpu_memory", "gpus_per_node"):
            if getattr(self, name) <= 0:
                raise HessoError(f"`{name}` ({getattr(self, name)}) must be above zero")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise HessoError(
                f"`num_gpus` ({self.num_gpus}) must be a multiple of gpus_per_node ({self.gpus_per_node}), or fit one"
            )

    @property
    def ranks_per_node(self) -> int:
        return min(self.num_gpus, self.gpus_per_node)

    @property
    def usable(self) -> float:
        """Bytes of one GPU that tensors can take."""
        return self.gpu_memory * (1 - HEADROOM)


@dataclass(frozen=True)
class Estimate:
    """What one engine needs.

    Attributes:
        phase: the moment of the step with the highest sum.
        parts: bytes of each of COMPONENTS at that moment; they add up to `peak`.
        host: bytes of one node's main memory.
        margin: usable bytes that are left on a GPU; negative where it doesn't fit.
        host_fits: whether a node's main memory is enough.
        max_batch_size: largest micro-batch that fits, 0 where none does.
    """

    engine: str
    phase: str
    parts: Parts
    host: float
    margin: float
    host_fits: bool
    max_batch_size: int

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.margin >= 0 and self.host_fits

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "engine": self.engine,
            "fits": self.fits,
            "phase": self.phase,
            "peak_bytes": round(self.peak),
            "parts": {name: round(value) for name, value in self.parts.items()},
            "host_bytes_per_node": round(self.host),
            "margin_bytes": round(self.margin),
            "max_batch_size": self.max_batch_size,
        }


def estimate(sizes: ModelSizes, engine: Engine, workload: Workload, cluster: Cluster) -> Estimate:
    """Estimate what a run needs under one engine."""
    phase, parts = peak_of(phases(sizes, engine, workload, cluster.num_gpus))
    host = host_memory(sizes, engine, workload, cluster)
    margin = cluster.usable - sum(parts.values())
    host_fits = cluster.host_memory is None or host <= cluster.host_memory
    largest = largest_batch(sizes, engine, workload, cluster) if host_fits else 0
    return Estimate(engine.name, phase, parts, host, margin, host_fits, largest)


def estimates(sizes: ModelSizes, workload: Workload, cluster: Cluster) -> dict[str, Estimate]:
    """Estimate every engine that makes sense on the cluster, in the order of `ENGINES`."""
    engines = [engine for engine in ENGINES if cluster.num_gpus > 1 or not engine.needs_several]
    return {engine.name: estimate(sizes, engine, workload, cluster) for engine in engines}


def recommended(found: Mapping[str, Estimate]) -> str | None:
    """Return the first engine that fits, None where none does."""
    return next((name for name, item in found.items() if item.fits), None)


def largest_batch(sizes: ModelSizes, engine: Engine, workload: Workload, cluster: Cluster) -> int:
    """Return the largest micro-batch whose peak fits, by bisection: the peak grows with it."""

    def fits(batch: int) -> bool:
        _, parts = peak_of(phases(sizes, engine, replace(workload, batch_size=batch), cluster.num_gpus))
        return sum(parts.values()) <= cluster.usable

    low, high = 0, MAX_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def peak_of(moments: Mapping[str, Parts]) -> tuple[str, Parts]:
    """Return the moment with the highest sum, with a zero for what isn't there."""
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    return name.partition(",")[0], {part: moments[name].get(part, 0.0) for part in COMPONENTS}


def phases(sizes: ModelSizes, engine: Engine, workload: Workload, num_gpus: int) -> dict[str, Parts]:
    """Return what lies in one GPU's memory at each moment of a step that may be the peak.

    The backward pass frees a layer's activations where it makes its gradients, so its highest point is at one of its
    ends: the loss, the last layer (all activations) or the first (nearly all gradients).
    """
    resident = residents(sizes, engine, workload, num_gpus)
    flow = _Flow(sizes, engine, workload, num_gpus)
    found = {
        "forward": flow.forward(),
        "backward, loss": flow.loss_backward(),
        "backward, last layer": flow.backward(sizes.layers, flow.gradients(sizes.head_parameters)),
        "backward, first layer": flow.backward(
            1, flow.gradients(sizes.parameters - sizes.layer_parameters - sizes.untied_embedding)
        ),
        "step": flow.step(),
    }
    return {name: _add(resident, parts) for name, parts in found.items()}


def residents(sizes: ModelSizes, engine: Engine, workload: Workload, num_gpus: int) -> Parts:
    """Return what stays in one GPU's memory from step to step.

    Sources: accelerate's `fsdp2_prepare_model` (fp32 masters, sharded); DeepSpeed's `stage_1_and_2.py` and `stage3.py`
    (a low-precision model, an fp32 partition, `reduce_bucket_size` elements of a gradient buffer, two of them where
    communication overlaps, as in stage 3); torch's DDP `Reducer` (buckets as large as the gradients, since
    `gradient_as_bucket_view` is off).
    """
    trained, compute = _trained(sizes, engine, workload), _compute_bytes(workload)
    masters = 0.0 if engine.offload else 4 * trained / engine.ranks("optimizer", num_gpus)
    state = 0.0 if engine.offload else state_bytes(sizes, engine, workload) / engine.ranks("optimizer", num_gpus)
    parts = {
        "parameters": masters,
        "optimizer": state,
        "buffers": HESSO * 4 * trained / engine.ranks("optimizer", num_gpus),
    }
    if engine.lora:
        parts["parameters"] += compute * sizes.parameters
    if engine.deepspeed:
        parts["parameters"] += compute * sizes.parameters / engine.ranks("parameters", num_gpus)
        parts["buffers"] += compute * DEEPSPEED_BUCKET * (2 if engine.shards_parameters else 1)
    elif not engine.shards_parameters and num_gpus > 1:
        parts["buffers"] += 4 * trained
    if workload.cric == "device":
        parts["snapshot"] = (4 * trained + state_bytes(sizes, engine, workload)) / engine.ranks("optimizer", num_gpus)
    if workload.distillation:  # under LoRA too: its base is pruned as well
        parts["teacher"] = 2 * sizes.parameters / engine.ranks("parameters", num_gpus)
    return parts


def state_bytes(sizes: ModelSizes, engine: Engine, workload: Workload) -> float:
    """Return the optimizer state of all ranks together.

    AdamW: two fp32 moments. 8-bit AdamW (bitsandbytes): two bytes and two fp32 scales per 256 elements, embeddings in
    32 bits as the Trainer sets it. Adafactor: a row and a column of squares a matrix; whole under DeepSpeed, which
    flattens.
    """
    trained = _trained(sizes, engine, workload)
    if workload.optimizer == "adamw":
        return 8 * trained
    if workload.optimizer == "adamw_8bit":
        wide = 0 if engine.lora else sizes.embedding_parameters
        return 8 * wide + (2 + 8 / 256) * (trained - wide)
    if workload.optimizer == "adafactor":
        return 4 * (trained if engine.deepspeed or engine.lora else sizes.factored)
    return 0.0


def saved_per_token(sizes: ModelSizes, kind: str) -> float:
    """Return the bytes that one layer saves a token for its backward pass.

    Read off the operations of a Llama layer and compared with a count of the allocations (benchmarks/memory.py).
    `autocast` (fp32 weights and residual stream, bf16 products): each norm saves its input and its normalised input
    (4 D + 4 D), and each matrix its input cast to bf16, once for each of its readers. `bfloat16` (bf16 weights): a norm
    saves its input in fp32, its normalised input and its result, which the matrices share. In both, attention saves
    queries, keys, values and output, and a gated MLP four tensors of width I (gate, its activation, up, product), a
    plain one two. The last terms are the norms' scales and attention's log-sum-exps in fp32.
    """
    width = sizes.mlp_width * (4 if sizes.gated else 2)
    attention = 2 * (sizes.query_width + sizes.kv_width)
    scales = 8 + 4 * sizes.heads
    if kind == "autocast":
        readers = 3 + (2 if sizes.gated else 1)
        return (16 + 2 * readers) * sizes.hidden + 2 * (attention + width) + scales
    if kind == "bfloat16":
        return 16 * sizes.hidden + 2 * (attention + width) + scales
    return 24 * sizes.hidden + 4 * (attention + width) + scales


@dataclass(frozen=True)
class _Flow:
    """What comes and goes within a step, on one GPU."""

    sizes: ModelSizes
    engine: Engine
    workload: Workload
    num_gpus: int

    @property
    def kind(self) -> str:
        if self.workload.dtype == "float32":
            return "float32"
        return "autocast" if self.engine.casts else "bfloat16"

    @property
    def tokens(self) -> int:
        return self.workload.batch_size * self.workload.sequence_length

    def layer(self) -> float:
        """Return what one layer saves; LoRA's adapters save the inputs of their matrices once more."""
        saved = saved_per_token(self.sizes, self.kind)
        if self.engine.lora:
            saved += _compute_bytes(self.workload) * self.sizes.linear_inputs
        return self.tokens * saved

    def boundary(self) -> float:
        """Return the input of one layer, all that a checkpointed one keeps."""
        return self.tokens * self.sizes.hidden * (2 if self.kind == "bfloat16" else 4)

    def stored(self, layers: int) -> float:
        if not self.workload.gradient_checkpointing:
            return layers * self.layer()
        return layers * self.boundary()

    def casts(self, parameters: float) -> float:
        """Return bf16 copies that autocast makes of fp32 weights, and keeps for the backward pass."""
        return 2.0 * parameters if self.kind == "autocast" else 0.0

    def gradients(self, parameters: float) -> float:
        """Return the gradients of so many parameters in the form in which they wait for the step."""
        if self.engine.lora:
            parameters = parameters / self.sizes.parameters * _trained(self.sizes, self.engine, self.workload)
        if self.engine.offload == "all":
            return 0.0
        each = _compute_bytes(self.workload) if self.engine.deepspeed else 4
        return each * parameters / self.engine.ranks("gradients", self.num_gpus)

    def held(self, gradients: float) -> float:
        """Return gradients made so far, or all where earlier micro-batches have left theirs."""
        return self.gradients(self.sizes.parameters) if self.workload.accumulates else gradients

    def gathered(self, backward: bool) -> float:
        """Return whole layers that a sharded engine holds: this one and the next, in the backward pass also gradients.

        FSDP2 keeps the output matrix from the loss to the backward pass; ZeRO-3 keeps what was used up to a limit.
        """
        compute, sizes = _compute_bytes(self.workload), self.sizes
        if not self.engine.shards_parameters or (self.num_gpus == 1 and not self.engine.offload):
            return compute * sizes.layer_parameters if self.engine.deepspeed and backward else 0.0
        layers = compute * sizes.layer_parameters * (4 if backward else 2)
        if self.engine.deepspeed:
            return max(layers, min(compute * DEEPSPEED_LIVE, compute * sizes.parameters))
        return layers + compute * sizes.head_parameters

    def forward(self) -> Parts:
        """The end of the forward pass, with all of autocast's copies: logits, in fp32 too, and their log-softmax."""
        copies = 2 if self.workload.dtype == "float32" else 2.5
        return self._at_loss(copies * 4, self.casts(self.sizes.matrix_parameters))

    def loss_backward(self) -> Parts:
        """The start of the backward pass: the log-softmax, the loss' gradient and the log-softmax's, in fp32.

        Autocast's copies go with the end of the forward pass, but for those that autograd has saved.
        """
        checkpointed = self.workload.gradient_checkpointing
        return self._at_loss(
            12, self.casts(self.sizes.head_parameters if checkpointed else self.sizes.matrix_parameters)
        )

    def _at_loss(self, logits: float, casts: float) -> Parts:
        final = {"autocast": 10, "bfloat16": 8, "float32": 12}[self.kind]
        if self.workload.distillation:  # the teacher's logits, both log-softmaxes in fp32 and the divergence
            logits += 14
        return {
            "activations": self.stored(self.sizes.layers) + self.tokens * self.sizes.hidden * final,
            "logits": float(self.tokens * self.sizes.vocabulary * logits),
            "buffers": casts + self.gathered(backward=False),
            "gradients": self.held(0.0),
        }

    def backward(self, layers: int, gradients: float) -> Parts:
        """The backward pass of the `layers`-th layer: those below are stored, its own gradients are on their way."""
        width = 2 if self.workload.dtype == "bfloat16" else 4
        own = self.tokens * width * self.sizes.mlp_width * (3 if self.sizes.gated else 2)
        casts = self.casts(self.sizes.layer_matrices * (1 if self.workload.gradient_checkpointing else layers))
        activations = self.stored(layers) + own
        if self.workload.gradient_checkpointing:
            activations += self.layer()
        buffers = casts + self.gathered(backward=True)
        return {"activations": activations, "buffers": buffers, "gradients": self.held(gradients)}

    def step(self) -> Parts:
        """The step: fused AdamW and SGD work in place, Adafactor makes its update; DeepSpeed gradients in fp32."""
        parts = {"gradients": self.gradients(self.sizes.parameters)}
        if self.engine.deepspeed and not self.engine.offload and self.workload.dtype != "float32":
            share = self.sizes.parameters / self.engine.ranks("optimizer", self.num_gpus)
            parts["gradients"] += 4 * (min(share, DEEPSPEED_LIVE) if self.engine.shards_parameters else share)
        if self.workload.optimizer == "adafactor" and not self.engine.offload:
            parts["buffers"] = 12.0 * self.sizes.largest_matrix / self.engine.ranks("optimizer", self.num_gpus)
        return parts


def host_memory(sizes: ModelSizes, engine: Engine, workload: Workload, cluster: Cluster) -> float:
    """Return the main memory of one node: while loading, or while training, whichever is more.

    Every rank loads the model on its own, in fp32 (LoRA: in the computation's dtype), except under engines that shard
    the parameters, where one does. CRIC's snapshot and offloaded masters, state and gradients are this node's share.
    """
    ranks = cluster.ranks_per_node
    trained, state = _trained(sizes, engine, workload), state_bytes(sizes, engine, workload)
    loading = (_compute_bytes(workload) if engine.lora else 4) * sizes.parameters
    loading *= 1 if engine.shards_parameters else ranks
    share = ranks / engine.ranks("optimizer", cluster.num_gpus)
    training = 0.0
    if workload.cric == "cpu":
        training += (4 * trained + state) * share
    if engine.offload:
        training += (8 * trained + state) * share
    return max(loading, training) + ranks * PROCESS


def _trained(sizes: ModelSizes, engine: Engine, workload: Workload) -> float:
    """Return the parameters that are trained: all, or LoRA's two thin matrices beside each matrix of the layers."""
    return float(workload.lora_rank * sizes.lora_width if engine.lora else sizes.parameters)


def _compute_bytes(workload: Workload) -> int:
    return 2 if workload.dtype == "bfloat16" else 4


def _add(one: Parts, other: Parts) -> Parts:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}
