"""What launches a recipe: accelerate's configurations, SLURM scripts, Kubernetes. Recipes run in test_cli.py."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import OffloadPolicy

from hesso_hf.cli.memory.workload import ENGINES, EngineSpec
from tests.support import ROOT

CONFIGS = sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))
FSDP2 = [path for path in CONFIGS if "fsdp2" in path.stem]
ZERO = [path for path in CONFIGS if "zero" in path.stem]
SCRIPTS = sorted((ROOT / "recipes" / "slurm").glob("*.slurm"))
KUBERNETES = sorted((ROOT / "recipes" / "kubernetes").glob("*.yaml"))


def name_of(path: Path) -> str:
    return path.name


def launcher_options() -> set[str]:
    return {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}


def launched(path: Path) -> Any:
    """Return the arguments that `accelerate launch --config_file path` ends up with."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("path", [*CONFIGS, *SCRIPTS, *KUBERNETES], ids=name_of)
def test_header_says_the_command(path: Path) -> None:
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("#")
    assert "hesso_hf prune" in header


def test_the_list_has_every_recipe() -> None:
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    linked = {ROOT / "recipes" / target for target in re.findall(r"\]\(((?!\.\.)[^)]+)\)", page)}
    there = set((ROOT / "recipes").rglob("*.yaml")) | set((ROOT / "recipes").rglob("*.py"))
    assert linked == there - set(CONFIGS) - set(KUBERNETES)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_accelerate_loads_the_configuration_and_knows_every_key(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    known = launcher_options()
    for part in ("fsdp_config", "deepspeed_config"):
        assert set(values.get(part, {})) <= known
    kind = {"ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}.get(path.stem, "FSDP")
    assert config.distributed_type == DistributedType(kind)
    assert config.num_processes == values["num_processes"] == 8 * values["num_machines"]


@pytest.mark.parametrize("path", FSDP2, ids=name_of)
def test_fsdp2_reaches_the_plugin(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launched(path)
    assert arguments.use_fsdp
    assert arguments.mixed_precision == "bf16"
    arguments.num_machines, arguments.num_processes = 1, 2  # the rest of the environment is the nodes'
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert str(plugin.state_dict_type).endswith("SHARDED_STATE_DICT")
    assert not plugin.activation_checkpointing
    assert type(plugin.cpu_offload) is OffloadPolicy  # nothing is offloaded


@pytest.mark.parametrize("path", ZERO, ids=name_of)
def test_deepspeed_stage_is_that_of_the_name(path: Path) -> None:
    arguments = launched(path)
    assert arguments.use_deepspeed
    assert f"zero{arguments.zero_stage}" == path.stem
    assert arguments.deepspeed_config_file is None  # the optimizer stays the trainer's


@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_every_engine_has_a_configuration(engine: EngineSpec) -> None:
    for nodes in (1, 2):
        path = ROOT / engine.config_file(nodes)
        assert path in CONFIGS
        key = engine.setting.partition(":")[0]
        values = yaml.safe_load(path.read_text())
        assert not key or key in values.get("fsdp_config", {}) | values.get("deepspeed_config", {})


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_slurm_script_is_valid_saves_at_a_signal_and_resumes(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    text = path.read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", text, re.MULTILINE))
    assert directives["signal"] == "TERM@600"
    assert directives["ntasks-per-node"] == "1"  # one launcher a node; it starts a process a GPU
    assert "requeue" in directives
    assert "--enable_jit_checkpoint true --resume_from_checkpoint auto" in text
    for word in re.findall(r"recipes/[\w./-]+\.(?:yaml|slurm)", text):
        assert (ROOT / word).is_file(), word
    flags = set(re.findall(r"--(\w+) (?:\"|recipes)", text.partition("launch --")[2].partition("-m hesso_hf")[0]))
    assert flags <= launcher_options()


def test_slurm_script_of_several_nodes_gives_each_its_rank(tmp_path: Path) -> None:
    """The script itself, with stand-ins for SLURM's commands and the launcher."""
    for name, body in {
        "scontrol": "echo one; echo two",
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'echo "$@" >> "$CALLS"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls), "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "[one-two]", "SLURM_JOB_ID": "4007", "SLURM_GPUS_ON_NODE": "4",
    }  # fmt: skip
    script = ROOT / "recipes" / "slurm" / "multi_node_fsdp2.slurm"
    done = subprocess.run(
        ["bash", str(script), "r.yaml", "--run_name", "two words"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = calls.read_text().splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert f"--num_machines 2 --num_processes 8 --machine_rank {rank} --main_process_ip one" in line
        assert "--main_process_port 29507 -m hesso_hf prune r.yaml" in line
        assert line.endswith("--run_name two words")


@pytest.mark.parametrize("path", KUBERNETES, ids=name_of)
def test_kubernetes_file_has_what_a_run_needs(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert (values["apiVersion"], values["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = values["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {item["name"]: item["value"] for item in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == int(env["NUM_NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(env["GPUS_PER_NODE"])
    name = values["metadata"]["name"]
    assert env["MAIN_ADDRESS"] == f"{name}-{replicated['name']}-0-0.{name}"
    assert pod["terminationGracePeriodSeconds"] > int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    command = container["args"][0]
    assert '--machine_rank "$JOB_COMPLETION_INDEX"' in command
    assert "--enable_jit_checkpoint true --resume_from_checkpoint auto" in command
    for word in (env["RECIPE"], *re.findall(r"recipes/\S+\.yaml", command)):
        assert (ROOT / word).is_file()
    assert set(re.findall(r"--(\w+)", command.partition("-m hesso_hf")[0])) <= launcher_options()
