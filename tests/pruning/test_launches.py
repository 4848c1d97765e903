"""What HESSO adds to a step on a GPU is held to a budget, `data/launches.json`: operators, kernels, host syncs.

PYTHONPATH=. python tests/pruning/test_launches.py      # writes the budget anew
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hesso_hf import HessoConfig, wrap_optimizer
from hesso_hf.pruning.healing import Healer
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.saliency import chunk_size
from hesso_hf.trainer.callbacks import metrics
from tests.support import pretend_device
from tests.support.launches import Launches, counted_step
from tests.support.moe import moe_model
from tests.support.tiny import tiny_gemma2, tiny_llama, tiny_phi, token_batches

BUDGET = Path(__file__).parent / "data" / "launches.json"
STEPS = 40
LLAMA = partial(tiny_llama, attention_bias=False, mlp_bias=False)
CRIC = {"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2}
MOE = partial(moe_model, "mixtral", experts_implementation="eager")
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama, 2 layers": (LLAMA, {}),
    "llama, 3 layers": (partial(LLAMA, num_hidden_layers=3), {}),
    "CRIC": (LLAMA, CRIC),
    "experts": (MOE, {"structures": ["experts"], "pruning_ratio": 0.25}),
    "norms stored less one": (tiny_gemma2, {}),
    "healed": (LLAMA, {}),
    "norms that centre": (tiny_phi, {}),
}
SLOW = ("norms stored less one", "norms that centre")
ORDINARY = ("warmup", "shrinking", "shrinking, later periods", "recovery")


def counted(names: list[str]) -> dict[str, Any]:
    """Return what the steps of each case cost, by their kind; of several of a kind, the dearest."""
    found = {}
    for name in names:
        build, changes = CASES[name]
        model = build()
        model.to(pretend_device.DEVICE)
        options = {"pruning_ratio": 0.4, "round_to": 1, "warmup_steps": 2, "pruning_steps": 6, "pruning_periods": 2}
        config = HessoConfig(**(options | {"saliency_batches": 1} | changes))
        optimizer = wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, config, STEPS)
        if name == "healed":
            ids = torch.cat(token_batches(2)).to(pretend_device.DEVICE)
            optimizer.process.heal_with(Healer(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
        steps: dict[str, dict[str, int]] = {}
        for batch in token_batches(8 + optimizer.process.schedule.sampling_end):
            kind, count = counted_step(model, optimizer, batch.to(pretend_device.DEVICE))
            counts = {kind: count} | ({"logging": logging(optimizer)} if kind == "shrinking" else {})
            for kind, count in counts.items():
                cost = {"operators": count.operators, "kernels": count.kernels, "syncs": count.syncs}
                dearest = steps.setdefault(kind, dict.fromkeys(cost, 0))
                steps[kind] = {what: max(dearest[what], number.total()) for what, number in cost.items()}
        found[name] = {"tensors": len(list(model.parameters())), "steps": steps}
    return found


def logging(optimizer: HessoOptimizer) -> Launches:
    """Count what it takes to tell where the run is."""

    class Parameters:
        full = 1.0

        def __call__(self, kept: Any) -> float:
            return 1.0

    with Launches() as counts:
        metrics(optimizer, Parameters())
    return counts


def per_tensor(costs: dict[str, Any], kind: str, what: str) -> float:
    """Return what one more parameter tensor costs, from two depths."""
    small, large = costs["llama, 2 layers"], costs["llama, 3 layers"]
    more = large["steps"][kind][what] - small["steps"][kind][what]
    return more / (large["tensors"] - small["tensors"])


@pytest.fixture(scope="module")
def costs() -> dict[str, Any]:
    return pretend_device.apart(counted, [name for name in CASES if name not in SLOW])


def check(costs: dict[str, Any]) -> None:
    """Compare with the budget."""
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))["cases"]
    for name, case in costs.items():
        assert case["tensors"] == budget[name]["tensors"]
        assert case["steps"].keys() == budget[name]["steps"].keys()
        for kind, cost in case["steps"].items():
            allowed = budget[name]["steps"][kind]
            dearer = {what: (number, allowed[what]) for what, number in cost.items() if number > allowed[what]}
            assert not dearer, f"{name}, {kind}: more than the budget"


def test_no_step_costs_more_than_its_budget(costs: dict[str, Any]):
    check(costs)


@pytest.mark.slow
def test_no_step_of_other_norms_costs_more_than_its_budget():
    check(pretend_device.apart(counted, list(SLOW)))


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_step_costs_two_operators_a_tensor_and_fetches_the_norm_alone(costs: dict[str, Any], kind: str):
    assert per_tensor(costs, kind, "operators") <= 2
    assert all(case["steps"][kind]["syncs"] == 1 for case in costs.values())


def test_a_sample_of_cric_waits_for_the_norm_alone(costs: dict[str, Any]):
    assert costs["CRIC"]["steps"]["CRIC's sample"]["syncs"] == 1


def test_a_scoring_takes_most_matrices_of_a_gpu_whole():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert chunk_size(1_235_814_400, gpu) >= 2048 * 8192 > chunk_size(1_235_814_400, cpu)
    assert chunk_size(8_030_261_248, gpu) >= 4096 * 14336
    assert chunk_size(1_235_814_400, gpu) * 32 <= 1_235_814_400


def test_what_is_logged_is_fetched_at_once(costs: dict[str, Any]):
    assert costs["llama, 2 layers"]["steps"]["logging"]["syncs"] == 2  # how many units are at zero, and a norm


def main() -> None:
    costs = pretend_device.apart(counted, list(CASES))
    kinds = costs["llama, 2 layers"]["steps"]
    slopes = {
        kind: {what: round(per_tensor(costs, kind, what), 2) for what in ("operators", "kernels")} for kind in kinds
    }
    told = {"per_tensor_of_a_llama_layer": slopes, "cases": costs}
    BUDGET.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from tests.pruning import test_launches  # what another process is to find by name

    test_launches.main()
