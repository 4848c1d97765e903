"""What quantising costs: a model as it comes, in the principal basis of its stream, and smaller ones of `quality.py`.

    pip install torchao; python benchmarks/quantised.py [--model smollm2] [--runs FOLDER ...]

torchao quantises every linear layer but the output matrix: weights in eight bits, in four (groups of 32), or weights
and activations in eight (a scale for each token). Losses are nats per token on held-out text like that trained on
(`in`) and on other text (`out`), fewer examples than in `quality.py`; `rise` is against the same model in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality import CACHE
from texts import SETTINGS, SMALL, STORIES, Data, find_model, first, load_data, name_of
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hesso_hf.cli.evaluate import held_out_loss
from hesso_hf.export.report import versions
from hesso_hf.pruning import turn_stream
from hesso_hf.pruning.basis import LEAST_TOKENS

RESULTS = Path(__file__).parent / "results" / "quantised.json"
KINDS = ("int8 weights", "int4 weights", "int8 weights and activations")
BLOCKS, WINDOWS, GROUP = 20, 3, 32


def quantise_(model: PreTrainedModel, kind: str) -> None:
    """Quantise a model's linear layers in place."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    config = {
        "int8 weights": Int8WeightOnlyConfig,
        "int4 weights": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
        "int8 weights and activations": Int8DynamicActivationInt8WeightConfig,
    }[kind]()
    head = model.get_output_embeddings()
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and module is not head)


def turned(folder: Path, data: Data) -> PreTrainedModel:
    """Return a model in the principal basis of its stream, at whatever a tied embedding's gains cost."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    size = len(data.train[0]["input_ids"])
    rows = [torch.tensor([row["input_ids"]]) for row in data.train.select(range(LEAST_TOKENS // size))]
    turn_stream(model, [{"input_ids": ids, "labels": ids} for ids in rows], tolerance=float("inf"))
    return model


def measure(made: Callable[[], PreTrainedModel], data: Data) -> dict[str, Any]:
    """Return a model's losses, and how far they rise as it is quantised."""
    sets = {"in": first(data.held_out["in"], BLOCKS), "out": first(data.held_out["out"], WINDOWS)}

    def losses(model: PreTrainedModel) -> dict[str, float]:
        return {side: held_out_loss(model, rows, batch_size=1) for side, rows in sets.items()}

    model = made()
    before = losses(model)
    found: dict[str, Any] = {"parameters": model.num_parameters(), **{s: round(v, 4) for s, v in before.items()}}
    found["rise"] = {}
    for kind in KINDS:
        model = made()
        if kind == "int4 weights" and any(m.in_features % GROUP for m in model.modules() if isinstance(m, nn.Linear)):
            continue  # torchao refuses rows that groups don't divide
        quantise_(model, kind)
        found["rise"][kind] = {side: round(loss - before[side], 4) for side, loss in losses(model).items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as `quality.py` takes it")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="folders of runs that quality.py kept")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared", help="models/ and data/")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder, name = find_model(options.model, options.data, options.cache), name_of(options.model)
    text = "stories" if name in (STORIES, SMALL) else "docs"
    data = load_data(folder, SETTINGS[text], options.data)
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "as it comes": lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "principal basis": lambda: turned(folder, data),
    }
    for run in options.runs:
        models[run.name] = lambda run=run: AutoModelForCausalLM.from_pretrained(run / "small", dtype=torch.float32)
    head = {"device": "cpu", "versions": versions(), "model": name, "text": text, "blocks": BLOCKS, "windows": WINDOWS}
    rows: dict[str, Any] = {}
    for label, made in models.items():
        rows[label] = measure(made, data)
        print(label, json.dumps(rows[label]), flush=True)
        options.output.write_text(json.dumps(head | {"models": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
