"""Everything that only a GPU can show, in parts of a few minutes each: `make gpu`, or `make gpu ARGS="--parts tests"`.

    python benchmarks/gpu.py [--dry-run] [--parts tests overhead_8k ...] [--again] [--output FILE]

Each part (`gpu_parts.py`) runs in a process of its own, and what it found is written at once, under the device's name:
a call that is cut off, or a part that takes longer than its minutes, costs that part alone, and the next call goes on
with what is missing. `--dry-run` does the same at a tiny size on the CPU, so that it works where the GPU is lent.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_parts import PARTS

from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "gpu.json"
DRY_RESULTS = Path(__file__).parent / ".cache" / "gpu_dry_run.json"
TOLD = 4000  # characters of a failed part's output that are kept
DRY_DEVICE = "cpu, dry run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="at a tiny size, on the CPU")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--again", action="store_true", help="do parts again that are there")
    parser.add_argument("--minutes", type=float, default=9.0, help="of one part at most")
    parser.add_argument("--output", type=Path, help=f"by default {RESULTS.name}, of a dry run one in benchmarks/.cache")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # where one part's process writes what it found
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("there is no GPU here: add --dry-run to try the parts at a tiny size on the CPU")
        return 2
    if options.child:
        return do_part(options.parts[0], options.dry_run, options.child)
    output = options.output or (DRY_RESULTS if options.dry_run else RESULTS)
    device = DRY_DEVICE if options.dry_run else torch.cuda.get_device_name()
    failed = []
    for name in options.parts:
        stored = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
        entry = stored.setdefault(device, {"device": device, "parts": {}})
        if not options.again and "failed" not in entry["parts"].get(name, {"failed": ""}):
            print(f"{name}: there already", flush=True)
            continue
        print(f"{name} ...", flush=True)
        entry["parts"][name] = found = run_part(name, options.dry_run, options.minutes)
        entry["versions"] = versions()
        if "failed" in found:
            failed.append(name)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(found)[-TOLD:]}", flush=True)
    print(f"{output}: {f'failed: {failed}; call again to do these' if failed else 'all asked for is there'}")
    return 1 if failed else 0


def run_part(name: str, dry: bool, minutes: float) -> dict[str, Any]:
    """Do a part in a process of its own; return what it found or, under `failed`, why it found nothing."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--parts", name, "--child", str(found), *(["--dry-run"] if dry else [])]
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        part = subprocess.Popen(command, **both, text=True, errors="replace", start_new_session=True)
        try:
            said, _ = part.communicate(timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            os.killpg(part.pid, signal.SIGKILL)  # what it has started would go on holding the GPU
            part.wait()
            return {"failed": f"took longer than {minutes:g} minutes"}
        if part.returncode:
            return {"failed": said[-TOLD:]}
        return json.loads(found.read_text(encoding="utf-8")) | {"seconds": round(time.monotonic() - started, 1)}


def do_part(name: str, dry: bool, found: Path) -> int:
    """Do a part here."""
    with tempfile.TemporaryDirectory() as folder:
        result = PARTS[name](dry, Path(folder))
    found.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
