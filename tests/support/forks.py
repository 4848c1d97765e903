"""Worker processes that start in milliseconds: they are forked from one that has imported torch and transformers.

A server process, one for a test session, imports and then waits; nothing is initialised in it and it has one thread.
For a job it forks a launcher, which forks the workers and does what torchrun does: it gives each its rank and a store
to meet in, ends the others where one fails, passes SIGTERM on, and answers with the exit code. What reads the
environment when it is imported (the Hub's client) needs a process of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.support import ROOT

PATIENCE = 30.0  # seconds between SIGTERM and SIGKILL, as torchrun's
STARTING = 300.0  # seconds that the server may take to start, on a busy machine
ADDRESS = "HESSO_TESTS_FORKS"  # environment variable: the server's socket
PRELOADED = (
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint.state_dict",
    "transformers.models.llama.modeling_llama", "accelerate", "datasets", "peft",
    "hesso_hf.trainer.trainer", "tests.support.sharded", "tests.support.fsdp_cpu", "tests.support.training",
    "pytest",
)  # fmt: skip
IF_THERE = "deepspeed"  # which every training imports where it is installed


class Forked:
    """A job on its way, as `subprocess.Popen` shows one: its pid is the launcher's, whose children are the workers."""

    def __init__(self, connection: socket.socket, folder: Path) -> None:
        self._lines, self._folder = connection.makefile("r"), folder
        self._connection = connection  # while it is open the launcher knows that somebody waits
        self.pid = int(self._lines.readline())
        self._returncode: int | None = None

    def output(self, name: str) -> str:
        """Return what the workers have written so far to "stdout" or "stderr"."""
        return (self._folder / name).read_text(errors="replace")

    def poll(self) -> int | None:
        """Return the exit code, None as long as it runs."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            return self.wait() if self._returncode is not None or selector.select(0) else None

    def wait(self) -> int:
        """Wait for the end; return the exit code, negative for a signal."""
        if self._returncode is None:
            line = self._lines.readline()
            self._returncode = int(line) if line else -signal.SIGKILL
            self._connection.close()
        return self._returncode

    def completed(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end; return the exit code and all that was written."""
        return subprocess.CompletedProcess([], self.wait(), self.output("stdout"), self.output("stderr"))

    def kill(self) -> None:
        """Kill all processes with -9, those that workers have started too, and wait for their end."""
        if self.poll() is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            launcher = psutil.Process(self.pid)
            members = [*launcher.children(recursive=True), launcher]
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(members, timeout=PATIENCE)
        self.wait()

    def terminate(self) -> None:
        """Ask all processes to stop."""
        os.kill(self.pid, signal.SIGTERM)


def start(
    code: str, *arguments: str, processes: int | None = None, env: dict[str, str] | None = None, path: str = "-c"
) -> Forked:
    """Start Python code in forked workers, which have nothing of this process but its environment.

    Args:
        arguments: `sys.argv[1:]`.
        processes: how many meet over torch.distributed; None for one process that knows of no others.
        env: changes of the environment.
        path: `sys.argv[0]`, which error messages name.
    """
    address = _server()
    folder = Path(tempfile.mkdtemp(dir=Path(address).parent))
    told = {
        "code": code, "argv": [path, *arguments], "processes": processes, "cwd": os.getcwd(), "folder": str(folder),
        "env": {**os.environ, **(env or {})},
    }  # fmt: skip
    connection = _connected(address)
    connection.sendall((json.dumps(told) + "\n").encode())
    return Forked(connection, folder)


def run(
    code: str, *arguments: str, processes: int | None = None, env: dict[str, str] | None = None, path: str = "-c"
) -> subprocess.CompletedProcess[str]:
    """Do `start`'s job to its end."""
    return start(code, *arguments, processes=processes, env=env, path=path).completed()


_CALL = """
import importlib, pickle, sys
module, name, given, found = sys.argv[1:]
with open(given, "rb") as file:
    result = getattr(importlib.import_module(module), name)(*pickle.load(file))
with open(found, "wb") as file:
    pickle.dump(result, file)
"""


def call(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a worker, and return what it returns."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given", Path(folder) / "found"
        given.write_bytes(pickle.dumps(arguments))
        done = run(_CALL, work.__module__, work.__name__, str(given), str(found))
        assert done.returncode == 0, done.stderr
        return pickle.loads(found.read_bytes())


@contextlib.contextmanager
def served() -> Iterator[None]:
    """Have a server meanwhile, which the processes that are started find."""
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        address = str(Path(folder) / "socket")
        command = [sys.executable, "-c", "from tests.support import forks; forks.serve()", address]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
        env["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow would start a thread
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env)
        assert server.stdin is not None
        os.environ[ADDRESS] = address
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            server.stdin.close()  # at whose end it ends, however this process ends
            server.wait()


def _connected(address: str) -> socket.socket:
    """Return a connection to the server, once it has imported all."""
    end = time.monotonic() + STARTING
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            assert time.monotonic() < end, "the server of worker processes did not start, or has ended"
            time.sleep(0.1)


@functools.cache
def _server() -> str:
    """Return the address of the session's server, or of one for this process alone."""
    if ADDRESS not in os.environ:
        stack = contextlib.ExitStack()
        stack.enter_context(served())
        atexit.register(stack.close)
    return os.environ[ADDRESS]


# -- in the server -----------------------------------------------------------------------------------------------------


def serve() -> None:
    """Import, and fork a launcher for every connection."""
    import importlib.util

    import torch

    from tests.support import proofs, shortened

    proofs.keep()
    shortened.shorten()
    torch.set_num_threads(1)
    for stream in (sys.stdout, sys.stderr):  # which workers share: a line is one write, buffered or not
        stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    for name in PRELOADED:
        importlib.import_module(name)
    if importlib.util.find_spec(IF_THERE):
        importlib.import_module(IF_THERE)
    gc.collect()
    gc.freeze()  # Accelerate collects garbage at every training: workers needn't look through all that is imported
    threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else 1
    assert threads == 1, f"{threads} threads: what another one holds would be held for ever after a fork"
    signal.signal(signal.SIGCHLD, _reap)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while all(key.fileobj is listener for key, _ in selector.select()):
            connection = listener.accept()[0]
            if os.fork() == 0:
                selector.close()
                listener.close()
                _end_with(functools.partial(_launch, connection))
            connection.close()


def _reap(*_: Any) -> None:
    """Take note of launchers' ends; they have answered themselves."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _end_with(work: Callable[[], int]) -> None:
    """Do a child's work and end the child, as the interpreter ends, but for the parent's objects."""
    code = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            import threading

            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _launch(connection: socket.socket) -> int:
    """Fork the workers of one job, watch over them, and answer with the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told = json.loads(connection.makefile("r").readline())
    os.setpgid(0, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(told["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    count = told["processes"] or 1
    reading, writing = os.pipe()
    workers = {}
    for rank in range(count):
        if (pid := os.fork()) == 0:
            connection.close()
            os.close(writing)
            _end_with(functools.partial(_work, told, rank, reading))
        workers[pid] = rank
    os.close(reading)
    stopping: list[float] = []

    def stop(*_: Any) -> None:
        stopping.append(time.monotonic())
        for pid in workers:
            os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    if told["processes"]:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # after the forks: it has a thread
        os.write(writing, f"{store.port:8d}".encode() * count)
    connection.sendall(f"{os.getpid()}\n".encode())
    code = _watch(workers, stop, stopping, connection)
    connection.sendall(f"{code}\n".encode())
    return 0


def _watch(workers: dict[int, int], stop: Callable[[], None], stopping: list[float], connection: socket.socket) -> int:
    """Return the first failing worker's exit code, or 0, when all have ended."""
    code, alone = 0, len(workers) == 1
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                rank, ended = workers.pop(pid), os.waitstatus_to_exitcode(status)
                if ended and not code:
                    code = ended
                    if not alone:
                        print(f"process {rank} ended with {ended}", file=sys.stderr, flush=True)
                    stop()
            elif selector.select(0.01) or (stopping and time.monotonic() > stopping[0] + PATIENCE):
                for pid in workers:  # nobody waits any more, or they have been asked to stop for long enough
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
    return code


def _work(told: dict[str, Any], rank: int, reading: int) -> int:
    """Run the code as a script of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(told["cwd"])
    os.environ.clear()
    os.environ.update(told["env"])
    if told["processes"]:
        port, count = int(os.read(reading, 8)), str(told["processes"])
        os.environ.update({
            "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "forked",
        })  # fmt: skip
    os.close(reading)
    import numpy
    import torch

    torch.set_num_threads(1)  # here makes the pool anew that a fork loses: threads that load a model would race for it
    torch.seed()  # random numbers of its own, as a fresh process has
    numpy.random.seed()
    sys.argv = told["argv"]
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    exec(compile(told["code"], told["argv"][0], "exec"), main.__dict__)
    return 0
