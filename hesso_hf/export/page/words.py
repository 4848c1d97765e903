"""What the names in a report mean, in words for someone who hasn't read the method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Report = Mapping[str, Any]  # what `pruning_report.json` says
STRUCTURES = {
    "attention_heads": "Parts of attention that each look at earlier tokens in a way of their own, with the keys and "
    "values that they share.",
    "query_heads": "Parts of attention that each look at earlier tokens in a way of their own; keys and values stay.",
    "mlp_channels": "Inner channels of the feed-forward block of each layer.",
    "expert_channels": "Inner channels of the experts, as many in each.",
    "mixer_channels": "Inner channels of the blocks that mix tokens by recurrence instead of attention.",
    "embedding_channels": "Channels of the stream that all layers read from and write to: the same in every layer.",
    "experts": "Whole experts, of which a router chooses a few for each token.",
    "layers": "Whole layers.",
}
SIZES = {
    "num_attention_heads": "query heads per layer",
    "num_key_value_heads": "key-value heads per layer",
    "intermediate_size": "channels of the feed-forward block",
    "hidden_size": "channels of the stream between layers",
    "num_hidden_layers": "layers",
}
SALIENCIES = {
    "magnitude": "how large its weights are",
    "avg_magnitude": "how large its weights are on average",
    "cosine_similarity": "how far its weights point another way than the gradient",
    "taylor_first_order": "how much the loss would move without it, by the slope of the loss",
    "taylor_second_order": "how much the loss would rise without it, by the curvature of the loss",
    "reconstruction": "how badly the units that stay could stand in for it",
}
PHASES = {
    "warmup": "ordinary training, nothing is removed yet",
    "sampling": "CRIC lets candidates shrink on trial, looks at what that does, and puts them back",
    "pruning": "the chosen units shrink to zero, a part of them in each period",
    "recovery": "ordinary training of what stays; the units at zero stay there",
}
TEXTS = {
    "eval_loss": "held-out examples",
    "eval_held_out_loss": "held-out examples",
    "eval_retained_loss": "other text",
}
VERIFIED = {
    "fold_error": (
        "error of the cut",
        "How far the smaller model is from the trained one with its removed units at zero, before anything is rounded.",
    ),
    "rounding_error": (
        "error with rounding",
        "The same after the weights were rounded to the type they are stored in, written, and read back.",
    ),
}

RECIPE = "hesso_recipe.yaml"  # the file beside a model


def named(name: str) -> str:
    """Return a name of the report in words."""
    return name.replace("mlp", "MLP").replace("warmup", "warm-up").replace("_", " ")


def extent_of(cric: Mapping[str, Any]) -> str:
    """Return how often CRIC looked, of what `pruning_report.json` has under `cric`."""
    if cric["mode"] == "healed":
        return f"a look in each of {cric['cycles']:,} periods" if cric["cycles"] > 1 else "one look"
    return f"{cric['cycles']:,} cycles, {cric['samples']:,} samples"


def taught_by(teacher: Mapping[str, Any] | None) -> bool:
    """Whether anything was learnt from a teacher on the training data; of earlier reports, whether there was one."""
    return bool(teacher and teacher["alpha"] and teacher.get("learnt", True))


def tried_in(cric: Mapping[str, Any]) -> dict[str, Any]:
    """Return what CRIC found of each structure that it had candidates of: of what stays whole it looked at none."""
    return {name: found for name, found in cric["structures"].items() if found["first"] or any(found["violating"])}


def logged(key: str) -> str:
    """Return what a loss is called, by the key that it is logged under."""
    return "training loss" if key == "loss" else f"loss on {text_of(key)}"


def text_of(key: str) -> str:
    """Return what text a loss is of, by the key that it is logged under."""
    return TEXTS.get(key) or named(key.removeprefix("eval_").removesuffix("_loss"))


def sized(name: str) -> str:
    """Return what a config size counts, with its name."""
    return f"{SIZES[name]} ({name})" if name in SIZES else name


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{share:.1%}"


def amount(cost: float) -> str:
    """Return a cost: a count whole, a time that is small with four digits."""
    return f"{cost:,.0f}" if cost >= 1000 else f"{cost:.4g}"


def scientific(error: float) -> str:
    """Return an error that may be very small."""
    return f"{error:.1e}" if error else "0"


def memory(count: int, largest: int) -> str:
    """Return a number of bytes in the unit that suits the largest of those it stands beside."""
    unit = min(3, max(1, (len(str(largest)) - 1) // 3))
    return f"{count / 1000**unit:,.2f}\u00a0{('kB', 'MB', 'GB')[unit - 1]}"


def stored_bytes(dtype: str) -> int:
    """Return the bytes of a parameter stored in a dtype by its name, such as `bfloat16`; 0 where that has no bits."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 0
