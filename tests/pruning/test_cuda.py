"""What only a GPU shows; `make gpu` runs these where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, wrap_optimizer
from hesso_hf.pruning.optimizer import HessoOptimizer
from tests.support.launches import kind_of
from tests.support.lora import tiny_lora
from tests.support.moe import moe_model
from tests.support.tiny import tiny_gemma2, tiny_llama, tiny_phi, token_batches
from tests.support.training import hesso_config, trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = 30
CRIC = {"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2}
DEFAULTS = {"healing": "auto", "stream_basis": "auto", "replay_share": 0.25, "compact": "auto"}
MODELS = {
    "llama": tiny_llama,
    "gemma2": tiny_gemma2,
    "phi": tiny_phi,
    "mixtral": lambda: moe_model("mixtral", experts_implementation="eager"),
}


def wrapped(model: Any, **changes: Any) -> HessoOptimizer:
    options = {"pruning_ratio": 0.4, "round_to": 1, "warmup_steps": 2, "pruning_steps": 6, "pruning_periods": 2}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    return wrap_optimizer(base, model, HessoConfig(**(options | {"saliency_batches": 1} | changes)), STEPS)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Make it an error to wait for the GPU meanwhile."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_by_hand(optimizer: HessoOptimizer, before: Any, after: Any = None) -> None:
    """Step with what HESSO does before and after the base optimizer's step within contexts of their own."""
    with before:
        optimizer.process.observe_gradients()
        optimizer.process.before_step(optimizer.base)
    optimizer.base.step()
    with after or nullcontext():
        optimizer.process.after_step(optimizer.base)


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_steps_do_not_wait_for_the_gpu_and_leave_exact_zeros(name: str):
    model = MODELS[name]().cuda()
    experts = {"structures": ["experts"], "pruning_ratio": 0.25} if name == "mixtral" else {}
    optimizer, seen = wrapped(model, **experts), set()
    process = optimizer.process
    for batch in token_batches(10):
        kind = kind_of(optimizer)
        model(input_ids=batch.cuda(), labels=batch.cuda()).loss.backward()
        if kind in ("shrinking", "shrinking, later periods", "recovery", "warmup"):
            seen.add(kind)
            step_by_hand(optimizer, without_waiting(), without_waiting())
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert {"shrinking", "shrinking, later periods", "recovery"} <= seen
    assert process.finished
    before = [parameter.clone() for parameter in model.parameters()]
    process.run.mask()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_a_sample_of_cric_does_not_wait_for_its_snapshot():
    model = tiny_llama().cuda()
    optimizer = wrapped(model, **CRIC)
    seen = 0
    for batch in token_batches(8):
        kind = kind_of(optimizer)
        model(input_ids=batch.cuda(), labels=batch.cuda()).loss.backward()
        if kind == "CRIC's sample":
            seen += 1
            step_by_hand(optimizer, without_waiting())
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert seen


def test_recovery_launches_no_more_than_its_budget():
    model = tiny_llama(attention_bias=False, mlp_bias=False).cuda()
    optimizer = wrapped(model)
    for batch in token_batches(11):
        model(input_ids=batch.cuda(), labels=batch.cuda()).loss.backward()
        if kind_of(optimizer) == "recovery":
            seen = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            step_by_hand(optimizer, seen)
        else:
            optimizer.step()
        optimizer.zero_grad()
    launched = sum(event.count for event in seen.key_averages() if event.key.startswith("cudaLaunchKernel"))
    assert 0 < launched <= 3 * len(list(model.parameters()))


@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_lora(tiny_llama())], ids=["plain", "adapter"])
@pytest.mark.parametrize("changes", [{}, CRIC, DEFAULTS], ids=["HESSO", "CRIC", "defaults"])
def test_a_run_on_the_gpu_ends_in_a_verified_smaller_model(build: Any, changes: dict[str, Any], tmp_path: Path):
    run = trainer(tmp_path / "out", model=build(), config=hesso_config(**changes), use_cpu=False, max_steps=STEPS)
    run.train()
    run.save_model(str(tmp_path / "small"))
    assert run.pruning_report.verification.fold_error < 1e-4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.hidden_size == 48
