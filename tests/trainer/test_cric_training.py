"""CRIC through the real trainer: budget, order of data, resuming, saving midway, processes, and bad input."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.recipe import parse_recipe
from hesso_hf.errors import CheckpointMismatchError, HessoError
from hesso_hf.hf_models.tiny_model import logits_of, relative_error
from hesso_hf.trainer.measure import Measurer
from tests.support import ROOT, forks
from tests.support.checks import assert_same, check_equal, propagated
from tests.support.tiny import tiny_llama
from tests.support.training import arguments, blocks, hesso_config, logged, trainer
from tests.trainer.test_distributed import launch

WARMUP, SAMPLES, CYCLES = 2, 3, 3
CRIC = {"cric": True, "cric_sampling_steps": SAMPLES, "cric_max_cycles": CYCLES, "cric_tolerance": 0.0}
FIRST, END, TOTAL = WARMUP, WARMUP + SAMPLES * CYCLES, 26  # sampling steps are FIRST to END - 1
MODES = ["path", "probe"]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Let pytest see this package's log."""
    with propagated(caplog):
        yield caplog


class Each(TrainerCallback):
    """Calls a function with the number of steps done after every step, or before."""

    def __init__(self, end: Callable[[int], Any] | None = None, begin: Callable[[int], Any] | None = None) -> None:
        self.end, self.begin = end, begin

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begin is not None:
            self.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.end is not None:
            self.end(state.global_step)


def cric_run(folder: Path, mode: str = "path", config: dict[str, Any] | None = None, **changes: Any) -> HessoTrainer:
    """A run with three cycles of three samples after two steps, on a model with dropout."""
    options: dict[str, Any] = {"max_steps": TOTAL, "learning_rate": 1e-3, "model": tiny_llama(attention_dropout=0.2)}
    settings = hesso_config(cric_mode=mode, **(CRIC | (config or {})))
    return trainer(folder, config=settings, **(options | changes))


def saved_each_step(folder: Path, mode: str) -> HessoTrainer:
    """The same with a checkpoint every step."""
    return cric_run(folder, mode, save_strategy="steps", save_steps=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HessoTrainer]:
    """Whole runs of either mode with all their checkpoints."""
    runs = {}
    for mode in MODES:  # one after the other: making a trainer seeds the generators
        runs[mode] = saved_each_step(tmp_path_factory.mktemp(mode), mode)
        runs[mode].train()
    return runs


def violating(run: HessoTrainer) -> dict[str, list[int]]:
    """Sizes of the violating sets."""
    return {name: found["violating"] for name, found in run._process.cric_report()["structures"].items()}


def decisions(run: HessoTrainer) -> Any:
    """The decision and how CRIC came to it, without the scores, as plain JSON types."""
    report = run._process.cric_report()
    structures = {
        name: {key: value for key, value in found.items() if key != "paths"}
        for name, found in report["structures"].items()
    }
    kept = run._process.kept_units().to_dict()
    return json.loads(json.dumps({**report, "structures": structures, "kept": kept}))


def check_budget(run: HessoTrainer) -> None:
    """Exactly the units of the configuration are left."""
    assert run._process.finished
    kept = run._process.kept_units().kept
    assert [len(layer) for layer in kept["attention_heads"]] == [2, 2]
    assert [len(layer) for layer in kept["mlp_channels"]] == [28, 28]
    assert [len(layer) for layer in kept["embedding_channels"]] == [48]


# -- the whole job -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_prunes_the_budget_and_saves_a_small_stock_model_with_a_report(
    undisturbed: dict[str, HessoTrainer], mode: str, tmp_path: Path
) -> None:
    run = undisturbed[mode]
    check_budget(run)
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(small).__module__.startswith("transformers.")
    assert (small.config.num_key_value_heads, small.config.intermediate_size, small.config.hidden_size) == (2, 28, 48)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    assert relative_error(logits_of(small, ids), logits_of(run.model.eval(), ids)) <= 1e-5
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    cric = report["cric"]
    assert (cric["mode"], cric["samples_per_cycle"], cric["max_cycles"]) == (mode, SAMPLES, CYCLES)
    assert 2 <= cric["cycles"] <= CYCLES
    assert cric["samples"] == SAMPLES * cric["cycles"]
    assert cric["ended"]
    first = {"attention_heads": 2, "mlp_channels": 32, "embedding_channels": 12}
    for name, found in cric["structures"].items():
        assert found["first"] == found["violating"][0] == first[name]
        assert len(found["violating"]) == cric["cycles"]
        assert found["num_corrected"] == sum(len(units) for units in found["corrected"].values())
        assert {k: len(v) for k, v in found["corrected"].items()} == {
            k: len(v) for k, v in found["replaced_by"].items()
        }
        kept = report["kept_units"][name]["kept"]
        for layer, units in found["corrected"].items():
            assert set(units) <= set(kept[int(layer)]), name  # corrected units stay
        for layer, units in found["replaced_by"].items():
            assert not set(units) & set(kept[int(layer)]), name
    assert any(found["num_corrected"] for found in cric["structures"].values())


def test_the_small_models_weights_are_the_kept_units(undisturbed: dict[str, HessoTrainer], tmp_path: Path) -> None:
    """Channels of the MLP, compared by hand; embedding channels are folded in the export, so only whole rows' norms."""
    run = undisturbed["path"]
    decided = {name: units.clone() for name, units in run._process.trial.cric.decided.items()}
    kept = run._process.kept_units().kept
    for name, units in decided.items():
        left = [(~layer).nonzero().flatten().tolist() for layer in units]
        assert [list(layer) for layer in kept[name]] == left, name
    for index, layer in enumerate(run.model.model.layers):
        norms = layer.mlp.down_proj.weight.norm(dim=0)
        assert norms.nonzero().flatten().tolist() == list(kept["mlp_channels"][index])
    assert run.model.model.embed_tokens.weight.norm(dim=0).nonzero().flatten().tolist() == list(
        kept["embedding_channels"][0]
    )


def test_a_run_without_cric_reports_none(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "small"))
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert "cric" in report
    assert report["cric"] is None
    assert run._process.cric_report() is None
    assert 1.0 not in logged(run, "hesso/phase")


def test_phases_are_logged(undisturbed: dict[str, HessoTrainer]) -> None:
    run = undisturbed["path"]
    cycles = run._process.cric_report()["cycles"]
    sampling = SAMPLES * cycles
    # the phase of the step that comes next
    expected = [0.0] * (WARMUP - 1) + [1.0] * sampling + [2.0] * 5 + [3.0] * (TOTAL - WARMUP - sampling - 5 + 1)
    assert logged(run, "hesso/phase") == expected
    assert set(logged(run, "hesso/pruned_mlp_channels")[: WARMUP + sampling]) == {0.0}
    assert logged(undisturbed["probe"], "hesso/phase") == [0.0] + [2.0] * 5 + [3.0] * (TOTAL - 6)


def test_pruning_begins_as_soon_as_no_newcomers_are_left(tmp_path: Path) -> None:
    run = cric_run(tmp_path, config={"cric_tolerance": 1000})
    run.train()
    check_budget(run)
    assert run._process.cric_report()["cycles"] == 1
    assert run._process.schedule.end == WARMUP + SAMPLES + 5
    assert logged(run, "hesso/phase")[:6] == [0.0, 1.0, 1.0, 1.0, 2.0, 2.0]


def test_every_cycle_returns_weights_optimizer_and_random_state_bit_for_bit(tmp_path: Path) -> None:
    run, seen = cric_run(tmp_path), {}

    def look(step: int) -> None:
        seen[step] = {
            "weights": {name: p.detach().clone() for name, p in run.model.named_parameters()},
            "state": {
                name: {key: torch.as_tensor(value).clone() for key, value in run.hesso_optimizer.state[p].items()}
                for name, p in run.model.named_parameters()
            },
            "rng": [torch.get_rng_state(), random.random(), np.random.rand()],
        }

    def stir(step: int) -> None:
        random.random(), np.random.rand()

    run.add_callback(Each(look, stir))
    run.train()
    cycles = run._process.cric_report()["cycles"]
    assert cycles >= 2
    for cycle in range(cycles):
        end = WARMUP + SAMPLES * (cycle + 1)
        for part in ("weights", "state"):
            assert_same(seen[end][part], seen[WARMUP][part])
        assert not torch.equal(seen[end - 1]["weights"]["lm_head.weight"], seen[WARMUP]["weights"]["lm_head.weight"])
    ends = [seen[WARMUP + SAMPLES * (cycle + 1)]["rng"] for cycle in range(cycles)]
    for end in ends[1:]:
        assert_same(end, ends[0])


@pytest.mark.parametrize("mode", MODES)
def test_data_and_learning_rates_are_those_of_the_plain_trainer(tmp_path: Path, mode: str) -> None:
    """Also over the end of an epoch and with a schedule that isn't linear."""
    seen: dict[str, list[Any]] = {"plain": [], "hesso": []}

    class Plain(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen["plain"].append(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    class Recorded(HessoTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen["hesso"].append(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    changes = {"lr_scheduler_type": "cosine", "warmup_steps": 3, "max_steps": TOTAL}
    data = blocks(24)  # an epoch ends with step 6, in the second cycle
    run = cric_run(tmp_path / "hesso", mode, trainer_class=Recorded, data=data, **changes)
    run.train()
    plain = Plain(
        model=tiny_llama(), args=arguments(tmp_path, **(changes | {"learning_rate": 1e-3})), train_dataset=data
    )
    plain.train()
    assert len(seen["plain"]) == TOTAL
    assert seen["hesso"] == seen["plain"]
    assert logged(run, "learning_rate") == logged(plain, "learning_rate")
    check_budget(run)


# -- resuming ----------------------------------------------------------------------------------------------------------


def resume(undisturbed: HessoTrainer, folder: Path, mode: str, step: int) -> HessoTrainer:
    """Go on from one checkpoint of the undisturbed run."""
    shutil.copytree(Path(undisturbed.args.output_dir) / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    run = saved_each_step(folder, mode)
    run.args.save_strategy = "no"
    run.args.save_steps = TOTAL
    run.train(resume_from_checkpoint=True)
    return run


# before sampling, inside and at the ends of all three cycles, in both periods, and after them
POINTS = [*range(FIRST - 1, END + 1), END + 1, END + 3, END + 5, END + 7]
EDGES = [FIRST - 1, FIRST, FIRST + 2, FIRST + SAMPLES, FIRST + 2 * SAMPLES, END, END + 1, END + 5]  # one of each phase


@pytest.mark.parametrize(
    "step", [*EDGES, *(pytest.param(step, marks=pytest.mark.slow) for step in POINTS if step not in EDGES)]
)
def test_interrupted_in_path_mode_equals_uninterrupted(
    undisturbed: dict[str, HessoTrainer], tmp_path: Path, step: int
) -> None:
    check_equal(resume(undisturbed["path"], tmp_path, "path", step), undisturbed["path"])


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8])
def test_interrupted_in_probe_mode_equals_uninterrupted(
    undisturbed: dict[str, HessoTrainer], tmp_path: Path, step: int
) -> None:
    check_equal(resume(undisturbed["probe"], tmp_path, "probe", step), undisturbed["probe"])


def test_a_checkpoint_of_another_cric_setting_is_refused(undisturbed: dict[str, HessoTrainer], tmp_path: Path) -> None:
    checkpoint = str(Path(undisturbed["path"].args.output_dir) / "checkpoint-4")
    for config, name in (({"cric_max_cycles": 2}, "cric_max_cycles"), ({"on_collapse": "pause"}, "on_collapse")):
        with pytest.raises(CheckpointMismatchError, match=f"`{name}`"):
            cric_run(tmp_path, config=config).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(CheckpointMismatchError, match="`cric_mode` = 'path', this run has 'probe'"):
        cric_run(tmp_path, "probe").train(resume_from_checkpoint=checkpoint)


_TRAIN = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.trainer.test_cric_training import Each, saved_each_step
from hesso_hf.export.checkpoint_state import last_checkpoint

def wait(step):
    if step == int(sys.argv[3]):
        print("THERE", flush=True)
        time.sleep(120)

folder = Path(sys.argv[1])
run = saved_each_step(folder, "path")
run.add_callback(Each(begin=wait))
run.train(resume_from_checkpoint=last_checkpoint(folder) is not None)
torch.save({n: p.detach() for n, p in run.model.named_parameters()}, folder / "final.pt")
"""


def test_kill_in_the_middle_of_a_cycle(undisturbed: dict[str, HessoTrainer], tmp_path: Path) -> None:
    middle = WARMUP + SAMPLES + 2  # two samples of the second cycle are taken
    run = forks.start(_TRAIN, str(tmp_path), str(ROOT), str(middle))
    while "THERE" not in run.output("stdout"):
        assert run.poll() is None, "the run ended early"
        time.sleep(0.01)
    run.kill()
    assert (tmp_path / f"checkpoint-{middle}").exists()
    assert not (tmp_path / "final.pt").exists()
    done = forks.run(_TRAIN, str(tmp_path), str(ROOT), "-1")
    assert done.returncode == 0, done.stderr[-2000:]
    final = torch.load(tmp_path / "final.pt", weights_only=True)
    for name, parameter in undisturbed["path"].model.named_parameters():
        assert torch.equal(final[name], parameter), name


# -- training arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_decides_alike(tmp_path: Path, mode: str) -> None:
    runs = [
        cric_run(tmp_path / "whole", mode, model=tiny_llama()),
        cric_run(
            tmp_path / "parts", mode, model=tiny_llama(), per_device_train_batch_size=2, gradient_accumulation_steps=2
        ),
    ]
    for run in runs:
        run.train()
        check_budget(run)
    assert decisions(runs[0]) == decisions(runs[1])
    for ours, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 2e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"max_grad_norm": 0.0}, {"gradient_checkpointing": True}, {"optim": "adafactor"}],
    ids=["bf16", "no clipping", "checkpointing", "adafactor"],
)
def test_training_arguments_are_honoured(tmp_path: Path, mode: str, changes: dict[str, Any]) -> None:
    run = cric_run(tmp_path, mode, **changes)
    run.train()
    check_budget(run)
    assert run._process.cric_report()["ended"]
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_scores_are_of_the_gradient_before_clipping(tmp_path: Path) -> None:
    found = []
    for clip in (1e-6, 0.0):
        run = cric_run(tmp_path, "path", max_grad_norm=clip, learning_rate=0.0, weight_decay=0.0)
        run.train()
        found.append(run._process.cric_report())
    assert found[0] == found[1]


@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_the_probe_leaves_weights_gradients_and_random_state_as_they_were(tmp_path: Path, warmup: int) -> None:
    checked = []

    run = cric_run(tmp_path, "probe", {"warmup_steps": warmup})
    plain = run.hesso_run.probe

    def probe() -> None:
        before = [p.detach().clone() for p in run.model.parameters()]
        states = (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)[1].tolist())
        plain()
        assert torch.equal(states[0], torch.get_rng_state())
        assert random.getstate() == states[1]
        assert np.random.get_state(legacy=True)[1].tolist() == states[2]
        assert_same([p.detach() for p in run.model.parameters()], before)
        assert all(p.grad is None for p in run.model.parameters())
        checked.append(run._process.step)

    run.hesso_run.probe = probe  # type: ignore[method-assign]
    run.train()
    assert checked == [warmup]
    check_budget(run)


def test_a_probe_leaves_the_random_state_of_pythons_and_numpys_collators(tmp_path: Path) -> None:
    def noisy(examples: list[Any]) -> dict[str, torch.Tensor]:
        random.random(), np.random.rand(), torch.rand(1)
        return {key: torch.tensor([row[key] for row in examples]) for key in ("input_ids", "labels")}

    run = cric_run(tmp_path, "probe", options={"data_collator": noisy})
    states: dict[str, Any] = {}
    plain = run.hesso_run.probe

    def probe() -> None:
        states["before"] = (random.getstate(), np.random.get_state(legacy=True)[1].tolist())
        plain()
        states["after"] = (random.getstate(), np.random.get_state(legacy=True)[1].tolist())

    run.hesso_run.probe = probe  # type: ignore[method-assign]
    run.train()
    assert states["before"] == states["after"]


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_the_probe_sees_the_model_as_training_does(
    tmp_path: Path, warmup: int, evaluated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its dropout, whether steps or an evaluation came before."""
    modes, plain = [], Measurer._loss

    def watched(self: Measurer, model: Any, batch: Any) -> torch.Tensor:
        modes.append(model.training)
        return plain(self, model, batch)

    monkeypatch.setattr(Measurer, "_loss", watched)
    changes = {"eval_strategy": "steps", "eval_steps": 1, "options": {"eval_dataset": blocks(4)}} if evaluated else {}
    config = {"warmup_steps": warmup, "quality_examples": 0}  # which is measured without dropout
    run = cric_run(tmp_path, "probe", config, max_steps=8, **changes)
    run.train()
    assert len(modes) >= 2 * SAMPLES
    assert all(modes)


def test_the_probe_trains_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Until the first unit shrinks, weights are those of a run without CRIC."""
    found = {}
    for name, config in {"probe": CRIC | {"cric_mode": "probe"}, "none": {}}.items():
        run = trainer(
            tmp_path, model=tiny_llama(attention_dropout=0.2), config=hesso_config(**config), max_steps=TOTAL,
            learning_rate=1e-3,
        )  # fmt: skip
        run.train()
        found[name] = [logged(run, "loss"), logged(run, "grad_norm")]
    for probed, plain in zip(found["probe"], found["none"], strict=True):
        assert probed[: WARMUP + 1] == plain[: WARMUP + 1]  # the first period's first step included


@pytest.mark.parametrize("mode", MODES)
def test_the_snapshot_may_lie_on_either_side(undisturbed: dict[str, HessoTrainer], tmp_path: Path, mode: str) -> None:
    run = cric_run(tmp_path, mode, {"cric_snapshot": "device"})
    run.train()
    assert undisturbed[mode].hesso_config.cric_snapshot == "cpu"
    check_equal(run, undisturbed[mode])


@pytest.mark.parametrize("bad", [FIRST, FIRST + 1, FIRST + 2, FIRST + 3])
def test_a_loss_that_is_not_finite_in_a_sampling_step_is_skipped(
    tmp_path: Path, bad: int, log: pytest.LogCaptureFixture
) -> None:
    class Poisoned(HessoTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, *args, **kwargs)
            return loss * float("nan") if self.state.global_step == bad and model.training else loss

    run = cric_run(tmp_path, trainer_class=Poisoned)
    run.train()
    assert f"step {bad}: the gradient's norm is nan; the step is skipped" in log.text
    check_budget(run)
    assert run._process.step == TOTAL - 1
    report = run._process.cric_report()
    assert report["samples"] == SAMPLES * report["cycles"]
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


# -- saving midway -----------------------------------------------------------------------------------------------------


def test_a_save_in_the_middle_of_a_cycle_writes_the_weights_from_before_it(
    undisturbed: dict[str, HessoTrainer], tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    run, before = cric_run(tmp_path / "run"), {}

    def look(step: int) -> None:
        if step == WARMUP:
            before.update({name: p.detach().clone() for name, p in run.model.named_parameters()})
        if step in (WARMUP + 1, WARMUP + 2, WARMUP + SAMPLES, WARMUP + SAMPLES + 2):
            live = {name: p.detach().clone() for name, p in run.model.named_parameters()}
            run.save_model(str(tmp_path / f"at-{step}"))
            assert_same({name: p.detach() for name, p in run.model.named_parameters()}, live)
        if step == WARMUP + SAMPLES + 2:
            assert not torch.equal(live["lm_head.weight"], before["lm_head.weight"])

    run.add_callback(Each(look))
    run.train()
    for step in (WARMUP + 1, WARMUP + 2, WARMUP + SAMPLES, WARMUP + SAMPLES + 2):
        saved = load_file(tmp_path / f"at-{step}" / "model.safetensors")
        assert saved.keys() == before.keys()
        assert_same(saved, {name: before[name] for name in saved})
        assert not (tmp_path / f"at-{step}" / "pruning_report.json").exists()
    assert "the dense model is saved" in log.text
    assert "CRIC has the weights on trial: those from before it are saved" in log.text
    check_equal(run, undisturbed["path"])


def test_a_save_that_fails_midway_puts_the_trial_back(tmp_path: Path, undisturbed: dict[str, HessoTrainer]) -> None:
    run = cric_run(tmp_path / "run")
    (tmp_path / "file").write_text("no folder")

    def look(step: int) -> None:
        if step == WARMUP + 2:
            live = {name: p.detach().clone() for name, p in run.model.named_parameters()}
            with pytest.raises(OSError, match="file"):
                run.save_model(str(tmp_path / "file" / "below"))
            assert_same({name: p.detach() for name, p in run.model.named_parameters()}, live)

    run.add_callback(Each(look))
    run.train()
    check_equal(run, undisturbed["path"])


# -- two processes -----------------------------------------------------------------------------------------------------

_WORKER = """
import faulthandler, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
faulthandler.dump_traceback_later(300, exit=True)  # ranks that disagree may wait for ever
torch.set_num_threads(1)
from tests.trainer.test_cric_training import distributed_job
for mode in ("path", "probe"):
    distributed_job(Path(sys.argv[1]), mode, per_device=2)
"""


def distributed_job(folder: Path, mode: str, per_device: int) -> None:
    """Train on a global batch of 4; leave weights, decisions and local losses of every rank."""
    losses: list[float] = []

    class Recorded(HessoTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            losses.append(float(loss := super().training_step(*args, **kwargs)))
            return loss

    run = cric_run(
        folder / mode, mode, model=tiny_llama(), trainer_class=Recorded, per_device_train_batch_size=per_device,
        ddp_timeout=200,
    )  # fmt: skip
    run.train()
    model = run.accelerator.unwrap_model(run.model)
    torch.save(
        {
            "decisions": json.dumps(decisions(run), sort_keys=True),
            "weights": {name: parameter.detach() for name, parameter in model.named_parameters()},
            "losses": losses,
        },
        folder / f"{mode}-rank{run.args.process_index}.pt",
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = launch(_WORKER, str(folder), str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(two_ranks: Path, tmp_path: Path, mode: str) -> None:
    distributed_job(tmp_path, mode, per_device=4)
    alone = torch.load(tmp_path / f"{mode}-rank0.pt", weights_only=True)
    ranks = [torch.load(two_ranks / f"{mode}-rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["losses"] != ranks[1]["losses"]  # each its own data
    assert ranks[0]["decisions"] == ranks[1]["decisions"] == alone["decisions"]
    for name, weight in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        error = (ranks[0]["weights"][name] - weight).abs().max() / weight.abs().max()
        assert error <= 1e-5, (name, float(error))


_PAUSE = """
import faulthandler, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
faulthandler.dump_traceback_later(300, exit=True)  # ranks that disagree may wait for ever
torch.set_num_threads(1)
from tests.trainer.test_cric_training import pausing_job
for case in sys.argv[3:]:
    pausing_job(Path(sys.argv[1]), case)
"""


def pausing_job(folder: Path, case: str) -> None:
    """A collapse that one process alone sees in its own loss; constants leave gradients as they are."""

    class Offset(HessoTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss, rank, step = (
                super().compute_loss(model, *args, **kwargs),
                self.args.process_index,
                self.state.global_step,
            )
            if case == "level":  # rank 1's losses always lie 20 higher, and the collapse is everybody's
                return loss + 20.0 * rank + (7.0 if step == 4 else 0.0)
            return loss + (30.0 * rank if step == 4 else 0.0)  # rank 1 alone

    run = trainer(
        folder, config=hesso_config(on_collapse="pause", pruning_steps=6, collapse_threshold=2.0), max_steps=24,
        trainer_class=Offset, per_device_train_batch_size=2, ddp_timeout=200, learning_rate=1e-3,
    )  # fmt: skip
    run.train()
    model = run.accelerator.unwrap_model(run.model)
    pauses = list(run._process.schedule.pauses)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    kept = run._process.kept_units().to_dict()
    torch.save({"pauses": pauses, "kept": kept, "weights": weights}, folder / f"{case}-rank{run.args.process_index}.pt")


def test_both_processes_pause_at_the_same_step(tmp_path: Path) -> None:
    cases = ["one", "level"]
    done = launch(_PAUSE, str(tmp_path), str(ROOT), *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    for case in cases:
        ranks = [torch.load(tmp_path / f"{case}-rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert ranks[0]["pauses"] == ranks[1]["pauses"] == [4]
        assert ranks[0]["kept"] == ranks[1]["kept"]
        assert [len(layer) for layer in ranks[0]["kept"]["mlp_channels"]["kept"]] == [28, 28]
        assert_same(ranks[0]["weights"], ranks[1]["weights"])


# -- bad input and recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cric": "yes"}, r"`cric` \('yes'\)"),
        ({"cric": 1}, r"`cric` \(1\)"),
        ({"cric": "maybe"}, r"`cric` \('maybe'\) must be true, false or 'auto'"),
        ({"cric_mode": "walk"}, r"`cric_mode` \('walk'\).*path.*probe"),
        ({"cric_mode": None}, r"`cric_mode` \(None\)"),
        ({"cric_mode": ["path"]}, r"`cric_mode` \(\['path'\]\)"),
        ({"cric_sampling_steps": 1}, r"`cric_sampling_steps` \(1\).*at least 2"),
        ({"cric_sampling_steps": 2.0}, r"`cric_sampling_steps` \(2.0\)"),
        ({"cric_sampling_steps": "4"}, r"`cric_sampling_steps` \('4'\)"),
        ({"cric_sampling_steps": True}, r"`cric_sampling_steps` \(True\)"),
        ({"cric_max_cycles": 0}, r"`cric_max_cycles` \(0\).*at least 1"),
        ({"cric_max_cycles": -2}, r"`cric_max_cycles` \(-2\)"),
        ({"cric_max_cycles": 2.5}, r"`cric_max_cycles` \(2.5\)"),
        ({"cric_tolerance": -0.1}, r"`cric_tolerance` \(-0.1\)"),
        ({"cric_tolerance": float("nan")}, r"`cric_tolerance` \(nan\)"),
        ({"cric_tolerance": float("inf")}, r"`cric_tolerance` \(inf\)"),
        ({"cric_tolerance": "2e-2"}, r"`cric_tolerance` \('2e-2'\) must be a number"),
        ({"cric_tolerance": None}, r"`cric_tolerance` \(None\)"),
        ({"cric_snapshot": "disk"}, r"`cric_snapshot` \('disk'\).*cpu.*device"),
        ({"cric_snapshot": True}, r"`cric_snapshot` \(True\)"),
        ({"collapse_threshold": 0}, r"`collapse_threshold` \(0\).*positive"),
        ({"collapse_threshold": -4.0}, r"`collapse_threshold` \(-4.0\)"),
        ({"collapse_threshold": float("nan")}, r"`collapse_threshold` \(nan\)"),
        ({"collapse_threshold": "4"}, r"`collapse_threshold` \('4'\) must be a number"),
        ({"collapse_threshold": True}, r"`collapse_threshold` \(True\)"),
        ({"on_collapse": "stop"}, r"`on_collapse` \('stop'\).*warn.*pause"),
        ({"on_collapse": None}, r"`on_collapse` \(None\)"),
        ({"cric": False, "cric_sampling_steps": 4}, r"`cric_sampling_steps` \(4\).*`cric` \(False\)"),
        ({"cric": False, "cric_max_cycles": 3}, r"`cric_max_cycles` \(3\).*`cric` \(False\)"),
    ],
    ids=str,
)
def test_bad_values_are_refused_with_argument_and_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HessoError, match=message):
        HessoConfig(**{"pruning_ratio": 0.5, "cric": True, **values})


@pytest.mark.parametrize("setting", [{"cric_mode": "probe"}, {"cric_tolerance": 1.0}])
def test_settings_that_only_cric_reads_are_refused_without_it(setting: dict[str, Any]) -> None:
    for cric in (False, "auto"):
        with pytest.raises(HessoError, match=rf"`{next(iter(setting))}`.*`cric` \({cric!r}\)"):
            HessoConfig(0.5, cric=cric, **setting)


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        ({"cric_sampling_steps": None, "cric_max_cycles": None}, 9, r"\(2, the least\) .* = 4 exceed the 1 step .*9"),
        ({"cric_sampling_steps": 5, "cric_max_cycles": 4}, 26, r"`cric_sampling_steps` \(5\) times `cric_max_cycles` "
         r"\(4\) = 20 exceed the 9 steps .*run's 26;"),
        ({"cric_sampling_steps": 8, "cric_max_cycles": None}, 20, r"\(8\) times .* = 16 exceed the 6 steps"),
        ({"cric_sampling_steps": None, "cric_max_cycles": 5}, 20, r"\(2, the least\) .* \(5\) = 10 exceed the 6 steps"),
    ],
)  # fmt: skip
def test_sampling_that_does_not_fit_fails_before_the_first_step(
    tmp_path: Path, config: dict[str, Any], steps: int, message: str
) -> None:
    run = cric_run(tmp_path, config=config, max_steps=steps)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(HessoError, match=message):
        run.train()
    assert run.state.global_step == 0
    assert_same([p.detach() for p in run.model.parameters()], before)


def test_a_probe_needs_no_steps(tmp_path: Path) -> None:
    run = cric_run(tmp_path, "probe", {"cric_max_cycles": 4, "cric_sampling_steps": 8}, max_steps=7)
    run.train()
    check_budget(run)
    assert run._process.cric_report()["samples_per_cycle"] == 8


EXPECTED = {
    "cric": True, "cric_mode": "probe", "cric_sampling_steps": 4, "cric_max_cycles": 3, "cric_tolerance": 0.05,
    "cric_snapshot": "device", "collapse_threshold": 2.5, "on_collapse": "pause",
}  # fmt: skip


def test_options_from_a_recipe_and_from_flags(tmp_path: Path) -> None:
    options = "\n".join(f"  {name}: {json.dumps(value)}" for name, value in EXPECTED.items())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: bundled\ndataset: python-docs\nhesso:\n  pruning_ratio: 0.5\n{options}\n")
    assert parse_recipe(str(recipe)).hesso == HessoConfig(0.5, **EXPECTED)
    changed = parse_recipe(str(recipe), ["--hesso_cric_max_cycles", "5", "--hesso_on_collapse", "warn"]).hesso
    assert changed == HessoConfig(0.5, **(EXPECTED | {"cric_max_cycles": 5, "on_collapse": "warn"}))
    base = ["--model", "bundled", "--dataset", "python-docs", "--hesso_pruning_ratio", "0.5"]
    flags = [text for name, value in EXPECTED.items() for text in (f"--hesso_{name}", str(value))]
    assert parse_recipe(None, base + flags).hesso == HessoConfig(0.5, **EXPECTED)
    few = parse_recipe(None, [*base, "--hesso_cric", "true", "--hesso_cric_max_cycles", "3"]).hesso
    assert few == HessoConfig(0.5, cric=True, cric_max_cycles=3)
    with pytest.raises(HessoError, match=r"`cric_max_cycles` \(3\)"):
        parse_recipe(None, [*base, "--hesso_cric_max_cycles", "3"])


# -- what training may end or meet on the way --------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self._step


def test_training_that_ends_within_a_cycle_leaves_the_weights_from_before_it(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    runs = {}
    for last in (2, 4):  # one after the other: making a trainer seeds the generators
        runs[last] = cric_run(tmp_path / str(last))
        runs[last].add_callback(Stop(last))
        runs[last].train()
    before, run = runs.values()
    assert run.hesso_optimizer.process.on_trial is not None
    assert "ended in the middle of a CRIC cycle" in log.text
    for ours, theirs in zip(run.model.parameters(), before.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_probe_leaves_out_examples_without_labels(tmp_path: Path) -> None:
    data = blocks().to_list()
    spread = range(0, len(data), len(data) // 16)
    for index in (spread[0], spread[5]):
        data[index]["labels"] = [-100] * len(data[index]["labels"])
    run = cric_run(tmp_path / "some", "probe", data=type(blocks()).from_list(data), num_train_epochs=1)
    run.train()
    check_budget(run)
    assert all(size > 0 for size in violating(run)["mlp_channels"][:1])

    none = [row | {"labels": [-100] * len(row["labels"])} if i in spread else row for i, row in enumerate(data)]
    run = cric_run(tmp_path / "none", "probe", data=type(blocks()).from_list(none))
    with pytest.raises(HessoError, match="no example of `train_dataset` gives a finite loss"):
        run.train()
