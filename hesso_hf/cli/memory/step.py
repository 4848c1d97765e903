"""What comes and goes within a training step on one GPU, and so which of its moments is the peak. Bytes.

Activations are those of a decoder with pre-norms under a fused attention, which stores no T x T scores.
Legend: B batch, T tokens, M = B T, L layers, D hidden size, Q and K width of all query and key-value heads, H heads,
I MLP width that a token passes (with experts: of those it is routed to), V vocabulary, N parameters, G GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .engines import Engine
from .resident import compute_bytes, residents, trained_parameters
from .workload import Parts, Workload

if TYPE_CHECKING:
    from .model_sizes import ModelSizes

DEEPSPEED_LIVE = 1e9  # elements: the default of `stage3_max_live_parameters` and `sub_group_size`


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
            saved += compute_bytes(self.workload) * self.sizes.linear_inputs
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
            parameters = parameters / self.sizes.parameters * trained_parameters(self.sizes, self.engine, self.workload)
        if self.engine.offload == "all":
            return 0.0
        each = compute_bytes(self.workload) if self.engine.deepspeed else 4
        return each * parameters / self.engine.ranks("gradients", self.num_gpus)

    def held(self, gradients: float) -> float:
        """Return gradients made so far, or all where earlier micro-batches have left theirs."""
        return self.gradients(self.sizes.parameters) if self.workload.accumulates else gradients

    def gathered(self, backward: bool) -> float:
        """Return whole layers that a sharded engine holds: this one and the next, in the backward pass also gradients.

        FSDP2 keeps the output matrix from the loss to the backward pass; ZeRO-3 keeps what was used up to a limit.
        """
        compute, sizes = compute_bytes(self.workload), self.sizes
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


def _add(one: Parts, other: Parts) -> Parts:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}
