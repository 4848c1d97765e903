"""Weight files: safetensors files that are written a tensor, or a stretch of one, at a time, none of them held."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..distributed.parts import stock_class
from ..errors import HessoError
from ..structures.uneven_layers import layer_of

# in the order that safetensors' own writer puts tensors in
_DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class WeightFiles:
    """The files of a model's weights, as `save_pretrained` would write them; their tensors may come in any order.

    Args:
        shapes: what is stored, on the meta device.
        max_shard_size: of a file ("5GB").
        rank: of n processes that write into the folder each writes every n-th file; 0 of 1 writes all.

    Raises:
        HessoError: for a dtype that isn't known here, naming the tensor.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, torch.Tensor], max_shard_size: str, rank: int = 0, count: int = 1
    ) -> None:
        self._folder = folder
        self._split = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=max_shard_size)
        self._places: dict[str, tuple[Path, int, int]] = {}
        for number, (file, names) in enumerate(self._split.filename_to_tensors.items()):
            if number % count == rank:
                self._begin(folder / file, {name: shapes[name] for name in names})

    def _begin(self, path: Path, shapes: Mapping[str, torch.Tensor]) -> None:
        """Write a file's header."""
        odd = next((name for name, shape in shapes.items() if shape.dtype not in _DTYPES), None)
        if odd is not None:
            raise HessoError(f"{odd} is of {shapes[odd].dtype}, which can't be written")
        kinds = list(_DTYPES)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(shapes, key=lambda name: (kinds.index(shapes[name].dtype), name)):
            shape = shapes[name]
            begin, end = end, end + shape.numel() * shape.element_size()
            entry = {"dtype": _DTYPES[shape.dtype], "shape": list(shape.shape), "data_offsets": [begin, end]}
            header[name], self._places[name] = entry, (path, begin, end - begin)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            self._places[name] = (path, self._places[name][1] + 8 + len(text), self._places[name][2])

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Write a tensor, the pieces of which come in order; where another process writes its file, nothing is done."""
        if name not in self._places:
            return
        path, begin, size = self._places.pop(name)
        with path.open("r+b") as file:
            file.seek(begin)
            for piece in pieces:
                size -= file.write(piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        assert not size, name

    def finish(self) -> None:
        """Check that all has come that belongs to this process' files."""
        assert not self._places, self._places.keys()

    def write_index(self, parameters: int) -> None:
        """Write where each tensor is, and how many parameters the model has, where there are several files."""
        if self._split.is_sharded:
            metadata = {"total_parameters": parameters, **self._split.metadata}
            index = {"metadata": metadata, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self._folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text + "\n", encoding="utf-8")


def write_configs(small: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write what lies beside the weights, as `save_pretrained` does."""
    config = copy.deepcopy(small.config)
    config.dtype = dtype
    config.architectures = [stock_class(small).__name__]
    config.save_pretrained(folder)
    if small.can_generate() and small.generation_config is not None:
        small.generation_config.save_pretrained(folder)


def saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters, tied ones once, and the buffers that a model stores, in the order of its state dict."""
    once = {name for name, _ in model.named_parameters()}
    repeated = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in repeated}


def by_layer(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return tensors a layer at a time, those outside of layers each by itself."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(layer_of(name) or name, {})[name] = tensor
    return list(layers.values())


def as_rounded(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what tensors of a model are like when its parameters are rounded, on the meta device."""
    dtypes = {name: dtype if isinstance(tensor, nn.Parameter) else tensor.dtype for name, tensor in tensors.items()}
    return {name: torch.empty(t.shape, dtype=dtypes[name], device="meta") for name, t in tensors.items()}


def stored_shapes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what is stored of a model, by the names and in the order of `save_pretrained`, on the meta device."""
    return revert_weight_conversion(model, as_rounded(saved_tensors(model), dtype))
