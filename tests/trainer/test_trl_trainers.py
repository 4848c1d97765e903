"""docs/trl.md: every trainer that TRL exports trains and prunes, with what the page says that it makes use of."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hesso_hf import HessoConfig, HessoMixin
from hesso_hf.bundled import bundled_model_path
from hesso_hf.errors import HessoError
from hesso_hf.hf_models.tiny_model import logits_of
from hesso_hf.trainer import teaching
from hesso_hf.trainer.distillation import is_scaled
from hesso_hf.trainer.teacher import fingerprint
from tests.support import ROOT
from tests.support.checks import propagated
from tests.support.lora import lora_config, tiny_lora
from tests.support.tiny import random_model, tiny_llama
from tests.support.training import ALONE, logged

trl = pytest.importorskip("trl", reason="TRL isn't installed: pip install 'hesso_hf[trl]'")

PAGE = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
USES = ("trial removals", "healing", "replay", "distillation", "LoRA")
CELLS = dict(re.findall(r"^\| `(\w+Trainer)` \|((?:[^|\n]+\|){4}[^|\n]+)\|$", PAGE, re.MULTILINE))
ROWS = {
    name: dict(zip(USES, (cell.strip().split(",")[0] for cell in cells.split("|")), strict=True))
    for name, cells in CELLS.items()
}
GENERATING = ("GRPOTrainer", "RLOOTrainer", "DistillationTrainer")
UNREFERENCED = (
    "RLOOTrainer",
    "RewardTrainer",
    *(["DistillationTrainer"] if hasattr(trl, "DistillationTrainer") else []),
)
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(bundled_model_path())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A saved tiny model: references are loaded from where the model came from."""
    folder = tmp_path_factory.mktemp("trl") / "base"
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def examples(name: str) -> Dataset:
    rows = []
    for i in range(12):
        pair = {"chosen": f"it is {2 * i}", "rejected": f"no idea what {i} could be"}
        more = {
            "SFTTrainer": {"completion": pair["chosen"]},
            "KTOTrainer": {"completion": pair["chosen" if i % 2 else "rejected"], "label": bool(i % 2)},
            "DPOTrainer": pair,
            "RewardTrainer": pair,
        }
        rows.append({"prompt": "again " * (i % 3) + f"add {i} and {i}: "} | more.get(name, {}))
    return Dataset.from_list(rows)


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def model_of(name: str, base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if name != "RewardTrainer":
        return model
    model.config.num_labels = 1
    return random_model(LlamaForSequenceClassification, model.config, 1)


def made(name: str, base: Path, tokenizer: Any, folder: Path, hesso: dict[str, Any], **options: Any) -> Any:
    """Make one of TRL's trainers over a tiny model, pruning in the second of three steps."""
    trainer_class = type(f"Hesso{name}", (HessoMixin, getattr(trl, name)), {})
    args = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    if name in GENERATING:
        args["max_completion_length"] = 5
    if name in ("GRPOTrainer", "RLOOTrainer"):
        args["num_generations"] = 2
        options = {"reward_funcs": lengths} | options
    elif name == "DistillationTrainer":
        options = {"teacher_model": tiny_llama(2, vocab_size=len(tokenizer))} | options
    steps = {"warmup_steps": 1, "pruning_steps": 1, "pruning_periods": 1, "calibration_examples": 4}
    return trainer_class(
        model=options.pop("model", None) or model_of(name, base),
        args=getattr(trl, name.replace("Trainer", "Config"))(str(folder), **(args | options.pop("args", {}))),
        train_dataset=options.pop("train_dataset", examples(name)),
        processing_class=tokenizer,
        hesso_config=HessoConfig(pruning_ratio=0.3, **(steps | hesso)),
        **options,
    )


def check_saved(run: Any, folder: Path) -> None:
    """The smaller model is a stock one and computes what the trained one does."""
    run.save_model(str(folder))
    rewards = isinstance(run.hesso_run.model, LlamaForSequenceClassification)
    small = (AutoModelForSequenceClassification if rewards else AutoModelForCausalLM).from_pretrained(folder)
    assert type(small).__module__.startswith("transformers.")
    assert 1 - small.num_parameters() / run.hesso_plan.target.parameters_before == pytest.approx(0.3, abs=0.02)
    if not hasattr(run.model, "peft_config"):
        ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
        expected = logits_of(run.model.eval(), ids)
        assert (logits_of(small, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_page_lists_the_trainers_that_trl_exports() -> None:
    exported = {name for name in dir(trl) if name.endswith("Trainer")}
    assert exported <= ROWS.keys()
    assert all(set(uses.values()) <= {"on", "off", "if asked for"} for uses in ROWS.values())


@pytest.mark.parametrize("name", list(ROWS))
def test_every_trainer_trains_with_what_the_page_says(
    name: str, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uses = ROWS[name]
    with propagated(caplog):
        share = 0.5 if uses["replay"] == "on" else "auto"  # which is off in so short a run
        run = made(name, base, tokenizer, tmp_path, {"replay_share": share})
        before = fingerprint(run.model)
        run.train()
    assert fingerprint(run.model) != before
    assert all(loss == loss for loss in logged(run, "loss"))
    found = {
        "trial removals": run.hesso_plan.curves is not None,
        "healing": run.hesso_run.process.run.judging.healer is not None,
        "replay": run.replay is not None,
    }
    assert found == {use: uses[use] == "on" for use in found}
    warned = {
        "trial removals": "nothing is measured before training, the structures share the cut evenly: what Hesso",
        "healing": "`healing` ('auto'): nothing is healed: what Hesso",
        "replay": "no replay: ",
    }
    assert {use: warned[use] in caplog.text for use in found} == {use: uses[use] == "off" for use in found}
    check_saved(run, tmp_path / "small")


@pytest.mark.parametrize("name", list(ROWS))
def test_what_a_trainer_has_not_is_refused_before_any_work(
    name: str, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("a teacher is loaded")

    monkeypatch.setattr(teaching, "make_teacher", load)
    asked = [("distillation_alpha", {"distillation_alpha": 0.5, "replay_share": "auto"}, "distillation")]
    asked.append(("replay_share", {"replay_share": 0.5}, "replay"))
    if name in GENERATING:
        asked.append(("stream_basis", {"stream_basis": "principal"}, "trial removals"))
        asked.append(("cric_mode", {"cric": True, "cric_mode": "probe"}, "trial removals"))
    for argument, options, use in asked:
        if ROWS[name][use] == "off":
            with pytest.raises(HessoError, match=rf"`{argument}` \(.*(Hesso{name}|LlamaForSequenceClassification)"):
                made(name, base, tokenizer, tmp_path, ALONE | options)


def test_rewards_that_are_all_equal_are_warned_of(
    base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A policy's gradient is zero then, and says nothing of the units."""
    texts = {"equal": lambda completions, **_: [1.0] * len(completions), "different": lengths}
    for rewards, function in texts.items():
        caplog.clear()
        with propagated(caplog):
            made("GRPOTrainer", base, tokenizer, tmp_path, ALONE, reward_funcs=function).train()
        assert ("mlp_channels: all gradients of the steps that were looked at are zero" in caplog.text) == (
            rewards == "equal"
        )


# -- references ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ROWS if "#references" in CELLS[name]])
def test_a_reference_whose_base_is_pruned_is_refused_with_what_to_do(
    name: str, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    args = {"beta": 0.04} if name == "GRPOTrainer" else {}
    instead = "`beta=0.0`" if name in GENERATING else "`precompute_ref_log_probs=True`, or give a `ref_model`"
    with pytest.raises(HessoError, match=f"Hesso{name}'s reference is the base model .* set {instead}"):
        made(name, base, tokenizer, tmp_path, ALONE, peft_config=lora_config(), args=args)


@pytest.mark.parametrize("name", ["DPOTrainer", "GRPOTrainer"])
def test_a_reference_that_follows_the_trained_model_is_refused(
    name: str, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Its weights are mixed one by one, and mean other things once the stream is turned and units are gone."""
    with pytest.raises(HessoError, match=r"`sync_ref_model` \(True\) mixes the trained weights into the reference"):
        made(name, base, tokenizer, tmp_path, ALONE, args={"sync_ref_model": True, "beta": 0.04})


@pytest.mark.parametrize("name", ["DPOTrainer", pytest.param("KTOTrainer", marks=pytest.mark.slow)])
def test_a_reference_of_an_adapter_is_computed_before_its_base_is_pruned(
    name: str, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Of an adapter that was trained before, TRL's reference is a copy: it has the adapter's log-probabilities."""
    model = tiny_lora(model_of(name, base))
    args = {"precompute_ref_log_probs": True, "disable_dropout": True}
    run = made(name, base, tokenizer, tmp_path, ALONE, model=model, args=args)
    assert list(model.peft_config) == ["default"]
    (batch,) = run.hesso_run.measurer.examples(1)
    column = "ref_chosen_logps" if name == "DPOTrainer" else "ref_logps"
    learnt = batch["completion_mask"][:1, 1:].bool()
    with torch.no_grad():
        said = model.eval()(batch["input_ids"][:1]).logits[:, :-1].double().log_softmax(-1)
    expected = said.gather(-1, batch["input_ids"][:1, 1:, None])[..., 0][learnt].sum()
    assert abs(float(batch[column][0]) - float(expected)) <= 1e-3
    before = run.train_dataset[column]
    run.train()
    assert run.train_dataset[column] == before
    check_saved(run, tmp_path / "small")


def test_a_reference_of_its_own_stays_whole_beside_an_adapter(
    base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    reference = model_of("DPOTrainer", base)
    before = fingerprint(reference)
    run = made("DPOTrainer", base, tokenizer, tmp_path, ALONE, model=tiny_lora(model_of("", base)), ref_model=reference)
    run.train()
    assert fingerprint(reference) == before
    check_saved(run, tmp_path / "small")


@pytest.mark.parametrize(
    "name", ["GRPOTrainer", *(pytest.param(name, marks=pytest.mark.slow) for name in UNREFERENCED)]
)
def test_an_adapter_is_trained_where_there_is_no_reference(
    name: str, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    adapter = lora_config(task_type="SEQ_CLS" if name == "RewardTrainer" else "CAUSAL_LM")
    args = {"beta": 0.0} if name in ("GRPOTrainer", "RLOOTrainer") else {}
    run = made(name, base, tokenizer, tmp_path, ALONE, peft_config=adapter, args=args)
    run.train()
    check_saved(run, tmp_path / "small")


# -- data of SFT --------------------------------------------------------------------------------------------------


def conversations() -> Dataset:
    pairs = [(f"add {i} and {i}", f"it is {2 * i}") for i in range(12)]
    said = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    return Dataset.from_list([{"messages": messages} for messages in said])


DATA: dict[str, tuple[dict[str, Any], bool]] = {  # arguments, and whether all tokens are learnt
    "text": ({}, True),
    "packing": ({"packing": True, "max_length": 24}, True),
    "packing wrapped": ({"packing": True, "packing_strategy": "wrapped", "max_length": 24}, True),
    "completion": ({}, False),
    "messages": ({}, True),
    "assistant_only_loss": ({"assistant_only_loss": True}, False),
}
DEAR = ("text", "packing wrapped", "messages")  # which differ from the others but little


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow) if form in DEAR else form for form in DATA]
)
def test_sft_prunes_on_every_form_of_data(
    form: str, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    args, learns_all = DATA[form]
    data = examples("SFTTrainer")
    if form in ("messages", "assistant_only_loss"):
        data, tokenizer = conversations(), copy.deepcopy(tokenizer)
        tokenizer.chat_template = CHAT
    elif form != "completion":
        data = Dataset.from_dict({"text": [row["prompt"] + row["completion"] for row in data]})
    run = made("SFTTrainer", base, tokenizer, tmp_path, {"replay_share": 0.5}, args=args, train_dataset=data)
    (batch,) = run.hesso_run.measurer.examples(1)
    learnt = (batch["labels"] != -100).float().mean()
    assert learnt >= 0.85 if learns_all else 0.05 <= learnt <= 0.75
    run.train()
    assert run.hesso_plan.curves is not None
    assert run.hesso_run.process.run.judging.healer is not None
    check_saved(run, tmp_path / "small")


# -- losses before training ---------------------------------------------------------------------------------------


def test_sft_measures_a_mixture_of_experts_with_its_balancing_loss(
    base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """TRL divides that loss by the batches that are accumulated, which are one where a single example is measured."""
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 60, "intermediate_size": 44, "moe_intermediate_size": 28,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "num_experts": 5,
        "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5,
    }  # fmt: skip
    runs = []
    for accumulated in (1, 2):
        model = random_model(Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes), 1)
        args = {"gradient_accumulation_steps": accumulated}
        runs.append(made("SFTTrainer", base, tokenizer, tmp_path, ALONE, model=model, args=args))
        runs[-1].train()
    assert runs[0].hesso_plan.curves == runs[1].hesso_plan.curves
    (batch,) = runs[1].hesso_run.measurer.examples(1)
    one, other = (float(run.hesso_run.measurer.loss(runs[0].model, batch)) for run in runs)
    assert one == other
    assert runs[1].current_gradient_accumulation_steps == 2
    check_saved(runs[1], tmp_path / "small")


@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer", "RewardTrainer"])
def test_losses_and_steps_by_hand_need_no_training_loop(
    name: str, base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    run = made(name, base, tokenizer, tmp_path, ALONE, args={"gradient_accumulation_steps": 2})
    batch = next(iter(run.get_train_dataloader()))
    items = torch.tensor(30)
    loss = run.compute_loss(run.model.train(), dict(batch), num_items_in_batch=items)
    step = run.training_step(run.model, dict(batch), items)
    parts = 1 if is_scaled(run, items) else 2  # where it isn't divided by the items of all, the trainer divides it
    assert name != "SFTTrainer" or parts == 1
    assert abs(float(step) - float(loss.detach()) / parts) <= 1e-6
