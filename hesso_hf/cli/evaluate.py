"""Measuring models: held-out loss, lm-eval tasks, speed and size on disk."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import CONFIG_NAME, cached_file

from ..budget.cost import build_cost
from ..distributed.passes import in_eval
from ..errors import HessoError, first_line
from ..hf_models.build import check_next_tokens, load_config
from ..hf_models.loading import load_model
from ..structures.groups import PruningGroups
from ..structures.shape_probe import AxisMap, describe_parameters
from .allocations import Allocations
from .data import block_size_within, held_out_split, read_data, read_tokenizer
from .examples import IGNORED, Reading, padded_to_longest
from .joined import WIKITEXT2, joined_windows
from .speed import first_token_seconds, tokens_per_second, tokens_written_per_second
from .tasks import Tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_SIZE, WINDOW = 256, 2048  # tokens, where nothing is said and every context has as many; of joined text


def measure_models(flags: Namespace, done: dict[str, dict[str, Any]]) -> None:
    """Load every model before any is measured, so that what one lacks is told at once.

    They are measured in turns; where they don't fit on the device together, one after the other.

    Args:
        flags: those of `hesso-hf eval`; `models` has the sources by the names that they were given.
        done: gets for each model what was measured, and how: `bytes` is None without safetensors, `flops_per_token`
            where they can't be told; how fast it writes, where tokens are to be written; `peak_memory` (bytes) there;
            `loss` (nats per token), `perplexity` and `tokens` where there is a data set; `tasks` where there are tasks.
            The last one has only a part of it where something fails.

    Raises:
        HessoError: naming the model or the flag.
    """
    device, trust = device_of(flags.device), flags.trust_remote_code
    tasks = None
    if flags.tasks is not None:
        how = {name: getattr(flags, name) for name in ("num_fewshot", "limit", "batch_size", "include_path")}
        tasks = Tasks(flags.tasks, "--tasks", **how)
    configs = {name: load_config(source, trust) for name, source in flags.models.items()}
    if flags.dataset is not None or tasks is not None:
        for name, config in configs.items():
            check_next_tokens(config, name, "leave `--dataset` and `--tasks` out, which are measured by these")
    named = {f"`model` ({name!r})": config for name, config in configs.items()}
    joined = flags.joined or flags.dataset == WIKITEXT2
    block_size = block_size_within(flags.block_size, WINDOW if joined else BLOCK_SIZE, named)
    if joined and block_size != WINDOW:
        print(f"hesso-hf: windows of {block_size:,} tokens: perplexities of {WINDOW:,} don't compare", file=sys.stderr)
    reads = flags.models.items() if flags.dataset is not None or tasks is not None else ()
    tokenizers = {name: read_tokenizer(source, flags.chat_template, trust) for name, source in reads}
    blocks = None
    if flags.dataset is not None:
        _say(flags, f"reading {flags.dataset}{' as one text' * joined}")
        blocks = _common_blocks(flags, tokenizers, block_size, joined)
    if tasks is not None:
        _say(flags, f"fetching tasks {flags.tasks}")
        tasks.fetch()
    dtype = getattr(torch, flags.dtype) if flags.dtype else _stored_dtype(configs)
    _say(flags, f"loading {', '.join(flags.models)}")
    models = {name: _load(name, source, dtype, trust) for name, source in flags.models.items()}
    what = _Measured(flags, block_size, joined, blocks, tasks, tokenizers, done)
    try:
        return what.measure(models, device)
    except torch.OutOfMemoryError:
        if len(models) == 1:
            raise
    for model in models.values():
        model.to("cpu")
    torch.cuda.empty_cache()
    later = "" if flags.no_speed else ", at another moment than the others: compare their speeds with care"
    print(f"hesso-hf: the models don't fit on {device} together: each is measured alone{later}", file=sys.stderr)
    for name, model in models.items():
        what.measure({name: model}, device)


@dataclass(frozen=True)
class _Measured:
    """What is measured of each model.

    Attributes:
        blocks: examples that all models read as the same tokens, or None.
        tokenizers: by the model's name, where there are tasks.
        done: gets what was measured, by the model's name.
    """

    flags: Namespace
    block_size: int
    joined: bool
    blocks: Any
    tasks: Tasks | None
    tokenizers: Mapping[str, Any]
    done: dict[str, dict[str, Any]]

    def measure(self, models: Mapping[str, Any], device: torch.device) -> None:
        """Move models to the device, where they are measured in turns; where there are no others they leave it."""
        flags = self.flags
        for model in models.values():
            model.to(device)
        speeds = {name: {} for name in models} if flags.no_speed else _speeds(models, flags, self.block_size)
        for name, model in models.items():
            self.done.setdefault(name, {}).update(self._facts(name, model), **speeds[name])
        for name, model in models.items():
            self._measure(name, model, self.done[name])
        if len(models) < len(flags.models):
            for model in models.values():
                model.to("cpu")

    def _facts(self, name: str, model: Any) -> dict[str, Any]:
        return {
            "model": name, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch."),
            "batch_size": self.flags.batch_size, "block_size": self.block_size, "parameters": model.num_parameters(),
            "bytes": _bytes_on_disk(self.flags.models[name]), "memory": model.get_memory_footprint(),
            "flops_per_token": flops_per_token(model),
        }  # fmt: skip

    def _measure(self, name: str, model: Any, row: dict[str, Any]) -> None:
        flags, blocks, number = self.flags, self.blocks, list(self.flags.models).index(name) + 1
        of = f"model {number} of {len(flags.models)}, {name}: "
        if model.device.type == "cuda" or not flags.no_speed:
            _say(flags, f"{of}peak memory")
            row["peak_memory"] = peak_memory(model, flags.batch_size, self.block_size, flags.new_tokens)
        if blocks is not None:
            _say(flags, f"{of}loss on {len(blocks):,} examples")
            loss = held_out_loss(model, blocks, flags.batch_size)
            row |= {"loss": loss, "perplexity": perplexity(loss), "tokens": num_predicted(blocks)}
            row["joined"] = self.joined
        if self.tasks is not None:
            _say(flags, f"{of}tasks {flags.tasks}")
            row["tasks"] = self.tasks.scores(model, self.tokenizers[name])


@contextmanager
def room_for_a_batch() -> Iterator[None]:
    """Say what to do where a model and a batch don't fit on the device.

    Raises:
        HessoError: with the flags that help.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise HessoError(
            f"a model and a batch don't fit on the device ({first_line(error)}): give a lower `--batch-size`, a "
            "narrower `--dtype`, or `--device cpu`"
        ) from error


def _say(flags: Namespace, stage: str) -> None:
    """Say on stderr what is done now, for whoever waits: of large models each stage takes minutes."""
    if not flags.json:
        print(f"hesso-hf: {stage}", file=sys.stderr, flush=True)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: Any, batch_size: int = 8) -> float:
    """Return the mean negative log-likelihood in nats a predicted token.

    Args:
        blocks: `input_ids`, of any lengths, and `labels`, which are the same where there are none.
    """
    total, ids, labels = 0.0, blocks["input_ids"], _labels(blocks)
    with in_eval(model):
        for start in range(0, len(ids), batch_size):
            rows, wanted = (columns[start : start + batch_size] for columns in (ids, labels))
            inputs = {"input_ids": padded_to_longest(rows, 0).to(model.device)}
            if len({len(row) for row in rows}) > 1:
                inputs["attention_mask"] = padded_to_longest([[1] * len(row) for row in rows], 0).to(model.device)
            targets = padded_to_longest(wanted, IGNORED).to(model.device)[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            total += float(losses)
    return total / num_predicted(blocks)


def num_predicted(blocks: Any) -> int:
    """Return how many tokens give a loss."""
    return sum(label != IGNORED for row in _labels(blocks) for label in row[1:])


def _labels(blocks: Any) -> Any:
    return blocks["labels" if "labels" in blocks.column_names else "input_ids"]


def perplexity(loss: float) -> float:
    """Return exp(loss)."""
    return math.exp(loss)


def flops_per_token(model: PreTrainedModel) -> float | None:
    """Return the operations of a forward pass for one token, CONTEXT before it; None for a config without sizes."""
    whole = AxisMap(describe_parameters(model), {}, {})
    try:
        return build_cost("flops", PruningGroups({}), whole, model.config).full
    except HessoError:
        return None


def peak_memory(model: PreTrainedModel, batch_size: int, length: int, new_tokens: int) -> int:
    """Return the most bytes that a model needs, its weights and what it works with, whatever else lies in memory.

    It reads a batch of blocks and, where it can, writes to a batch of prompts. A GPU's allocator says what that took;
    elsewhere the tensors are counted, without what single operations take within.
    """
    written = min(new_tokens, length - 2) if model.can_generate() else 0

    def work() -> None:
        tokens_per_second([model], batch_size, length, 1)
        if written > 0:
            tokens_written_per_second([model], batch_size, length - 1 - written, written, 1)

    if model.device.type != "cuda":
        with Allocations() as made:
            work()
        return int(model.get_memory_footprint() + made.peak)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    work()
    return model.get_memory_footprint() + torch.cuda.max_memory_allocated(model.device) - before


def _speeds(models: Mapping[str, Any], flags: Namespace, length: int) -> dict[str, dict[str, float | None]]:
    """Return how fast each model reads blocks and writes, alone and in batches; None where it writes nothing.

    A prompt and what is written after it are as long as a block.
    """
    _say(flags, f"speed of reading, {'the models in turn, ' * (len(models) > 1)}alone and {flags.batch_size} at once")
    alone, together = (tokens_per_second(list(models.values()), size, length) for size in (1, flags.batch_size))
    found: dict[str, dict[str, float | None]] = {
        name: {"tokens_per_second_alone": one, "tokens_per_second": many}
        for name, one, many in zip(models, alone, together, strict=True)
    }
    new_tokens = min(flags.new_tokens, length - 2)
    if new_tokens < flags.new_tokens:
        short = (
            f"{new_tokens} tokens are written, not {flags.new_tokens}: with the prompt they fill a block of {length}"
        )
        print(f"hesso-hf: {short}", file=sys.stderr)
    if new_tokens < 1:
        return found
    writers = {name: model for name, model in models.items() if model.can_generate()}
    _say(flags, f"speed of writing {new_tokens} tokens, the same way")
    all_of, prompt = list(writers.values()), length - 1 - new_tokens
    first = first_token_seconds(all_of, prompt)
    alone, together = (
        tokens_written_per_second(all_of, batch_size, prompt, new_tokens) for batch_size in (1, flags.batch_size)
    )
    written = dict(zip(writers, zip(first, alone, together, strict=True), strict=True))
    keys = ("first_token_seconds", "tokens_written_per_second", "tokens_written_per_second_in_batches")
    for name, row in found.items():
        row |= dict(zip(keys, written.get(name, (None, None, None)), strict=True))
    return found


def weights_bytes(folder: str | Path) -> int:
    """Return the size of a folder's safetensors files (bytes)."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def device_of(name: str | None) -> torch.device:
    """Return the device to measure on.

    Raises:
        HessoError: where there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # no such name, no such number, or torch without CUDA
        raise HessoError(
            f"`--device` ({name!r}) can't be used: {first_line(error)}; leave it out to have what there is"
        ) from error


def _common_blocks(flags: Namespace, tokenizers: dict[str, Any], block_size: int, joined: bool) -> Any:
    """Return the examples of the data, the same with every model's tokenizer; of what isn't text say how it is read.

    Raises:
        HessoError: naming the model that has another.
    """
    first, blocks = next(iter(tokenizers)), None
    split = flags.split or held_out_split(flags.dataset)
    where = {"config_name": flags.dataset_config, "max_examples": flags.limit}
    for name, tokenizer in tokenizers.items():
        if joined:
            column = flags.text_column
            own = joined_windows(flags.dataset, tokenizer, block_size, split, text_column=column, **where)
        else:
            data = read_data(flags.dataset, tokenizer, Reading(block_size, flags.text_column), split, **where)
            own = data.train
            if blocks is None and data.examples.kind != "text":
                print("\n".join(f"hesso-hf: {line}" for line in data.describe()), file=sys.stderr)
        if blocks is not None and any(own[key][:] != blocks[key][:] for key in own.column_names):
            raise HessoError(
                f"`model` ({name!r}) reads `dataset` ({flags.dataset!r}) as other tokens than {first!r}: losses a "
                "token don't compare; compare them by `--tasks` alone"
            )
        blocks = own
    return blocks


def _stored_dtype(configs: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that all models are stored in; speed and memory in different ones say nothing: then float32."""
    stored = {str(config.dtype or "float32").removeprefix("torch."): None for config in configs.values()}
    if len(stored) == 1:
        return getattr(torch, *stored)
    print(
        f"hesso-hf: the models are stored in {' and '.join(stored)}; all are measured in float32 (`--dtype` chooses)",
        file=sys.stderr,
    )
    return torch.float32


def _load(name: str, source: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Load a model.

    Raises:
        HessoError: naming it.
    """
    try:
        return load_model(source, dtype, trust_remote_code)
    except HessoError:
        raise
    except Exception as error:  # damaged weights, too little memory, code of the model's own: of many types
        raise HessoError(f"`model` ({name!r}) can't be loaded: {first_line(error)}") from error


def _bytes_on_disk(source: str) -> int | None:
    """Return the size of a folder's or a Hub model's safetensors files, None where there are none."""
    return weights_bytes(Path(str(cached_file(source, CONFIG_NAME))).parent) or None
