"""Write the recipes of full-size models, and their list in recipes/README.md, from the tables here.

    python recipes/write.py

Memory and hours are what `hesso-hf plan` works out; what to expect is from benchmarks/results where it was measured.
A file that differs from these tables fails the tests: change a table, or copy the file under a name of your own.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers import CONFIG_MAPPING, PretrainedConfig

from hesso_hf.cli.memory import Cluster, MemoryPlan, TokenPace, Workload, plan_memory
from hesso_hf.cli.memory.workload import GB
from hesso_hf.config.names import AUTO_REPLAY_SHARE

FOLDER = Path(__file__).resolve().parent
QUALITY = FOLDER.parent / "benchmarks" / "results" / "quality.json"
STEPS = {20: 3000, 30: 5000, 50: 10000}  # by the percentage that goes
LORA_STEPS = 3000
TOKENS_A_TEXT = 900  # of FineWeb-Edu, rather fewer than there are, so that no text is read twice


@dataclass(frozen=True)
class Model:
    """A model that there are recipes for, and how it is trained.

    Attributes:
        folder, name: of the files.
        sizes: of its config, as far as memory and time depend on them.
        batch, accumulation: examples of a micro-batch, micro-batches of a step.
        expected: its name in benchmarks/results/quality.json, and how one calls what was measured there.
        ratios: percentages that there is a recipe for.
        hesso: what its pruning needs beside the defaults, and why.
    """

    folder: str
    name: str
    hub: str
    title: str
    model_type: str
    sizes: dict[str, Any]
    learning_rate: float
    gpus: int = 1
    gpu_memory: int = 80
    batch: int = 4
    accumulation: int = 8
    length: int = 2048
    checkpointing: bool = True
    expected: tuple[str, str] | None = None
    ratios: tuple[int, ...] = tuple(STEPS)
    hesso: tuple[dict[str, Any], str] = ({}, "")

    @property
    def config(self) -> PretrainedConfig:
        return CONFIG_MAPPING[self.model_type](**self.sizes)


def _llama(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """Return sizes under the names that most configs have."""
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, **more,
    }  # fmt: skip


TIED = {"tie_word_embeddings": True}
MODELS = {
    model.name: model
    for model in (
        Model(
            "gpt2", "gpt2", "openai-community/gpt2", "GPT-2 124M", "gpt2", {}, 3e-4, gpu_memory=24, batch=8,
            length=1024, checkpointing=False,
        ),
        Model(
            "smollm", "smollm2-135m", "HuggingFaceTB/SmolLM2-135M", "SmolLM2 135M", "llama",
            _llama(576, 1536, 30, 9, 3, 49152, **TIED), 3e-4, gpu_memory=24, checkpointing=False,
            expected=("smollm2", "SmolLM2-135M-Instruct"),
        ),
        Model(
            "qwen3", "qwen3-0.6b", "Qwen/Qwen3-0.6B-Base", "Qwen3 0.6B", "qwen3",
            _llama(1024, 3072, 28, 16, 8, 151936, head_dim=128, **TIED), 1e-4, checkpointing=False,
        ),
        Model(
            "gemma3", "gemma-3-1b", "google/gemma-3-1b-pt", "Gemma 3 1B", "gemma3_text",
            _llama(1152, 6912, 26, 4, 1, 262144, head_dim=256, **TIED), 1e-4,
        ),
        Model(
            "llama", "llama-3.2-1b", "meta-llama/Llama-3.2-1B", "Llama 3.2 1B", "llama",
            _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED), 1e-4,
        ),
        Model(
            "olmo2", "olmo-2-1b", "allenai/OLMo-2-0425-1B", "OLMo 2 1B", "olmo2",
            _llama(2048, 8192, 16, 16, 16, 100352), 1e-4,
        ),
        Model(
            "qwen3", "qwen3-1.7b", "Qwen/Qwen3-1.7B-Base", "Qwen3 1.7B", "qwen3",
            _llama(2048, 6144, 28, 16, 8, 151936, head_dim=128, **TIED), 1e-4, batch=2, accumulation=16,
            ratios=(),
        ),
        Model(
            "granite", "granite-3.3-2b", "ibm-granite/granite-3.3-2b-base", "Granite 3.3 2B", "granite",
            _llama(2048, 8192, 40, 32, 8, 49152, **TIED), 1e-4,
        ),
        Model(
            "phi", "phi-4-mini", "microsoft/Phi-4-mini-instruct", "Phi 4 mini", "phi3",
            _llama(3072, 8192, 32, 24, 8, 200064, **TIED), 5e-5, gpus=8, batch=2,
        ),
        Model(
            "mistral", "mistral-7b", "mistralai/Mistral-7B-v0.3", "Mistral 7B", "mistral",
            _llama(4096, 14336, 32, 32, 8, 32768), 5e-5, gpus=8, batch=2,
        ),
        Model(
            "llama", "llama-3.1-8b", "meta-llama/Llama-3.1-8B", "Llama 3.1 8B", "llama",
            _llama(4096, 14336, 32, 32, 8, 128256), 5e-5, gpus=8, batch=2,
        ),
        Model(
            "mixtral", "mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", "Mixtral 8x7B", "mixtral",
            _llama(4096, 14336, 32, 32, 8, 32000), 3e-5, gpus=16, batch=1,
            hesso=({"round_to": 64}, "`round_to`: by default sizes of a mixture of experts are multiples of 8 alone."),
        ),
        Model(
            "llama", "llama-3.1-70b", "meta-llama/Llama-3.1-70B", "Llama 3.1 70B", "llama",
            _llama(8192, 28672, 80, 64, 8, 128256), 2e-5, gpus=32, batch=1, ratios=(30,),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One file: a model, the percentage that goes, and what sets it apart."""

    model: Model
    percent: int
    variant: str = ""  # lora or distillation

    @property
    def stem(self) -> str:
        return f"{self.model.name}-{self.percent}" + f"-{self.variant}" * bool(self.variant)

    @property
    def path(self) -> str:
        return f"recipes/{self.model.folder}/{self.stem}.yaml"

    @property
    def lora(self) -> bool:
        return self.variant == "lora"

    @property
    def cluster(self) -> Cluster:
        return Cluster(1 if self.lora else self.model.gpus, self.model.gpu_memory * GB)

    @property
    def batch(self) -> int:
        return 4 if self.lora else self.model.batch

    @property
    def steps(self) -> int:
        return LORA_STEPS if self.lora else STEPS[self.percent]

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.model.accumulation * self.cluster.num_gpus * self.model.length

    @cached_property
    def plan(self) -> MemoryPlan:
        work = Workload(
            self.batch, self.model.length, self.model.checkpointing, accumulates=self.model.accumulation > 1,
            lora_rank=32, replay_share=AUTO_REPLAY_SHARE, healing=True, distillation=True,
        )  # fmt: skip
        return plan_memory(self.model.config, work, self.cluster, pace=TokenPace(self.tokens))

    @property
    def engine(self) -> str:
        """The engine it is written for: adapters and small models are trained on one GPU, others under FSDP2.

        Raises:
            ValueError: where that doesn't fit.
        """
        engine = "lora" if self.lora else "ddp" if self.cluster.num_gpus == 1 else "fsdp2"
        if not self.plan.engines[engine].fits:
            raise ValueError(f"{self.stem} doesn't fit {self.cluster}")
        return engine

    @property
    def plan_command(self) -> str:
        model, cluster = self.model, self.cluster
        flags = {
            "--gpus": cluster.num_gpus if cluster.num_gpus > 1 else None,
            "--gpu-memory": model.gpu_memory if model.gpu_memory != 80 else None,
            "--batch-size": self.batch,
            "--sequence-length": model.length if model.length != 2048 else None,
            "--gradient-checkpointing": "" if model.checkpointing else None,
            "--gradient-accumulation": "",
            "--lora-rank": 32 if self.lora else None,
            "--tokens": f"{self.tokens:.3g}".replace("e+0", "e"),
        }
        return " ".join(
            [
                "hesso-hf plan",
                model.hub,
                *[f"{flag} {value}".strip() for flag, value in flags.items() if value is not None],
            ]
        )

    @property
    def commands(self) -> list[str]:
        """What starts it, on one machine or under SLURM."""
        if self.cluster.num_gpus == 1:
            return [f"hesso-hf prune {self.path}"]
        nodes = self.cluster.num_gpus // self.cluster.ranks_per_node
        if nodes == 1:
            launched = f"accelerate launch --config_file {self.plan.config_file} -m hesso_hf prune {self.path}"
            return [launched, f"sbatch recipes/slurm/one_node.slurm {self.path}"]
        return [f"sbatch --nodes {nodes} recipes/slurm/multi_node_fsdp2.slurm {self.path}"]

    def values(self) -> dict[str, Any]:
        """Return the recipe itself."""
        model, several = self.model, self.cluster.num_gpus > 1
        training = {
            "output_dir": f"runs/{self.stem}",
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": model.accumulation,
            "learning_rate": 2e-4 if self.lora else model.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": self.steps // 50,
            "weight_decay": 0.1,
            "bf16": True,
            **({"gradient_checkpointing": True} if model.checkpointing else {}),
            "logging_steps": 20,
            "save_strategy": "steps",
            "save_steps": 250 if several else 500,
            "save_total_limit": 2,
            **({"enable_jit_checkpoint": True} if several else {}),
        }
        hesso: dict[str, Any] = {"pruning_ratio": self.percent / 100, **model.hesso[0]}
        if self.lora:
            hesso["structures"] = ["attention_heads", "mlp_channels"]
        else:
            hesso["export_dtype"] = "bfloat16"
        if self.variant == "distillation":
            hesso["distillation_alpha"] = 0.9
        lora = {"dtype": "bfloat16", "peft": {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}}
        return {
            "model": model.hub,
            "dataset": "HuggingFaceFW/fineweb-edu",
            "dataset_config": "sample-10BT",
            "max_examples": math.ceil(self.tokens / TOKENS_A_TEXT / 1e5) * 100_000,
            "block_size": model.length,
            **(lora if self.lora else {}),
            "training": training,
            "hesso": hesso,
        }

    def header(self) -> str:
        sizes, gpus = self.plan.sizes, self.cluster.num_gpus
        left = sizes.parameters * (1 - self.percent / 100)
        found, lasting = self.plan.engines[self.engine], self.plan.hours[self.engine]
        how = {"lora": ", by training adapters", "distillation": ", taught by the model as it was all along"}.get(
            self.variant, ""
        )
        what = (
            f"Remove {self.percent}% of {self.model.title} ({_billions(sizes.parameters)} -> {_billions(left)} "
            f"parameters) while training it on FineWeb-Edu{how}."
        )
        where = f"{gpus} GPUs" if gpus > 1 else "one GPU"
        needs = (
            f"Hardware: {where} of {self.model.gpu_memory} GB, of which about {found.peak / GB:.0f} GB are taken. "
            f"Tokens: {self.tokens / 1e9:.2g} billion, in {self.steps:,} steps. Hours: about {_about(lasting)} on "
            f"H100s. Memory and hours are estimates of"
        )
        lines = [*_wrap(what), "", *[f"  {command}" for command in self.commands], "", *_wrap(needs)]
        lines += [f"  {self.plan_command}", *_wrap(f"What to expect: {self.expected()}")]
        lines += [*_wrap(self.model.hesso[1]), ""]
        lines += ["Written by recipes/write.py; options on the command line come before those here."]
        return "\n".join(f"# {line}".rstrip() for line in lines)

    def expected(self) -> str:
        """Return what was measured, or that nothing was."""
        start = "steps and learning rate are a starting point."
        if self.model.expected is None:
            return f"not measured, this model hasn't been pruned yet: {start}"
        key, name = self.model.expected
        result = json.loads(QUALITY.read_text(encoding="utf-8"))
        runs = [
            r
            for r in result["runs"]
            if (r["model"], r["method"]) == (key, "hesso") and r["ratio"] == self.percent / 100
        ]
        if not runs:
            return f"not measured at {self.percent}%: {start}"
        tokens = max(run["tokens"] for run in runs)
        losses = [statistics.median(r[side] for r in runs if r["tokens"] == tokens) for side in ("in", "out")]
        base = result["base"][key]
        return (
            f"this run itself isn't measured: {start} Measured is a first look, {name} with {self.percent}% removed "
            f"and {tokens:,} training tokens of Python documentation: {losses[0]:.2f} nats per token on more of that "
            f"({base['in']:.2f} before), {losses[1]:.2f} on WikiText-2 ({base['out']:.2f} before)."
        )

    def text(self) -> str:
        return f"{self.header()}\n{yaml.safe_dump(self.values(), sort_keys=False)}"


VARIANTS = (
    ("qwen3-1.7b", 50, "distillation"), ("llama-3.2-1b", 50, "distillation"), ("phi-4-mini", 30, "lora"),
    ("mistral-7b", 30, "lora"), ("llama-3.1-8b", 30, "lora"),
)  # fmt: skip
RECIPES = [
    *[Recipe(model, percent) for model in MODELS.values() for percent in model.ratios],
    *[Recipe(MODELS[name], percent, variant) for name, percent, variant in VARIANTS],
]


def files() -> dict[Path, str]:
    """Return what stands in every file that is written here."""
    page = FOLDER / "README.md"
    found = {FOLDER.parent / recipe.path: recipe.text() for recipe in RECIPES}
    marked = re.compile(r"(<!-- begin:recipes -->\n).*(<!-- end:recipes -->)", re.DOTALL)
    return found | {page: marked.sub(lambda match: match[1] + _table() + match[2], page.read_text(encoding="utf-8"))}


def _table() -> str:
    rows = ["| model | removed | hardware | GB taken | tokens (billions) | hours |", "|---|---|---|---:|---:|---:|"]
    for model in MODELS.values():
        own = [recipe for recipe in RECIPES if recipe.model is model]
        for group in ([r for r in own if not r.variant], *[[r] for r in own if r.variant]):
            if not group:
                continue
            first = group[0]
            title = f"{model.title}, {first.variant.replace('lora', 'LoRA')}" if first.variant else model.title
            links = ", ".join(f"[{r.percent}%]({r.path.removeprefix('recipes/')})" for r in group)
            taken = f"{first.plan.engines[first.engine].peak / GB:.0f}"
            tokens = " / ".join(f"{r.tokens / 1e9:.2g}" for r in group)
            lasting = " / ".join(_about(r.plan.hours[r.engine]) for r in group)
            hardware = f"{first.cluster.num_gpus} x {model.gpu_memory} GB"
            rows.append(f"| {title} | {links} | {hardware} | {taken} | {tokens} | {lasting} |")
    return "\n".join(rows) + "\n"


def _billions(parameters: float) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _about(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 2 else f"{hours:.1f}"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_on_hyphens=False, break_long_words=False)


def main() -> int:
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(FOLDER.parent)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
