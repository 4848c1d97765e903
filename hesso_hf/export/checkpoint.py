"""Export from a checkpoint's files: neither the trained model nor the smaller one is ever in memory.

Each tensor is read, cut and written a stretch of rows at a time. In the forward passes that compare the two models one
layer of one model is there at a time.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from ..compat import attention_of, build_model, set_attention, set_buffer
from ..errors import HessoError
from ..hf_models.build import load_config, own_class_of
from ..hf_models.tiny_model import logits_of
from ..structures.cut import build_cut, check_origins, copy_buffers, cut_rows, cuts_by_tensor, zero_axis_
from ..structures.groups import KeptUnits
from ..structures.layers import full_names
from ..structures.uneven_layers import uneven_sizes
from .decision import Decision
from .filling import Filling, Rows, filled, stretches
from .parameters import LoneSource, Routing, check_shape, check_stored
from .stored import StoredWeights, stored_files
from .weight_files import WeightFiles, as_rounded, by_layer, saved_tensors, stored_shapes, write_configs

Open = Callable[[str], Rows]  # gives what reads a parameter by its name


class NotStreamedError(HessoError):
    """A checkpoint must be loaded whole, for the reason that the message gives."""


def open_checkpoint(
    model_class: type[PreTrainedModel], config: PretrainedConfig, folder: Path
) -> tuple[PreTrainedModel, StoredWeights]:
    """Return the model of a checkpoint in fp32 without its parameters, and what reads these.

    Raises:
        NotStreamedError: where the model must be loaded whole.
        HessoError: where weights are missing, have other shapes, or can't be read.
    """
    if not stored_files(folder):
        raise NotStreamedError("it holds no safetensors file")
    wanted = config.dtype
    model = without_weights(model_class, config, torch.float32)
    with contextlib.suppress(OSError):  # it may have been saved without one
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(folder)
    stored = StoredWeights(folder, model)
    if stored.twice:
        raise NotStreamedError(f"it holds {' and '.join(stored.twice[0])}, which are tied")
    dtypes = stored.dtypes()
    if len(dtypes) > 1 or (wanted is not None and dtypes != {wanted}):
        raise NotStreamedError(f"its weights are of {sorted(map(str, dtypes))}, its config says {wanted}")
    _read_buffers_(model, stored)
    return model, stored


def without_weights(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Build a model with its buffers, its parameters on the meta device."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = build_model(model_class, config, dtype)
    model.tie_weights()  # which making the parameters empty has undone
    return model.eval()


def _read_buffers_(model: PreTrainedModel, stored: StoredWeights) -> None:
    """Give a model the buffers that were saved."""
    for name, _ in list(model.named_buffers()):
        if name in stored:
            owner, _, leaf = name.rpartition(".")
            set_buffer(model.get_submodule(owner), leaf, stored[name].clone())


class CheckpointSource(LoneSource):
    """A model whose weights lie in a checkpoint's files, and stay there.

    The smaller models that it gives have no weights either: they are read and cut while one is called, within
    `reading`.

    Args:
        model: without its parameters, as `open_checkpoint` gives it.
        stored: its parameters.
    """

    def __init__(self, model: PreTrainedModel, stored: StoredWeights, decision: Decision) -> None:
        super().__init__(model, decision, torch.device("cpu"))
        self._stored = stored
        self._open = weakref.WeakKeyDictionary[nn.Module, Open]()
        self._open[model] = lambda name: self._read(name).__getitem__
        self._rounded = stored.dtypes() != {torch.float32}

    def _read(self, name: str) -> torch.Tensor:
        """Return a trained parameter; the copy of a rounded one has no mean where the stream must have none."""
        kept, axes = self.decision.kept.kept, self.decision.groups.by_parameter().get(name, ())
        tensor, axes = self._stored[name], [entry for entry in axes if entry[0] in kept]
        if self._rounded and any(axis.centred for *_, axis in axes):
            tensor = tensor.float()
            for structure, layer, axis in axes:
                zero_axis_(tensor, axis, kept[structure][layer], self.decision.kept.num_units[structure])
        return tensor

    def reading(self, small: Any) -> AbstractContextManager[object]:
        """Have a model's parameters read while it is called."""
        return Filling(small, self._open[small])

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return those of the trained model, of which one layer is there at a time."""
        with self.reading(self.model), self.decision.routing(self.model):
            return logits_of(self.model, input_ids)

    def logits_of_cut(self, small: Any, kept: KeptUnits, input_ids: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return those of a smaller model, of which one layer is there at a time."""
        with self.reading(small), routing(small):
            return logits_of(small.eval(), input_ids)

    def cut(self, kept: KeptUnits) -> PreTrainedModel:
        """Return the smaller model without its parameters, which are cut when they are read."""
        groups = self.decision.groups
        with init_empty_weights(include_buffers=False):
            small = build_cut(self.model, groups, kept).float()
        small.tie_weights()
        copy_buffers(small, self.model, groups, kept)
        parameters, full = dict(small.named_parameters()), dict(self.model.named_parameters())
        origins, cuts = full_names(parameters, groups, kept), cuts_by_tensor(groups, kept)
        check_origins(origins, full, groups, kept)
        for name, parameter in parameters.items():
            left = cut_rows(full[origins[name]], ..., cuts.get(origins[name], ()))
            check_shape(name, left.shape, parameter.shape)

        def open_(name: str) -> Rows:
            origin = origins[name]
            tensor, made = self._read(origin), cuts.get(origin, ())
            return lambda rows: cut_rows(tensor, rows, made)

        self._open[small] = open_
        return small.eval()

    def save(self, small: Any, folder: Path, dtype: torch.dtype, max_shard_size: str) -> PreTrainedModel:
        """Cut and write a stretch of a tensor after the other; what the class stores otherwise, a layer at a time."""
        files = WeightFiles(folder, stored_shapes(small, dtype), max_shard_size)
        for layer in by_layer(saved_tensors(small)):
            rounded = as_rounded(layer, dtype)
            names = {id(tensor): name for name, tensor in rounded.items()}
            alike = {
                key: names[id(tensor)]
                for key, tensor in revert_weight_conversion(small, rounded).items()
                if id(tensor) in names
            }
            for key, name in alike.items():
                like, rows = rounded[name], self._rows(small, name, layer[name])
                files.write(key, (rows(where).to(like.dtype) for where in stretches(like.shape, like.element_size())))
            others = [name for name in layer if name not in alike.values()]
            made = {name: filled(rounded[name], self._rows(small, name, layer[name])) for name in others}
            for key, tensor in revert_weight_conversion(small, made).items() if made else ():
                files.write(key, [tensor])
        files.finish()
        write_configs(small, folder, dtype)
        files.write_index(small.num_parameters())
        return small

    def _rows(self, small: PreTrainedModel, name: str, tensor: torch.Tensor) -> Rows:
        return self._open[small](name) if isinstance(tensor, nn.Parameter) else tensor.__getitem__

    def read_back(self, small: Any, written: Any, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        """Compare what lies on disk with what is cut anew, and return the model of that folder, without its weights.

        It is built from the config there, by the class that `from_pretrained` would take.
        """
        # the modelling file of uneven layers is this library's own
        uneven, model_class = bool(uneven_sizes(written.config)), type(written)
        config = load_config(folder, trust_remote_code=uneven)
        if uneven:
            model_class = own_class_of(config, str(folder))
        set_attention(config, attention_of(written.config))
        reloaded = without_weights(model_class, config, dtype)
        found = StoredWeights(folder, reloaded)
        _read_buffers_(reloaded, found)
        for name, parameter in small.named_parameters():
            read, rows = found[name], self._open[small](name)
            for where in stretches(parameter.shape, parameter.element_size()):
                check_stored(name, read[where], rows(where).to(dtype), folder)
        buffers = dict(reloaded.named_buffers())
        for name, buffer in self.cut_buffers(small):
            check_stored(name, buffers.get(name), buffer, folder)
        self._open[reloaded] = lambda name: found[name].__getitem__
        return reloaded
