"""What each command takes and does, but for `prune`, `sweep`, `export` and `report`, which have files of
their own.

Frameworks are imported inside the functions, after the flags and the files they name were checked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import HessoConfig
from ..config.names import AUTO_REPLAY_SHARE, DTYPE_NAMES
from ..errors import HessoError
from .comparison import PICTURES, check_comparison, comparison_table, evaluation_of, markdown_table, reported
from .data import check_text_file, model_source
from .memory.workload import DTYPES, GB, OPTIMIZERS, Cluster, TokenPace, Workload
from .printing import print_table

STATUSES = {"proved": "verified", "refused": "refused", "not_applicable": "not applicable"}
WIDTH = 100  # of a line that quickstart prints
OWN_CODE = "run model code that comes with the model"
MEASURED_IN = "default: the checkpoints', float32 where they differ"

# -- inspect -----------------------------------------------------------------------------------------------------------


def inspect_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id, folder or config.json")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.2, 0.3, 0.5], help="shares to find sizes for")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help=OWN_CODE)


def inspect(arguments: argparse.Namespace) -> None:
    """Inspect a model, and print a table or JSON."""
    model = model_source(arguments.model)
    for ratio in arguments.ratio:
        HessoConfig(pruning_ratio=ratio)  # refuses what isn't a share
    from ..budget import inspect_model

    found = inspect_model(model, tuple(arguments.ratio), arguments.trust_remote_code)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    rows = []
    for name, item in found.structures.items():
        rows.append([
            name, STATUSES[item.status], str(item.units or "-"), str(item.layers or "-"),
            f"{item.parameters_per_unit:,}" if item.status == "proved" else "-",
            f"{item.relative_error:.0e}" if item.relative_error is not None else "-",
        ])  # fmt: skip
    title = "\n".join([f"{found.model_class}, {found.parameters:,} parameters", *map(str, found.untouched)])
    print_table(title, ["structure", "status", "units", "layers", "parameters\nper unit", "error"], rows)
    _print_reasons({
        name: item.reason.removeprefix(f"{name}: ") for name, item in found.structures.items()
        if item.status != "proved"
    })  # fmt: skip
    print("\nsizes for an even split between the structures (a training run measures the split on its data):")
    _print_reasons({
        ratio: option["reason"].replace(f" ({ratio})", "", 1) if "reason" in option else _sizes_line(option)
        for ratio, option in found.feasible.items()
    }, "ratio ")  # fmt: skip


def _print_reasons(reasons: Mapping[str, str], of: str = "") -> None:
    """Print a line for each distinct reason, after the names of all that it holds for."""
    from ..structures.groups import by_reason

    for reason, names in by_reason(reasons).items():
        print(f"{of}{', '.join(names)}: {reason}")


def _sizes_line(option: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in option["sizes"].items())
    line = f"{option['parameters']:,} parameters ({option['ratio']:.1%} removed): {sizes}"
    if left := ", ".join(f"{share:.0%} of {name}" for name, share in option["nearly_gone"].items()):
        line += f" - only {left} would stay, and the model would be of little use"
    return line


# -- plan --------------------------------------------------------------------------------------------------------------


def plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id, folder or config.json")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="of one GPU (GB: 1e9 bytes)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="number of GPUs in a node")
    parser.add_argument("--host-memory", type=float, help="main memory of a node (GB); default: as is needed")
    parser.add_argument("--batch-size", type=int, default=1, help="examples in one GPU's micro-batch")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens in one example")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="activations are computed again")
    parser.add_argument("--gradient-accumulation", action="store_true", help="gradients stay between micro-batches")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the computation")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="base optimizer")
    parser.add_argument(
        "--cric", nargs="?", choices=["cpu", "device"], const="cpu", help="with CRIC's snapshot kept there"
    )
    parser.add_argument(
        "--distillation", action=argparse.BooleanOptionalAction,
        help="on the data too, as where there is replay and the original model knows them (default: with replay)",
    )  # fmt: skip
    parser.add_argument(
        "--replay-share", type=float, default=AUTO_REPLAY_SHARE,
        help="of all tokens; 0: none. A run's own choice takes less where the model teaches the data too",
    )  # fmt: skip
    parser.add_argument("--healing", choices=["auto", "off"], default="auto", help="as in the run's config")
    parser.add_argument("--healing-tokens", type=int, help="as in the run's config")
    parser.add_argument("--lora-rank", type=int, default=16, help="of LoRA's adapters")
    parser.add_argument("--tokens", type=float, default=1e9, help="that are trained on in all")
    parser.add_argument("--device-tflops", type=float, default=989.0, help="peak of one GPU, as of an H100")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help=OWN_CODE)


def plan(arguments: argparse.Namespace) -> None:
    """Estimate every engine, and print tables or JSON."""
    taught = arguments.replay_share > 0 if arguments.distillation is None else arguments.distillation
    workload = Workload(
        arguments.batch_size, arguments.sequence_length, arguments.gradient_checkpointing, arguments.dtype,
        arguments.optimizer, arguments.gradient_accumulation, arguments.cric or "none", taught,
        arguments.lora_rank, arguments.replay_share, arguments.healing != "off", arguments.healing_tokens,
    )  # fmt: skip
    for name in ("gpus", "gpu_memory", "gpus_per_node", "host_memory"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise HessoError(f"`--{name.replace('_', '-')}` ({value:g}) must be a number above zero")
    host = None if arguments.host_memory is None else arguments.host_memory * GB
    cluster = Cluster(arguments.gpus, arguments.gpu_memory * GB, arguments.gpus_per_node, host)
    pace = TokenPace(arguments.tokens, arguments.device_tflops)
    model = model_source(arguments.model)
    from .memory import plan_memory

    found = plan_memory(model, workload, cluster, arguments.trust_remote_code, arguments.model, pace)
    if arguments.distillation and not found.sizes.vocabulary:
        raise HessoError(f"`--distillation`: {arguments.model} writes no text, so the original model can't teach it")
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    print_table(found.title(), *found.choice())
    print("\n".join(found.notes()) + "\n")
    print_table("What a GPU's memory holds at its highest moment (GB):", *found.peaks())
    print("\n".join(found.meanings()))


# -- eval --------------------------------------------------------------------------------------------------------------


def eval_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folder or Hub id; the others compare with the first"
    )
    parser.add_argument("--dataset", help="text, messages or prompts; wikitext2 is --joined")
    parser.add_argument("--dataset-config", metavar="NAME", help="of a configuration of a Hub data set")
    parser.add_argument("--joined", action="store_true", help="text joined by blank lines, in windows of 2048")
    parser.add_argument("--split", help="default: test, or all of a file")
    parser.add_argument("--text-column", default="text", help="column with text or messages")
    parser.add_argument("--chat-template", metavar="FILE", help="with one (Jinja), for messages")
    parser.add_argument("--block-size", type=int, help="tokens; default: 256 (joined: 2048), or the context")
    parser.add_argument("--tasks", help="lm-eval tasks, by commas; paper: the paper's seven")
    parser.add_argument("--num-fewshot", type=int, help="in a task's prompt; default: the task's own number")
    parser.add_argument("--include-path", help="folder with further lm-eval task files")
    parser.add_argument("--limit", type=int, help="examples at most, of the data and of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="examples in a forward pass")
    parser.add_argument("--new-tokens", type=int, default=32, help="generated to measure speed; 0: none")
    parser.add_argument("--no-speed", action="store_true", help="leave speed out, which takes long on a CPU")
    parser.add_argument("--device", help="cpu, cuda:1, ...; default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help=MEASURED_IN)
    parser.add_argument("--trust-remote-code", action="store_true", help=OWN_CODE)
    parser.add_argument("--output", help="a file for the results: .json, .md, .svg or .png")
    parser.add_argument("--card", action="store_true", help="write them into smaller models' cards and pages")
    parser.add_argument("--json", action="store_true", help="print JSON")


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure models' sizes and speed, and on text or lm-eval tasks, and print a table or JSON."""
    check_comparison(arguments)
    arguments.models = {name: model_source(name) for name in arguments.models}
    from .evaluate import measure_models, room_for_a_batch

    found: dict[str, dict[str, Any]] = {}
    try:
        with room_for_a_batch():
            measure_models(arguments, found)
    except BaseException:
        if found:
            print("hesso-hf: eval breaks off; what was measured until then:", file=sys.stderr)
            _tell(arguments, list(found.values()), complete=False)
        raise
    _tell(arguments, list(found.values()))
    if arguments.card:
        _add_to_cards(arguments, found)


def _tell(arguments: argparse.Namespace, found: list[dict[str, Any]], complete: bool = True) -> None:
    """Print what was measured, and write it to the output; where not all was, that says so."""
    whole = found[0] if len(arguments.models) == 1 else {"models": found}
    content = json.dumps(whole if complete else whole | {"complete": False}, indent=1)
    title, header, rows = comparison_table(found)
    title += "" if complete else "; broken off, not all was measured"
    if arguments.json:
        print(content)
    else:
        print_table(title, header, rows)
    if arguments.output is not None and not (len(found) == 1 and Path(arguments.output).suffix.lower() in PICTURES):
        _write(Path(arguments.output), found, content, markdown_table(title, header, rows))


def _write(path: Path, found: list[dict[str, Any]], content: str, page: str) -> None:
    """Write what was measured, as the file's ending says."""
    if path.suffix.lower() in PICTURES:
        from .comparison_plot import draw_comparison

        draw_comparison(found).savefig(path, dpi=120)
    else:
        path.write_text((page if path.suffix.lower() == ".md" else content) + "\n", encoding="utf-8")


def _add_to_cards(arguments: argparse.Namespace, measured: dict[str, dict[str, Any]]) -> None:
    """Write what was measured into the folders of smaller models, each compared with the first model."""
    from ..export.report import add_evaluation

    base = next(iter(measured))
    for name in reported(measured):
        small = measured[name]
        asked = {key: getattr(arguments, key) for key in ("limit", "num_fewshot", "split", "joined")}
        before = measured[base] if name != base else None
        add_evaluation(Path(name), evaluation_of(before, small, arguments.dataset, asked))


# -- survey ------------------------------------------------------------------------------------------------------------


def survey_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--types", nargs="+", help="model types; the others that the output has are kept")
    parser.add_argument("--output", default="docs/architectures.json", help="JSON file; a page is written beside it")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--resume", action="store_true", help="leave out the types that the output has already")
    parser.add_argument("--only", choices=["stream_basis"], help="survey this column, keep the others of the output")
    parser.add_argument("--time-limit", type=float, default=240.0, help="seconds for one type")


def survey(arguments: argparse.Namespace) -> None:
    """Survey model types, and write what is found after each.

    Raises:
        HessoError: for an unknown type, a count that isn't positive, or an output that can't be gone on with.
    """
    for name, value in (("jobs", arguments.jobs), ("time-limit", arguments.time_limit)):
        if value <= 0:
            raise HessoError(f"`--{name}` ({value}) must be above zero")
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .survey.page import summary
    from .survey.survey import SurveyFile, survey_only_basis, survey_type, survey_types

    path = Path(arguments.output)
    columns = (TextColumn("{task.description:<28}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("starting", total=None)
        file = SurveyFile(path, arguments.types, arguments.resume, arguments.only)
        tried = survey_only_basis if arguments.only else survey_type
        found = survey_types(file.left, arguments.jobs, arguments.time_limit, tried)
        for done, (model_type, structures) in enumerate(found, 1):
            file.add(model_type, structures)
            progress.update(task, completed=done, total=len(file.left), description=model_type)
    print(summary(file.content))
    print(f"written: {path} and {path.with_suffix('.md')}")


# -- quickstart --------------------------------------------------------------------------------------------------------


def quickstart_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id (default: bundled)")
    parser.add_argument("--dataset", default="python-docs", help="text to train on")
    parser.add_argument("--text-column", default="text", help="column with the text")
    parser.add_argument("--steps", type=int, default=40, help="steps of each of the two runs")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the parameters to remove")
    parser.add_argument("--batch-size", type=int, default=8, help="examples in a step")
    parser.add_argument("--block-size", type=int, default=256, help="tokens in an example")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the schedule")
    parser.add_argument("--output", default="quickstart", help="folder for the smaller models and results.json")


def quickstart(arguments: argparse.Namespace) -> None:
    """Train, compare and print."""
    HessoConfig(pruning_ratio=arguments.ratio)  # refuses what isn't a share
    check_text_file(arguments.dataset)
    if arguments.model is not None:
        model_source(arguments.model)
    from ..hf_models.loading import without_bars
    from .quickstart import run_quickstart

    with without_bars():
        rows, samples = run_quickstart(arguments)
    print_table("", ["", *[row.name for row in rows]], [
        ["parameters", *[f"{row.parameters:,}" for row in rows]],
        ["size on disk", *[f"{row.bytes / 1e6:.2f} MB" for row in rows]],
        ["held-out perplexity", *[f"{row.perplexity:.2f}" for row in rows]],
        ["tokens/s (forward)", *[f"{row.tokens_per_second:,.0f}" for row in rows]],
    ])  # fmt: skip
    for name, sample in samples.items():  # of the same held-out text
        print(textwrap.shorten(f"{name} writes: {sample}", WIDTH, placeholder=" ..."))
    print(f"smaller model, which plain AutoModelForCausalLM.from_pretrained loads: {arguments.output}/hesso")
