"""Conversion: a model written in the form that another engine reads, by the tools that its makers have for it.

The engine itself then writes text from what was converted, token by token, and its logits are compared with those of
Transformers before anything is published: a size that it takes for another shows here, not in service.
Shapes: T tokens of a prompt, N tokens written, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..config.files import CONVERSION_NAME
from ..errors import HessoError, VerificationError, first_line
from ..hf_models.build import load_config
from ..hf_models.tiny_model import logits_of, relative_error
from ..structures.lora import ADAPTER_CONFIG
from .adapter import ADAPTER_FOLDER
from .publish import staged_folder
from .serving_engines import ENGINES, ServingEngine
from .verify import random_tokens

TOLERANCE = 1e-3  # relative, fp32: engines add up in other orders; a size that is misread moves logits by a tenth
LENGTHS, WRITTEN = (11, 6), 16  # tokens of the prompts, and of what is written after each


@dataclass(frozen=True)
class Conversion:
    """What came of it.

    Attributes:
        engine: a key of `ENGINES`.
        folder: where it lies.
        error: largest relative difference of the engine's logits from those of Transformers, in fp32.
        agreed, written: how many of the tokens that the engine wrote Transformers would have written too.
    """

    engine: str
    folder: Path
    error: float
    agreed: int
    written: int

    def write(self, folder: Path) -> None:
        """Write what came of it beside what was converted, and which files those are: a later export removes them."""
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        record = {"engine": self.engine, "error": self.error, "agreed": self.agreed, "written": self.written}
        record |= {"files": files}
        (folder / CONVERSION_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def check_conversion(engine: str, converter: str | None = None) -> None:
    """Refuse what can't be converted to, before any work.

    Raises:
        HessoError: naming the engine, what is missing and how to get it.
    """
    if engine not in ENGINES:
        raise HessoError(f"`engine` ({engine!r}) must be one of {list(ENGINES)}")
    packages = ENGINES[engine].packages
    if any(importlib.util.find_spec(name) is None for name in packages):
        raise HessoError(
            f"`engine` ({engine!r}) needs packages that aren't here: pip install {' '.join(packages.values())}"
        )
    if converter is not None and not ENGINES[engine].converted:
        raise HessoError(f"`converter` ({converter!r}) is for gguf, and does nothing for {engine}: leave it out")
    ENGINES[engine].check(converter)


def convert(folder: str | Path, engine: str, output: str | Path, converter: str | None = None) -> Conversion:
    """Write a model, in fp32, in the form that an engine reads.

    Args:
        folder: of a stock causal language model, such as `save_model` and `export_pruned` write.
        engine: onnx (ONNX Runtime), openvino or aotinductor (torch, compiled), by Transformers' own exporters;
            gguf (llama.cpp), by its converter.
        output: folder; other files in it stay. A model that is written into the folder around it later removes what
            was converted.
        converter: llama.cpp's `convert_hf_to_gguf.py`; by default what is on the PATH under that name.

    Raises:
        HessoError: where the model is no causal language model of a stock class, its adapter lies apart, or the
            engine's tools fail.
        VerificationError: where the engine computes something else. `output` is as it was then.
    """
    check_conversion(engine, converter)
    _check_merged(Path(folder))
    config = load_config(str(folder))
    _check_stock(config, str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kind = ENGINES[engine]
    with staged_folder(output) as staging:
        with _naming(f"`engine` ({engine!r}): {type(model).__name__} can't be written for it"):
            kind.write(model, Path(folder), staging, converter)
        with _naming(f"`engine` ({engine!r}) can't run what was written for it"):
            running = kind(model, staging)
            found = [_compared(model, running, prompt.tolist()) for prompt in _prompts(config)]
        error = max(each for each, _ in found)
        if not error <= TOLERANCE:
            raise VerificationError(
                f"`engine` ({engine!r}) computes something else than {type(model).__name__}: logits differ by "
                f"{error:.1e} (relative, fp32; allowed {TOLERANCE:.0e}). Nothing was published; docs/serving.md has "
                "the engines that take a size for another, and sizes that suit them"
            )
        made = Conversion(engine, Path(output), error, sum(same for _, same in found), WRITTEN * len(LENGTHS))
        made.write(staging)
    return made


def _check_merged(folder: Path) -> None:
    """Refuse a base model whose adapter lies apart: an engine would compute without it."""
    if (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).exists():
        raise HessoError(
            f"`folder` ({str(folder)!r}) holds a base model with its adapter apart ({ADAPTER_FOLDER}/{ADAPTER_CONFIG}),"
            " which would be left out: export the checkpoint with lora_export='merged' (`hesso-hf export CHECKPOINT "
            "OUTPUT --lora-export merged`), and convert that"
        )


def _check_stock(config: PretrainedConfig, folder: str) -> None:
    if getattr(config, "auto_map", None):
        raise HessoError(f"`folder` ({folder!r}) brings model code of its own, which no other engine has")
    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = (config.architectures or [stock or config.model_type])[0]
    if named != stock or getattr(config, "is_encoder_decoder", False):
        raise HessoError(f"`folder` ({folder!r}) holds a {named}, which is no causal language model")


def _prompts(config: PretrainedConfig) -> Iterator[torch.Tensor]:
    for row, length in zip(random_tokens(config), LENGTHS, strict=True):
        yield row[:length]


def _compared(model: PreTrainedModel, engine: ServingEngine, prompt: list[int]) -> tuple[float, int]:
    """Let an engine write after a prompt; return the error of its logits, and how many of its tokens agree."""
    engine.begin()
    written: list[int] = []
    logits = [engine.read(prompt).float()]
    for _ in range(WRITTEN):
        written.append(int(logits[-1].argmax()))
        logits.append(engine.read(written[-1:]).float())
    wanted = logits_of(model, torch.tensor([prompt + written]))[0, len(prompt) - 1 :]
    agreed = int((wanted[:-1].argmax(-1) == torch.tensor(written)).sum())
    return relative_error(torch.stack(logits), wanted), agreed


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say what failed: exporters and engines raise exceptions of any type, and say much on the way."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        except (HessoError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise HessoError(f"{what}: {first_line(error)}") from error
        finally:
            logging.disable(disabled)
