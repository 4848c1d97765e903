"""Frozen weights: gradients only in steps that are scored, and checkpoints that bring their scales back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hesso_hf import HessoTrainer, wrap_optimizer
from hesso_hf.errors import CheckpointMismatchError
from hesso_hf.pruning.weights import frozen
from hesso_hf.pruning.weights.frozen import FrozenWeights
from hesso_hf.structures.lora import base_of, parameters_of
from tests.support import ROOT
from tests.support.lora import lora_run, tiny_lora
from tests.support.tiny import tiny_gemma2, tiny_llama, tiny_phi, token_batches
from tests.support.training import hesso_config
from tests.trainer.test_distributed import launch

CRIC = {"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2, "cric_tolerance": 0.0}
DROPOUT = {"lora_dropout": 0.1}
# the run's model, LoRA and HESSO options, number of steps, and the steps that are interrupted after: warm-up before and
# inside a scoring window, a period's middle and end, the second period, recovery
RUNS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], int, list[int]]] = {
    "plain": (tiny_llama, DROPOUT, {}, 10, [1, 3, 4, 5, 8]),
    "biases": (tiny_llama, {"bias": "all"}, {}, 9, [3]),
    "modules_to_save": (tiny_llama, {"modules_to_save": ["lm_head"]}, {}, 9, [3]),
    "norms as 1 + w": (tiny_gemma2, {}, {}, 9, [3]),
    "centred": (tiny_phi, {"target_modules": ["q_proj", "fc2"]}, {}, 9, [3, 8]),
    "cric": (tiny_llama, DROPOUT, CRIC, 20, [3, 5, 6, 10]),
    "pause": (tiny_llama, {}, {"on_collapse": "pause"}, 9, [4]),
}


def run_of(kind: str, folder: Path, **changes: Any) -> HessoTrainer:
    build, lora, config, steps, _ = RUNS[kind]
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps} | changes
    return lora_run(folder, build(), lora, config=hesso_config(**config), **options)


class Runs(dict[str, HessoTrainer]):
    """The uninterrupted runs, each trained when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, kind: str) -> HessoTrainer:
        self[kind] = run_of(kind, self.folder / kind)
        self[kind].train()
        return self[kind]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("undisturbed"))


def differing(run: HessoTrainer, expected: HessoTrainer) -> list[str]:
    """Names of parameters and optimizer state that differ in any bit."""
    own, theirs = parameters_of(run.hesso_run.model), parameters_of(expected.hesso_run.model)
    found = [name for name in theirs if not torch.equal(own[name], theirs[name])]
    states = [item.hesso_optimizer.base.state_dict()["state"] for item in (run, expected)]
    for index, state in states[1].items():
        found += [f"{index} {key}" for key, value in state.items() if not torch.equal(states[0][index][key], value)]
    return found


QUICK = {("plain", 3), ("plain", 5), ("centred", 3), ("cric", 5)}
CASES = [
    pytest.param(kind, step, marks=() if (kind, step) in QUICK else pytest.mark.slow)
    for kind, run in RUNS.items()
    for step in run[4]
]


@pytest.mark.parametrize(("kind", "step"), CASES)
def test_interrupted_equals_uninterrupted(undisturbed: Runs, kind: str, step: int, tmp_path: Path) -> None:
    expected = undisturbed[kind]
    shutil.copytree(Path(expected.args.output_dir) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    run = run_of(kind, tmp_path, save_strategy="no")
    run.train(resume_from_checkpoint=True)
    assert differing(run, expected) == []
    assert run.hesso_optimizer.process.kept_units() == expected.hesso_optimizer.process.kept_units()
    assert expected.hesso_optimizer.process.finished


def test_a_checkpoint_holds_only_the_slices_on_their_way(undisturbed: Runs) -> None:
    folder = Path(undisturbed["plain"].args.output_dir)
    sizes = []
    for step in (2, 3, 10):  # before, inside and after the periods
        state = torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["hesso"]["frozen"]
        sizes.append(sum(len(saved["values"]) for saved in state.values()))
        assert not list((folder / f"checkpoint-{step}").glob("model*.safetensors"))
    elements = sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert sizes[0] == sizes[2] == 0
    assert 0 < sizes[1] < 0.6 * elements


def test_a_base_that_is_pruned_already_is_refused(undisturbed: Runs) -> None:
    finished = undisturbed["biases"]
    with pytest.raises(CheckpointMismatchError, match="is frozen, differs from what the checkpoint was trained on"):
        finished.train(resume_from_checkpoint=str(Path(finished.args.output_dir) / "checkpoint-3"))


def test_another_base_is_refused(undisturbed: Runs, tmp_path: Path) -> None:
    checkpoint = Path(undisturbed["plain"].args.output_dir) / "checkpoint-4"
    other = lora_run(tmp_path, tiny_llama(seed=9), DROPOUT, config=hesso_config())
    with pytest.raises(CheckpointMismatchError, match="load the same base model anew"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_a_run_without_adapters_keeps_no_frozen_weights() -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    optimizer = wrap_optimizer(torch.optim.SGD(model.lm_head.parameters(), lr=0.1), model, hesso_config(), 10)
    assert optimizer.process.state_dict()["frozen"] == {}
    optimizer.process.prepare_gradients()
    assert not model.model.embed_tokens.weight.requires_grad


# -- gradients ---------------------------------------------------------------------------------------------------------


class Watched(HessoTrainer):
    """Notes at each step whether frozen weights have gradients after the backward pass."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        own = parameters_of(self.hesso_run.model)
        self.seen = [*getattr(self, "seen", []), own["model.layers.0.mlp.up_proj.weight"].grad is not None]
        return loss


@pytest.mark.parametrize(
    ("config", "scored"),
    [
        ({"saliency_batches": 2}, [1, 2, 3, 4]),  # scorings at steps 2 and 4 look two gradients back
        ({"saliency_batches": 1}, [2, 4]),
        ({"saliency": "magnitude"}, []),
        ({"cric": True, "cric_sampling_steps": 2, "cric_max_cycles": 1}, [1, 2, 3]),
    ],
)
def test_only_scored_steps_compute_gradients_of_frozen_weights(
    config: dict[str, Any], scored: list[int], tmp_path: Path
) -> None:
    run = lora_run(tmp_path, config=hesso_config(**config), trainer_class=Watched, max_steps=12)
    run.train()
    assert [step for step, found in enumerate(run.seen) if found] == scored
    assert not any(p.requires_grad for n, p in run.model.named_parameters() if "lora" not in n)


def test_gradients_are_accumulated_before_they_are_scored() -> None:
    scores = []
    batches = token_batches(4)
    for parts in (1, 2):
        model = tiny_lora().eval()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        config = hesso_config(warmup_steps=0, saliency_batches=1)
        optimizer = wrap_optimizer(torch.optim.SGD(trained, lr=0.1), model, config, 10)
        whole = torch.cat(batches)
        for micro in whole.chunk(parts):
            (model(input_ids=micro, labels=micro).loss / parts).backward()
        optimizer.observe_gradients()
        optimizer.process.state.sums.add_(optimizer.process._pending)
        scores.append(optimizer.process.run.judging.scores())
    for name, expected in scores[0].items():
        torch.testing.assert_close(scores[1][name], expected, rtol=1e-3, atol=1e-6)


def test_training_that_fails_leaves_no_weight_revealed(tmp_path: Path) -> None:
    run = lora_run(tmp_path, config=hesso_config(warmup_steps=2, saliency_batches=2))
    step, count = run.training_step, iter(range(12))

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        if next(count) == 1:
            raise KeyboardInterrupt
        return loss

    run.training_step = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.train()
    weights = [p for n, p in base_of(run.model).named_parameters() if "lora" not in n]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in weights)


_WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.pruning.weights.test_frozen import run_job
run_job(Path(sys.argv[1]), per_device=2)
"""


def run_job(folder: Path, per_device: int) -> None:
    """Train on a global batch of 4, and leave weights and decisions of every rank."""
    run = lora_run(folder, config=hesso_config(), per_device_train_batch_size=per_device, max_steps=10)
    run.train()
    weights = {name: parameter.detach() for name, parameter in parameters_of(run.hesso_run.model).items()}
    kept = run.hesso_optimizer.process.kept_units().to_dict()
    torch.save({"kept": kept, "weights": weights}, folder / f"rank{run.args.process_index}.pt")


def test_a_weight_that_only_another_process_used_is_averaged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process takes part for each weight, or the others wait for it."""
    shared = []
    monkeypatch.setattr(frozen, "world_size", lambda: 2)
    monkeypatch.setattr(frozen.dist, "all_reduce", lambda gradient: shared.append(gradient.add_(4.0)))
    weights = {name: torch.nn.Parameter(torch.ones(3), requires_grad=False) for name in ("used", "passed by")}
    held = FrozenWeights(weights, {})
    held.average_gradients_()
    assert not shared, "nothing is scored"
    held.reveal(True)
    weights["used"].sum().backward()
    held.average_gradients_()
    assert [weight.grad.tolist() for weight in weights.values()] == [[2.5] * 3, [2.0] * 3]


@pytest.mark.slow
def test_two_processes_average_gradients_that_ddp_does_not_know(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    run_job(folders[0], per_device=4)
    ran = launch(_WORKER, str(folders[1]), str(ROOT))
    assert ran.returncode == 0, ran.stderr[-2000:]
    one, first, second = (
        torch.load(path) for path in (folders[0] / "rank0.pt", *(folders[1] / f"rank{rank}.pt" for rank in (0, 1)))
    )
    assert one["kept"] == first["kept"] == second["kept"]
    for name, expected in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(first["weights"][name], second["weights"][name])
