"""`hesso-hf plan`: which engine a training run fits in memory, from the config alone."""

from __future__ import annotations

import argparse
import json

from ..inputs import model_source
from ..memory.workload import DTYPES, GB, OPTIMIZERS, Cluster, Workload
from ..printing import print_table

HELP = "which engine a training run fits in memory, from the config alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("model", help="Hub id, folder or config.json")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="of one GPU (GB, 1e9 bytes)")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--host-memory", type=float, help="main memory of one node (GB); by default as much as is needed"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="examples in one GPU's micro-batch")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens in one example")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--gradient-accumulation", action="store_true", help="gradients stay between micro-batches")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the computation")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument(
        "--cric", nargs="?", choices=["cpu", "device"], const="cpu", help="with CRIC's snapshot kept there"
    )
    parser.add_argument("--distillation", action="store_true", help="with the original model in bf16 as teacher")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust-remote-code", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Estimate every engine, and print a table or JSON."""
    workload = Workload(
        arguments.batch_size, arguments.sequence_length, arguments.gradient_checkpointing, arguments.dtype,
        arguments.optimizer, arguments.gradient_accumulation, arguments.cric or "none", arguments.distillation,
        arguments.lora_rank,
    )  # fmt: skip
    host = None if arguments.host_memory is None else arguments.host_memory * GB
    cluster = Cluster(arguments.gpus, arguments.gpu_memory * GB, arguments.gpus_per_node, host)
    model = model_source(arguments.model)
    from ..memory import plan_memory

    found = plan_memory(model, workload, cluster, arguments.trust_remote_code, arguments.model)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    print_table(found.title(), found.header(), found.rows())
    print("\n".join(found.notes()))
    return 0
