"""The pruning decision beside a checkpoint's weights, so that it can be checked, resumed and exported alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..config import HessoConfig
from ..config.files import CARD_NAME, PRUNING_NAME, STATE_NAME
from ..distributed.collectives import common, world_size
from ..distributed.parts import full_shape, named_parameters
from ..errors import CheckpointMismatchError
from ..structures.lora import num_parameters

logger = logging.get_logger(__name__)

_CARD = """---
tags:
- hesso
---

# A dense model, not the smaller one

This is a checkpoint of a run that prunes. What it holds, or what its adapter belongs to, is as
large as the base model. {done}

Once pruning has finished, this writes the smaller model, which plain `from_pretrained` loads:

```bash
hesso-hf export {folder} small
```
"""
_SMALLER_CARD = """---
tags:
- hesso
---

# The smaller model, in training

This is a checkpoint of a run that prunes. The pruned units were cut out after step {step}, so what it holds is the
smaller model, which plain `from_pretrained` loads, and which is still being trained. To train on from here, load the
model that the run began with and `resume_from_checkpoint`. This writes the smaller model with its report:

```bash
hesso-hf export {folder} small
```
"""
_ADAPTER_CARD = """---
tags:
- hesso
---

# An adapter of the smaller model, in training

This is a checkpoint of a run that prunes. The pruned units were cut out of the base model and of its adapter after step
{step}, and only the adapter is here: it fits neither the base model on disk nor what `from_pretrained` and PEFT make
of that. To train on from here, load the model that the run began with and `resume_from_checkpoint`. This writes the
smaller model with its report:

```bash
hesso-hf export {folder} small
```
"""
_NOT_VALID = "Can't find a valid checkpoint at"  # what `Trainer` says of a folder that it can't resume from
SHARDS_NAME = f"{FSDP_MODEL_NAME}_0"  # folder of the model's parts in a sharded run's checkpoint


def write_state(
    folder: Path,
    decision: Mapping[str, Any],
    config: HessoConfig,
    training: Mapping[str, Any],
    adapter: bool = False,
) -> None:
    """Write what `PruningProcess.decision` says, the config and the training record, atomically.

    A card beside it tells whoever finds the folder whether the model in it is the smaller one.

    Args:
        adapter: whether the folder holds an adapter alone.
    """
    compaction = training.get("compaction")
    smaller, cut = ("adapter of the smaller model", _ADAPTER_CARD) if adapter else ("smaller", _SMALLER_CARD)
    card = cut.format(folder=folder, **compaction) if compaction else _card(folder, decision)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    staged = folder / f"{STATE_NAME}.tmp"
    state = {
        **decision,
        "holds": smaller if compaction else "dense",
        "config": config.to_dict(),
        "training": training,
    }
    staged.write_text(json.dumps(state), encoding="utf-8")
    os.replace(staged, folder / STATE_NAME)


def _card(folder: Path, decision: Mapping[str, Any]) -> str:
    done = "Its pruned units are at zero, and still there." if decision["finished"] else (
        f"Pruning hasn't finished: it is at step {decision['step']} of {decision['schedule_end']}. Train on from here "
        "(`resume_from_checkpoint`), and export a later checkpoint."
    )  # fmt: skip
    return _CARD.format(done=done, folder=folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        CheckpointMismatchError: where there is no such folder, or it has no pruning state.
    """
    path = folder / STATE_NAME
    if not folder.is_dir():
        there = sorted(path.name for path in folder.parent.glob("checkpoint-*"))
        others = f"there are: {there}" if there else f"nor is there another checkpoint in {folder.parent}"
        raise CheckpointMismatchError(
            f"{_NOT_VALID} {folder}: `resume_from_checkpoint` ({str(folder)!r}) doesn't exist; {others}"
        )
    if not path.exists():
        raise CheckpointMismatchError(
            f"{_NOT_VALID} {folder}: `resume_from_checkpoint` ({str(folder)!r}) holds no pruning state: it was not "
            "written by HessoTrainer; load its weights as the model and start a new run"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def check_resumable(folder: Path, model: PreTrainedModel) -> None:
    """Refuse a checkpoint whose pruning state wasn't saved, with the optimizer's or alone, or of another model's run.

    Raises:
        CheckpointMismatchError: where there is no pruning state, or weights have other shapes.
    """
    compaction = read_state(folder)["training"].get("compaction")
    if compaction is None or num_parameters(model) != compaction["parameters_before"]:
        _check_shapes(folder, model)
    sharded = holds_masters(folder) or any(path.is_dir() for path in folder.glob("optimizer_*"))  # FSDP2's
    alone = (OPTIMIZER_NAME, "optimizer.bin", PRUNING_NAME)
    if not sharded and not any((folder / name).exists() for name in alone):
        raise CheckpointMismatchError(
            f"{_NOT_VALID} {folder}: `resume_from_checkpoint` ({str(folder)!r}) holds neither {OPTIMIZER_NAME} nor "
            f"{PRUNING_NAME}: save_only_model under FSDP or DeepSpeed leaves both out; export it, or start a new run "
            "from its weights"
        )


def _check_shapes(folder: Path, model: PreTrainedModel) -> None:
    shapes = {name: tuple(full_shape(parameter)) for name, parameter in named_parameters(model).items()}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in sorted(set(stored.keys()) & shapes.keys()):
                found = tuple(stored.get_slice(name).get_shape())
                if found != shapes[name]:
                    raise CheckpointMismatchError(
                        f"{folder} holds {name} of shape {found}, that of `model` is {shapes[name]}: go on with the "
                        "model that the run began with"
                    )


def load_converted_(model: PreTrainedModel, folder: Path) -> None:
    """Load weights that a class stores under other names than it holds them by, as it does those of fused experts.

    `Trainer` takes from a checkpoint only what has the same name, and leaves such weights as they are.
    """
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            names.update(stored.keys())
    if names <= model.state_dict().keys():
        return
    logger.info(f"{type(model).__name__} stores weights under other names: they are loaded through `from_pretrained`")
    model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


def holds_masters(folder: Path) -> bool:
    """Whether DeepSpeed wrote its fp32 masters into a checkpoint."""
    return any(path.is_dir() for path in folder.glob("global_step*"))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose last file, the trainer's state, was written; name half-written ones."""
    return next(_whole_checkpoints(folder), None)


def last_common_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole for every process; all call it.

    Nodes with disks of their own may have been killed when some of them had written a checkpoint and others hadn't.
    """
    if world_size() == 1:
        return last_checkpoint(folder)
    steps = common({_step_of(path) for path in _whole_checkpoints(folder)})
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{max(steps)}" if steps else None


def _whole_checkpoints(folder: Path) -> Iterator[Path]:
    """Yield them, the newest first."""
    for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"), key=_step_of, reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            logger.warning(f"{path} is half-written (no valid {TRAINER_STATE_NAME}) and is passed over")
            continue
        yield path


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


# what checkpoints from before a key of HessoConfig did
_BEFORE = {
    "stream_basis": "given", "stream_basis_tolerance": 0.05, "healing": "off", "replay_share": 0.0,
    "warmup_steps": 0.05, "pruning_steps": 0.15, "quality_examples": 0, "compact": "never",
    "ladder_recovery": 0.0, "distillation_alpha": 0.0, "cric": False,
}  # fmt: skip
# keys whose default was another one
_MOVED = (
    "stream_basis", "healing", "replay_share", "warmup_steps", "pruning_steps", "quality_examples", "compact",
    "distillation_alpha", "cric",
)  # fmt: skip
_DECIDED_FIRST = ("distillation_alpha", "cric")  # before a checkpoint is read: what was asked for is to be again


def keep_defaults(saved: Mapping[str, Any], config: HessoConfig, folder: str) -> None:
    """Have a run go on with the defaults of its checkpoint's time, where it asks for nothing but today's."""
    for key in _MOVED:
        before = saved.get(key, _BEFORE[key])
        asked = key in _DECIDED_FIRST and before != _BEFORE[key]
        if getattr(config, key) == HessoConfig.__dataclass_fields__[key].default != before and not asked:
            logger.warning(f"{folder} was made with `{key}` = {before!r}, and the run goes on so")
            setattr(config, key, before)


def check_config(saved: dict[str, Any], current: dict[str, Any], folder: str) -> None:
    """Compare a checkpoint's HessoConfig with a run's, but for what only the export reads.

    Raises:
        CheckpointMismatchError: naming the first field that differs.
    """
    for key, value in current.items():
        before = saved.get(key, _BEFORE.get(key))
        if key not in ("export_dtype", "lora_export", "overwrite_base") and before != json.loads(json.dumps(value)):
            raise CheckpointMismatchError(
                f"{folder} was made with `{key}` = {before!r}, this run has {value!r}; "
                "resume with the same HessoConfig or start a new run"
            )
