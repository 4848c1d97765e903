"""The library's shape: folders in one direction, nothing heavy at import, public names, short files."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hesso_hf
from tests.support import ROOT

PACKAGE = Path(hesso_hf.__file__).parent
ORDER = (
    ("errors", "config", "bundled", "compat"), ("distributed",), ("hf_models",), ("structures",), ("vocabulary",),
    ("budget",), ("export",), ("pruning",), ("engines",), ("trainer",), ("cli",),
)  # fmt: skip
MAX_LINES, MAX_CLASS_LINES, MAX_METHODS, MAX_FUNCTION_LINES = 350, 200, 15, 60
# Classes that are larger, and why.
LARGER = {
    "HessoMixin": "a method for each of Trainer's that it overrides",
    "HessoOptimizer": "torch's contract of an optimizer, and what the trainer tells it",
    "PruningProcess": "the face of the pruning state that trainer and engines ask",
    "BoundGroups": "what is done to a unit's weights: scaled, masked, centred, summed, each in a few lines",
    "HessoConfig": "a field with its help for every option",
    "CricTrial": "CRIC's history, sets and report",
}
DOCUMENTED = re.compile(r"\bhesso_hf(?:\.[A-Za-z_]\w*)+")


def module_name(path: Path) -> str:
    """Return a file's dotted name within the package, "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def imports_of(module: str, for_types: bool = False) -> frozenset[str]:
    """Return the modules of the library that a module imports, anywhere in it; those for type checkers where asked."""
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked_only = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }  # fmt: skip
    home = module.split(".") if path.name == "__init__.py" and module else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in checked_only and not (for_types and path.name != "__init__.py"):  # a folder hands those on
            continue
        if isinstance(node, ast.ImportFrom):
            dotted = (node.module or "").split(".")
            if node.level:
                base = home[: len(home) + 1 - node.level] + [part for part in dotted if part]
            elif dotted[0] == "hesso_hf":
                base = dotted[1:]
            else:
                continue
            names = [".".join([*base, alias.name]) for alias in node.names]
            found |= {name if name in MODULES else ".".join(base) for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.partition(".")[0] == "hesso_hf"}
    return frozenset(found & MODULES.keys() - {"", module})


def reachable(module: str) -> set[str]:
    """Return all modules that importing one brings along."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {other for name in new for other in imports_of(name)} - found
    return found - {module}


def rank_of(module: str) -> int:
    """Return the position of a module's folder in the order."""
    return next(rank for rank, names in enumerate(ORDER) if module.partition(".")[0] in names)


def test_the_package_documents_its_folders_in_their_order():
    folders = [names[0] for names in ORDER[1:]]
    assert folders == re.findall(r"^(\w+): ", hesso_hf.__doc__ or "", re.MULTILINE)
    shown = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert shown <= {f"{name}{end}" for names in ORDER for name in names for end in ("", ".py")} | {
        "__init__.py", "__main__.py", "py.typed",
    }  # fmt: skip
    assert len(shown) <= 17


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"", "__main__"}))
def test_a_folder_imports_only_from_those_before_it(module: str):
    upward = {other for other in imports_of(module, for_types=True) if rank_of(other) > rank_of(module)}
    assert not upward, sorted(upward)


def test_no_modules_import_each_other_in_a_circle():
    assert not [module for module in MODULES if module in set().union(*map(reachable, imports_of(module)), set())]


def test_the_walk_sees_every_way_to_import():
    assert imports_of("export.export") >= {"export.parameters", "structures.groups", "export.write", "errors"}
    assert "cli.main" in imports_of("__main__")
    assert {"structures.proof.prove", "budget.solver"} <= reachable("pruning.plan")


@pytest.mark.parametrize("folder", [name for name in MODULES if MODULES[name].name == "__init__.py" and name])
def test_a_folder_says_what_goes_in_and_comes_out_and_hands_on_its_names(folder: str):
    package = __import__(f"hesso_hf.{folder}", fromlist=["_"])
    if folder != "bundled":
        assert "\nIn: " in package.__doc__
        assert "\nOut: " in package.__doc__
    # the import system sets a submodule's name in its folder, and what is handed on by that name is lost
    assert not {f"{folder}.{name}" for name in getattr(package, "__all__", ())} & MODULES.keys()
    for name in getattr(package, "__all__", ()) if folder != "config" else ():
        assert getattr(package, name).__name__.endswith(name)
    if folder != "bundled":
        assert not hasattr(package, "no_such_name")


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name)
def test_every_documented_path_leads_to_something(page: Path):
    for path in sorted(set(DOCUMENTED.findall(page.read_text(encoding="utf-8")))):
        owner: object = hesso_hf
        for depth, name in enumerate(path.split(".")[1:], start=2):
            prefix = ".".join(path.split(".")[1:depth])
            if prefix in MODULES:
                owner = __import__(f"hesso_hf.{prefix}", fromlist=["_"])
            else:
                assert hasattr(owner, name), path
                owner = getattr(owner, name)


@pytest.mark.parametrize("heavy", ["pruning", "trainer", "engines", "cli"])
def test_export_needs_neither_the_optimizer_nor_the_trainer(heavy: str):
    assert not [module for module in reachable("export.export") if module.partition(".")[0] == heavy]


def run(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.strip()


def test_importing_the_library_alone_imports_no_framework():
    code = "import sys, hesso_hf; print(sorted({'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)))"
    assert run(code) == "[]"


def test_export_imports_no_trainer_and_importing_everything_patches_nothing():
    """The methods of Transformers' base classes are the same objects before and after."""
    names = "('transformers.PreTrainedModel', 'transformers.Trainer', 'torch.optim.Optimizer', 'torch.nn.Module')"
    modules = "('trainer.trainer', 'pruning.optimizer', 'export.export', 'budget.inspect')"
    code = (
        "import importlib, sys, torch, transformers\n"
        f"owners = [eval(name) for name in {names}]\n"
        "before = [dict(vars(owner)) for owner in owners]\n"
        "from hesso_hf import export_pruned\n"
        "print([name for name in sys.modules if name.startswith(('hesso_hf.trainer', 'hesso_hf.pruning'))])\n"
        f"for name in {modules}: importlib.import_module('hesso_hf.' + name)\n"
        "print([dict(vars(owner)) == old for owner, old in zip(owners, before)])"
    )
    assert run(code).splitlines() == ["[]", "[True, True, True, True]"]


@pytest.mark.parametrize("name", hesso_hf.__all__)
def test_public_names_resolve(name: str):
    assert getattr(hesso_hf, name).__name__ == name
    assert name in dir(hesso_hf)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hesso_hf.no_such_name


def test_all_is_sorted_and_has_about_ten_names():
    assert list(hesso_hf.__all__) == sorted(hesso_hf.__all__)
    assert 5 <= len(hesso_hf.__all__) <= 13


@pytest.mark.parametrize("path", sorted(MODULES.values()), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_classes_and_functions_stay_short(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name
        elif isinstance(node, ast.ClassDef):
            methods = sum(isinstance(inner, ast.FunctionDef) for inner in node.body)
            short = node.end_lineno - node.lineno + 1 <= MAX_CLASS_LINES and methods <= MAX_METHODS
            assert short is not (node.name in LARGER), (node.name, methods)
