"""Mistakes as new users make them: each is answered before work is lost, by one message that names what to change.

Those that need more than a line are tried elsewhere: full disks in `test_full_disk.py`, the base's folder and
`model.save_pretrained` in `trainer/test_nothing_lost.py`, a vision tower in `pruning/test_plan.py`, TRL's trainers in
`trainer/test_trl_trainers.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoTokenizer,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hesso_hf import HessoConfig, HessoTrainer, inspect_model
from hesso_hf.bundled import bundled_model_path
from hesso_hf.cli.main import main
from hesso_hf.errors import HessoError
from tests.support.checks import propagated
from tests.support.lora import lora_config
from tests.support.tiny import tiny_gpt2, tiny_llama
from tests.support.training import ALONE, arguments, blocks

PRUNE = [
    "prune", "--dataset", "text.jsonl", "--block_size", "16", "--max_steps", "4", "--output_dir", "run", "--report_to",
    "none", "--use_cpu", "true", "--save_strategy", "no",
]  # fmt: skip
MODEL, RATIO = ["--model", "model"], ["--pruning_ratio", "0.3"]
RUN = [*PRUNE, *MODEL, *RATIO]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, with what is no model, and with data."""
    made = tmp_path_factory.mktemp("mistakes")
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    tiny_llama(vocab_size=1024).save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    tiny_llama().save_pretrained(made / "untokenized")
    tiny_llama().config.save_pretrained(made / "weightless")
    tokenizer.save_pretrained(made / "weightless")
    LlamaForSequenceClassification(tiny_llama(vocab_size=1024).config).save_pretrained(made / "classifier")
    reads_first = T5ForConditionalGeneration(T5Config(vocab_size=1024, d_model=24, d_kv=6, d_ff=40, num_layers=2))
    reads_first.save_pretrained(made / "translator")
    for name in ("classifier", "translator"):
        tokenizer.save_pretrained(made / name)
    for name, config in {"unknown": {"model_type": "frobnicator"}, "untyped": {"hidden_size": 60}}.items():
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps(config))
    (made / "void").mkdir()
    (made / "text.jsonl").write_text("\n".join(json.dumps({"text": f"Sentence number {i}. " * 5}) for i in range(40)))
    (made / "empty.jsonl").touch()
    (made / "broken.jsonl").write_text('{"text": \n')
    (made / "numbers.jsonl").write_text('{"text": 3}\n' * 9)
    (made / "one.jsonl").write_text('{"text": "A sentence, and a few more words of it, so that there are some."}\n')
    asked, answered = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    pair, none = {"prompt": "Why?", "completion": " So."}, {"prompt": "Why?", "completion": ""}
    for name, rows in {
        "chat": [{"messages": [asked, answered]}], "pairs": [pair] * 9, "silent": [pair, none],
        "mute": [pair, pair | {"completion": None}], "prompts": [{"prompt": "Why?"}],
        "mixed": [{"prompt": [asked], "completion": " So."}], "quoted": [{"messages": "[]"}],
        "shared": [{"conversations": [{"from": "a", "value": "b"}]}],
        "hollow": [{"messages": [asked, answered]}, {"messages": []}],
    }.items():  # fmt: skip
        (made / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (made / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (made / "strict.jinja").write_text("{{ raise_exception('no system prompt') }}")
    (made / "typo.yaml").write_text("hesso: {pruning_ration: 0.5}\n")
    (made / "deep.yaml").write_text("model: model\ntraining: {dataset: text.jsonl}\n")
    (made / "loose.yaml").write_text("model: model\noutput_dir: runs\n")
    (made / "flat.yaml").write_text("model: model\npruning_ratio: 0.5\n")
    return made


COMMANDS: dict[str, tuple[list[str], str]] = {
    # the model
    **{
        f"{command} of a path that doesn't exist": ([command, "models/nowhere", *rest], message)
        for command, rest, message in (
            ("inspect", [], r"no model config found at 'models/nowhere': no such folder exists.*check the path"),
            ("plan", [], r"no model config found at 'models/nowhere': no such folder exists.*check the path"),
            ("eval", ["--dataset", "text.jsonl"], r"'models/nowhere': no such folder exists.*check the path"),
            ("export", ["out"], r"`checkpoint` \('models/nowhere'\) is no folder; give a checkpoint-\*"),
            ("report", [], r"`RUN` \('models/nowhere'\): there is no such folder; give that of"),
        )
    },
    "prune of a path that doesn't exist": (
        [*PRUNE, *RATIO, "--model", "nowhere"], r"'nowhere': no such folder exists.*check the path",
    ),
    "a path from the root": (["inspect", "/nowhere/x"], r"'/nowhere/x': there is no such file or folder"),
    "an unknown model type": ([*PRUNE, *RATIO, "--model", "unknown"], r"'unknown' that can be used: .*`frobnicator`"),
    "a config without a type": (["inspect", "untyped"], r"'untyped' that can be used: .*`model_type` key"),
    "a folder without a model": (["plan", "void"], r"'void': that folder has no config.json; give the one that"),
    "no tokenizer": (
        [*PRUNE, *RATIO, "--model", "untokenized"],
        r"`model` \('untokenized'\) has no tokenizer .* `tokenizer.save_pretrained\('untokenized'\)`",
    ),
    "no weights": ([*PRUNE, *RATIO, "--model", "weightless"], r"`model` \('weightless'\) can't be loaded: .*no file"),
    "a classifier trained on text": (
        [*PRUNE, *RATIO, "--model", "classifier"],
        r"`model` \('classifier'\) is loaded as LlamaForSequenceClassification, which predicts no next tokens: train",
    ),
    "an encoder-decoder trained on text": (
        [*PRUNE, *RATIO, "--model", "translator"], r"\('translator'\) is loaded as T5ForCond.*no next tokens: train it",
    ),
    "text read by a classifier": (
        ["eval", "model", "classifier", "--dataset", "text.jsonl"],
        r"\('classifier'\) is loaded as Llama.*, which predicts no next tokens: leave `--dataset` and `--tasks` out",
    ),
    "tasks in a run that evaluates nothing": (
        [*RUN, "--eval_tasks", "piqa"], r"`eval_tasks` \('piqa'\) .*`eval_strategy` \(no\) says never: set `--eval_str",
    ),
    "a limit of no tasks": ([*RUN, "--eval_tasks_limit", "9"], r"`eval_tasks_limit` \(9\) does nothing without `eval_"),
    # the data
    "a data file that is missing": ([*RUN, "--dataset", "txt.jsonl"], r"`dataset` \('txt.jsonl'\): no such file"),
    "an empty data file": ([*RUN, "--dataset", "empty.jsonl"], r"`dataset` \('empty.jsonl'\) is empty"),
    "a data file that is no JSON": ([*RUN, "--dataset", "broken.jsonl"], r"broken.jsonl.*loaded: (JSON|Expected)"),
    "a column of numbers": ([*RUN, "--dataset", "numbers.jsonl"], r"`text_column` \('text'\) .*int, not text or mess"),
    "one example": ([*RUN, "--dataset", "one.jsonl"], r"'one.jsonl'\) has one example.*give `eval_dataset`"),
    "a column misspelt": ([*RUN, "--text_column", "txt"], r"`text_column` \('txt'\) isn't in .*did you mean 'text'"),
    "a split that a file has not": ([*RUN, "--dataset_split", "test"], r"`split` \('test'\): .* has only \['train'\]"),
    "blocks beyond the context": (
        [*RUN, "--block_size", "129"], r"`block_size` \(129\) is longer than the context of `model` \(128 tokens.*lowe",
    ),
    "no chat template": ([*RUN, "--dataset", "chat.jsonl"], r"'chat.jsonl'\) has messages, and .* no chat template: n"),
    "a chat template that is missing": (
        [*RUN, "--chat_template", "no.jinja"], r"`chat_template` \('no.jinja'\): no such file; name one with a Jin",
    ),
    "a chat template that refuses": (
        [*RUN, "--dataset", "chat.jsonl", "--chat_template", "strict.jinja"], r"row 1: the chat .*: no system prompt",
    ),
    "a chat template that marks nothing": (
        [*RUN, "--dataset", "chat.jsonl", "--chat_template", "plain.jinja", "--assistant_only_loss", "true"],
        r"`assistant_only_loss` \(True\): the chat template doesn't mark.*put it into {% generation %}.*leave it out",
    ),
    "messages as text": (
        [*RUN, "--dataset", "quoted.jsonl", "--chat_template", "plain.jinja"],
        r"`text_column` \('messages'\) of quoted.jsonl holds str, not text or messages \(`role`, `content`\); name",
    ),
    "a conversation of nothing": (
        [*RUN, "--dataset", "hollow.jsonl", "--chat_template", "plain.jinja"], r"row 2: `messages` is \[\], not tex",
    ),
    "prompts alone": (
        [*RUN, "--dataset", "prompts.jsonl"],
        r"`text_column` \('text'\) isn't in prompts.jsonl, nor are `messages`, or `prompt` and `completion`; name the",
    ),
    "conversations of another format": (
        [*RUN, "--dataset", "shared.jsonl", "--text_column", "conversations"], r"holds list, not text or messages \(",
    ),
    "a prompt of messages, a completion of text": (
        [*RUN, "--dataset", "mixed.jsonl"], r"`prompt` and `completion` .* holds list and str, not .* both of one kind",
    ),
    "an empty completion": ([*RUN, "--dataset", "silent.jsonl"], r"'silent.jsonl'\), row 2: `completion` is empty.*l"),
    "no completion": ([*RUN, "--dataset", "mute.jsonl"], r"row 2: `completion` is None, not text or messages; leave"),
    "prompts as long as a block": (
        [*RUN, "--dataset", "pairs.jsonl", "--block_size", "2"], r"no row has a token to learn from within `block_siz",
    ),
    "completions of text": (
        [*RUN, "--completion_only_loss", "true"], r"`completion_only_loss` \(True\) does nothing: text.jsonl is read a",
    ),
    "assistants in pairs": (
        [*RUN, "--dataset", "pairs.jsonl", "--assistant_only_loss", "true"], r"`assistant_only_loss` .*not messages; l",
    ),
    "blocks that are cut already": (
        [*RUN, "--dataset", "python-docs", "--packing", "false"], r"`packing` \(False\): python-docs is cut into bloc",
    ),
    "no example to evaluate on": ([*RUN, "--max_eval_examples", "0"], r"`max_eval_examples` \(0\) must be at least 1"),
    # flags and recipes
    "a flag misspelt": ([*RUN, "--learning_rat", "1"], r"unknown flag '--learning_rat' \(did you mean 'learning_rate'"),
    "an own flag misspelt": ([*RUN, "--prunning_ratio", "1"], r"'--prunning_ratio' \(did you mean 'pruning_ratio'\?"),
    "another command's flag misspelt": (
        ["eval", "model", "--dataset", "text.jsonl", "--blocksize", "9"],
        r"unknown argument '--blocksize' \(did you mean '--block-size'\?\); see `hesso-hf eval --help`",
    ),
    "a recipe's key misspelt": (["prune", "typo.yaml"], r"`pruning_ration` in `hesso` \(did you mean 'pruning_ratio'"),
    "an argument of training at the wrong place": (
        ["prune", "loose.yaml"], r"unknown key `output_dir` in the recipe; it belongs under `training:`$",
    ),
    "data at the wrong place": (
        ["prune", "deep.yaml"], r"unknown key `dataset` in `training`; it belongs beside `model:`$",
    ),
    "a recipe's key at the wrong place": (["prune", "flat.yaml"], r"`pruning_ratio` in the recipe; it belongs under `"),
    "a percentage": ([*PRUNE, *MODEL, "--pruning_ratio", "50"], r"`pruning_ratio` \(50.0\) .*between 0 and 1: it is t"),
    "a name of a dtype": ([*RUN, "--dtype", "fp32"], r"`dtype` \('fp32'\) must be float32, bfloat16 or float16"),
    "both half precisions": ([*RUN, "--bf16", "true", "--fp16", "true"], r"`training`: At most one of fp16 and bf16"),
    "steps below zero": ([*RUN, "--warmup_steps", "-1"], r"`training`: (Got warmup_steps = -1|warmup_steps must be)"),
    # folders
    "the base as output": ([*RUN, "--output", "model"], r"'model' is the folder that the base model was read from.*ov"),
    "a file as output": ([*RUN, "--output", "text.jsonl"], r"`output` \('text.jsonl'\) can't be written: Not a direct"),
    "a checkpoint that doesn't exist": (
        [*RUN, "--resume_from_checkpoint", "run/checkpoint-9"], r"`resume_from_checkpoint` \('run/checkpoint-9'\) does",
    ),
    "a file to export to": (["export", "model", "text.jsonl"], r"`output` \('text.jsonl'\) can't be written: Not a d"),
    "a base model exported": (["export", "model", "out"], r"`source` \('model'\): nothing in it is pruned; give a che"),
    "weights that aren't there exported": (["export", "weightless", "out"], r"`source` \('weightless'\) holds no weig"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", COMMANDS)
def test_a_mistake_at_the_command_line(
    mistake: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, expected = COMMANDS[mistake]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(HessoTrainer, "training_step", lambda *_, **__: pytest.fail("a step was made"))
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.glob("*/*"))}
    assert main(argv) == 2
    messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hesso-hf: ")]
    assert len(messages) == 1
    assert re.search(expected, messages[0])
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.glob("*/*"))} == before


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an option misspelt": ({"prunning_ratio": 0.5}, r"unknown key `prunning_ratio` for HessoConfig \(did you mean 'pr"),
    "nothing": ({}, r"needs `pruning_ratio` \(a share in \(0, 1\)\) or `target_sizes`; got neither"),
    "a percentage": ({"pruning_ratio": 50}, r"`pruning_ratio` \(50\) must lie strictly between 0 and 1"),
    "a percentage in words": ({"pruning_ratio": "50%"}, r"`pruning_ratio` \('50%'\) must be a number"),
    "a structure misspelt": ({"structures": ["attention_head"]}, r"`structures`.*did you mean 'attention_heads'"),
    "a number as structures": ({"structures": 3}, r"`structures` \(3\) must be a name, a list of names or a dict"),
    "a saliency misspelt": ({"saliency": "magnitud"}, r"`saliency`: unknown name 'magnitud' \(did you mean 'magnitude"),
    "sizes without quotes": (
        {"target_sizes": "{hidden_size: 4}"}, r"`target_sizes` \('{hidden_size: 4}'\) is not valid JSON: .*single quo",
    ),
    "shares in brackets": ({"export_at": "[0.2"}, r"`export_at` \('\[0.2'\) is not valid JSON"),
    "sizes in words": ({"target_sizes": "hidden_size=4"}, r"`target_sizes` \('hidden_size=4'\) must map config sizes"),
    "fewer steps than periods": ({"pruning_steps": 3, "pruning_periods": 5}, r"`pruning_steps` \(3\) must be at least"),
    "shares on the way in percent": ({"export_at": [20]}, r"`export_at` \(\[20\]\) must ascend between 0"),
    "shares on the way in words": ({"export_at": "often"}, r"`export_at` \('often'\) must be a list of shares"),
    "shares on the way twice": ({"export_at": [0.2, 0.2]}, r"`export_at` \(\[0.2, 0.2\]\) must ascend"),
    "the last share again": ({"export_at": [0.3, 0.5]}, r"must ascend between 0 and `pruning_ratio` \(0.5\), whose"),
    "recovery of nothing": ({"ladder_recovery": 5}, r"`ladder_recovery` \(5\) does nothing without `export_at`"),
    "periods that don't fit": ({"export_at": [0.2], "pruning_periods": 3}, r"`pruning_periods` \(3\) must be a mul"),
    "heads twice": ({"structures": ["query_heads", "attention_heads"]}, r"can't have both.*name one of them"),
    "an option of what is off": ({"cric_mode": "probe"}, r"`cric_mode` \('probe'\) does nothing with `cric` \('au"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CONFIGS)
def test_a_mistake_in_the_config(mistake: str) -> None:
    options, expected = CONFIGS[mistake]
    ratio = {} if options.keys() & {"pruning_ratio", "prunning_ratio"} or not options else {"pruning_ratio": 0.5}
    with pytest.raises(HessoError, match=expected):
        HessoConfig(**(ratio | options))


def ids(**changes: Any) -> dict[str, Any]:
    """Options of a HessoConfig without what costs time."""
    return {"hesso_config": HessoConfig(**(ALONE | {"calibration_examples": 0} | changes))}


def quantised() -> Any:
    """A model that says of itself that its weights are packed, as those of 4 or 8 bits do."""
    model = tiny_llama()
    model.hf_quantizer = object()
    return model


def adapted_late() -> Any:
    """The same with an adapter."""
    model = tiny_llama()
    tuned = get_peft_model(model, lora_config())
    model.hf_quantizer = object()
    return tuned


def vision() -> Any:
    """A model that reads no tokens."""
    config = ViTConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=2, image_size=16, patch_size=8
    )
    return ViTForImageClassification(config)


TRAINERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a model's name": (lambda: {"model": "org/name"}, r"`model` \('org/name'\) is a name.*`AutoModelForCausalLM.from_"),
    "a quantised model": (lambda: {"model": quantised()}, r"`model` \(LlamaForCausalLM\) is quantised.*dequantize"),
    "a quantised model with an adapter": (lambda: {"model": adapted_late()}, r"is quantised: .*before `get_peft_model"),
    "a model that reads no tokens": (
        lambda: {"model": vision()},
        r"attention heads, mlp channels.* of ViTForImageClassification stay whole.*ViTConfig has no `vocab_size`.*take",
    ),
    "experts of a dense model": (lambda: ids(pruning_ratio=0.3, structures=["experts"]), r"LlamaForCausalLM has no ex"),
    "half of what only goes together": (
        lambda: {"model": tiny_gpt2()} | ids(pruning_ratio=0.3, structures=["attention_heads"]),
        r"leaves out \['embedding_channels'\]: .* only shrink together.*name all of them",
    ),
    "a mapping as config": (lambda: {"hesso_config": {"pruning_ratio": 0.5}}, r"`hesso_config` \(dict\) must be a Hes"),
    "a mapping as adapter": (lambda: {"peft_config": {"r": 4}}, r"`peft_config` \(dict\) must be a LoraConfig: `peft."),
    "a mapping as arguments": (lambda: {"args": {"max_steps": 4}}, r"`args` \(dict\) must be a TrainingArguments"),
    "a tokenizer's name": (lambda: {"processing_class": "gpt2"}, r"`processing_class` \(str\) can't be saved.*AutoTok"),
    "no data": (lambda: {"train_dataset": Dataset.from_dict({"input_ids": []})}, r"`train_dataset` \(0 examples\) is "),
    "a size misspelt": (lambda: ids(target_sizes={"hiden_size": 32}), r"'hiden_size'.*did you mean 'hidden_size'"),
    "a size above the model's": (lambda: ids(target_sizes={"hidden_size": 640}), r"\(640\) must be .* between 1 and 6"),
    "a size that halves a unit": (lambda: ids(target_sizes={"num_attention_heads": 5}), r"\(5\) must be a multiple of"),
    "a size that stays": (lambda: ids(target_sizes={"vocab_size": 32}), r"'vocab_size' is no size that can be pruned "),
    "a number of layers alone": (
        lambda: ids(target_sizes={"num_hidden_layers": 1}), r"'num_hidden_layers' .*: name 'layers' in `structures` t",
    ),
    "a ratio at which nothing goes": (
        lambda: ids(pruning_ratio=0.001), r"`pruning_ratio` \(0.001\) is too small: the least.*take 0.009 or more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TRAINERS)
def test_a_mistake_in_what_a_trainer_is_given(mistake: str, tmp_path: Path) -> None:
    options, expected = TRAINERS[mistake]
    given: dict[str, Any] = {"args": arguments(tmp_path), "train_dataset": blocks(8)} | ids(pruning_ratio=0.3)
    given |= options()
    with pytest.raises(HessoError, match=expected) as caught:
        HessoTrainer(**({"model": tiny_llama()} | given))
    assert "AssertionError" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


WARNED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a learning rate of zero": ({"learning_rate": 0.0}, {}, r"`learning_rate` \(0.0\): units go and nothing is learnt"),
    "a run of three steps": (
        {"max_steps": 3}, {},
        r"`pruning_steps` \(0.08\) is 1 of its 3 steps, so units go in 1 period instead of 3, and 2 steps recover; "
        r"train for 32 steps or more",
    ),
    "a shape that nobody serves": (
        {}, {"pruning_ratio": 0.97},
        r"embedding_channels: \d of 60 units of a layer stay \(\d%; hidden_size 60 -> \d\).*lower `pruning_ratio`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WARNED)
def test_what_is_allowed_and_hardly_meant_is_warned_of_before_the_first_step(
    mistake: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes, options, expected = WARNED[mistake]
    with propagated(caplog):
        run = HessoTrainer(
            model=tiny_llama(), args=arguments(tmp_path, **changes), train_dataset=blocks(8),
            **ids(**({"pruning_ratio": 0.3} | options)),
        )  # fmt: skip
        run.create_optimizer()
    assert re.search(expected, caplog.text)


def test_another_base_model_doesn_t_go_on_with_a_checkpoint(tmp_path: Path) -> None:
    def run(model: Any) -> HessoTrainer:
        args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        options = ids(target_sizes={"intermediate_size": 28}, structures="mlp_channels")
        return HessoTrainer(model=model, args=args, train_dataset=blocks(8), **options)

    run(tiny_llama()).train()
    expected = (
        r"checkpoint-2 holds lm_head.weight of shape \(67, 60\), that of `model` is \(67, 48\): go on with the model"
    )
    with pytest.raises(HessoError, match=expected):
        run(tiny_llama(hidden_size=48)).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_needs_data_to_be_chosen_on(tmp_path: Path) -> None:
    """`Trainer`'s own words are plain enough."""
    args = arguments(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=2)
    with pytest.raises(ValueError, match="didn't pass an `eval_dataset`"):
        HessoTrainer(model=tiny_llama(), args=args, train_dataset=blocks(8), **ids(pruning_ratio=0.3))


def test_a_model_whose_licence_is_not_accepted_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*args: Any, **kwargs: Any) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://...")

    monkeypatch.setattr("hesso_hf.hf_models.build.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(
        HessoError, match=r"'org/gated' is gated: accept its licence on the Hub, and log in by `hf auth"
    ):
        inspect_model("org/gated")


def test_inspecting_a_model_without_tokens_says_so_of_every_structure_once() -> None:
    for found in inspect_model(vision()).structures.values():
        assert found.status == "refused"
        assert found.reason.count("reads no tokens") == 1
