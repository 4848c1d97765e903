"""A stand-in for tensors in eight bits, as optimizers of torchao and bitsandbytes keep them."""

from __future__ import annotations

from typing import Any

import torch

BLOCK = 256  # elements that have one scale


class Codes(torch.Tensor):
    """As torchao has it: codes and a scale for each block, which pass for a float tensor, without `masked_fill_`."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Codes:
        found = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)
        found.codes, found.scale = in_codes(values)
        return found

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        return in_numbers(self.codes, self.scale)

    def copy_(self, values: torch.Tensor) -> Codes:  # type: ignore[override]
        self.codes, self.scale = in_codes(values)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{cls.__name__} dispatch: attempting to run {func}")


def in_codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 8-bit codes of the shape of the values, and the scale of each block."""
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = flat.abs().amax(1).clamp_min(1e-30) / 127
    codes = (flat / scales[:, None]).round().to(torch.int8).view(torch.uint8)
    return codes.flatten()[: values.numel()].view(values.shape), scales


def in_numbers(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    each = scales.repeat_interleave(BLOCK)[: codes.numel()]
    return (codes.view(torch.int8).flatten() * each).view(codes.shape)
