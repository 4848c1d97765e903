"""`hesso-hf inspect | plan | prune | export | eval | report | survey | quickstart`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import HessoError, StoppedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake is one message and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["prune"]:  # its flags are those of a recipe's dataclasses
            return _prune(argv[1:])
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except (HessoError, ImportError) as error:  # some optimizers and other options need a package of their own
        print(f"hesso-hf: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hesso-hf", description="Shrink language models while fine-tuning them.")
    commands = parser.add_subparsers(dest="command", required=True)

    inspect = commands.add_parser("inspect", help="what can be pruned in a model, from its config alone")
    inspect.add_argument("model", help="Hub id, folder or config.json")
    inspect.add_argument("--ratio", type=float, nargs="+", default=[0.2, 0.3, 0.5], help="shares to find sizes for")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--trust-remote-code", action="store_true")
    inspect.set_defaults(run=_inspect)

    _add_plan(commands)
    commands.add_parser("prune", help="fine-tune and prune as a recipe says: hesso-hf prune RECIPE [--flag value]")

    export = commands.add_parser("export", help="write the smaller model of a checkpoint")
    export.add_argument("checkpoint", help="checkpoint-* folder of a run whose pruning has finished")
    export.add_argument("output", help="folder for the smaller model")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="stored dtype")
    export.add_argument("--trust-pickles", action="store_true", help="open DeepSpeed's files, which can run code")
    export.set_defaults(run=_export)

    evaluate = commands.add_parser("eval", help="held-out perplexity and lm-eval tasks")
    evaluate.add_argument("model", help="folder or Hub id")
    evaluate.add_argument("--dataset", help="python-docs, a text file or a Hub id")
    evaluate.add_argument("--split", help="default: test, or all of a file")
    evaluate.add_argument("--text-column", default="text")
    evaluate.add_argument("--block-size", type=int, default=256)
    evaluate.add_argument("--tasks", help="comma-separated lm-eval tasks")
    evaluate.add_argument("--include-path", help="folder with further lm-eval task files")
    evaluate.add_argument("--limit", type=int, help="examples at most")
    evaluate.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the model")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="show a smaller model's pruning report")
    report.add_argument("model", help="folder of the smaller model")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--plot", help="draw what CRIC did into this file (.png, .svg or .pdf)")
    report.set_defaults(run=_report)

    survey = commands.add_parser("survey", help="what can be pruned in every model type of the installed transformers")
    survey.add_argument("--types", nargs="+", help="model types; the others that the output has are kept")
    survey.add_argument("--output", default="docs/architectures.json", help="JSON file; a page is written beside it")
    survey.add_argument("--jobs", type=int, default=2, help="processes at a time")
    survey.add_argument("--resume", action="store_true", help="leave out the types that the output has already")
    survey.add_argument("--time-limit", type=float, default=120.0, help="seconds for one type")
    survey.set_defaults(run=_survey)

    quickstart = commands.add_parser("quickstart", help="prune the bundled model by half and compare, offline")
    quickstart.add_argument("--model", help="folder or Hub id instead of the bundled model")
    quickstart.add_argument("--dataset", default="python-docs", help="text to train on")
    quickstart.add_argument("--text-column", default="text")
    quickstart.add_argument("--steps", type=int, default=200, help="steps of each of the two runs")
    quickstart.add_argument("--ratio", type=float, default=0.5, help="share of the parameters to remove")
    quickstart.add_argument("--batch-size", type=int, default=8)
    quickstart.add_argument("--block-size", type=int, default=256)
    quickstart.add_argument("--learning-rate", type=float, default=2e-3)
    quickstart.add_argument("--output", default="quickstart", help="folder for the smaller models and results.json")
    quickstart.set_defaults(run=_quickstart)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="which engine a training run fits in memory, from the config alone")
    plan.add_argument("model", help="Hub id, folder or config.json")
    plan.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    plan.add_argument("--gpu-memory", type=float, default=80.0, help="of one GPU (GB, 1e9 bytes)")
    plan.add_argument("--gpus-per-node", type=int, default=8)
    plan.add_argument("--host-memory", type=float, help="main memory of one node (GB); by default as much as is needed")
    plan.add_argument("--batch-size", type=int, default=1, help="examples in one GPU's micro-batch")
    plan.add_argument("--sequence-length", type=int, default=2048, help="tokens in one example")
    plan.add_argument("--gradient-checkpointing", action="store_true")
    plan.add_argument("--gradient-accumulation", action="store_true", help="gradients stay between micro-batches")
    plan.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the computation")
    plan.add_argument("--optimizer", choices=["adamw", "adamw_8bit", "adafactor", "sgd"], default="adamw")
    plan.add_argument(
        "--cric", nargs="?", choices=["cpu", "device"], const="cpu", help="with CRIC's snapshot kept there"
    )
    plan.add_argument("--distillation", action="store_true", help="with the original model in bf16 as teacher")
    plan.add_argument("--lora-rank", type=int, default=16)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--trust-remote-code", action="store_true")
    plan.set_defaults(run=_plan)


def _inspect(arguments: argparse.Namespace) -> int:
    from ..budget.inspect import inspect_model
    from ..bundled import resolve_model

    found = inspect_model(resolve_model(arguments.model), tuple(arguments.ratio), arguments.trust_remote_code)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    rows = []
    for name, item in found.structures.items():
        rows.append([
            name, item.status.replace("_", " "), str(item.units or "-"), str(item.layers or "-"),
            f"{item.parameters_per_unit:,}" if item.status == "proved" else "-",
            f"{item.relative_error:.0e}" if item.relative_error is not None else "-",
        ])  # fmt: skip
    title = f"{found.model_class}, {found.parameters:,} parameters"
    _table(title, ["structure", "status", "units", "layers", "parameters\na unit", "error"], rows)
    for name, item in found.structures.items():
        if item.status != "proved":
            print(f"{name}: {item.reason.removeprefix(f'{name}: ')}")
    print("\nsizes for an even split between the structures (a training run measures the split on its data):")
    for ratio, option in found.feasible.items():
        print(f"ratio {ratio}: {option.get('reason') or _sizes_line(option)}")
    return 0


def _sizes_line(option: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in option["sizes"].items())
    return f"{option['parameters']:,} parameters ({option['ratio']:.1%} removed): {sizes}"


def _plan(arguments: argparse.Namespace) -> int:
    from ..bundled import resolve_model
    from .memory.estimate import GB, Cluster, Workload
    from .memory.plan import plan_memory

    workload = Workload(
        arguments.batch_size, arguments.sequence_length, arguments.gradient_checkpointing, arguments.dtype,
        arguments.optimizer, arguments.gradient_accumulation, arguments.cric or "none", arguments.distillation,
        arguments.lora_rank,
    )  # fmt: skip
    host = None if arguments.host_memory is None else arguments.host_memory * GB
    cluster = Cluster(arguments.gpus, arguments.gpu_memory * GB, arguments.gpus_per_node, host)
    model = resolve_model(arguments.model)
    found = plan_memory(model, workload, cluster, arguments.trust_remote_code, arguments.model)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    _table(found.title(), found.header(), found.rows())
    print("\n".join(found.notes()))
    return 0


def _prune(flags: list[str]) -> int:
    from .recipe import parse_recipe, recipe_parser

    if {"-h", "--help"} & set(flags):
        print("Flags override the recipe's keys.\n")
        recipe_parser().print_help()
        return 0
    from ..distributed.collectives import is_main_process, leave
    from ..trainer.callbacks import EXIT_CODE
    from .commands import prune

    recipe = flags[0] if flags and not flags[0].startswith("-") else None
    code = 0
    try:
        result = prune(parse_recipe(recipe, flags[1:] if recipe else flags))
        if result is not None:
            _print_report(result.report, str(result.output), result.held_out_loss)
    except StoppedError as stopped:
        code = EXIT_CODE
        if is_main_process():
            print(f"hesso-hf: {stopped}", file=sys.stderr)
    leave()
    return code


def _export(arguments: argparse.Namespace) -> int:
    from ..export.export import export_pruned

    report = export_pruned(
        arguments.checkpoint, arguments.output, dtype=arguments.dtype, trust_pickles=arguments.trust_pickles
    )
    _print_report(report.to_dict(), arguments.output, None)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from .commands import evaluate

    found = evaluate(
        arguments.model, arguments.dataset, arguments.tasks, arguments.split, arguments.block_size,
        arguments.text_column, arguments.include_path, arguments.limit, arguments.trust_remote_code,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    tasks = found.pop("tasks", {})
    rows = [[name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}"] for name, value in found.items()]
    rows += [[f"{task} {name}", f"{value:.4g}"] for task, scores in tasks.items() for name, value in scores.items()]
    _table(arguments.model, ["measure", "value"], rows)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from .commands import plot_report, read_report

    report = read_report(arguments.model)
    if arguments.plot:
        plot_report(report, arguments.plot)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        _print_report(report, arguments.model, None)
    return 0


def _survey(arguments: argparse.Namespace) -> int:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .commands import survey
    from .survey.page import summary

    columns = (TextColumn("{task.description:<28}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("starting", total=None)

        def show(done: int, total: int, model_type: str) -> None:
            progress.update(task, completed=done, total=total, description=model_type)

        path = Path(arguments.output)
        content = survey(arguments.types, path, arguments.jobs, arguments.resume, arguments.time_limit, show)
    print(summary(content))
    print(f"written: {path} and {path.with_suffix('.md')}")
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    from .quickstart import QuickstartOptions, run_quickstart

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "command")}
    rows, samples = run_quickstart(QuickstartOptions(**options))
    _table("before and after", ["", *[row.name for row in rows]], [
        ["parameters", *[f"{row.parameters:,}" for row in rows]],
        ["size on disk", *[f"{row.bytes / 1e6:.2f} MB" for row in rows]],
        ["held-out perplexity", *[f"{row.perplexity:.2f}" for row in rows]],
        ["tokens/s (forward)", *[f"{row.tokens_per_second:,.0f}" for row in rows]],
    ])  # fmt: skip
    for name, sample in samples.items():
        print(f"\n{name}:\n  " + sample.strip().replace("\n", "\n  "))
    print(f"\nsmaller model: {arguments.output}/hesso, loads with plain AutoModelForCausalLM.from_pretrained")
    return 0


def _print_report(report: dict[str, Any], folder: str, loss: float | None) -> None:
    before, after = report["sizes"]["before"], report["sizes"]["after"]
    rows = [["parameters", f"{report['parameters']['before']:,}", f"{report['parameters']['after']:,}"]]
    rows += [[name, str(before[name]), str(after[name])] for name in after]
    _table(f"{folder}: {report['pruning_ratio']:.1%} of the parameters removed", ["", "before", "after"], rows)
    checked = report["verification"]
    print(
        f"logits against the trained model: relative error {checked['fold_error']:.1e} in fp32, "
        f"{checked['rounding_error']:.1e} stored as {checked['dtype']}"
    )
    cric = report.get("cric")
    if cric:
        corrected = ", ".join(f"{found['num_corrected']} {name}" for name, found in cric["structures"].items())
        print(f"CRIC: {cric['cycles']} cycles, {cric['samples']} samples; corrected: {corrected}")
    if loss is not None:
        print(f"held-out loss: {loss:.4f} nats a token")


def _table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table as wide as it is: a pipe has no width, and a terminal may be wider than it says."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    print(title)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    console.print(table)
