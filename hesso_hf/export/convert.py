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
import shutil
import subprocess
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
from .verify import random_tokens

TOLERANCE = 1e-3  # relative, fp32: engines add up in other orders; a size that is misread moves logits by a tenth
LENGTHS, WRITTEN = (11, 6), 16  # tokens of the prompts, and of what is written after each
CONVERTER = "convert_hf_to_gguf.py"
EXPORTERS = {"transformers.exporters": "'transformers>=5.23'"}  # older ones may lack it


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


class ServingEngine(ABC):
    """What was converted, as the engine runs it: one text at a time.

    Attributes:
        packages: that it takes, by their import names, with the names to install them by.
    """

    packages: ClassVar[Mapping[str, str]]

    @classmethod
    @abstractmethod
    def write(cls, model: PreTrainedModel, source: Path, folder: Path, converter: str | None) -> None:
        """Write a model in the engine's form.

        Args:
            model: in fp32.
            source: the folder that it was read from.
            converter: as `convert` takes it.
        """

    @abstractmethod
    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        """Read what `write` has written of a model."""

    @abstractmethod
    def begin(self) -> None:
        """Forget the text so far."""

    @abstractmethod
    def read(self, ids: list[int]) -> torch.Tensor:
        """Return the logits of the token after the text so far and these, (V,)."""


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
    if engine == "gguf":
        _converter(converter)
    elif converter is not None:
        raise HessoError(f"`converter` ({converter!r}) is for gguf, and does nothing for {engine}: leave it out")


def convert(folder: str | Path, engine: str, output: str | Path, converter: str | None = None) -> Conversion:
    """Write a model, in fp32, in the form that an engine reads.

    Args:
        folder: of a stock causal language model, such as `save_model` and `export_pruned` write.
        engine: onnx (ONNX Runtime) or openvino, by Transformers' own exporters; gguf (llama.cpp), by its converter.
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


def _export(kind: str, model: PreTrainedModel, folder: Path) -> None:
    """Write one graph that reads any number of tokens after any number of others, by Transformers' exporter."""
    from transformers import exporters
    from transformers.exporters.utils import decompose_for_generation

    ids = torch.stack([torch.arange(9) % model.config.get_text_config().vocab_size] * 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decoder, example = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
    exporter, config = getattr(exporters, f"{kind}Exporter")(), getattr(exporters, f"{kind}Config")(dynamic=True)
    exporter.export(decoder, example, config).save_pretrained(folder)


class _OnnxRuntime(ServingEngine):
    packages: ClassVar = {name: name for name in ("onnx", "onnxscript", "onnxruntime")} | EXPORTERS

    @classmethod
    def write(cls, model: PreTrainedModel, source: Path, folder: Path, converter: str | None) -> None:
        _export("Onnx", model, folder)

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        from transformers.exporters import ExportedModel

        self._model, self._exported = model, ExportedModel.from_pretrained(folder, device="cpu")
        self.begin()

    def begin(self) -> None:
        self._past: Any = None
        self._seen = 0

    @torch.no_grad()
    def read(self, ids: list[int]) -> torch.Tensor:
        if self._past is None:  # the graph takes the layers' states, which Transformers makes with the first token
            self._past = self._model(torch.tensor([ids[:1]]), use_cache=True).past_key_values
            ids, self._seen = ids[1:], 1
        places = torch.arange(self._seen, self._seen + len(ids))[None]
        self._seen += len(ids)
        found = self._exported(input_ids=torch.tensor([ids]), position_ids=places, past_key_values=self._past)
        self._past = found.past_key_values
        return found.logits[0, -1]


class _OpenVINO(ServingEngine):
    packages: ClassVar = {"openvino": "openvino"} | EXPORTERS

    @classmethod
    def write(cls, model: PreTrainedModel, source: Path, folder: Path, converter: str | None) -> None:
        _export("OpenVINO", model, folder)

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # by default it may compute in bf16
        compiled = openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", exact)
        self._names = {name for port in compiled.inputs for name in port.get_names()}
        self._request, self._seen = compiled.create_infer_request(), 0

    def begin(self) -> None:
        self._request.reset_state()
        self._seen = 0

    def read(self, ids: list[int]) -> torch.Tensor:
        places = torch.arange(self._seen, self._seen + len(ids))[None]
        self._seen += len(ids)
        given = {
            "input_ids": torch.tensor([ids]),
            "position_ids": places,
            "beam_idx": torch.zeros(1, dtype=torch.int32),
        }
        found = self._request.infer({name: given[name].numpy() for name in given if name in self._names})
        return torch.from_numpy(found["logits"].copy())[0, -1]


class _LlamaCpp(ServingEngine):
    packages: ClassVar = {"gguf": "gguf", "sentencepiece": "sentencepiece", "llama_cpp": "llama-cpp-python"}

    @classmethod
    def write(cls, model: PreTrainedModel, source: Path, folder: Path, converter: str | None) -> None:
        command = [sys.executable, _converter(converter), str(source), "--outfile", str(folder / "model.gguf")]
        done = subprocess.run([*command, "--outtype", "f32"], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise HessoError(f"{CONVERTER} can't convert {str(source)!r}: {said[-1] if said else 'it says nothing'}")

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        from llama_cpp import Llama

        exact = {"type_k": 0, "type_v": 0}  # a cache in fp32, not in fp16
        self._llama: Any = Llama(str(folder / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, **exact)

    def begin(self) -> None:
        self._llama.reset()

    def read(self, ids: list[int]) -> torch.Tensor:
        self._llama.eval(ids)
        return torch.from_numpy(self._llama.scores[self._llama.n_tokens - 1].copy())


def _converter(given: str | None) -> str:
    found = shutil.which(CONVERTER) if given is None else given
    if found is None or not Path(found).is_file():
        where = "isn't on the PATH" if given is None else f"({given!r}) is no file"
        raise HessoError(f"`converter` {where}: give the path of {CONVERTER}, which lies in llama.cpp's repository")
    return found


ENGINES: Mapping[str, type[ServingEngine]] = {"onnx": _OnnxRuntime, "openvino": _OpenVINO, "gguf": _LlamaCpp}
