"""Recipes: a YAML file and command-line flags become the dataclasses of a run; flags override the file.

model: org/name
dataset: org/data
training: {learning_rate: 1.0e-4, max_steps: 2000, ...}     # TrainingArguments
hesso: {pruning_ratio: 0.5, ...}                            # HessoConfig; --warmup_steps is training's own
peft: {r: 16, target_modules: all-linear}                   # LoraConfig; without it all weights are trained
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml

from ..config import HessoConfig
from ..config.names import DTYPE_NAMES
from ..errors import HessoError, nearest_name
from .data import check_text_file, model_source
from .examples import TEXT_COLUMN

if TYPE_CHECKING:
    from transformers import HfArgumentParser, TrainingArguments

SLIP = 0.9  # as alike as a key is to the one that was meant, where only a letter is wrong

PREFIX = "hesso_"


def _flag(default: Any, text: str) -> Any:
    """Return a field that is a flag with a text in the help."""
    return field(default=default, metadata={"help": text})


@dataclass
class RunArguments:
    """Which model is pruned on which text, and where the smaller one goes."""

    model: str | None = _flag(None, "Folder or Hub id of the model to prune; bundled is the one that ships here.")
    dataset: str | None = _flag(None, "python-docs (embedded), a .jsonl/.txt/.csv/.parquet file, or a Hub id.")
    dataset_config: str | None = _flag(None, "Configuration name of a Hub data set.")
    dataset_split: str = _flag("train", "Split to train on.")
    eval_dataset: str | None = _flag(None, "Held-out data; by default a part of dataset.")
    eval_split: str | None = _flag(None, "Split of dataset to evaluate on.")
    retained_dataset: str | None = _flag(
        None, "Other text, which the base model knew: what is left of that is measured on it."
    )
    eval_ratio: float = _flag(0.05, "Share of dataset held out where no split is named.")
    text_column: str = _flag(
        TEXT_COLUMN, "Column of text or messages; without a column text, messages or prompt and completion are read."
    )
    packing: bool | None = _flag(
        None, "Several rows in one example; by default text is joined and cut into blocks, other rows stay apart."
    )
    completion_only_loss: bool | None = _flag(None, "Learn completions, not prompts; by default where there are such.")
    assistant_only_loss: bool | None = _flag(
        None, "Learn what the assistant says; by default where the chat template marks it by {%% generation %%}."
    )
    chat_template: str | None = _flag(None, "File with a chat template (Jinja), which the smaller model gets too.")
    max_examples: int | None = _flag(
        None, "Use only the first so many rows; by default, of what isn't a file, as many as max_steps take."
    )
    max_eval_examples: int = _flag(1000, "Evaluate on so many held-out examples at most.")
    eval_tasks: str | None = _flag(
        None, "Tasks of lm-eval to score at each evaluation, with commas between them (see eval_strategy)."
    )
    eval_tasks_limit: int | None = _flag(None, "Use so many examples of each task at most.")
    block_size: int | None = _flag(
        None, "Tokens in one training example; by default 1024, or the model's context where that is shorter."
    )
    dtype: str = _flag("float32", "dtype of the trained weights; fp32 masters with bf16: true by default.")
    output: str | None = _flag(None, "Folder for the smaller model (default: `small` in training's output_dir).")
    trust_remote_code: bool = _flag(False, "Run model code that comes with the model.")
    dry_run: bool = _flag(False, "Take a few steps, print what the run would do and take, and save no model.")
    peft: dict | str | None = field(
        default=None, metadata={"help": "LoraConfig's fields (JSON): train an adapter; by default all weights."}
    )

    def __post_init__(self) -> None:
        if self.model is not None:
            self.model = model_source(self.model)
        for dataset in (self.dataset, self.eval_dataset, self.retained_dataset):
            if dataset is not None:
                check_text_file(dataset)
        if self.dtype not in DTYPE_NAMES:
            raise HessoError(f"`dtype` ({self.dtype!r}) must be float32, bfloat16 or float16")
        if self.block_size is not None and self.block_size < 2:
            raise HessoError(f"`block_size` ({self.block_size}) must be at least 2 tokens")
        for name in ("max_examples", "max_eval_examples", "eval_tasks_limit"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise HessoError(f"`{name}` ({limit}) must be at least 1; leave it out to use all or its default")
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise HessoError(f"`chat_template` ({self.chat_template!r}): no such file; name one with a Jinja template")
        if self.eval_tasks_limit is not None and self.eval_tasks is None:
            raise HessoError(f"`eval_tasks_limit` ({self.eval_tasks_limit}) does nothing without `eval_tasks`")
        if not 0.0 < self.eval_ratio < 1.0:
            raise HessoError(f"`eval_ratio` ({self.eval_ratio}) must lie strictly between 0 and 1")
        self.adapter()

    def adapter(self) -> Any:
        """Return the adapter's `LoraConfig`, None where all weights are trained.

        Raises:
            HessoError: for what isn't a mapping of its fields, and where peft isn't installed.
        """
        if self.peft is None:
            return None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise HessoError(f"`peft` ({self.peft!r}) needs peft: pip install peft") from error
        try:
            values = json.loads(self.peft) if isinstance(self.peft, str) else self.peft
        except json.JSONDecodeError as error:
            raise HessoError(f"`peft` ({self.peft!r}) is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise HessoError(f"`peft` ({self.peft!r}) must be a mapping of LoraConfig's fields")
        _check_keys(values, LoraConfig, "`peft`")
        try:
            return LoraConfig(**{"task_type": "CAUSAL_LM", **values})
        except (TypeError, ValueError) as error:
            raise HessoError(f"`peft` ({self.peft!r}): {error}") from error


@dataclass(frozen=True)
class Recipe:
    """A parsed run.

    Attributes:
        given: what the file and the flags say, as a file would have it.
        words: of the command line: the file, the flags.
    """

    run: RunArguments
    training: TrainingArguments
    hesso: HessoConfig
    given: dict[str, Any]
    words: tuple[str, ...]


def parse_recipe(path: str | None, flags: Sequence[str] = ()) -> Recipe:
    """Read a recipe and override it by flags (`--learning_rate 1e-4 --pruning_ratio 0.3`).

    Raises:
        HessoError: for a missing file, model or data set, and for an unknown key or flag, naming the nearest known.
    """
    values = _flatten(_read(path)) if path else {}
    parser = recipe_parser()
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**values)
    try:
        given = [_own_flag(flag, known) for flag in flags]
        parsed = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    except HessoError:
        raise
    except ValueError as error:  # TrainingArguments' own checks
        raise HessoError(f"`training`: {error}") from error
    run, training, prefixed, rest = parsed
    for flag in rest:
        name = flag.removeprefix("--").partition("=")[0]
        names = sorted(known | set(HessoConfig.__dataclass_fields__))
        raise HessoError(f"unknown flag {flag!r}{nearest_name(name, names)}; see `hesso-hf prune --help-all`")
    for name in ("model", "dataset"):
        if getattr(run, name) is None:
            raise HessoError(f"`{name}` is missing: name it in the recipe or give `--{name}`")
    if training.output_dir == "trainer_output":  # what TrainingArguments calls it where nothing was said
        training.output_dir = str(Path("runs") / f"{Path(run.model).name}-pruned")
    if str(training.resume_from_checkpoint).lower() in ("true", "false"):  # "true": the last one in output_dir
        training.resume_from_checkpoint = str(training.resume_from_checkpoint).lower() == "true"
    _check_trackers(training.report_to)
    hesso = HessoConfig(**{name.removeprefix(PREFIX): value for name, value in vars(prefixed).items()})
    asked = {flag.removeprefix("--").partition("=")[0].replace("-", "_") for flag in given if flag.startswith("--")}
    nested = _nested(vars(parser.parse_known_args(given)[0]), {*values, *asked})
    return Recipe(run, training, hesso, nested, (*([path] if path else []), *flags))


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Transformers doesn't know, or whose package isn't there."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = sorted(INTEGRATION_TO_CALLBACK)
    for name in sorted(set(names) - {"none", *get_available_reporting_integrations()}):
        if name not in known:
            raise HessoError(
                f"`report_to` ({name!r}) is no tracker{nearest_name(name, known)}; say 'none', or one of "
                f"{', '.join(known)}"
            )
        raise HessoError(f"`report_to` ({name!r}): the package isn't installed; install it or say 'none'")


def _nested(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Return the named ones of flat values, each in the section of a recipe that it belongs to."""
    run = RunArguments.__dataclass_fields__
    sections: dict[str, dict[str, Any]] = {"": {}, "training": {}, "hesso": {}}
    for name, value in values.items():
        if name in names:
            section = "" if name in run else "hesso" if name.startswith(PREFIX) else "training"
            sections[section][name.removeprefix(PREFIX)] = value.value if isinstance(value, Enum) else value
    return sections.pop("") | {section: found for section, found in sections.items() if found}


def _own_flag(flag: str, known: set[str]) -> str:
    """Give a flag that only HessoConfig has its prefix; `--warmup_steps` is TrainingArguments' own."""
    name, equals, value = flag.removeprefix("--").partition("=")
    name = name.replace("-", "_")
    own = flag.startswith("--") and name not in known and PREFIX + name in known
    return f"--{PREFIX}{name}{equals}{value}" if own else flag


def recipe_parser() -> HfArgumentParser:
    """Return the parser of `hesso-hf prune`'s flags."""
    from transformers import HfArgumentParser, TrainingArguments

    classes: Any = [RunArguments, TrainingArguments, _prefixed_config()]
    usage = "hesso-hf prune [RECIPE] [--flag value ...]"  # a mistake is answered with it, not with hundreds of flags
    return HfArgumentParser(classes, prog="hesso-hf prune", usage=usage, add_help=False, allow_abbrev=False)


def _prefixed_config() -> type:
    """HessoConfig's fields as flags with a prefix: `warmup_steps` is TrainingArguments' own."""
    hints = get_type_hints(HessoConfig)
    fields = [
        (PREFIX + item.name, hints[item.name], field(default=item.default, metadata=dict(item.metadata)))
        for item in dataclasses.fields(HessoConfig)
    ]
    return dataclasses.make_dataclass("HessoFlags", fields)


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise HessoError(f"`recipe` ({path!r}): no such file")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise HessoError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise HessoError(f"{path} must be a mapping with the keys model, dataset, training and hesso")
    return values


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check keys section by section and give HessoConfig's the prefix."""
    _check_keys(values, RunArguments, "the recipe", "training", "hesso")
    run = {key: value for key, value in values.items() if key not in ("training", "hesso")}
    training, hesso = values.get("training") or {}, values.get("hesso") or {}
    _check_keys(hesso, HessoConfig, "`hesso`")
    from transformers import TrainingArguments

    _check_keys(training, TrainingArguments, "`training`")
    return run | dict(training) | {PREFIX + key: value for key, value in hesso.items()}


def _check_keys(values: Mapping[str, Any], owner: type, where: str, *sections: str) -> None:
    """Refuse keys that are neither fields of a dataclass nor sections."""
    known = [*(item.name for item in dataclasses.fields(owner)), *sections]
    for key in values:
        if key not in known:
            slip = difflib.get_close_matches(str(key), known, 1, SLIP)  # needs no look at what takes seconds to import
            place = "" if slip else _place_of(key)
            raise HessoError(f"unknown key `{key}` in {where}{place or nearest_name(str(key), known)}")


def _place_of(key: str) -> str:
    """Say where a key belongs that stands elsewhere, "" where it belongs nowhere."""
    from transformers import TrainingArguments

    places: dict[str, Any] = {
        "under `hesso:`": HessoConfig,
        "under `training:`": TrainingArguments,
        "beside `model:`": RunArguments,
    }
    found = (place for place, owner in places.items() if key in owner.__dataclass_fields__)
    return f"; it belongs {place}" if (place := next(found, None)) else ""
