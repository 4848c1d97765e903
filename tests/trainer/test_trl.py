"""TRL's trainers with the mixin in front: they train, prune and save a smaller stock model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hesso_hf import HessoConfig, HessoMixin
from hesso_hf.bundled import bundled_model_path
from hesso_hf.errors import HessoError
from hesso_hf.hf_models.tiny_model import logits_of
from hesso_hf.trainer.teacher import fingerprint
from tests.support import ROOT, fsdp_cpu
from tests.support.tiny import tiny_llama
from tests.support.training import ALONE, logged

trl = pytest.importorskip("trl", reason="TRL isn't installed: pip install 'hesso_hf[trl]'")

RECIPES = ROOT / "recipes" / "trl"
SIZES = {"num_key_value_heads": 2, "intermediate_size": 28, "hidden_size": 48}


class HessoSFT(HessoMixin, trl.SFTTrainer):
    """Supervised fine-tuning."""


class HessoDPO(HessoMixin, trl.DPOTrainer):
    """Preferences."""


KINDS: dict[str, tuple[type, type]] = {"sft": (HessoSFT, trl.SFTConfig), "dpo": (HessoDPO, trl.DPOConfig)}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(bundled_model_path())


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A saved tiny model: DPO loads its reference model from where the model came from."""
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def examples(kind: str, count: int = 40) -> Dataset:
    """Prompts of different lengths, with a completion or a pair of them."""
    rows = []
    for i in range(count):
        prompt = {"prompt": "again " * (i % 3) + f"add {i} and {i}: "}
        pair = {"chosen": f"it is {2 * i}", "rejected": f"no idea what {i} could be"}
        rows.append(prompt | ({"completion": f"it is {2 * i}"} if kind == "sft" else pair))
    return Dataset.from_list(rows)


def trl_trainer(kind: str, base: Path, tokenizer: Any, model: Any = None, config: Any = None, **options: Any) -> Any:
    trainer_class, args_class = KINDS[kind]
    args = {
        "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "max_length": 32,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    hesso = {
        **ALONE,
        "target_sizes": SIZES,
        "warmup_steps": 2,
        "pruning_steps": 5,
        "pruning_periods": 2,
        "saliency_batches": 2,
    }
    return trainer_class(
        model=model if model is not None else AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=args_class(str(base.parent / "out"), **(args | options.pop("args", {}))),
        train_dataset=examples(kind),
        processing_class=tokenizer,
        hesso_config=config or HessoConfig(**(hesso | options.pop("hesso", {}))),
        **options,
    )


@pytest.mark.parametrize("model_given", ["object", "name"])
@pytest.mark.parametrize("kind", KINDS)
def test_trains_prunes_and_saves_a_smaller_stock_model(
    kind: str, model_given: str, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    options = {"args": {"model_init_kwargs": {"dtype": "float32"}}, "model": str(base)} if model_given == "name" else {}
    run = trl_trainer(kind, base, tokenizer, **options)
    before = fingerprint(run.model)
    reference = run.ref_model if kind == "dpo" else None
    run.train()
    assert fingerprint(run.model) != before
    if reference is not None:
        assert reference is not run.model
        assert fingerprint(reference) == before
    run.save_model(str(tmp_path / "small"))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(small).__module__.startswith("transformers.")
    assert {name: getattr(small.config, name) for name in SIZES} == SIZES
    assert run.pruning_report.verification.fold_error <= 1e-5
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = logits_of(run.model.eval(), ids)
    assert (logits_of(small, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "small").get_vocab() == tokenizer.get_vocab()
    assert all(loss == loss for loss in logged(run, "loss"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_for_pruning_isnt_counted_as_training(
    kind: str, base: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    measured = {"pruning_ratio": 0.3, "cric": True, "cric_mode": "probe"}
    runs = [
        trl_trainer(kind, base, tokenizer, config=HessoConfig(**options, warmup_steps=2, pruning_steps=5))
        for options in ({"target_sizes": SIZES}, measured)
    ]
    for run in runs:
        run.train()
    assert runs[1].hesso_plan.curves is not None
    assert logged(runs[0], "num_tokens") == logged(runs[1], "num_tokens")
    assert logged(runs[0], "entropy")[0] == pytest.approx(logged(runs[1], "entropy")[0], rel=1e-5)
    assert not runs[1]._metrics["eval"]


def taught_job(folder: str, processes: int, base: str) -> None:
    """Fine-tune on a global batch of 4 with the unpruned model as teacher; leave the decision, weights and losses."""
    args = {"per_device_train_batch_size": 4 // processes}
    tokenizer = AutoTokenizer.from_pretrained(base)
    run = trl_trainer("sft", Path(base), tokenizer, hesso={"distillation_alpha": 0.75}, args=args)
    run.train()
    run.save_model(f"{folder}/small")
    found = {
        "kept": run.hesso_optimizer.process.kept_units().to_dict(),
        "weights": dict(run.accelerator.unwrap_model(run.model).named_parameters()),
        "terms": logged(run, "hesso/distillation_loss"),
    }
    torch.save(found, f"{folder}/rank{run.args.process_index}.pt")


def test_two_processes_that_are_taught_equal_one(base: Path, tmp_path: Path) -> None:
    done = fsdp_cpu.run(tmp_path / "two", __name__, "taught_job", sharded=False, base=str(base))
    assert done.returncode == 0, done.stderr[-4000:]
    (tmp_path / "one").mkdir()
    taught_job(str(tmp_path / "one"), 1, str(base))
    alone = torch.load(tmp_path / "one" / "rank0.pt", weights_only=True)
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True)
        assert found["kept"] == alone["kept"]
        assert found["terms"] == pytest.approx(alone["terms"], rel=1e-4, abs=1e-6)
        for name, weight in alone["weights"].items():
            assert (found["weights"][name] - weight).abs().max() <= 2e-5 * weight.abs().max(), name
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "small")
    assert {name: getattr(small.config, name) for name in SIZES} == SIZES


def test_sft_learns_from_the_unpruned_model(base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Its loss computes no logits, so they come from a forward of their own."""
    run = trl_trainer("sft", base, tokenizer, hesso={"distillation_alpha": 0.75})
    before = fingerprint(run.model)
    run.train()
    assert run.distillation is not None
    assert run.distillation.own_forward or Version(trl.__version__) < Version("1.16")  # older ones compute logits
    assert fingerprint(run.distillation.teacher.model) == before
    terms = logged(run, "hesso/distillation_loss")
    assert terms[0] == pytest.approx(0.0, abs=1e-5)
    assert terms[5] > 1e-3
    batch = run.hesso_run.measurer.examples(1)[0]
    with torch.no_grad():
        found = run.compute_loss(run.model.train(), dict(batch))
        logits, wanted = (
            model(input_ids=batch["input_ids"]).logits[0, :-1].double().log_softmax(-1)
            for model in (run.model, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval())
        )
        labels = batch["labels"][0, 1:]
        learnt = labels != -100
        own = -logits[learnt].gather(1, labels[learnt, None]).mean()
        divergence = (wanted.exp() * (wanted - logits)).sum(-1)[learnt].mean()
    assert float(learnt.sum()) < len(labels)  # the prompt isn't learnt
    assert float(found) == pytest.approx(float(0.25 * own + 0.75 * divergence), rel=1e-4)
    run.save_model(str(tmp_path / "small"))
    assert "as the teacher" in (tmp_path / "small" / "README.md").read_text()


def test_distillation_of_preferences_is_refused_by_name(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(HessoError, match=r"`distillation_alpha` .* needs `labels`.*HessoDPO"):
        trl_trainer("dpo", base, tokenizer, hesso={"distillation_alpha": 0.5}).train()


@pytest.mark.parametrize("kind", KINDS)
def test_replay_and_healing_work_with_every_loss(
    kind: str, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    run = trl_trainer(kind, base, tokenizer, hesso={"replay_share": 0.5, "healing": "auto"})
    run.train()
    assert logged(run, "hesso/replay_loss")[-1] > 1e-3
    assert run.hesso_run.process.run.judging.healer is not None
    run.save_model(str(tmp_path / "small"))
    assert "50% of the tokens trained on were replay" in (tmp_path / "small" / "README.md").read_text()


def test_an_adapter_is_trained_by_sft_and_merged_into_the_smaller_model(
    base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    run = trl_trainer("sft", base, tokenizer, peft_config=adapter)
    run.train()
    run.save_model(str(tmp_path / "small"))
    small, full = (AutoModelForCausalLM.from_pretrained(where) for where in (tmp_path / "small", base))
    assert small.num_parameters() < full.num_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_recipe_runs_on_local_data(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples(kind, 24).to_json(tmp_path / "data.jsonl")
    flags = ["--dataset", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "out"), "--max_steps", "10"]
    more = [
        "--per_device_train_batch_size",
        "2",
        "--use_cpu",
        "--bf16",
        "False",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
    ]
    monkeypatch.setattr(sys, "argv", [f"{kind}.py", "--model", "bundled", *flags, *more])
    runpy.run_path(str(RECIPES / f"{kind}.py"), run_name="__main__")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "small")
    full = AutoModelForCausalLM.from_pretrained(bundled_model_path())
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in full.parameters())


def test_an_interrupted_run_equals_an_uninterrupted_one(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    saving = {"save_strategy": "steps", "save_steps": 6}
    runs = [trl_trainer("sft", base, tokenizer, args=saving, hesso={"distillation_alpha": 0.75}) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(base.parent / "out" / "checkpoint-6"))
    for (name, one), other in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(one, other), name
