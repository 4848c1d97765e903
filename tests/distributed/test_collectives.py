"""What processes do together."""

from __future__ import annotations

import pytest

from tests.support import forks

LEAVING = """
import os, sys, weakref
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hesso_hf.distributed import collectives
from hesso_hf.distributed.collectives import leave

waits = []
collectives.time.sleep = waits.append

class Trainer:
    pass

dist.init_process_group("gloo")
trainer = Trainer()
trainer.itself, trainer.model = trainer, DistributedDataParallel(torch.nn.Linear(2, 2))
kept = trainer.model if sys.argv[1] == "kept" else None
seen = weakref.ref(trainer.model)
del trainer
assert seen() is not None
leave()
assert kept is not None or seen() is None, "its reducer holds the group, whose threads would outlive the interpreter"
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(f"{sum('gloo' in name for name in names) > 0} {waits}", flush=True)
"""


@pytest.mark.parametrize(("held", "told"), [("kept", "True [1.0]"), ("let go", "False []")])
def test_leaving_waits_for_threads_that_cannot_be_joined_and_joins_the_others(held: str, told: str) -> None:
    done = forks.run(LEAVING, held, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [told, told]
