"""What an upgrade may break: every private name that the library uses is known, and is what the library takes it for.

A name that is used in one way is a function of `hesso_hf.compat`; the others stand in the tables here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, masking_utils

import hesso_hf
from hesso_hf import HessoMixin, compat
from hesso_hf.distributed.parts import reshard
from hesso_hf.structures.in_place import set_data
from tests.support.tiny import tiny_llama

PACKAGE = Path(hesso_hf.__file__).parent
STANDARD_LIBRARY = {"_SubParsersAction", "_actions"}  # argparse's

# -- the tables: what is overridden or read where it belongs -----------------------------------------------------------

# Parameters of these methods that the oldest Transformers hasn't.
NEWER = ("private",)

# Methods of transformers.Trainer that the mixin overrides, with the parameters that it counts on.
TRAINER_OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "_clip_grad_norm": ("model",),
    "_determine_best_metric": ("metrics", "trial"),
    "_get_grad_norm": ("model", "grad_norm"),
    "_inner_training_loop": ("batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_run_epoch": (
        "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
        "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "_save_checkpoint": ("model", "trial"),
    "_save_rng_state": ("output_dir",),
    "_wrap_model": ("model", "training", "dataloader"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "create_model_card": (
        "language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset",
        "dataset_args",
    ),
    "create_accelerator_and_postprocess": (),
    "create_optimizer": ("model",),
    "create_optimizer_and_scheduler": ("num_training_steps",),
    "log": ("logs", "start_time"),
    "push_to_hub": ("commit_message", "blocking", "token", "revision", "kwargs"),
    "save_model": ("output_dir", "_internal_call"),
    "store_flos": (),
    "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}  # fmt: skip

# Methods of transformers.Trainer without a documented form that the mixin calls.
TRAINER_CALLS: Mapping[str, tuple[str, ...]] = {
    "_finish_current_push": (),
    "_get_collator_with_removed_columns": ("data_collator", "description"),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_get_output_dir": ("trial",),
    "_prepare_inputs": ("inputs",),
    "compute_loss_context_manager": (),
    "get_tp_size": (),
    "init_hf_repo": ("token",),
    "set_initial_training_values": ("args", "dataloader"),
}

# Attributes of a transformers.Trainer that its documentation doesn't promise.
TRAINER_ATTRIBUTES = (
    "compute_loss_func",
    "current_gradient_accumulation_steps",
    "hub_model_id",
    "is_distributed_loading_by_transformers",
    "loss_is_scaled_for_ga",
    "model_accepts_loss_kwargs",
)

# Fields of DeepSpeed's ZeRO optimizers (deepspeed.runtime.zero), by the file that sets them.
ZERO_FIELDS: Mapping[str, tuple[str, ...]] = {
    "stage_1_and_2": (
        "bit16_groups", "check_grad_overflow", "cpu_offload", "destroy", "loss_scaler", "param_names",
        "single_partition_of_fp32_groups", "update_lp_params",
    ),
    "stage3": (
        "destroy", "dp_process_group", "fp16_groups", "fp32_partitioned_groups_flat", "get_param_id", "grad_position",
        "loss_scaler", "param_names", "parameter_offload", "persistent_parameters", "sub_group_to_group_id",
    ),
    "partition_parameters": ("convert_to_zero_parameters",),
}  # fmt: skip

# Private names that are used where they belong, and whose they are.
PRIVATE_NAMES: Mapping[str, str] = {
    "_attn_implementation": "transformers.configuration_utils",
    "_created_lr_scheduler": "transformers.trainer",
    "_buffers": "torch.nn.modules.module",
    "_experts_implementation": "transformers.configuration_utils",
    "_gradient_checkpointing_func": "transformers.modeling_layers",
    "_enable_checkpoint": "transformers.trainer_jit_checkpoint.CheckpointManager",
    "_hf_deepspeed_config_weak_ref": "transformers.integrations.deepspeed",
    "_hp_mapping": "deepspeed.utils.tensor_fragment",
    "_loss_shifts_labels": "transformers.trainer",
    "_index_in_param_group": "deepspeed.utils.mixed_precision_linkage",
    "_inductor": "torch._inductor.__init__",
    "_model_mapping": "transformers.models.auto.auto_factory",
    "_new_buffer": "torchao.optim.adam",
    "_no_split_modules": "transformers.modeling_utils",
    "_optimizers": "accelerate.accelerator",
    "_save_checkpoint": "transformers.trainer",
    "_train_batch_size": "transformers.trainer",
}


def parameters_of(method: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(Trainer, method)).parameters)[1:]


@pytest.mark.parametrize("method", sorted(TRAINER_OVERRIDES))
def test_overridden_methods_of_the_trainer_take_what_they_took(method: str) -> None:
    found = tuple(name for name in parameters_of(method) if name not in NEWER)
    assert found == TRAINER_OVERRIDES[method]


@pytest.mark.parametrize("method", sorted(TRAINER_CALLS))
def test_called_methods_of_the_trainer_take_what_they_are_given(method: str) -> None:
    assert parameters_of(method)[: len(TRAINER_CALLS[method])] == TRAINER_CALLS[method]


def test_every_overridden_method_is_in_the_table() -> None:
    own = [base for base in HessoMixin.__mro__ if base.__module__.startswith("hesso_hf.")]
    found = {name for base in own for name in vars(base) if callable(getattr(Trainer, name, None))}
    assert {name for name in found if not name.startswith("__")} == TRAINER_OVERRIDES.keys()


@pytest.mark.parametrize("name", TRAINER_ATTRIBUTES)
def test_the_trainer_has_the_attributes(name: str) -> None:
    assert f"self.{name}" in inspect.getsource(Trainer)


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in ZERO_FIELDS.items() for n in names])
def test_zero_has_the_fields(module: str, name: str) -> None:
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        pytest.skip("deepspeed isn't installed")
    source = (Path(spec.origin).parent / "runtime" / "zero" / f"{module}.py").read_text(encoding="utf-8")
    assert f"self.{name} =" in source or f"def {name}(" in source


@pytest.mark.parametrize("name", sorted(PRIVATE_NAMES))
def test_private_names_are_where_they_were(name: str) -> None:
    parts = PRIVATE_NAMES[name].split(".")
    if importlib.util.find_spec(parts[0]) is None:
        pytest.skip(f"{parts[0]} isn't installed")
    folder = Path(str(importlib.util.find_spec(parts[0]).origin)).parent  # type: ignore[union-attr]
    file = folder.joinpath(*[part for part in parts[1:] if not part[0].isupper()]).with_suffix(".py")
    assert name in file.read_text(encoding="utf-8")


def test_no_private_name_is_used_that_is_not_known() -> None:
    """Attributes of other objects than `self`, and imports from other packages."""
    known = set(PRIVATE_NAMES) | STANDARD_LIBRARY
    own, used = set(), {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
            names: list[str] = []
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [alias.name for alias in node.names]
            for name in names:
                if name.startswith("_") and not name.startswith("__") and path.name != "compat.py":
                    used.setdefault(name, path.relative_to(PACKAGE))
    own |= {name for name in TRAINER_OVERRIDES if name != "_save_checkpoint"}  # by super()
    own |= TRAINER_CALLS.keys()
    assert {name: str(path) for name, path in used.items() if name not in known | own} == {}


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_the_store_is_the_one_that_processes_share() -> None:
    compat.default_store().set("a", "b")
    assert compat.default_store().get("a") == b"b"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("static", [False, True])
def test_gradients_are_averaged_where_parameters_have_other_shapes_and_some_are_gone(static: bool) -> None:
    layers = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    parallel = DistributedDataParallel(layers, static_graph=static)
    parallel(torch.ones(1, 5)).sum().backward()
    del layers[1]
    for parameter, shape in {layers[0].weight: (4, 5), layers[0].bias: (4,), layers[1].weight: (2, 4)}.items():
        set_data(parameter, torch.ones(shape))
    layers.zero_grad()
    compat.refit(parallel)
    assert len(parallel._module_parameters) == 4
    for _ in range(2):  # buckets are made anew after the first backward pass
        parallel(torch.ones(1, 5)).sum().backward()
    assert layers[0].weight.grad.tolist() == [[4.0] * 5] * 4


@pytest.mark.usefixtures("alone")
def test_fsdp2_trains_other_shards_and_has_the_old_ones_back() -> None:
    mesh, ids = init_device_mesh("cpu", (1,)), torch.ones(1, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4))
    for module in (*model, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    expected = model(ids)
    expected.sum().backward()
    reshard(model)
    old, first, undo = list(model.parameters()), model[0].weight, []
    shapes = {old[0]: (5, 4), old[1]: (5,), old[2]: (4, 5)}

    def smaller(parameter: nn.Parameter) -> DTensor | None:
        if parameter in shapes:
            return distribute_tensor(torch.ones(shapes[parameter]), mesh, [Shard(0)])
        return parameter.detach() if parameter is old[3] else None  # none of the layer that goes

    def failing(parameter: nn.Parameter) -> DTensor | None:
        return None if parameter is first else distribute_tensor(torch.ones(shapes[parameter]), mesh, [Shard(1)])

    with compat.in_shards_dtype(model):
        compat.put_shards(model, smaller, undo)
        dropped = model[2]
        del model[2]
        compat.drop_states(model, undo)
        assert (model(ids) - 25.0 - old[3].full_tensor()).abs().max() < 1e-5
        reshard(model)
    compat.put_shards(model, lambda parameter: parameter.detach(), undo)
    assert len(compat.fsdp_states(model)) == len(compat.fsdp_states(model)[0]._state_ctx.all_states) == 3
    assert [parameter.shape for parameter in model.parameters()] == [(5, 4), (5,), (4, 5), (4,)]
    found = model(ids)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert model[0].weight.grad.full_tensor().tolist() == [[4.0] * 4] * 5
    model.load_state_dict({name: value.detach().clone() for name, value in model.state_dict().items()})
    reshard(model)
    with pytest.raises(KeyError):
        compat.put_shards(model, failing, undo)
    undo.insert(2, lambda: model.append(dropped))  # before the states are those of all modules again
    while undo:
        undo.pop()()
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), old, strict=True))
    model.load_state_dict({name: value.detach().clone() for name, value in model.state_dict().items()})
    assert torch.equal(model(ids), expected)


@pytest.mark.usefixtures("alone")
def test_what_a_refitted_ddp_would_lose_is_named() -> None:
    assert not compat.why_not_refit(DistributedDataParallel(nn.Linear(2, 2)))
    hooked = DistributedDataParallel(nn.Linear(2, 2))
    hooked.register_comm_hook(None, default_hooks.allreduce_hook)
    assert compat.why_not_refit(hooked) == "DDP has a communication hook"
    grouped = DistributedDataParallel(nn.Linear(2, 2), process_group=dist.new_group([0]))
    assert compat.why_not_refit(grouped) == "DDP is over a process group of its own"


def test_tensors_of_a_module_are_replaced_and_stay_saved_or_not() -> None:
    module = nn.BatchNorm1d(3)
    module.register_buffer("unsaved", torch.zeros(1), persistent=False)
    compat.set_buffer(module, "unsaved", torch.ones(2))
    compat.set_buffer(module, "running_mean", torch.ones(2))
    compat.set_parameter(module, "weight", nn.Parameter(torch.full((2,), 5.0)))
    assert module.state_dict()["running_mean"].tolist() == [1, 1]
    assert "unsaved" not in module.state_dict()
    assert module.unsaved.tolist() == [1, 1]
    assert dict(module.named_parameters())["weight"].tolist() == [5, 5]


def test_hooks_are_those_that_run_and_can_be_taken_off() -> None:
    module, seen = nn.Identity(), []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module(torch.zeros(1))
    assert seen == ["before", "after"]
    for hooks in compat.forward_hooks(module):
        hooks.clear()
    module(torch.zeros(1))
    assert seen == ["before", "after"]


def test_attention_is_what_the_model_computes_with() -> None:
    model = tiny_llama()
    assert compat.supports_sdpa(model)
    compat.set_attention(model.config, "eager")
    assert compat.attention_of(model.config) == "eager"
    assert model(torch.zeros(1, 3, dtype=torch.long), output_attentions=True).attentions[0] is not None


def test_rows_of_token_ids_alone_are_not_looked_through_for_packed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny_llama().eval(), []
    inputs = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]), "use_cache": False}  # with a cache nothing is asked
    plain = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: asked.append(ids) or plain(ids))
    expected = model(**inputs).logits
    assert len(asked) == 1, "a forward asks otherwise now"
    with compat.whole_rows(inputs):
        assert torch.equal(model(**inputs).logits, expected)
    assert len(asked) == 1
    packed = inputs | {"position_ids": torch.tensor([[0, 1, 0], [0, 1, 2]])}
    with compat.whole_rows(packed):
        model(**packed)
    assert len(asked) == 2


def test_tensors_are_multiplied_in_one_call_around_what_is_added_to_them() -> None:
    tensors = [torch.tensor([[1.5, -3.0], [0.1, 7.0]]), torch.tensor([0.7, 0.3])]
    factors = [torch.tensor([[0.5], [1.0]]), torch.tensor([1.0, 0.0])]
    expected = [tensors[0] * 0.5, tensors[0].clone(), torch.tensor([0.7, -1.0])]
    compat.multiply_all_(tensors[:1], factors[:1])
    compat.multiply_all_(tensors[1:], factors[1:], shift=1.0)
    assert torch.equal(tensors[0][0], expected[0][0])
    assert torch.equal(tensors[0][1], expected[1][1])
    assert torch.equal(tensors[1], expected[2])


def test_a_model_is_built_in_a_dtype() -> None:
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    assert compat.build_model(LlamaForCausalLM, config, torch.bfloat16).dtype == torch.bfloat16


def test_deepspeed_has_the_options_under_the_name() -> None:
    engine = pytest.importorskip("deepspeed.runtime.engine")
    source = inspect.getsource(engine.DeepSpeedEngine)
    assert "self._config.load_universal_checkpoint" in source
    for name in ("config", "module_forward_pre_hook", "module_forward_post_hook", "lr_scheduler"):
        assert f"self.{name} =" in source
