"""Engines that models are converted for: how each is written, by the tools that its makers have for it, and run.

Shapes: V vocabulary.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ..errors import HessoError, first_line

CONVERTER = "convert_hf_to_gguf.py"
EXPORTERS = {"transformers.exporters": "'transformers>=5.23'"}  # older ones may lack it
COMPILED = "model.pt2"


class ServingEngine(ABC):
    """What was converted, as the engine runs it: one text at a time.

    Attributes:
        packages: that it takes, by their import names, with the names to install them by.
        converted: whether a program writes it whose path may be given.
    """

    packages: ClassVar[Mapping[str, str]]
    converted: ClassVar[bool] = False

    @classmethod  # noqa: B027 (most need nothing but packages)
    def check(cls, converter: str | None) -> None:
        """Look for what it takes beside packages.

        Raises:
            HessoError: where that isn't here.
        """

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


def _export(kind: str, model: PreTrainedModel) -> Any:
    """Make one graph that reads any number of tokens after any number of others, by Transformers' exporter."""
    from transformers import exporters
    from transformers.exporters.utils import decompose_for_generation

    ids = torch.stack([torch.arange(9) % model.config.get_text_config().vocab_size] * 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decoder, example = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
    exporter, config = getattr(exporters, f"{kind}Exporter")(), getattr(exporters, f"{kind}Config")(dynamic=True)
    return exporter.export(decoder, example, config)


class _GivenStates(ServingEngine):
    """An engine whose graph takes the layers' states of the text so far, and returns them with those of what it reads.

    Transformers makes them with the first token.
    """

    _model: PreTrainedModel
    _graph: Any

    def begin(self) -> None:
        self._past: Any = None
        self._seen = 0

    @torch.no_grad()
    def read(self, ids: list[int]) -> torch.Tensor:
        if self._past is None:
            self._past = self._model(torch.tensor([ids[:1]]), use_cache=True).past_key_values
            ids, self._seen = ids[1:], 1
        places = torch.arange(self._seen, self._seen + len(ids))[None]
        self._seen += len(ids)
        found = self._graph(input_ids=torch.tensor([ids]), position_ids=places, past_key_values=self._past)
        self._past = found.past_key_values
        return found.logits[0, -1]


class _OnnxRuntime(_GivenStates):
    packages: ClassVar = {name: name for name in ("onnx", "onnxscript", "onnxruntime")} | EXPORTERS

    @classmethod
    def write(cls, model: PreTrainedModel, source: Path, folder: Path, converter: str | None) -> None:
        _export("Onnx", model).save_pretrained(folder)

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        from transformers.exporters import ExportedModel

        self._model, self._graph = model, ExportedModel.from_pretrained(folder, device="cpu")
        self.begin()


class _AOTInductor(_GivenStates):
    packages: ClassVar = {"torch": "torch"} | EXPORTERS

    @classmethod
    def check(cls, converter: str | None) -> None:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:  # torch names the compilers that it looked for
            raise HessoError(
                f"`engine` ('aotinductor') compiles C++, and there is no compiler ({first_line(error)}): install g++, "
                "or name one in the environment variable CXX"
            ) from error

    @classmethod
    def write(cls, model: PreTrainedModel, source: Path, folder: Path, converter: str | None) -> None:
        graph = _export("Dynamo", model).program
        torch._inductor.aoti_compile_and_package(graph, package_path=str(folder / COMPILED))
        model.config.save_pretrained(folder)

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

        register_cache_pytrees_for_model(model)  # the graph's inputs have a cache among them
        self._model, self._graph = model, torch._inductor.aoti_load_package(str(folder / COMPILED))
        self.begin()


class _OpenVINO(ServingEngine):
    packages: ClassVar = {"openvino": "openvino"} | EXPORTERS

    @classmethod
    def write(cls, model: PreTrainedModel, source: Path, folder: Path, converter: str | None) -> None:
        _export("OpenVINO", model).save_pretrained(folder)

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
    converted = True

    @classmethod
    def check(cls, converter: str | None) -> None:
        _converter(converter)

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


ENGINES: Mapping[str, type[ServingEngine]] = {
    "onnx": _OnnxRuntime, "openvino": _OpenVINO, "aotinductor": _AOTInductor, "gguf": _LlamaCpp,
}  # fmt: skip
