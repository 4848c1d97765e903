"""Room: copies in fp32 go to the CPU where the device has no room for them, and nothing mixes the two."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hesso_hf import HessoConfig, export_pruned
from hesso_hf.export import parameters
from hesso_hf.export.report import PruningReport
from hesso_hf.hf_models.tiny_model import logits_of
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.structures import cut
from hesso_hf.structures.cut import zero_units_
from hesso_hf.structures.groups import KeptUnits
from hesso_hf.structures.lora import Adapters, base_of, parameters_of
from tests.support import pretend_device
from tests.support.lora import tiny_lora
from tests.support.tiny import tiny_llama, token_batches

CASES = {
    "bf16": (lambda: tiny_llama().bfloat16(), None),
    "merged": (lambda: tiny_lora(tiny_llama().bfloat16()), "merged"),
    "adapter": (lambda: tiny_lora(tiny_llama().bfloat16()), "adapter"),
}


def exported(case: str) -> tuple[PruningReport, list[int], str]:
    """Export a model from a device without room, and return the sizes that it was asked for."""
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
    asked = []

    def device_with_room(device: torch.device, size: int) -> torch.device:
        asked.append(size)
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
    # the trained model's copy and the smaller model; with adapters the merged one, and the base, to cut and to write
    assert len(asked) == {"bf16": 2, "merged": 3, "adapter": 6}[case]
    assert asked[0] >= 4 * report.parameters_before


def test_flash_attention_is_stood_in_for_on_the_cpu():
    model, (ids,) = tiny_llama().bfloat16(), token_batches(1)
    expected = logits_of(model, ids)
    model.config._attn_implementation = "flash_attention_2"
    assert torch.equal(logits_of(model, ids), expected)
    assert model.config._attn_implementation == "flash_attention_2"
