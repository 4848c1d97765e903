"""Two real processes over gloo: the ranks prune the same units as one process does on the same global batch."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, export_pruned
from tests.support import ROOT, forks
from tests.support.loopback_hub import LoopbackHub
from tests.support.training import trainer

STEPS = 40
RATIO = {
    "pruning_ratio": 0.3, "warmup_steps": 6, "pruning_steps": 24, "pruning_periods": 3, "replay_share": 0.0,
    "stream_basis": "given",
}  # fmt: skip

_WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.trainer.test_distributed import run_job
run_job(Path(sys.argv[1]), per_device=2, **dict(zip(sys.argv[3::2], sys.argv[4::2])))
"""


def run_job(folder: Path, per_device: int, **changes: str) -> None:
    """Train on a global batch of 4, save the small model, and leave weights and decisions of every rank."""
    run = trainer(
        folder, config=HessoConfig(**(RATIO | changes)), max_steps=STEPS, learning_rate=1e-3,
        per_device_train_batch_size=per_device, logging_steps=STEPS,
    )  # fmt: skip
    run.train()
    run.save_model(str(folder / "small"))
    rank = run.args.process_index
    kept = run.hesso_optimizer.process.kept_units().to_dict()
    turned = run.hesso_run.basis is not None
    weights = {
        name: parameter.detach() for name, parameter in run.accelerator.unwrap_model(run.model).named_parameters()
    }
    torch.save(
        {"kept": kept, "weights": weights, "world": run.args.world_size, "turned": turned}, folder / f"rank{rank}.pt"
    )


_LEAVE = "\nrun = None\nfrom hesso_hf.distributed.collectives import leave\nleave()\n"


def launch(code: str, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run Python code in several processes."""
    return forks.run(code + _LEAVE, *arguments, processes=processes)


def torchrun(code: str, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run Python code in several processes that read the environment when they import."""
    script = Path(arguments[0]) / "worker.py"
    script.write_text(code + _LEAVE)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(script),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = launch(_WORKER, str(folder), str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_equal_one(two_ranks: Path, tmp_path: Path) -> None:
    run_job(tmp_path, per_device=4)
    assert not check_alike(two_ranks, tmp_path)


def test_two_processes_turn_the_stream_as_one_does(tmp_path: Path) -> None:
    turned_and_masked = {"stream_basis": "principal", "compact": "never"}
    done = launch(_WORKER, str(tmp_path / "two"), str(ROOT), *itertools.chain(*turned_and_masked.items()))
    assert done.returncode == 0, done.stderr[-3000:]
    run_job(tmp_path / "one", per_device=4, **turned_and_masked)
    assert check_alike(tmp_path / "two", tmp_path / "one")


def check_alike(two: Path, one: Path) -> bool:
    """Assert that two processes decided and trained as one; return whether all of them turned the stream."""
    alone = torch.load(one / "rank0.pt", weights_only=True)
    ranks = [torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert ranks[0]["kept"] == ranks[1]["kept"] == alone["kept"]
    for name, weight in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        error = (ranks[0]["weights"][name] - weight).abs().max() / weight.abs().max()
        assert error <= 1e-5, (name, float(error))
    assert ranks[0]["turned"] == ranks[1]["turned"] == alone["turned"]
    return alone["turned"]


def test_two_processes_write_one_small_model(two_ranks: Path) -> None:
    small = AutoModelForCausalLM.from_pretrained(two_ranks / "small")
    report = json.loads((two_ranks / "small" / "pruning_report.json").read_text())
    before, cut_after = report["parameters"]["before"], RATIO["warmup_steps"] + RATIO["pruning_steps"]
    assert abs(1 - small.num_parameters() / before - 0.3) <= 0.02
    assert report["compaction"]["step"] == cut_after < STEPS
    assert not list(two_ranks.glob(".small*"))


_DISAGREE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
from hesso_hf.distributed.collectives import broadcast_decisions_, check_agreement
from hesso_hf.errors import HessoError
check_agreement(torch.tensor([1.0, 0.5]))
try:
    check_agreement(torch.tensor([1.0, 0.5 + dist.get_rank()]))
except HessoError:
    print("CAUGHT", flush=True)
own = torch.tensor([dist.get_rank() == 0, True, dist.get_rank() == 1])
other = own.clone().view(3, 1)
broadcast_decisions_([own, other])
assert other.shape == (3, 1) and other.flatten().tolist() == own.tolist()
assert own.tolist() == [True, True, False], own
print("AGREED", flush=True)
"""


def test_rank_zero_decides(tmp_path: Path) -> None:
    done = launch(_DISAGREE, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("AGREED") == 2
    assert done.stdout.count("CAUGHT") == 2


_LONG_WORK = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from hesso_hf.distributed import collectives as agreement
dist.init_process_group("gloo", timeout=timedelta(seconds=2))
rank = dist.get_rank()

def work():
    time.sleep(3 * rank)
    return rank

assert agreement.on_all(work) == rank
if not rank:
    time.sleep(3)
assert agreement.from_main("told" if not rank else None) == "told"
time.sleep(3 * rank)
agreement.barrier()
assert agreement.common({1, 2 + rank}) == {1}
agreement.LONGEST_WORK, agreement.PATIENCE = 1.0, 0.3
if rank:
    print("TOGETHER", flush=True)
    time.sleep(2)
else:
    try:
        agreement.meet()
    except ValueError as error:
        print(f"ALONE {error}", flush=True)
import os
os._exit(0)
"""


def test_processes_wait_for_one_that_works_longer_than_collectives_would(tmp_path: Path) -> None:
    done = launch(_LONG_WORK, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "TOGETHER" in done.stdout
    assert "ALONE only 1 of 2 processes" in done.stdout
    assert done.stderr.count("the main process has waited for 1 of 2 processes") == 1


_OWN_DISKS = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
torch.set_num_threads(1)
from hesso_hf.trainer.saving import resolve_checkpoint
from tests.support.training import trainer
folder = Path(sys.argv[1]) / os.environ["RANK"]
options = {"max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 4}
run = trainer(folder, save_on_each_node=True, **options)
run.train()
if os.environ["RANK"] == "1":
    (folder / "checkpoint-8" / "trainer_state.json").unlink()  # killed while it wrote
run = trainer(folder, save_on_each_node=True, **options)
(folder / "resumes").write_text(resolve_checkpoint(True, run.args.output_dir))
"""


def test_nodes_with_disks_of_their_own_resume_from_what_all_have(tmp_path: Path) -> None:
    code = _OWN_DISKS.replace(
        "from tests.support.training", "os.environ['LOCAL_RANK'] = '0'\nfrom tests.support.training"
    )  # each on its node
    done = launch(code, str(tmp_path), str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in ("0", "1"):
        assert (tmp_path / rank / "resumes").read_text() == str(tmp_path / rank / "checkpoint-4")


_FAILING_SAVE = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
torch.set_num_threads(1)
import hesso_hf.export.parameters, hesso_hf.export.verify
from tests.support.training import trainer
run = trainer(Path(sys.argv[1]), max_steps=8, per_device_train_batch_size=2)
run.train()
hesso_hf.export.verify.FOLD_TOLERANCE = -1.0
try:
    run.save_model(str(Path(sys.argv[1]) / "small"))
except ValueError as error:
    kept = "small-dense: " in str(error)
    print(f"REFUSED {type(error).__name__} {kept}", flush=True)  # in one write: the processes share the pipe
hesso_hf.export.verify.FOLD_TOLERANCE = 1e-4
plain = hesso_hf.export.parameters.cut_model

def cut_model(*args):
    raise torch.OutOfMemoryError("CUDA out of memory")

hesso_hf.export.parameters.cut_model = cut_model  # which only the process that writes calls
try:
    run.save_model(str(Path(sys.argv[1]) / "large"))
except ValueError as error:
    kept = "memory ran out" in str(error) and "large-dense: " in str(error)
    print(f"NO ROOM {type(error).__name__} {kept}", flush=True)
hesso_hf.export.parameters.cut_model = plain
run.save_model(str(Path(sys.argv[1]) / "small"))
print("SAVED", flush=True)
"""


def test_a_save_that_fails_on_the_main_process_fails_on_all_and_can_be_tried_again(tmp_path: Path) -> None:
    done = launch(_FAILING_SAVE, str(tmp_path), str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("REFUSED VerificationError True") == 2
    assert done.stdout.count("NO ROOM HessoError True") == 2
    assert done.stdout.count("SAVED") == 2
    assert (tmp_path / "small" / "pruning_report.json").exists()
    for dense in ("small-dense", "large-dense"):
        assert export_pruned(tmp_path / dense, tmp_path / "again").verification.fold_error < 1e-5


_PUSH = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.support.training import trainer
run = trainer(Path(sys.argv[1]) / "out", max_steps=12, per_device_train_batch_size=2, push_to_hub=True,
              hub_model_id="user/small", hub_strategy="every_save", save_strategy="steps", save_steps=4)
run.train()
run.push_to_hub(commit_message="Pruned")
"""


def test_two_processes_push_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub() as hub:
        for name, value in hub.env(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        done = torchrun(_PUSH, str(tmp_path), str(ROOT))
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Training in progress, step 12" in hub.commits("user/small")  # the last push changes nothing more
        assert b'"intermediate_size": 28' in hub.files("user/small")["config.json"]
