"""LoRA: which gradient units are scored by, that of the frozen weights or that of the adapter alone.

    python benchmarks/lora_scoring.py [--trained 20 200]

The bundled model gets an adapter on all linear layers, which is trained for a few steps. Then all units are scored over
the same batches, by variants that differ in what they need:

- weights: frozen weights get gradients in the steps that are scored, so the effective weight W + s*B*A is scored as in
  full fine-tuning. This is what the library does.
- adapter: gradients of A and B only, so a unit's score is that of its rows of B and its columns of A.
- magnitude: no gradient, the norm of the effective weight.

*Agreement*: with `weights`, by rank correlation and by the share of the lowest quarter that is the same. *Rise*: of the
held-out loss (nats per token) when the lowest quarter of one structure goes, in every layer. *Memory*: peak of what one
step allocates, scoring included.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from overhead import Allocations
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hesso_hf import HessoConfig
from hesso_hf.bundled import bundled_model_path, python_docs_dataset
from hesso_hf.export.report import versions
from hesso_hf.pruning.criteria import combine_criteria, criteria_of
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.pruning.ranking import lowest_units
from hesso_hf.pruning.saliency import UnitSums, accumulate_
from hesso_hf.pruning.weights.bound_groups import BoundGroups
from hesso_hf.structures.groups import PruningGroups
from hesso_hf.structures.lora import Adapters, base_of, parameters_of

RESULTS = Path(__file__).parent / "results" / "lora.json"
BLOCK, BATCH, SCORED, HELD_OUT = 128, 8, 8, 16
REMOVED = 0.25
TERMS = ("x2", "xg", "xg2")
CRITERIA = ("taylor_second_order", "taylor_first_order")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=int, nargs="+", default=[20, 200], help="steps before the scoring")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    train = torch.tensor(python_docs_dataset(tokenizer, "train", BLOCK)["input_ids"])
    test = torch.tensor(python_docs_dataset(tokenizer, "test", BLOCK)["input_ids"])
    held_out = [test[i : i + BATCH] for i in range(0, min(len(test), HELD_OUT * BATCH), BATCH)]
    groups, found = None, []
    for steps in sorted(options.trained):
        model = _trained(train, steps, options.rank)
        if groups is None:
            groups = PruningPlan.prepare(model, HessoConfig(0.3)).groups
        found.append({"trained_steps": steps, **_compare(model, groups, train[-SCORED * BATCH :], held_out)})
        print(json.dumps(found[-1], indent=1))
    result = {"model": "bundled", "rank": options.rank, "batch": [BATCH, BLOCK], "scored_batches": SCORED}
    result |= {"removed": REMOVED, "device": "cpu", "runs": found, "versions": versions()}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _trained(blocks: torch.Tensor, steps: int, rank: int) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        batch = blocks[torch.arange(step * BATCH, (step + 1) * BATCH) % (len(blocks) - SCORED * BATCH)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _compare(
    model: PeftModel, groups: PruningGroups, blocks: torch.Tensor, held_out: list[torch.Tensor]
) -> dict[str, Any]:
    batches = list(blocks.split(BATCH))
    sums, memory = {}, {}
    for variant in ("none", "adapter", "weights"):
        sums[variant], memory[variant] = _sums(model, groups, batches, variant)
    bound = _bound(model, groups)
    scored = {f"{variant} {name}": (sums[variant], name) for variant in ("weights", "adapter") for name in CRITERIA}
    scored["magnitude"] = (sums["weights"], "magnitude")
    elements, pools = bound.elements_per_unit(), {name: g.pools for name, g in groups.structures.items()}
    scores = {
        label: combine_criteria(criteria_of(found, [name], elements), {name: 1.0}, across_layers=False, pools=pools)
        for label, (found, name) in scored.items()
    }
    before = _loss(model, held_out)
    variants = {}
    for label, values in scores.items():
        reference = scores["weights " + (label.partition(" ")[2] or CRITERIA[0])]
        variants[label] = {
            name: _agreement(values[name], reference[name], count, pools[name])
            | {"rise": _rise(model, bound, {name: values[name]}, count, held_out, before)}
            for name, count in _counts(groups).items()
        }
    return {
        "held_out_loss": before,
        "variants": variants,
        "peak_bytes": {name: memory[name] for name in ("none", "adapter", "weights")},
        "frozen_bytes": sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad),
    }


def _bound(model: PeftModel, groups: PruningGroups) -> BoundGroups:
    base = base_of(model)
    return BoundGroups(parameters_of(base), groups, adapters=Adapters.of(base))


def _counts(groups: PruningGroups) -> dict[str, int]:
    """Return how many units of a pool go."""
    return {name: max(1, round(REMOVED * group.pool_size)) for name, group in groups.structures.items()}


def _sums(model: PeftModel, groups: PruningGroups, batches: list[torch.Tensor], variant: str) -> tuple[UnitSums, int]:
    """Return the sums over the batches, and the most that one step allocates."""
    bound, peak = _bound(model, groups), 0
    sums = UnitSums.zeros(groups, TERMS, bound.device)
    factors = Adapters.of(base_of(model)).factors()
    for batch in batches:
        with Allocations() as allocations:
            bound.frozen.reveal(variant == "weights")
            model(input_ids=batch, labels=batch).loss.backward()
            if variant == "weights":
                bound.accumulate_(sums)
            for name in factors if variant == "adapter" else ():
                factor = bound.parameters[name]
                if bound.axes[name]:
                    accumulate_(sums, factor.data, factor.grad, bound.axes[name])
        peak = max(peak, allocations.peak)
        sums.batches += 1
        model.zero_grad(set_to_none=True)
    bound.frozen.reveal(False)
    return sums, peak


def _agreement(values: torch.Tensor, reference: torch.Tensor, count: int, pools: int) -> dict[str, float]:
    ranks = [torch.stack([layer.argsort().argsort() for layer in scores]).double() for scores in (values, reference)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    correlation = (centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm())
    lowest = [lowest_units(scores, None, count, False, pools) for scores in (values, reference)]
    return {"rank_correlation": float(correlation), "same": float((lowest[0] & lowest[1]).sum() / lowest[1].sum())}


@torch.no_grad()
def _rise(
    model: PeftModel,
    bound: BoundGroups,
    scores: dict[str, torch.Tensor],
    count: int,
    held_out: list[torch.Tensor],
    before: float,
) -> float:
    saved = copy.deepcopy(model.state_dict())
    bound.mask_weights_({name: lowest_units(s, None, count, False) for name, s in scores.items()})
    rise = _loss(model, held_out) - before
    model.load_state_dict(saved)
    return rise


@torch.no_grad()
def _loss(model: PeftModel, batches: list[torch.Tensor]) -> float:
    return sum(float(model(input_ids=batch, labels=batch).loss) for batch in batches) / len(batches)


if __name__ == "__main__":
    sys.exit(main())
