"""The command line: every command's help, its output, its errors, and every recipe on a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, BertConfig, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.bundled import bundled_model_path
from hesso_hf.cli import commands
from hesso_hf.cli.main import COMMANDS as COMMAND_TABLE
from hesso_hf.cli.main import main
from hesso_hf.cli.overview import FLAGS
from hesso_hf.cli.recipe import RunArguments, parse_recipe
from hesso_hf.errors import HessoError, StoppedError
from hesso_hf.hf_models.build import model_class_of
from hesso_hf.hf_models.tiny_model import random_model
from hesso_hf.pruning.plan import PruningPlan
from hesso_hf.pruning.schedule import resolve_schedule
from tests.support import ROOT
from tests.support.tiny import tiny_llama

LAUNCHERS = ("accelerate_configs", "kubernetes")  # test_recipes.py is theirs
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name not in LAUNCHERS]
# By default one of each family is run, one with adapters or a teacher or else that for 30%; and the quickstart.
_IN_ORDER = sorted(RECIPES, key=lambda path: (not path.stem[-1].isdigit(), path.stem.endswith("-30")))
RUN = {path.stem if path.parent.name == "quickstart" else path.parent.name: path for path in _IN_ORDER}
COMMANDS = ["inspect", "plan", "prune", "sweep", "export", "eval", "report", "survey", "quickstart"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text data set."""
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    rows = [{"text": f"Sentence number {i} says that {i} is not {i + 1}. " * 4} for i in range(120)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


# Recipes' folders whose models aren't the tiny Llama of other tests.
OTHER_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "smollm": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "gemma3": ("gemma3_text", {"intermediate_size": 900}),
    "phi": ("phi3", {"head_dim": None}),
    "olmo2": ("olmo2", {"head_dim": None}),
    "granite": ("granite", {"head_dim": None}),
    "gpt2": ("gpt2", {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None, "n_inner": 440}),
    "mixtral": ("mixtral", {"hidden_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def tiny_of(recipe: Path, folder: Path) -> Path:
    """Save a tiny model of the class that a recipe is for, with the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    if recipe.parent.name in OTHER_TYPES:
        model_type, changes = OTHER_TYPES[recipe.parent.name]
        sizes = {
            "vocab_size": 1024, "hidden_size": 60, "intermediate_size": 440, "num_attention_heads": 6,
            "num_key_value_heads": 3, "head_dim": 8, "num_hidden_layers": 2, "max_position_embeddings": 128,
            "pad_token_id": 0,
        }  # fmt: skip
        values = {name: value for name, value in (sizes | changes).items() if value is not None}
        config = CONFIG_MAPPING[model_type](**values)
        model = random_model(model_class_of(config), config)
    else:
        model = tiny_llama(vocab_size=1024)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code = 0
    try:
        code = main([command, "--help"])
    except SystemExit as left:
        code = left.code
    assert code == 0
    out = capsys.readouterr().out
    assert "usage" in out
    assert len(out.splitlines()) <= 40, "it fits a screen"


def test_the_help_of_prune_has_what_most_runs_need_and_help_all_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--help-all"]) == 0
    all_flags = capsys.readouterr().out
    for section, (_, flags) in FLAGS.items():
        assert flags.keys() <= TrainingArguments.__dataclass_fields__.keys() or section != "training"
        for name in flags:
            prefix = "hesso_" if section == "hesso" else ""
            assert f"--{prefix}{name} " in all_flags, name
    assert "--hesso_on_collapse" in all_flags
    assert "--weight_decay" in all_flags


def test_the_help_of_prune_has_the_defaults_that_are_in_force() -> None:
    kinds = (RunArguments, TrainingArguments, HessoConfig)
    for (section, (_, flags)), kind in zip(FLAGS.items(), kinds, strict=True):
        for name, meaning in flags.items():
            said = re.search(r"\(([\w.-]+)\)$", meaning)
            if said is None or name == "block_size":  # that of the model where it is shorter
                continue
            name = "num_train_epochs" if name == "max_steps" else name
            default = kind.__dataclass_fields__[name].default
            assert said[1] == default or float(said[1]) == float(default), (section, name)


def test_the_help_of_a_command_has_the_defaults_of_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {
        "plan": ["(default: 80)", "(default: 1e9)", "(default: bfloat16)"], "eval": ["(default: 8)", "(default: text)"],
        "quickstart": ["(default: 0.002)", "(default: python-docs)"], "inspect": ["(default: 0.2 0.3 0.5)"],
    }  # fmt: skip
    for command, defaults in shown.items():
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert all(default in out for default in defaults)
        assert "default: None" not in out
        assert "default: False" not in out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("prune", "sweep")])
def test_help_all_is_the_help_where_there_is_no_more(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for flag in ("--help", "--help-all", "--help_all"):
        with pytest.raises(SystemExit, match="0"):
            main([command, flag])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2] != ""


def test_help_all_of_sweep_has_its_flags_and_those_of_prune(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--help_all"]) == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--ratios", "--launcher", "--hesso_on_collapse", "--weight_decay"))


def test_flags_are_spelled_with_underscores_and_hyphens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(COMMAND_TABLE, "eval", ("", commands.eval_flags, seen.append))
    for spelled in ("--num-fewshot=3", "--num_fewshot=3"):
        assert main(["eval", "a_b", spelled, "--include_path", "my_tasks", "--new_tokens=5"]) == 0
        found = seen.pop()
        assert (found.models, found.num_fewshot, found.include_path, found.new_tokens) == (["a_b"], 3, "my_tasks", 5)
    required = ["--model=bundled", "--dataset", "python-docs", "--pruning-ratio", "0.3", "--dry-run", "true"]
    recipe = parse_recipe(None, [*required, "--max-steps", "7", "--block_size", "64", "--hesso-warmup-steps", "4"])
    assert (recipe.hesso.pruning_ratio, recipe.hesso.warmup_steps) == (0.3, 4)
    assert (recipe.training.max_steps, recipe.run.block_size, recipe.run.dry_run) == (7, 64, True)


@pytest.mark.parametrize("command", list(COMMAND_TABLE))
def test_ctrl_c_is_one_line(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMAND_TABLE, command, ("", lambda parser: None, interrupted))
    assert main([command]) == 130
    assert capsys.readouterr().err == "\nhesso-hf: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "unbuffered"),
    [(["eval", "--help"], ""), (["report", "small", "--json"], ""), (["report", "small", "--json"], "1")],
    ids=["help", "a report", "a report, unbuffered"],
)
def test_a_closed_pipe_is_no_traceback(argv: list[str], unbuffered: str, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    parts = {name: {} for name in ("parameters", "pruning_ratio", "sizes", "verification")}
    (tmp_path / "small" / "pruning_report.json").write_text(json.dumps({**parts, "long": list(range(50_000))}))
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hesso_hf", *argv]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_that_is_not_the_reader_s_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setitem(COMMAND_TABLE, "plan", ("", lambda parser: None, broken))
    with pytest.raises(BrokenPipeError):
        main(["plan"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Returns the folder of a tiny model of the class that a recipe is for, the same for all of a family."""
    made: dict[str, Path] = {}

    def folder(recipe: Path) -> Path:
        family = recipe.parent.name
        if family not in made:
            made[family] = tiny_of(recipe, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_read_and_its_sizes_and_schedule_are_found(recipe: Path, tiny: Callable[[Path], Path]) -> None:
    """All that comes before the first step, on a tiny model of its class."""
    found = parse_recipe(str(recipe), ["--model", str(tiny(recipe)), "--use_cpu", "true", "--hesso_round_to", "1"])
    assert found.training.output_dir == f"runs/{recipe.stem}"
    assert (found.run.adapter() is not None) == recipe.stem.endswith("-lora")
    plan = PruningPlan.prepare(AutoModelForCausalLM.from_pretrained(tiny(recipe)), found.hesso)
    ratio = yaml.safe_load(recipe.read_text())["hesso"]["pruning_ratio"]
    assert abs(plan.target.ratio - ratio) <= 0.05
    schedule = resolve_schedule(found.hesso, found.training.max_steps)
    assert schedule.end == found.training.max_steps // 10 + schedule.sampling_end - schedule.warmup_steps


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, id=path.stem, marks=[] if path in RUN.values() else pytest.mark.slow) for path in RECIPES],
)
def test_recipe_runs_on_a_tiny_model(
    recipe: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe itself, with only the model, the data and the size of the run replaced by flags."""
    model, other = tiny_of(recipe, tmp_path / "model"), tmp_path / "other.jsonl"
    other.write_text("".join(text_file.read_text().splitlines(keepends=True)[:5]))
    flags = [
        "--model", str(model), "--dataset", str(text_file), "--dataset_config", "", "--block_size", "16",
        "--max_steps", "16", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
        "--output_dir", str(tmp_path / "run"), "--report_to", "none", "--hesso_round_to", "1",
        "--disable_tqdm", "true", "--warmup_steps", "2", "--bf16", "false", "--use_cpu", "true",
        "--save_strategy", "steps", "--save_steps", "16", "--eval_strategy", "steps", "--eval_steps", "16",
        "--load_best_model_at_end", "true", "--retained_dataset", str(other),
    ]  # fmt: skip
    assert main(["prune", str(recipe), *flags]) == 0
    adapter = tmp_path / "run" / "checkpoint-16" / "adapter_config.json"
    assert adapter.exists() == ("peft" in yaml.safe_load(recipe.read_text()))
    out = capsys.readouterr().out
    assert all(said in out for said in ("of the parameters removed", "loss on held-out examples", "loss on other text"))
    written = yaml.safe_load((tmp_path / "run" / "small" / "hesso_recipe.yaml").read_text())
    assert (written["training"]["max_steps"], written["model"]) == (16, "model")
    card = (tmp_path / "run" / "small" / "README.md").read_text()
    assert f"hesso-hf prune {recipe.name} --model model --dataset text.jsonl" in card
    assert "| loss on other text (nats per token) |" in card
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "small")
    full = AutoModelForCausalLM.from_pretrained(model)
    ratio = yaml.safe_load(recipe.read_text())["hesso"]["pruning_ratio"]
    assert type(small) is type(full)
    assert abs(1 - small.num_parameters() / full.num_parameters() - ratio) <= 0.02


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_has_a_header_with_the_command(recipe: Path) -> None:
    header = recipe.read_text().split("\n\n")[0]
    assert header.startswith("#")
    assert "hesso-hf prune" in header or "hesso_hf prune" in header or "sbatch " in header


DDP = ROOT / "recipes" / "accelerate_configs" / "ddp.yaml"
LAUNCHERS_OF_TWO = {
    "accelerate": ["accelerate.commands.launch", "--config_file", str(DDP), "--num_processes", "2"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}


# test_distributed.py starts another job by torchrun
@pytest.mark.parametrize("name", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_prune_under_a_launcher(name: str, tmp_path: Path, text_file: Path) -> None:
    """Two real processes; the shipped DDP configuration works on a CPU as well. A folder is read as the Hub is."""
    model, output = tiny_of(ROOT / "recipes" / "quickstart" / "x.yaml", tmp_path / "model"), tmp_path / "out"
    flags = [
        "--model", str(model), "--dataset", str(text_file.parent), "--block_size", "16", "--max_steps", "8",
        "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no",
        "--hesso_pruning_ratio", "0.3", "--hesso_round_to", "1", "--hesso_calibration_examples", "4",
        "--output_dir", str(output),
    ]  # fmt: skip
    command = [sys.executable, "-m", *LAUNCHERS_OF_TWO[name], "-m", "hesso_hf", "prune", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of the parameters removed") == 1  # the main process alone reports
    report = json.loads((output / "small" / "pruning_report.json").read_text())
    small = AutoModelForCausalLM.from_pretrained(output / "small")
    assert small.num_parameters() == report["parameters"]["after"] < 0.75 * report["parameters"]["before"]
    assert report["compaction"] is not None  # in DDP
    assert len(list((tmp_path / "cache" / "generator").iterdir())) == 1, "one process reads, for both"
    assert report["data"]["rows"] < 120, "and no more than the run takes"


def test_prune_that_is_told_to_stop_saves_says_so_and_goes_on(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It neither evaluates nor writes a model that isn't done, and its exit code is no success."""
    model, output, steps = tiny_of(ROOT / "recipes" / "quickstart" / "x.yaml", tmp_path / "model"), tmp_path / "out", []
    flags = [
        "prune", "--model", str(model), "--dataset", str(text_file), "--block_size", "16", "--max_steps", "12",
        "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no",
        "--hesso_pruning_ratio", "0.3", "--hesso_round_to", "1", "--hesso_calibration_examples", "0",
        "--enable_jit_checkpoint", "true", "--resume_from_checkpoint", "auto", "--output_dir", str(output),
    ]  # fmt: skip
    plain, plain_init = HessoTrainer.training_step, CheckpointManager.__init__

    def training_step(self: HessoTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(HessoTrainer, "training_step", training_step)
    monkeypatch.setattr(CheckpointManager, "__init__", lambda self, trainer: plain_init(self, trainer, kill_wait=0))
    assert main(flags) == 143
    assert "--resume_from_checkpoint auto" in capsys.readouterr().err
    assert {path.name for path in output.iterdir()} == {"replay", "checkpoint-4"}  # the fifth step was for nothing
    assert main(flags) == 0
    assert steps == [0, 1, 2, 3, 4, *range(4, 12)]
    assert (output / "small" / "pruning_report.json").exists()


def test_prune_leaves_the_other_processes_unless_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that exits while gloo's threads run may abort after the work is done."""

    def pruned(recipe: object) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def stopped(recipe: object) -> None:
        pruned(recipe)
        raise StoppedError("go on")

    def failing(recipe: object) -> None:
        pruned(recipe)
        raise HessoError("no")

    flags = ["prune", "--model", "m", "--dataset", "d", "--output_dir", str(tmp_path), "--max_steps", "9"]
    flags += ["--hesso_pruning_ratio", "0.3"]
    monkeypatch.setattr("hesso_hf.cli.prune.prune", pruned)
    assert main(flags) == 0
    assert not dist.is_initialized()
    monkeypatch.setattr("hesso_hf.cli.prune.prune", stopped)
    assert main(flags) == 143
    assert not dist.is_initialized()
    monkeypatch.setattr("hesso_hf.cli.prune.prune", failing)
    try:
        assert main(flags) == 2
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_inspect_json_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundled_model_path()), "--json", "--ratio", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("attention_heads", "mlp_channels", "embedding_channels"):
        assert found[name]["status"] == "proved"
        assert {"units", "layouts", "relative_error", "reason"} <= found[name].keys()
    assert abs(found["feasible"]["0.5"]["ratio"] - 0.5) <= 0.01
    assert main(["inspect", str(bundled_model_path() / "config.json")]) == 0
    out = capsys.readouterr().out
    assert "869,504 parameters" in out
    assert re.search(r"attention_heads +verified +4 +4 +12,288 +0e\+00", out)  # in one line: the width is a pipe's
    assert "\nexperts: LlamaConfig has no `num_experts` above one\n" in out


def test_inspect_says_each_reason_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertConfig(vocab_size=67, is_decoder=True, **sizes).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (refused,) = [line for line in lines if "hidden_size stays" in line]
    assert refused.startswith("attention_heads, embedding_channels: the hidden state")
    (unmet,) = [line for line in lines if line.startswith("ratio ")]
    assert unmet.startswith("ratio 0.2, 0.3, 0.5: `pruning_ratio` of parameters can't be met within 5% by")


def test_inspect_names_a_size_of_which_little_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=300, architectures=["BertForSequenceClassification"], **sizes)
    config.max_position_embeddings = 64
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--ratio", "0.3", "0.5"]) == 0
    sparse, half = capsys.readouterr().out.splitlines()[-2:]
    assert "intermediate_size" in sparse
    assert "would stay" not in sparse
    assert re.search(r"intermediate_size \d - only 3% of mlp_channels would stay", half)


def test_plan_json_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--gpus", "2", "--gpu-memory", "24", "--batch-size", "3", "--sequence-length", "96", "--cric", "device"]
    assert main(["plan", str(bundled_model_path()), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"] == "ddp"
    assert found["workload"]["cric"] == "device"
    assert (found["workload"]["batch_size"], found["workload"]["sequence_length"]) == (3, 96)
    assert (found["cluster"]["num_gpus"], found["cluster"]["gpu_memory"]) == (2, 24e9)
    assert {"ddp", "fsdp2", "zero2", "zero3", "lora"} <= found["engines"].keys()
    for engine in found["engines"].values():
        assert abs(sum(engine["parts"].values()) - engine["peak_bytes"]) < 10
        assert engine["parts"]["teacher"] > 0, "a run has replay by default"
    assert found["workload"]["healing"]
    assert found["workload"]["distillation"], "where the model knows the data it teaches them by default"
    assert found["pace"] == {"tokens": 1e9, "device_tflops": 989.0, "utilisation": 0.4}
    pace = ["--tokens", "2e9", "--device-tflops", "494.5", "--healing", "off"]
    assert main(["plan", str(bundled_model_path()), *flags, *pace, "--json"]) == 0
    slower = json.loads(capsys.readouterr().out)
    assert slower["engines"]["ddp"]["hours"] == pytest.approx(4 * found["engines"]["ddp"]["hours"])
    assert not slower["workload"]["healing"]
    assert main(["plan", str(bundled_model_path()), *flags, "--replay-share", "0", "--json"]) == 0
    assert all(engine["parts"]["teacher"] == 0 for engine in json.loads(capsys.readouterr().out)["engines"].values())
    assert main(["plan", "bundled", "--gpus", "2"]) == 0
    out = capsys.readouterr().out
    assert "869,504 parameters" in out
    assert "recipes/accelerate_configs/ddp.yaml" in out
    assert "Hours: estimated, for 1 billion tokens" in out
    assert "\nlogits: " in out


def test_resume_auto_begins_where_there_is_no_whole_checkpoint(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_of(ROOT / "recipes" / "quickstart" / "x.yaml", tmp_path / "model")
    flags = [
        "--model", str(model), "--dataset", str(text_file), "--block_size", "16", "--resume_from_checkpoint", "auto",
        "--output_dir", str(tmp_path / "run"), "--report_to", "none", "--hesso_pruning_ratio", "0.3",
        "--use_cpu", "true",
    ]  # fmt: skip
    resumed: list[str | None] = []

    def train(self: HessoTrainer, resume_from_checkpoint: str | None = None) -> None:
        resumed.append(resume_from_checkpoint)
        raise HessoError("far enough")

    monkeypatch.setattr(HessoTrainer, "train", train)
    checkpoint, half_written = tmp_path / "run" / "checkpoint-40", tmp_path / "run" / "checkpoint-100"
    assert main(["prune", *flags]) == 2
    half_written.mkdir(parents=True)
    assert main(["prune", *flags]) == 2
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    assert main(["prune", *flags]) == 2
    assert resumed == [None, None, str(checkpoint)]


def test_export_eval_and_report(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_of(ROOT / "recipes" / "quickstart" / "x.yaml", tmp_path / "model")
    flags = [
        "--model", str(model), "--dataset", str(text_file), "--block_size", "16", "--max_steps", "12",
        "--save_steps", "6", "--output_dir", str(tmp_path / "run"), "--report_to", "none", "--disable_tqdm", "true",
        "--hesso_pruning_ratio", "0.3", "--use_cpu", "true", "--logging_steps", "3",
    ]  # fmt: skip
    assert main(["prune", *flags]) == 0
    assert (
        main(["export", str(tmp_path / "run" / "checkpoint-12"), str(tmp_path / "later"), "--dtype", "bfloat16"]) == 0
    )
    said = capsys.readouterr().out
    assert "stored as bfloat16" in said
    assert re.search(r"^written in \d+\.\d s, verified in \d+\.\d s$", said, re.MULTILINE)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "later").dtype.itemsize == 2
    assert (tmp_path / "later" / "tokenizer.json").exists()
    assert main(["report", str(tmp_path / "later")]) == 0
    assert "intermediate_size" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "later"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verification"]["dtype"] == "bfloat16"
    page = tmp_path / "later.html"
    assert main(["report", str(tmp_path / "later"), "--html", str(page), "--run", str(tmp_path / "run")]) == 0
    assert all(
        f">{title}</h2>" in page.read_text() for title in ("How it went", "How it was decided", "How exact it is")
    )
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "later"), "--dataset", str(text_file), "--block-size", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] > 0
    assert found["perplexity"] > 1


BUNDLED_RUN = ["prune", "--model", "bundled", "--dataset", "python-docs", "--hesso_pruning_ratio", "0.5"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prune", "--model", "bundled"], "`dataset` is missing"),
        (["prune", "nowhere.yaml"], "no such file"),
        (["prune", "--model", "bundled", "--datset", "x"], "did you mean 'dataset'"),
        (["prune", "--model", "bundled", "--dataset", "no.jsonl", "--hesso_pruning_ratio", "0.5"], "no such file"),
        (["prune", "--model", "bundled", "--dataset", "python-docs", "--hesso_pruning_ratio", "1.5"], "pruning_ratio"),
        ([*BUNDLED_RUN, "--peft", '{"rank": 8}'], "unknown key `rank` in `peft`"),
        ([*BUNDLED_RUN, "--peft", "r=8"], "not valid JSON"),
        ([*BUNDLED_RUN, "--peft", "[8]"], "must be a mapping"),
        ([*BUNDLED_RUN, "--max_examples", "0"], "`max_examples` (0) must be at least 1"),
        ([*BUNDLED_RUN, "--report_to", "comet_ml"], "`report_to` ('comet_ml'): the package isn't installed"),
        (
            [*BUNDLED_RUN, "--report_to", "nothing_known"],
            "('nothing_known') is no tracker; say 'none', or one of",
        ),
        ([*BUNDLED_RUN, "--report_to", "trackioo"], "`report_to` ('trackioo') is no tracker (did you mean 'trackio'?)"),
        (["inspect", "bundled", "--ratio", "0.3", "50"], "`pruning_ratio` (50.0) must lie strictly between 0 and 1"),
        (["report", "."], "pruning_report.json"),
        (["report", "nowhere"], "`RUN` ('nowhere'): there is no such folder; give that of a smaller model"),
        (["export", "nowhere", "out"], "no folder"),
        (["inspect", "./nowhere"], "no such file or folder"),
        (["eval", "bundled", "--dataset", "no.txt"], "no such file"),
        (["quickstart", "--ratio", "2"], "`pruning_ratio` (2.0)"),
        (["eval", "x"], "no model config found at 'x'"),
        (["plan", "nowhere"], "no model config"),
        (["plan", "bundled", "--gpus", "0"], "`--gpus` (0) must be a number above zero"),
        (["plan", "bundled", "--gpu-memory", "-4"], "`--gpu-memory` (-4) must be a number above zero"),
        (["plan", "bundled", "--host-memory", "nan"], "`--host-memory` (nan) must be a number above zero"),
        (["plan", "bundled", "--gpus", "12"], "must be a multiple of gpus_per_node (8)"),
        (["plan", "bundled", "--batch-size", "0"], "`batch_size` (0) must be at least 1"),
        (["plan", "bundled", "--tokens", "0"], "`tokens` (0) must be above zero"),
        (["survey", "--types", "lama"], "'lama'"),
        (["survey", "--types", "llama", "--jobs", "0"], "must be above zero"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_an_optimizer_whose_package_is_missing_is_one_message(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    model = tiny_of(ROOT / "recipes" / "quickstart" / "x.yaml", tmp_path / "model")
    flags = [
        "--model", str(model), "--dataset", str(text_file), "--block_size", "16", "--max_steps", "8",
        "--use_cpu", "true", "--output_dir", str(tmp_path / "run"), "--hesso_pruning_ratio", "0.3", "--optim",
        "schedule_free_adamw",
    ]  # fmt: skip
    assert main(["prune", *flags]) == 2
    err = capsys.readouterr().err
    assert "schedulefree" in err
    assert "Traceback" not in err


def test_a_flag_with_a_wrong_value_is_a_short_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*BUNDLED_RUN, "--learning_rate", "fast"])
    err = capsys.readouterr().err
    assert "--learning_rate" in err.splitlines()[-1]
    assert len(err.splitlines()) == 2


def test_the_folder_of_a_run_is_no_checkpoint_and_its_checkpoints_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoint-12").mkdir(parents=True)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "small")]) == 2
    assert "give one of its checkpoints: ['checkpoint-12']" in capsys.readouterr().err


def test_yaml_is_overridden_by_flags_and_unknown_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: bundled\ndataset: python-docs\ntraining: {learning_rate: 1e-4, max_steps: 7}\n"
        "hesso: {pruning_ratio: 0.5, structures: {mlp_channels: 3, attention_heads: 1}, warmup_steps: 0.1}\n"
    )
    flags = [
        "--learning_rate",
        "3e-4",
        "--hesso_warmup_steps",
        "4",
        "--hesso_saliency",
        "magnitude",
        "--warmup_steps=9",
    ]
    recipe = parse_recipe(str(path), flags)
    assert recipe.training.learning_rate == 3e-4
    assert recipe.training.max_steps == 7
    assert recipe.training.warmup_steps == 9
    assert recipe.hesso.warmup_steps == 4
    assert recipe.hesso.structure_shares == {"mlp_channels": 0.75, "attention_heads": 0.25}
    assert recipe.hesso.saliency_weights == {"magnitude": 1.0}
    assert recipe.run.model == str(bundled_model_path())
    assert parse_recipe(str(path)).training.learning_rate == 1e-4
    for bad, nearest in (("hesso: {pruning_ration: 1}", "pruning_ratio"), ("training: {max_step: 1}", "max_steps"),
                         ("modle: x", "model")):  # fmt: skip
        path.write_text(bad)
        with pytest.raises(HessoError, match=f"did you mean '{nearest}'"):
            parse_recipe(str(path))
    path.write_text("a: [")
    with pytest.raises(HessoError, match="not valid YAML"):
        parse_recipe(str(path))


def test_every_hesso_field_is_a_flag() -> None:
    from hesso_hf.cli.recipe import recipe_parser

    known = {action.dest for action in recipe_parser()._actions}
    assert {f"hesso_{name}" for name in HessoConfig.__dataclass_fields__} <= known
