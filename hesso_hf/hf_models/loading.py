"""Loading a model to train, and its tokenizer: by every process, or under FSDP2 by one that the others get it from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import str_to_bool
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from ..compat import build_model
from ..errors import HessoError, first_line
from .build import class_to_build, load_config, loader_of

_TRUSTED = {"trust_remote_code": True}


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Show none of Transformers' bars while weights are read and written."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(source: str, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load a model in a dtype, through its stock class, or through the auto class that its own code is for.

    With `fsdp_cpu_ram_efficient_loading` one process reads the weights, and the others reserve memory that is never
    written: FSDP2 brings them their shards. (`from_pretrained` reads them on every process of a node.)

    Raises:
        HessoError: where there is none, or it needs code of its own that isn't allowed.
    """
    config = load_config(source, trust_remote_code)
    if not trust_remote_code:
        class_to_build(config, trust_remote_code)
    try:
        if _weights_come_from_another():
            return _without_weights(source, config, dtype, trust_remote_code)
        with without_bars():
            loader = loader_of(config, trust_remote_code)
            own_code = {} if issubclass(loader, PreTrainedModel) else _TRUSTED
            return loader.from_pretrained(source, dtype=dtype, **own_code)
    except OSError as error:
        raise HessoError(f"`model` ({source!r}) can't be loaded: {first_line(error)}") from error


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer.

    Raises:
        HessoError: where there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        load_config(source, trust_remote_code)  # where there is no model either, that is what there is to say
        raise HessoError(
            f"`model` ({source!r}) has no tokenizer that can be loaded: save it there, "
            f"`tokenizer.save_pretrained({source!r})` ({first_line(error)})"
        ) from error


def _weights_come_from_another() -> bool:
    """Whether Accelerate will send this process the main one's weights, as it sends them under FSDP2."""
    said = [os.environ.get(name, "false") for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")]
    return (
        all(str_to_bool(value) for value in said)
        and os.environ.get("FSDP_VERSION") == "2"
        and os.environ.get("RANK", "0") != "0"
    )


def _without_weights(
    source: str, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """Build the model with memory for its parameters that nothing is written to, so that no page of it is used."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        loader = loader_of(config, trust_remote_code)
        if issubclass(loader, PreTrainedModel):
            model = build_model(loader, config, dtype)
        else:
            model = loader.from_config(config, dtype=dtype, **_TRUSTED)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # on the CPU, since Accelerate finds the optimizer's parameters again by their addresses
            empty = torch.empty_like(parameter, device="cpu")
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
    model.tie_weights()
    with contextlib.suppress(OSError):  # it may have been saved without one
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval()
