"""README and docs: tables are those of the results, blocks run and print what is shown, commands and options exist."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import inspect
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hesso_hf import HessoConfig
from hesso_hf.cli.main import _parser
from hesso_hf.cli.recipe import RunArguments, recipe_parser
from hesso_hf.config import SALIENCIES
from tests.support import ROOT, families, forks

README = ROOT / "README.md"
WITHOUT_CODE = (
    "api.md",
    "architectures.md",
    "glossary.md",
    "options.md",
    "serving.md",
    "troubleshooting.md",
)
LISTS = [ROOT / "docs" / name for name in WITHOUT_CODE]
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d+\.\d+(?:e-?\d+)?")

# Runs the ```python blocks of one document in one namespace and prints what each wrote, as JSON.
RUN_BLOCKS = """
import contextlib, io, json, sys
from tests.support import shortened
shortened.restore()
namespace, printed = {"__name__": "__main__"}, []
for block in json.load(open(sys.argv[1], encoding="utf-8")):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block, "block", "exec"), namespace)
    printed.append(out.getvalue())
print("PRINTED" + json.dumps(printed))
"""


def blocks(path: Path) -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block of a document."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """Return every command of a document's bash blocks and of code in its text, in words."""
    lines = [
        line for language, text in blocks(path) if language == "bash" for line in text.replace("\\\n", " ").splitlines()
    ]
    inline = re.findall(r"`((?:make|hesso-hf) [^`]*)`", path.read_text(encoding="utf-8"))
    parts = [part for line in (*lines, *inline) for part in line.split("&&")]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def table_rows(path: Path, header: str) -> dict[str, list[str]]:
    """Return the rows of all tables with a header, by the code in their first column."""
    rows: dict[str, list[str]] = {}
    for table in re.findall(
        rf"^{re.escape(header)}\n\|[-:| ]+\|\n((?:\|.*\n)+)", path.read_text("utf-8"), re.MULTILINE
    ):
        for line in table.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            rows[cells[0].strip("` ")] = cells[1:]
    return rows


def agrees(shown: str, printed: str) -> bool:
    """Compare a line: all alike, but for decimal numbers, which may be off by a hundredth."""
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed):
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=0.01) for a, b in pairs)


def module_of(path: Path) -> ModuleType:
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def renderer() -> ModuleType:
    """benchmarks/render_readme.py as a module."""
    return module_of(ROOT / "benchmarks" / "render_readme.py")


# -- the text ----------------------------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200
    code = next(text for language, text in blocks(README) if language == "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            document = path.parent / file if file else path
            assert document.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path not in LISTS], ids=lambda path: path.name)
def test_blocks_run_and_print_what_is_shown(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(path)
    code = [text for language, text in found if language == "python"]
    assert code
    (tmp_path / "blocks.json").write_text(json.dumps(code), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    done = forks.run(RUN_BLOCKS, "blocks.json")
    assert done.returncode == 0, done.stderr[-3000:]
    printed = iter(json.loads(done.stdout.partition("PRINTED")[2]))
    for (language, _), (following, shown) in zip(found, [*found[1:], ("", "")], strict=True):
        lines = next(printed).splitlines() if language == "python" else []
        if language == "python" and following == "text":
            for line in shown.splitlines():
                assert any(agrees(line, other) for other in lines), f"{line!r} is not in {lines}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(path: Path) -> None:
    subcommands = next(
        action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)
    ).choices
    for words in commands(path):
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", MAKEFILE, re.MULTILINE), words
        elif words[0] in ("accelerate", "torchrun"):
            assert words[words.index("-m") + 1] == "hesso_hf", words
            words = words[words.index("-m") + 1 :]
        for word in words:
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file(), words
        if words[0] in ("hesso-hf", "hesso_hf") and words[1] != "COMMAND":
            assert words[1] in subcommands, words
            parsers = [subcommands[words[1]], *([recipe_parser()] if words[1] in ("prune", "sweep") else [])]
            known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
            known |= {f"--{name}" for name in HessoConfig.__dataclass_fields__ if len(parsers) > 1}
            for word in words[2:]:
                assert not word.startswith("--") or word.partition("=")[0] in known, words


def test_options_of_the_documents_are_those_of_the_config() -> None:
    """Every field of HessoConfig stands in one of the tables, with its default; recipe keys likewise."""
    header = "| option | default | meaning |"
    options: dict[str, list[str]] = {}
    for name in ("method.md", "budgets.md", "training.md"):
        options |= table_rows(ROOT / "docs" / name, header)
    keys = table_rows(ROOT / "docs" / "cli.md", "| key | default | meaning |")
    for rows, owner in ((options, HessoConfig), (keys, RunArguments)):
        fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(owner)}
        assert {name: cells[0].strip("`").replace('"', "'") for name, cells in rows.items()} == {
            name: repr(default) for name, default in fields.items()
        }
    assert set(table_rows(ROOT / "docs" / "method.md", "| name | score |")) == set(SALIENCIES)


def test_the_page_of_all_options_is_what_the_dataclasses_have() -> None:
    writer = module_of(ROOT / "docs" / "options.py")
    assert writer.PAGE.read_text(encoding="utf-8") == writer.page(), "run python docs/options.py"
    for owner, name in ((HessoConfig, "pruning_periods"), (RunArguments, "eval_ratio")):
        default = owner.__dataclass_fields__[name].default
        assert f"| `{name}` | `{default!r}` |" in writer.page()


def test_snippets_of_the_serving_page_use_what_transformers_has() -> None:
    """They aren't run, since their packages aren't installed: names and keywords are looked up."""
    import transformers

    trees = [ast.parse(text) for language, text in blocks(ROOT / "docs" / "serving.md") if language == "py"]
    names, calls = set(), 0
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and node.module == "transformers":
            names |= {alias.name for alias in node.names}
        owner = getattr(transformers, node.func.id, None) if isinstance(getattr(node, "func", None), ast.Name) else None
        if owner is not None:
            calls += 1
            known = inspect.signature(owner.__init__).parameters
            assert {keyword.arg for keyword in node.keywords} <= set(known), node.func.id
    assert {"TorchAoConfig", "BitsAndBytesConfig", "GPTQConfig"} <= names
    assert all(hasattr(transformers, name) for name in names), names
    assert calls >= 5


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    literals = [
        node.value
        for path in (ROOT / "hesso_hf").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    known = "\n".join(literals)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| (?:`` (.*?) ``|``(.*?) ``|`(.*?)`) ", page, re.MULTILINE)
    messages = ["".join(found).strip() for found in quoted]
    assert len(messages) > 15
    for message in messages:
        for part in message.split("..."):
            assert part.strip(" ,") in known, message


def test_families_of_the_documents_are_tested() -> None:
    rows = table_rows(ROOT / "docs" / "method.md", "| structures | `model_type` |")
    named = [set(re.findall(r"`(\w+)`", cells[0])) for cells in rows.values()]
    known = (*families.ALL.values(), *families.OTHERS)
    proved = {family.model_type for family in known if not family.refused}
    for types in named[:3]:
        assert types <= proved, types - proved
    assert all(named)


def test_tolerance_of_the_documents_is_that_of_the_code() -> None:
    from hesso_hf.budget import cost, forward_time
    from hesso_hf.budget import solver as budget
    from hesso_hf.export import verify

    assert verify.FOLD_TOLERANCE == 1e-4
    for path in (README, ROOT / "docs" / "method.md"):
        assert "1e-4" in path.read_text(encoding="utf-8")
    text = (ROOT / "docs" / "budgets.md").read_text(encoding="utf-8")
    assert f"more than {budget.MEETS:.0%} of the model is warned" in text
    assert f"more than {budget.UNREACHABLE:.0%} is an error" in text
    assert f"attention over {cost.CONTEXT} tokens" in text
    assert f"`latency_tokens` ({HessoConfig(0.5).latency_tokens}) tokens" in text
    assert f"within {budget.MEETS:.0%} of the model's, or the nearest of {forward_time.MOST_LOOKS} sizes" in text


# -- the tables --------------------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "render_readme.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_table_stands_in_a_document(renderer: ModuleType) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    for name in renderer.TABLES:
        assert f"<!-- begin:{name} -->" in text


def test_a_missing_result_names_its_command(renderer: ModuleType, tmp_path: Path) -> None:
    for name, (_, command, _) in renderer.TABLES.items():
        assert command in renderer.render_table(name, tmp_path)
        target = re.match(r"make (\S+)", command)
        if target is not None:
            assert re.search(rf"^{target.group(1)}:", MAKEFILE, re.MULTILINE)
        else:
            assert (ROOT / command.split()[1]).is_file()


@pytest.mark.parametrize(
    ("text", "rows", "before"),
    [
        ("stories", ("1.250", "**2.100**", "2.300"), "1.250"),
        ("docs", ("1.250 / 4.000", "**2.100** / 5.200", "2.300 / **5.100**"), "1.250 / 3.000"),
    ],
    ids=["unknown to the model", "known"],
)
def test_the_table_of_peers_reads_what_the_benchmark_writes(
    renderer: ModuleType, tmp_path: Path, text: str, rows: tuple[str, ...], before: str
) -> None:
    others = {"dense": 4.0, "hesso": 5.2, "OBS": 5.1, "scratch": 7.0}
    losses = {"dense": (1.2, 1.3), "hesso": (2.0, 2.2), "OBS": (2.1, 2.5), "scratch": (4.0, 4.0)}
    runs = [
        {
            "model": "m",
            "method": method,
            "ratio": 0.0 if method == "dense" else 0.5,
            "tokens": 500,
            "seed": seed,
            "in": x,
            "out": others[method],
        }
        for method, found in losses.items()
        for seed, x in enumerate(found)
    ]
    runs.append({**runs[-1], "method": "hesso", "tokens": 100, "in": 9.0})  # fewer tokens are another comparison
    result = {"settings": {"m": {"text": text}}, "base": {"m": {"in": 1.25, "out": 3.0}}, "runs": runs}
    (tmp_path / "quality.json").write_text(json.dumps(result))
    table = renderer.render_table("peers", tmp_path)
    for method, cell in zip(("not pruned", "HESSO", "structured OBS", "FLAP"), (*rows, "-"), strict=True):
        assert f"| {method} | {cell} |" in table
    assert f"500 training tokens each, 2 seeds, before training {before}" in table.replace("\n", " ")


def test_the_table_of_peers_has_the_longest_runs_at_each_ratio_that_hesso_and_a_peer_were_trained_for(
    renderer: ModuleType, tmp_path: Path
) -> None:
    runs = [
        {"model": "m", "method": method, "ratio": ratio, "tokens": tokens, "seed": 0, "in": loss, "out": 9.0}
        for method, ratio, tokens, loss in (
            ("hesso", 0.3, 100, 3.0), ("OBS", 0.3, 100, 3.1), ("hesso", 0.5, 100, 4.0), ("FLAP", 0.5, 100, 4.1),
            ("hesso", 0.5, 900, 3.5), ("OBS", 0.5, 900, 3.6), ("hesso", 0.5, 700, 1.0), ("dense", 0.0, 900, 2.0),
        )
    ]  # fmt: skip
    result = {"settings": {"m": {"text": "stories"}}, "base": {"m": {"in": 1.25}}, "runs": runs}
    (tmp_path / "quality.json").write_text(json.dumps(result))
    table = renderer.render_table("peers", tmp_path)
    assert "|  | m, 30% removed, 100 tokens | m, 50% removed, 900 tokens |" in table
    assert "| HESSO | **3.000** | **3.500** |" in table
    assert "| structured OBS | 3.100 | 3.600 |" in table
    assert "100 or 900 training tokens each, 1 seed," in table.replace("\n", " ")


def test_the_quickstart_table_reads_what_the_quickstart_writes(renderer: ModuleType, tmp_path: Path) -> None:
    from hesso_hf.cli.quickstart import QuickstartRow

    rows = [
        QuickstartRow(name, 1234, 2_000_000, 12.345, 98765.4) for name in ("original", "HESSO", "one-shot magnitude")
    ]
    options = {name: value for name, value in vars(_parser().parse_args(["quickstart"])).items() if name != "work"}
    result = {"options": options, "rows": [dataclasses.asdict(row) for row in rows]}
    (tmp_path / "quickstart.json").write_text(json.dumps(result))
    text = renderer.render_table("quickstart", tmp_path)
    for shown in ("1,234", "2.00 MB", "12.35", "98,765", "one-shot magnitude", "40 steps"):
        assert shown in text


def test_the_overhead_table_reads_what_the_benchmark_writes(renderer: ModuleType, tmp_path: Path) -> None:
    steps = {kind: {"share": share} for kind, share in (("warmup", 0.01), ("scoring", 0.2), ("recovery", 0.03))}
    found = {"steps": steps, "extra_memory_share_of_parameters": 0.005}
    entry = {"device": "cpu", "parameters": 9e7, "tokens_per_step": 1024, "results": {"mlp_channels": found}}
    (tmp_path / "overhead.json").write_text(json.dumps({"cpu 100m": entry}))
    text = renderer.render_table("overhead", tmp_path)
    assert "| 90M on cpu | mlp channels | 1.0% | 20.0% | - | 3.0% | - | 0.5% |" in text
    assert "1,024 tokens per step" in text


def test_markers_without_a_pair_and_unknown_tables_are_errors(renderer: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pairs"):
        renderer.render("<!-- begin:peers -->\n", tmp_path)
    with pytest.raises(ValueError, match="unknown table 'pears'"):
        renderer.render("<!-- begin:pears -->\n<!-- end:pears -->\n", tmp_path)
    text = "a\n<!-- begin:overhead -->\nold\n<!-- end:overhead -->\nb\n"
    once = renderer.render(text, tmp_path)
    assert "old" not in once
    assert once.startswith("a\n")
    assert once.endswith("-->\nb\n")
    assert renderer.render(once, tmp_path) == once
