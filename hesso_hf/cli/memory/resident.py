"""What stays in one GPU's memory from step to step: weights, optimizer state, snapshot, teacher, buffers. Bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .engines import Engine
from .workload import Parts, Workload

if TYPE_CHECKING:
    from .model_sizes import ModelSizes

HESSO = 0.005  # of the weights: scores and scales, measured by benchmarks/overhead.py
DEEPSPEED_BUCKET = 5e8  # elements: the default of DeepSpeed's `reduce_bucket_size`


def residents(sizes: ModelSizes, engine: Engine, workload: Workload, num_gpus: int) -> Parts:
    """Return what stays in one GPU's memory from step to step.

    Sources: accelerate's `fsdp2_prepare_model` (fp32 masters, sharded); DeepSpeed's `stage_1_and_2.py` and `stage3.py`
    (a low-precision model, an fp32 partition, `reduce_bucket_size` elements of a gradient buffer, two of them where
    communication overlaps, as in stage 3); torch's DDP `Reducer` (buckets as large as the gradients, since
    `gradient_as_bucket_view` is off).
    """
    trained, compute = trained_parameters(sizes, engine, workload), compute_bytes(workload)
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
    trained = trained_parameters(sizes, engine, workload)
    if workload.optimizer == "adamw":
        return 8 * trained
    if workload.optimizer == "adamw_8bit":
        wide = 0 if engine.lora else sizes.embedding_parameters
        return 8 * wide + (2 + 8 / 256) * (trained - wide)
    if workload.optimizer == "adafactor":
        return 4 * (trained if engine.deepspeed or engine.lora else sizes.factored)
    return 0.0


def trained_parameters(sizes: ModelSizes, engine: Engine, workload: Workload) -> float:
    """Return the parameters that are trained: all, or LoRA's two thin matrices beside each matrix of the layers."""
    return float(workload.lora_rank * sizes.lora_width if engine.lora else sizes.parameters)


def compute_bytes(workload: Workload) -> int:
    """Return the width of the computation's dtype."""
    return 2 if workload.dtype == "bfloat16" else 4
