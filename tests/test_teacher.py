"""Teachers divided over processes by FSDP2: the student learns what it learns from a whole one."""

from __future__ import annotations

from pathlib import Path

import fsdp_cpu
import torch
from datasets import Dataset
from test_fsdp import RATIO, build
from tiny import VOCAB, tiny_gpt2
from torch.distributed.fsdp import FSDPModule
from training import LENGTH, logged

from hesso_hf import teacher as teachers

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
    teachers.CHUNK_LOGITS = 2 * VOCAB
    if by_example:
        teachers._separate_ = lambda *args: None
    hesso = TAUGHT | ({"distill_from": distill_from} if distill_from else {})
    run = build(folder, STEPS, processes, hesso=hesso, data=uneven_blocks())
    run.train()
    teacher, student = run.distillation.teacher.model, run.accelerator.unwrap_model(run.model)
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    torch.save(
        {
            "weights": {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()},
            "kept": run.hesso_optimizer.process.kept_units().to_dict(),
            "divergence": logged(run, "hesso/distillation_loss"),
            "fingerprint": run.distillation.fingerprint,
            "layers": [isinstance(model.model.layers[0], FSDPModule) for model in (student,)],
            "held": sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in teacher.parameters()),
        },
        f"{folder}/rank{run.args.process_index}.pt",
    )


def check_against_one(folder: Path, **options: object) -> None:
    """Compare two processes under FSDP2 with one."""
    done = fsdp_cpu.run(folder / "two", "test_teacher", "taught_job", **options)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "one").mkdir()
    taught_job(str(folder / "one"), 1, **options)  # type: ignore[arg-type]
    alone = torch.load(folder / "one" / "rank0.pt", weights_only=True)
    assert min(alone["divergence"]) >= 0 < max(alone["divergence"])
    for rank in range(2):
        found = torch.load(folder / "two" / f"rank{rank}.pt", weights_only=True)
        assert found["held"] < 0.6 * alone["held"]
        assert found["layers"] == [True]
        assert found["kept"] == alone["kept"]
        assert found["fingerprint"] == alone["fingerprint"]
        for ours, theirs in zip(found["divergence"] if rank == 0 else [], alone["divergence"], strict=rank == 0):
            assert abs(ours - theirs) <= 1e-4 * max(alone["divergence"])
        for name, weight in alone["weights"].items():
            assert (found["weights"][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


def test_a_divided_teacher_teaches_what_a_whole_one_does(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(teachers, "CHUNK_LOGITS", teachers.CHUNK_LOGITS)  # which the job changes
    check_against_one(tmp_path)


def test_a_divided_teacher_of_another_class_whose_head_is_not_run_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(teachers, "CHUNK_LOGITS", teachers.CHUNK_LOGITS)
    monkeypatch.setattr(teachers, "_separate_", teachers._separate_)
    tiny_gpt2(2).save_pretrained(tmp_path / "teacher")
    check_against_one(tmp_path, by_example=True, distill_from=str(tmp_path / "teacher"))
