"""Export a checkpoint that needn't fit the memory: seconds and memory, beside copying its file.

    python benchmarks/export_scale.py [--layers 28] [--folder /tmp]

The checkpoint is of Llama 3.2 3B's sizes in bf16, with random weights, and layers as asked for; a share of the MLP's
channels, of the heads and of the hidden state's channels is at zero. It is exported in a process of its own, which is
watched: `anonymous` memory is what the process allocates, while the `high-water` mark of its resident memory counts
pages of the checkpoint's files too, which the system takes back at any time. The file is copied and forced to the disk
before the export and after it. What is written is forced to the disk too. Everything is deleted afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hesso_hf import export_pruned
from hesso_hf.config.files import STATE_NAME
from hesso_hf.export.report import versions
from hesso_hf.export.weight_files import WeightFiles, stored_shapes, write_configs
from hesso_hf.hf_models.build import build_meta
from hesso_hf.structures.cut import zero_axis_
from hesso_hf.structures.groups import KeptUnits
from hesso_hf.structures.proof.prove import proved_groups

RESULTS = Path(__file__).parent / "results" / "export_scale.json"
KEPT = {"attention_heads": 7 / 8, "mlp_channels": 3 / 4, "embedding_channels": 7 / 8}
SIZES: dict[str, Any] = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


def write_checkpoint(folder: Path, config: LlamaConfig) -> dict[str, int]:
    """Write a checkpoint with units at zero, one tensor in memory at a time; return what there is to know of it."""
    model = build_meta(LlamaForCausalLM, config)
    groups = proved_groups(LlamaForCausalLM, config, tuple(KEPT))[0]
    structures = groups.structures
    counts = {name: int(structures[name].num_units * share) for name, share in KEPT.items()}
    generator = torch.Generator().manual_seed(0)
    kept = {
        name: tuple(
            tuple(torch.randperm(structures[name].num_units, generator=generator)[:count].sort().values.tolist())
            for _ in structures[name].layers
        )
        for name, count in counts.items()
    }
    decision = KeptUnits({name: structures[name].num_units for name in kept}, kept)
    noise, axes = torch.randn(2**22 + 1, generator=generator).bfloat16(), groups.by_parameter()
    shapes = stored_shapes(model, torch.bfloat16)
    files = WeightFiles(folder, shapes, "50GB")
    for name, shape in shapes.items():
        repeats = -(-shape.numel() // len(noise))
        tensor = noise.repeat(repeats)[: shape.numel()].view(shape.shape) * shape.shape[-1] ** -0.5
        for structure, layer, axis in axes[name]:
            zero_axis_(tensor, axis, kept[structure][layer], structures[structure].num_units)
        files.write(name, [tensor])
    files.finish()
    write_configs(model, folder, torch.bfloat16)
    state = {"finished": True, "kept_units": decision.to_dict(), "training": {}}
    (folder / STATE_NAME).write_text(json.dumps(state))
    sizes = [shape.nbytes for shape in shapes.values()]
    return {"parameters": model.num_parameters(), "bytes": sum(sizes), "largest_tensor": max(sizes)}


def memory() -> dict[str, int]:
    """Return this process' memory (bytes): anonymous, of mapped files, and the most that was resident so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {"anonymous": found["RssAnon"], "files": found["RssFile"], "high_water": found["VmHWM"]}


@contextlib.contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Yield the highest of this process' memory, which grows until the next one is asked for."""
    peak, ended = memory(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            now = memory()
            peak.update({key: max(peak[key], value) for key, value in now.items()})

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def export(folder: Path, target: Path, threads: int) -> dict[str, Any]:
    """Export in this process, and say what it took."""
    torch.set_num_threads(threads)
    before, began = memory(), time.perf_counter()
    with watched() as peak:
        report = export_pruned(folder, target)
        seconds = time.perf_counter() - began
    peak["high_water"] = max(peak["high_water"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return {
        "seconds": {**report.seconds, "all": seconds}, "before": before, "peak": peak, "bytes": written,
        "parameters": report.parameters_after, "fold_error": report.verification.fold_error,
    }  # fmt: skip


def copied(path: Path, target: Path) -> float:
    """Return how many seconds it takes to copy a file to the disk."""
    began = time.perf_counter()
    shutil.copyfile(path, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="28: 6.4 GB")
    parser.add_argument("--sizes", type=json.loads, default={}, help="other sizes of the config (JSON)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--export", type=Path, nargs=2, help=argparse.SUPPRESS)  # what the process of its own does
    options = parser.parse_args()
    if options.export:
        print(json.dumps(export(*options.export, options.threads)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        dense, folder = Path(name) / "checkpoint-1", Path(name)
        dense.mkdir()
        checkpoint = write_checkpoint(
            dense, LlamaConfig(**(SIZES | {"num_hidden_layers": options.layers} | options.sizes))
        )
        os.sync()
        copies = [copied(dense / "model.safetensors", folder / "copy")]
        command = [sys.executable, __file__, "--threads", str(options.threads), "--export", str(dense)]
        done = subprocess.run([*command, str(folder / "small")], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        copies.append(copied(dense / "model.safetensors", folder / "copy"))
    result = {
        "checkpoint": checkpoint, "kept": KEPT, "export": found, "copy_seconds": copies, "cores": os.cpu_count(),
        "threads": options.threads, "versions": versions(),
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
