"""Stored weights: the tensors in a folder's safetensors files, by the names that the model's class has for them.

A tensor is a view of its file until something is computed with it, so that what is read is what is used. Where a class
stores weights otherwise than it holds them, Transformers' own conversions put them together.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import HessoError

_Keys = list[tuple[str, str | None]]  # names in the files, each with the pattern of a conversion that it matches


class StoredWeights(Mapping[str, torch.Tensor]):
    """Parameters and saved buffers of a model by name, each read when it is asked for and not kept.

    Of tied parameters each name is there.

    Args:
        folder: with safetensors files.
        model: on the meta device, its parameters tied.

    Attributes:
        twice: tied parameters of which more than one name is stored.

    Raises:
        HessoError: naming the first parameter that isn't there, or has another shape, and the first file that can't be
            read.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder, self._model = folder, model
        self._files = stored_files(folder)
        self._shapes = self._stored_shapes()
        self._sources = self._find_sources()
        tied: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied[id(parameter)].append(name)
        self.twice = [names for names in tied.values() if len(set(names) & self._sources.keys()) > 1]
        for names in tied.values():
            there = next((name for name in names if name in self._sources), None)
            if there is None:
                raise HessoError(f"{names[0]} is missing in {folder}: the files of its weights aren't all there")
            for name in names:
                self._sources[name] = self._sources[there]
        for name, parameter in model.named_parameters():
            if self._found(name).shape != parameter.shape:
                raise HessoError(
                    f"{name} is {tuple(self._found(name).shape)} in {folder}, and {type(model).__name__} has "
                    f"{tuple(parameter.shape)} by its config"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor in the dtype that it is stored in; where nothing is converted, a view of its file."""
        return self._convert(name, {key: self._read(key) for key, _ in self._sources[name][1]})

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def dtypes(self) -> set[torch.dtype]:
        """Return those of the parameters."""
        return {self._found(name).dtype for name, _ in self._model.named_parameters()}

    def _read(self, key: str) -> torch.Tensor:
        with _opened(self._files[key]) as file:
            return file.get_tensor(key)

    def _find_sources(self) -> dict[str, tuple[str, _Keys]]:
        """Return, per name, the one that a conversion is named by, and the stored tensors that it takes."""
        mapping, expected = get_model_conversion_mapping(self._model), self._model.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, members = self._model.base_model_prefix, defaultdict[str, _Keys](list)
        for key in sorted(self._files, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, expected)
            if target not in expected and key in expected:
                target, pattern = key, None
            if target in expected:
                members[target].append((key, pattern))
        found: dict[str, tuple[str, _Keys]] = {}
        for target, keys in members.items():
            found |= dict.fromkeys(self._converted(target, keys, self._shapes), (target, keys))
        return found

    def _stored_shapes(self) -> dict[str, torch.Tensor]:
        """Return what the stored tensors are like, on the meta device."""
        found = {}
        for path in set(self._files.values()):
            with _opened(path) as file:
                for key in file.keys():  # noqa: SIM118  # it is no mapping
                    part = file.get_slice(key)
                    dtype = (part[:0] if part.get_shape() else part[...]).dtype
                    found[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        return found

    def _found(self, name: str) -> torch.Tensor:
        """Return what a tensor is like, on the meta device."""
        return self._convert(name, self._shapes)

    def _convert(self, name: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        target, keys = self._sources[name]
        made = self._converted(target, keys, stored)
        return made[name] if name in made else next(iter(made.values()))  # a name that is tied to the stored one

    def _converted(self, target: str, keys: _Keys, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        first, pattern = keys[0]
        if pattern is None:
            return {target: stored[first]}
        transform: Any = copy.deepcopy(self._converters[pattern])
        for key, matched in keys:
            transform.add_tensor(target, key, matched, stored[key])
        made = transform.convert(target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def stored_files(folder: Path) -> dict[str, Path]:
    """Return which file of a folder each stored tensor is in, as `from_pretrained` finds them; none without any.

    Raises:
        HessoError: where a file that is named isn't there, or can't be read.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).exists() or not index.exists():
        paths = [path for path in (folder / SAFE_WEIGHTS_NAME,) if path.exists()]
    else:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [folder / name for name in sorted(set(named))]
    found: dict[str, Path] = {}
    for path in paths:
        with _opened(path) as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise HessoError(f"{path} can't be read: {error}; was it copied whole?") from error
