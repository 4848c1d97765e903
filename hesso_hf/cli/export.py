"""`hesso-hf export`: the smaller model of a checkpoint, and the forms of it that other engines read.

Frameworks are imported inside the functions, after the flags and the files they name were checked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config.files import STATE_NAME
from ..config.names import DTYPE_NAMES
from ..errors import HessoError
from .printing import print_report


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
        "--for", nargs="+", dest="engines", choices=["onnx", "openvino", "gguf"], default=[], metavar="ENGINE",
        help="write it for onnx (ONNX Runtime), openvino or gguf (llama.cpp) too, compared there; of a model that is "
        "exported already only this, and no output is needed",
    )  # fmt: skip
    parser.add_argument("--converter", help="llama.cpp's convert_hf_to_gguf.py; default: that on the PATH")


def export(arguments: argparse.Namespace) -> None:
    """Write the smaller model of a checkpoint, for other engines too, and print its report."""
    checkpoint = Path(arguments.checkpoint)
    if not checkpoint.is_dir():
        raise HessoError(
            f"`checkpoint` ({arguments.checkpoint!r}) is no folder; give a checkpoint-* folder that training wrote"
        )
    if arguments.engines:
        from ..export.convert import check_conversion

        for engine in arguments.engines:
            check_conversion(engine, arguments.converter)
        _check_merged(checkpoint, arguments.lora_export)
    if arguments.output is None and (not arguments.engines or (checkpoint / STATE_NAME).exists()):
        raise HessoError("`output` must be given: a folder for the smaller model of a checkpoint")
    if arguments.output is not None:
        from ..export import export_pruned
        from ..export.storage import check_writable
        from ..hf_models.loading import without_bars

        check_writable("output", Path(arguments.output))
        with without_bars():
            report = export_pruned(
                checkpoint, arguments.output, dtype=arguments.dtype, trust_pickles=arguments.trust_pickles,
                overwrite_base=arguments.overwrite_base, lora_export=arguments.lora_export,
            )  # fmt: skip
        print_report(report.to_dict(), arguments.output)
        print(f"written in {report.seconds['writing']:.1f} s, verified in {report.seconds['verification']:.1f} s")
    _convert(Path(arguments.output or checkpoint), arguments.engines, arguments.converter)


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


def _convert(folder: Path, engines: list[str], converter: str | None) -> None:
    for engine in engines:
        from ..export.convert import convert

        found = convert(folder, engine, folder / engine, converter)
        print(
            f"{found.folder}: {found.agreed} of {found.written} tokens as Transformers writes them, relative error of "
            f"the logits {found.error:.1e} in fp32"
        )
