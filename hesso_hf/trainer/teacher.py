"""Teachers: frozen models whose logits come a chunk of positions at a time, whole on a device or sharded.

Shapes: B batch, T tokens, D embedding channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..compat import whole_rows
from ..distributed.collectives import from_main, is_main_process, max_over_ranks
from ..distributed.parts import reshard
from ..engines.deepspeed.gathering import gathered
from ..engines.engine import Engine
from ..errors import HessoError, first_line
from ..hf_models.build import load_config
from ..hf_models.tiny_model import attention_in_fp32, ieee_fp32
from ..structures.cut import bits_of

logger = logging.get_logger(__name__)

CHUNK_LOGITS = 2**24  # logits of the teacher that live at a time: 64 MiB in fp32
ORIGINAL = "the model before pruning"
TARGETS = ("labels", "shift_labels", "num_items_in_batch")  # what a forward without a loss doesn't need

_Part = TypeVar("_Part")


class _Trunk(nn.Module):
    """A model's trunk that keeps its last hidden state (B, T, D) and passes on one position, or given states instead.

    So the teacher's own forward makes logits of any chunk, with whatever it does after the output matrix.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.hidden: torch.Tensor | None = None
        self.given: torch.Tensor | None = None
        self._output_class: type[ModelOutput] = ModelOutput

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """Return the trunk's kind of output with nothing in it but hidden states."""
        if self.given is not None:
            return self._output_class(last_hidden_state=self.given)
        output = self.trunk(*args, **kwargs)
        self.hidden, self._output_class = output.last_hidden_state, type(output)
        return self._output_class(last_hidden_state=output.last_hidden_state[:, :1])


class Teacher:
    """A frozen model whose logits come a chunk of positions at a time.

    Args:
        model: in its place already.
        device: of the inputs.
        sharded: whether the processes put its layers together in every forward, so that all must make as many.
        source: what it is.
        fingerprint: of its weights before they were put in another dtype.

    Attributes:
        device: of the inputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device | None = None,
        sharded: bool = False,
        source: str = ORIGINAL,
        fingerprint: int = 0,
    ) -> None:
        self.model, self.source, self.fingerprint = model.eval().requires_grad_(False), source, fingerprint
        self.device, self._sharded = device or model.device, sharded
        parameters = inspect.signature(type(model).forward).parameters
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
        self._accepted = None if takes_any else set(parameters)
        with attention_in_fp32(model):
            self._trunk = _separate_(model, self.device)

    @torch.no_grad()
    def rows(self, inputs: Mapping[str, Any]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield which flat positions of a (B, T) batch, n in a row, with the logits there (n, V), until all were had.

        Which of them count isn't asked: the host would have to wait for the device to know how many. A model whose head
        can't be run alone computes the logits of a whole example at a time.
        """
        inputs = {name: self._cast(value) for name, value in inputs.items() if self._reads(name)} | {"use_cache": False}
        yield from (self._rows_by_example if self._trunk is None else self._rows_by_chunk)(inputs)
        reshard(self.model)

    def _reads(self, name: str) -> bool:
        """Whether a part of a batch is for the model; the trainer's loss may take out others."""
        return name not in TARGETS and (self._accepted is None or name in self._accepted)

    def _cast(self, value: Any) -> Any:
        """Bring images and the like into the teacher's dtype, which no autocast does."""
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self.model.dtype) if floating else value

    @contextlib.contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """Give the model itself, which has all its logits meanwhile, to write with for example."""
        name = self.model.base_model_prefix
        if self._trunk is not None:
            setattr(self.model, name, self._trunk.trunk)
        try:
            yield self.model
        finally:
            if self._trunk is not None:
                setattr(self.model, name, self._trunk)
            reshard(self.model)

    def _rows_by_chunk(self, inputs: Mapping[str, Any]) -> Iterator[tuple[slice, torch.Tensor]]:
        assert self._trunk is not None
        with whole_rows(inputs):
            self.model(**inputs)
        assert self._trunk.hidden is not None
        hidden, self._trunk.hidden = self._trunk.hidden.flatten(0, 1), None
        size = max(1, CHUNK_LOGITS // self.model.config.get_text_config().vocab_size)
        chunks = [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]
        for chunk in self._in_step(chunks):
            logits = _head(self.model, self._trunk, hidden[:1] if chunk is None else hidden[chunk])
            if chunk is not None:
                yield chunk, logits

    def _rows_by_example(self, inputs: Mapping[str, Any]) -> Iterator[tuple[slice, torch.Tensor]]:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in inputs.items() if name not in tensors}
        sizes = {len(value) for value in tensors.values()}
        # images and the like don't split by example
        parts = [slice(n, n + 1) for n in range(sizes.pop())] if len(sizes) == 1 else [slice(None)]
        start = 0
        for part in self._in_step(parts):
            given = {name: value[parts[0] if part is None else part] for name, value in tensors.items()}
            given |= others
            with whole_rows(given):
                logits = self.model(**given).logits.flatten(0, 1)
            if part is not None:
                yield slice(start, start + len(logits)), logits
                start += len(logits)

    def _in_step(self, parts: Sequence[_Part]) -> Iterator[_Part | None]:
        """Yield the parts; under sharding then None, until every process has had as many as any."""
        most = max_over_ranks(len(parts), self.device) if self._sharded else len(parts)
        yield from parts
        yield from itertools.repeat(None, most - len(parts))


@ieee_fp32()
@torch.no_grad()
def _separate_(model: PreTrainedModel, device: torch.device) -> _Trunk | None:
    """Put a `_Trunk` in place of the model's trunk if the model then gives the same logits; else leave it as it is."""
    name = model.base_model_prefix
    trunk = getattr(model, name, None)
    if not isinstance(trunk, nn.Module):
        return None
    ids = torch.arange(10, device=device).remainder(model.config.get_text_config().vocab_size).view(2, 5)
    expected = model(input_ids=ids, use_cache=False).logits
    switch = _Trunk(trunk)
    setattr(model, name, switch)
    try:
        model(input_ids=ids, use_cache=False)
        assert switch.hidden is not None
        found = _head(model, switch, switch.hidden.flatten(0, 1)).view_as(expected)
        error = (found - expected).abs().max() / expected.abs().max()
        switch.hidden = None
        if float(error) <= 10 * torch.finfo(expected.dtype).eps:
            return switch
    except Exception as error:  # a forward may ask its trunk for anything
        logger.info(f"{type(model).__name__} needs more of its trunk than the hidden states: {error}")
    setattr(model, name, trunk)
    return None


def _head(model: PreTrainedModel, trunk: _Trunk, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits (n, V) of hidden states (n, D)."""
    trunk.given = hidden[None]
    try:
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    finally:
        trunk.given = None


def make_teacher(name: str | None, student: PreTrainedModel, tokenizer: Any, engine: Engine, wanted_by: str) -> Teacher:
    """Load a teacher, or copy the student as it is now, and put it in its place.

    Args:
        name: a folder or Hub id, None for the student.
        wanted_by: the argument that needs it, with its value.

    Raises:
        HessoError: where there can't be such a teacher.
    """
    device, dtype = engine.args.device, _dtype(student, engine.args.device)
    if name is not None:
        teacher = source = load_teacher(name, student, tokenizer, dtype)
    elif any(hasattr(parameter, "ds_tensor") for parameter in student.parameters()):
        raise HessoError(
            f"{wanted_by}: the model was divided by ZeRO-3 while it was loaded, so it can't be copied as its own "
            "teacher; name it in `distill_from`, or load the model before the TrainingArguments are made"
        )
    else:
        teacher, source = frozen_copy(student, dtype, values=engine.has_weights), student
    known_by = fingerprint(source)
    placed, divided = engine.place_frozen(teacher, type(student))
    return Teacher(placed, device, divided, name or ORIGINAL, known_by)


def _dtype(student: PreTrainedModel, device: torch.device) -> torch.dtype:
    """Return bf16 on a GPU: half the memory, and rounding that is small against what pruning does.

    A CPU gains nothing from it.
    """
    half = device.type == "cuda" and torch.cuda.is_bf16_supported() and student.dtype == torch.float32
    return torch.bfloat16 if half else student.dtype


def teacher_size(student: PreTrainedModel, device: torch.device) -> int:
    """Return the bytes of a copy of the student as its own teacher."""
    return student.num_parameters() * _dtype(student, device).itemsize


def frozen_copy(model: PreTrainedModel, dtype: torch.dtype, values: bool = True) -> PreTrainedModel:
    """Copy a model, its parameters in `dtype` and without gradients, buffers as they are; tied ones stay tied.

    Args:
        values: whether parameters are copied; else memory is reserved for them, for a process that has no weights yet.
    """

    def copied(parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().to(dtype, copy=True) if values else torch.empty_like(parameter, dtype=dtype)

    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(copied(parameter), requires_grad=False) for parameter in model.parameters()
    }
    teacher = copy.deepcopy(model, memo)
    for module in teacher.modules():
        module.__dict__.pop("forward", None)  # one that was put on an instance may still call the original model
    return teacher


def check_teacher(name: str | None) -> None:
    """Look for a teacher that is named before anything is loaded.

    Raises:
        HessoError: where there is none.
    """
    if name is None:
        return
    try:
        load_config(name)
    except HessoError as error:
        raise HessoError(
            f"`distill_from` ({name!r}): {error}, or leave `distill_from` out: the model before pruning teaches then"
        ) from error


def load_teacher(name: str, student: PreTrainedModel, tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Load another teacher.

    Raises:
        HessoError: where it can't be loaded, or its vocabulary isn't the student's.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise HessoError(f"`distill_from` ({name!r}) can't be loaded as a causal language model: {reason}") from error
    sizes = [each.config.get_text_config().vocab_size for each in (model, student)]
    if sizes[0] != sizes[1]:
        raise HessoError(
            f"`distill_from` ({name!r}) has a vocabulary of {sizes[0]}, the student one of {sizes[1]}: their "
            "distributions can't be compared; name a teacher with the same tokenizer"
        )
    try:
        theirs = AutoTokenizer.from_pretrained(name).get_vocab()
        ours = tokenizer.get_vocab()
    except (OSError, ValueError, AttributeError):  # none saved with it, or none given to the trainer
        logger.warning(f"`distill_from` ({name!r}): whether its tokenizer is the student's can't be checked")
        return model
    for token in sorted(ours.keys() | theirs.keys(), key=lambda token: ours.get(token, -1)):
        if ours.get(token) != theirs.get(token):
            raise HessoError(
                f"`distill_from` ({name!r}) has another tokenizer: the id of {token!r} is {theirs.get(token)} there "
                f"and {ours.get(token)} in the student's; name a teacher with the same tokenizer"
            )
    return model


def fingerprint(model: PreTrainedModel) -> int:
    """Return a number that tells models with other weights apart, the same on every device and process."""
    total = 0
    for parameter in model.parameters():
        with gathered(parameter):
            if is_main_process():  # the others may have no weights yet
                total = (31 * total + int(bits_of(parameter.contiguous()).sum(dtype=torch.int64))) % 2**53
    return from_main(total)
