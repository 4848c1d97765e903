"""Run another package's trainer tests with its own classes and with HESSO's, and compare how each test ends.

    python tests/suites/compare.py transformers CHECKOUT tests/trainer/test_trainer.py -- -k resume
    python tests/suites/compare.py trl CHECKOUT tests/test_sft_trainer.py

CHECKOUT holds the package's sources, whose tests are run; the package itself is the installed one. A test that passes
with the stock class has to pass with ours, but for those that `known_failures.toml` names with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
KNOWN = HERE / "known_failures.toml"


def run(checkout: Path, tests: list[str], folder: Path, *options: str) -> dict[str, list[str]]:
    """Run tests and return outcome and message by test id."""
    outcomes = folder / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}
    environment = os.environ | offline | {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "warning"}
    command = [sys.executable, "-m", "pytest", "-p", "suite_swap", "-p", "no:cacheprovider", "-n", "0", "-q"]
    command += ["--continue-on-collection-errors", "--tb=short", "-o", "addopts=", f"--outcomes={outcomes}"]
    command += [*options, *tests]
    log = folder / ("swapped.log" if options else "stock.log")
    with log.open("w") as output:
        subprocess.run(command, cwd=checkout, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    found = json.loads(outcomes.read_text()) if outcomes.exists() else {}
    if not found:
        raise SystemExit(f"no test ran: {log}\n{log.read_text()[-2000:]}")
    return found


def known_failures() -> dict[str, str]:
    """Return the reason of each test that is known to fail with our class, by its id."""
    return {
        f"{name}::{test}": reason
        for suite in tomllib.loads(KNOWN.read_text(encoding="utf-8")).values()
        for name, tests in suite.items()
        for test, reason in tests.items()
    }


def compare(stock: dict[str, list[str]], swapped: dict[str, list[str]], known: dict[str, str]) -> tuple[list[str], int]:
    """Return a line for each thing to say, and how many tests fail that aren't known to."""
    lines, new = [], 0
    for test, (outcome, _) in sorted(stock.items()):
        if outcome != "passed":
            continue
        found, message = swapped.get(test, ["lost", "it wasn't run"])
        if found != "passed" and test not in known:
            new += 1
            lines.append(f"FAILS {test}: {' '.join(message.split())[:300]}")
        elif found == "passed" and test in known:
            lines.append(f"passes now, though known to fail: {test}")
    counts = {word: sum(outcome == word for outcome, _ in stock.values()) for word in ("passed", "failed", "skipped")}
    failing = sum(swapped.get(test, [""])[0] != "passed" for test, (outcome, _) in stock.items() if outcome == "passed")
    stock_says = ", ".join(f"{count} {word}" for word, count in counts.items())
    lines.append(f"stock class: {stock_says}; of those that passed, {failing} fail with ours, {new} of them not known")
    return lines, new


def main() -> int:
    """Run both, print the difference, and return 1 where there is one that isn't known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=("transformers", "trl"), help="whose trainers are swapped")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("tests", nargs="+", help="files or test ids; what follows -- goes to pytest")
    parser.add_argument("--hesso", default="{}", help="changes of HessoConfig, as JSON")
    parser.add_argument("--work", type=Path, help="a folder for stand-ins and logs, kept (default: a temporary one)")
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, HERE / "suite_stand_ins.py", folder / "hub"], check=True)
        stock = run(args.checkout, [*args.tests, *rest], folder)
        swapped = run(args.checkout, [*args.tests, *rest], folder, f"--swap={args.package}", f"--hesso={args.hesso}")
    lines, new = compare(stock, swapped, known_failures())
    print(*lines, sep="\n")
    return int(new > 0)


if __name__ == "__main__":
    sys.exit(main())
