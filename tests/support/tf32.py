"""A GPU's TF32 on a CPU: products of matrices round what goes in, where torch's settings allow a GPU to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}  # the first argument that is rounded


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Return fp32 values with the 10 bits behind the point that TF32 has."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class _TensorCores(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = _PRODUCTS.get(func._schema.name)
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
        if first is not None and allowed and args[first].dtype == torch.float32:
            args = (*args[:first], *map(rounded, args[first : first + 2]), *args[first + 2 :])
        return func(*args, **(kwargs or {}))


@contextmanager
def tf32() -> Iterator[None]:
    """Allow TF32 as `TrainingArguments(tf32=True)` and `torch_compile=True` do, on a machine that has it."""
    torch.backends.fp32_precision = "tf32"
    try:
        with _TensorCores():
            yield
    finally:
        torch.backends.fp32_precision = "none"
