"""Ranges of ZeRO's flat vectors: what of one parameter this process holds, with its gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ...distributed.parts import flat_parts
from ...pruning.weights.holdings import Held, is_plain
from ...pruning.weights.snapshot import Snapshot
from .gathering import whole_fp32


class Place(NamedTuple):
    """Where a range of a flattened parameter lies.

    Attributes:
        vector: position of a flat vector among those of this process.
        offset: where in it the range begins.
        start: where in the flattened parameter it begins.
        length: number of its elements.
    """

    vector: int
    offset: int
    start: int
    length: int


def masters_of(zero: Any) -> list[torch.Tensor]:
    """Return this process' flat fp32 vectors, in the order of the parameter groups or, in ZeRO-3, their subgroups."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


class HeldRange(Held):
    """What this process holds of one parameter where that is flattened: a range of its elements, as rectangles.

    What gives its weights, gradients and state are the classes below; by itself it stands for a range of no elements,
    which has none.

    Args:
        parameter: the model's parameter.
        start: where in the flattened parameter the range begins.
        count: number of its elements.

    Attributes:
        parts: the rectangles that the range consists of.
    """

    def __init__(self, parameter: torch.Tensor, start: int, count: int) -> None:
        self.parameter: Any = parameter  # with what DeepSpeed hangs on it
        self._count = count
        self.parts = flat_parts(self.shape, start, start + count)
        self.counted = True

    def pieces(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return views of a flat vector over the range, one a part."""
        sizes = [part.numel for part in self.parts]
        return [v.view(part.sizes) for v, part in zip(values[: self._count].split(sizes), self.parts, strict=True)]

    def splits(self, dim: int) -> bool:
        """Whether processes hold different indices of a dimension: any may be cut."""
        return True

    def weights(self) -> list[torch.Tensor]:
        """Return no piece."""
        return []

    def gradients(self) -> list[torch.Tensor] | None:
        """Return no gradient."""
        return None

    def copied(self, snapshot: Snapshot) -> list[torch.Tensor]:
        """Return no piece."""
        return []

    def whole(self) -> torch.Tensor:
        """Return all of the weights in fp32, the masters of those that are trained: all processes call it."""
        return whole_fp32(self.parameter)


class Frozen3(HeldRange):
    """This process' range of a frozen parameter under ZeRO-3, which has no master."""

    def weights(self) -> list[torch.Tensor]:
        """Return the weights of each piece."""
        return self.pieces(self.parameter.ds_tensor.data.view(-1))

    def copied(self, snapshot: Snapshot) -> list[torch.Tensor]:
        """Return the copy of each piece's weights in a snapshot."""
        return self.pieces(snapshot.weights_of(self.parameter.ds_tensor).view(-1))


class Master(HeldRange):
    """This process' range of a trained parameter, in a flat fp32 vector of ZeRO's.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        parameter: the model's parameter.
        place: where the range lies.
    """

    def __init__(self, zero: Any, parameter: torch.Tensor, place: Place) -> None:
        super().__init__(parameter, place.start, place.length)
        self._zero, self.place = zero, place

    @property
    def gradient_scale(self) -> float:  # type: ignore[override]
        """The loss scale, in float16."""
        return float(self._zero.loss_scale)

    def master(self) -> torch.Tensor:
        """Return the flat vector that the range lies in."""
        return masters_of(self._zero)[self.place.vector]

    def _range(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.detach().narrow(0, self.place.offset, self._count)

    def weights(self) -> list[torch.Tensor]:
        """Return the fp32 weights of each piece."""
        return self.pieces(self._range(self.master()))

    def states(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> Iterator[list[torch.Tensor]]:
        """Yield the pieces of each plain value in the optimizer's state that has one entry an element."""
        master = self.master()
        for value in state.get(master, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == master.shape and is_plain(value):
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

    _gradient: torch.Tensor | None = None

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
