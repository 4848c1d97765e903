"""Replay: text that the base model wrote, the loss on it, and runs that go on with the same."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.bundled import bundled_model_path
from hesso_hf.errors import CheckpointMismatchError, HessoError
from hesso_hf.trainer import hub, knowledge, replay, replay_text, teaching
from hesso_hf.trainer.replay import FEWEST, JUDGED_SHARE, MOST_WRITTEN, Replay, ReplaySizes, why_not
from hesso_hf.trainer.replay_text import MARK, Script, load_windows, order, read_windows, save_windows, write_windows
from hesso_hf.trainer.teacher import Teacher, frozen_copy
from tests.engines.test_fsdp import RATIO, build
from tests.support import fsdp_cpu
from tests.support.checks import propagated
from tests.support.lora import tiny_lora
from tests.support.tiny import VOCAB, tiny_gpt2, tiny_llama
from tests.support.training import LENGTH, arguments, blocks, hesso_config, logged, said_by_the_dense_model, trainer

START, END = 1, 2
SHARE = 0.5
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def base(seed: int = 1) -> PreTrainedModel:
    """A model that knows what its texts begin and end with."""
    model = tiny_llama(seed)
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = START, END
    return model


# -- what is written ---------------------------------------------------------------------------------------------------


def test_windows_begin_with_the_start_token_and_go_on_with_another_text_where_one_ends():
    model = base()
    windows = write_windows(model, Script.of(model, None), 40, 30)
    assert windows.shape == (40, 30)
    assert (windows[:, 0] == START).all()
    ends = (windows[:, :-1] == END).nonzero()
    assert len(ends), "no text ended: nothing was tested"
    assert (windows[ends[:, 0], ends[:, 1] + 1] == START).all()


def test_writing_leaves_the_model_and_random_numbers_as_they_were():
    model = base().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    settings = model.generation_config
    first = write_windows(model, Script.of(model, None), 5, 12, seed=4)
    assert torch.equal(torch.rand(4), expected)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings
    assert torch.equal(write_windows(model, Script.of(model, None), 5, 12, seed=4), first)
    assert not torch.equal(write_windows(model, Script.of(model, None), 5, 12, seed=5), first)


def test_windows_are_drawn_from_the_models_own_distribution():
    model = base(seed=2)
    windows = write_windows(model, Script.of(model, None), 3000, 3)
    with torch.no_grad():
        wanted = model.eval()(input_ids=torch.tensor([[START]])).logits[0, 0].softmax(-1)
    found = torch.bincount(windows[:, 1], minlength=VOCAB) / len(windows)
    assert (found - wanted).abs().max() <= 4 * (0.25 / 3000) ** 0.5


def test_a_start_token_that_ends_texts_too_isnt_written_twice():
    model = tiny_gpt2()
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = END
    windows = write_windows(model, Script.of(model, None), 60, 30)
    assert (windows[:, 0] == END).all()
    after = windows[:, 1:][windows[:, :-1] == END]
    assert (after != END).any()


def test_of_a_chat_the_users_turn_is_written_and_then_the_answer():
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    tokenizer.chat_template = CHAT
    script = Script.of(base(), tokenizer)
    assert [tokenizer.decode(part) for part in script.parts] == ["<|user|>", "</s><|assistant|>"]
    assert MARK not in tokenizer.decode(sum(script.parts, ()))
    prompter = replay_text._Prompter(Script(((5, 6), (7, 8)), frozenset({END})))
    written = [[5, 6, 9]]
    for _ in range(8):
        scores = prompter(torch.tensor(written), torch.zeros(1, VOCAB))
        forced = (scores[0] > -torch.inf).sum() == 1
        written[0].append(int(scores[0].argmax()) if forced else END)
    assert written[0] == [5, 6, 9, END, 7, 8, END, 5, 6, END, 7]


def test_a_processor_of_images_and_texts_writes_as_its_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    template = CHAT.replace("m['content']", "m['content'][0]['text']")
    script = Script.of(base(), LlavaProcessor(CLIPImageProcessor(), tokenizer, chat_template=template))
    assert [tokenizer.decode(part) for part in script.parts] == ["<|user|>", "</s><|assistant|>"]
    assert tokenizer.eos_token_id in script.ends
    tokenizer.chat_template = "{{ messages[0]['content'].nothing.there }}"
    with pytest.raises(HessoError, match="the chat template takes no user's words"):
        Script.of(base(), tokenizer)


def test_a_text_without_a_beginning_is_refused():
    model = tiny_llama()
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(HessoError, match=r"replay_dataset"):
        Script.of(model, None)


def test_a_data_set_is_cut_into_windows(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    texts = ["First text.", "The second, which is longer, as the first window ends within it."]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    ids = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    windows = read_windows(str(tmp_path / "texts.jsonl"), tokenizer, 3, 10)
    assert windows.tolist() == torch.tensor(ids[:30]).view(3, 10).tolist()
    with pytest.raises(HessoError, match="too few for a window of 1000"):
        read_windows(str(tmp_path / "texts.jsonl"), tokenizer, 3, 1000)
    (tmp_path / "other.jsonl").write_text(json.dumps({"story": "x"}))
    with pytest.raises(HessoError, match=r"no column `text` of strings, but \['story'\]"):
        read_windows(str(tmp_path / "other.jsonl"), tokenizer, 3, 10)
    with pytest.raises(HessoError, match=r"`replay_dataset` \('.*nowhere'\) can't be loaded"):
        read_windows(str(tmp_path / "nowhere"), tokenizer, 3, 10)


def test_windows_are_never_uploaded():
    assert not list(filter_repo_objects([f"{replay.FOLDER}/{replay_text.FILE}"], ignore_patterns=hub._NOT_PUBLISHED))


def test_kept_windows_are_found_where_they_were_made_alike(tmp_path: Path):
    windows = torch.arange(12).view(3, 4)
    save_windows(tmp_path / "replay", windows, {"seed": "1"})
    assert torch.equal(load_windows(tmp_path / "replay", {"seed": "1"}), windows)
    assert load_windows(tmp_path / "replay", {"seed": "2"}) is None
    assert load_windows(tmp_path, {"seed": "1"}) is None
    (tmp_path / "replay" / "windows.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointMismatchError, match=r"can't be read .* delete it"):
        load_windows(tmp_path / "replay", {"seed": "1"})


# -- how much, and which -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("micro_batch", [40, 2048, 16384])
def test_the_share_of_all_tokens_is_the_one_asked_for(share: float, micro_batch: int):
    sizes = ReplaySizes.of(share, micro_batch, micro_batches=1000)
    tokens = sizes.rows * sizes.length
    assert tokens / (tokens + micro_batch) == pytest.approx(share, abs=0.02)
    assert sizes.length <= 512
    written, run = sizes.windows * sizes.length, 1000 * micro_batch
    assert written <= MOST_WRITTEN * run or sizes.windows == FEWEST
    assert ReplaySizes.of(share, micro_batch, 1000, longest=30).length <= 30
    assert ReplaySizes.of(share, micro_batch, micro_batches=2).dear


def test_every_window_comes_once_a_pass_whatever_is_taken_at_a_time():
    whole = order(7, 0, 21, seed=3)
    assert all(sorted(whole[turn : turn + 7]) == list(range(7)) for turn in (0, 7, 14))
    assert whole[:7] != whole[7:14]
    assert [order(7, start, 3, seed=3) for start in range(0, 21, 3)] == [whole[i : i + 3] for i in range(0, 21, 3)]


# -- the loss ----------------------------------------------------------------------------------------------------------


def fake_trainer(step: int = 0, parts: int = 1) -> Any:
    return SimpleNamespace(
        state=SimpleNamespace(global_step=step), args=SimpleNamespace(gradient_accumulation_steps=parts, seed=5),
        accelerator=SimpleNamespace(num_processes=1, process_index=0), current_gradient_accumulation_steps=parts,
        loss_is_scaled_for_ga=None, compute_loss_func=None, model_accepts_loss_kwargs=True,
    )  # fmt: skip


@pytest.mark.parametrize(("items", "parts"), [(None, 1), (torch.tensor(36), 1), (torch.tensor(72), 2), (None, 2)])
def test_the_loss_is_the_users_and_the_divergence_by_their_shares(items: Any, parts: int):
    student, original = tiny_llama(seed=1).eval(), tiny_llama(seed=2).eval()
    windows = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))
    run = fake_trainer(parts=parts)
    mixer = Replay(run, Teacher(frozen_copy(original, torch.float32)), ReplaySizes(0.25, 3, 9, 5), windows, "it")
    user = torch.tensor(1.75, requires_grad=True)
    loss = mixer.mixed(user, student, items)
    loss.backward()
    ids = windows[order(5, 0, 3, 5)]
    with torch.no_grad():
        wanted = original(input_ids=ids).logits.double().log_softmax(-1)
    found = student(input_ids=ids).logits.double().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
    scaled = items is not None
    expected = 0.75 * 1.75 + 0.25 * float(divergence) / (parts if scaled else 1)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert float(user.grad) == 0.75
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    (0.25 * divergence / (parts if scaled else 1)).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-6, name
    made = loss.detach() / (1 if scaled else parts)  # as the trainer returns it of a micro-batch
    assert float(mixer.without(made)) == pytest.approx(1.75 / (1 if scaled else parts))
    assert mixer.mean() == pytest.approx(float(divergence) / parts, abs=1e-6)


class Sighted(nn.Module):
    """Has weights for what replay, which is text alone, doesn't hold."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.sight = tiny_llama(seed=1), nn.Linear(3, 1)

    def forward(self, input_ids: torch.Tensor, seen: torch.Tensor | None = None, **kwargs: Any) -> Any:
        output = self.text(input_ids=input_ids, **kwargs)
        output.logits = output.logits if seen is None else output.logits + self.sight(seen)
        return output


def sighted_job(folder: str, processes: int) -> None:
    """Take backward passes of DDP with replay, which doesn't use what the user's batch does."""
    torch.distributed.init_process_group("gloo")
    model = DistributedDataParallel(Sighted(), find_unused_parameters=True)
    windows, teacher = torch.randint(3, VOCAB, (5, 9)), Teacher(frozen_copy(tiny_llama(seed=2), torch.float32))
    mixer = Replay(fake_trainer(), teacher, ReplaySizes(0.25, 3, 9, 5), windows, "it")
    for whole in (model, model, torch.compile(model)):  # Accelerate compiles what DDP is around as well
        with torch.compiler.set_stance("force_eager"):
            user = whole(windows[:2], torch.ones(2, 9, 3) + torch.distributed.get_rank()).logits.square().mean()
            mixer.mixed(user, whole, None).backward()
    torch.save(model.module.sight.weight.grad, f"{folder}/rank{torch.distributed.get_rank()}.pt")


def test_replay_may_leave_weights_unused_that_ddp_waits_for(tmp_path: Path):
    done = fsdp_cpu.run(tmp_path, __name__, "sighted_job", sharded=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(*found)
    assert bool(found[0].any())


def test_micro_batches_and_processes_take_windows_in_turn():
    taken = []
    for rank in range(2):
        run = fake_trainer(parts=2)
        run.accelerator = SimpleNamespace(num_processes=2, process_index=rank)
        mixer = Replay(run, None, ReplaySizes(0.5, 3, 4, 50), torch.arange(50).view(50, 1), "it")  # type: ignore[arg-type]
        for step in range(2):
            run.state.global_step = step
            taken.append([mixer._next_windows().flatten().tolist() for _ in range(2)])
    (a, c), (b, d) = taken[:2], taken[2:]
    together = [window for step in ((a, b), (c, d)) for micro in range(2) for side in step for window in side[micro]]
    assert together == order(50, 0, 24, 5)


def test_text_that_is_given_is_replayed_however_short_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Nothing has to be written, and fewer windows than would be learnt by heart are all that such a run takes."""
    text = "What the base model knew is held in rows like this one, of some length. "
    (tmp_path / "known.jsonl").write_text("\n".join(json.dumps({"text": text * 3}) for _ in range(40)))
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    config = hesso_config(replay_share="auto", replay_dataset=str(tmp_path / "known.jsonl"))
    options = {"processing_class": tokenizer}
    model = tiny_llama(vocab_size=len(tokenizer))
    run = trainer(tmp_path / "run", model, config, options=options, max_steps=8)
    with propagated(caplog):
        run.train()
    assert "no replay" not in caplog.text
    assert run.replay is not None
    assert run.replay.sizes.dear
    assert 0 < len(run.replay.windows) < FEWEST


# -- runs --------------------------------------------------------------------------------------------------------------


def replayed(folder: Path, model: Any = None, share: Any = SHARE, **changes: Any) -> HessoTrainer:
    return trainer(folder, model or base(), config=hesso_config(replay_share=share), **changes)


def test_a_run_logs_the_users_loss_and_the_divergence_apart(tmp_path: Path):
    run, plain = replayed(tmp_path / "a"), trainer(tmp_path / "b", base())
    run.train()
    plain.train()
    logs, others = run.state.log_history, plain.state.log_history
    assert logs[0]["loss"] == others[0]["loss"], "the first step's, before replay has changed anything"
    assert logs[0]["hesso/replay_loss"] == pytest.approx(0.0, abs=1e-6), "the student is the base model"
    assert logs[7]["hesso/replay_loss"] > 1e-3
    assert "hesso/replay_loss" not in others[0]
    run.save_model(str(tmp_path / "small"))
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert report["replay"]["share"] == SHARE
    assert not (tmp_path / "small" / "replay").exists()


def test_units_are_judged_and_healed_on_replay_too(tmp_path: Path):
    """As many tokens of it as of the user's data at most, and without replay of these alone."""
    batches = {}
    for share in (0, SHARE):
        config = hesso_config(replay_share=share, healing="auto", healing_tokens=4 * LENGTH)
        run = trainer(tmp_path / str(share), base(), config=config)
        run.create_optimizer()
        batches[share] = run.hesso_run.process.run.judging.healer._batch
    windows = run.replay.windows
    assert len(windows) > 4
    plain, mixed = batches[0]["input_ids"], batches[SHARE]["input_ids"]
    assert torch.equal(mixed[: len(plain), : plain.shape[1]], plain)
    assert len(mixed) == len(plain) + round(4 * LENGTH / windows.shape[1])
    assert torch.equal(mixed[len(plain) :, : windows.shape[1]], windows[: len(mixed) - len(plain)])
    assert int(batches[SHARE]["attention_mask"].sum()) == plain.numel() + (len(mixed) - len(plain)) * windows.shape[1]


def test_a_run_too_short_for_replay_judges_units_on_some_of_it_and_goes_on_so(tmp_path: Path):
    """The base model is let go once it has written."""
    config = hesso_config(replay_share="auto", healing="auto", saliency="reconstruction")

    def begun() -> HessoTrainer:
        return trainer(tmp_path, base(), config=config, save_strategy="steps", save_steps=5)

    whole, again, other = begun(), begun(), trainer(tmp_path / "other", base(), config=hesso_config(healing="auto"))
    other.create_optimizer()
    whole.train()
    teaching, healer = whole.hesso_run.teaching, whole.hesso_run.process.run.judging.healer
    assert (whole.replay, teaching._base) == (None, None)
    known = teaching.known
    assert known is not None
    assert known.windows.numel() <= JUDGED_SHARE * whole.args.max_steps * 4 * LENGTH + known.windows.shape[1]
    rows = len(other.hesso_run.process.run.judging.healer._batch["input_ids"])
    assert torch.equal(healer._batch["input_ids"][rows:, : known.windows.shape[1]], known.windows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.hesso_run.teaching._base is None
    over = begun()
    over.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{whole.state.global_step}"))
    assert (over.hesso_run.teaching.known, over.hesso_run.teaching._base) == (None, None), "nothing is judged any more"
    for (name, found), expected in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_replay_keeps_the_pruned_model_nearer_to_the_base_model(tmp_path: Path):
    ids = write_windows(base(), Script.of(base(), None), 32, 20, seed=77)
    apart = {}
    for share in (0, SHARE):
        run = replayed(tmp_path / str(share), share=share, max_steps=60)
        run.train()
        with torch.no_grad():
            wanted = base().eval()(input_ids=ids).logits.log_softmax(-1)
            found = run.model.eval()(input_ids=ids).logits.log_softmax(-1)
        apart[share] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert apart[SHARE] < 0.7 * apart[0]


@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_a_run_that_goes_on_is_the_same_bit_for_bit(lost: bool, tmp_path: Path):
    """Also where the windows were lost: the base model writes them again."""
    whole = replayed(tmp_path / "whole", save_strategy="steps", save_steps=5)
    whole.train()
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "again" / "checkpoint-5")
    if not lost:
        shutil.copytree(tmp_path / "whole" / "replay", tmp_path / "again" / "replay")
    again = replayed(tmp_path / "again")
    again.train(resume_from_checkpoint=True)
    assert torch.equal(again.replay.windows, whole.replay.windows)
    for (name, found), expected in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_another_base_model_is_refused_on_going_on(tmp_path: Path):
    replayed(tmp_path, save_strategy="steps", save_steps=5, max_steps=10).train()
    with pytest.raises(CheckpointMismatchError, match="replay of another base model"):
        replayed(tmp_path, base(seed=9), max_steps=10).train(resume_from_checkpoint=True)


def test_a_run_with_replay_isnt_gone_on_with_where_there_can_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replayed(tmp_path, share="auto", save_strategy="steps", save_steps=20, max_steps=40).train()
    monkeypatch.setattr(teaching, "device_with_room", lambda device, size: torch.device("meta"))
    with pytest.raises(CheckpointMismatchError, match="checkpoint-20 was trained with replay, and here there is none"):
        replayed(tmp_path, share="auto", max_steps=40).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))


def test_units_judged_on_replay_arent_judged_on_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once all are judged it makes no difference."""
    config = hesso_config(replay_share="auto", healing="auto", saliency="reconstruction")
    run = trainer(tmp_path, base(), config=config, save_strategy="steps", save_steps=5)
    run.train()
    monkeypatch.setattr(teaching, "device_with_room", lambda device, size: torch.device("meta"))
    with pytest.raises(CheckpointMismatchError, match="checkpoint-5 was trained with replay, and here there is none"):
        trainer(tmp_path, base(), config=config).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    over = trainer(tmp_path, base(), config=config)
    over.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{run.state.global_step}"))
    assert over.state.global_step == run.state.global_step


def crowded_job(folder: str, processes: int) -> None:
    """Make a trainer where the second process' device is full; leave whether there is to be replay."""
    rank = int(os.environ["RANK"])
    teaching.device_with_room = lambda device, size: torch.device("meta") if rank else device
    run = trainer(Path(folder), base(), config=hesso_config(replay_share="auto"))
    Path(f"{folder}/rank{rank}").write_text(str(run.hesso_run.teaching._base is not None))


def test_all_processes_go_without_replay_where_one_has_no_room(tmp_path: Path):
    done = fsdp_cpu.run(tmp_path, __name__, "crowded_job", sharded=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["False", "False"]


def divided_job(folder: str, processes: int, **hesso: Any) -> None:
    """Train with short windows, so that processes share them evenly; leave what came of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "LONGEST", 10)
        run = build(folder, 16, processes, hesso=RATIO | {"replay_share": SHARE} | hesso)
        run.train()
    weights = {n: p.detach() for n, p in run.accelerator.unwrap_model(run.model).named_parameters()}
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}
    found = {"weights": whole, "replay": logged(run, "hesso/replay_loss"), "windows": run.replay.windows}
    torch.save(found, f"{folder}/rank{run.args.process_index}.pt")


@pytest.mark.parametrize(
    ("sharded", "options"),
    [(True, {}), (False, {"healing": "auto", "distillation_alpha": "auto"})],
    ids=["fsdp", "ddp"],
)
def test_two_processes_equal_one(sharded: bool, options: dict[str, Any], tmp_path: Path):
    done = fsdp_cpu.run(tmp_path / "two", __name__, "divided_job", sharded=sharded, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    (tmp_path / "one").mkdir()
    divided_job(str(tmp_path / "one"), 1, **options)
    expected = torch.load(tmp_path / "one" / "rank0.pt", weights_only=True)
    assert max(expected["replay"]) > 1e-3
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True)
        assert torch.equal(found["windows"], expected["windows"])
        assert found["replay"] == pytest.approx(expected["replay"], abs=1e-5)
        for name, weight in expected["weights"].items():
            assert (found["weights"][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


def test_measuring_a_loss_takes_no_replay(tmp_path: Path):
    run = replayed(tmp_path)
    run.train()
    batch = {key: torch.tensor(run.train_dataset[:2][key]) for key in ("input_ids", "labels")}
    run.model.train()
    plain = Trainer.compute_loss(run, run.model, dict(batch))
    assert torch.equal(run.compute_loss(run.model, dict(batch)), plain)


def test_accumulated_gradients_and_adapters(tmp_path: Path):
    run = replayed(tmp_path / "a", gradient_accumulation_steps=2, per_device_train_batch_size=2)
    run.train()
    assert run.replay.sizes.rows * run.replay.sizes.length == 2 * LENGTH
    model: Any = tiny_lora(base())
    run = replayed(tmp_path / "b", model)
    run.train()
    assert run.state.log_history[7]["hesso/replay_loss"] > 1e-4
    run.save_model(str(tmp_path / "small"))


def test_the_teacher_of_distillation_is_the_one_of_replay(tmp_path: Path):
    config = hesso_config(replay_share=SHARE, distillation_alpha=0.5)
    run = trainer(tmp_path, base(), config=config)
    run.train()
    assert run.replay.teacher is run.distillation.teacher
    assert {"hesso/replay_loss", "hesso/distillation_loss"} <= run.state.log_history[-2].keys()


def test_the_base_model_teaches_the_users_data_too_while_it_knows_them(tmp_path: Path):
    config = hesso_config(replay_share=SHARE, distillation_alpha="auto")
    data = said_by_the_dense_model(base())
    run = trainer(tmp_path / "known", base(), config=config, data=data, max_steps=14, learning_rate=1e-4)
    run.train()
    assert run.distillation.teacher is run.replay.teacher
    assert len(logged(run, "hesso/distillation_loss")) == 14, "before anything goes it isn't behind the student"
    run.save_model(str(tmp_path / "small"))
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert (report["distillation"]["alpha"], report["distillation"]["ahead"]) == (0.9, True)


def test_the_base_model_teaches_where_a_run_is_too_short_for_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knowledge, "KNOWN", math.inf)
    config, options = hesso_config(replay_share="auto", distillation_alpha="auto"), {"save_strategy": "steps"}
    runs = [trainer(tmp_path, base(), config=config, save_steps=5, **options) for _ in range(2)]
    runs[0].train()
    assert (runs[0].replay, runs[0].distillation.auto) == (None, True)
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for (name, found), expected in zip(runs[1].model.named_parameters(), runs[0].model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    monkeypatch.setattr(teaching, "device_with_room", lambda device, size: torch.device("meta"))
    with pytest.raises(
        CheckpointMismatchError, match="checkpoint-5 was trained with a teacher, and here there is none"
    ):
        trainer(tmp_path, base(), config=config).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_auto_is_off_where_it_costs_too_much_or_the_model_writes_nothing(tmp_path: Path):
    run = replayed(tmp_path, share="auto", max_steps=7)
    run.create_optimizer()
    assert run.replay is None
    assert not (tmp_path / "replay").exists(), "nothing is judged on it either"
    run = replayed(tmp_path / "long", share="auto", max_steps=40)
    run.create_optimizer()
    assert run.replay is not None
    sizes = {"d_model": 60, "d_kv": 8, "d_ff": 44, "num_heads": 6, "num_layers": 2, "vocab_size": VOCAB}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    assert "writes no text" in why_not(model)
    with pytest.raises(HessoError, match=r"`replay_share` \(0.25\): T5ForConditionalGeneration writes no text"):
        trainer(tmp_path / "t5", model, config=HessoConfig(pruning_ratio=0.2, replay_share=0.25))


@pytest.mark.parametrize(
    "reason", ["don't fit the device", "nor a `get_train_dataloader`", "a token that a text starts or ends"]
)
def test_by_default_there_is_replay_but_for_a_reason_that_is_named(
    reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    model, data = base(), blocks()
    if reason == "don't fit the device":
        monkeypatch.setattr(teaching, "device_with_room", lambda device, size: torch.device("meta"))
    elif reason == "nor a `get_train_dataloader`":
        data = None
    else:
        model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    with propagated(caplog):
        run = HessoTrainer(model, arguments(tmp_path), train_dataset=data, hesso_config=HessoConfig(pruning_ratio=0.3))
        run.create_optimizer()
    assert run.replay is None
    (message,) = {record.message for record in caplog.records if record.message.startswith("no replay: ")}
    assert reason in message


def test_the_base_model_isnt_kept_beside_another_teacher_once_it_has_written(tmp_path: Path):
    tiny_llama(seed=3).save_pretrained(tmp_path / "teacher")
    taught = {"distill_from": str(tmp_path / "teacher"), "distillation_alpha": 0.5}
    judged = {"healing": "auto", "saliency": "reconstruction"}
    run = trainer(tmp_path, base(), config=hesso_config(replay_share="auto", **judged, **taught), max_steps=7)
    teaching = run.hesso_run.teaching
    assert teaching._base is not None
    run.create_optimizer()
    assert teaching.known is not None
    assert (run.replay, teaching._base) == (None, None)


def test_checkpointing_that_ddp_takes_one_forward_of_leaves_no_room_for_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(teaching, "world_size", lambda: 2)

    def made(share: Any, **kwargs: Any) -> HessoTrainer:
        return replayed(tmp_path, share=share, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)

    with propagated(caplog):
        assert made("auto", use_reentrant=True).hesso_run.teaching._base is None
    assert "no replay: under DDP, checkpointing with `use_reentrant` (True) allows one forward pass" in caplog.text
    with pytest.raises(HessoError, match=r"`replay_share` \(0.5\): under DDP, checkpointing with `use_reentrant`"):
        made(SHARE, preserve_rng_state=False)  # torch's own default is the reentrant one, Transformers' isn't
    for kwargs in ({"use_reentrant": False}, {}, {"every_n_layers": 2}):
        assert made(SHARE, **kwargs).hesso_run.teaching._base is not None


@pytest.mark.parametrize("share", [1.0, -0.1, "much", True])
def test_a_share_out_of_range_is_refused(share: Any):
    with pytest.raises(HessoError, match=r"`replay_share` \(.*\) must be 'auto' or lie in \[0, 1\)"):
        HessoConfig(pruning_ratio=0.5, replay_share=share)


def test_a_share_may_be_text_and_a_data_set_needs_one():
    assert HessoConfig(pruning_ratio=0.5, replay_share="0.25").replay_share == 0.25
    assert HessoConfig(pruning_ratio=0.5, replay_share="auto").replay_share == "auto"
    with pytest.raises(HessoError, match=r"`replay_dataset` \('x'\) does nothing with `replay_share` \(0\)"):
        HessoConfig(pruning_ratio=0.5, replay_dataset="x", replay_share=0.0)
