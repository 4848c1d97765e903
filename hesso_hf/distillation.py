"""Distillation: beside its own loss the student learns a teacher's next-token distributions, by default the unpruned
model's.

Shapes: B batch, T tokens, N positions that are trained on, D embedding channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer
from transformers.utils import ModelOutput, logging

from .agreement import mean_over_ranks
from .config import HessoConfig
from .errors import CheckpointMismatchError, HessoError

logger = logging.get_logger(__name__)

CHUNK_LOGITS = 2**24  # logits of the teacher that live at a time: 64 MiB in fp32
IGNORED = -100
ORIGINAL = "the model before pruning"
_TARGETS = ("labels", "shift_labels", "num_items_in_batch")  # what a forward without a loss doesn't need

if TYPE_CHECKING:
    _TrainerBase = Trainer
else:
    _TrainerBase = object


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
    """A frozen model whose logits come a chunk of positions at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self._trunk = _separate_(model)

    @torch.no_grad()
    def rows(self, inputs: Mapping[str, Any], positions: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield flat positions (n,) of a (B, T) batch with the logits there (n, V), until all N were had.

        A model whose head can't be run alone computes the logits of a whole example at a time.
        """
        inputs = {name: value for name, value in inputs.items() if name not in _TARGETS} | {"use_cache": False}
        if self._trunk is None:
            yield from self._rows_by_example(inputs, positions)
            return
        self.model(**inputs)
        assert self._trunk.hidden is not None
        hidden, self._trunk.hidden = self._trunk.hidden.flatten(0, 1), None
        for chunk in positions.split(max(1, CHUNK_LOGITS // self.model.config.get_text_config().vocab_size)):
            if len(chunk):
                yield chunk, _head(self.model, self._trunk, hidden[chunk])

    def _rows_by_example(
        self, inputs: Mapping[str, Any], positions: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in inputs.items() if name not in tensors}
        sizes = {len(value) for value in tensors.values()}
        parts = range(sizes.pop()) if len(sizes) == 1 else [slice(None)]  # images and the like don't split by example
        start = 0
        for part in parts:
            part = slice(part, part + 1) if isinstance(part, int) else part
            logits = self.model(**{name: value[part] for name, value in tensors.items()}, **others).logits.flatten(0, 1)
            chosen = positions[(positions >= start) & (positions < start + len(logits))]
            if len(chosen):
                yield chosen, logits[chosen - start]
            start += len(logits)


@torch.no_grad()
def _separate_(model: PreTrainedModel) -> _Trunk | None:
    """Put a `_Trunk` in place of the model's trunk if the model then gives the same logits; else leave it as it is."""
    name = model.base_model_prefix
    trunk = getattr(model, name, None)
    if not isinstance(trunk, nn.Module):
        return None
    ids = torch.arange(10, device=model.device).remainder(model.config.get_text_config().vocab_size).view(2, 5)
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


class _DivergenceSum(torch.autograd.Function):
    """Sum over positions of KL(teacher || student), both at a temperature.

    The gradient for the student's logits is computed on the way, while a chunk of the teacher's is there. It is all
    that is kept for the backward pass, and takes the place of the student's logits, which nothing else needs by then.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rows: Iterator[Any], temperature: float) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        flat, gradient = logits.flatten(0, 1), torch.zeros_like(logits)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        for positions, teacher in rows:
            wanted = (teacher.to(dtype) / temperature).log_softmax(-1)
            found = (flat[positions].to(dtype) / temperature).log_softmax(-1)
            total += nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
            gradient.view_as(flat)[positions] = ((found.exp_() - wanted.exp_()) / temperature).to(logits.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


def divergence(
    teacher: Teacher, inputs: Mapping[str, Any], logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, int]:
    """Return the sum of T^2 KL(teacher || student) over the positions that have a target, and how many there are.

    T^2 keeps the gradient's size whatever the temperature (Hinton et al. 2015, section 2).

    Args:
        logits: the student's, (B, T, V), with gradients.
        targets: (B, T), -100 where nothing is to be learnt.
    """
    positions = (targets.flatten() != IGNORED).nonzero().flatten()
    total = _DivergenceSum.apply(logits, teacher.rows(inputs, positions), temperature)
    return total * temperature**2, len(positions)


@contextlib.contextmanager
def _recorded_logits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the logits that forwards of the model return meanwhile, with gradients where these are on."""
    found: list[torch.Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        logits = output.get("logits") if isinstance(output, dict) else None
        if logits is not None and (logits.requires_grad or not torch.is_grad_enabled()):
            found.append(logits)

    handle = model.register_forward_hook(record)
    try:
        yield found
    finally:
        handle.remove()


def frozen_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Copy a model, its parameters in `dtype` and without gradients, buffers as they are; tied ones stay tied."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        for parameter in model.parameters()
    }
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        module.__dict__.pop("forward", None)  # one that was put on an instance may still call the original model
    return copied


def load_teacher(name: str, student: PreTrainedModel, tokenizer: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Load another teacher.

    Raises:
        HessoError: where it can't be loaded, or its vocabulary isn't the student's.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise HessoError(f"`distill_from` ({name!r}) can't be loaded as a causal language model: {error}") from error
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
    """Return a number that tells models with other weights apart, the same on every device."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    total = 0
    for parameter in model.parameters():
        bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
        total = (31 * total + int(bits.sum(dtype=torch.int64))) % 2**53
    return total


@dataclass
class Distillation:
    """The teacher of a run, and what its loss was lately.

    Attributes:
        fingerprint: of the teacher's weights before they were put in another dtype.
        plain, last: the last micro-batch's loss without the teacher, and its divergence.
        scaled: whether these are shares of an accumulated batch already.
        own_forward: whether the trainer's loss computes no logits, so that they take a second forward.
    """

    teacher: Teacher
    source: str
    fingerprint: int
    plain: torch.Tensor | None = None
    last: torch.Tensor | None = None
    scaled: bool = True
    own_forward: bool = False
    _sum: torch.Tensor | None = None
    _since: int = 0

    def note(self, step: int, parts: int) -> None:
        """Count one part of a step's divergence for the log; `step` optimizer steps are complete."""
        if self.last is None:
            return
        if self._sum is None:
            self._sum, self._since = torch.zeros_like(self.last), step
        self._sum += self.last / parts

    def mean(self, step: int) -> float:
        """Return the mean divergence a step since the last call; NaN where there was none."""
        if self._sum is None:
            return float("nan")
        value = self._sum / max(1, step - self._since)
        self._sum = None
        return mean_over_ranks(value, value.device)

    def check(self, saved: Mapping[str, Any] | None, folder: str) -> None:
        """Compare with the teacher that a checkpoint was trained with.

        Raises:
            CheckpointMismatchError: where it was another one.
        """
        if saved is None or saved["fingerprint"] != self.fingerprint:
            raise CheckpointMismatchError(
                f"{folder} was trained with another teacher than {self.source}, as it is now. Where `distill_from` is "
                "None, the teacher is the model that the trainer is made with: make it with the original model, the "
                "checkpoint's weights are loaded on resuming"
            )


class DistillationMixin(_TrainerBase):
    """The part of a trainer that adds the teacher's loss to its own while it trains; evaluation shows the plain one."""

    hesso_config: HessoConfig
    distillation: Distillation | None

    def _prepare_distillation(self, model: PreTrainedModel, tokenizer: Any) -> Distillation | None:
        """Take the teacher, before a step is taken or a checkpoint is loaded."""
        name = self.hesso_config.distill_from
        if self.hesso_config.distillation_alpha == 0.0:
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise HessoError(
                f"`distillation_alpha` ({self.hesso_config.distillation_alpha}) needs the whole teacher on every "
                "device, which FSDP and DeepSpeed don't give it yet; train with DDP, or leave distillation out"
            )
        device = self.args.device
        # Half the memory, and rounding that is small against what pruning does. A CPU gains nothing from bf16.
        half = device.type == "cuda" and torch.cuda.is_bf16_supported() and model.dtype == torch.float32
        dtype = torch.bfloat16 if half else model.dtype
        if name is None:
            teacher, source = frozen_copy(model, dtype), model
        else:
            teacher = source = load_teacher(name, model, tokenizer, dtype)
        cast: nn.Module = teacher  # the stubs give `PreTrainedModel.to` another signature
        cast.to(device)
        return Distillation(Teacher(teacher), name or ORIGINAL, fingerprint(source))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the trainer's loss; with a teacher and in training mode mixed with the divergence from it."""
        plain = super().compute_loss
        if self.distillation is None or not model.training:
            return plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        batch = dict(inputs)  # the trainer may take labels out
        targets = self._targets(batch)
        with _recorded_logits(model) as recorded:
            result: Any = plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        logits = recorded[-1] if recorded else self._second_forward(model, batch)
        self._check_shapes(logits, targets)
        summed, count = divergence(
            self.distillation.teacher, batch, logits, targets, self.hesso_config.distillation_temperature
        )
        scaled, divisor = self._normalisation(count, num_items_in_batch)
        term = summed / divisor
        self.distillation.plain, self.distillation.last = loss.detach().mean(), term.detach()
        self.distillation.scaled = scaled
        alpha = self.hesso_config.distillation_alpha
        loss = (1 - alpha) * loss + alpha * term
        return (loss, outputs) if return_outputs else loss

    def _targets(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return for each position (B, T) the token to be predicted there, or -100."""
        if isinstance(batch.get("shift_labels"), torch.Tensor):
            return batch["shift_labels"]
        if not isinstance(batch.get("labels"), torch.Tensor):
            raise HessoError(
                f"`distillation_alpha` ({self.hesso_config.distillation_alpha}) needs `labels` in the batches to know "
                f"which tokens are learnt; {type(self).__name__}'s have {sorted(batch)}; leave distillation out"
            )
        labels = batch["labels"]
        if not self._loss_shifts_labels:
            return labels
        return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def _check_shapes(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        if logits.shape[:-1] != targets.shape:
            raise HessoError(
                f"`distillation_alpha` ({self.hesso_config.distillation_alpha}) needs a language model with a label at "
                f"every position; labels have the shape {tuple(targets.shape)}, logits {tuple(logits.shape)}"
            )

    def _second_forward(self, model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        assert self.distillation is not None
        if not self.distillation.own_forward:
            self.distillation.own_forward = True
            logger.warning(
                f"{type(self).__name__}'s loss computes no logits to compare with the teacher's: distillation "
                "takes a second forward and backward of the model in every step"
            )
        return model(**{name: value for name, value in batch.items() if name not in _TARGETS}).logits

    def _normalisation(self, count: int, num_items: torch.Tensor | int | None) -> tuple[bool, Any]:
        """Return whether losses are scaled for gradient accumulation already, and what the sum is divided by.

        As the trainer does it with its own loss: by the tokens of all micro-batches and processes, or by this one's.
        """
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and num_items is not None)
        if num_items is None or not scaled:
            return scaled, max(1, count)
        processes = self.accelerator.num_processes // self.get_tp_size() if self.args.n_gpu <= 1 else self.args.n_gpu
        return scaled, num_items / (processes if self.args.average_tokens_across_devices else 1)

    def _noted_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Count a training step's divergence; return the loss to watch for a collapse, the one without the teacher."""
        if self.distillation is None or self.distillation.plain is None:
            return loss
        steps = 1 if self.distillation.scaled else self.current_gradient_accumulation_steps
        self.distillation.note(self.state.global_step, steps)
        return self.distillation.plain / steps

    def _distillation_record(self) -> dict[str, Any] | None:
        """Return what a checkpoint and the report say about the teacher."""
        if self.distillation is None:
            return None
        return {
            "alpha": self.hesso_config.distillation_alpha,
            "temperature": self.hesso_config.distillation_temperature,
            "teacher": self.distillation.source,
            "dtype": str(self.distillation.teacher.model.dtype).removeprefix("torch."),
            "fingerprint": self.distillation.fingerprint,
        }
