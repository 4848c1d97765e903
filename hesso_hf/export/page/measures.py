"""What `hesso-hf eval` measures of a model, in the words and digits of its own table, of a card and of a page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One thing that is measured.

    Attributes:
        label: what tables call it; `{}` stands for the batch size.
        form: how it is written.
        by_ratio: whether it compares by a ratio.
    """

    label: str
    form: str
    by_ratio: bool = True


SPEEDS = {
    "tokens_per_second_alone": Measure("prefill tokens/s, batch 1", ",.0f"),
    "tokens_per_second": Measure("prefill tokens/s, batch {}", ",.0f"),
    "first_token_seconds": Measure("first token (s)", ".4f"),
    "tokens_written_per_second": Measure("decode tokens/s, batch 1", ",.1f"),
    "tokens_written_per_second_in_batches": Measure("decode tokens/s, batch {}", ",.1f"),
}
MEASURES = {
    "parameters": Measure("parameters", ","),
    "bytes": Measure("bytes on disk", ","),
    "memory": Measure("bytes in memory", ","),
    "peak_memory": Measure("peak memory (bytes)", ","),
    "flops_per_token": Measure("FLOPs per token", ",.0f"),
    "tokens": Measure("tokens predicted", ","),
    "loss": Measure("loss (nats per token)", ".4f", by_ratio=False),
    "perplexity": Measure("perplexity", ".4f"),
    **SPEEDS,
}
# Of them, what a smaller model's report has beside the tasks: its other sizes are in it anyway.
COMPARED = ("peak_memory", "loss", "perplexity", *SPEEDS)
OF_THE_MACHINE = ("peak_memory", *SPEEDS)  # which say as much of the machine as of the model
