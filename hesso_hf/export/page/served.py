"""How to serve a smaller model, in lines that its card and its page share."""

from __future__ import annotations

from .words import Report

_COMMANDS = {
    "vLLM": "vllm serve path/to/this/model",
    "llama.cpp": "hesso-hf export path/to/this/model --for gguf",
}
MORE = "Engines, conversions and quantisation: docs/serving.md of hesso_hf."


def serving_commands(report: Report) -> list[str]:
    """Return a command for each engine that serves the model as it is."""
    return [_COMMANDS[engine] for engine in report.get("engines") or ()]


def serving_note(uneven: bool) -> str:
    """Say where more is told, or that no engine knows a modelling file of a model's own."""
    if uneven:
        return "Only Transformers serves it, with trust_remote_code: no other engine knows its modelling file."
    return MORE


def loader_of(report: Report) -> str:
    """Return the name of Transformers' class that loads the model."""
    name = report.get("model_class") or "AutoModelForCausalLM"
    if report.get("stock_class") is False:
        return report.get("loader") or "AutoModelForCausalLM"  # which older reports don't say
    return "AutoModelForCausalLM" if name.endswith("ForCausalLM") else name
