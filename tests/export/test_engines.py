"""The engines themselves, in an environment that has them: `make test-engines`.

GGUF_CONVERTER is the path of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hesso_hf.bundled import bundled_model_path
from hesso_hf.export.convert import ENGINES, convert
from tests.support import ROOT

pytestmark = pytest.mark.engines
# Sizes as pruning leaves them, and such as quantising kernels like.
SIZES = {
    "odd": {"hidden_size": 90, "intermediate_size": 139, "head_dim": 22},
    "rounded": {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "mistral": {"sliding_window": None}, "gemma3_text": {"sliding_window": 16},
}  # fmt: skip


# llama.cpp's converter knows tokenizers by what they make of a text; the bundled one it can't know.
CONVERTER = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname(os.environ["GGUF_CONVERTER"]))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[0] = os.environ["GGUF_CONVERTER"]
runpy.run_path(os.environ["GGUF_CONVERTER"], run_name="__main__")
"""


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, sizes, tied = request.param
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    config = AutoConfig.for_model(
        family, num_hidden_layers=6 if family == "gemma3_text" else 2, num_attention_heads=6, num_key_value_heads=3,
        vocab_size=len(tokenizer), tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=None,
        **SIZES[sizes], **FAMILIES[family],
        **({"query_pre_attn_scalar": SIZES[sizes]["head_dim"]} if family == "gemma3_text" else {}),  # as in all but 27B
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "folder",
    [(family, sizes, family != "qwen3") for family in FAMILIES for sizes in SIZES],
    indirect=True,
    ids=lambda case: "-".join(map(str, case[:2])),
)
def test_an_engine_writes_what_transformers_writes(engine: str, folder: Path) -> None:
    (folder / "converter.py").write_text(CONVERTER)
    found = convert(folder, engine, folder / engine, str(folder / "converter.py") if engine == "gguf" else None)
    assert found.error < 5e-4  # llama.cpp looks its GELU up in a table
    assert found.agreed == found.written == 32


@pytest.mark.parametrize("folder", [("llama", "odd", True)], indirect=True)
def test_the_documented_code_runs_what_aotinductor_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model in bfloat16: the graph is in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    model.save_pretrained(folder)
    convert(folder, "aotinductor", folder / "aotinductor", None)
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```py\n(.*?)```", page, re.S) if "aoti_load_package" in block]
    monkeypatch.chdir(folder.parent)
    exec(compile(code, "serving.md", "exec"), {})
    expected = model.float()(torch.tensor([[1, 15, 27]])).logits[0, -1].argmax()
    assert capsys.readouterr().out.strip() == str(expected)
