"""Forked workers are as good as fresh ones: nothing is initialised in them, and they end as processes end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil

from tests.support import forks, killing, proofs

FRESH = """
import gc, os, sys, threading
import torch, torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
assert not PartialState._shared_state and not AcceleratorState._shared_state and not GradientState._shared_state
assert not dist.is_initialized() and threading.active_count() == 1 and torch.get_num_threads() == 1
assert all(each.line_buffering and not each.write_through for each in (sys.stdout, sys.stderr)), "lines in pieces"
assert not [item for item in gc.get_objects() if type(item) is torch.nn.Parameter]
words = ["FRESH", os.environ.get("RANK", "-"), os.environ["OF_THE_TEST"], *sys.argv[1:]]
os.write(1, " ".join(words).encode() + b"\\n")
"""

MEET = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([1.0 + dist.get_rank()])
dist.all_reduce(total)
os.write(1, f"SUM {total.item():.0f} of {dist.get_world_size()}\\n".encode())
dist.destroy_process_group()
"""


def test_a_worker_is_like_a_fresh_process() -> None:
    alone = forks.run(FRESH, "a b", env={"OF_THE_TEST": "here"})
    assert (alone.returncode, alone.stdout) == (0, "FRESH - here a b\n"), alone.stderr
    two = forks.run(FRESH + MEET, processes=2, env={"OF_THE_TEST": "here"})
    assert two.returncode == 0, two.stderr
    assert sorted(two.stdout.splitlines()) == ["FRESH 0 here", "FRESH 1 here", "SUM 3 of 2", "SUM 3 of 2"]


def test_exit_codes_and_errors_come_back() -> None:
    assert forks.run("import sys; sys.exit(3)").returncode == 3
    failed = forks.run("import sys; sys.exit('what went wrong')")
    assert (failed.returncode, failed.stderr) == (1, "what went wrong\n")
    raised = forks.run("import atexit; atexit.register(print, 'LEFT'); raise ValueError('said')", path="script.py")
    assert raised.returncode == 1
    assert raised.stdout == "LEFT\n"
    assert 'File "script.py", line 1' in raised.stderr
    assert raised.stderr.endswith("ValueError: said\n")
    assert forks.run("import os; os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL


def test_where_one_process_dies_the_others_are_ended() -> None:
    code = "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(300)"
    done = forks.run(code, processes=2)
    assert done.returncode == -signal.SIGKILL
    assert f"process 1 ended with {-signal.SIGKILL}" in done.stderr


def started(folder: Path, ranks: int = 2) -> None:
    while len(list(folder.iterdir())) < ranks:
        time.sleep(0.01)


SLEEP = "import os, sys, time\nopen(sys.argv[1] + '/' + os.environ['RANK'], 'w')\ntime.sleep(300)"


def test_a_job_can_be_killed_with_all_its_processes(tmp_path: Path) -> None:
    job = forks.start(SLEEP, str(tmp_path), processes=2)
    started(tmp_path)
    assert job.poll() is None
    workers = psutil.Process(job.pid).children()
    assert len(workers) == 2
    job.kill()
    assert job.wait() == -signal.SIGKILL
    assert job.poll() == -signal.SIGKILL
    assert not psutil.wait_procs(workers, timeout=0)[1]


def test_sigterm_reaches_every_process(tmp_path: Path) -> None:
    told = "import os, signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'TOLD\\n'), os._exit(0)))\n"
    job = forks.start(told + SLEEP, str(tmp_path), processes=2)
    started(tmp_path)
    job.terminate()
    assert job.wait() == 0
    assert job.output("stdout") == "TOLD\nTOLD\n"


def test_every_worker_draws_random_numbers_of_its_own() -> None:
    code = "import os, random, numpy, torch\n"
    code += "os.write(1, f'{random.random()} {numpy.random.rand()} {torch.rand(1).item()}\\n'.encode())"
    drawn = [line.split() for line in (forks.run(code, processes=2).stdout + forks.run(code).stdout).splitlines()]
    assert [len(set(numbers)) for numbers in zip(*drawn, strict=True)] == [3, 3, 3]


def test_the_server_stays_as_it_was() -> None:
    assert forks.run("import torch; torch.set_default_dtype(torch.float64); torch.manual_seed(1)").returncode == 0
    assert forks.run("import torch; assert torch.get_default_dtype() == torch.float32").returncode == 0
    job = forks.start(SLEEP)
    server = psutil.Process(job.pid).ppid()
    job.kill()
    assert len(os.listdir(f"/proc/{server}/task")) == 1


PROVE = """
import os, sys, time
from pathlib import Path
from tests.support import proofs
from tests.support.tiny import tiny_llama
def slowly(*_):
    Path(sys.argv[1], os.environ["RANK"]).touch()
    time.sleep(0.3)
    return "proved"
model = tiny_llama()
print(proofs._shared(slowly, type(model), model.config, ("attention_heads",)))
"""


def test_workers_that_prove_the_same_at_once_prove_it_once(tmp_path: Path) -> None:
    (tmp_path / "proofs").mkdir()
    (tmp_path / "provers").mkdir()
    done = forks.run(PROVE, str(tmp_path / "provers"), processes=2, env={proofs.FOLDER: str(tmp_path / "proofs")})
    assert done.stdout.split() == ["proved", "proved"], done.stderr
    assert len(list((tmp_path / "provers").iterdir())) == 1


def test_every_event_that_a_run_is_killed_at_can_be_found() -> None:
    for places in killing.EVENTS.values():
        assert all(callable(getattr(killing.owner_of(place), name)) for place, name in places)
