"""What HESSO costs where FSDP2 shards the parameters: its share of a step, and the peak of memory against plain AdamW.

    python benchmarks/sharding.py [--processes 2] [--scale 100m] [--device cuda]

The model of `overhead.py` is sharded with `fully_shard` over real processes (gloo on a CPU, NCCL on GPUs) and trained
twice from the start: with AdamW alone, and with HESSO around it through warm-up, scoring, shrinking and recovery.
Times are medians over steps of each kind within one run, of process 0, from where all processes are ready; memory is
the largest peak of any process, on a CPU of what the operating system counts for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from overhead import SCALES, Times, _now, _run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, LlamaForCausalLM

from hesso_hf.bundled import bundled_model_path
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "sharding.json"
STRUCTURES = ["attention_heads", "mlp_channels", "embedding_channels"]


def main() -> int:
    """Launch the processes, once without and once with HESSO, and write the JSON."""
    options = _options()
    if options.worker:
        work(options)
        return 0
    found = {kind: launch(options, kind) for kind in ("plain", "hesso")}
    entry = {
        "device": found["hesso"][0]["device"],
        "processes": options.processes,
        "parameters": found["hesso"][0]["parameters"],
        "tokens_per_step": options.batch_size * options.length * options.processes,
        "versions": versions(),
        "steps": found["hesso"][0]["steps"],
        "plain_step_seconds": found["plain"][0]["step_seconds"],
        "peak_bytes": {kind: max(rank["peak"] for rank in ranks) for kind, ranks in found.items()},
    }
    entry["peak_ratio"] = entry["peak_bytes"]["hesso"] / entry["peak_bytes"]["plain"]
    stored = json.loads(options.output.read_text()) if options.output.exists() else {}
    stored[f"{entry['device']} {options.scale}"] = entry
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


def launch(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """Run one of the two trainings in processes of its own, and return what each found."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={options.processes}", __file__, "--worker", kind, "--folder", folder]
        for name in ("device", "scale", "batch_size", "length", "repeats"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        # without the threshold the allocator keeps what FSDP2 lets go
        subprocess.run(command, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]


def work(options: argparse.Namespace) -> None:
    """Train in one of several processes."""
    cuda = options.device == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    memory = Memory(device)
    config = AutoConfig.from_pretrained(bundled_model_path())
    for name, value in SCALES[options.scale].items():
        setattr(config, name, value)
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config)
    mesh = init_device_mesh(options.device, (count,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = torch.randint(0, config.vocab_size, (options.batch_size, options.length), device=device)
    parameters = sum(p.numel() for p in model.parameters())
    memory.begin()
    times = Times()
    if options.worker == "hesso":
        _run(model, batch, STRUCTURES, options.repeats, _timed(device), times)
    else:
        _train_plainly(model, batch, 4 * options.repeats + 2, times)
    found = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "parameters": parameters,
        "steps": times.summary(),
        "step_seconds": times.summary().get("plain", {}).get("step_seconds"),
        "peak": memory.end(),
    }
    (Path(options.folder) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _train_plainly(model: LlamaForCausalLM, batch: torch.Tensor, steps: int, times: Times) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for step in range(steps):
        started = _now(batch.device)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        if step:
            times.add("plain", _now(batch.device) - started, 0.0)


def _timed(device: torch.device) -> Any:
    def timed(call: Any) -> float:
        dist.barrier()  # a process that is done first waits for the others in any training
        started = _now(device)
        call()
        return _now(device) - started

    return timed


class Memory:
    """The peak of what this process has on its device while it trains."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._peak, self._ended = device, 0, threading.Event()

    def begin(self) -> None:
        """Start to watch."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(0.005):
            self._peak = max(self._peak, process.memory_info().rss)

    def end(self) -> int:
        """Return the peak, bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        self._ended.set()
        self._thread.join()
        return self._peak


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--scale", default="100m", choices=list(SCALES))
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a process and step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each kind")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=["plain", "hesso"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
