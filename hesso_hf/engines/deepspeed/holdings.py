"""ZeRO: DeepSpeed keeps fp32 masters as flat vectors, of which each process holds a range of every parameter or none.

What is pruned are those masters. The weights that the model computes with follow: at once in the range of this process,
on the others when DeepSpeed gathers them at the end of its step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ...distributed.collectives import is_main_process
from ...distributed.parts import Part, flat_parts, full_shape, local
from ...errors import CheckpointMismatchError, HessoError
from ...pruning.weights.holdings import Held, Holdings
from ...pruning.weights.snapshot import Snapshot

Place = tuple[int, int, int, int]  # a vector's position, where a range begins in it and in its parameter, its length


class HeldRange(Held):
    """A range of a flattened parameter.

    Args:
        shape: of the whole parameter.
        start: where in the flattened parameter the range begins.
        count: number of its elements.

    Attributes:
        parts: the rectangles that the range consists of.
    """

    def __init__(self, shape: tuple[int, ...], start: int, count: int) -> None:
        self._shape, self._count = shape, count
        self.parts: list[Part] = flat_parts(shape, start, start + count)
        self.counted = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self._shape

    def pieces(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return views of a flat vector over the range, one a part."""
        sizes = [part.numel for part in self.parts]
        return [v.view(part.sizes) for v, part in zip(values[: self._count].split(sizes), self.parts, strict=True)]

    def splits(self, dim: int) -> bool:
        """Whether processes hold different indices of a dimension: any may be cut."""
        return True


class Nothing(HeldRange):
    """A parameter of which this process holds no element."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape, 0, 0)

    def weights(self) -> list[torch.Tensor]:
        """Return no piece."""
        return []

    def gradients(self) -> list[torch.Tensor] | None:
        """Return no gradient."""
        return None

    def states(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> Iterator[list[torch.Tensor]]:
        """Yield nothing."""
        yield from ()

    def copied(self, snapshot: Snapshot) -> list[torch.Tensor]:
        """Return no piece."""
        return []


class Master(HeldRange):
    """This process' range of a trained parameter, in a flat fp32 vector of ZeRO's.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        parameter: the model's parameter.
        start: where in the flattened parameter the range begins.
        count: number of its elements.
        vector: position of the flat vector among ZeRO's.
        offset: where in it the range begins.
    """

    def __init__(self, zero: Any, parameter: Any, start: int, count: int, vector: int, offset: int) -> None:
        super().__init__(full_shape(parameter), start, count)
        self._zero = zero
        self.parameter: Any = parameter  # with what DeepSpeed hangs on it
        self._vector, self._offset, self._start = vector, offset, start
        self._gradient: torch.Tensor | None = None

    @property
    def gradient_scale(self) -> float:  # type: ignore[override]
        """The loss scale, in float16."""
        return float(self._zero.loss_scale)

    @property
    def place(self) -> Place:
        """Where the range lies."""
        return self._vector, self._offset, self._start, self._count

    def master(self) -> torch.Tensor:
        """Return the flat vector that the range lies in."""
        return masters_of(self._zero)[self._vector]

    def _range(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.detach().narrow(0, self._offset, self._count)

    def weights(self) -> list[torch.Tensor]:
        """Return the fp32 weights of each piece."""
        return self.pieces(self._range(self.master()))

    def states(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> Iterator[list[torch.Tensor]]:
        """Yield the pieces of each value in the optimizer's state that has one entry an element."""
        master = self.master()
        for value in state.get(master, {}).values():
            fits = isinstance(value, torch.Tensor) and value.shape == master.shape
            if fits and value.is_floating_point():
                yield self.pieces(self._range(value))

    def copied(self, snapshot: Snapshot) -> list[torch.Tensor]:
        """Return the copy of each piece's weights in a snapshot."""
        return self.pieces(self._range(snapshot.weights_of(self.master())))


class Master12(Master):
    """This process' range of a parameter under ZeRO-1 or 2, which keep the low-precision parameters whole."""

    def gradients(self) -> list[torch.Tensor] | None:
        """Return the averaged gradient of each piece; there is one between the backward pass and DeepSpeed's step."""
        if self._zero.cpu_offload:  # lies in the vector's own gradient, and DeepSpeed's map of it isn't always right
            gradient = self.master().grad
            return None if gradient is None else self.pieces(self._range(gradient))
        try:
            found = self.parameter._hp_mapping.get_lp_grad_fragment(self.parameter._index_in_param_group).flatten()
        except ValueError:  # what DeepSpeed says at any other time
            return None
        assert found.numel() == self._count
        return self.pieces(found)

    def weights_changed(self) -> None:
        """Copy the range into the low-precision parameter."""
        self.parameter._hp_mapping.update_lp()


class Master3(Master):
    """This process' range of a parameter under ZeRO-3, which keeps nothing whole."""

    def gradients(self) -> list[torch.Tensor] | None:
        """Return the averaged gradient of each piece, in fp32."""
        from deepspeed.utils import safe_get_local_grad

        self._gradient = safe_get_local_grad(self.parameter)
        return None if self._gradient is None else self.pieces(self._gradient.flatten())

    def gradients_changed(self) -> None:
        """Hand DeepSpeed the gradient back, which may be a copy."""
        from deepspeed.utils import safe_set_local_grad

        assert self._gradient is not None
        safe_set_local_grad(self.parameter, self._gradient)
        self._gradient = None

    def weights_changed(self) -> None:
        """Copy the range into this process' part of the low-precision parameter."""
        self.parameter.ds_tensor.data.view(-1)[: self._count].copy_(self._range(self.master()))


class Frozen3(HeldRange):
    """This process' range of a frozen parameter under ZeRO-3, which has no master."""

    def __init__(self, parameter: Any, start: int, count: int) -> None:
        super().__init__(full_shape(parameter), start, count)
        self.parameter: Any = parameter  # with what DeepSpeed hangs on it

    def weights(self) -> list[torch.Tensor]:
        """Return the weights of each piece."""
        return self.pieces(self.parameter.ds_tensor.data.view(-1))

    def gradients(self) -> list[torch.Tensor] | None:
        """Return None: it has no gradient."""
        return None

    def states(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> Iterator[list[torch.Tensor]]:
        """Yield nothing."""
        yield from ()

    def copied(self, snapshot: Snapshot) -> list[torch.Tensor]:
        """Return the copy of each piece's weights in a snapshot."""
        return self.pieces(snapshot.weights_of(self.parameter.ds_tensor).view(-1))


class ZeroHoldings(Holdings):
    """How ZeRO's processes share a model's parameters.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        parameters: the model's.

    Attributes:
        stepping: whether DeepSpeed is in its step, at whose end it gathers what changed.
    """

    def __init__(self, zero: Any, parameters: Iterable[nn.Parameter]) -> None:
        self.zero, self.sharded, self.stepping = zero, True, False
        self._frozen: list[torch.Tensor] = []
        self._frozen_places: dict[str, tuple[int, int]] = {}
        self._held: list[Held] = []

    def held(self, name: str, parameter: nn.Parameter) -> Held:
        """Return what this process holds of a parameter."""
        found = self._find(name, parameter)
        self._held.append(found)
        return found

    def _find(self, name: str, parameter: Any) -> Held:
        if hasattr(parameter, "ds_tensor"):
            if not parameter.requires_grad:
                start, count = self._divided(parameter)
                self._frozen.append(parameter.ds_tensor)
                self._frozen_places[name] = (start, count)
                return Frozen3(parameter, start, count)
            return self._trained(parameter) or Nothing(full_shape(parameter))
        if not parameter.requires_grad:
            self._frozen.append(parameter)
            self._frozen_places[name] = (0, parameter.numel())
            return Held(name, parameter, is_main_process())
        mapping, found = parameter._hp_mapping, self._trained(parameter)
        if found is None:
            return Nothing(full_shape(parameter))
        if not torch.equal(mapping.lp_fragment, mapping.hp_fragment.detach().to(mapping.lp_fragment)):
            raise HessoError(
                f"{name}: DeepSpeed's map of where its fp32 weights lie is wrong; leave unusual settings out of "
                "`zero_optimization`, or update deepspeed"
            )
        return found

    def _trained(self, parameter: Any) -> Master | None:
        """Return this process' range of a trained parameter, None where it has none."""
        if hasattr(parameter, "ds_tensor"):
            start, count = self._divided(parameter)
            vector, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            return Master3(self.zero, parameter, start, count, vector, offset) if count else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        place, offset = mapping.lp_fragment_address, mapping.hp_fragment_address.start
        return Master12(self.zero, parameter, place.start, place.numel, mapping.param_group_index, offset)

    def _divided(self, parameter: Any) -> tuple[int, int]:
        """Return where this process' range of a parameter under ZeRO-3 begins, and its length."""
        length = parameter.ds_tensor.numel()
        start = length * dist.get_rank(group=self.zero.dp_process_group)
        return start, max(0, min(length, parameter.ds_numel - start))

    def snapshot(self, optimizer: Optimizer, scaled: Iterable[torch.Tensor], on_cpu: bool) -> Snapshot:
        """Copy the flat vectors with their optimizer state, and frozen weights."""
        return ZeroSnapshot(self, self.vectors(), optimizer, on_cpu)

    def vectors(self) -> list[torch.Tensor]:
        """Return what a snapshot copies, in its order: the flat vectors, and frozen weights."""
        return [*masters_of(self.zero), *self._frozen]

    def places(self) -> dict[str, Place]:
        """Return where in `vectors` this process' range of a parameter lies, by name, where it holds one."""
        first = len(masters_of(self.zero))
        found = {n: (first + i, 0, *place) for i, (n, place) in enumerate(self._frozen_places.items())}
        divided = hasattr(self.zero, "fp32_partitioned_groups_flat")
        for group in self.zero.fp16_groups if divided else self.zero.bit16_groups:
            for parameter in group:
                held = self._trained(parameter)
                if held is not None:
                    found[self.zero.param_names[parameter]] = held.place
        return found

    def publish(self) -> None:
        """Let all processes compute with the masters as they are: at once, or at the end of DeepSpeed's step."""
        for held in self._held:
            held.weights_changed()
        if self.stepping:
            return
        if not hasattr(self.zero, "fp32_partitioned_groups_flat"):
            self.zero.update_lp_params()
            return
        persistent = self.zero.persistent_parameters  # small ones that ZeRO-3 keeps gathered
        self.zero.parameter_offload.partition_all_parameters()
        if persistent:
            persistent[0].all_gather(persistent)


class ZeroSnapshot(Snapshot):
    """A snapshot of ZeRO's flat vectors; the weights of the model follow when they return."""

    def __init__(
        self, holdings: ZeroHoldings, vectors: list[torch.Tensor], optimizer: Optimizer | None, on_cpu: bool
    ) -> None:
        super().__init__(vectors, optimizer, on_cpu)
        self._holdings = holdings

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put the weights back and nothing else."""
        super().restore_weights()
        self._holdings.publish()

    @torch.no_grad()
    def swap_weights(self) -> None:
        """Exchange the weights with the copies."""
        super().swap_weights()
        self._holdings.publish()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over copies that were saved.

        Raises:
            CheckpointMismatchError: where the flat vectors had other lengths.
        """
        saved, present = ([tuple(value.shape) for value in values] for values in (state["weights"], self._weights))
        if saved != present:
            raise CheckpointMismatchError(
                f"the saved CRIC snapshot holds vectors of lengths {saved}, this run has {present}; resume with the "
                "same number of processes, ZeRO stage and parameter groups"
            )
        super().load_state_dict(state)


def masters_of(zero: Any) -> list[torch.Tensor]:
    """Return this process' flat fp32 vectors, in the order of the parameter groups or, in ZeRO-3, their subgroups."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


@contextlib.contextmanager
def gathered(parameter: Any) -> Iterator[None]:
    """Put a parameter that ZeRO-3 has divided together; all processes do it, in the same order."""
    if not hasattr(parameter, "ds_tensor"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def divide_frozen(model: PreTrainedModel, config: Mapping[str, Any], batch_size: int) -> PreTrainedModel:
    """Divide a model that isn't trained over the processes, as ZeRO-3 divides the one that is.

    Args:
        model: on any device; what was divided while it was loaded stays so.
        config: DeepSpeed's, of the trained model.
        batch_size: examples in one process' micro-batch, which DeepSpeed asks for.
    """
    import deepspeed

    dtype = next(model.parameters()).dtype
    kept = ("stage", "stage3_param_persistence_threshold", "offload_param")
    zero = {name: value for name, value in config["zero_optimization"].items() if name in kept}
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": batch_size,
            "zero_optimization": zero,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        },
    )
    return engine.module


def whole_fp32(parameter: Any) -> torch.Tensor:
    """Return a whole parameter in fp32; all processes call it, in the same order."""
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).detach()
    if not hasattr(parameter, "ds_tensor"):
        return local(parameter.detach()).float()
    with gathered(parameter):
        return parameter.detach().float().clone()
