"""Windows of text for replay: what a model writes itself, or a data set that is given, as token ids.

Shapes: N windows, T tokens each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from ..config.files import TEXT_LOADERS
from ..distributed.collectives import is_main_process, rank, summed_over_ranks, world_size
from ..distributed.passes import in_eval
from ..errors import CheckpointMismatchError, HessoError, counted
from ..pruning.weights.snapshot import kept_random_state

logger = logging.get_logger(__name__)

ROWS = 32  # windows written at a time: what is written doesn't depend on the number of processes
FILE = "windows.safetensors"
MARK = "\u2063\u2064"  # invisible characters, that no chat template has, stand for a user's words


@dataclass(frozen=True)
class Script:
    """What a model's text is begun with, and what follows where it ends a part of it.

    Attributes:
        parts: token ids to go on with, in turn: a start token; or of a chat the user's turn, then the answer's.
        ends: the tokens that end a part.
    """

    parts: tuple[tuple[int, ...], ...]
    ends: frozenset[int]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any) -> Script:
        """Read it off the chat template, else off the start token.

        Raises:
            HessoError: where a text has no beginning that is known.
        """
        settings = model.generation_config
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        of_text = _of_text(tokenizer)
        known = {token for token in (*ends, getattr(of_text, "eos_token_id", None)) if token is not None}
        size = model.config.get_text_config().vocab_size
        if getattr(tokenizer, "chat_template", None):
            return cls(_turns(tokenizer), frozenset(known))
        starts = (getattr(of_text, "bos_token_id", None), settings.bos_token_id, *sorted(known))
        start = next((token for token in starts if token is not None and token < size), None)
        if start is None:
            raise HessoError(
                "neither tokenizer nor generation config name a token that a text starts or ends with; give the "
                "trainer a tokenizer (`processing_class`), or text in `replay_dataset`"
            )
        return cls(((start,),), frozenset(known))


def _of_text(tokenizer: Any) -> Any:
    """Return the tokenizer in a processor of texts and images, itself where it is none."""
    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer  # type: ignore[attr-defined]


def _turns(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Return what stands before a user's words, and between them and the answer."""
    words = [{"type": "text", "text": MARK}] if isinstance(tokenizer, ProcessorMixin) else MARK
    try:
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may raise anything
        raise HessoError(f"the chat template takes no user's words ({error}); give text in `replay_dataset`") from error
    before, found, between = said.partition(MARK)
    if not found:
        raise HessoError("the chat template leaves the user's words out; give text in `replay_dataset`")
    ids = [_of_text(tokenizer)(part, add_special_tokens=False)["input_ids"] for part in (before, between)]
    return tuple(tuple(part) for part in ids if part)


@dataclass
class _Prompter(LogitsProcessor):
    """Puts the script's parts where the model has ended one."""

    script: Script
    waiting: list[list[int]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave a row the one token that is put there, where one is."""
        rows = input_ids[:, -1].tolist()
        if not self.waiting:
            self.waiting, self.parts = [[] for _ in rows], [0] * len(rows)
        for row, token in enumerate(rows):
            # a start token that ends texts too stands between them already
            if not self.waiting[row] and token in self.script.ends and self.script.parts != ((token,),):
                self.parts[row] = (self.parts[row] + 1) % len(self.script.parts)
                self.waiting[row] = list(self.script.parts[self.parts[row]])
            if self.waiting[row]:
                chosen = self.waiting[row].pop(0)
                scores[row] = -torch.inf
                scores[row, chosen] = 0.0
        return scores


@torch.no_grad()
def write_windows(
    model: PreTrainedModel, script: Script, count: int, length: int, seed: int = 0, progress: bool = False
) -> torch.Tensor:
    """Let a model write text by itself, sampled from its own distribution (temperature 1).

    All processes write their part and get all of it. A text that ends is followed by another one in the same window.

    Returns:
        int64 (count, length) on the CPU.
    """
    begin = list(script.parts[0])[: length - 1]
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length - len(begin), pad_token_id=0)
    windows = torch.zeros(count, length, dtype=torch.int64, device=model.device)
    starts = range(0, count, ROWS)
    own = model.generation_config
    model.generation_config = GenerationConfig()  # a model's own would end rows, and sample otherwise
    try:
        with in_eval(model), kept_random_state(model.device):
            turns = range(math.ceil(len(starts) / world_size()))
            for turn in logging.tqdm(turns, desc="Writing text for replay", disable=not progress):
                place = turn * world_size() + rank()
                start = starts[min(place, len(starts) - 1)]  # all write as often, as a divided model needs it
                torch.manual_seed(seed * 1_000_003 + start)
                given = torch.tensor([begin] * min(ROWS, count - start), device=model.device)
                written: Any = model.generate(  # type: ignore[operator]  # of a mixin that is a type only by name
                    given, attention_mask=torch.ones_like(given), generation_config=settings,
                    logits_processor=[_Prompter(script)],
                )  # fmt: skip
                if place < len(starts):
                    windows[start : start + ROWS] = written
    finally:
        model.generation_config = own
    return summed_over_ranks(windows).cpu()


def read_windows(source: str, tokenizer: Any, count: int, length: int) -> torch.Tensor:
    """Cut a data set's text into windows.

    Args:
        source: a file (.txt, .json, .jsonl, .csv, .parquet), or what `load_dataset` takes; its split `train`.

    Returns:
        int64 (at most count, length).

    Raises:
        HessoError: where there is no text in it, or not enough for one window.
    """
    if tokenizer is None:
        raise HessoError(f"`replay_dataset` ({source!r}) needs a tokenizer: give the trainer `processing_class`")
    ids: list[int] = []
    tokenizer = _of_text(tokenizer)
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in _texts(source):
        ids += tokenizer(text)["input_ids"] + between
        if len(ids) >= count * length:
            break
    whole = min(count, len(ids) // length)
    if whole == 0:
        raise HessoError(
            f"`replay_dataset` ({source!r}) has {counted(len(ids), 'token')}, too few for a window of {length}"
        )
    return torch.tensor(ids[: whole * length]).view(whole, length)


def _texts(source: str) -> Iterator[str]:
    from datasets import load_dataset

    kind = TEXT_LOADERS.get(Path(source).suffix)
    try:
        if kind is not None:
            data: Any = load_dataset(kind, data_files=source, split="train", streaming=True)
        else:
            data = load_dataset(source, split="train", streaming=True)
    except Exception as error:  # whatever a loader raises: it is the user's path or name
        raise HessoError(f"`replay_dataset` ({source!r}) can't be loaded: {error}") from error
    for row in data:
        if not isinstance(row.get("text"), str):
            raise HessoError(f"`replay_dataset` ({source!r}) has no column `text` of strings, but {sorted(row)}")
        yield row["text"]


def save_windows(folder: Path, windows: torch.Tensor, described: dict[str, str]) -> None:
    """Keep the windows for a run that is resumed."""
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"windows": windows.to(torch.int32)}, folder / FILE, metadata=described)


def load_windows(folder: Path, described: dict[str, str]) -> torch.Tensor | None:
    """Return the windows that are kept, None where there are none that were made alike.

    Raises:
        CheckpointMismatchError: where the file can't be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != described:
                return None
            return file.get_tensor("windows").long()
    except Exception as error:  # safetensors' own
        raise CheckpointMismatchError(f"{path} can't be read ({error}); delete it, it is made anew") from error


def order(count: int, start: int, wanted: int, seed: int) -> list[int]:
    """Return which windows come at `wanted` places from `start` of passes over all, each in an order of its own."""
    found: list[int] = []
    while len(found) < wanted:
        turn, place = divmod(start + len(found), count)
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed + turn))
        found += shuffled[place : place + wanted - len(found)].tolist()
    return found
