"""Conversion: nothing is published that the engine doesn't compute as Transformers does, and failures have names."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig

from hesso_hf import export_pruned
from hesso_hf.cli.main import main
from hesso_hf.errors import HessoError, VerificationError
from hesso_hf.export import convert as conversion
from hesso_hf.export import serving_engines
from hesso_hf.export.convert import WRITTEN, check_conversion, convert
from hesso_hf.export.serving_engines import CONVERTER, ServingEngine
from hesso_hf.hf_models.tiny_model import logits_of, relative_error
from hesso_hf.structures.lora import base_of
from tests.support.lora import lora_run
from tests.support.tiny import tiny_llama
from tests.support.training import hesso_config


class InPlace(ServingEngine):
    """An engine that is Transformers again, with another head_dim where it is told to misread it."""

    packages: ClassVar = {"torch": "torch"}
    misreads = False

    @classmethod
    def write(cls, model: Any, source: Path, folder: Path, converter: str | None) -> None:
        model.save_pretrained(folder)

    def __init__(self, model: Any, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if self.misreads:
            for layer in self._model.model.layers:
                layer.self_attn.scaling *= 1.1

    def begin(self) -> None:
        self._text: list[int] = []

    def read(self, ids: list[int]) -> torch.Tensor:
        self._text += ids
        with torch.no_grad():
            return self._model(torch.tensor([self._text])).logits[0, -1]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_llama(seed=3).save_pretrained(tmp_path / "small")
    monkeypatch.setattr(conversion, "ENGINES", {**conversion.ENGINES, "onnx": InPlace})
    return tmp_path / "small"


def test_what_an_engine_computes_as_transformers_does_is_published(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(model), "--for", "onnx"]) == 0
    assert (model / "onnx" / "model.safetensors").exists()
    assert capsys.readouterr().out.startswith(f"{model / 'onnx'}: {2 * WRITTEN} of {2 * WRITTEN} tokens as Transformer")
    found = convert(model, "onnx", model / "again")
    assert found.error < 1e-6
    assert (found.agreed, found.written) == (2 * WRITTEN, 2 * WRITTEN)


def test_nothing_is_published_that_an_engine_computes_otherwise(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InPlace, "misreads", True)
    with pytest.raises(VerificationError, match=r"`engine` \('onnx'\) computes something else than LlamaForCausalLM"):
        convert(model, "onnx", model / "onnx")
    assert sorted(path.name for path in model.parent.iterdir()) == ["small"]
    assert not (model / "onnx").exists()


@pytest.mark.parametrize("part", ["write", "read"])
def test_an_engine_that_fails_is_named_with_its_reason(part: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(InPlace, part, fail)
    named = "LlamaForCausalLM can't be written for it" if part == "write" else "can't run what was written for it"
    with pytest.raises(HessoError, match=rf"`engine` \('onnx'\).*{named}: no such operator$"):
        convert(model, "onnx", model / "onnx")
    assert not (model / "onnx").exists()


def test_a_converter_that_no_engine_takes_is_refused_by_name(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--for", "onnx"], [str(model / "out")]):
        assert main(["export", str(model), *flags, "--converter", "convert.py"]) == 2
        assert "`--converter` ('convert.py') does nothing without `--for gguf`: give that" in capsys.readouterr().err
    with pytest.raises(HessoError, match=r"`converter` \('convert.py'\) is for gguf, and does nothing for onnx"):
        convert(model, "onnx", model / "onnx", "convert.py")
    assert not (model / "onnx").exists()


def test_packages_that_are_missing_are_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        HessoError,
        match=r"needs packages that aren't here: pip install onnx onnxscript onnxruntime 'transformers>=5.23'$",
    ):
        check_conversion("onnx")
    with pytest.raises(HessoError, match=r"pip install gguf sentencepiece llama-cpp-python$"):
        check_conversion("gguf")
    with pytest.raises(
        HessoError, match=r"`engine` \('tensorrt'\) must be one of \['onnx', 'openvino', 'aotinductor', 'gguf'\]"
    ):
        check_conversion("tensorrt")


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    check_conversion("aotinductor")

    def none() -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(HessoError, match=r"compiles C\+\+, .*\(No working C\+\+ compiler found\): install g\+\+"):
        check_conversion("aotinductor")


def test_the_converter_of_llama_cpp_is_found_or_asked_for(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_engines._LlamaCpp, "packages", {})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HessoError, match=rf"`converter` isn't on the PATH: give the path of {CONVERTER}"):
        check_conversion("gguf")
    with pytest.raises(HessoError, match=r"`converter` \('nowhere'\) is no file"):
        check_conversion("gguf", "nowhere")
    (tmp_path / CONVERTER).write_text("#!/bin/sh\n")
    (tmp_path / CONVERTER).chmod(0o755)
    check_conversion("gguf")
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nNotImplementedError: architecture Foo\n")
    monkeypatch.setattr(serving_engines.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        HessoError, match=rf"{CONVERTER} can't convert '.*small': NotImplementedError: architecture Foo"
    ):
        convert(model, "gguf", model / "gguf")


def test_only_stock_causal_language_models_are_converted(model: Path, tmp_path: Path) -> None:
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    config = tiny_llama().config
    config.auto_map = {"AutoModelForCausalLM": "modeling.Other"}
    config.save_pretrained(tmp_path / "own")
    config.architectures = ["LlamaForSequenceClassification"]
    del config.auto_map
    config.save_pretrained(tmp_path / "classes")
    for folder, reason in {
        "bert": "holds a BertForMaskedLM, which is no causal language model",
        "own": "brings model code of its own",
        "classes": "holds a LlamaForSequenceClassification, which is no causal language model",
    }.items():
        with pytest.raises(HessoError, match=rf"`folder` \('.*{folder}'\) ({reason})"):
            convert(tmp_path / folder, "onnx", tmp_path / "out")


def test_a_checkpoint_needs_an_output(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "hesso_state.json").write_text("{}")
    assert main(["export", str(model), "--for", "onnx"]) == 2
    assert main(["export", str(model)]) == 2
    assert capsys.readouterr().err.count("`output` must be given: a folder for the smaller model of a checkpoint") == 2


def test_no_base_model_is_converted_without_its_adapter(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    run = lora_run(tmp_path / "run", base, config=hesso_config(lora_export="adapter"), save_strategy="steps",
                   save_steps=12)  # fmt: skip
    run.train()
    checkpoint, small = str(tmp_path / "run" / "checkpoint-12"), tmp_path / "made"
    assert main(["export", checkpoint, str(small), "--for", "onnx"]) == 2
    assert "add `--lora-export merged`" in capsys.readouterr().err
    assert not small.exists()
    assert main(["export", checkpoint, str(small)]) == 0
    with pytest.raises(HessoError, match=r"`folder` \('.*made'\) holds a base .* apart \(adapter/.*='merged'"):
        convert(small, "onnx", small / "onnx")
    assert not (small / "onnx").exists()
    assert main(["export", checkpoint, str(small), "--for", "onnx", "--lora-export", "merged"]) == 0
    converted, ids = AutoModelForCausalLM.from_pretrained(small / "onnx"), torch.arange(3, 14)[None]
    assert relative_error(logits_of(converted, ids), logits_of(base_of(run.model), ids)) < 1e-4


def test_conversions_of_an_older_model_go_when_another_is_written(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = convert(model, "onnx", model / "onnx")
    record = json.loads((model / "onnx" / "conversion.json").read_text())
    files = record.pop("files")
    assert record == {"engine": "onnx", "error": found.error, "agreed": found.agreed, "written": found.written}
    assert {*files, "conversion.json"} == {path.name for path in (model / "onnx").iterdir()}
    (model / "notes").mkdir()
    (model / "notes" / "config.json").write_text("{}")
    export_pruned(tiny_llama(seed=9), model)
    assert not (model / "onnx").exists()
    assert (model / "notes" / "config.json").exists()
    assert f"{model / 'onnx'}: what was converted is removed, since it was made of the model that was" in caplog.text
    assert main(["export", str(model), "--for", "onnx"]) == 0
    (model / "onnx" / "in_four_bits.onnx").write_text("the user's own")
    (model / "kept.txt").write_text("outside")
    record = json.loads((model / "onnx" / "conversion.json").read_text())
    record["files"] += ["../kept.txt", str(model / "kept.txt")]
    (model / "onnx" / "conversion.json").write_text(json.dumps(record))
    export_pruned(tiny_llama(seed=7), model)
    assert [path.name for path in (model / "onnx").iterdir()] == ["in_four_bits.onnx"]
    assert (model / "kept.txt").exists()
    assert "['in_four_bits.onnx'] may be of that one too" in caplog.text


@pytest.mark.parametrize(
    "flags", [["--dtype", "bfloat16"], ["--trust-pickles"], ["--overwrite-base"], ["--lora-export", "merged"]]
)
def test_a_conversion_refuses_what_only_an_export_uses(
    flags: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(model), "--for", "onnx", *flags]) == 2
    said = capsys.readouterr().err
    assert f"`{flags[0]}`: the model in {model} is exported already, and `--for` only converts it" in said
    assert not (model / "onnx").exists()


def test_an_exported_model_is_converted_into_another_folder(model: Path, tmp_path: Path) -> None:
    export_pruned(tiny_llama(seed=3), model)
    assert main(["export", str(model), str(tmp_path / "elsewhere"), "--for", "onnx"]) == 0
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["onnx"]
    assert not (model / "onnx").exists()
