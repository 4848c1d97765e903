"""Which engine is asked, and what engines refuse; what they do is tested with real runs of each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hesso_hf import HessoConfig
from hesso_hf.engines.deepspeed.engine import DeepSpeedEngine
from hesso_hf.engines.engine import Engine, PlainEngine
from hesso_hf.engines.fsdp.engine import Fsdp2Engine
from hesso_hf.errors import HessoError
from hesso_hf.trainer.arguments import engine_of, refuse

ARGS: dict[str, Any] = {"learning_rate": 1e-4, "fp16": False, "auto_find_batch_size": False, "push_to_hub": False}


def fake_trainer(deepspeed: bool = False, fsdp: int | None = None, **changes: Any) -> Any:
    """Return what engines ask of a trainer: with a stage of ZeRO, or a version of FSDP."""
    settings = SimpleNamespace(config={"zero_optimization": {"stage": 2}})
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(fsdp_version=fsdp), deepspeed_plugin=SimpleNamespace(hf_ds_config=settings)
    )
    return SimpleNamespace(
        is_deepspeed_enabled=deepspeed, is_fsdp_enabled=fsdp is not None, accelerator=SimpleNamespace(state=state),
        is_model_parallel=False, is_distributed_loading_by_transformers=changes.pop("divided", False),
        args=SimpleNamespace(**(ARGS | changes)),
        processing_class=None, train_dataset=None,
    )  # fmt: skip


def engine(options: dict[str, Any], **config: Any) -> tuple[Any, Engine[Any]]:
    trainer = fake_trainer(**options)
    return trainer, engine_of(trainer, HessoConfig(pruning_ratio=0.5, **config))


@pytest.mark.parametrize(
    ("options", "chosen"), [({}, PlainEngine), ({"fsdp": 2}, Fsdp2Engine), ({"deepspeed": True}, DeepSpeedEngine)]
)
def test_accelerates_settings_choose_the_engine(options: dict[str, Any], chosen: type) -> None:
    trainer, found = engine(options)
    assert type(found) is chosen
    refuse(trainer, found, adapters=False)
    assert found.steps is None


@pytest.mark.parametrize(
    ("options", "config", "adapters", "message"),
    [
        ({"fsdp": 1}, {}, False, r"`fsdp_version` \(1\).* set it to 2"),
        ({"fsdp": 2}, {}, True, "LoRA together with FSDP or DeepSpeed.* use DDP"),
        ({"fsdp": 2}, {"prune_vocabulary": True}, False, r"`prune_vocabulary` \(True\).* sharded; leave it out"),
        ({"deepspeed": True}, {}, True, "LoRA together with FSDP or DeepSpeed.* use DDP"),
        ({"deepspeed": True}, {"prune_vocabulary": True}, False, r"`prune_vocabulary` \(True\).* DeepSpeed; leave it"),
        ({"fp16": True}, {}, True, r"`fp16` \(True\) with LoRA.* use bf16"),
        ({"divided": True}, {}, False, r"`tp_plan` or `distributed_config`.* choose FSDP2"),
        ({"auto_find_batch_size": True, "fsdp": 2}, {}, False, "can't have the others begin again; set a batch size"),
        ({"auto_find_batch_size": True, "deepspeed": True}, {}, False, "`auto_find_batch_size` .* set a batch size"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_by_name(
    options: dict[str, Any], config: dict[str, Any], adapters: bool, message: str
) -> None:
    trainer, found = engine(options, **config)
    with pytest.raises(HessoError, match=message):
        refuse(trainer, found, adapters)
