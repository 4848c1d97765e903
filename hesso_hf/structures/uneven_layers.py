"""Layers of different widths: the stock class with each layer rebuilt from that layer's own sizes.

A stock config has one size for all layers, so such a model is published with a short modelling file that does what
`rebuild_layers` does here, and loads with `trust_remote_code=True`.
"""

from __future__ import annotations

import copy
import inspect
import re
import shutil
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import HessoError
from ..hf_models.build import auto_class_of
from ..hf_models.sizes import size_places
from .groups import KeptUnits, PruningGroups
from .layers import is_dropped, without_dropped_layers

MODULE_NAME = "modeling_pruned"

_MODELLING_FILE = '''"""{model_class} whose layers differ in width: each is built from the config with its own sizes."""

import copy

from transformers import {model_class}


class Pruned{model_class}({model_class}):
    def __init__(self, config):
        super().__init__(config)
        layers = self.get_submodule("{layer_list}")
        for index, sizes in enumerate(config.layer_sizes):
            layer_config = copy.deepcopy(config)
            for name, size in sizes.items():
                setattr(layer_config, name, size)
            layers[index] = type(layers[index])(layer_config, index)
        self.post_init()
'''


def layer_sizes(groups: PruningGroups, kept: KeptUnits, head_dim: int | None) -> list[dict[str, int]] | None:
    """Return each layer's own config sizes, or None where all layers keep the same numbers of units.

    Raises:
        HessoError: where a layer keeps no unit.
    """
    by_layer: dict[str, dict[str, int]] = {}
    uneven = False
    for name, layers in without_dropped_layers(groups, kept).kept.items():
        structure = groups.structures[name]
        staying = [layer for layer in structure.layers if not is_dropped(layer, groups, kept)]
        counts = [len(layer) for layer in layers]
        if min(counts) == 0:
            raise HessoError(f"{name}: layer {counts.index(0)} keeps no unit; prune less or raise the layer's share")
        uneven = uneven or len(set(counts)) > 1
        for label, count in zip(staying, counts, strict=True):
            layer, sizes = layer_of(label), structure.config_sizes(count)
            if layer and by_layer.setdefault(layer, {}) | sizes != sizes | by_layer[layer]:
                raise HessoError(f"{name}: {label} keeps another number of units than the rest of {layer}")
            if layer:
                by_layer[layer].update(sizes)
    if not uneven:
        return None
    explicit = {"head_dim": head_dim} if head_dim is not None else {}
    return [explicit | by_layer[layer] for layer in sorted(by_layer, key=lambda layer: int(layer.rpartition(".")[2]))]


def layer_list(groups: PruningGroups) -> str:
    """Return the name of the module list that holds the layers (`model.layers`)."""
    labels = {layer_of(label) for group in groups.structures.values() for label in group.layers}
    names = {layer.rpartition(".")[0] for layer in labels if layer}
    if len(names) != 1:
        raise HessoError(f"`layer_widths` ('per_layer') needs one list of layers; this model has {sorted(names)}")
    return names.pop()


def rebuild_layers(model: PreTrainedModel, name: str, sizes: list[dict[str, int]]) -> None:
    """Replace each layer of a stock model by one of the same class with its own sizes, in place.

    The config says these then, also under the names that its class has for them (GPT-2's `n_inner`), and where the
    modelling file is.
    """
    layers, own_sizes = model.get_submodule(name), []
    assert isinstance(layers, nn.ModuleList)
    for index, changes in enumerate(sizes):
        config = copy.deepcopy(model.config)
        named = {place: size for key, size in changes.items() for _, place in size_places(config, key)}
        own_sizes.append(changes | named)
        for key, value in own_sizes[index].items():
            setattr(config, key, value)
        layers[index] = type(layers[index])(config, index)
    model.config.layer_sizes = own_sizes
    loader = auto_class_of(type(model), model.config)
    model.config.auto_map = {loader: f"{MODULE_NAME}.Pruned{type(model).__name__}"}


def uneven_sizes(config: PretrainedConfig) -> list[dict[str, int]]:
    """Return the layers' sizes that were written into a config; none where all layers are alike."""
    return vars(config).get("layer_sizes") or []


def write_modelling_file(folder: Path, model_class: type, groups: PruningGroups) -> None:
    """Write the modelling file beside the weights: the model's own, where its layers differed before it was pruned."""
    file = folder / f"{MODULE_NAME}.py"
    if model_class.__module__.endswith(MODULE_NAME):
        shutil.copyfile(inspect.getfile(model_class), file)
        return
    text = _MODELLING_FILE.format(model_class=model_class.__name__, layer_list=layer_list(groups))
    file.write_text(text, encoding="utf-8")


def layer_of(label: str) -> str:
    """Return the layer of a label that may name a block in it (`model.layers.3.mlp.experts`), or ""."""
    found = re.match(r".*?\.\d+(?=\.|$)", label)
    return found.group() if found else ""
