"""`hesso-hf eval`: held-out perplexity on text, and scores on lm-eval tasks."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ...errors import HessoError
from ..inputs import check_text_file, model_source
from ..printing import print_table

HELP = "held-out perplexity and lm-eval tasks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--dataset", help="python-docs, a text file or a Hub id")
    parser.add_argument("--split", help="default: test, or all of a file")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--tasks", help="comma-separated lm-eval tasks")
    parser.add_argument("--include-path", help="folder with further lm-eval task files")
    parser.add_argument("--limit", type=int, help="examples at most")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print a table or JSON."""
    if arguments.dataset is None and arguments.tasks is None:
        raise HessoError("`eval` needs `--dataset` (text for the perplexity) or `--tasks` (lm-eval); got neither")
    model, found = model_source(arguments.model), {}
    if arguments.dataset is not None:
        check_text_file(arguments.dataset)
        found = _measure(model, arguments)
    tasks = {} if arguments.tasks is None else _lm_eval(model, arguments)
    if arguments.json:
        print(json.dumps(found | ({} if arguments.tasks is None else {"tasks": tasks}), indent=1))
        return 0
    rows = [[name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}"] for name, value in found.items()]
    rows += [[f"{task} {name}", f"{value:.4g}"] for task, scores in tasks.items() for name, value in scores.items()]
    print_table(arguments.model, ["measure", "value"], rows)
    return 0


def _measure(model: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Return loss (nats a token), perplexity and the number of predicted tokens."""
    import torch

    from ...hf_models.loading import load_model, load_tokenizer
    from ..data import held_out_split, text_blocks
    from ..evaluate import held_out_loss, perplexity

    dataset, block_size = arguments.dataset, arguments.block_size
    blocks, _ = text_blocks(
        dataset, load_tokenizer(model), block_size, arguments.split or held_out_split(dataset),
        text_column=arguments.text_column, max_examples=arguments.limit,
    )  # fmt: skip
    loss = held_out_loss(load_model(model, torch.float32, arguments.trust_remote_code), blocks)
    return {"loss": loss, "perplexity": perplexity(loss), "tokens": len(blocks) * (block_size - 1)}


def _lm_eval(model: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the numbers of each task.

    Raises:
        HessoError: where lm-eval isn't installed.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise HessoError("`--tasks` needs lm-eval: pip install 'hesso_hf[eval]'") from error
    results = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={model},trust_remote_code={arguments.trust_remote_code}",
        tasks=arguments.tasks.split(","), limit=arguments.limit,
        task_manager=TaskManager(include_path=arguments.include_path),
    )  # fmt: skip
    return {
        task: {key: value for key, value in scores.items() if isinstance(value, float | int)}
        for task, scores in results["results"].items()
    }
