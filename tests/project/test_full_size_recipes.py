"""Recipes of full-size models: they are what recipes/write.py writes, and docs/choosing.md says what they do."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from hesso_hf.cli.main import main
from hesso_hf.config import HessoConfig
from tests.support import ROOT

PAGE = ROOT / "docs" / "choosing.md"
# As the models' pages on the Hub say.
PARAMETERS = {
    "gpt2": 124_439_808, "smollm2-135m": 134_515_008, "qwen3-0.6b": 596_049_920, "gemma-3-1b": 999_885_952,
    "llama-3.2-1b": 1_235_814_400, "olmo-2-1b": 1_484_916_736, "qwen3-1.7b": 1_720_574_976,
    "phi-4-mini": 3_836_021_760, "mistral-7b": 7_248_023_552, "llama-3.1-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704, "llama-3.1-70b": 70_553_706_496,
}  # fmt: skip


@pytest.fixture(scope="module")
def writer() -> Iterator[ModuleType]:
    """recipes/write.py as a module."""
    spec = importlib.util.spec_from_file_location("recipe_writer", ROOT / "recipes" / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["recipe_writer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["recipe_writer"]


def recipe_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))


def tokens_of(recipe: dict[str, Any], num_gpus: int) -> int:
    training = recipe["training"]
    examples = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * num_gpus
    return training["max_steps"] * examples * recipe["block_size"]


def test_files_are_what_the_tables_say(writer: ModuleType) -> None:
    files = writer.files()
    for path, text in files.items():
        assert path.exists(), "run python recipes/write.py"
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python recipes/write.py"
    others = ("accelerate_configs", "kubernetes", "quickstart")
    found = {path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name not in others}
    assert found == {path for path in files if path.suffix == ".yaml"}, "delete what write.py doesn't write any more"


def test_every_family_has_20_30_and_50_percent(writer: ModuleType) -> None:
    full = {recipe.model.folder: set() for recipe in writer.RECIPES}
    for recipe in writer.RECIPES:
        full[recipe.model.folder] |= set() if recipe.variant else {recipe.percent}
    assert len(full) == 10
    assert all(percents == {20, 30, 50} for percents in full.values())


def test_sizes_are_those_of_the_models(writer: ModuleType) -> None:
    plans = {recipe.model.name: recipe.plan for recipe in writer.RECIPES}
    found = {name: plan.sizes.parameters for name, plan in plans.items()}
    assert found.pop("granite-3.3-2b") == pytest.approx(2.53e9, rel=0.002)  # its vocabulary differs by version
    assert found == PARAMETERS
    assert plans["mixtral-8x7b"].sizes.active_parameters == pytest.approx(12.9e9, rel=0.002)


def test_a_recipe_that_does_not_fit_is_not_written(writer: ModuleType) -> None:
    from dataclasses import replace

    recipe = writer.Recipe(replace(writer.MODELS["llama-3.2-1b"], gpu_memory=16), 30)
    with pytest.raises(ValueError, match=r"llama-3.2-1b-30 doesn't fit"):
        recipe.text()


def test_what_was_measured_is_told_and_nothing_else(writer: ModuleType) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    runs = [r for r in result["runs"] if (r["model"], r["method"], r["ratio"]) == ("smollm2", "hesso", 0.3)]
    longest = max(runs, key=lambda run: run["tokens"])
    text = " ".join((ROOT / "recipes/smollm/smollm2-135m-30.yaml").read_text().replace("\n# ", " ").split())
    assert f"{longest['tokens']:,} training tokens" in text
    assert f"{longest['in']:.2f} nats per token" in text
    assert f"{longest['out']:.2f} on WikiText-2" in text
    for recipe in writer.RECIPES:
        measured = recipe.stem in ("smollm2-135m-30", "smollm2-135m-50")
        assert ("not measured" in recipe.header().replace("\n# ", " ")) == (not measured), recipe.stem


# -- docs/choosing.md --------------------------------------------------------------------------------------------------


def test_the_page_says_what_its_plan_says(
    writer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    command = re.search(r"^hesso-hf plan .*$", page, re.MULTILINE)
    assert command is not None
    words = shlex.split(command[0])
    model = writer.MODELS["llama-3.1-8b"]
    assert words[2] == model.hub
    assert command[0] == writer.Recipe(model, 30).plan_command
    model.config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), *words[3:], "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recommended"] == "fsdp2"
    assert plan["accelerate_config"] == "recipes/accelerate_configs/fsdp2.yaml"
    stated = re.search(r"recommends FSDP2: it takes about (\d+) GB of each GPU and about (\d+) hours", page)
    assert stated is not None
    found = plan["engines"]["fsdp2"]
    assert [int(number) for number in stated.groups()] == [round(found["peak_bytes"] / 1e9), round(found["hours"])]


def test_the_page_sets_what_the_recipe_that_it_starts_sets() -> None:
    page = PAGE.read_text(encoding="utf-8")
    section = page.partition("## An 8B model on eight GPUs")[2].partition("\n## ")[0]
    assert set(re.findall(r"prune recipes/(\S+)\.yaml", section)) == {"llama/llama-3.1-8b-30"}
    given = re.search(r"^config = (HessoConfig\(.*\))$", section, re.MULTILINE)
    assert given is not None
    config = eval(given[1], {"HessoConfig": HessoConfig})
    assert config == HessoConfig(**recipe_of("llama/llama-3.1-8b-30")["hesso"])


def test_rows_of_the_page_are_those_of_the_recipes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| [^|]+ \| (\d+)% \| (\S+) billion \| (\S+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| `([\w./-]+)` \|$",
        page,
        re.MULTILINE,
    )
    assert len(rows) == 6
    for percent, tokens, rate, structures, expected, hardware, name in rows:
        recipe = recipe_of(name)
        num_gpus = int(hardware.split()[0]) if hardware[0].isdigit() else 1
        assert recipe["hesso"]["pruning_ratio"] == int(percent) / 100
        named = {"all": "all", "heads, MLP": ["attention_heads", "mlp_channels"]}[structures]
        assert named == recipe["hesso"].get("structures", "all")
        assert "distillation_alpha" not in recipe["hesso"], "the page says that it is the default"
        assert (expected == "not measured") == ("smollm" not in name)
        assert recipe["training"]["learning_rate"] == float(rate)
        assert f"{tokens_of(recipe, num_gpus) / 1e9:.2g}" == tokens
    least, middle, most = (
        recipe_of(f"llama/llama-3.1-8b-{percent}")["training"]["max_steps"] for percent in (20, 30, 50)
    )
    assert "Take 0.6 times the tokens for 20%, and twice as many for 50%" in page
    assert (least / middle, most / middle) == (0.6, 2)
