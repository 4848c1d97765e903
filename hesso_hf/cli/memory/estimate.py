"""How much memory a training run takes, by engine, from a config alone: pure functions, nothing is allocated.

The peak of one GPU is the largest of three moments of a step, the loss (`forward`), the backward pass, the optimizer's
step; and of `healing`, in the steps that begin a pruning period. What lies in memory at each is what stays from step to
step and what comes and goes; the sources of each term are named with it. Activations are those of a decoder with
pre-norms under a fused attention, which stores no T x T scores. Bytes throughout.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...pruning.fisher import TOKENS
from ...pruning.healing import enough_tokens
from ...pruning.token_rows import CHUNK
from ...pruning.windows import LONGEST
from ...trainer.teacher import CHUNK_LOGITS
from .workload import COMPONENTS, GB, Cluster, EngineSpec, Parts, Sharded, Workload

if TYPE_CHECKING:
    from .model_sizes import ModelSizes

HESSO = 0.005  # of the weights: scores and scales, measured by benchmarks/overhead.py
DEEPSPEED_BUCKET = 5e8  # elements: the default of DeepSpeed's `reduce_bucket_size`
DEEPSPEED_LIVE = 1e9  # elements: the default of `stage3_max_live_parameters` and `sub_group_size`
PROCESS = 4 * GB  # host memory of a process before any weight: Python, CUDA and NCCL (assumed)
MAX_BATCH = 4096
TAUGHT = 4  # bytes a logit that is learnt: its gradient (trainer/divergence.py)
TAUGHT_CHUNK = 5 * 4 * CHUNK_LOGITS  # the teacher's logits, both log-softmaxes, the divergence, the difference
SUM_BYTES = 4  # of a number of what healing sums up (pruning/refit.py), on a GPU
TRIAL = 5 / 36  # of a matrix (C, C): what stands in for a sixth of its columns, of half of them in three periods


@dataclass(frozen=True)
class EstimatedRun:
    """A model's training under one engine, and what lies in the memory of one of its GPUs when."""

    sizes: ModelSizes
    engine: EngineSpec
    workload: Workload
    cluster: Cluster

    @property
    def trained(self) -> float:
        """Parameters that are trained: all, or LoRA's two thin matrices beside each matrix of the layers."""
        return float(self.workload.lora_rank * self.sizes.lora_width if self.engine.lora else self.sizes.parameters)

    @property
    def kind(self) -> str:
        """How layers compute: in fp32, in bf16, or under autocast, which copies whole fp32 weights, as DDP has them."""
        if self.workload.dtype == "float32":
            return "float32"
        engine = self.engine
        return "bfloat16" if engine.deepspeed or engine.shards_parameters or engine.lora else "autocast"

    @property
    def optimizer_state(self) -> float:
        """Bytes of the optimizer state of all ranks together.

        AdamW: two fp32 moments. 8-bit AdamW (bitsandbytes): two bytes and two fp32 scales per 256 elements, embeddings
        in 32 bits as the Trainer sets it. Adafactor: a row and a column of squares a matrix; whole under DeepSpeed,
        which flattens.
        """
        sizes, engine = self.sizes, self.engine
        if self.workload.optimizer == "adamw":
            return 8 * self.trained
        if self.workload.optimizer == "adamw_8bit":
            wide = 0 if engine.lora else sizes.embedding_parameters
            return 8 * wide + (2 + 8 / 256) * (self.trained - wide)
        if self.workload.optimizer == "adafactor":
            return 4 * (self.trained if engine.deepspeed or engine.lora else sizes.factored)
        return 0.0

    def ranks(self, what: Sharded) -> int:
        """Return over how many GPUs something is spread."""
        return self.cluster.num_gpus if what in self.engine.sharded else 1

    def residents(self) -> Parts:
        """Return what stays from step to step: weights, optimizer state, snapshot, teacher, buffers.

        Sources: accelerate's `fsdp2_prepare_model` (fp32 masters, sharded); DeepSpeed's `stage_1_and_2.py` and
        `stage3.py` (a low-precision model, an fp32 partition, `reduce_bucket_size` elements of a gradient buffer, two
        of them where communication overlaps, as in stage 3); torch's DDP `Reducer` (buckets as large as the gradients,
        since `gradient_as_bucket_view` is off).
        """
        sizes, engine, ranks = self.sizes, self.engine, self.ranks("optimizer")
        parts = {
            "parameters": 0.0 if engine.offload else 4 * self.trained / ranks,
            "optimizer": 0.0 if engine.offload else self.optimizer_state / ranks,
            "buffers": HESSO * 4 * self.trained / ranks,
        }
        if engine.lora:
            parts["parameters"] += self.workload.width * sizes.parameters
        if engine.deepspeed:
            parts["parameters"] += self.workload.width * sizes.parameters / self.ranks("parameters")
            parts["buffers"] += self.workload.width * DEEPSPEED_BUCKET * (2 if engine.shards_parameters else 1)
        elif not engine.shards_parameters and self.cluster.num_gpus > 1:
            parts["buffers"] += 4 * self.trained
        if self.workload.cric == "device":
            parts["snapshot"] = (4 * self.trained + self.optimizer_state) / ranks
        if self.workload.distillation or self.workload.replay_share:  # under LoRA too: its base is pruned as well
            parts["teacher"] = 2 * sizes.parameters / self.ranks("parameters")
        return parts

    def moments(self) -> dict[str, Parts]:
        """Return what lies in memory at each moment of a step that may be the peak, every one of COMPONENTS.

        The backward pass frees a layer's activations where it makes its gradients, so its highest point is at one of
        its ends: the loss, the last layer (all activations) or the first (nearly all gradients).
        """
        sizes, checkpointed = self.sizes, self.workload.gradient_checkpointing
        copies = 2 if self.workload.dtype == "float32" else 2.5
        before_first = sizes.parameters - sizes.layer_parameters - sizes.untied_embedding
        flows = {
            # logits, in fp32 too, and their log-softmax, beside all of autocast's copies
            "forward": self._at_loss(copies * 4, sizes.matrix_parameters),
            # log-softmax, the loss' gradient and the log-softmax's in fp32; of the copies those that autograd has saved
            "backward, loss": self._at_loss(12, sizes.head_parameters if checkpointed else sizes.matrix_parameters),
            "backward, last layer": self._backward(sizes.layers, sizes.head_parameters),
            "backward, first layer": self._backward(1, before_first),
            "step": self._step(),
        }
        if self.workload.healing and self.engine.heals:
            flows["healing"] = {"gradients": self._gradients(sizes.parameters), "healing": self._healing()}
        resident = self.residents()
        return {
            name: {part: resident.get(part, 0.0) + flow.get(part, 0.0) for part in COMPONENTS}
            for name, flow in flows.items()
        }

    def _layer(self) -> float:
        """Return what one layer saves; LoRA's adapters save the inputs of their matrices once more."""
        saved = saved_per_token(self.sizes, self.kind)
        if self.engine.lora:
            saved += self.workload.width * self.sizes.linear_inputs
        return self.workload.tokens * saved

    def _stored(self, layers: int) -> float:
        """Return what layers save together; of a checkpointed one only its input is kept."""
        if not self.workload.gradient_checkpointing:
            return layers * self._layer()
        return layers * self.workload.tokens * self.sizes.hidden * (2 if self.kind == "bfloat16" else 4)

    def _casts(self, parameters: float) -> float:
        """Return bf16 copies that autocast makes of fp32 weights, and keeps for the backward pass."""
        return 2.0 * parameters if self.kind == "autocast" else 0.0

    def _gradients(self, parameters: float) -> float:
        """Return the gradients of so many parameters as they wait for the step; of all where micro-batches add up."""
        if self.engine.offload == "all":
            return 0.0
        if self.workload.accumulates:  # earlier micro-batches have left theirs
            parameters = self.sizes.parameters
        if self.engine.lora:
            parameters = parameters / self.sizes.parameters * self.trained
        return (self.workload.width if self.engine.deepspeed else 4) * parameters / self.ranks("gradients")

    def _gathered(self, backward: bool) -> float:
        """Return whole layers that a sharded engine holds: this one and the next, in the backward pass also gradients.

        FSDP2 keeps the output matrix from the loss to the backward pass; ZeRO-3 keeps what was used up to a limit.
        """
        sizes, engine = self.sizes, self.engine
        if not engine.shards_parameters or (self.cluster.num_gpus == 1 and not engine.offload):
            return self.workload.width * sizes.layer_parameters if engine.deepspeed and backward else 0.0
        layers = self.workload.width * sizes.layer_parameters * (4 if backward else 2)
        if engine.deepspeed:
            return max(layers, min(self.workload.width * DEEPSPEED_LIVE, self.workload.width * sizes.parameters))
        return layers + self.workload.width * sizes.head_parameters

    def _at_loss(self, logits: float, cast_parameters: int) -> Parts:
        """The end of the forward or the start of the backward pass, with so many bytes a logit."""
        final = {"autocast": 10, "bfloat16": 8, "float32": 12}[self.kind]
        # with a teacher the gradient for the student's logits, which is made a chunk of the teacher's at a time
        taught = 1.0 if self.workload.distillation else self.workload.replay_share
        logits += TAUGHT * taught
        return {
            "activations": self._stored(self.sizes.layers) + self.workload.tokens * self.sizes.hidden * final,
            "logits": float(self.workload.tokens * self.sizes.vocabulary * logits + TAUGHT_CHUNK * bool(taught)),
            "buffers": self._casts(cast_parameters) + self._gathered(backward=False),
            "gradients": self._gradients(0),
        }

    def _backward(self, layers: int, parameters: int) -> Parts:
        """The backward pass of the `layers`-th layer: those below are stored, so many parameters have gradients."""
        sizes, checkpointed = self.sizes, self.workload.gradient_checkpointing
        # the MLP's gradients on their way
        own = self.workload.tokens * self.workload.width * sizes.mlp_width * (3 if sizes.gated else 2)
        casts = self._casts(sizes.layer_matrices * (1 if checkpointed else layers))
        return {
            "activations": self._stored(layers) + own + (self._layer() if checkpointed else 0.0),
            "buffers": casts + self._gathered(backward=True),
            "gradients": self._gradients(parameters),
        }

    def _step(self) -> Parts:
        """Fused AdamW and SGD work in place, Adafactor makes its update, DeepSpeed gradients in fp32."""
        engine, ranks = self.engine, self.ranks("optimizer")
        parts = {"gradients": self._gradients(self.sizes.parameters)}
        if engine.deepspeed and not engine.offload and self.workload.dtype != "float32":
            share = self.sizes.parameters / ranks
            parts["gradients"] += 4 * (min(share, DEEPSPEED_LIVE) if engine.shards_parameters else share)
        if self.workload.optimizer == "adafactor" and not engine.offload:
            parts["buffers"] = 12.0 * self.sizes.largest_matrix / ranks
        return parts

    def _healing(self) -> float:
        """Return what healing takes beside what training holds (pruning/healing.py, pruning/fisher.py).

        First the gradients behind its matrices, one window at a time, not checkpointed; of TOKENS tokens they stay.
        Then one forward pass of `healing_tokens`, with replay twice as many. A gated MLP takes three copies of what its
        last matrix (O, C) reads, which then looks at one, CHUNK tokens at a time, in three matrices (C, C) and one
        (O, C) of sums; after that it takes two and one matrix (C, C), to pass on what is healed.
        CRIC looks and judges twice: what stands in for the units on trial, TRIAL of (C, C) a layer, is made in the
        first pass, read in the second look, and gone after it. The counts are those of the allocations.
        """
        sizes, length, width = self.sizes, min(self.workload.sequence_length, LONGEST), self.sizes.widest_input
        kept = 4 * TOKENS * sizes.hidden * 2 * sizes.layers
        gradients = length * (sizes.layers * saved_per_token(sizes, self.kind) + 16 * sizes.vocabulary)
        asked = self.workload.healing_tokens or enough_tokens(width)
        tokens = max(asked, 16 * length) + bool(self.workload.replay_share) * asked
        read, chunk = 4 * tokens * width, 2 * 4 * min(CHUNK, tokens) * width
        sums = SUM_BYTES * width * (3 * width + sizes.hidden)
        refit = max(3 * read, read + sums + chunk, 2 * read + SUM_BYTES * width**2 + chunk)
        refit += 4 * 4 * tokens * sizes.hidden
        stand_in = 4 * TRIAL * width**2
        first = kept + (sizes.layers - 1) * stand_in + refit
        return max(first, 2 * kept + sizes.layers * stand_in + gradients, 2 * kept + refit)


def saved_per_token(sizes: ModelSizes, kind: str) -> float:
    """Return the bytes that one layer saves a token for its backward pass.

    Read off the operations of a Llama layer and compared with a count of the allocations (benchmarks/memory.py).
    `autocast` (fp32 weights and residual stream, bf16 products): each norm saves its input and its normalised input
    (4 D + 4 D), and each matrix its input cast to bf16, once for each of its readers. `bfloat16` (bf16 weights): a norm
    saves its input in fp32, its normalised input and its result, which the matrices share. In both, attention saves
    queries, keys, values and output, and a gated MLP four tensors of its width (gate, its activation, up, product), a
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


def estimate(run: EstimatedRun) -> Estimate:
    """Estimate what a run needs."""
    moments, host, cluster = run.moments(), host_bytes(run), run.cluster
    highest = max(moments, key=lambda name: sum(moments[name].values()))
    margin = cluster.usable - sum(moments[highest].values())
    host_fits = cluster.host_memory is None or host <= cluster.host_memory
    largest = largest_batch(run) if host_fits else 0
    return Estimate(run.engine.name, highest.partition(",")[0], moments[highest], host, margin, host_fits, largest)


def largest_batch(run: EstimatedRun) -> int:
    """Return the largest micro-batch whose peak fits, by bisection: the peak grows with it."""

    def is_too_large(batch: int) -> bool:
        moments = replace(run, workload=replace(run.workload, batch_size=batch)).moments()
        return any(sum(parts.values()) > run.cluster.usable for parts in moments.values())

    return bisect_left(range(1, MAX_BATCH + 1), True, key=is_too_large)


def host_bytes(run: EstimatedRun) -> float:
    """Return the main memory of one node: while loading, or while training, whichever is more.

    Every rank loads the model on its own, in fp32 (LoRA: in the computation's dtype), except under engines that shard
    the parameters, where one does. CRIC's snapshot and offloaded masters, state and gradients are this node's share.
    """
    ranks = run.cluster.ranks_per_node
    loading = (run.workload.width if run.engine.lora else 4) * run.sizes.parameters
    loading *= 1 if run.engine.shards_parameters else ranks
    share = ranks / run.ranks("optimizer")
    training = 0.0
    if run.workload.cric == "cpu":
        training += (4 * run.trained + run.optimizer_state) * share
    if run.engine.offload:
        training += (8 * run.trained + run.optimizer_state) * share
    return max(loading, training) + ranks * PROCESS
