"""Every field of `TrainingArguments`: with nothing to prune what comes out is the stock Trainer's, bit for bit, and a
pruning run goes through to its end under the same arguments. What differs is in docs/training.md.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hesso_hf import HessoError, HessoTrainer
from tests.support import ROOT, forks, fsdp_cpu
from tests.support.tiny import tiny_llama
from tests.support.training import arguments, blocks, hesso_config

WHOLE = {"num_key_value_heads": 3, "intermediate_size": 44, "hidden_size": 60}  # of the tiny model: nothing goes
PRUNED = {"num_key_value_heads": 2, "intermediate_size": 28, "hidden_size": 48}
EPOCH = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 5}
STEPS = {"eval_strategy": "steps", "eval_steps": 2}

# By what they are about; each is tried as one.
CASES: dict[str, dict[str, Any]] = {
    "part of an epoch": {"max_steps": -1, "num_train_epochs": 0.6},
    "an epoch without its rest": {**EPOCH, "dataloader_drop_last": True},
    "accumulation": {**EPOCH, "gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    "order": {"data_seed": 5, "accelerator_config": {"use_seedable_sampler": False}},
    "seed": {"seed": 5, "full_determinism": True, "neftune_noise_alpha": 5.0},
    "order by length": {"train_sampling_strategy": "group_by_length", "length_column_name": "size"},
    "no order": {"train_sampling_strategy": "sequential", "use_cache": True},
    "columns": {"remove_unused_columns": False, "label_names": ["labels"]},
    "workers": {
        "dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_multiprocessing_context": "fork",
        "dataloader_in_order": False, "dataloader_pin_memory": False,
    },
    "workers that stay": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "AdamW": {
        "learning_rate": 3e-3, "weight_decay": 0.4, "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-3,
        "optim": "adamw_torch",
    },
    "options of an optimizer": {"optim": "rmsprop", "optim_args": "momentum=0.5, alpha=0.9"},
    "optimizer of low rank": {
        "optim": "galore_adamw", "optim_target_modules": ["mlp", "q_proj"], "optim_args": "rank=3"
    },
    "learning rate": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "warm-up": {"warmup_steps": 2, "max_grad_norm": 0.3, "label_smoothing_factor": 0.2},
    "bfloat16": {"bf16": True, "bf16_full_eval": True, **STEPS},
    "checkpointed activations": {
        "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}
    },
    "checkpointed gradients": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}
    },
    "memory": {"torch_empty_cache_steps": 1, "skip_memory_metrics": False, "debug": "underflow_overflow"},
    "log": {
        "logging_strategy": "steps", "logging_steps": 3, "logging_first_step": True, "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
    },
    "evaluation": {
        **STEPS, "eval_delay": 1, "eval_on_start": True, "per_device_eval_batch_size": 3, "eval_accumulation_steps": 1,
        "eval_do_concat_batches": False, "include_for_metrics": ["loss"], "eval_use_gather_object": True,
    },
    "evaluation by batches": {**STEPS, "batch_eval_metrics": True},
    "evaluation of the loss": {**STEPS, "prediction_loss_only": True, "fp16_full_eval": True},
    "best": {
        **STEPS, "save_strategy": "best", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
        "greater_is_better": True, "save_total_limit": 1,
    },
    "checkpoints": {
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "save_on_each_node": True,
        "save_only_model": True, "enable_jit_checkpoint": True,
    },
}  # fmt: skip
PROCESSES: dict[str, Any] = {
    "ddp_backend": "gloo", "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 1, "ddp_broadcast_buffers": True,
    "ddp_static_graph": True, "ddp_timeout": 300,
}  # fmt: skip
SLOW = "workers that stay"  # five seconds, until they have gone
TRIED = [pytest.param(case, marks=pytest.mark.slow) if case == SLOW else case for case in CASES]
RESUMED: dict[str, dict[str, Any]] = {
    "as it was": {},
    "from the data's beginning": {"ignore_data_skip": True},
    "with its callbacks": {"restore_callback_states_from_checkpoint": True},
}
ELSEWHERE = {
    "every test": ("max_steps", "output_dir", "use_cpu", "report_to", "disable_tqdm"),
    "test_restart.py": ("auto_find_batch_size",),
    "test_trainer.py": ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    "test_hub.py": (
        "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
        "hub_revision",
    ),
    "engines": ("fsdp", "fsdp_config", "deepspeed"),
    "test_subclasses.py": ("parallelism_config",),
    "refused by name": ("use_liger_kernel", "liger_kernel_config"),
    "nowhere without a GPU": ("fp16", "tf32"),
    "nowhere, they don't touch the loop: what is told and to whom, packages, what processes have among them, scripts": (
        "log_on_each_node", "log_level", "log_level_replica", "run_name", "project", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id", "do_train", "do_eval", "do_predict",
        "resume_from_checkpoint", "local_rank",
    ),
}  # fmt: skip
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}  # older releases lack some of the above
TIMES = re.compile("runtime|per_second|mem_|_mem|hesso/")


class LowRank(torch.optim.Optimizer):
    """Adam without a memory of squares, whose moments of some groups are of the gradient's first directions alone."""

    def __init__(self, params: Any, lr: float = 1e-3, **_: Any) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in (found for found in group["params"] if found.grad is not None):
                state, grad = self.state[parameter], parameter.grad
                if "rank" in group and "directions" not in state:
                    state["directions"] = torch.linalg.svd(grad)[0][:, : group["rank"]]
                low = state["directions"].T @ grad if "rank" in group else grad
                state["moment"] = 0.9 * state.get("moment", torch.zeros_like(low)) + 0.1 * low
                change = state["directions"] @ state["moment"] if "rank" in group else state["moment"]
                parameter.sub_(change, alpha=group["lr"])


@pytest.fixture(autouse=True)
def _a_package_with_an_optimizer_of_low_rank() -> Iterator[None]:
    package = types.ModuleType("galore_torch")
    vars(package).update(dict.fromkeys(("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit"), LowRank))
    sys.modules["galore_torch"] = package
    with mock.patch("transformers.trainer_optimizer.is_galore_torch_available", return_value=True):
        yield
    del sys.modules["galore_torch"]


class Metric:
    """Counts what evaluation gives it."""

    def __call__(self, found: Any, compute_result: bool = True) -> dict[str, float]:
        logits = found.predictions[0] if isinstance(found.predictions, list) else found.predictions
        return {"rows": float(len(logits)), "final": float(compute_result)}


def data(count: int, seed: int = 3) -> Dataset:
    return blocks(count, seed).add_column("size", [1 + (7 * row) % 5 for row in range(count)])


def run_of(kind: type, folder: Path, changes: dict[str, Any], target: dict[str, int] | None = None) -> Any:
    options = {"max_steps": 4, "per_device_train_batch_size": 3}
    options |= {name: value for name, value in changes.items() if name in FIELDS}
    rows, more = data(12), {}
    if changes.get("remove_unused_columns") is False:
        rows = rows.remove_columns("size")
    if target is not None:
        more["hesso_config"] = hesso_config(target_sizes=target, warmup_steps=0, pruning_steps=2, saliency_batches=1)
    metric = Metric() if "eval_strategy" in changes and not changes.get("bf16") else None
    return kind(
        tiny_llama(), arguments(folder, **options), train_dataset=rows, eval_dataset=data(5, 4).remove_columns("size"),
        compute_metrics=metric, **more,
    )  # fmt: skip


def seen(run: Any) -> dict[str, Any]:
    """Return what a run left: weights, what it logged but for times, its state, the files of its checkpoints."""
    state = run.state
    folder = Path(run.args.output_dir)
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()},
        "log": [{key: value for key, value in entry.items() if not TIMES.search(key)} for entry in state.log_history],
        "state": (state.global_step, state.epoch, state.num_input_tokens_seen, state.best_metric, state.max_steps),
        "files": sorted(
            str(p.relative_to(folder))
            for p in folder.rglob("*")
            if "hesso" not in p.name and p.name != "README.md" and p.is_file()
        ),
    }


def check_same(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    for name, weights in stock["weights"].items():
        assert torch.equal(ours["weights"][name], weights), name
    assert str(ours["log"]) == str(stock["log"])  # NaN is NaN
    assert ours["state"] == stock["state"]
    assert ours["files"] == stock["files"]


def differs(a: dict[str, Any], b: dict[str, Any]) -> bool:
    weights = any(not torch.equal(value, b["weights"][name]) for name, value in a["weights"].items())
    return weights or any(str(a[key]) != str(b[key]) for key in ("log", "state", "files"))


@pytest.fixture(autouse=True)
def _nothing_stays_deterministic() -> Iterator[None]:
    before = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    server = {name: value for name, value in os.environ.items() if name == forks.ADDRESS}
    os.environ.clear()
    os.environ.update(before | server)


@pytest.fixture(scope="module")
def without_changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = run_of(Trainer, tmp_path_factory.mktemp("stock"), {})
    run.train()
    return seen(run)


# change no result
UNSEEN = ("workers", SLOW, "memory", "checkpointed activations", "checkpointed gradients", "columns")


@pytest.mark.parametrize("case", TRIED)
def test_with_nothing_to_prune_an_argument_does_what_it_does_in_the_stock_trainer(
    case: str, without_changes: dict[str, Any], tmp_path: Path
) -> None:
    left = []
    for kind, target in ((Trainer, None), (HessoTrainer, WHOLE)):  # one after the other: they share generators
        run = run_of(kind, tmp_path / kind.__name__, CASES[case], target)
        run.train()
        left.append(seen(run))
    stock, ours = left
    seen_here = case not in UNSEEN and CASES[case].keys() <= FIELDS
    assert not seen_here or differs(stock, without_changes), "the arguments do nothing in this test"
    check_same(ours, stock)


@pytest.mark.parametrize("case", TRIED)
def test_a_pruning_run_comes_to_its_end_under_the_same_arguments(case: str, tmp_path: Path) -> None:
    run = run_of(HessoTrainer, tmp_path, CASES[case], PRUNED)
    run.train()
    assert run._process.finished
    kept = run._process.kept_units().kept
    assert {name: {len(units) for units in layers} for name, layers in kept.items()} == {
        "attention_heads": {2}, "mlp_channels": {28}, "embedding_channels": {48}
    }  # fmt: skip
    assert float(run.model.model.embed_tokens.weight.abs().sum(0).count_nonzero()) == 48


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_with_nothing_to_prune_is_the_stock_trainers(case: str, tmp_path: Path) -> None:
    def resumed(kind: type, target: dict[str, int] | None) -> Any:
        folder = tmp_path / kind.__name__
        run_of(kind, folder, {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}, target).train()
        run = run_of(kind, folder, {"max_steps": 5, **RESUMED[case]}, target)
        run.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        return seen(run)

    check_same(resumed(HessoTrainer, WHOLE), resumed(Trainer, None))


def frozen_llama() -> LlamaForCausalLM:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].input_layernorm.requires_grad_(False)
    return model


def test_frozen_parts_stay_as_they_are_but_for_what_goes(tmp_path: Path) -> None:
    given: dict[str, Any] = {"args": arguments(tmp_path, max_steps=3), "train_dataset": blocks(12)}
    runs: list[Any] = [Trainer(frozen_llama(), **given)]
    for target in (WHOLE, PRUNED):
        config = hesso_config(target_sizes=target, warmup_steps=0, pruning_steps=2)
        runs.append(HessoTrainer(frozen_llama(), **given, hesso_config=config))
    for run in runs:
        run.train()
    check_same(seen(runs[1]), seen(runs[0]))
    kept = list(runs[2]._process.kept_units().kept["embedding_channels"][0])
    before, after = tiny_llama().model.embed_tokens.weight, runs[2].model.model.embed_tokens.weight
    assert torch.equal(after[:, kept], before[:, kept])
    assert int(after.count_nonzero()) == before.shape[0] * len(kept)
    runs[2].save_model(str(tmp_path / "small"))
    assert runs[2].pruning_report.verification.fold_error < 1e-5


def processes_job(folder: str, processes: int) -> None:
    """Train in several processes as the stock trainer does, and prune."""
    left = []
    for kind, target in ((Trainer, None), (HessoTrainer, WHOLE), (HessoTrainer, PRUNED)):
        run = run_of(kind, Path(folder) / f"{kind.__name__}-{target}", PROCESSES, target)
        run.train()
        left.append(seen(run))
    check_same(left[1], left[0])
    assert run._process.finished
    wrapped = run.model_wrapped
    assert (wrapped.find_unused_parameters, wrapped.static_graph, wrapped.broadcast_buffers) == (True, True, True)
    print("SAME", flush=True)


def test_arguments_about_processes_do_what_they_do_in_the_stock_trainer(tmp_path: Path) -> None:
    done = fsdp_cpu.run(tmp_path, __name__, "processes_job", sharded=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("SAME") == 2


def test_kernels_that_nothing_can_be_proved_with_are_refused_before_they_are_put_into_the_model(tmp_path: Path) -> None:
    with pytest.raises(HessoError, match=r"`use_liger_kernel` \(True\).*torch_compile"):
        run_of(HessoTrainer, tmp_path, {"use_liger_kernel": True}, PRUNED)


class InBackward(torch.optim.Optimizer):
    """Trains the whole model while gradients come, and has no step."""

    def __init__(self, model: torch.nn.Module, lr: float = 1e-3) -> None:
        super().__init__(model.parameters(), {"lr": lr})


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_an_optimizer_that_acts_in_backward_hooks_is_refused_before_anything_is_measured(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = types.ModuleType("lomo_optim")
    vars(package).update({name: type(name, (InBackward,), {}) for name in ("Lomo", "AdaLomo")})  # as Transformers asks
    monkeypatch.setitem(sys.modules, "lomo_optim", package)
    monkeypatch.setattr("transformers.trainer_optimizer.is_lomo_available", lambda: True)
    target = {"optim_target_modules": ["mlp"]} if "galore" in optim else {}
    run = run_of(HessoTrainer, tmp_path, {"optim": optim, **target}, PRUNED)
    monkeypatch.setattr(run.hesso_run, "new_process", lambda: pytest.fail("it measures first"))
    with pytest.raises(HessoError, match=r"`optim` \((Lomo|AdaLomo|LayerWiseDummyOptimizer)\) .* in backward hooks"):
        run.train()


def test_a_checkpoint_before_there_is_an_optimizer_says_what_to_do(tmp_path: Path) -> None:
    run = run_of(HessoTrainer, tmp_path, {}, PRUNED)
    with pytest.raises(HessoError, match=r"call `train\(\)`, or, .*`create_optimizer_and_scheduler\("):
        run._save_checkpoint(run.model, None)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_no_field_is_forgotten() -> None:
    tried = {name for changes in (*CASES.values(), *RESUMED.values(), PROCESSES) for name in changes}
    known = tried.union(*ELSEWHERE.values())
    pinned = f"transformers=={transformers.__version__}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not FIELDS - known or not pinned, "new fields: put them into a case, or say where they are tried"
