"""Export: what is refused, what is verified, what lies in the folder afterwards."""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import hesso_hf
from hesso_hf.budget import inspect_model
from hesso_hf.cli.memory.model_sizes import model_sizes
from hesso_hf.config.files import REPORT_NAME, STATE_NAME
from hesso_hf.errors import HessoError, VerificationError
from hesso_hf.export.export import export_pruned
from hesso_hf.hf_models.build import auto_class_of, class_to_build, load_config
from hesso_hf.hf_models.loading import load_model
from hesso_hf.hf_models.tiny_model import random_model as random_tiny
from hesso_hf.structures import cut
from hesso_hf.structures.cut import device_with_room
from hesso_hf.structures.groups import Axis, KeptUnits, PruningGroups
from hesso_hf.structures.proof.prove import proved_groups
from tests.support.families import (
    ALL,
    HEADS,
    MLP,
    QUERIES,
    QUERY,
    STREAM,
    logits,
    random_model,
    random_units,
    relative_difference,
    token_ids,
    zero_pruned_,
)

COUNTS = {HEADS: 2, MLP: 37, STREAM: 48}


@cache
def groups_of(name: str) -> PruningGroups:
    model = random_model(ALL[name].config())
    return proved_groups(type(model), model.config)[0]


def zeroed(name: str = "llama", counts: dict[str, int] | None = None) -> tuple[PreTrainedModel, KeptUnits]:
    model = random_model(ALL[name].config())
    kept = random_units(groups_of(name), COUNTS if counts is None else counts)
    zero_pruned_(model, groups_of(name), kept)
    return model, kept


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    """Return a folder with a previous model in it."""
    random_model(ALL["llama"].config(), seed=1).save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "notes.txt").write_text("mine")
    return tmp_path / "small"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(model: PreTrainedModel, folder: Path, error: type[HessoError], **options: Any) -> str:
    """Export, expect an error, and check that the folder and its surroundings are as before."""
    before = contents(folder.parent)
    with pytest.raises(error) as caught:
        export_pruned(model, folder, groups=groups_of("llama"), **options)
    assert type(caught.value) is error
    assert contents(folder.parent) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return str(caught.value)


def test_a_missing_fold_is_caught_and_the_structure_named(old_folder: Path, monkeypatch: pytest.MonkeyPatch):
    model, kept = zeroed()

    def without_power(tensor: torch.Tensor, axis: Axis, units: torch.Tensor, total: int) -> torch.Tensor:
        return tensor.index_select(axis.dim, axis.layout.indices(units, total))

    monkeypatch.setattr(cut, "_cut", without_power)
    message = refuse(model, old_folder, VerificationError, kept_units=kept)
    named = dict(part.rsplit(" ", 1) for part in message.partition("alone: ")[2].partition(". Nothing")[0].split(", "))
    assert float(named[STREAM]) > 1e-2
    assert float(named[MLP]) < 1e-5
    assert "Nothing was published" in message


def test_wrong_rows_are_caught(old_folder: Path, monkeypatch: pytest.MonkeyPatch):
    model, kept = zeroed(counts={MLP: 37})
    original = cut._cut

    def other_rows(tensor: torch.Tensor, axis: Axis, units: torch.Tensor, total: int) -> torch.Tensor:
        return original(tensor, axis, units if axis.dim else (units + 1) % total, total)

    monkeypatch.setattr(cut, "_cut", other_rows)
    assert MLP in refuse(model, old_folder, VerificationError, kept_units=kept)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_tensor_that_reads_back_differently_is_caught(name: str, old_folder: Path, monkeypatch: pytest.MonkeyPatch):
    model, kept = zeroed()
    original = LlamaForCausalLM.save_pretrained

    def corrupted(self: LlamaForCausalLM, folder: Path, **options: Any) -> None:
        original(self, folder, **options)
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[5] += 1e-6
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", corrupted)
    assert name in refuse(model, old_folder, VerificationError, kept_units=kept)


def test_a_model_with_nan_weights_is_not_published(old_folder: Path):
    model, kept = zeroed(counts={MLP: 37})
    model.model.layers[0].mlp.down_proj.weight.data[3, kept.kept[MLP][0][0]] = float("nan")
    assert "by nan (relative" in refuse(model, old_folder, VerificationError, kept_units=kept)


@pytest.mark.parametrize("value", [1e-3, float("nan"), float("inf")])
def test_a_unit_that_is_not_zero_is_named(value: float, old_folder: Path):
    model, kept = zeroed(counts={MLP: 37})
    cut_unit = min(set(range(52)) - set(kept.kept[MLP][1]))
    model.model.layers[1].mlp.down_proj.weight.data[7, cut_unit] = value
    message = refuse(model, old_folder, HessoError, kept_units=kept)
    assert f"{MLP}: unit {cut_unit} of layer 1" in message


def test_a_norm_used_as_one_plus_w_is_pruned_at_minus_one_not_at_zero(tmp_path: Path):
    model = random_model(ALL["gemma"].config())
    kept = random_units(groups_of("gemma"), {STREAM: 48})
    zero_pruned_(model, groups_of("gemma"), kept)
    pruned = min(set(range(72)) - set(kept.kept[STREAM][0]))
    assert model.model.norm.weight[pruned] == -1
    model.model.norm.weight.data[pruned] = 0.0
    with pytest.raises(HessoError, match=f"unit {pruned}"):
        export_pruned(model, tmp_path / "small", groups=groups_of("gemma"), kept_units=kept)


def uneven() -> tuple[PreTrainedModel, KeptUnits]:
    """Return a model whose second layer keeps fewer heads and channels than the first."""
    model, kept = zeroed()
    layers = {name: (kept.kept[name][0], kept.kept[name][1][:-1]) for name in (HEADS, MLP)}
    fewer = KeptUnits(kept.num_units, kept.kept | layers)
    zero_pruned_(model, groups_of("llama"), fewer)
    return model, fewer


def test_layers_of_different_widths_have_to_be_asked_for(tmp_path: Path):
    model, _ = uneven()
    with pytest.raises(HessoError, match=r"\[37, 36\].*no stock class has; pass `kept_units`"):
        export_pruned(model, tmp_path / "small", groups=groups_of("llama"))
    assert not (tmp_path / "small").exists()


def test_layers_of_different_widths_come_with_a_modelling_file_of_their_own(tmp_path: Path):
    model, kept = uneven()
    folder = tmp_path / "small"
    report = export_pruned(model, folder, groups=groups_of("llama"), kept_units=kept)
    assert report.kept_units == kept
    small = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    input_ids = token_ids(model.config)
    assert relative_difference(logits(small, input_ids), logits(model, input_ids)) <= 1e-5
    assert [layer.mlp.down_proj.in_features for layer in small.model.layers] == [37, 36]
    assert [layer.self_attn.k_proj.out_features for layer in small.model.layers] == [20, 10]
    prompt, settings = input_ids[:1], {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    cached, plain = (small.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)
    assert "hesso_hf" not in (folder / "modeling_pruned.py").read_text()
    with pytest.raises((RuntimeError, ValueError)):  # the stock class says that it doesn't fit
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_model_whose_layers_differ_is_pruned_again(tmp_path: Path):
    model, kept = uneven()
    export_pruned(model, tmp_path / "small", groups=groups_of("llama"), kept_units=kept)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    groups = proved_groups(type(small), small.config, (STREAM,))[0]
    fewer = random_units(groups, {STREAM: 36})
    zero_pruned_(small, groups, fewer)
    small.save_pretrained(tmp_path / "dense")
    export_pruned(small, tmp_path / "again", groups=groups, kept_units=fewer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.config.hidden_size == 36
    assert again.config.layer_sizes == small.config.layer_sizes
    input_ids = token_ids(model.config)
    assert relative_difference(logits(again, input_ids), logits(small, input_ids)) <= 1e-5
    with pytest.raises(HessoError, match=r"`source` \('.*dense'\): the layers differed in width before this run"):
        export_pruned(tmp_path / "dense", tmp_path / "more")


@pytest.mark.parametrize("from_files", [False, True])
def test_a_classifier_whose_layers_differ_is_loaded_by_its_own_auto_class(from_files: bool, tmp_path: Path):
    model = random_tiny(LlamaForSequenceClassification, ALL["llama"].config(num_labels=3, pad_token_id=0))
    groups = proved_groups(type(model), model.config, (MLP,))[0]
    kept = KeptUnits({MLP: 52}, {MLP: (tuple(range(40)), tuple(range(9, 31)))})
    zero_pruned_(model, groups, kept)
    model.save_pretrained(tmp_path / "dense")
    source = tmp_path / "dense" if from_files else model
    export_pruned(source, tmp_path / "small", groups=groups, kept_units=kept)
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small", trust_remote_code=True)
    input_ids = token_ids(model.config)
    assert relative_difference(logits(small, input_ids), logits(model, input_ids)) <= 1e-5
    loads = 'AutoModelForSequenceClassification.from_pretrained("path/to/this/model", trust_remote_code=True)'
    for name in ("README.md", "report.html"):
        assert loads in html.unescape((tmp_path / "small" / name).read_text())
    config = tmp_path / "small" / "config.json"
    for loader in ("AutoModelForSequenceClassification", "AutoModelForCausalLM"):  # of older models of all kinds
        config.write_text(config.read_text().replace("AutoModelForSequenceClassification", loader))
        assert class_to_build(load_config(config.parent), True).__name__ == "PrunedLlamaForSequenceClassification"


def test_auto_classes_are_those_that_find_a_class() -> None:
    for model_class, config, name in (
        (LlamaForCausalLM, LlamaConfig(), "AutoModelForCausalLM"),
        (LlamaForTokenClassification, LlamaConfig(), "AutoModelForTokenClassification"),
        (T5ForConditionalGeneration, T5Config(), "AutoModelForSeq2SeqLM"),
        (BertForPreTraining, BertConfig(), "AutoModelForPreTraining"),
        (LlamaModel, LlamaConfig(), "AutoModel"),
    ):
        assert auto_class_of(model_class, config) == name


def test_what_is_said_of_a_model_whose_layers_differ_is_of_its_own_class(tmp_path: Path):
    model, kept = uneven()
    report = export_pruned(model, tmp_path / "small", groups=groups_of("llama"), kept_units=kept)
    assert model_sizes(load_config(tmp_path / "small"), trust_remote_code=True).parameters == report.parameters_after
    for ask in (
        inspect_model,
        lambda folder: model_sizes(load_config(folder)),
        lambda folder: load_model(folder, None),
    ):
        with pytest.raises(HessoError, match=r"small'\) has layers of different widths.*`--trust-remote-code` \(in Py"):
            ask(str(tmp_path / "small"))


def test_the_card_of_layers_of_different_widths_does_not_promise_a_stock_class(tmp_path: Path):
    model, kept = uneven()
    export_pruned(model, tmp_path / "small", groups=groups_of("llama"), kept_units=kept)
    assert "trust_remote_code=True" in (tmp_path / "small" / "README.md").read_text()
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert report["sizes"]["after"]["intermediate_size"] != report["sizes"]["before"]["intermediate_size"]


def without_query_heads(*layers: tuple[int, ...]) -> PreTrainedModel:
    """Return a Llama of four query heads for each of two key-value heads, some of them zero by hand."""
    model = random_model(QUERIES["llama-queries"].config())
    for layer, heads in zip(model.model.layers, layers, strict=True):
        for head in heads:
            rows = slice(10 * head, 10 * head + 10)
            layer.self_attn.q_proj.weight.data[rows] = 0
            layer.self_attn.q_proj.bias.data[rows] = 0
            layer.self_attn.o_proj.weight.data[:, rows] = 0
    return model


def test_query_heads_at_zero_are_found_and_cut_exactly(tmp_path: Path):
    model = without_query_heads((3, 4), (0, 6))
    report = export_pruned(model, tmp_path / "small")
    assert report.kept_units.kept[QUERY] == ((0, 1, 2, 5, 6, 7), (1, 2, 3, 4, 5, 7))
    assert HEADS not in report.kept_units.kept
    assert report.sizes_after["num_attention_heads"] == 6
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (6, 2, 10)
    ids = token_ids(model.config)
    assert relative_difference(logits(small, ids), logits(model, ids)) <= 1e-5
    again = export_pruned(model, tmp_path / "again", kept_units=report.kept_units)  # proved anew for this decision
    assert again.kept_units == report.kept_units


def test_whole_key_value_heads_at_zero_are_cut_as_such(tmp_path: Path):
    model = without_query_heads((4, 5, 6, 7), (0, 1, 2, 3))
    for layer, head in zip(model.model.layers, (1, 0), strict=True):
        for name in ("k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.data[10 * head : 10 * head + 10] = 0
            getattr(layer.self_attn, name).bias.data[10 * head : 10 * head + 10] = 0
    assert export_pruned(model, tmp_path / "small").kept_units.kept[HEADS] == ((0,), (1,))


def test_query_heads_must_go_of_every_key_value_head(tmp_path: Path):
    model = without_query_heads((3, 4), (0, 1))
    layers = ((0, 1, 2, 5, 6, 7), (2, 3, 4, 5, 6, 7))
    for kept in (None, KeptUnits({QUERY: 8}, {QUERY: layers})):
        with pytest.raises(HessoError, match=r"query_heads of model\.layers\.1: the 2 runs of 4 units keep \[2, 4\]"):
            export_pruned(model, tmp_path / "small", kept_units=kept)
    groups = proved_groups(type(model), model.config, (QUERY,))[0]
    with pytest.raises(HessoError, match=r"keep \[2, 4\]"):
        cut.cut_model(model, groups, KeptUnits({QUERY: 8}, {QUERY: layers}), torch.float32)
    assert not (tmp_path / "small").exists()


def test_layers_may_keep_different_numbers_of_query_heads(tmp_path: Path):
    model = without_query_heads((3, 4), (0, 1, 4, 7))
    kept = KeptUnits({QUERY: 8}, {QUERY: ((0, 1, 2, 5, 6, 7), (2, 3, 5, 6))})
    export_pruned(model, tmp_path / "small", kept_units=kept)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert [layer.self_attn.q_proj.out_features for layer in small.model.layers] == [60, 40]
    assert [layer.self_attn.k_proj.out_features for layer in small.model.layers] == [20, 20]
    ids = token_ids(model.config)
    assert relative_difference(logits(small, ids), logits(model, ids)) <= 1e-5
    settings = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}
    cached, plain = (small.generate(ids[:1], use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("kept", "named"),
    [
        (KeptUnits({"mlp_chanels": 52}, {"mlp_chanels": (tuple(range(37)),) * 2}), "mlp_chanels"),
        (KeptUnits({MLP: 52}, {MLP: (tuple(range(37)),) * 3}), MLP),
        (KeptUnits({MLP: 52}, {MLP: (tuple(range(37)),)}), MLP),
        (KeptUnits({MLP: 60}, {MLP: (tuple(range(37)),) * 2}), MLP),
        (KeptUnits({MLP: 52}, {MLP: (tuple(range(30, 60)),) * 2}), MLP),
        (KeptUnits({MLP: 52}, {MLP: ((), ())}), MLP),
    ],
    ids=["unknown structure", "a layer too many", "a layer too few", "other units", "unit out of range", "nothing"],
)
def test_a_decision_for_another_model_is_refused_by_name(kept: KeptUnits, named: str, tmp_path: Path):
    """A checkpoint of another config or model is refused, with the first difference."""
    model = random_model(ALL["llama"].config())
    for layer in model.model.layers:
        for parameter in layer.mlp.parameters():
            parameter.data.zero_()
    with pytest.raises(HessoError, match=named):
        export_pruned(model, tmp_path / "small", groups=groups_of("llama"), kept_units=kept)
    assert not (tmp_path / "small").exists()


def test_what_does_not_fit_a_gpu_beside_the_rest_is_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (600, 10_000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 3000)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 2600)
    assert device_with_room(gpu, 1000) == gpu
    assert device_with_room(gpu, 1001) == torch.device("cpu")
    assert device_with_room(torch.device("cpu"), 1001) == torch.device("cpu")


def test_exporting_changes_nothing_about_the_trained_model(tmp_path: Path):
    model, kept = zeroed()
    model.train().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    export_pruned(model, tmp_path / "small", groups=groups_of("llama"), kept_units=kept, dtype="bfloat16")
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_measured_apart_from_the_fold(dtype: str, tmp_path: Path):
    model, kept = zeroed()
    report = export_pruned(model, tmp_path / "small", groups=groups_of("llama"), kept_units=kept, dtype=dtype)
    found = report.verification
    assert found.fold_error <= 1e-5
    assert 1e-4 < found.rounding_error < 5e-2
    assert found.dtype == dtype
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {parameter.dtype for parameter in small.parameters()} == {getattr(torch, dtype)}
    input_ids = token_ids(model.config)
    assert relative_difference(logits(small, input_ids), logits(model, input_ids)) < 5e-2


def test_a_bfloat16_model_stays_bfloat16_and_is_folded_in_fp32(tmp_path: Path):
    model, kept = zeroed()
    expected = cut.cut_model(copy.deepcopy(model).bfloat16().float(), groups_of("llama"), kept, torch.float32)
    report = export_pruned(model.bfloat16(), tmp_path / "small", groups=groups_of("llama"), kept_units=kept)
    assert report.verification.dtype == "bfloat16"
    assert report.verification.fold_error <= 1e-5
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    for name, parameter in expected.bfloat16().named_parameters():
        assert torch.equal(small.get_parameter(name), parameter), name


def test_without_rounding_the_stored_model_is_as_exact_as_the_fold(tmp_path: Path):
    model, kept = zeroed()
    found = export_pruned(model, tmp_path / "small", groups=groups_of("llama"), kept_units=kept).verification
    assert found.rounding_error == found.fold_error <= 1e-5
    assert (found.dtype, found.tokens) == ("float32", 64)


def test_shards_load(tmp_path: Path):
    model, _ = zeroed()
    export_pruned(model, tmp_path / "small", groups=groups_of("llama"), max_shard_size="40KB")
    assert len(list((tmp_path / "small").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "small" / "model.safetensors").exists()
    input_ids = token_ids(model.config)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), input_ids)
    assert relative_difference(found, logits(model, input_ids)) <= 1e-5


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(97)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0")


def test_tokenizer_and_generation_settings_come_along(tmp_path: Path):
    model, _ = zeroed()
    model.generation_config.update(temperature=0.31, do_sample=True, max_new_tokens=17)
    export_pruned(model, tmp_path / "small", groups=groups_of("llama"), tokenizer=tokenizer())
    assert AutoTokenizer.from_pretrained(tmp_path / "small").get_vocab()["w42"] == 42
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "small").generation_config
    assert (settings.temperature, settings.do_sample, settings.max_new_tokens) == (0.31, True, 17)


def test_the_report_says_everything(tmp_path: Path):
    model, kept = zeroed()
    training = {"config": {"pruning_ratio": 0.5}, "steps": 7}
    export_pruned(model, tmp_path / "small", groups=groups_of("llama"), kept_units=kept, training=training)
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    before, after = report["sizes"]["before"], report["sizes"]["after"]
    assert before == {
        "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 52, "hidden_size": 72,
    }  # fmt: skip
    assert after == {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 37, "hidden_size": 48}
    assert KeptUnits.from_dict(report["kept_units"]) == kept
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    counts = [sum(parameter.numel() for parameter in m.parameters()) for m in (model, small)]
    assert [report["parameters"]["before"], report["parameters"]["after"]] == counts
    assert report["pruning_ratio"] == pytest.approx(1 - counts[1] / counts[0])
    assert report["model_class"] == "LlamaForCausalLM"
    assert report["verification"].keys() == {"fold_error", "rounding_error", "dtype", "tokens"}
    assert {"python", "hesso_hf", "torch", "transformers"} <= report["versions"].keys()
    assert report["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert report["versions"]["hesso_hf"] == hesso_hf.__version__
    assert report["steps"] == 7
    engines = [said.partition(" ")[0] for said in report["serving"]]
    assert engines == ["CTranslate2", "llama.cpp"]  # 4 heads of 14 aren't 48 wide; 48 and 37 are no multiples of 32
    for name in ("README.md", "report.html"):
        shown = html.unescape((tmp_path / "small" / name).read_text()).replace("<code>", "`").replace("</code>", "`")
        assert all(f"{said}." in shown for said in report["serving"])


@pytest.mark.parametrize("base", ["", "meta-llama/Llama-3.2-1B", "gone/with/the/wind", "./models/local", "/data/model"])
def test_the_card_is_one_that_the_hub_accepts(base: str, tmp_path: Path):
    """The Hub refuses a `base_model` that is no repo id; a path of the training machine is nobody's business."""
    model, _ = zeroed()
    model.config._name_or_path = base
    report = export_pruned(model, tmp_path / "small", groups=groups_of("llama"))
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.library_name == "transformers"
    assert {"pruned", "hesso"} <= set(card.data.tags or ())
    assert (card.data.base_model == base) if base.count("/") == 1 and base[0] != "." else not card.data.base_model
    if card.data.base_model:
        validate_repo_id(card.data.base_model)
    assert f"| `hidden_size` | 72 | {report.sizes_after['hidden_size']} |" in card.text
    assert f"{report.pruning_ratio:.1%}" in card.text
    assert f"{report.parameters_after:,}" in card.text


@pytest.mark.parametrize("name", ["llama-tied", "smollm3", "ernie4_5"])
def test_tied_weights_stay_tied(name: str, tmp_path: Path):
    model, _ = zeroed(name)
    export_pruned(model, tmp_path / "small", groups=groups_of(name))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.tie_word_embeddings
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(tmp_path / "small" / "model.safetensors")


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, PreTrainedModel, KeptUnits]:
    """Return a dense checkpoint whose pruned units are at zero."""
    model, kept = zeroed()
    model.save_pretrained(tmp_path / "checkpoint-9")
    tokenizer().save_pretrained(tmp_path / "checkpoint-9")
    return tmp_path / "checkpoint-9", model, kept


@pytest.mark.parametrize("kind", [str, Path])
def test_a_checkpoint_without_a_state_is_cut_where_it_is_zero(
    kind: Callable[[Path], Any],
    checkpoint: tuple[Path, PreTrainedModel, KeptUnits],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    folder, model, kept = checkpoint
    before = contents(folder)
    report = export_pruned(kind(folder), kind(tmp_path / "small"))
    assert report.kept_units == kept
    assert "exactly zero" in caplog.text
    assert contents(folder) == before
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    input_ids = token_ids(model.config)
    assert relative_difference(logits(small, input_ids), logits(model, input_ids)) <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "small").get_vocab()["w42"] == 42


def test_a_checkpoint_can_be_exported_in_place(checkpoint: tuple[Path, PreTrainedModel, KeptUnits]):
    folder, model, _ = checkpoint
    export_pruned(folder, folder)
    input_ids = token_ids(model.config)
    found = logits(AutoModelForCausalLM.from_pretrained(folder), input_ids)
    assert relative_difference(found, logits(model, input_ids)) <= 1e-5


def test_the_smaller_model_itself_is_refused_in_one_message(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "small"
    random_model(ALL["llama"].config()).save_pretrained(folder)
    (folder / REPORT_NAME).write_text("{}")
    with pytest.raises(HessoError, match=r"small'\) is the smaller model already, as its pruning_report\.json says"):
        export_pruned(folder, tmp_path / "out")
    assert not caplog.text
    (folder / REPORT_NAME).unlink()
    with pytest.raises(HessoError, match="nothing in it is pruned; give a checkpoint-"):
        export_pruned(folder, tmp_path / "out")
    assert "written as large" not in caplog.text
    assert not (tmp_path / "out").exists()


def test_an_unfinished_checkpoint_is_refused(checkpoint: tuple[Path, PreTrainedModel, KeptUnits], tmp_path: Path):
    state = {"finished": False, "step": 9, "schedule_end": 20}
    (checkpoint[0] / STATE_NAME).write_text(json.dumps(state))
    with pytest.raises(HessoError, match="step 9 of 20"):
        export_pruned(checkpoint[0], tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_source_that_is_no_folder_is_named(tmp_path: Path):
    with pytest.raises(HessoError, match="nowhere"):
        export_pruned(tmp_path / "nowhere", tmp_path / "small")


def test_an_unknown_dtype_is_refused_before_anything_is_done(old_folder: Path):
    assert "int8" in refuse(zeroed()[0], old_folder, HessoError, dtype="int8")


def test_a_model_without_a_pruned_unit_comes_out_whole_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = random_model(ALL["llama"].config())
    report = export_pruned(model, tmp_path / "small", groups=groups_of("llama"))
    assert "no unit's weights are zero" in caplog.text
    assert report.pruning_ratio == 0
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert all(torch.equal(small.get_parameter(name), tensor) for name, tensor in model.named_parameters())
