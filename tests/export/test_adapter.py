"""Export of models with LoRA: merged into one smaller model, or as a smaller base model and a smaller adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

import hesso_hf.export.adapter
from hesso_hf import HessoConfig, HessoTrainer, export_pruned
from hesso_hf.errors import HessoError, UnsupportedStructureError, VerificationError
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.structures.cut import cuts_by_tensor, zero_units_
from hesso_hf.structures.groups import KeptUnits, PruningGroups
from hesso_hf.structures.lora import Adapters, base_of, parameters_of
from tests.support.lora import LINEARS, lora_run, tiny_lora
from tests.support.moe import moe_model
from tests.support.tiny import tiny_gemma2, tiny_gpt2, tiny_llama, tiny_phi, tiny_phi3
from tests.support.training import hesso_config

SCHEDULE = {"warmup_steps": 1, "pruning_steps": 3, "pruning_periods": 1, "saliency_batches": 1}
RATIO = {"pruning_ratio": 0.3, "calibration_examples": 0, **SCHEDULE, "compact": "never"}
# writers and readers of the stream and of units, fused and transposed ones, layers with a bias, norms that centre
KINDS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], dict[str, Any]]] = {
    "llama": (tiny_llama, {"target_modules": LINEARS, "rank_pattern": {"k_proj": 3}}, RATIO),
    "embeddings": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "bias": "all"}, RATIO),
    "modules_to_save": (tiny_llama, {"modules_to_save": ["lm_head"]}, RATIO),
    "gemma2": (tiny_gemma2, {"target_modules": LINEARS}, RATIO),
    "phi3": (tiny_phi3, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}, RATIO),
    "phi": (tiny_phi, {"target_modules": ["q_proj", "dense", "fc1", "fc2"]}, RATIO),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, RATIO),
    "layers": (lambda: tiny_llama(num_hidden_layers=3), {}, RATIO | {"structures": ["layers", "mlp_channels"]}),
    "experts": (
        lambda: moe_model("mixtral"), {"target_modules": ["q_proj", "o_proj"]},
        RATIO | {"structures": ["experts"], "pruning_ratio": 0.25},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], HessoTrainer]:
    runs: dict[str, HessoTrainer] = {}

    def run_of(kind: str) -> HessoTrainer:
        if kind not in runs:
            build, lora, config = KINDS[kind]
            folder = tmp_path_factory.mktemp("run")
            runs[kind] = lora_run(folder, build(), lora, config=HessoConfig(**config), max_steps=5)
            runs[kind].train()
        return runs[kind]

    return run_of


def logits(model: Any, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch).logits


SLOW = ("embeddings", "modules_to_save", "gemma2", "phi3", "gpt2", "layers", "experts")
MARKED = [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]


@pytest.mark.parametrize("lora_export", ["merged", "adapter"])
@pytest.mark.parametrize("kind", MARKED)
def test_both_exports_give_the_trained_models_logits(
    trained: Callable[[str], HessoTrainer],
    kind: str,
    lora_export: str,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    run = trained(kind)
    assert run.hesso_optimizer.process.finished
    run.hesso_config.lora_export = lora_export
    run.save_model(str(tmp_path / "small"))
    verification = run.pruning_report.verification
    assert verification.fold_error < 1e-5
    assert verification.rounding_error < 1e-5
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert sum(p.numel() for p in small.parameters()) < 0.8 * run.hesso_plan.parameters.full
    if lora_export == "adapter":
        small = PeftModel.from_pretrained(small, tmp_path / "small" / "adapter")
        card = (tmp_path / "small" / "adapter" / "README.md").read_text()
        assert f"base_model: {tmp_path / 'small'}" in card  # the full model's name would be another base's
        assert not [each for each in recwarn if "base_model_name_or_path" in str(each.message)]
    batch = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(logits(small, batch), logits(run.model, batch), rtol=1e-3, atol=2e-5)
    assert (tmp_path / "small" / "adapter").exists() == (lora_export == "adapter")
    assert not (tmp_path / "small" / "adapter_config.json").exists()


def test_the_smaller_base_is_the_frozen_one_without_its_pruned_units(
    trained: Callable[[str], HessoTrainer], tmp_path: Path
) -> None:
    run = trained("llama")
    kept = run.hesso_optimizer.process.kept_units()
    export_pruned(run.model, tmp_path, kept_units=kept, lora_export="adapter")
    small = AutoModelForCausalLM.from_pretrained(tmp_path)
    original = dict(tiny_llama().named_parameters())["model.layers.1.mlp.gate_proj.bias"]
    units = list(kept.kept["mlp_channels"][1])
    torch.testing.assert_close(
        dict(small.named_parameters())["model.layers.1.mlp.gate_proj.bias"].data, original[units]
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path)
    assert config["rank_pattern"] == {"k_proj": 3}
    tuned = PeftModel.from_pretrained(small, tmp_path / "adapter")
    shapes = {name: tuple(p.shape) for name, p in parameters_of(base_of(tuned)).items()}
    assert shapes["model.layers.0.mlp.down_proj.lora_A.weight"] == (5, len(units))
    assert shapes["model.layers.0.self_attn.k_proj.lora_A.weight"] == (3, small.config.hidden_size)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_a_factor_that_is_not_folded_is_noticed(
    trained: Callable[[str], HessoTrainer], side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B's rows take the power of c that the matrix's rows take, A's columns that of its columns."""
    run = trained("llama")

    def unfolded(groups: PruningGroups, kept: Any) -> Any:
        from dataclasses import replace

        cuts = cuts_by_tensor(groups, kept)
        leaf = "lora_B.weight" if side == "rows" else "lora_A.weight"
        found = {n: [(replace(axis, power=axis.power + 1), *rest) for axis, *rest in c] for n, c in cuts.items()}
        return {name: found[name] if name.endswith(leaf) else cuts[name] for name in cuts}

    monkeypatch.setattr(hesso_hf.export.adapter, "cuts_by_tensor", unfolded)
    kept = run.hesso_optimizer.process.kept_units()
    with pytest.raises(VerificationError, match="Nothing was published"):
        export_pruned(run.model, tmp_path / "small", kept_units=kept, lora_export="adapter")
    assert not (tmp_path / "small").exists()


def test_a_merge_that_differs_from_the_trained_model_is_not_published(
    trained: Callable[[str], HessoTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("llama")
    monkeypatch.setattr(run.hesso_config, "lora_export", "merged")
    of = Adapters.of.__func__  # type: ignore[attr-defined]

    def halved(cls: Any, model: Any) -> Adapters:
        from dataclasses import replace

        return Adapters({n: replace(a, scaling=a.scaling / 2) for n, a in of(cls, model).low_rank.items()})

    monkeypatch.setattr(Adapters, "of", classmethod(halved))
    with pytest.raises(VerificationError, match="differ from the trained model's"):
        run.save_model(str(tmp_path / "small"))


def test_a_checkpoint_with_an_adapter_exports_later(tmp_path: Path) -> None:
    for build, lora in ((tiny_phi, {"target_modules": ["q_proj", "dense", "fc2"]}),):
        folder = tmp_path / build.__name__
        build().save_pretrained(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        run = lora_run(
            folder, base, lora, config=HessoConfig(**RATIO), max_steps=5, save_strategy="steps", save_steps=2
        )
        run.train()
        report = export_pruned(folder / "checkpoint-4", folder / "small")
        assert report.kept_units == run.hesso_optimizer.process.kept_units()
        assert report.base_model == str(folder / "base")
        export_pruned(folder / "checkpoint-5", folder / "last")
        run.save_model(str(folder / "direct"))
        last, direct = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("last", "direct"))
        for name, parameter in direct.named_parameters():
            torch.testing.assert_close(dict(last.named_parameters())[name], parameter, rtol=1e-5, atol=1e-6)
        with pytest.raises(HessoError, match="step 2 of 4"):
            export_pruned(folder / "checkpoint-2", folder / "early")


def test_a_healed_base_goes_on_from_a_checkpoint_that_holds_the_adapter_alone(tmp_path: Path) -> None:
    saved = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    runs = []
    for name, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-3")):
        base = tiny_llama(seed=2)
        lora = {"target_modules": ["q_proj", "down_proj"]}
        run = lora_run(tmp_path / name, base, lora, config=HessoConfig(**RATIO), **saved)
        before = base.model.layers[0].mlp.down_proj.base_layer.weight.detach().clone()
        run.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        kept = list(run.hesso_optimizer.process.kept_units().kept["mlp_channels"][0])
        after = base.model.layers[0].mlp.down_proj.base_layer.weight.detach()
        assert not torch.equal(after[:, kept], before[:, kept]), "nothing was healed"
        runs.append(parameters_of(base))
    for name, parameter in runs[0].items():
        assert torch.equal(parameter, runs[1][name]), name


def test_a_checkpoint_whose_base_has_no_name_is_refused(tmp_path: Path) -> None:
    run = lora_run(tmp_path, config=HessoConfig(**RATIO), max_steps=4, save_strategy="steps", save_steps=4)
    run.train()
    with pytest.raises(HessoError, match="names no base model; pass the PeftModel itself"):
        export_pruned(tmp_path / "checkpoint-4", tmp_path / "small")


def test_one_folder_can_hold_one_after_the_other(trained: Callable[[str], HessoTrainer], tmp_path: Path) -> None:
    """An adapter's files of an earlier save would make `from_pretrained` look for another base model."""
    run = trained("llama")
    tiny_lora().save_pretrained(tmp_path / "small")
    kept = run.hesso_optimizer.process.kept_units()
    for lora_export, expected in (("adapter", True), ("merged", False)):
        export_pruned(run.model, tmp_path / "small", kept_units=kept, lora_export=lora_export)
        assert (tmp_path / "small" / "adapter").exists() == expected
        assert not (tmp_path / "small" / "adapter_config.json").exists()
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_low_precision_base_is_stored_as_it_was(tmp_path: Path) -> None:
    config = HessoConfig(**RATIO)
    run = lora_run(tmp_path, tiny_llama().to(torch.bfloat16), config=config, max_steps=5)
    run.train()
    for lora_export in ("merged", "adapter"):
        run.hesso_config.lora_export = lora_export
        run.save_model(str(tmp_path / lora_export))
        verification = run.pruning_report.verification
        assert (verification.dtype, verification.fold_error < 1e-4) == ("bfloat16", True)
        assert verification.rounding_error > 1e-4
        assert AutoModelForCausalLM.from_pretrained(tmp_path / lora_export).dtype == torch.bfloat16


def test_before_pruning_has_finished_the_adapter_alone_is_saved(tmp_path: Path) -> None:
    run = lora_run(tmp_path, config=hesso_config())
    run.save_model(str(tmp_path / "dense"))
    assert (tmp_path / "dense" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "dense" / "config.json").exists()


def test_dropped_layers_and_options_by_layer_are_refused_apart(tmp_path: Path) -> None:
    model = tiny_lora(tiny_llama(num_hidden_layers=3), layers_to_transform=[0, 2])
    groups = PruningPlan.prepare(model, HessoConfig(**RATIO, structures=["layers"])).groups
    kept = KeptUnits({"layers": 3}, {"layers": ((1, 2),)})
    base = base_of(model)
    zero_units_(parameters_of(base), Adapters.of(base).extend(groups), kept)
    export_pruned(model, tmp_path / "merged", kept_units=kept, groups=groups)
    with pytest.raises(UnsupportedStructureError, match=r"layers_to_transform.*use 'merged'"):
        export_pruned(model, tmp_path / "small", kept_units=kept, groups=groups, lora_export="adapter")


def test_lora_export_is_checked() -> None:
    with pytest.raises(HessoError, match="`lora_export` \\('both'\\) must be"):
        HessoConfig(0.5, lora_export="both")
    with pytest.raises(HessoError, match="must be 'merged' or 'adapter'"):
        export_pruned(tiny_lora(), "unused", lora_export="both")
    with pytest.raises(HessoError, match="has no LoRA adapter"):
        export_pruned(tiny_llama(), "unused", lora_export="merged")
