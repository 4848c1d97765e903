"""Whole runs on a device that isn't the CPU: nothing is mixed up, all comes out as on the CPU, and in an ordinary step
the host waits for one thing more than with a plain trainer: the gradient's norm.

PYTHONPATH=. python tests/trainer/test_devices.py      # writes the budget of waits anew
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, default_data_collator

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.pruning import healing
from hesso_hf.trainer.progress import phase_text
from hesso_hf.trainer.replay import Replay
from tests.support import pretend_device
from tests.support.launches import Launches, kind_of
from tests.support.lora import tiny_lora
from tests.support.moe import moe_model
from tests.support.tiny import tiny_llama, tiny_phi
from tests.support.training import arguments, trainer
from tests.trainer.test_resume import check_equal
from tests.vocabulary.test_keep import blocks_of, tokenizer_of

BUDGET = Path(__file__).parent / "data" / "host_waits.json"
RATIO = {
    "pruning_ratio": 0.4, "warmup_steps": 2, "pruning_steps": 6, "pruning_periods": 2, "saliency_batches": 1,
    "calibration_examples": 2, "replay_share": 0.0,
}  # fmt: skip
CRIC = {"cric": True, "cric_sampling_steps": 2, "cric_max_cycles": 1}
HEALING_TOKENS = 100
ORDINARY = ("warmup", "shrinking", "shrinking, later periods", "recovery")
# What the device can't show, and a GPU alone does (`tests/pruning/test_cuda.py`, `make gpu`).
NOT_TRIED = (
    "autocast (bf16, fp16) and loss scales", "torch.compile", "fused kernels: AdamW, grouped matrices of experts",
    "streams and pinned memory: copies that the host doesn't wait for", "the device's own random state and memory",
    "several devices",
)  # fmt: skip


class Waits(TrainerCallback):
    """Counts for what the host waits in each step, by its kind: from the first micro-batch to the optimizer's end."""

    def __init__(self, run: Trainer) -> None:
        self.steps: dict[str, int] = {}
        self._run = run

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = getattr(self._run, "hesso_optimizer", None)
        self._kind = "plain" if optimizer is None else kind_of(optimizer)
        self._phase = self._phase_now()
        self._counts = Launches().__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._counts.__exit__(None, None, None)
        kind = self._kind if self._phase_now() == self._phase else f"{self._kind}, its last"  # what is shown then
        self.steps[kind] = max(self.steps.get(kind, 0), self._counts.syncs.total())

    def _phase_now(self) -> str:
        optimizer = getattr(self._run, "hesso_optimizer", None)
        return "" if optimizer is None else phase_text(optimizer.process)


def trained(folder: Path, model: Any, config: HessoConfig, resume: Any = None, **changes: Any) -> tuple[Any, Waits]:
    """Train on the device, where there is one."""
    run = trainer(folder / "run", model=model, config=config, **({"use_cpu": False, "max_steps": 11} | changes))
    waits = Waits(run)
    run.add_callback(waits)
    with mock.patch.object(healing, "HEALING_TOKENS", HEALING_TOKENS):
        run.train(resume_from_checkpoint=resume)
    return run, waits


def came_to(run: HessoTrainer, folder: Path) -> dict[str, Any]:
    """Save the smaller model; return what the run came to, without tensors on the device."""
    process = run.hesso_optimizer.process
    places = {value.device.type for value in (*run.model.parameters(), *process.scales.values())}
    run.save_model(str(folder / "small"))
    assert run.pruning_report is not None
    return {
        "places": places,
        "error": run.pruning_report.verification.fold_error,
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "kept": process.kept_units().to_dict(),
        "weights": dict(AutoModelForCausalLM.from_pretrained(folder / "small").state_dict()),
        "record": run.hesso_run.record(),
    }


def defaults(folder: Path) -> dict[str, Any]:
    """Healing, the basis, replay and compaction, with distillation, fewer tokens and the best model; resumed too."""
    tokenizer = tokenizer_of("byte_bpe")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = functools.partial(tiny_llama, vocab_size=len(tokenizer) + 5, **ids)
    data = blocks_of(tokenizer)
    config = HessoConfig(**(RATIO | {"replay_share": 0.5}), prune_vocabulary=True, distillation_alpha=0.5)
    options = {"processing_class": tokenizer, "data_collator": default_data_collator}
    train = functools.partial(
        trained, folder, config=config, data=data, options=options | {"eval_dataset": data.select(range(4))},
        save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=6, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", optim="sgd",  # Adam would make steps of gradients that are rounding alone
    )  # fmt: skip
    run, waits = train(model())
    check_equal(train(model(), resume=str(folder / "run" / "checkpoint-6"))[0], run)
    args = arguments(folder / "plain", use_cpu=False, max_steps=2)
    plain = Trainer(model(), args, train_dataset=data, **options)
    plains = Waits(plain)
    plain.add_callback(plains)
    plain.train()
    best = {"best": run.state.best_model_checkpoint is not None, "replay": isinstance(run.replay, Replay)}
    return came_to(run, folder) | {"waits": plains.steps | waits.steps} | best


class Collapses(HessoTrainer):
    """Its loss is far off once, by a constant."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + (30.0 if self.state.global_step == 5 else 0.0)


def path(folder: Path) -> dict[str, Any]:
    """CRIC by training steps, norms that centre, and a period that is given up."""
    config = HessoConfig(**(RATIO | CRIC), on_collapse="pause")
    run, _ = trained(folder, tiny_phi(), config, max_steps=22, trainer_class=Collapses, learning_rate=1e-3)
    return came_to(run, folder) | {"pauses": run._process.schedule.pauses}


def probe(folder: Path) -> dict[str, Any]:
    """CRIC by gradients alone, on an adapter."""
    return came_to(trained(folder, tiny_lora(), HessoConfig(**RATIO, **CRIC, cric_mode="probe"))[0], folder)


def experts(folder: Path) -> dict[str, Any]:
    """Experts go and channels of theirs, and a model is saved on the way."""
    config = HessoConfig(
        **(RATIO | {"pruning_ratio": 0.25, "structures": ["experts", "mlp_channels"], "export_at": [0.12]}),
    )
    run, _ = trained(folder, moe_model("mixtral", experts_implementation="eager"), config)
    rungs = run.hesso_run.ladder.folders.values()
    sizes = [AutoModelForCausalLM.from_pretrained(rung).num_parameters() for rung in rungs]
    return came_to(run, folder) | {"on the way": sizes}


SCENARIOS: tuple[Callable[[Path], dict[str, Any]], ...] = (defaults, path, probe, experts)


def tried(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {work.__name__: work for work in SCENARIOS}[name](Path(folder))


@pytest.fixture(scope="module")
def runs_of() -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """Return what a scenario comes to on the CPU, where it is proved what belongs together, and on the device."""
    return functools.cache(lambda name: (tried(name), pretend_device.apart(tried, name)))


def differing(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    return [
        f"{name}: {(value - found[name]).abs().max():.1e}"
        for name, value in expected.items()
        if not name.endswith("k_proj.bias")  # which changes nothing: its gradient is rounding
        if value.shape != found[name].shape or not torch.allclose(found[name], value, rtol=1e-3, atol=1e-4)
    ]


@pytest.mark.parametrize("name", [work.__name__ for work in SCENARIOS])
def test_a_run_stays_on_the_device_and_comes_to_what_it_does_on_the_cpu(runs_of: Any, name: str) -> None:
    expected, found = runs_of(name)
    assert (expected["places"], found["places"]) == ({"cpu"}, {"pretend"})
    assert found["error"] < 1e-4
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert found["kept"] == expected["kept"]
    assert found["weights"].keys() == expected["weights"].keys()
    assert not differing(expected["weights"], found["weights"])
    for which in ("target", "schedule", "vocabulary"):
        assert found["record"][which] == expected["record"][which]


def test_scenarios_are_what_their_names_say(runs_of: Any) -> None:
    found = runs_of("defaults")[1]
    assert found["best"]
    assert found["replay"]
    assert found["record"]["stream_basis"] is not None
    assert found["record"]["compaction"] is not None
    assert found["record"]["distillation"] is not None
    assert len(found["weights"]["lm_head.weight"]) == len(found["record"]["vocabulary"]["kept"])
    assert len(runs_of("path")[1]["pauses"]) == 1
    assert len(runs_of("experts")[1]["on the way"]) == 1


def test_an_ordinary_step_with_replay_and_distillation_waits_for_the_norm_alone(runs_of: Any) -> None:
    waits, budget = runs_of("defaults")[1]["waits"], json.loads(BUDGET.read_text(encoding="utf-8"))
    assert waits.keys() == budget.keys()
    assert {kind: count for kind, count in waits.items() if count > budget[kind]} == {}
    assert {kind: waits[kind] - waits["plain"] for kind in ORDINARY} == dict.fromkeys(ORDINARY, 1)


def main() -> None:
    waits = pretend_device.apart(tried, "defaults")["waits"]
    BUDGET.write_text(json.dumps(waits, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from tests.trainer import test_devices  # what another process is to find by name

    test_devices.main()
