"""`hesso-hf export`: the smaller model of a checkpoint, and the forms of it that other engines read.

Frameworks are imported inside the functions, after the flags and the files they name were checked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config.files import REPORT_NAME, STATE_NAME
from ..config.names import DTYPE_NAMES
from ..errors import HessoError
from .printing import print_report

GGUF = "gguf"  # the engine whose form an own program writes
_OF_AN_EXPORT = ("dtype", "trust_pickles", "overwrite_base", "lora_export")  # flags that a conversion has no use for


def export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="checkpoint-* folder of a run whose pruning has finished; one layer at a time is in memory, but for "
        "adapters, DeepSpeed's and FSDP's files, and removed tokens",
    )
    parser.add_argument("output", nargs="?", help="folder for the smaller model")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="stored dtype")
    parser.add_argument("--trust-pickles", action="store_true", help="open DeepSpeed's files, which can run code")
    parser.add_argument(
        "--lora-export", choices=["merged", "adapter"],
        help="of a model with adapters: merged into one model, or apart, which no other engine takes (default: the "
        "run's)",
    )  # fmt: skip
    parser.add_argument("--overwrite-base", action="store_true", help="OUTPUT may be the base model's folder")
    parser.add_argument(
        "--for", nargs="+", dest="engines", choices=["onnx", "openvino", "aotinductor", GGUF], default=[],
        metavar="ENGINE",
        help="write it for onnx (ONNX Runtime), openvino, aotinductor (compiled by torch) or gguf (llama.cpp) too, "
        "compared there; of a model that is exported already only this, in its own folder where no output is given",
    )  # fmt: skip
    parser.add_argument("--converter", help="llama.cpp's convert_hf_to_gguf.py; default: that on the PATH")


def export(arguments: argparse.Namespace) -> None:
    """Write the smaller model of a checkpoint, for other engines too, and print its report."""
    checkpoint = Path(arguments.checkpoint)
    if not checkpoint.is_dir():
        raise HessoError(
            f"`checkpoint` ({arguments.checkpoint!r}) is no folder; give a checkpoint-* folder that training wrote"
        )
    converts_only = _check_flags(arguments, checkpoint)
    if arguments.engines:
        from ..export.convert import check_conversion

        for engine in arguments.engines:
            check_conversion(engine, _converter(engine, arguments.converter))
        _check_merged(checkpoint, arguments.lora_export)
    from ..export.storage import check_writable

    folder = Path(arguments.output or checkpoint)
    check_writable("output" if arguments.output else "checkpoint", folder)
    if not converts_only:
        from ..export import export_pruned
        from ..hf_models.loading import without_bars

        with without_bars():
            report = export_pruned(
                checkpoint, folder, dtype=arguments.dtype, trust_pickles=arguments.trust_pickles,
                overwrite_base=arguments.overwrite_base, lora_export=arguments.lora_export,
            )  # fmt: skip
        print_report(report.to_dict(), arguments.output)
        print(f"written in {report.seconds['writing']:.1f} s, verified in {report.seconds['verification']:.1f} s")
    _convert(checkpoint if converts_only else folder, folder, arguments.engines, arguments.converter)


def _check_flags(arguments: argparse.Namespace, checkpoint: Path) -> bool:
    """Tell whether a model is only converted, as one that is exported already; refuse what would be ignored."""
    if arguments.converter is not None and GGUF not in arguments.engines:
        raise HessoError(f"`--converter` ({arguments.converter!r}) does nothing without `--for {GGUF}`: give that too")
    exported = not (checkpoint / STATE_NAME).exists()
    if arguments.output is None and not (arguments.engines and exported):
        raise HessoError("`output` must be given: a folder for the smaller model of a checkpoint")
    exported = exported and (arguments.output is None or (checkpoint / REPORT_NAME).exists())
    if not (arguments.engines and exported):
        return False
    ignored = [name for name in _OF_AN_EXPORT if getattr(arguments, name)]
    if ignored:
        flags = ", ".join(f"`--{name.replace('_', '-')}`" for name in ignored)
        raise HessoError(
            f"{flags}: the model in {checkpoint} is exported already, and `--for` only converts it, in float32; leave "
            "this out, or give the checkpoint-* folder that it came of, and an output"
        )
    return True


def _converter(engine: str, given: str | None) -> str | None:
    """Return what an engine takes of the flag that one of them needs."""
    return given if engine == GGUF else None


def _check_merged(checkpoint: Path, asked: str | None) -> None:
    """Refuse to convert what would be written with its adapter apart, before that is written."""
    from ..export.checkpoint_state import read_state
    from ..structures.lora import ADAPTER_CONFIG

    if not (checkpoint / ADAPTER_CONFIG).exists():
        return
    ours = (checkpoint / STATE_NAME).exists()
    wanted = asked or (read_state(checkpoint)["config"].get("lora_export") if ours else None)
    if wanted == "adapter":
        raise HessoError(
            f"`--for`: the adapter of {checkpoint} would be written apart (lora_export='adapter'), and other engines "
            "take one model; add `--lora-export merged`"
        )


def _convert(model: Path, folder: Path, engines: list[str], converter: str | None) -> None:
    """Write a model for other engines, each into a folder of its own in `folder`."""
    for engine in engines:
        from ..export.convert import convert

        found = convert(model, engine, folder / engine, _converter(engine, converter))
        print(
            f"{found.folder}: {found.agreed} of {found.written} tokens as Transformers writes them, relative error of "
            f"the logits {found.error:.1e} in fp32"
        )
