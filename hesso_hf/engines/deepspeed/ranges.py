"""Ranges of ZeRO's flat vectors: what of one parameter this process holds, with its gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...distributed.parts import Part, flat_parts, full_shape
from ...pruning.weights.holdings import Held
from ...pruning.weights.snapshot import Snapshot

Place = tuple[int, int, int, int]  # a vector's position, where a range begins in it and in its parameter, its length


def masters_of(zero: Any) -> list[torch.Tensor]:
    """Return this process' flat fp32 vectors, in the order of the parameter groups or, in ZeRO-3, their subgroups."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


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
