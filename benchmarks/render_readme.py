"""Write the tables of the README and the docs from benchmarks/results/*.json, between their HTML comment markers.

    python benchmarks/render_readme.py [--check]

A table stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`. With `--check` nothing is written, and a table
that isn't what the JSON says is an error. Where a JSON is missing, one line names the command that makes it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hesso_hf.cli.survey.page import summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
_TABLE = re.compile(r"(<!-- begin:(\w+) -->\n)(.*?)(<!-- end:\2 -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:begin|end):(\w+) -->")


def quickstart(result: dict[str, Any]) -> str:
    """The comparison that `hesso-hf quickstart` prints."""
    rows, options = result["rows"], result["options"]
    return "\n".join(
        [
            _table(
                ["", *[row["name"] for row in rows]],
                [
                    ["parameters", *[f"{row['parameters']:,}" for row in rows]],
                    ["size on disk", *[f"{row['bytes'] / 1e6:.2f} MB" for row in rows]],
                    ["held-out perplexity", *[f"{row['perplexity']:.2f}" for row in rows]],
                    ["tokens/s (forward)", *[f"{row['tokens_per_second']:,.0f}" for row in rows]],
                ],
            ),
            "",
            f"{options['steps']} steps of {options['batch_size']} x {options['block_size']} tokens for each pruned "
            f"model, learning rate {options['learning_rate']:g}, one seed. The original is not trained further.",
        ]
    )


def overhead(result: dict[str, Any]) -> str:
    """What HESSO adds to a step, by kind of step, and to the memory."""
    kinds = ("warmup", "scoring", "shrinking", "recovery", "sampling")
    rows = []
    for entry in result.values():
        for structures, found in entry["results"].items():
            shares = [found["steps"].get(kind, {}).get("share") for kind in kinds]
            rows.append(
                [
                    f"{entry['parameters'] / 1e6:,.0f}M on {entry['device']}",
                    structures.replace("_", " "),
                    *["-" if share is None else f"{share:.1%}" for share in shares],
                    f"{found['extra_memory_share_of_parameters']:.1%}",
                ]
            )
    tokens = sorted({entry["tokens_per_step"] for entry in result.values()})
    return "\n".join(
        [
            _table(
                ["model", "structures", "warm-up", "scoring step", "shrinking step", "recovery", "CRIC step", "memory"],
                rows,
            ),
            "",
            f"Time that HESSO adds to a step, as a share of the step without it ({_list(tokens)} tokens per step, "
            "AdamW); and the peak of the memory it allocates, as a share of the parameters' own.",
        ]
    )


def sharding(result: dict[str, Any]) -> str:
    """What HESSO adds where FSDP2 shards the parameters."""
    kinds = ("warmup", "scoring", "shrinking", "recovery")
    rows = [
        [
            f"{entry['parameters'] / 1e6:,.0f}M on {entry['processes']} x {entry['device']}",
            *[f"{entry['steps'][kind]['share']:.1%}" for kind in kinds],
            f"{entry['peak_ratio']:.3f}",
        ]
        for entry in result.values()
    ]
    tokens = sorted({entry["tokens_per_step"] for entry in result.values()})
    return "\n".join(
        [
            _table(["model", "warm-up", "scoring step", "shrinking step", "recovery", "peak memory"], rows),
            "",
            f"HESSO's share of a step under FSDP2 (heads, MLP and embedding channels, {_list(tokens)} tokens per step, "
            "AdamW), from where all processes are ready; and the peak of a process' memory against plain AdamW's.",
        ]
    )


def distillation(result: dict[str, Any]) -> str:
    """Held-out losses with and without a teacher; one table a model."""
    return "\n\n".join(_distillation_table(name, entry) for name, entry in result.items())


def _distillation_table(name: str, entry: dict[str, Any]) -> str:
    medians, last = entry["medians"], entry["runs"][-1]
    alike = [r for r in entry["runs"] if (r["learning_rate"], r["tokens"]) == (last["learning_rate"], last["tokens"])]
    rows = []
    for method, median in medians.items():
        losses = {run["seed"]: run["loss"] for run in alike if run["method"] == method}
        plain = {run["seed"]: run["loss"] for run in alike if run["method"] == "none"}
        gains = [losses[seed] - plain[seed] for seed in sorted(losses.keys() & plain.keys())]
        gain = f"{min(gains):+.3f} to {max(gains):+.3f}" if gains and method != "none" else "-"
        rows.append([method, f"{median['loss']:.3f}", f"{median['spread']:.3f}", gain, str(median["seeds"])])
    parameters = " to ".join(f"{count:,}" for count in sorted({run["parameters"] for run in alike}))
    return "\n".join(
        [
            _table([f"`distillation_alpha`, {name}", "held-out loss", "spread", "change by seed", "seeds"], rows),
            "",
            f"Medians over seeds; the change is against the same seed without a teacher. {entry['ratio']:.0%} of the "
            f"parameters removed ({parameters} left), {last['tokens']:,} training tokens each, learning rate "
            f"{last['learning_rate']:g}. The unpruned model as it comes: {entry['original_loss']:.3f}.",
        ]
    )


def bundled(result: dict[str, Any]) -> str:
    """One sentence on the bundled model."""
    return (
        f"The bundled model is a Llama of {result['num_parameters']:,} parameters "
        f"({result['folder_bytes'] / 1e6:.1f} MB on disk), trained from scratch on "
        f"{result['tokens_seen'] / 1e6:.1f} million tokens of the documentation that Python carries for `help()`."
    )


COLLAPSE_METHODS = {
    "one_shot_magnitude": "one-shot, magnitude",
    "hesso_magnitude": "HESSO, magnitude",
    "hesso_cosine_similarity": "HESSO, cosine similarity",
    "hesso_taylor_first_order": "HESSO, first-order Taylor",
    "hesso_taylor_second_order": "HESSO, default (second-order Taylor)",
    "cric": "HESSO-CRIC, path",
    "cric_probe": "HESSO-CRIC, probe",
}


def collapse(result: dict[str, Any]) -> str:
    """Held-out losses of every method from every start, one table a model."""
    return "\n\n".join(_collapse_table(model, starts, result) for model, starts in result["medians"].items())


def _collapse_table(model: str, starts: dict[str, Any], result: dict[str, Any]) -> str:
    order = ("plain", "rescaled", "stationary")
    names = [name for name in (*(f"{start}, untrained" for start in order), *order) if name in starts]
    runs = [run for run in result["runs"] if run["model"] == model]
    seeds = [len({run["seed"] for run in runs if run["trained"] is kind}) for kind in (False, True)]
    rows = []
    for method, label in COLLAPSE_METHODS.items():
        cells = []
        for name in names:
            cells.append(_collapse_cell(starts[name].get(method), seeds["untrained" not in name]))
        rows.append([label, *cells])
    ratios = {round(run["parameter_ratio"], 2) for run in runs}
    tokens = {run["start"]: run["tokens"] for run in runs if run["trained"]}
    trained = ", ".join(f"{start} {tokens[start]:,}" for start in order if start in tokens)
    return "\n".join(
        [
            _table([model, *names], rows),
            "",
            f"Held-out nats per token after removing {_percent(ratios)} of the parameters: median and half the range, "
            f"of {_plural(seeds[0], 'seed')} untrained and {_plural(seeds[1], 'seed')} trained where a cell doesn't "
            "say fewer. Training tokens: "
            f"{trained}. A dash: trains as on the plain model.",
        ]
    )


def _collapse_cell(entry: dict[str, Any] | None, seeds: int) -> str:
    if entry is None:
        return "-"
    text = f"{entry['median_loss']:.3f} ± {entry['spread'] / 2:.3f}"
    return text if entry["seeds"] == seeds else f"{text} ({_plural(entry['seeds'], 'seed')})"


def _percent(ratios: set[float]) -> str:
    return " or ".join(f"{ratio:.0%}" for ratio in sorted(ratios))


def architectures(result: dict[str, Any]) -> str:
    """The counts of the survey of all model types."""
    return summary(result)


def memory(result: dict[str, Any]) -> str:
    """Estimated over measured memory of training, by device, setting and trainer."""
    rows, shapes = [], set()
    for entry in result.values():
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in entry["runs"]:
            groups.setdefault((run["setting"], run["trainer"]), []).append(run)
            shapes.add((run["workload"]["batch_size"], run["workload"]["sequence_length"]))
        for (setting, trainer), runs in groups.items():
            speeds = [f"{run['tokens_per_second']:,.0f}" for run in runs if run["tokens_per_second"] is not None]
            peaks = [run["measured"]["peak"] / 1e6 for run in runs]
            kept = [run["ratio"]["peak"] for run in runs]
            moving = [run["ratio"]["peak above parameters and state"] for run in runs]
            rows.append(
                [
                    f"{_plural(len(runs), 'model')} on {entry['device']}",
                    setting,
                    trainer,
                    _spread(peaks, ",.0f"),
                    _spread(kept, ".3f"),
                    _spread(moving, ".3f"),
                    ", ".join(speeds) or "-",
                ]
            )
    return "\n".join(
        [
            _table(
                ["models", "setting", "trainer", "peak (MB)", "estimate/peak", "without what stays", "tokens/s"], rows
            ),
            "",
            f"Micro-batches of {' or '.join(f'{batch} x {length}' for batch, length in sorted(shapes))} tokens, AdamW. "
            "The ratios are the estimate over the measurement: of the peak, and of what is above the parameters and "
            "the optimizer state, which the estimate has exactly.",
        ]
    )


def _spread(values: list[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


PLANNED = ("ddp", "fsdp2", "zero2", "zero3", "fsdp2_offload", "zero2_offload", "lora")


def plans(result: dict[str, Any]) -> str:
    """GB a GPU by model, number of GPUs and engine; bold where it fits."""
    from hesso_hf.cli.memory.workload import ENGINES

    titles = {name: engine.title for name, engine in ENGINES.items()}
    rows = []
    for plan in result["plans"]:
        engines, cluster = plan["engines"], plan["cluster"]
        host = engines[plan["recommended"] or "fsdp2"]["host_bytes_per_node"]
        cells = [_plan_cell(engines.get(name)) for name in PLANNED]
        chosen = titles[plan["recommended"]] if plan["recommended"] else "none"
        rows.append([plan["model"], str(cluster["num_gpus"]), *cells, chosen, f"{host / 1e9:,.0f}"])
    work, memory = result["plans"][0]["workload"], result["plans"][0]["cluster"]["gpu_memory"]
    return "\n".join(
        [
            _table(["model", "GPUs", *[titles[name] for name in PLANNED], "recommended", "host/node"], rows),
            "",
            f"Estimated GB: the peak of one GPU, bold where it fits {memory / 1e9:g} GB, and main memory of a node of "
            "up to eight GPUs under the recommended engine. "
            f"Micro-batches of {work['batch_size']} x {work['sequence_length']} tokens, {work['dtype']}, "
            f"{work['optimizer']}, gradient checkpointing and accumulation, replay and healing as by default.",
        ]
    )


def _plan_cell(engine: dict[str, Any] | None) -> str:
    if engine is None:
        return "-"
    text = f"{engine['peak_bytes'] / 1e9:.1f}"
    return f"**{text}**" if engine["fits"] else text


BASES = {"given": "given basis", "principal": "principal basis"}


def basis(result: dict[str, Any]) -> str:
    """Held-out losses in both bases of the stream."""
    medians, rows = result["medians"], []
    settings = sorted({name.rpartition(", ")[0] for name in medians})
    for setting in settings:
        kind, removed, _ = setting.split(", ")
        found = [medians[f"{setting}, {name}"] for name in BASES]
        rows.append([f"{kind}, {removed}", *[f"{each['in']:.3f}" for each in found]])
    seeds = min(median["seeds"] for median in medians.values())
    steps = settings[0].rpartition(", ")[2]
    note = (
        f"Nats per token on held-out TinyStories, medians of {_plural(seeds, 'seed')}: {steps} of "
        f"{result['tokens_a_step']:,} tokens, learning rate {result['learning_rate']}, the defaults but for replay."
    )
    return _table(["stories260K, embeddings", *BASES.values()], rows) + "\n\n" + _wrap(note)


def schedule(result: dict[str, Any]) -> str:
    """Held-out losses by when units go."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, median in result["medians"].items():
        removed, steps, when = name.split(", ", 2)
        found.setdefault(when, {})[f"{removed}, {steps}"] = median
    order = list(dict.fromkeys(entry["schedule"] for entry in result["runs"]))
    columns = sorted({column for row in found.values() for column in row})
    rows = [
        [when, *[f"{found[when][column]['loss']:.3f}" if column in found[when] else "-" for column in columns]]
        for when in order
    ]
    seeds = _seeds({median["seeds"] for median in result["medians"].values()})
    note = (
        f"Nats per token on held-out TinyStories, {seeds}: steps of {result['tokens_a_step']:,} tokens, learning rate "
        f"{result['learning_rate']}, a cosine, without replay."
    )
    return _table(["stories260K, units go", *columns], rows) + "\n\n" + _wrap(note)


def compaction(result: dict[str, Any]) -> str:
    """Seconds and losses of runs whose model stays whole, and of those whose model becomes the smaller one."""
    rows, dense = [], result["medians"].get("dense")  # which older results don't have
    widths = {run["width"]: None for run in result["runs"] if "width" in run}
    for width in sorted(widths):
        kept = "sizes as measured" if width == 0 else f"{width} channels of the hidden state stay"
        name = "width measured" if width == 0 else f"width {width}"
        masked, small = (result["medians"][f"{name}, {arm}"] for arm in ("masked", "compacted"))
        for arm, found in (("with masks", masked), ("cut when pruning ends", small)):
            shares = [found[part] / masked[part] for part in ("recovery", "seconds")]
            shares += [found["seconds"] / dense["seconds"]] if dense else []
            rows.append([f"{kept}, {arm}", *[f"{share:.2f}" for share in shares], f"{found['loss']:.3f}"])
    seeds = len({run["seed"] for run in result["runs"]})
    beside = f", or of plain fine-tuning of the whole model (loss {dense['loss']:.3f})" if dense else ""
    note = (
        f"Seconds as shares of those with masks{beside}, {result['steps']} steps in all, {result['ratio']:.0%} "
        f"removed, one thread of a CPU; held-out nats per token; medians of {_plural(seeds, 'seed')}."
    )
    model = result["runs"][0]["model"]
    columns = ["a step in recovery", "the whole run", *(["of plain fine-tuning"] if dense else []), "loss"]
    header = [QUALITY_MODELS.get(model, model), *columns]
    return _table(header, rows) + "\n\n" + _wrap(note)


def compaction_memory(result: dict[str, Any]) -> str:
    """What a training step holds at most, before the cut and after it."""
    by_arm = {run["arm"]: run for run in result["runs"]}
    masked, cut = by_arm["masked"], by_arm["compacted"]
    rows = [
        ["parameters in memory", f"{cut['parameters_before']:,}", f"{masked['parameters_after']:,}",
         f"{cut['parameters_after']:,}"],
        ["highest moment of a step (MB)", *[f"{size / 1e6:,.0f}" for size in
                                            (cut["before"], masked["after"], cut["after"])]],
        ["of that before pruning", "1.00", f"{masked['after'] / masked['before']:.2f}",
         f"{cut['after'] / cut['before']:.2f}"],
    ]  # fmt: skip
    counted = "" if result["device"] != "cpu" else ", its tensors counted"
    note = (
        f"Weights, gradients, AdamW's state and activations in float32, {result['tokens']:,} tokens a step, no "
        f"teacher, on {_device(result)}{counted}."
    )
    header = [QUALITY_MODELS.get(result["model"], result["model"]), "before pruning", "after it, with masks",
              "after the cut"]  # fmt: skip
    return _table(header, rows) + "\n\n" + _wrap(note)


def _device(result: dict[str, Any]) -> str:
    return "a CPU" if result["device"] == "cpu" else result["device"]


def export_scale(result: dict[str, Any]) -> str:
    """Seconds and memory of an export from a checkpoint's files, beside those of copying the file."""
    dense, found, copies = result["checkpoint"], result["export"], result["copy_seconds"]
    seconds, peak, size = found["seconds"], found["peak"], dense["bytes"]
    copying = sum(copies) / len(copies)
    rows = [
        ["written", f"{seconds['writing']:.0f} s"],
        ["verified", f"{seconds['verification']:.0f} s"],
        ["all, with the check of the class and the look for zeros", f"{seconds['all']:.0f} s"],
        ["the checkpoint copied, before and after", " and ".join(f"{copy:.0f} s" for copy in copies)],
        ["speed of writing over that of copying, mean", f"{copying / seconds['writing']:.0%}"],
        ["memory allocated at most", f"{peak['anonymous'] / 1e9:.2f} GB"],
        ["of it before the export, by the imports", f"{found['before']['anonymous'] / 1e9:.2f} GB"],
        ["resident at most, pages of the files included", f"{peak['high_water'] / 1e9:.2f} GB"],
    ]
    note = (
        f"A checkpoint of {size / 1e9:.1f} GB ({dense['parameters'] / 1e9:.1f}B random parameters in bf16, the largest "
        f"tensor {dense['largest_tensor'] / 1e9:.2f} GB) of which {found['bytes'] / 1e9:.1f} GB stay, on "
        f"{result['cores']} CPU cores with other work on them, once. Files are forced to the disk. Pages of files are "
        "the system's to take back."
    )
    return _table(["export", ""], rows) + "\n\n" + _wrap(note)


def ladder(result: dict[str, Any]) -> str:
    """Losses of models saved on the way and of the last one, beside runs of their own."""
    medians, rows = dict(result["medians"]), []
    alone = medians.pop("runs of their own")
    for name, shares in medians.items():
        recovery = float(name.removeprefix("recovery "))
        for share, found in shares.items():
            saved, all_steps = found["ladder"], alone[share]["of all steps"]
            losses = [part["loss"] for part in (saved, found.get("of as many steps", all_steps), all_steps)]
            rows.append([f"{recovery:.0%}", f"{float(share):.0%}", str(saved["steps"]), *[f"{x:.3f}" for x in losses]])
    seeds, steps = len({run["seed"] for run in result["runs"]}), max(run["steps"] for run in result["runs"])
    header = ["`ladder_recovery`", "removed", "saved after step", "from the ladder", "own run, as many steps",
              f"own run, {steps} steps"]  # fmt: skip
    note = (
        f"stories260K, {steps} steps of {result['tokens_a_step']:,} tokens, held-out nats per token; medians of "
        f"{_plural(seeds, 'seed')}."
    )
    return _table(header, rows) + "\n\n" + _wrap(note)


SPEEDS = {
    "parameters": "parameters",
    "budgeted": "reads, as budgeted",
    "forward": "reads",
    "first_token": "first token",
}


def speed(result: dict[str, Any]) -> str:
    """How many times as fast as the dense model smaller ones are, and how many times smaller."""
    dense, *small = result["models"].items()
    measured = dense[1]["ratios"]
    columns = {key: SPEEDS.get(key, key.replace("written", "writes")) for key in measured}
    rows = [[name, *[f"{found['ratios'][key]:.2f}" for key in columns]] for name, found in small]
    note = (
        f"Times as fast as the dense model of {dense[1]['parameters'] / 1e6:.0f} million parameters, and times "
        f"smaller: {result['model']} in {result['dtype']} on a {result['device'].upper()} with {result['threads']} "
        f"threads. It reads {result['budgeted']} tokens as budgeted, then {result['prompt']}; it writes "
        f"{result['new_tokens']} after {result['written_prompt']}. Medians of {result['repeats']} turns. Sizes of an "
        "even split: in the multiples that the library takes by itself, any size, and those of "
        '`budget_metric="latency"`, whose share is that of the time as budgeted.'
    )
    return _table(["", *columns.values()], rows) + "\n\n" + _wrap(note)


REPLAY_ARMS = {
    "dense": "not pruned",
    "none": "HESSO",
    "healing": "healing",
    "share 0.25": "a quarter replay",
    "healing, share 0.25": "both",
}
DOMAINS = {"unknown": "Shakespeare, which the base model doesn't know", "known": "stories, which it knows"}


def replay(result: dict[str, Any]) -> str:
    """Held-out losses on text like that trained on and on text that the base model knew, one table a domain."""
    tables = [_replay_table(domain, result) for domain in DOMAINS if domain in result["base"]]
    steps, tokens = result["runs"][0]["steps"], result["tokens_a_step"]
    note = (
        f"Nats per token: on text like that trained on / on other text that the base model knew. {steps} steps of "
        f"{tokens:,} tokens, replay among them, learning rate {result['learning_rate']}; medians over seeds."
    )
    return "\n\n".join([*tables, _wrap(note)])


def _replay_table(domain: str, result: dict[str, Any]) -> str:
    runs = [run for run in result["runs"] if run["domain"] == domain]
    ratios = sorted({run["ratio"] for run in runs if run["ratio"]})
    base = result["base"][domain]
    rows = [["the base model", *[f"{base['in']:.3f} / {base['out']:.3f}", *["" for _ in ratios]]]]
    for arm, name in REPLAY_ARMS.items():
        cells = [_replay_cell(runs, arm, ratio) for ratio in (0.0, *ratios)]
        if any(cells):
            rows.append([name, *cells])
    return _table([f"trained on {DOMAINS[domain]}", "dense", *[f"{ratio:.0%} removed" for ratio in ratios]], rows)


def _replay_cell(runs: list[dict[str, Any]], arm: str, ratio: float) -> str:
    found = [run for run in runs if (run["arm"], run["ratio"]) == (arm, ratio)]
    if not found:
        return ""
    losses = [statistics.median(run[side] for run in found) for side in ("in", "out")]
    return f"{losses[0]:.3f} / {losses[1]:.3f} ({_plural(len(found), 'seed')})"


QUALITY_METHODS = {
    "dense": "not pruned",
    "hesso": "HESSO",
    "hesso, without healing": "HESSO without healing",
    "hesso, even split": "HESSO, a like share of every structure",
    "hesso, without replay": "HESSO without replay",
    "hesso, without distillation": "HESSO without distillation",
    "hesso, distillation": "HESSO, distillation all the same",
    "hesso, half distillation": "HESSO, `distillation_alpha` 0.5",
    "hesso, the teacher alone": "HESSO, `distillation_alpha` 1",
    "hesso, temperature 2": "HESSO, `distillation_temperature` 2",
    "hesso, twice the replay": "HESSO, `replay_share` 0.25",
    "hesso, a slow cut": "HESSO, pruning for 0.3 of the run",
    "hesso, without reconstruction": "HESSO, by second-order Taylor",
    "hesso, widths by layer": "HESSO, layers of different widths",
    "hesso, without CRIC": "HESSO, without CRIC",
    "hesso, CRIC by gradients": "HESSO, CRIC by gradients (probe)",
    "hesso, alone": "HESSO, nothing beside",
    "hesso, all errors alike": "HESSO, all errors alike",
    "hesso, errors half alike": "HESSO, errors half alike",
    "hesso, a quarter of the examples": "HESSO, `healing_tokens` 2,048",
    "hesso, half the examples": "HESSO, `healing_tokens` 4,096",
    "hesso, twice the examples": "HESSO, `healing_tokens` 16,384",
    "hesso, four times the examples": "HESSO, `healing_tokens` 32,768",
    "hesso, healing": "HESSO, healing",
    "hesso, healing, replay": "HESSO, healing, a quarter replay",
    "hesso, principal basis": "HESSO, principal basis",
    "hesso, given basis": "HESSO, given basis",
    "one-shot, magnitude": "one-shot, magnitude",
    "one-shot, first-order Taylor": "one-shot, first-order Taylor",
    "Wanda-sp": "Wanda-sp",
    "FLAP": "FLAP",
    "OBS": "structured OBS",
    "ShortGPT": "ShortGPT (whole layers)",
    "scratch": "HESSO's shape from scratch",
}
QUALITY_MODELS = {"smollm2": "SmolLM2-135M-Instruct", "small": "Llama of 1.2M"}
QUALITY_TEXTS = {
    "docs": "on held-out Python documentation, which is what was trained on / on WikiText-2's test split",
    "stories": "on held-out TinyStories, which are what was trained on / on Shakespeare's plays",
}
KNOWS_BOTH = ("small",)  # models that know the other text of stories too


def quality(result: dict[str, Any]) -> str:
    """Losses of a real language model on text like that trained on and on WikiText-2, one table a setting."""
    settings = sorted({(run["model"], run["tokens"]) for run in result["runs"]})
    return "\n\n".join(_quality_table(result, *setting) for setting in settings)


def _quality_table(result: dict[str, Any], model: str, tokens: int) -> str:
    runs = [run for run in result["runs"] if (run["model"], run["tokens"]) == (model, tokens)]
    ratios = sorted({run["ratio"] for run in runs if run["ratio"]})
    base = result["base"][model]
    rows = [["the model as it comes", f"{base['in']:.3f} / {base['out']:.3f}", *["" for _ in ratios]]]
    counts = set()
    for method, name in QUALITY_METHODS.items():
        cells = []
        for ratio in (0.0, *ratios):
            found = [run for run in runs if (run["method"], run["ratio"]) == (method, ratio)]
            losses = [statistics.median(run[side] for run in found) for side in ("in", "out")] if found else []
            counts |= {len(found)} if found else set()
            cells.append(f"{losses[0]:.3f} / {losses[1]:.3f}" if losses else "")
        if any(cells):
            rows.append([name, *cells])
    header = [QUALITY_MODELS.get(model, model), "dense", *[f"{ratio:.0%} removed" for ratio in ratios]]
    setting = result["settings"][model]
    note = (
        f"Nats per token: {QUALITY_TEXTS[setting['text']]}. "
        f"{tokens:,} training tokens each, replay among them, learning rate {setting['learning_rate']}, "
        f"medians of {_seeds(counts)}, on the {result['device'].upper()}.{_processor_time(runs)}"
    )
    return "\n".join([_table(header, rows), "", _wrap(note)])


def _processor_time(runs: list[dict[str, Any]]) -> str:
    """Say what runs took from beginning to end, where it was noted."""
    minutes: dict[str, list[float]] = {}
    for run in runs:
        if "cpu_seconds" in run:
            minutes.setdefault(QUALITY_METHODS[run["method"]], []).append(run["cpu_seconds"] / 60)
    ends = {name: dict.fromkeys(map(_minutes, (min(all_), max(all_)))) for name, all_ in minutes.items()}
    found = [f"{name} {' to '.join(both)}" for name, both in ends.items()]
    told = "Minutes of one processor core, all in all, not all on the same machine"
    return f" {told}: {', '.join(found)}." if len(found) > 1 else ""


def _minutes(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _seeds(counts: set[int]) -> str:
    *fewer, most = sorted(counts)
    return "".join(f"{count} or " for count in fewer) + _plural(most, "seed")


def zero_shot(result: dict[str, Any]) -> str:
    """Accuracies of the seven zero-shot tasks, a row for each model."""
    runs = sorted(result["runs"], key=lambda run: (run["ratio"], -run["mean"]))
    names = list(runs[0]["tasks"])
    rows = []
    for run in runs:
        method = "the model as it comes" if run["method"] == "base" else QUALITY_METHODS[run["method"]]
        name = method + f", {run['ratio']:.0%} removed" * bool(run["ratio"])
        mean = f"{run['mean']:.1%} ± {run['error']:.1%}"
        others = statistics.mean(value for task, value in run["tasks"].items() if task != "boolq")
        rows.append([name, mean, f"{others:.1%}", *[f"{run['tasks'][task]:.1%}" for task in names]])
    model = runs[0]["model"]
    tokens = {run["tokens"] for run in runs if run["tokens"]}
    note = (
        f"Accuracy, {result['limit']} examples of each task, the mean with its standard error; guessing gets "
        f"{result['chance']:.1%}. {', '.join(f'{count:,}' for count in sorted(tokens))} training tokens, one seed."
    )
    header = [QUALITY_MODELS.get(model, model), "mean", "but boolq", *[task.replace("_", "-") for task in names]]
    return _table(header, rows) + "\n\n" + _wrap(note)


def quantised(result: dict[str, Any]) -> str:
    """Losses, and how far they rise as a model is quantised."""
    rows, kinds = [], next(iter(result["models"].values()))["rise"]
    for name, found in result["models"].items():
        parts = name.split("-")  # of a folder of quality.py: model, method, share, tokens, seed
        label = name if len(parts) < 5 else f"{QUALITY_METHODS[parts[1]]}, {float(parts[2]):.0%} removed"
        rises = [
            f"{found['rise'][kind]['in']:+.3f} / {found['rise'][kind]['out']:+.3f}" if kind in found["rise"] else "-"
            for kind in kinds
        ]
        rows.append([label, f"{found['in']:.3f} / {found['out']:.3f}", *rises])
    note = (
        f"Nats per token {QUALITY_TEXTS[result['text']]} ({result['blocks']} and {result['windows']} examples), and "
        "the rise with torchao's quantisation of all linear layers but the output matrix, on the "
        f"{result['device'].upper()}."
    )
    return _table([QUALITY_MODELS.get(result["model"], result["model"]), "fp32", *kinds], rows) + "\n\n" + _wrap(note)


PEER_METHODS = (
    "dense", "hesso", "OBS", "FLAP", "Wanda-sp", "one-shot, magnitude", "ShortGPT", "scratch",
)  # fmt: skip


def peers(result: dict[str, Any]) -> str:
    """Losses of HESSO and its peers, a column for each model and ratio; on other text where the model knows it."""
    runs = result["runs"]
    found = {(run["model"], run["tokens"], run["ratio"]) for run in runs if run["method"] in PEER_METHODS[2:]}
    columns = sorted(found & {(run["model"], run["tokens"], run["ratio"]) for run in runs if run["method"] == "hesso"})
    columns = [max(alike, key=lambda column: column[1]) for alike in _by_model_and_ratio(columns)]
    columns.sort(key=lambda column: -result["base"][column[0]].get("parameters", 0))  # the largest model first
    cells = {(method, column): _peer_losses(result, method, *column) for method in PEER_METHODS for column in columns}
    best = {column: _lowest([cells[method, column] for method in PEER_METHODS[1:]]) for column in columns}
    rows = []
    for method in PEER_METHODS:
        shown = [_marked(cells[method, column], best[column] if method != "dense" else {}) or "-" for column in columns]
        rows.append([QUALITY_METHODS[method], *shown])
    lengths = {model: sorted({tokens for one, tokens, _ in columns if one == model}) for model, _, _ in columns}
    header = [
        f"{QUALITY_MODELS.get(model, model)}, {ratio:.0%} removed" + f", {tokens:,} tokens" * (len(lengths[model]) > 1)
        for model, tokens, ratio in columns
    ]
    notes = []
    for model in dict.fromkeys(model for model, _, _ in columns):
        keys = ("method", "ratio", "tokens")
        alike = [run for run in runs if run["model"] == model and run["method"] in PEER_METHODS]
        made = [tuple(run[key] for key in keys) for run in alike if run["tokens"] in lengths[model]]
        counts = {made.count(one) for one in made}
        before = " / ".join(f"{result['base'][model][side]:.3f}" for side in _sides(result, model))
        notes.append(
            f"{QUALITY_MODELS.get(model, model)}: {_peer_text(result, model)}, "
            f"{' or '.join(f'{tokens:,}' for tokens in lengths[model])} training tokens each, {_seeds(counts)}, before "
            f"training {before}"
        )
    note = f"Nats per token, medians over seeds. {'; '.join(notes)}."
    return "\n".join([_table(["", *header], rows), "", _wrap(note)])


PEER_TEXTS = {
    "docs": "held-out documentation, which is what was trained on / WikiText-2",
    "stories": "held-out stories, which are what was trained on",
}


def _by_model_and_ratio(columns: list[tuple[str, int, float]]) -> Iterator[list[tuple[str, int, float]]]:
    for key in sorted({(model, ratio) for model, _, ratio in columns}):
        yield [column for column in columns if (column[0], column[2]) == key]


def _peer_text(result: dict[str, Any], model: str) -> str:
    other = " / Shakespeare's plays, which it knew" if model in KNOWS_BOTH else ""
    return PEER_TEXTS[result["settings"][model]["text"]] + other


def _sides(result: dict[str, Any], model: str) -> tuple[str, ...]:
    """Return on which texts a model is compared: the other one only where it knew that."""
    return ("in", "out") if result["settings"][model]["text"] == "docs" or model in KNOWS_BOTH else ("in",)


def _peer_losses(result: dict[str, Any], method: str, model: str, tokens: int, ratio: float) -> dict[str, float]:
    """Return the median losses, {} without runs; the dense model has no ratio."""
    setting = (model, method, 0.0 if method == "dense" else ratio, tokens)
    found = [run for run in result["runs"] if (run["model"], run["method"], run["ratio"], run["tokens"]) == setting]
    sides = _sides(result, model) if found else ()
    return {side: round(statistics.median(run[side] for run in found), 3) for side in sides}


def _lowest(losses: list[dict[str, float]]) -> dict[str, float]:
    """Return the lowest loss on each text."""
    return {side: min(entry[side] for entry in losses if entry) for entry in losses for side in entry}


def _marked(losses: dict[str, float], best: dict[str, float]) -> str:
    """Write losses, the lowest ones bold."""
    return " / ".join(f"**{loss:.3f}**" if loss == best.get(side) else f"{loss:.3f}" for side, loss in losses.items())


def known(result: dict[str, Any]) -> str:
    """By how much the loss of models on texts lies above what they expect."""
    rows = []
    for run in result["runs"]:
        other = "documentation", "WikiText-2"
        if run["text"] == "stories":
            other = "stories", "Shakespeare's plays"
        for text, parts in ((f"{other[0]}, trained on", "train"), (f"{other[0]}, held out", "in"), (other[1], "out")):
            found = run[parts]
            rows.append([
                QUALITY_MODELS.get(run["model"], run["model"]), text, f"{found['loss']:.2f}",
                f"{found['surprise']:+.2f}", "yes" if found["surprise"] <= result["known"] else "no",
            ])  # fmt: skip
    note = f"Nats per token, on {result['tokens']:,} tokens each; at most {result['known']} above counts as known."
    return _table(["model", "text", "loss", "above what it expects", "known"], rows) + "\n\n" + _wrap(note)


# name of the table: JSON file, command that makes it, what renders it
TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "peers": ("quality.json", "make bench", peers),
    "quickstart": (
        "quickstart.json",
        "make quickstart && cp quickstart/results.json benchmarks/results/quickstart.json",
        quickstart,
    ),
    "overhead": ("overhead.json", "python benchmarks/overhead.py", overhead),
    "memory": ("memory.json", "python benchmarks/memory.py", memory),
    "plans": ("plans.json", "python benchmarks/plans.py", plans),
    "collapse": ("collapse.json", "python benchmarks/collapse.py", collapse),
    "sharding": ("sharding.json", "python benchmarks/sharding.py", sharding),
    "distillation": ("distillation.json", "python benchmarks/distillation.py", distillation),
    "quality": ("quality.json", "python benchmarks/quality.py", quality),
    "zero_shot": ("zero_shot.json", "python benchmarks/zero_shot.py", zero_shot),
    "quantised": ("quantised.json", "python benchmarks/quantised.py", quantised),
    "known": ("known.json", "python benchmarks/known.py", known),
    "replay": ("replay.json", "python benchmarks/replay.py", replay),
    "basis": ("basis.json", "python benchmarks/basis.py", basis),
    "compaction": ("compaction.json", "python benchmarks/compaction.py", compaction),
    "compaction_small": (
        "compaction_small.json",
        "python benchmarks/compaction.py --model small --widths 0 --seeds 0 1 "
        "--output benchmarks/results/compaction_small.json",
        compaction,
    ),
    "compaction_memory": ("compaction_memory.json", "python benchmarks/compaction_memory.py", compaction_memory),
    "export_scale": ("export_scale.json", "python benchmarks/export_scale.py", export_scale),
    "speed": ("speed.json", "python benchmarks/speed.py", speed),
    "ladder": ("ladder.json", "python benchmarks/ladder.py", ladder),
    "schedule": ("schedule.json", "python benchmarks/schedule.py", schedule),
    "architectures": ("../../docs/architectures.json", "make survey", architectures),
    "bundled": ("pretrain_bundled.json", "python benchmarks/pretrain_bundled.py", bundled),
}


def render_table(name: str, results: Path = RESULTS) -> str:
    """Render one table, or the line that says how to make it."""
    file, command, renderer = TABLES[name]
    path = results / file
    if not path.exists():
        return f"Not measured yet: `{command}` makes these numbers.\n"
    result = json.loads(path.read_text(encoding="utf-8"))
    return "\n".join(_wrap(line) for line in renderer(result).split("\n")) + "\n"


def render(text: str, results: Path = RESULTS) -> str:
    """Replace every table of a document.

    Raises:
        ValueError: for a marker without its pair, or of an unknown table.
    """
    found = [match.group(2) for match in _TABLE.finditer(text)]
    markers = _MARKER.findall(text)
    if sorted(markers) != sorted(2 * found):
        raise ValueError(f"markers {markers} aren't pairs of `<!-- begin:NAME -->` and `<!-- end:NAME -->`")
    for name in found:
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; known: {sorted(TABLES)}")
    return _TABLE.sub(lambda match: match.group(1) + render_table(match.group(2), results) + match.group(4), text)


def documents() -> list[Path]:
    """List the files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(argv: list[str] | None = None) -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a table is out of date")
    options = parser.parse_args(argv)
    stale = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        rendered = render(text)
        if rendered == text:
            continue
        stale.append(path.relative_to(ROOT))
        if not options.check:
            path.write_text(rendered, encoding="utf-8")
            print(f"{stale[-1]} written")
    if options.check and stale:
        names = ", ".join(str(path) for path in stale)
        print(f"{names}: tables are out of date; run python benchmarks/render_readme.py", file=sys.stderr)
        return 1
    return 0


def _wrap(line: str) -> str:
    return line if line.startswith("|") else textwrap.fill(line, 120, break_on_hyphens=False)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _list(values: list[int]) -> str:
    return " or ".join(f"{value:,}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
