"""Work that processes do together: what one fails with, all raise, wherever it was and whatever others failed with."""

from __future__ import annotations

import pytest

from hesso_hf.distributed.together import Together
from hesso_hf.errors import HessoError
from tests.support import ROOT, forks

_WORK = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from hesso_hf.distributed.together import Together
from hesso_hf.errors import StorageError
dist.init_process_group("gloo")
rank = int(os.environ["RANK"])
for fails in ({0: (0, "full")}, {1: (1, "full")}, {0: (2, "other")}, {0: (1, "other"), 1: (1, "full")}, {}):
    together, part = Together(), None
    try:
        with together.doing(shared=True):
            for part in range(3):
                if fails.get(rank, (None,))[0] == part:
                    raise StorageError("disk") if fails[rank][1] == "full" else KeyError("key")
                if part < 2:
                    together.meet()
        print(f"{rank} done", flush=True)
    except Exception as error:
        print(f"{rank} {type(error).__name__} after {part}: {error}", flush=True)
dist.destroy_process_group()
"""


def test_a_failure_reaches_all_processes_at_the_next_point_where_they_meet() -> None:
    done = forks.run(_WORK, str(ROOT), processes=2)
    assert done.returncode == 0, done.stderr
    heard = "HessoError after {}: another process could not write the checkpoint: KeyError: 'key'"
    told = {rank: [line[2:] for line in done.stdout.splitlines() if line.startswith(f"{rank} ")] for rank in (0, 1)}
    both = ["StorageError after 0: disk", "StorageError after 1: disk"]
    assert told[0] == [*both, "KeyError after 2: 'key'", "KeyError after 1: 'key'", "done"]
    assert told[1] == [*both, heard.format(2), heard.format(1), "done"], "the first process' failure, on both"


def test_nothing_meets_where_nothing_is_underway_or_while_it_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[str] = []
    monkeypatch.setattr("hesso_hf.distributed.together.from_all", lambda value: met.append("told") or [value])
    monkeypatch.setattr("hesso_hf.distributed.together.barrier", lambda: met.append("waited"))
    together = Together()
    together.meet()
    assert met == []
    with together.doing(shared=True), together.paused():
        together.meet()
    assert met == ["told"], "at the end alone"
    with together.doing(shared=False):
        together.meet()
    assert met == ["told", "waited", "waited"]
    with pytest.raises(HessoError, match="alone"), together.doing(shared=False):
        raise HessoError("alone")
    assert len(met) == 3
    assert not together.underway
