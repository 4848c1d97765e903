"""What `hesso-hf plan` says for Llama 3 of 1B, 8B and 70B parameters: the table of docs/cluster.md.

    python benchmarks/plans.py

Nothing is measured here; benchmarks/memory.py compares the estimates with measurements.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from hesso_hf.cli.memory.plan import plan_memory
from hesso_hf.cli.memory.workload import GB, Cluster, Workload
from hesso_hf.config.names import AUTO_REPLAY_SHARE

RESULTS = Path(__file__).parent / "results" / "plans.json"
MODELS = {
    "Llama 3.2 1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "Llama 3.1 8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "Llama 3.1 70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
}  # fmt: skip
RUNS = (
    ("Llama 3.2 1B", 1), ("Llama 3.2 1B", 8), ("Llama 3.1 8B", 1), ("Llama 3.1 8B", 4), ("Llama 3.1 8B", 8),
    ("Llama 3.1 70B", 8), ("Llama 3.1 70B", 16), ("Llama 3.1 70B", 32),
)  # fmt: skip
WORKLOAD = Workload(
    batch_size=1, sequence_length=2048, gradient_checkpointing=True, accumulates=True, replay_share=AUTO_REPLAY_SHARE,
    distillation=True, healing=True,
)  # fmt: skip
GPU_MEMORY = 80 * GB


def plans() -> list[dict[str, Any]]:
    """Return the plans of all runs as JSON types."""
    found = []
    for name, num_gpus in RUNS:
        config = LlamaConfig(**MODELS[name])
        found.append(plan_memory(config, WORKLOAD, Cluster(num_gpus, GPU_MEMORY), name=name).to_dict())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output.write_text(json.dumps({"plans": plans()}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
