"""The benchmarks' code paths at a small size; what they measure is for a quiet machine."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hesso_hf import HessoConfig
from hesso_hf.bundled import bundled_model_path, python_docs_texts
from hesso_hf.pruning import Schedule
from tests.support import ROOT
from tests.support.tiny import tiny_llama

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def stand_in(folder: Path) -> Path:
    """Put a tiny model and a text where stories260K and TinyStories are looked for; return the text's folder."""
    model, data = folder / "models" / "stories260K", folder / "data" / "tinystories"
    tiny_llama(vocab_size=1024).save_pretrained(model)
    AutoTokenizer.from_pretrained(bundled_model_path()).save_pretrained(model)
    data.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [json.dumps({"text": text[:4000]}) for text in python_docs_texts(split)[:4]]  # type: ignore[arg-type]
        (data / f"{split}.jsonl").write_text("\n".join(rows))
    return data


def short_blocks(monkeypatch: pytest.MonkeyPatch, stories: ModuleType, benchmark: ModuleType) -> None:
    """Have a benchmark train and measure on blocks of 48 tokens."""
    monkeypatch.setattr(benchmark, "BLOCK", 48)
    short = functools.partial(stories.load_blocks, block=48)
    for module in (stories, benchmark):
        monkeypatch.setattr(module, "load_blocks", short, raising=module is stories)


def test_overhead_counts_every_kind_of_step_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import overhead

    output = tmp_path / "overhead.json"
    flags = ["--device", "cpu", "--scale", "tiny", "--repeats", "1", "--batch-size", "1", "--length", "16"]
    monkeypatch.setattr(sys, "argv", ["overhead.py", *flags, "--output", str(output)])
    assert overhead.main() == 0
    entry = json.loads(output.read_text())["cpu tiny"]
    for found in entry["results"].values():
        kinds = {"warmup", "scoring", "shrinking", "recovery", "snapshot", "sampling", "restore", "score of a sample"}
        assert set(found["steps"]) == kinds
        assert 0.99 < found["cric_snapshot_share_of_parameters_and_state"] <= 1
        assert all(kind["hesso_seconds"] > 0 for kind in found["steps"].values())
        assert 0 < found["extra_bytes_peak"] < 869_504 * 4


@pytest.mark.slow
def test_sharding_compares_with_the_optimizer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sharding

    output = tmp_path / "sharding.json"
    flags = ["--scale", "tiny", "--length", "16", "--repeats", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["sharding.py", *flags])
    assert sharding.main() == 0
    entry = json.loads(output.read_text())["cpu tiny"]
    assert entry["processes"] == 2
    assert set(entry["steps"]) == {"warmup", "scoring", "shrinking", "recovery"}
    assert entry["plain_step_seconds"] > 0
    assert 0.5 < entry["peak_ratio"] < 2


@pytest.mark.slow
def test_memory_measures_every_moment_of_both_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import memory

    output = tmp_path / "memory.json"
    flags = ["--device", "cpu", "--shapes", "tiny", "--batch-size", "3", "--length", "160", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["memory.py", *flags])
    assert memory.main() == 0
    runs = json.loads(output.read_text())["cpu"]["runs"]
    assert {(run["setting"], run["trainer"]) for run in runs} == {
        *((setting, "Trainer") for setting in memory.SETTINGS),
        ("bf16 autocast", "HessoTrainer"),
        ("bf16 autocast, checkpointing", "HessoTrainer"),
    }
    for run in runs:
        assert run["ratio"]["peak above parameters and state"] == pytest.approx(1, rel=0.05), run["setting"]
        assert run["ratio"]["forward"] == pytest.approx(1, rel=0.06), run["setting"]  # labels and masks count here
        if run["setting"] != "bf16 weights":
            for name in ("parameters", "gradients", "optimizer"):
                assert run["estimated"][name] == run["measured"][name]


@pytest.mark.slow
def test_collapse_runs_every_start_and_method_with_equal_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import collapse

    output = tmp_path / "collapse.json"
    methods = ["one_shot_magnitude", "hesso_taylor_second_order", "cric", "cric_probe"]
    flags = ["--models", "bundled", "--seeds", "0", "--steps", "40", "--stationary-steps", "40", "--methods", *methods]
    monkeypatch.setattr(collapse, "BATCH", 1)
    monkeypatch.setattr(collapse, "SMALL_SET", 1)
    monkeypatch.setattr(collapse, "BLOCK", 16)
    monkeypatch.setattr(collapse, "PROBE_BATCH_SIZE", 1)
    monkeypatch.setattr(collapse, "_some", lambda held_out: held_out.select(range(2)))
    monkeypatch.setattr(
        sys, "argv", ["collapse.py", *flags, "--stationary-training-steps", "3", "--output", str(output)]
    )
    assert collapse.main() == 0
    runs = json.loads(output.read_text())["runs"]
    assert [(run["start"], run["method"], run["trained"]) for run in runs] == [
        (start, method, trained)
        for trained in (False, True)
        for start in collapse.STARTS
        for method in methods
        if not trained or start != "rescaled" or method in ("one_shot_magnitude", "cric")  # the others can't tell
    ]
    for start in collapse.STARTS:
        assert len({run["tokens"] for run in runs if run["start"] == start and run["trained"]}) == 1
        assert len({json.dumps(run["sizes"]) for run in runs if run["start"] == start}) == 1
    assert all((run["cric"] is None) != run["method"].startswith("cric") for run in runs)
    assert (tmp_path / "collapse.png").stat().st_size > 10_000


def test_the_rescaled_model_computes_the_same_and_trains_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import collapse
    import torch

    plain = AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float64)
    other = AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float64)
    factors = collapse.rescale_(other, seed=1)
    assert max(float(factor.max()) for factor in factors.values()) > 10
    ids = torch.randint(3, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    for model, scaled in ((plain, {}), (other, factors)):
        optimizer = collapse.RescaledAdamW(model.parameters(), scaled, lr=1e-3, weight_decay=0.0, eps=1e-12)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, other(ids).logits, atol=1e-5, rtol=0)


def test_distillation_runs_with_and_without_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distillation
    import render_readme
    import stories

    for module in (stories, distillation):
        monkeypatch.setattr(module, "BATCH", 1)
    output = tmp_path / "distillation.json"
    flags = ["--data", str(tmp_path), "--scale", "tiny", "--seeds", "0", "--methods", "none", "0.9"]
    monkeypatch.setattr(sys, "argv", ["distillation.py", *flags, "--output", str(output)])
    assert distillation.main() == 0
    (entry,) = json.loads(output.read_text()).values()
    plain, taught = entry["runs"]
    assert (plain["method"], taught["method"]) == ("none", "0.9")
    assert plain["sizes"] == taught["sizes"]
    assert plain["tokens"] == taught["tokens"]
    assert plain["loss"] != taught["loss"]
    table = render_readme.render_table("distillation", tmp_path)
    assert "distillation_alpha`, bundled" in table
    assert f"{taught['loss']:.3f}" in table
    before = output.read_text()
    assert distillation.main() == 0  # nothing is run again
    assert output.read_text() == before


def test_schedules_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import render_readme
    import schedule
    import stories

    stand_in(tmp_path)
    short_blocks(monkeypatch, stories, schedule)
    output, names = tmp_path / "schedule.json", ["at once", schedule.REWARMED]
    flags = ["--data", str(tmp_path), "--steps", "30", "--seeds", "0", "--ratios", "0.3", "--held-out-blocks", "2"]
    monkeypatch.setattr(sys, "argv", ["schedule.py", *flags, "--output", str(output), "--schedules", *names])
    assert schedule.main() == 0
    once, rewarmed = json.loads(output.read_text())["runs"]
    assert [once["schedule"], rewarmed["schedule"]] == names
    assert once["loss"] != rewarmed["loss"]
    table = render_readme.render_table("schedule", tmp_path)
    assert f"| at once | {once['loss']:.3f} |" in table
    before = output.read_text()
    assert schedule.main() == 0  # nothing is run again
    assert output.read_text() == before


def test_models_on_the_way_are_compared_with_runs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ladder
    import render_readme
    import stories

    stand_in(tmp_path)
    short_blocks(monkeypatch, stories, ladder)
    monkeypatch.setattr(ladder, "SHARES", (0.35,))
    quick = {"calibration_examples": 0, "healing": "off"}
    monkeypatch.setattr(ladder, "HessoConfig", functools.partial(HessoConfig, **quick))
    output = tmp_path / "ladder.json"
    flags = ["--data", str(tmp_path), "--steps", "25", "--seeds", "0", "--recoveries", "0.1", "--held-out-blocks", "2"]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *flags, "--output", str(output)])
    assert ladder.main() == 0
    alone, climbed = json.loads(output.read_text())["runs"]
    assert list(alone["of all steps"]) == list(climbed["ladder"]) == ["0.35", "0.5"]
    table = render_readme.render_table("ladder", tmp_path)
    found, own = climbed["ladder"]["0.35"], climbed["of as many steps"]["0.35"]["loss"]
    whole = alone["of all steps"]["0.35"]["loss"]
    assert f"| 10% | 35% | {found['steps']} | {found['loss']:.3f} | {own:.3f} | {whole:.3f} |" in table
    before = output.read_text()
    assert ladder.main() == 0  # nothing is run again
    assert output.read_text() == before


def test_the_learning_rate_is_warmed_up_anew_after_each_period(monkeypatch: pytest.MonkeyPatch) -> None:
    import schedule

    two = Schedule(warmup_steps=1, pruning_steps=4, pruning_periods=2, total_steps=12)  # they end before steps 3 and 5
    factors = [schedule.rewarmed(two, step, ramp=4) for step in range(12)]
    assert factors == [1.0, 1.0, 1.0, 0.25, 0.5, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_lora_compares_what_units_are_scored_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_scoring

    monkeypatch.setattr(lora_scoring, "SCORED", 1)
    monkeypatch.setattr(lora_scoring, "HELD_OUT", 1)
    monkeypatch.setattr(lora_scoring, "BATCH", 1)
    output = tmp_path / "lora.json"
    monkeypatch.setattr(sys, "argv", ["lora_scoring.py", "--trained", "2", "--output", str(output)])
    assert lora_scoring.main() == 0
    (run,) = json.loads(output.read_text())["runs"]
    assert run["variants"]["weights taylor_second_order"]["mlp_channels"]["same"] == 1
    assert run["variants"]["adapter taylor_second_order"]["mlp_channels"]["same"] < 1
    assert run["peak_bytes"]["weights"] > run["peak_bytes"]["adapter"]


def test_replay_runs_each_arm_on_a_text_that_the_model_learnt_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import replay
    import stories

    data = stand_in(tmp_path)
    (data.parent / "tinyshakespeare.txt").write_text("".join(python_docs_texts("train")[4:9])[:20000])
    output = tmp_path / "replay.json"
    flags = ["--data", str(tmp_path), "--cache", str(tmp_path / "cache"), "--steps", "6", "--seeds", "0"]
    flags += [
        "--domains",
        "known",
        "--arms",
        "none",
        "healing, share 0.25",
        "--held-out-blocks",
        "1",
        "--output",
        str(output),
    ]
    short_blocks(monkeypatch, stories, replay)
    monkeypatch.setattr(replay, "BOTH_STEPS", 1)
    monkeypatch.setattr(replay, "BATCH", 2)
    monkeypatch.setattr(stories, "BATCH", 2)
    monkeypatch.setattr(sys, "argv", ["replay.py", *flags])
    assert replay.main() == 0
    found = json.loads(output.read_text())
    assert [(run["domain"], run["arm"]) for run in found["runs"]] == [
        ("known", arm) for arm in ("dense", "none", "healing, share 0.25")
    ]
    sizes = [run["parameters"] for run in found["runs"] if run["ratio"]]
    assert max(sizes) < 1.01 * min(sizes), "the split is measured on replay too, where there is some"
    assert set(found["base"]) == {"known", "unknown"}


def test_split_measures_each_before_and_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import split
    import stories

    stand_in(tmp_path)
    output = tmp_path / "split.json"
    short_blocks(monkeypatch, stories, split)
    monkeypatch.setattr(split, "SPLITS", ((2, 48, 28),))
    monkeypatch.setattr(stories, "BATCH", 2)
    flags = ["--data", str(tmp_path), "--steps", "6", "--held-out-blocks", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["split.py", *flags])
    assert split.main() == 0
    chosen, given = json.loads(output.read_text())["runs"]
    assert (chosen["split"], given["split"]) == ("chosen", "2/48/28")
    assert list(given["sizes"].values()) == [2, 48, 28]
    assert given["healed"] != given["unhealed"]
    assert given["trained"] != given["healed"]
    before = output.read_text()
    assert split.main() == 0  # nothing is run again
    assert output.read_text() == before


@pytest.mark.slow
def test_the_cut_frees_memory_for_the_rest_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compaction_memory
    import render_readme
    import torch

    output = tmp_path / "memory.json"
    monkeypatch.setattr(sys, "argv", ["compaction_memory.py", "--model", "bundled", "--output", str(output)])
    assert compaction_memory.main() == 0
    masked, cut = json.loads(output.read_text())["runs"]
    assert masked["before"] == cut["before"], "they are the same until the cut"
    fewer = cut["parameters_before"] - cut["parameters_after"]
    assert masked["after"] - cut["after"] >= 4 * 4 * fewer, "weights, gradients, two moments, float32"
    assert compaction_memory.size_of([torch.zeros(3), torch.zeros(2, dtype=torch.float64)]) == 28
    assert "after the cut" in render_readme.compaction_memory(json.loads(output.read_text()))


@pytest.mark.slow
def test_compaction_trains_both_ways_to_the_same_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compaction
    import texts

    stand_in(tmp_path)
    plays, output = tmp_path / "data" / "tinyshakespeare.txt", tmp_path / "compaction.json"
    plays.write_text("".join(python_docs_texts("test"))[:40_000], encoding="utf-8")
    small = texts.Setting("stories", 32, 2, 1e-3, calibration_examples=0, blocks=1, windows=1)
    monkeypatch.setitem(texts.SETTINGS, "stories", small)
    flags = ["--data", str(tmp_path), "--steps", "6", "--widths", "32", "--seeds", "0", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["compaction.py", *flags])
    assert compaction.main() == 0
    found = json.loads(output.read_text())
    dense, masked, compacted = found["runs"]
    assert dense["parameters"] == masked["trained"]
    assert masked["kept"] == compacted["kept"]
    assert masked["trained"] > masked["parameters"] == compacted["parameters"] == compacted["trained"]
    assert compacted["cut_error"] < 1e-5
    assert abs(masked["loss"] - compacted["loss"]) < 0.1
    assert list(found["medians"]) == ["width 32, masked", "width 32, compacted", "dense"]


@pytest.mark.slow
def test_export_scale_measures_an_export_beside_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import export_scale
    import render_readme

    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8,
             "head_dim": 8, "vocab_size": 1000}  # fmt: skip
    flags = ["--layers", "2", "--sizes", json.dumps(sizes), "--folder", str(tmp_path), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["export_scale.py", *flags, "--output", str(tmp_path / "export_scale.json")])
    assert export_scale.main() == 0
    found = json.loads((tmp_path / "export_scale.json").read_text())
    assert found["export"]["parameters"] < found["checkpoint"]["parameters"]
    assert found["export"]["fold_error"] < 1e-4
    assert found["export"]["peak"]["anonymous"] >= found["export"]["before"]["anonymous"]
    assert [path.name for path in tmp_path.iterdir()] == ["export_scale.json"]
    assert "| written |" in render_readme.render_table("export_scale", tmp_path)


def test_speed_compares_every_size_with_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import render_readme
    import speed

    output = tmp_path / "speed.json"
    flags = ["--model", "tiny", "--prompt", "8", "--new-tokens", "2", "--repeats", "1", "--ratios", "0.5"]
    flags += ["--batches", "1", "2", "--threads", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["speed.py", *flags])
    monkeypatch.setattr(speed.ForwardTimes, "share", lambda *_: None)  # a model so small may not get twice as fast
    assert speed.main() == 0
    found = json.loads(output.read_text())
    dense, small, exact, fast = found["models"].values()
    ratios = {key: ratio for key, ratio in dense["ratios"].items() if not math.isnan(ratio)}  # NaN: too noisy
    assert ratios == {"parameters": 1.0} | dict.fromkeys(ratios, 1.0)
    assert abs(exact["ratios"]["parameters"] - 2) < 0.1
    assert small["parameters"] < dense["parameters"] > fast["parameters"]
    for key, more_is_better in (("forward", True), ("first_token", False), ("written, batch 2", True)):
        if math.isnan(small["ratios"][key]):
            continue
        times = small["measured"][key] / dense["measured"][key]
        assert abs(small["ratios"][key] - (times if more_is_better else 1 / times)) < 1e-3 + 0.01 * small["ratios"][key]
    assert "| 50% removed, any size | " in render_readme.speed(found)


def quality_flags(folder: Path, output: Path, text: str) -> list[str]:
    """Return the options of a small run on the bundled model."""
    flags = ["--model", "bundled", "--text", text, "--data", str(folder), "--cache", str(folder / "cache")]
    flags += ["--block", "32", "--batch", "4", "--calibration-examples", "4", "--windows", "2", "--blocks", "2"]
    return ["quality.py", *flags, "--tokens", "1280", "--ratios", "0.5", "--output", str(output)]


def test_quality_goes_on_where_its_minutes_ended_and_cuts_all_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import quality
    import render_readme
    import texts

    wiki = tmp_path / "data" / "wikitext2"
    wiki.mkdir(parents=True)
    (wiki / "wiki.test.raw").write_text("".join(python_docs_texts("test"))[:9000], encoding="utf-8")
    monkeypatch.setattr(texts, "WINDOW", 64)
    output = tmp_path / "quality.json"
    flags = quality_flags(tmp_path, output, "docs")

    def call(*more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [*flags, *more])
        assert quality.main() == 0
        return {run["method"]: run for run in json.loads(output.read_text())["runs"]}

    with pytest.raises(SystemExit, match="run `hesso` at this ratio first"):
        call("--methods", "ShortGPT")
    assert call("--methods", "hesso", "--minutes", "0") == {}
    assert "put off" in capsys.readouterr().out
    others = ["hesso, healing, replay", "one-shot, magnitude", "FLAP", "ShortGPT", "scratch", "dense"]
    assert list(call("--methods", "hesso", *others)) == ["hesso", *others]
    call("--methods", "OBS", "--minutes", "0")
    (cut,) = (tmp_path / "cache" / "runs").glob("bundled-OBS-*/cut/model.safetensors")
    made = cut.stat().st_mtime_ns
    runs = call("--methods", "OBS")
    assert cut.stat().st_mtime_ns == made  # what was put off is trained as it was cut
    hesso = runs["hesso"]
    assert hesso["parameters"] < runs["dense"]["parameters"]
    assert hesso["config"].keys() == quality.ALONE.keys()
    for alike in ("one-shot, magnitude", "scratch"):
        assert (runs[alike]["sizes"], runs[alike]["parameters"]) == (hesso["sizes"], hesso["parameters"])
    for near in ("FLAP", "OBS"):
        assert runs[near]["sizes"]["hidden_size"] == runs["dense"]["sizes"]["hidden_size"]
        assert abs(runs[near]["parameters"] / hesso["parameters"] - 1) < 0.03
    assert runs["ShortGPT"]["sizes"]["num_hidden_layers"] < hesso["sizes"]["num_hidden_layers"]
    assert set(render_readme.QUALITY_METHODS) == set(quality.METHODS)
    assert f"| structured OBS |  | {runs['OBS']['in']:.3f}" in render_readme.render_table("quality", tmp_path)
    with pytest.raises(SystemExit, match=r"doesn't compare with .*'learning_rate': 0.5"):
        call("--learning-rate", "0.5")


def test_quality_leaves_out_a_variant_that_is_what_the_defaults_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import quality

    run = {"model": "bundled", "method": "hesso, healing", "ratio": 0.5, "tokens": 1280, "seed": 0}
    for changes, same in (({}, True), ({"healing": "auto", "warmup_steps": 0.3}, False)):
        monkeypatch.setitem(quality.HESSO, "hesso, healing", changes)
        assert quality.is_done(run, {"runs": []}, quality.SETTINGS["docs"]) is same
    assert quality.is_done(run, {"runs": [run]}, quality.SETTINGS["docs"])


def test_quality_replays_whole_examples_and_refuses_another_share_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import quality

    model, config = tiny_llama(), HessoConfig(0.5, distillation_alpha=0.9)
    long = 10**8  # tokens: no replay is dear
    docs, stories = quality.SETTINGS["docs"], quality.SETTINGS["stories"]
    assert quality.replayed(config, docs, long, model, taught=True) == 0.25  # of 4 examples half a one isn't to be had
    assert quality.replayed(config, stories, long, model, taught=True) == 0.125
    assert quality.replayed(config, stories, long, model, taught=False) == 0.25
    assert quality.arguments(Path("out"), stories, long, 0, 0.125).per_device_train_batch_size == 7
    run: Any = SimpleNamespace(replay=SimpleNamespace(sizes=SimpleNamespace(share=0.25)))
    quality.CheckShare(run, 0.25).on_train_begin(None, None, None)
    with pytest.raises(RuntimeError, match=r"expected to be 0\.125 of the tokens, not 0\.25"):
        quality.CheckShare(run, 0.125).on_train_begin(None, None, None)


@pytest.mark.parametrize(("surprise", "known"), [(0.05, True), (0.2, False)])
def test_quality_measures_what_a_model_knows_that_was_not_measured_yet(
    surprise: float, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality

    monkeypatch.setattr(quality, "measured", lambda *_: {"surprise": surprise})
    auto, model, data = HessoConfig(0.5), tiny_llama(), Dataset.from_dict({"input_ids": [[1, 2]]})
    assert quality.is_taught("hesso", auto, "a-folder", "stories", model, data) is known
    assert quality.is_taught("hesso", auto, "small", "stories", model, data) is True, "that one was measured"
    assert quality.is_taught("hesso", auto, "smollm2", "docs", model, data) is False
    assert quality.is_taught(quality.ANYHOW, auto, "smollm2", "docs", model, data) is True
    assert (
        quality.is_taught("hesso", HessoConfig(0.5, distillation_alpha=0.0), "small", "stories", model, data) is False
    )


def test_quality_trains_on_stories_and_measures_both_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quality
    import render_readme

    stand_in(tmp_path)
    output, plays = tmp_path / "quality.json", tmp_path / "data" / "tinyshakespeare.txt"
    monkeypatch.setattr(sys, "argv", [*quality_flags(tmp_path, output, "stories"), "--methods", "dense"])
    with pytest.raises(SystemExit, match=r"tinyshakespeare\.txt isn't there"):
        quality.main()
    plays.write_text("".join(python_docs_texts("test"))[:40_000], encoding="utf-8")
    assert quality.main() == 0
    (run,) = json.loads(output.read_text())["runs"]
    assert run["in"] != run["out"]
    assert "TinyStories" in render_readme.render_table("quality", tmp_path)


def test_what_trained_models_know_is_asked_of_those_that_quality_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import quality
    import zero_shot

    stand_in(tmp_path)
    (tmp_path / "data" / "tinyshakespeare.txt").write_text("".join(python_docs_texts("test"))[:40_000], "utf-8")
    output, asked = tmp_path / "quality.json", list[int]()
    monkeypatch.setattr(sys, "argv", [*quality_flags(tmp_path, output, "stories"), "--methods", "dense"])
    assert quality.main() == 0
    result = json.loads(output.read_text())
    result["runs"].append(result["runs"][0] | {"method": "OBS", "ratio": 0.5})
    output.write_text(json.dumps(result))

    class Scores:
        def scores(self, model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
            asked.append(model.num_parameters())
            of_length = {"acc_norm,none": 0.5, "acc_norm_stderr,none": 0.04}
            return {
                "local_piqa": {"acc,none": 0.7, "acc_stderr,none": 0.3, **of_length},
                "local_boolq": {"acc,none": 0.6, "acc_stderr,none": 0.03},
            }

    monkeypatch.setattr(zero_shot, "Tasks", lambda *_, **__: Scores())
    flags = ["--model", "bundled", "--data", str(tmp_path), "--cache", str(tmp_path / "cache"), "--tokens", "1280"]
    flags += ["--quality", str(output), "--output", str(tmp_path / "zero_shot.json"), "--limit", "9"]
    monkeypatch.setattr(sys, "argv", ["zero_shot.py", *flags])
    for _ in range(2):  # what is measured isn't measured again
        assert zero_shot.main() == 0
    assert "OBS at 50% isn't in" in capsys.readouterr().err
    found = json.loads((tmp_path / "zero_shot.json").read_text())
    assert [run["method"] for run in found["runs"]] == ["base", "dense"]
    assert len(asked) == 2
    assert found["runs"][0]["tasks"] == {"piqa": 0.5, "boolq": 0.6}
    assert (found["runs"][0]["mean"], found["runs"][0]["error"]) == (0.55, 0.025)
    assert found["chance"] == pytest.approx(2.5 / 7, abs=1e-4)
    monkeypatch.setattr(sys, "argv", ["zero_shot.py", *flags, "--limit", "10"])
    with pytest.raises(SystemExit, match="has 9 examples of each task"):
        zero_shot.main()


def test_the_small_model_is_trained_once_on_both_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pretrain_small
    import texts

    stand_in(tmp_path)
    plays = tmp_path / "data" / "tinyshakespeare.txt"
    with pytest.raises(SystemExit, match=r"tinyshakespeare\.txt isn't there"):
        texts.find_model("small", tmp_path, tmp_path / "cache")
    plays.write_text("".join(python_docs_texts("test"))[:40_000], "utf-8")
    monkeypatch.setattr(texts, "pretrain", functools.partial(pretrain_small.pretrain, steps=1))
    folder = texts.find_model("small", tmp_path, tmp_path / "cache")
    monkeypatch.setattr(texts, "pretrain", None)
    assert texts.find_model("small", tmp_path, tmp_path / "cache") == folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not model.config.tie_word_embeddings
    data = texts.load_data(folder, texts.SETTINGS["stories"], tmp_path)
    assert max(data.train[0]["input_ids"]) < model.config.vocab_size


def test_gpu_goes_on_with_parts_that_are_missing_and_names_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    output = tmp_path / "gpu.json"
    asked: list[str] = []

    def run_part(name: str, dry: bool, minutes: float) -> dict[str, Any]:
        asked.append(name)
        return {"failed": "took longer"} if name == "fp16" and len(asked) < 3 else {"loss": 1.5}

    monkeypatch.setattr(gpu, "run_part", run_part)

    def call(*more: str) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(output), *more])
        code = gpu.main()
        return code, json.loads(output.read_text())[gpu.DRY_DEVICE]["parts"] if output.exists() else None

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert call() == (2, None)  # nothing is measured on a CPU in a GPU's name
    assert call("--dry-run", "--parts", "tf32", "fp16") == (
        1,
        {"tf32": {"loss": 1.5}, "fp16": {"failed": "took longer"}},
    )
    assert "failed: ['fp16']" in capsys.readouterr().out
    assert call("--dry-run", "--parts", "tf32", "fp16") == (0, {"tf32": {"loss": 1.5}, "fp16": {"loss": 1.5}})
    assert asked == ["tf32", "fp16", "fp16"]
    call("--dry-run", "--parts", "tf32", "--again")
    assert asked[3:] == ["tf32"]


def test_a_part_that_fails_or_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    monkeypatch.setattr(gpu, "__file__", "/no/such/file.py")
    assert "No such file" in gpu.run_part("fp16", True, 1.0)["failed"]
    assert gpu.run_part("fp16", True, 0.0)["failed"] == "took longer than 0 minutes"


def test_gpu_measures_the_share_of_a_step_by_phase(tmp_path: Path) -> None:
    import gpu_parts

    found = gpu_parts.PARTS["overhead_8k"](True, tmp_path)
    assert {"warmup", "first of a period, period 1", "shrinking, period 2", "recovery"} <= found["steps"].keys()
    assert all(0 < kind["hesso_seconds"] < kind["step_seconds"] for kind in found["steps"].values())
    assert (found["steps"]["warmup"]["goal"], found["steps"]["warmup, scored"]["goal"]) == (0.03, 0.10)


def test_gpu_compares_the_defaults_with_a_plain_trainer_and_times_a_periods_start(tmp_path: Path) -> None:
    import gpu_parts

    found = gpu_parts.PARTS["trainer_defaults"](True, tmp_path)
    assert found["replay"]
    assert {"warmup", "first of a period, period 1", "shrinking, period 2", "recovery"} <= found["steps"].keys()
    for kind, step in found["steps"].items():
        assert step["share"] == pytest.approx(step["step_seconds"] / found["plain_step_seconds"] - 1)
        assert kind.startswith("first") or step["reached"] is (step["share"] <= step["goal"])
    start = gpu_parts.PARTS["period_start"](True, tmp_path)
    assert start["seconds"].keys() == {"fisher", "look ahead", "corrections"}
    assert start["matrices"] == 4  # two a layer


@pytest.mark.slow
def test_every_part_of_gpu_works_in_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    output = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--output", str(output)])
    code = gpu.main()
    parts = json.loads(output.read_text())[gpu.DRY_DEVICE]["parts"]
    assert code == 0, {name: found["failed"] for name, found in parts.items() if "failed" in found}
    assert parts.keys() == gpu.PARTS.keys()
    for name in ("tf32", "fp16", "lora", "fsdp2"):
        assert parts[name]["fold_error"] < 1e-4
    assert parts["fsdp2"]["backend"] == "gloo"
    assert parts["trainer_cric_path"]["steps"]["CRIC's sample"]["goal"] == 0.15
    assert "CRIC's probe" in parts["trainer_cric_probe"]["steps"]
    for name in ("full_determinism", "plain_determinism"):  # on a CPU both are
        assert (parts[name]["two runs differ by"], parts[name]["resumed differs by"]) == (0.0, 0.0)


def test_what_a_model_wrote_it_knows_and_other_text_it_does_not(tmp_path: Path) -> None:
    import known
    import torch
    from datasets import Dataset

    from hesso_hf.trainer.teacher import Teacher

    model = tiny_llama(3).eval()
    model.lm_head.weight.data.mul_(10)
    torch.manual_seed(5)
    ids = torch.randint(3, model.config.vocab_size, (300, 1))
    written = model.generate(ids, do_sample=True, max_new_tokens=24, min_new_tokens=24)
    other = torch.randint(3, model.config.vocab_size, written.shape)
    texts = [Dataset.from_dict({"input_ids": rows.tolist()}) for rows in (written, other)]
    teacher = Teacher(model)
    found = [known.measured(teacher, blocks) for blocks in texts]
    assert found[0]["surprise"] <= known.KNOWN < found[1]["surprise"]
    assert len(known.batches(texts[0], 10)) == 300, "fewer than KNOWN_TOKENS: all of it"
    assert len(known.batches(texts[0], 25)) == -(-known.KNOWN_TOKENS // 25)
