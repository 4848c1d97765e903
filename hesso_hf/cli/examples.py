"""Rows of a data set as examples to learn from: text, conversations (`messages`), or `prompt` and `completion`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from ..errors import HessoError, nearest_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that isn't learnt
TEXT_COLUMN, PAIR = "text", ("prompt", "completion")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # with which a chat template marks what the assistant says
_LEARNT = {
    "all": "loss on all tokens", "completion": "loss on the completions", "assistant": "loss on the assistant's tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What is asked of examples; None leaves it to the kind of the data.

    Attributes:
        block_size: tokens of an example at most.
        text_column: of text or messages; without a column `text`, `messages` or `prompt` and `completion` are read.
        packing: whether text is joined and cut into blocks, other examples put together, whole ones, up to a block.
        completion_only_loss: of `prompt` and `completion`; True by default.
        assistant_only_loss: of messages; by default where the chat template marks what the assistant says.
        text_only: whether anything but text is refused.
    """

    block_size: int
    text_column: str = TEXT_COLUMN
    packing: bool | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool | None = None
    text_only: bool = False


@dataclass(frozen=True)
class Examples:
    """How the rows of one data set become examples.

    Attributes:
        source: the name of the data set in messages.
        kind: `text`, `messages` or `prompt-completion`.
        columns: that are read.
        learnt: which tokens give the loss: `all`, `completion` or `assistant`.
        packed: whether an example is joined of several rows; of text it is a block of exactly `block_size` tokens.
    """

    source: str
    kind: str
    columns: tuple[str, ...]
    learnt: str
    packed: bool
    block_size: int
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, source: str, row: Mapping[str, Any], tokenizer: Any, reading: Reading) -> Examples:
        """Recognise a data set by its first row.

        Raises:
            HessoError: for columns that are none of the kinds, and messages without a chat template.
        """
        columns = _columns(source, row, reading.text_column)
        talks = [_are_messages(row[name]) for name in columns]
        texts = [isinstance(row[name], str) for name in columns]
        if not all(talks) and not (all(texts) and columns != ("messages",)):
            what = f"`text_column` ({columns[0]!r})" if len(columns) == 1 else f"`{'` and `'.join(columns)}`"
            kinds = " and ".join(type(row[name]).__name__ for name in columns)
            wanted = "not text or messages (`role`, `content`)" + ("" if len(columns) == 1 else ", both of one kind")
            raise HessoError(f"{what} of {source} holds {kinds}, {wanted}; name another column by `text_column`")
        kind = "prompt-completion" if columns == PAIR else "messages" if talks[0] else "text"
        if reading.text_only and kind != "text":
            raise HessoError(f"`dataset` ({source!r}) has `{'` and `'.join(columns)}`, and text alone is read here")
        marks = any(talks) and _marks_answers(source, tokenizer)
        learnt = "completion" if kind == "prompt-completion" and reading.completion_only_loss is not False else "all"
        if kind == "messages" and reading.assistant_only_loss is not False:
            if reading.assistant_only_loss and not marks:
                raise HessoError(
                    "`assistant_only_loss` (True): the chat template doesn't mark what the assistant says; put it into "
                    "{% generation %} ... {% endgeneration %} there (`chat_template` names a file), give `prompt` and "
                    "`completion`, or leave it out"
                )
            learnt = "assistant" if marks else "all"
        packed = kind == "text" if reading.packing is None else reading.packing
        return cls(source, kind, columns, learnt, packed, reading.block_size, tokenizer)

    @property
    def cuts(self) -> bool:
        """Whether rows are joined and cut into blocks, wherever one of them ends."""
        return self.kind == "text" and self.packed

    def describe(self) -> str:
        """Say what the rows are and what is learnt from them."""
        what = {"text": "text", "messages": "conversations", "prompt-completion": "pairs"}[self.kind]
        learnt = _LEARNT[self.learnt]
        if self.kind == "messages" and not _marks_answers(self.source, self.tokenizer):
            learnt += " (the chat template doesn't mark the assistant's by {% generation %})"
        size = f"{self.block_size:,} tokens"
        if self.cuts:
            made = f"joined and cut into blocks of {size}"
        else:
            made = f"{'whole rows joined' if self.packed else 'each row'} to an example of at most {size}"
        return f"{what} in `{'` and `'.join(self.columns)}`, {learnt}; {made}"

    # -- one row --------------------------------------------------------------------------------------------------

    def read(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Return `input_ids` and `labels`, at most a block of both, and the `length` before; all of what is cut later.

        Raises:
            HessoError: naming the row, for content that can't be read.
        """
        where = f"`dataset` ({self.source!r}), row {index + 1:,}"
        try:
            ids, learnt = self._tokens(row)
        except HessoError as error:
            raise HessoError(f"{where}: {error}") from error
        except Exception as error:  # a chat template's refusal, content that it doesn't know: of many types
            raise HessoError(f"{where}: the chat template can't write it: {type(error).__name__}: {error}") from error
        if self.cuts:
            return {"input_ids": ids, "labels": [], "length": len(ids)}
        labels = [token if learns else IGNORED for token, learns in zip(ids, learnt, strict=True)]
        labels[:1] = [IGNORED] * len(labels[:1])  # nothing stands before it, or another example
        return {"input_ids": ids[: self.block_size], "labels": labels[: self.block_size], "length": len(ids)}

    def _tokens(self, row: Mapping[str, Any]) -> tuple[list[int], Sequence[Any]]:
        """Return a row's tokens, and of each whether it is learnt."""
        values = [row[name] for name in self.columns]
        for name, value in zip(self.columns, values, strict=True):
            if not isinstance(value, str) and not _are_messages(value):
                raise HessoError(f"`{name}` is {value!r:.40}, not text or messages; leave the row out")
        if self.kind == "text":
            ids = self._ids(values[0]) if values[0] or self.packed else []
            return ids, [True] * len(ids)
        if self.kind == "messages":
            found = self._chat(row, values[0], return_assistant_tokens_mask=self.learnt == "assistant")
            return found["input_ids"], found.get("assistant_masks", [True] * len(found["input_ids"]))
        prompt, completion = values
        if not completion:
            raise HessoError("`completion` is empty, so there is nothing to learn; leave the row out")
        if isinstance(prompt, str):
            before, ids = self._ids(prompt, ended=False), self._ids(prompt + completion)
        else:
            before = self._chat(row, prompt, add_generation_prompt=True)["input_ids"]
            ids = self._chat(row, [*prompt, *completion])["input_ids"]
        # tokens may merge where the completion begins, and a template may write a prompt alone otherwise
        start = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False))))
        return ids, [self.learnt == "all" or place >= start for place in range(len(ids))]

    def _ids(self, text: str, ended: bool = True) -> list[int]:
        """Return the tokens of a text with what begins and ends one; texts that are joined have one between them."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if self.cuts:
            return [bos, *ids] if bos is not None else [*ids, eos] if eos is not None else ids
        start = [bos] if bos is not None and ids[:1] != [bos] else []
        return [*start, *ids, *([eos] if ended and eos is not None and ids[-1:] != [eos] else [])]

    def _chat(self, row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """Return what the chat template makes of messages; Arrow has None for keys that only other messages have."""
        said = [{key: value for key, value in one.items() if value is not None or key == "content"} for one in messages]
        return self.tokenizer.apply_chat_template(
            said, tools=row.get("tools") or None, tokenize=True, return_dict=True,
            tokenizer_kwargs={"verbose": False}, **(row.get("chat_template_kwargs") or {}), **options,
        )  # fmt: skip

    # -- several rows ---------------------------------------------------------------------------------------------

    def pack(self, rows: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        """Join rows: cut them into blocks, or put whole ones together as long as they fit."""
        size = self.block_size
        if self.cuts:
            ids = [token for row in rows["input_ids"] for token in row]
            blocks = [ids[i * size : (i + 1) * size] for i in range(len(ids) // size)]
            return {"input_ids": blocks, "labels": blocks}
        packed: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for row, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            if not packed["input_ids"] or len(packed["input_ids"][-1]) + len(row) > size:
                packed["input_ids"].append([])
                packed["labels"].append([])
            packed["input_ids"][-1] += row
            packed["labels"][-1] += labels
        return packed


class Padding:
    """A collator: pads examples on the right, with labels that aren't learnt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad = next(token for token in tokens if token is not None)

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` and `labels`, shape (B, T) each, T that of the longest."""
        return {
            "input_ids": padded_to_longest([row["input_ids"] for row in rows], self._pad),
            "attention_mask": padded_to_longest([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded_to_longest([row["labels"] for row in rows], IGNORED),
        }


def padded_to_longest(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """Return rows, filled up on the right, as a tensor, shape (B, T), T the length of the longest."""
    import torch

    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def _columns(source: str, row: Mapping[str, Any], text_column: str) -> tuple[str, ...]:
    """Return the columns to read."""
    if text_column in row:
        return (text_column,)
    if text_column == TEXT_COLUMN and "messages" in row:
        return ("messages",)
    if text_column == TEXT_COLUMN and all(name in row for name in PAIR):
        return PAIR
    columns = list(row)
    hint = nearest_name(text_column, columns)
    if text_column == TEXT_COLUMN:
        hint += ", nor are `messages`, or `prompt` and `completion`"
    raise HessoError(f"`text_column` ({text_column!r}) isn't in {source}{hint}; name the column: {columns}")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, Mapping) and "role" in one for one in value) and bool(value)


def _marks_answers(source: str, tokenizer: Any) -> bool:
    """Return whether the chat template marks what the assistant says.

    Raises:
        HessoError: where there is no chat template.
    """
    if not tokenizer.chat_template:
        raise HessoError(
            f"`dataset` ({source!r}) has messages, and the tokenizer of the model no chat template: name a file with "
            "one by `chat_template`, take a model that was trained for chat, or give `prompt` and `completion` as text"
        )
    return bool(_GENERATION.search(tokenizer.get_chat_template()))
