"""What processes do together."""

from __future__ import annotations

from tests.support import forks

LEAVING = """
import weakref
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hesso_hf.distributed.collectives import leave

class Trainer:
    pass

dist.init_process_group("gloo")
trainer = Trainer()
trainer.itself, trainer.model = trainer, DistributedDataParallel(torch.nn.Linear(2, 2))
seen = weakref.ref(trainer.model)
del trainer
assert seen() is not None
leave()
assert seen() is None, "its reducer holds the group, whose threads would outlive the interpreter"
"""


def test_leaving_lets_go_of_what_holds_the_group() -> None:
    done = forks.run(LEAVING, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
