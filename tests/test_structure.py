"""The library's shape: one direction of imports, nothing heavy at import, public names, short files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hesso_hf

PACKAGE = Path(hesso_hf.__file__).parent
ORDER = (
    "errors", "config", "layout", "layer_lists", "per_layer_sizes", "sizes", "division", "probe", "shards",
    "groups", "shrink", "tiny", "discovery", "norms", "streams", "sides", "constants", "experts", "routing",
    "depth", "outcome", "per_layer", "cut", "expert_trial", "depth_proof", "proof", "cost", "latency", "budget",
    "inspection", "strategies", "model_sizes", "memory", "planning", "schedule", "saliency", "agreement",
    "snapshot", "adapters", "frozen", "held", "bound", "calibration", "ranking", "cric", "trial", "collapse",
    "process", "optimizer", "shard_state", "zero", "zero_ranges", "zero_universal", "zero_steps", "plan", "tokens",
    "spelling", "retokenize", "embeddings", "vocabulary", "verify", "adapter_export", "publish", "plots", "card",
    "checkpoint", "export", "shard_export", "zero_export", "progress", "hub", "engines", "preemption", "teacher",
    "distillation", "trainer",
)  # fmt: skip
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
OTHERS = tuple(name for name in MODULES if name not in ORDER)
MAX_LINES = 450


def imports_of(module: str) -> set[str]:
    """Return the modules of the library that a module imports, anywhere in it."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hesso_hf":
            inner = (node.module or "").partition(".")[2]
            found |= {inner.partition(".")[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "hesso_hf"}
    return found & {*MODULES, "__init__"}


def reachable(module: str) -> set[str]:
    found, new = set(), {module}
    while new:
        found |= new
        new = {other for name in new for other in imports_of(name)} - found
    return found - {module}


def test_every_module_of_the_order_exists_and_the_package_documents_it():
    assert set(ORDER) <= set(MODULES)
    listed = (hesso_hf.__doc__ or "").partition("before it: ")[2].partition(", and then")[0]
    assert tuple(listed.replace("\n", " ").split(", ")) == ORDER


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_those_before_it(module: str):
    allowed = set(ORDER[: ORDER.index(module)])
    assert imports_of(module) <= allowed, sorted(imports_of(module) - allowed)


def test_the_others_come_last_and_without_circles():
    assert not {name for module in ORDER for name in imports_of(module)} & set(OTHERS)
    assert not [module for module in OTHERS if module in set().union(*map(reachable, imports_of(module)), set())]


def test_the_walk_sees_every_way_to_import():
    assert imports_of("export") >= {"cut", "groups", "verify", "publish", "card"}
    assert "trainer" not in imports_of("export")
    assert {"proof", "budget"} <= reachable("plan")


@pytest.mark.parametrize("heavy", ["optimizer", "trainer", "process", "plan"])
def test_export_needs_neither_the_optimizer_nor_the_trainer(heavy: str):
    assert heavy not in reachable("export")


def run(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.strip()


def test_importing_the_library_alone_imports_no_framework():
    code = "import sys, hesso_hf; print(sorted({'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)))"
    assert run(code) == "[]"


def test_importing_everything_patches_nothing():
    """The methods of Transformers' base classes are the same objects before and after."""
    names = "('transformers.PreTrainedModel', 'transformers.Trainer', 'torch.optim.Optimizer', 'torch.nn.Module')"
    modules = "('trainer', 'optimizer', 'export', 'inspection')"
    code = (
        "import importlib, torch, transformers\n"
        f"owners = [eval(name) for name in {names}]\n"
        "before = [dict(vars(owner)) for owner in owners]\n"
        f"for name in {modules}: importlib.import_module('hesso_hf.' + name)\n"
        "print([dict(vars(owner)) == old for owner, old in zip(owners, before)])"
    )
    assert run(code) == "[True, True, True, True]"


def test_export_runs_without_the_trainer_being_imported():
    code = (
        "import sys; from hesso_hf import export_pruned\n"
        "print(sorted(name for name in sys.modules if name in ('hesso_hf.trainer', 'hesso_hf.optimizer')))"
    )
    assert run(code) == "[]"


@pytest.mark.parametrize("name", hesso_hf.__all__)
def test_public_names_resolve(name: str):
    assert getattr(hesso_hf, name).__name__ == name
    assert name in dir(hesso_hf)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hesso_hf.no_such_name


def test_all_is_sorted_and_has_about_ten_names():
    assert list(hesso_hf.__all__) == sorted(hesso_hf.__all__)
    assert 5 <= len(hesso_hf.__all__) <= 12


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_files_stay_short(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
