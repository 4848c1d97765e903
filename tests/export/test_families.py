"""Every family end to end: prove, zero random units, export, reload with the stock class, compare; without hesso_hf."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from hesso_hf.export.export import export_pruned
from hesso_hf.export.report import PruningReport
from hesso_hf.hf_models.build import build_meta, model_class_of
from hesso_hf.structures.groups import PruningGroups
from hesso_hf.structures.proof.prove import proved_groups
from tests.support import families
from tests.support.families import ALL, EXPERT, HEADS, MLP, OTHERS, QUERIES, QUERY, STREAM, Family

EVERY = ALL | QUERIES | {family.name: family for family in OTHERS}
CASES = [
    pytest.param(family, structures, id=f"{family.name}-{'+'.join(structures)}")
    for family in EVERY.values()
    for structures in [*((name,) for name in family.proved if family.apart), family.proved]
]
STANDALONE = """
import importlib.abc, sys
from pathlib import Path

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hesso_hf":
            raise ModuleNotFoundError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocked())
try:
    import hesso_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hesso_hf could be imported")

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    reference = torch.load(folder / "reference.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__module__.startswith("transformers."), folder.name
    with torch.no_grad():
        found = model(input_ids=reference["input_ids"], use_cache=False).logits
    error = (found - reference["logits"]).abs().max() / reference["logits"].abs().max()
    assert error <= 1e-5, f"{folder.name}: {error}"
    prompt = reference["input_ids"][:1]
    settings = dict(attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=5, max_new_tokens=5)
    cached, plain = (model.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert cached.shape[1] == prompt.shape[1] + 5, folder.name
    assert torch.equal(cached, plain), folder.name
    print("loaded", folder.name)
"""


@cache
def proved(name: str) -> PruningGroups:
    config = EVERY[name].config()
    return proved_groups(model_class_of(config), config, EVERY[name].structures)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@cache
def full_model(name: str) -> PreTrainedModel:
    return families.random_model(EVERY[name].config())


@cache
def export(root: Path, name: str, structures: tuple[str, ...]) -> tuple[Path, PruningReport, PreTrainedModel]:
    """Export the family's random model with random units at zero, once; the units are found by being zero."""
    family, groups = EVERY[name], proved(name)
    zeroed = copy.deepcopy(full_model(family.name))
    kept = families.random_units(groups, family.units_to_keep(structures))
    families.zero_pruned_(zeroed, groups, kept)
    folder = root / f"{family.name}-{'+'.join(structures)}"
    report = export_pruned(zeroed, folder, groups=groups)
    assert {name: report.kept_units.kept[name] for name in structures} == kept.kept
    input_ids = families.token_ids(zeroed.config)
    torch.save({"input_ids": input_ids, "logits": families.logits(zeroed, input_ids)}, folder / "reference.pt")
    return folder, report, zeroed


def expected_sizes(family: Family, structures: tuple[str, ...]) -> dict[str, int]:
    """Return the config sizes after the cut, worked out from the words of the design alone."""
    config, counts = family.config(), family.units_to_keep(structures)
    heads, kv_heads = config.num_attention_heads, getattr(config, family.kv_heads, None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {
        "num_attention_heads": heads,
        family.kv_heads: kv_heads,
        "hidden_size": counts.get(STREAM, config.hidden_size),
        family.mlp: counts.get(MLP, getattr(config, family.mlp, None)),
        "head_dim": None if family.channels_per_head else head_dim,
    }
    if HEADS in counts:  # a unit is a key-value head with its query heads; a query head where there is but one
        grouped = kv_heads is not None and kv_heads > 1 and kv_heads <= heads
        sizes["num_attention_heads"] = counts[HEADS] * (heads // kv_heads if grouped else 1)
        sizes[family.kv_heads] = counts[HEADS] if grouped else kv_heads
    if QUERY in counts:
        sizes["num_attention_heads"] = counts[QUERY]
    if EXPERT in counts:
        sizes["moe_intermediate_size"] = counts[EXPERT]
    return {name: size for name, size in sizes.items() if size is not None or name == "head_dim"}


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", EVERY.values(), ids=EVERY)
def test_what_can_be_pruned_is_proved_and_the_rest_refused_by_name(family: Family):
    groups = proved(family.name)
    assert sorted(groups.structures) == sorted(family.proved), groups.refused
    for structure, named in family.refused.items():
        assert named in groups.refused[structure]
    per_head = family.channels_per_head
    assert groups.coupled == ({HEADS: 1, STREAM: per_head} if per_head else {})


@pytest.mark.parametrize(("family", "structures"), CASES)
def test_exported_model_is_stock_exact_and_of_the_sizes_asked_for(
    family: Family, structures: tuple[str, ...], root: Path
):
    folder, report, zeroed = export(root, family.name, structures)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is type(zeroed)
    assert type(model).__module__.startswith("transformers.")
    assert "auto_map" not in (folder / "config.json").read_text()

    input_ids = families.token_ids(model.config)
    expected, found = families.logits(zeroed, input_ids), families.logits(model, input_ids)
    assert families.relative_difference(found, expected) <= 1e-5
    assert (found - expected).abs().max() <= 2e-5
    dense = families.logits(full_model(family.name), input_ids)
    assert families.relative_difference(expected, dense) > 0.05  # the units mattered

    sizes = expected_sizes(family, structures)
    head_dim = sizes.pop("head_dim")
    assert {name: getattr(model.config, name) for name in sizes} == sizes
    stock = build_meta(type(zeroed), family.config(**sizes, head_dim=head_dim))
    assert shapes_of(model) == shapes_of(stock)
    assert shapes_of(model).keys() == shapes_of(zeroed).keys()
    assert report.parameters_after == sum(parameter.numel() for parameter in stock.parameters())
    assert report.parameters_after < report.parameters_before


@pytest.mark.parametrize("family", (ALL | QUERIES).values(), ids=ALL | QUERIES)
def test_stored_tensors_are_the_kept_rows_and_tied_ones_are_stored_once(family: Family, root: Path):
    folder, report, _ = export(root, family.name, (MLP,))
    with safe_open(folder / "model.safetensors", "pt") as file:
        elements = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # no mapping
    assert elements == report.parameters_after


def test_exported_models_load_and_generate_where_hesso_hf_is_not_installed(root: Path):
    names = []
    for family in EVERY.values():
        for structures in {(name,) for name in family.proved if family.apart} | {family.proved}:
            if set(structures) <= set(proved(family.name).structures):  # otherwise it fails in its own test above
                names += _exported_name(root, family.name, structures)
    script = root.parent / "standalone.py"
    script.write_text(STANDALONE, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, "-P", script, root], cwd=root, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert sorted(line.removeprefix("loaded ") for line in ran.stdout.splitlines()) == sorted(set(names))
    assert len(names) > 80


def _exported_name(root: Path, name: str, structures: tuple[str, ...]) -> list[str]:
    try:
        return [export(root, name, structures)[0].name]
    except ValueError:  # a failing export fails in its own test above
        return []
