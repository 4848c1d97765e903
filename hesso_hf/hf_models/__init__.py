"""Hugging Face configs and models: sizes of a config, and models made from them without weights or very small.

In: a config, a model class, or the name of a checkpoint.
Out: sizes under one name for all classes, configs with other sizes, models on the meta device, tiny random models.
Nothing here knows what a unit or a group is; a table of class names stands only where a config says too little.
"""

from typing import TYPE_CHECKING

from .. import hand_on

if TYPE_CHECKING:
    from .build import build_meta
    from .loading import load_model, load_tokenizer
    from .resize import resized_config
    from .sizes import ConfigSizes, get_size
    from .tiny_configs import tiny_config
    from .tiny_model import random_model

__all__ = [
    "ConfigSizes", "build_meta", "get_size", "load_model", "load_tokenizer", "random_model", "resized_config",
    "tiny_config",
]  # fmt: skip
__getattr__ = hand_on(
    __name__,
    {
        "ConfigSizes": "sizes", "build_meta": "build", "get_size": "sizes", "load_model": "loading",
        "load_tokenizer": "loading", "random_model": "tiny_model", "resized_config": "resize",
        "tiny_config": "tiny_configs",
    },
)  # fmt: skip
