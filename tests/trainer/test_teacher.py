"""Teachers divided over processes by FSDP2: the student learns what it learns from a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule

from hesso_hf.trainer import teacher as teachers
from tests.engines.test_fsdp import RATIO, build
from tests.support import fsdp_cpu
from tests.support.fsdp_cpu import Job
from tests.support.tiny import VOCAB, tiny_gpt2, tiny_llama, token_batches
from tests.support.training import LENGTH, logged

STEPS = 16
TAUGHT = RATIO | {"distillation_alpha": 0.75, "distillation_temperature": 2.0}


def uneven_blocks() -> Dataset:
    """Examples whose labels are ignored at the start, so that the processes have other numbers of positions."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, VOCAB, (64, LENGTH), generator=generator).tolist()
    labels = [[-100] * (n * 5 % LENGTH) + row[n * 5 % LENGTH :] for n, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def taught_job(folder: str, processes: int, by_example: bool = False, distill_from: str | None = None) -> None:
    """Train with a teacher whose logits come a few positions, or an example, at a time; leave what came of it."""
    hesso = TAUGHT | ({"distill_from": distill_from} if distill_from else {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "CHUNK_LOGITS", 2 * VOCAB)
        if by_example:
            patch.setattr(teachers, "_separate_", lambda *args: None)
        run = build(folder, STEPS, processes, hesso=hesso, data=uneven_blocks())
        run.train()
    teacher, student = run.distillation.teacher.model, run.accelerator.unwrap_model(run.model)
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    torch.save(
        {
            "weights": {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()},
            "kept": run.hesso_optimizer.process.kept_units().to_dict(),
            "divergence": logged(run, "hesso/distillation_loss"),
            "fingerprint": run.distillation.teacher.fingerprint,
            "layers": isinstance(student.model.layers[0], FSDPModule),
            "held": sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in teacher.parameters()),
        },
        f"{folder}/rank{run.args.process_index}.pt",
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    tiny_gpt2(2).save_pretrained(folder / "teacher")
    jobs = [Job(__name__, "taught_job", folder / name, options(folder)[name]) for name in options(folder)]
    done = fsdp_cpu.run_jobs(folder, jobs)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def options(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the runs are told: the original as the teacher; one of another class, an example at a time."""
    return {"original": {}, "another": {"by_example": True, "distill_from": str(folder / "teacher")}}


@pytest.mark.parametrize("name", ["original", "another"])
def test_a_divided_teacher_teaches_what_a_whole_one_does(name: str, two: Path, tmp_path: Path) -> None:
    taught_job(str(tmp_path), 1, **options(two)[name])
    alone = torch.load(tmp_path / "rank0.pt", weights_only=True)
    assert min(alone["divergence"]) >= 0 < max(alone["divergence"])
    for rank in range(2):
        found = torch.load(two / name / f"rank{rank}.pt", weights_only=True)
        assert found["held"] < 0.6 * alone["held"]
        assert found["layers"], "the student's layers aren't sharded one by one"
        assert found["kept"] == alone["kept"]
        assert found["fingerprint"] == alone["fingerprint"]
        if rank == 0:
            pairs = zip(found["divergence"], alone["divergence"], strict=True)
            assert all(abs(ours - theirs) <= 1e-4 * max(alone["divergence"]) for ours, theirs in pairs)
        for parameter, weight in alone["weights"].items():
            assert (found["weights"][parameter] - weight).abs().max() <= 1e-5 * weight.abs().max(), parameter


@pytest.mark.parametrize("alone", [True, False], ids=["head-alone", "by-example"])
def test_a_process_with_less_to_do_makes_as_many_forwards(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "CHUNK_LOGITS", 6 * VOCAB)
    monkeypatch.setattr(teachers, "max_over_ranks", lambda count, device: 7)
    if not alone:
        monkeypatch.setattr(teachers, "_separate_", lambda *args: None)
    (ids,) = token_batches(1, shape=(3, 6))
    forwards = {}
    for sharded in (False, True):
        teacher = teachers.Teacher(tiny_llama(2), sharded=sharded)
        calls: list[Any] = []
        teacher.model.register_forward_hook(lambda *args, calls=calls: calls.append(args))
        rows = [(chunk, len(logits)) for chunk, logits in teacher.rows({"input_ids": ids})]
        assert rows == [(slice(start, start + 6), 6) for start in (0, 6, 12)]
        forwards[sharded] = len(calls)
    own = 3  # chunks, or examples
    assert forwards == {False: own + alone, True: 7 + alone}  # and the one that makes the hidden states
