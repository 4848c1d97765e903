"""Room: copies in fp32 go to the CPU where the device has no room for them, and nothing mixes the two."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hesso_hf import HessoConfig, export_pruned
from hesso_hf.export import parameters
from hesso_hf.export.report import PruningReport
from hesso_hf.hf_models.tiny_model import logits_of
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.structures import cut
from hesso_hf.structures.cut import zero_units_
from hesso_hf.structures.groups import KeptUnits
from hesso_hf.structures.lora import Adapters, base_of, dense_model, parameters_of
from tests.support import pretend_device
from tests.support.lora import tiny_lora
from tests.support.tiny import tiny_llama, token_batches

CASES = {
    "bf16": (lambda: tiny_llama().bfloat16(), None),
    "merged": (lambda: tiny_lora(tiny_llama().bfloat16()), "merged"),
    "adapter": (lambda: tiny_lora(tiny_llama().bfloat16()), "adapter"),
}


def models() -> list[LlamaForCausalLM]:
    """Return all that there are."""
    return [found for found in gc.get_objects() if isinstance(found, LlamaForCausalLM)]


def exported(case: str) -> tuple[PruningReport, list[tuple[int, int]], str]:
    """Export a model from a device without room; return each size that it was asked for, and the copies there were."""
    build, way = CASES[case]
    model = build()
    plan = PruningPlan.prepare(model, HessoConfig(pruning_ratio=0.3, calibration_examples=0))
    structures = plan.groups.structures
    kept = KeptUnits(
        {name: group.num_units for name, group in structures.items()},
        {name: (tuple(range(plan.target.kept_units[name])),) * len(g.layers) for name, g in structures.items()},
    )
    base = base_of(model)
    zero_units_(parameters_of(base), Adapters.of(base).extend(plan.groups), kept)
    model.to(pretend_device.DEVICE)
    asked, before = [], {id(found): found for found in models()}  # these stay, so that their ids do

    def device_with_room(device: torch.device, size: int) -> torch.device:
        copies = (found for found in models() if id(found) not in before and found.device.type == "cpu")
        asked.append((size, sum(found.dtype == torch.float32 for found in copies)))
        return torch.device("cpu")

    cut.device_with_room = parameters.device_with_room = device_with_room
    with tempfile.TemporaryDirectory() as folder:
        report = export_pruned(model, Path(folder) / "small", kept_units=kept, groups=plan.groups, lora_export=way)
        AutoModelForCausalLM.from_pretrained(Path(folder) / "small")
    return report, asked, next(model.parameters()).device.type


@pytest.mark.parametrize("case", CASES)
def test_every_copy_in_fp32_asks_for_room_and_devices_do_not_mix(case: str):
    report, asked, place = pretend_device.apart(exported, case)
    assert report.verification.fold_error < 1e-5
    assert place == "pretend"
    # for the trained model's copy and the smaller model, made by then; with adapters for the merged one, or the base to
    # cut and to write, when the trained one's copy has gone
    copies = {"bf16": [0, 2], "merged": [0, 0, 2], "adapter": [0, 0, 2, 1, 3]}
    assert [there for _, there in asked] == copies[case]
    assert asked[0][0] >= 4 * report.parameters_before


def merged_on() -> set[str]:
    """Merge adapters of a device into a model on the CPU, and return where that is computed."""
    model, found = tiny_lora(tiny_llama().bfloat16()), set()
    model.to(pretend_device.DEVICE)
    plain = Adapters.effective

    def effective(*args: Any) -> torch.Tensor:
        weight = plain(*args)
        found.add(weight.device.type)
        return weight

    Adapters.effective = effective  # type: ignore[method-assign]
    dense_model(base_of(model), device=torch.device("cpu"))
    return found


def test_what_is_merged_for_the_cpu_is_computed_there():
    assert pretend_device.apart(merged_on) == {"cpu"}


def test_flash_attention_is_stood_in_for_on_the_cpu():
    model, (ids,) = tiny_llama().bfloat16(), token_batches(1)
    expected = logits_of(model, ids)
    model.config._attn_implementation = "flash_attention_2"
    assert torch.equal(logits_of(model, ids), expected)
    assert model.config._attn_implementation == "flash_attention_2"
