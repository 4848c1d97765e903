"""What models that `quality.py` trained know without being trained for it: the seven zero-shot tasks, by lm-eval.

    python benchmarks/zero_shot.py [--model smollm2] [--ratios 0.3 0.5] [--tokens 51200] [--methods hesso OBS ...]

`quality.py` has to run first, with the same `--cache`: it keeps what each run comes out with. Where `--data` holds the
tasks' examples, they are read from there, else fetched. Accuracies are those of length-normalised choices where a task
has them. `mean` is that of the tasks, `error` its standard error by the number of examples; `chance` is what guessing
gets. Each model that is measured is kept in the result file, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from quality import CACHE, KEY, METHODS, run_folder
from texts import find_model, name_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hesso_hf.cli.tasks import PAPER, Tasks
from hesso_hf.export.report import versions

RESULTS = Path(__file__).parent / "results" / "zero_shot.json"
QUALITY = Path(__file__).parent / "results" / "quality.json"
CHANCE = {"hellaswag": 0.25, "arc_easy": 0.25, "arc_challenge": 0.25, "openbookqa": 0.25}  # the others have two choices


def main() -> int:
    options = parse()
    for path in ("output", "quality", "cache", "data"):
        setattr(options, path, getattr(options, path).resolve())
    folder, name = find_model(options.model, options.data, options.cache), name_of(options.model)
    tasks = find_tasks(options)
    result = json.loads(options.output.read_text()) if options.output.exists() else {"limit": options.limit, "runs": []}
    if result["limit"] != options.limit:
        raise SystemExit(f"{options.output} has {result['limit']} examples of each task: give another --output")
    base = {"model": name, "method": "base", "ratio": 0.0, "tokens": 0, "seed": 0}
    for run, trained in [(base, folder), *trained_models(options, name)]:
        if any(all(entry[key] == run[key] for key in KEY) for entry in result["runs"]):
            continue
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
        scores = tasks.scores(model, AutoTokenizer.from_pretrained(folder))
        result["runs"].append(run | {"parameters": model.num_parameters()} | summary(scores))
        print(json.dumps(result["runs"][-1]), flush=True)
        write(options.output, result)
    return 0


def trained_models(options: argparse.Namespace, name: str) -> list[tuple[dict[str, Any], Path]]:
    """Return the runs that are asked for and the folders of what they came out with; name those that aren't there."""
    found = []
    for entry in json.loads(options.quality.read_text())["runs"]:
        run = {key: entry[key] for key in KEY}
        asked = run["ratio"] in (0.0, *options.ratios) and run["tokens"] in options.tokens
        if run["model"] != name or run["method"] not in options.methods or not asked:
            continue
        if (trained := run_folder(options.cache, run) / "small").exists():
            found.append((run, trained))
        else:
            print(f"{run['method']} at {run['ratio']:.0%} isn't in {trained}: left out", file=sys.stderr, flush=True)
    return found


def find_tasks(options: argparse.Namespace) -> Tasks:
    """Return the tasks, whose local files are found from within `--data`."""
    local = options.data / "tasks"
    names, include = (",".join(f"local_{name}" for name in PAPER), str(local)) if local.exists() else ("paper", None)
    if include is not None:
        os.chdir(options.data)
    return Tasks(names, "tasks", limit=options.limit, include_path=include)


def summary(scores: dict[str, dict[str, float | int]]) -> dict[str, Any]:
    """Return each task's accuracy, and their mean with its standard error."""
    accuracies, errors = {}, []
    for task, found in scores.items():
        metric = "acc_norm" if "acc_norm,none" in found else "acc"
        accuracies[task.removeprefix("local_")] = round(found[f"{metric},none"], 4)
        errors.append(found[f"{metric}_stderr,none"])
    error = math.sqrt(sum(each**2 for each in errors)) / len(errors)
    return {"tasks": accuracies, "mean": round(statistics.mean(accuracies.values()), 4), "error": round(error, 4)}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write all runs, and what guessing gets."""
    chance = round(statistics.mean(CHANCE.get(name, 0.5) for name in PAPER), 4)
    head = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "versions": versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | {"chance": chance} | result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as `quality.py` takes it")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--tokens", type=int, nargs="+", default=[51_200], help="that were trained on")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--limit", type=int, default=200, help="examples of each task")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="tasks/ and data/")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where quality.py has kept the models")
    parser.add_argument("--quality", type=Path, default=QUALITY, help="its result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
