"""Sharded parameters: two and four real processes with FSDP2 prune what one process prunes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from safetensors.torch import load_file
from sharded import CRIC, HESSO, launch
from transformers import AutoModelForCausalLM

from hesso_hf.errors import CheckpointMismatchError
from hesso_hf.shard_state import FOLDER

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"steps": 16},
    "across-layers": {"steps": 16, "layer_widths": "per_layer", "saliency": "cosine_similarity",
                      "target_sizes": {"num_key_value_heads": 2, "intermediate_size": 28}},
    "one-plus-w": {"steps": 16, "kind": "gemma2"},
    "layer-norm": {"steps": 16, "kind": "phi"},
    "cric": {"steps": 14, "cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(folder, [("train", folder / name, {"mesh": "shard", **options}) for name, options in KINDS.items()])
    return folder


def results(folder: Path, processes: int = 2) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert found["kept"] == expected["kept"]
    for name, weight in expected["weights"].items():
        error = (found["weights"][name] - weight).abs().max() / weight.abs().max()
        assert error <= tolerance, (name, float(error))
    assert abs(found["norm"] - expected["norm"]) <= 1e-5 * max(1.0, expected["norm"])
    for structure, terms in expected["sums"].items():
        for term, value in terms.items():
            assert (found["sums"][structure][term] - value).abs().max() <= 1e-4 * value.abs().max(), (structure, term)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_that_hold_half_each_equal_one(name: str, two: Path, tmp_path: Path) -> None:
    sharded.train(tmp_path, mesh=None, **KINDS[name])
    alone = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for found in results(two / name):
        assert_same(found, alone)
        assert found["cric"] == alone["cric"]
        assert bool(found["cric"]) == (name == "cric")


def test_communication_is_one_sum_one_decision_and_one_checksum_a_scoring(two: Path) -> None:
    for found in results(two / "llama"):
        starts = {HESSO.warmup_steps + 3 * period for period in range(2)}
        assert found["collectives"] == [3 if step in starts else 0 for step in range(16)]


def test_streams_of_mean_zero_take_one_sum_a_step(two: Path) -> None:
    first = HESSO.warmup_steps
    for found in results(two / "layer-norm"):
        starts = {first, first + 3}
        assert found["collectives"] == [(step >= first) + 3 * (step in starts) for step in range(16)]


def test_cric_adds_one_sum_a_sample(two: Path) -> None:
    samples = range(CRIC.warmup_steps, CRIC.warmup_steps + 2 * 3)
    for found in results(two / "cric"):
        counts = [found["collectives"][step] for step in samples]
        inner = [counts[n] for n in (1, 4)]  # neither the first of all nor the end of a cycle
        assert inner == [1, 1], counts
        assert max(counts) <= 4, counts


REPLICATED: dict[str, dict[str, Any]] = {
    "trained": {"steps": 16},
    "shrinking": {"steps": 5},
    "centred": {"steps": 16, "kind": "phi"},
    "summed": {"steps": 3, "saliency_batches": 3},
}  # fmt: skip


def test_replicas_of_shards_are_counted_once(tmp_path: Path) -> None:
    four = [("train", tmp_path / name, {"mesh": "replicate_shard", **options}) for name, options in REPLICATED.items()]
    launch(tmp_path, four, processes=4)
    for name, options in REPLICATED.items():
        (tmp_path / "one" / name).mkdir(parents=True)
        sharded.train(tmp_path / "one" / name, mesh=None, **options)
        alone = torch.load(tmp_path / "one" / name / "rank0.pt", weights_only=True)
        assert (alone["norm"] > 0) == (name == "shrinking")
        for found in results(tmp_path / name, 4):
            assert_same(found, alone)


def test_sums_of_a_scoring_go_on_and_are_counted_once(tmp_path: Path) -> None:
    options = {"mesh": "shard", "saliency_batches": 3}  # of steps 1, 2 and 3
    jobs = [
        ("train_and_save", tmp_path / "saved", {"steps": 2, **options}),
        ("train", tmp_path / "straight", {"steps": 3, **options}),
        ("load_and_train", tmp_path / "resumed", {"steps": 1, "source": str(tmp_path / "saved"), **options}),
    ]
    launch(tmp_path, jobs)
    straight = results(tmp_path / "straight")[0]
    assert max(float(term.abs().max()) for term in straight["sums"]["mlp_channels"].values()) > 0
    for found in results(tmp_path / "resumed"):
        assert_same(found, straight, 0.0)


@pytest.mark.parametrize(
    ("stop", "reader"), [(5, 1), (4, 2), (9, 2)], ids=["in-a-cycle-on-one", "in-a-cycle", "pruning"]
)
def test_a_sharded_run_goes_on_elsewhere(stop: int, reader: int, tmp_path: Path) -> None:
    options = {"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2, "on_collapse": "pause"}
    jobs = [
        ("train_and_save", tmp_path / "saved", {"steps": stop, "mesh": "shard", **options}),
        ("train", tmp_path / "straight", {"steps": 14, "mesh": "shard", **options}),
    ]
    resumed = {"source": str(tmp_path / "saved"), "steps": 14 - stop, **options}
    if reader == 2:
        jobs.append(("load_and_train", tmp_path / "resumed", {"mesh": "shard", **resumed}))
    launch(tmp_path, jobs)
    if reader == 1:
        (tmp_path / "resumed").mkdir()
        sharded.load_and_train(tmp_path / "resumed", mesh=None, **resumed)
    straight = results(tmp_path / "straight")
    for found in results(tmp_path / "resumed", reader):
        assert_same(found, straight[0], 0.0 if reader == 2 else 1e-5)
        assert found["cric"] == straight[0]["cric"]


def test_a_stored_part_that_is_lost_is_an_error(tmp_path: Path) -> None:
    options = {"cric": True, "cric_sampling_steps": 3, "cric_max_cycles": 2}
    launch(tmp_path, [("train_and_save", tmp_path / "saved", {"steps": 4, "mesh": "shard", **options})])
    (tmp_path / "saved" / FOLDER / "parts-00001.safetensors").unlink()
    with pytest.raises(CheckpointMismatchError, match=r"elements are missing|holds .* of shape None"):
        sharded.load_and_train(tmp_path, str(tmp_path / "saved"), steps=1, mesh=None, **options)


def test_going_on_without_the_pruning_state_is_an_error(tmp_path: Path) -> None:
    launch(tmp_path, [("forget_the_pruning_state", tmp_path / "forgotten", {})])
    assert (tmp_path / "forgotten" / "refused").read_text() == "call `load_pruning_state"


MOE = {"target_sizes": None, "pruning_ratio": 0.25, "calibration_examples": 0}
EXPORTS: dict[str, dict[str, Any]] = {
    "many-files": {"kind": "llama", "layers": 10, "dtype": "bfloat16"},
    "tied": {"kind": "gemma2"},
    "layer-norm": {"kind": "phi"},
    "uneven": {"kind": "llama", "layer_widths": "per_layer",
               "target_sizes": {"num_key_value_heads": 2, "intermediate_size": 28}},
    "experts": {"kind": "mixtral", **MOE, "structures": ["attention_heads", "experts"]},
    "latent": {"kind": "deepseek_v3", **MOE},
}  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    launch(folder, [("export", folder / name, options) for name, options in EXPORTS.items()])
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("kind", ["small", "dense"])
def test_what_is_written_from_shards_is_what_is_written_from_a_whole_model(name: str, kind: str, exports: Path) -> None:
    folder = exports / name / kind
    plain = exports / name / {"small": "plain", "dense": "plain-dense"}[kind]
    ours, expected = tensors_in(folder), tensors_in(plain)
    assert ours.keys() == expected.keys()
    for tensor, value in expected.items():
        assert ours[tensor].dtype == value.dtype
        assert torch.equal(ours[tensor], value), tensor
    config, wanted = (json.loads((where / "config.json").read_text()) for where in (folder, plain))
    assert {**config, "use_cache": 0} == {**wanted, "use_cache": 0}
    same = {path.name for path in folder.iterdir() if not path.name.startswith("model")}
    assert same == {path.name for path in plain.iterdir() if not path.name.startswith("model")}
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_many_files_are_written_by_both_processes(exports: Path) -> None:
    assert len(list((exports / "many-files" / "small").glob("model-*.safetensors"))) >= 4
    assert all(found["fold"] <= 1e-5 for found in results(exports / "many-files"))


def test_no_process_holds_a_full_copy_while_it_writes(tmp_path: Path) -> None:
    launch(tmp_path, [("export_in_little_memory", tmp_path / "big", {})])
    for found in results(tmp_path / "big"):
        assert found["dense"] >= 80e6
        assert found["grown"] <= 0.8 * found["dense"], found
