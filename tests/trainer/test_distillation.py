"""Distillation: the divergence and its memory, the teacher, and the trainer's loss with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM, PreTrainedModel, Trainer

from hesso_hf import HessoConfig, HessoMixin, HessoTrainer
from hesso_hf.bundled import bundled_model_path
from hesso_hf.config.names import AUTO_DISTILLATION_ALPHA, AUTO_REPLAY_SHARE, TAUGHT_REPLAY_SHARE
from hesso_hf.errors import CheckpointMismatchError, HessoError
from hesso_hf.export.page.words import taught_by
from hesso_hf.hf_models.tiny_model import random_model
from hesso_hf.pruning.optimizer import HessoOptimizer
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.trainer import distillation, knowledge
from hesso_hf.trainer import teacher as teachers
from hesso_hf.trainer.divergence import divergence, lead, num_targets, surprise
from hesso_hf.trainer.forecast import Forecast
from hesso_hf.trainer.teacher import Teacher, fingerprint, frozen_copy, load_teacher
from tests.support.checks import propagated
from tests.support.tiny import MLP, VOCAB, tiny_gemma2, tiny_gpt2, tiny_llama, token_batches
from tests.support.training import LENGTH, blocks, hesso_config, logged, said_by_the_dense_model, trainer

ALPHA = 0.75


def tiny_granite(seed: int = 1) -> GraniteForCausalLM:
    """Granite divides its logits by a constant."""
    sizes = {"hidden_size": 60, "intermediate_size": MLP, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = GraniteConfig(vocab_size=VOCAB, num_hidden_layers=2, logits_scaling=3.0, **sizes)
    return random_model(GraniteForCausalLM, config, seed)


TEACHERS = {
    "llama": tiny_llama,
    "gemma2": lambda seed: tiny_gemma2(seed, final_logit_softcapping=0.5),
    "granite": tiny_granite,
    "gpt2": tiny_gpt2,
}


def masked_targets(ids: torch.Tensor) -> torch.Tensor:
    """The next tokens, some of them ignored."""
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    targets[0, 2:5] = -100
    return targets


def plain_divergence(
    teacher: PreTrainedModel, ids: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The definition: all logits at once."""
    with torch.no_grad():
        wanted = (teacher(input_ids=ids).logits.double() / temperature).softmax(-1)
    found = (logits.double() / temperature).softmax(-1)
    each = (wanted * (wanted.log() - found.log())).sum(-1)
    return each[targets != -100].sum() * temperature**2


@pytest.mark.parametrize("alone", [True, False], ids=["head-alone", "by-example"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("family", TEACHERS)
def test_value_and_gradient_are_the_definitions(
    family: str, temperature: float, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "CHUNK_LOGITS", 4 * VOCAB + 1)
    if not alone:
        monkeypatch.setattr(teachers, "_separate_", lambda *args: None)
    original = TEACHERS[family](2)
    teacher = Teacher(frozen_copy(original, torch.float32))
    assert (teacher._trunk is not None) is alone
    (ids,) = token_batches(1, shape=(3, 7))
    targets = masked_targets(ids)
    logits = TEACHERS[family](1)(input_ids=ids).logits.detach().requires_grad_()
    found = divergence(teacher, {"input_ids": ids, "labels": ids}, logits, targets, temperature)
    (gradient,) = torch.autograd.grad(found * 0.3, logits)
    expected = plain_divergence(original.eval(), ids, logits, targets, temperature)
    (wanted,) = torch.autograd.grad(expected * 0.3, logits)
    assert num_targets(targets) == 3 * 6 - 3
    assert float(expected.detach()) > 1e-3
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=0)
    assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-6)
    assert float(gradient[0, 2].abs().max()) == 0


def test_a_batch_without_targets_has_no_divergence() -> None:
    (ids,) = token_batches(1)
    logits = tiny_llama(1)(input_ids=ids).logits
    targets = torch.full_like(ids, -100)
    found = divergence(Teacher(tiny_llama(2)), {"input_ids": ids}, logits, targets, 1.0)
    found.backward()
    assert (float(found.detach()), num_targets(targets)) == (0.0, 1)  # what it is divided by


class Sizes(TorchDispatchMode):
    """Notes the elements of every tensor that an operation returns in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in given:
                self.found.append(each.numel())
        return result


def test_the_teachers_logits_never_live_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, shape = 1200, (3, 40)  # larger than any other tensor of the model
    whole = math.prod(shape) * vocab
    monkeypatch.setattr(teachers, "CHUNK_LOGITS", 8 * vocab)
    teacher = Teacher(tiny_llama(2, vocab_size=vocab))
    (ids,) = token_batches(1, shape=shape)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    logits = torch.randn(*shape, vocab, requires_grad=True)
    saved: list[torch.Tensor] = []
    with (
        Sizes() as sizes,
        torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each),
    ):
        found = divergence(teacher, {"input_ids": ids}, logits, targets, 1.0)
    assert [size for size in sizes.found if size >= whole // 4] == [whole]  # the gradient for the student's logits
    assert [each.numel() for each in saved if each.numel() >= whole // 4] == [whole]
    with Sizes() as sizes:
        found.backward()
    assert [size for size in sizes.found if size >= whole // 4] == [whole]


def test_the_backward_pass_keeps_one_tensor_of_the_logits_size_more(tmp_path: Path) -> None:
    """The trainer's own loss keeps its log-probabilities; the student's logits themselves aren't kept."""
    kept = {}
    for alpha in (0.0, ALPHA):
        run = trainer(tmp_path, config=hesso_config(distillation_alpha=alpha))
        batch = {name: torch.tensor(blocks()[:4][name]) for name in ("input_ids", "labels")}
        storages: dict[int, int] = {}
        alive: list[torch.Tensor] = []

        def keep(each: torch.Tensor, alive: Any = alive, storages: Any = storages) -> torch.Tensor:
            alive.append(each)
            storages[each.untyped_storage().data_ptr()] = each.numel()
            return each

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
            run.compute_loss(run.model.train(), dict(batch))
        kept[alpha] = sum(size == 4 * LENGTH * VOCAB for size in storages.values())
    assert kept == {0.0: 1, ALPHA: 2}


def test_a_frozen_copy_is_of_the_dtype_keeps_ties_and_stays_when_the_original_changes() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.forward = lambda *args, **kwargs: pytest.fail("the original was called")  # as some trainers put one there
    copied = frozen_copy(model, torch.bfloat16)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = fingerprint(copied)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert fingerprint(copied) == before
    assert Teacher(copied)._trunk is not None


def test_a_fingerprint_tells_weights_and_their_order_apart() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    assert fingerprint(tiny_llama()) == before
    gate, up = model.model.layers[0].mlp.gate_proj.weight, model.model.layers[0].mlp.up_proj.weight
    gate.data, up.data = up.data, gate.data
    swapped = fingerprint(model)
    up.data[0, 0] += 1e-4
    assert len({before, swapped, fingerprint(model)}) == 3


# -- the trainer ------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mixture_and_the_teacher_stays_the_original(tmp_path: Path) -> None:
    run = trainer(tmp_path, config=hesso_config(distillation_alpha=ALPHA, distillation_temperature=2.0), max_steps=12)
    original = tiny_llama().eval()
    run.train()
    assert run.distillation is not None
    assert run.distillation.teacher.fingerprint == fingerprint(original) == fingerprint(run.distillation.teacher.model)
    ids = torch.tensor(blocks()[:4]["input_ids"])
    batch = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        loss = run.compute_loss(run.model.train(), dict(batch))
        output = run.model(**batch)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = plain_divergence(original, ids, output.logits, targets, 2.0) / (4 * (LENGTH - 1))
    assert torch.allclose(loss.double(), (1 - ALPHA) * output.loss + ALPHA * expected, rtol=1e-5, atol=0)
    with torch.no_grad():
        assert run.compute_loss(run.model.eval(), dict(batch)) == output.loss


def test_the_log_has_the_divergence_and_the_plain_loss_and_the_watch_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[float] = []
    run = trainer(
        tmp_path, config=hesso_config(distillation_alpha=ALPHA), gradient_accumulation_steps=2, logging_steps=3
    )
    report = HessoOptimizer.report_loss

    def spy(optimizer: HessoOptimizer, loss: torch.Tensor) -> None:
        watched.append(float(loss))
        report(optimizer, loss)

    monkeypatch.setattr(HessoOptimizer, "report_loss", spy)
    run.train()
    divergences, losses = logged(run, "hesso/distillation_loss"), logged(run, "loss")
    assert len(divergences) == 4
    plain = [sum(watched[index : index + 3]) / 3 for index in range(0, 12, 3)]
    assert losses == pytest.approx(plain, rel=1e-5)
    assert divergences[0] < divergences[1]


def ragged(count: int = 32) -> Dataset:
    """Blocks in which more and more labels are ignored."""
    data = blocks(count).to_dict()
    for index, labels in enumerate(data["labels"]):
        labels[: index % (LENGTH - 2)] = [-100] * (index % (LENGTH - 2))
    return Dataset.from_dict(data)


def test_a_batch_of_eight_is_four_accumulated_ones_of_two(tmp_path: Path) -> None:
    weights, terms = [], []
    for options in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        config = hesso_config(distillation_alpha=ALPHA, calibration_examples=0)
        run = trainer(tmp_path, data=ragged(), config=config, optim="sgd", learning_rate=0.3, **options)
        run.train()
        weights.append(torch.cat([parameter.flatten() for parameter in run.model.parameters()]))
        terms.append(logged(run, "hesso/distillation_loss"))
    assert terms[0] == pytest.approx(terms[1], rel=1e-4, abs=1e-6)
    assert float((weights[0] - tiny_weights()).detach().abs().max()) > 1e-2
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=2e-5)


def tiny_weights() -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in tiny_llama().parameters()])


class _OwnLoss(Trainer):
    """Its loss is a mean over a micro-batch, and no forward of the whole model computes it."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model.lm_head(model.model(input_ids=inputs["input_ids"]).last_hidden_state)
        return model.loss_function(logits, inputs["labels"], vocab_size=VOCAB)


def test_a_loss_without_logits_takes_a_second_forward_and_means_are_averaged(tmp_path: Path) -> None:
    class Own(HessoMixin, _OwnLoss):
        pass

    config = hesso_config(distillation_alpha=ALPHA, calibration_examples=0)
    options = {"optim": "sgd", "learning_rate": 0.3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    runs = [trainer(tmp_path, config=config, trainer_class=kind, **options) for kind in (HessoTrainer, Own)]
    for run in runs:
        run.train()
    assert [run.distillation.own_forward for run in runs] == [False, True]
    expected, found = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in runs)
    assert torch.allclose(expected, found, rtol=0, atol=1e-5)  # all blocks have as many tokens
    terms = [logged(run, "hesso/distillation_loss") for run in runs]
    assert terms[0] == pytest.approx(terms[1], rel=1e-4, abs=1e-6)


def test_an_interrupted_run_has_the_original_as_the_teacher_again(tmp_path: Path) -> None:
    config, options = hesso_config(distillation_alpha=ALPHA), {"save_strategy": "steps", "save_steps": 6}
    whole = trainer(tmp_path / "a", config=config, **options)
    whole.train()
    again = trainer(tmp_path / "a", config=config, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    late = type(tiny_llama()).from_pretrained(tmp_path / "a" / "checkpoint-6")
    wrong = trainer(tmp_path / "a", model=late, config=config, **options)
    with pytest.raises(CheckpointMismatchError, match=r"another teacher.*original model"):
        wrong.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))


def test_without_a_weight_nothing_changes(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, config=config) for config in (hesso_config(), hesso_config(distillation_alpha=0.0))]
    for run in runs:
        run.train()
        assert run.distillation is None
        assert not logged(run, "hesso/distillation_loss")
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_lead_is_the_difference_of_the_losses_on_what_is_learnt() -> None:
    (ids,) = token_batches(1, shape=(3, 7))
    targets, student, original = masked_targets(ids), tiny_llama(1), tiny_llama(2).eval()
    logits = student(input_ids=ids).logits

    def loss(found: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(found.flatten(0, 1).double(), targets.flatten()))

    expected = loss(logits) - loss(original(input_ids=ids).logits)
    found = lead(Teacher(frozen_copy(original, torch.float32)), {"input_ids": ids}, logits, targets)
    assert abs(expected) > 1e-3
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_surprise_is_the_loss_less_the_entropy_on_what_is_learnt() -> None:
    batches, total, counted = [], torch.zeros((), dtype=torch.double), 0
    original = tiny_llama(2).eval()
    for ids in token_batches(2, shape=(3, 7)):
        targets = masked_targets(ids)
        with torch.no_grad():
            log_p = original(input_ids=ids).logits.double().log_softmax(-1)
        read = targets != -100
        total -= log_p[read].gather(-1, targets[read][:, None]).sum()
        total += (log_p.exp() * log_p).sum(-1)[read].sum()
        counted += int(read.sum())
        batches.append(({"input_ids": ids}, targets))
    assert float(total) / counted > 1e-2
    found = surprise(Teacher(frozen_copy(original, torch.float32)), batches)
    assert found == pytest.approx(float(total) / counted, abs=1e-5)


def test_a_text_as_a_model_writes_it_is_no_surprise() -> None:
    model = tiny_llama(3).eval()
    model.lm_head.weight.data.mul_(10)  # so that it is sure of something
    torch.manual_seed(5)
    start = torch.randint(3, VOCAB, (400, 1))
    written = model.generate(start, do_sample=True, max_new_tokens=24, min_new_tokens=24)
    teacher = Teacher(frozen_copy(model, torch.float32))
    known, unknown = (
        surprise(teacher, [({"input_ids": ids}, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100))])
        for ids in (written, torch.randint(3, VOCAB, written.shape))
    )
    assert abs(known) < knowledge.KNOWN < unknown, "about 10,000 tokens"


def automatic(folder: Path, teacher: Path, **changes: Any) -> HessoTrainer:
    """A run that learns from another model while that is ahead."""
    return trainer(folder, config=hesso_config(distillation_alpha="auto", distill_from=str(teacher)), **changes)


def scripted(monkeypatch: pytest.MonkeyPatch, leads: list[float]) -> list[float]:
    """Have a teacher that knows the data lead by so much at every comparison; return those that are left."""
    left = list(leads)
    monkeypatch.setattr(knowledge, "KNOWN", math.inf)
    monkeypatch.setattr(distillation, "lead", lambda *args: left.pop(0))
    monkeypatch.setattr(distillation, "STEPS_A_COMPARISON", 4)
    return left


def test_auto_learns_from_the_teacher_while_it_is_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(5).save_pretrained(tmp_path / "teacher")
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    left = scripted(monkeypatch, [1.0, -0.1, 2.0])  # one comparison at steps 0, 4 and 8 each
    run = automatic(tmp_path / "auto", tmp_path / "teacher", **options)
    run.train()
    assert left == []
    learnt = [entry["step"] for entry in run.state.log_history if "hesso/distillation_loss" in entry]
    assert learnt == [1, 2, 3, 4, 9, 10, 11, 12]
    runs = {}
    for alpha in (0.9, 0.0):
        config = hesso_config(
            distillation_alpha=alpha, **({"distill_from": str(tmp_path / "teacher")} if alpha else {})
        )
        runs[alpha] = trainer(tmp_path / str(alpha), config=config, **options)
        runs[alpha].train()
    assert logged(run, "grad_norm")[:4] == logged(runs[0.9], "grad_norm")[:4]
    assert logged(run, "loss")[4] == logged(runs[0.9], "loss")[4], "weights are the same so far"
    scripted(monkeypatch, [-1.0, -0.1, -0.1])
    behind = automatic(tmp_path / "behind", tmp_path / "teacher", **options)
    behind.train()
    assert not logged(behind, "hesso/distillation_loss")
    for one, other in zip(behind.model.parameters(), runs[0.0].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_auto_goes_on_as_it_was_between_two_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(5).save_pretrained(tmp_path / "teacher")
    options = {"save_strategy": "steps", "save_steps": 6}
    scripted(monkeypatch, [-1.0, 1.0, -1.0])
    whole = automatic(tmp_path / "out", tmp_path / "teacher", **options)
    whole.train()
    left = scripted(monkeypatch, [-1.0])  # at step 8; that of step 4 is in the checkpoint
    again = automatic(tmp_path / "out", tmp_path / "teacher", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert left == []
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_auto_goes_without_where_a_step_would_take_a_second_forward_or_tokens_have_no_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(HessoMixin, _OwnLoss):
        pass

    monkeypatch.setattr(knowledge, "KNOWN", math.inf)
    tiny_llama(5).save_pretrained(tmp_path / "teacher")
    with propagated(caplog):
        run = automatic(tmp_path / "own", tmp_path / "teacher", trainer_class=Own)
        run.train()
    assert "no distillation: Own's loss computes no logits" in caplog.text
    assert not logged(run, "hesso/distillation_loss")
    assert run.distillation is None, "what it took is free again"
    batch = {"input_ids": torch.tensor(blocks()[:4]["input_ids"])}
    new = automatic(tmp_path / "new", tmp_path / "teacher").distillation
    assert "no label for every token" in new._hindrance(batch, [torch.zeros(4, LENGTH, VOCAB)])


def test_replay_beside_a_teacher_that_goes_is_said_to_stay_as_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(HessoMixin, _OwnLoss):
        pass

    monkeypatch.setattr(knowledge, "KNOWN", math.inf)
    monkeypatch.setattr("hesso_hf.trainer.replay.MOST_WRITTEN", 1e9)  # in so short a run
    with propagated(caplog):
        run = knowing(tiny_llama(), tmp_path / "auto", trainer_class=Own)
        run.train()
    assert run.distillation is None
    assert run.replay.sizes.share == TAUGHT_REPLAY_SHARE
    told = "replay stays at 0.125 of the tokens, as beside a teacher; `distillation_alpha=0` takes 0.25 from the start"
    assert told in caplog.text


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"distillation_alpha": ALPHA}, TAUGHT_REPLAY_SHARE), ({"distillation_alpha": 0.0}, AUTO_REPLAY_SHARE),
        ({"distillation_alpha": ALPHA, "distill_from": "teacher"}, AUTO_REPLAY_SHARE),
        ({"distillation_alpha": ALPHA, "replay_share": 0.5}, 0.5),
    ],
    ids=["the base model", "no teacher", "another teacher", "a share that was given"],
)  # fmt: skip
def test_replay_is_halved_where_the_base_model_teaches(
    options: dict[str, Any], share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hesso_hf.trainer.replay.MOST_WRITTEN", 1e9)  # in so short a run
    monkeypatch.chdir(tmp_path)
    tiny_llama(5).save_pretrained("teacher")
    run = knowing(tiny_llama(), tmp_path / "out", save_strategy="steps", save_steps=8, **options)
    run.create_optimizer()
    assert run.replay.sizes.share == share


def test_a_run_goes_on_with_the_share_of_replay_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that an earlier version began: beside a teacher too it took a quarter."""
    monkeypatch.setattr("hesso_hf.trainer.replay.MOST_WRITTEN", 1e9)
    monkeypatch.setattr("hesso_hf.trainer.replay.TAUGHT_REPLAY_SHARE", AUTO_REPLAY_SHARE)
    options = {"save_strategy": "steps", "save_steps": 8, "distillation_alpha": ALPHA}
    knowing(tiny_llama(), tmp_path / "out", **options).train()
    monkeypatch.setattr("hesso_hf.trainer.replay.TAUGHT_REPLAY_SHARE", TAUGHT_REPLAY_SHARE)
    again = knowing(tiny_llama(), tmp_path / "out", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert again.replay.sizes.share == AUTO_REPLAY_SHARE


def test_rounding_puts_no_teacher_behind_and_a_named_one_need_not_know_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(5).save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(knowledge, "KNOWN", -math.inf)
    for lead_of_it, learnt in ((-2 * distillation.TIE, False), (-distillation.TIE / 10, True)):
        monkeypatch.setattr(distillation, "lead", lambda *args, found=lead_of_it: found)
        run = automatic(tmp_path / str(learnt), tmp_path / "teacher")
        run.train()
        assert run.distillation is not None
        assert bool(logged(run, "hesso/distillation_loss")) == learnt


def test_a_teacher_that_did_not_know_the_data_is_not_asked_again_when_training_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knowledge, "KNOWN", -math.inf)
    monkeypatch.setattr("hesso_hf.trainer.replay.MOST_WRITTEN", 1e9)  # in so short a run
    run = knowing(tiny_llama(), tmp_path)
    run.create_optimizer()
    assert run.replay is not None, "the base model is still there"
    assert run.replay.sizes.share == AUTO_REPLAY_SHARE
    monkeypatch.setattr(knowledge, "KNOWN", math.inf)
    run.hesso_run.teaching.begin(12)
    assert run.distillation is None
    assert run.hesso_run.teaching.record()["distillation"]["alpha"] == 0.0


def knowing(model: PreTrainedModel, folder: Path, **changes: Any) -> HessoTrainer:
    """A run with replay to judge on, and whatever is the default of distillation where nothing else is said."""
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 1, 2
    asked = {"replay_share": "auto", "distillation_alpha": HessoConfig(pruning_ratio=0.5).distillation_alpha}
    asked |= {name: changes.pop(name) for name in (*asked, "distill_from") if name in changes}
    return trainer(folder, model, config=hesso_config(**asked), **changes)


def test_by_default_the_base_model_is_learnt_from_where_it_knows_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hesso_hf.trainer.replay.MOST_WRITTEN", 1e9)  # in so short a run
    run = knowing(tiny_llama(), tmp_path / "known", data=said_by_the_dense_model())
    run.train()
    assert run.replay.sizes.share == TAUGHT_REPLAY_SHARE, "the user's data keep some of it too"
    assert logged(run, "hesso/distillation_loss")
    assert next(entry["step"] for entry in run.state.log_history if "hesso/distillation_loss" in entry) == 1
    told = "teacher: the model before pruning, on the data too while the student isn't ahead"
    assert told in Forecast(run).by_first_steps()
    run.save_model(str(tmp_path / "small"))
    record = json.loads((tmp_path / "small" / "pruning_report.json").read_text())["distillation"]
    assert (record["auto"], record["alpha"]) == (True, AUTO_DISTILLATION_ALPHA)
    assert record["surprise"] < 0


def test_by_default_a_base_model_that_does_not_know_the_data_is_not_learnt_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knowledge, "KNOWN", -math.inf)
    options = {"save_strategy": "steps", "save_steps": 5}
    run = knowing(tiny_llama(), tmp_path / "out", **options)
    run.train()
    assert run.distillation is None
    assert not logged(run, "hesso/distillation_loss")
    told = "teacher: none; the model before pruning doesn't know"
    assert any(line.startswith(told) for line in Forecast(run).by_first_steps())
    run.save_model(str(tmp_path / "small"))
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert report["distillation"]["alpha"] == 0.0
    assert "learnt from" not in (tmp_path / "small" / "README.md").read_text()
    page = (tmp_path / "small" / "report.html").read_text()
    assert f"{report['distillation']['surprise']:.2f} nats per token above what it expects" in page
    monkeypatch.undo()  # what the checkpoint says holds
    again = knowing(tiny_llama(), tmp_path / "out", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert again.distillation is None
    for (name, one), other in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_by_default_a_teacher_that_is_never_ahead_is_not_said_to_have_taught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "lead", lambda *args: -1.0)
    run = knowing(tiny_llama(), tmp_path / "out", data=said_by_the_dense_model())
    run.train()
    run.save_model(str(tmp_path / "small"))
    assert json.loads((tmp_path / "small" / "pruning_report.json").read_text())["distillation"]["learnt"] is False
    assert "learnt from" not in (tmp_path / "small" / "README.md").read_text()
    assert "never predicted them better" in (tmp_path / "small" / "report.html").read_text()


class OneLabel:
    """Batches with one label an example."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids[:, -1]}


def last_logits(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss on the last token."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, -1], labels)


@pytest.mark.parametrize("loader_of_its_own", [False, True])
def test_by_default_labels_of_whole_examples_are_learnt_without_a_teacher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, loader_of_its_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loader_of_its_own:  # what its batches are like is seen in the first step
        monkeypatch.setattr(distillation.Distillation, "knows", lambda *args: True)
    options = {"data_collator": OneLabel(), "compute_loss_func": last_logits}
    with propagated(caplog):
        run = knowing(tiny_llama(), tmp_path / "out", options=options)
        run.train()
    assert "no distillation: HessoTrainer's batches have no label for every token" in caplog.text
    assert run.distillation is None
    run.save_model(str(tmp_path / "small"))
    assert not taught_by(json.loads((tmp_path / "small" / "pruning_report.json").read_text())["distillation"])


def test_where_few_tokens_have_labels_more_examples_tell_what_the_teacher_knows(tmp_path: Path) -> None:
    data = blocks(2000)
    sparse = data.map(lambda row: {"labels": [-100] * (LENGTH - 1) + row["labels"][-1:]})
    run = trainer(tmp_path, data=sparse)
    teacher = distillation.Distillation(run, HessoConfig(pruning_ratio=0.5), Teacher(tiny_llama(2)))
    found = knowledge._examples(run.hesso_run.measurer)
    assert len(found) >= knowledge.KNOWN_TOKENS // 4
    assert teacher.knows(run.hesso_run.measurer) == (teacher.record()["surprise"] <= knowledge.KNOWN)
    none = trainer(tmp_path, data=data.map(lambda row: {"labels": [-100] * LENGTH}))
    assert not teacher.knows(none.hesso_run.measurer)


def test_a_checkpoint_with_a_weight_of_its_own_asks_for_it_again(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer(tmp_path, config=hesso_config(distillation_alpha=ALPHA), **options).train()
    asked = HessoConfig(**(hesso_config().to_dict() | {"distillation_alpha": "auto"}))
    with pytest.raises(CheckpointMismatchError, match=r"was made with `distillation_alpha` = 0.75"):
        trainer(tmp_path, config=asked, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_checkpoint_from_before_goes_on_without_a_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer(tmp_path, config=hesso_config(distillation_alpha=0.0), **options).train()
    asked = HessoConfig(**(hesso_config().to_dict() | {"distillation_alpha": "auto"}))
    again = trainer(tmp_path, config=asked, **options)
    with propagated(caplog):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert "was made with `distillation_alpha` = 0.0, and the run goes on so" in caplog.text
    assert again.distillation is None


def test_a_teacher_reads_what_its_forward_takes_in_its_own_dtype() -> None:
    class Seeing(type(tiny_llama())):  # type: ignore[misc]
        """Takes pixels, and nothing that it doesn't name."""

        def forward(self, input_ids: Any = None, pixels: Any = None, use_cache: Any = None, **_: Any) -> Any:
            assert pixels is None or pixels.dtype == self.dtype
            return super().forward(input_ids=input_ids, use_cache=False)

    class Strict(Seeing):
        def forward(self, input_ids: Any = None, pixels: Any = None, use_cache: Any = None) -> Any:
            return super().forward(input_ids=input_ids, pixels=pixels)

    (ids,) = token_batches(1, shape=(2, 7))
    for kind in (Seeing, Strict):
        model = kind(tiny_llama().config).to(torch.bfloat16)
        rows = list(Teacher(model).rows({"input_ids": ids, "pixels": torch.ones(2, 3), "weights": torch.ones(2)}))
        assert sum(len(logits) for _, logits in rows) == ids.numel()


def test_auto_has_no_teacher_where_none_is_at_hand(tmp_path: Path) -> None:
    run = trainer(tmp_path, config=hesso_config(distillation_alpha="auto"))
    run.train()
    assert run.distillation is None


def test_another_teacher_and_what_the_report_says(tmp_path: Path) -> None:
    folder = tmp_path / "private" / "large"
    tiny_gpt2(5).save_pretrained(folder)
    config = hesso_config(distillation_alpha=ALPHA, distill_from=str(folder))
    run = trainer(tmp_path / "out", config=config)
    run.train()
    run.save_model(str(tmp_path / "small"))
    text = (tmp_path / "small" / "pruning_report.json").read_text()
    record = json.loads(text)["distillation"]
    expected = {"alpha": ALPHA, "temperature": 1.0, "teacher": "large", "dtype": "float32"}
    assert {name: record[name] for name in expected} == expected
    assert record["fingerprint"] == fingerprint(tiny_gpt2(5))
    assert json.loads(text)["hesso_config"]["distill_from"] == "large"
    card = (tmp_path / "small" / "README.md").read_text()
    assert "learnt from large as the teacher" in card
    assert "private" not in text + card


def test_a_teacher_that_is_not_there_is_told_before_anything_is_proved(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    config = hesso_config(distillation_alpha=ALPHA, distill_from=missing)
    unproved = mock.patch.object(PruningPlan, "prepare", side_effect=AssertionError)
    with unproved, pytest.raises(HessoError, match=rf"`distill_from` \('{missing}'\): .*no such folder exists.*Hub"):
        trainer(tmp_path, config=config)


def test_a_teacher_with_another_vocabulary_or_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    student = tiny_llama(vocab_size=len(tokenizer))
    load_teacher(str(bundled_model_path()), student, tokenizer, torch.float32)
    with pytest.raises(HessoError, match=rf"distill_from.*vocabulary of {len(tokenizer)}, the student one of {VOCAB}"):
        load_teacher(str(bundled_model_path()), tiny_llama(), tokenizer, torch.float32)
    with pytest.raises(HessoError, match=r"`distill_from`.*can't be loaded"):
        load_teacher(str(tmp_path / "nowhere"), student, tokenizer, torch.float32)
    vocabulary = tokenizer.get_vocab()
    one, other = sorted(vocabulary, key=vocabulary.get)[20:22]

    class Swapped:
        def get_vocab(self) -> dict[str, int]:
            return vocabulary | {one: vocabulary[other], other: vocabulary[one]}

    with pytest.raises(HessoError, match=r"another tokenizer: the id of .* is 21 there and 20 in the student's"):
        load_teacher(str(bundled_model_path()), student, Swapped(), torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation_alpha": 1.5}, r"`distillation_alpha` \(1.5\) must be 'auto' or lie in"),
        ({"distillation_alpha": -0.1}, "distillation_alpha"),
        ({"distillation_alpha": math.nan}, "distillation_alpha"),
        ({"distillation_alpha": "much"}, r"`distillation_alpha` \('much'\) must be 'auto' or lie in"),
        (
            {"distillation_alpha": "auto", "distillation_temperature": 3.0, "replay_share": 0},
            "where no teacher is at hand",
        ),
        (
            {"distillation_alpha": 0.5, "distillation_temperature": 0},
            "`distillation_temperature` .0. must be a positive",
        ),
        ({"distillation_alpha": 0.5, "distillation_temperature": math.inf}, "distillation_temperature"),
        (
            {"distillation_alpha": 0, "distill_from": "a/teacher"},
            "`distill_from` .'a/teacher'. does nothing with `distillation_alpha`",
        ),
        (
            {"distillation_alpha": 0, "distillation_temperature": 3.0},
            "`distillation_temperature` .3.0. does nothing",
        ),
        ({"distillation_alpha": 0.5, "distill_from": 3}, "`distill_from` .int. must name a folder or a Hub id"),
    ],
)
def test_bad_values_are_refused_when_the_config_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HessoError, match=message):
        HessoConfig(pruning_ratio=0.5, **options)


def test_batches_without_labels_are_refused_by_name(tmp_path: Path) -> None:
    run = trainer(tmp_path, config=hesso_config(distillation_alpha=ALPHA))
    with pytest.raises(HessoError, match="needs `labels` in the batches"):
        run.compute_loss(run.model.train(), {"input_ids": token_batches(1)[0]})


def test_losses_and_steps_by_hand_need_no_training_loop(tmp_path: Path) -> None:
    run = trainer(tmp_path, config=hesso_config(distillation_alpha=ALPHA))
    batch = {name: torch.tensor(blocks()[:2][name]) for name in ("input_ids", "labels")}
    items = torch.tensor(2 * (LENGTH - 1))
    loss = run.compute_loss(run.model.train(), dict(batch), num_items_in_batch=items)
    step = run.training_step(run.model, dict(batch), items)
    assert float(step) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert all(parameter.grad is not None for parameter in run.model.parameters())
