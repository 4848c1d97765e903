"""The page of `hesso-hf report`: well-formed, loads nothing, and says what the reports say and nothing else."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from hesso_hf import HessoConfig
from hesso_hf.cli.main import main
from hesso_hf.cli.training_log import losses_in
from hesso_hf.config.files import RECIPE_NAME
from hesso_hf.config.names import SALIENCIES, STRUCTURES
from hesso_hf.export.page import words
from hesso_hf.export.page.compared import losses_by_share
from hesso_hf.export.page.figures import strip
from hesso_hf.export.page.losses import Losses
from hesso_hf.export.page.markup import element
from hesso_hf.export.page.page import Model, report_page
from hesso_hf.export.page.words import extent_of
from hesso_hf.export.verify import Verification
from hesso_hf.pruning.schedule import PHASES, Schedule

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?%?(?![\w])")
HOSTILE = "</td><script>alert('x')</script><img src=x>\""


SCHEDULE = Schedule(3, 8, 2, 40, cycle_steps=4, cycles=2, pauses=(14,))


def small_report(**changes: Any) -> dict[str, Any]:
    """A report of two layers with every part that a run can leave in one."""
    heads = {"first": 3, "violating": [3, 1], "num_corrected": 1, "corrected": {}, "replaced_by": {}, "paths": []}
    return {
        "model_class": "LlamaForCausalLM",
        "base_model": "made/of-words",
        "stock_class": True,
        "parameters": {"before": 54321, "after": 23456},
        "pruning_ratio": 1 - 23456 / 54321,
        "sizes": {"before": {"num_key_value_heads": 7, "hidden_size": 66}, "after": {"num_key_value_heads": 4.5,
                                                                                   "hidden_size": 44}},
        "verification": {"fold_error": 3.21e-7, "rounding_error": 0.0123, "dtype": "bfloat16", "tokens": 64},
        "hesso_config": HessoConfig(pruning_ratio=0.57, cric=True).to_dict(),
        "target": {"kept_units": {"attention_heads": 5}, "num_units": {"attention_heads": 7}, "metric": "latency",
                   "cost_before": 8.7654, "cost_after": 6.5432},
        "schedule": SCHEDULE.to_dict(),
        "phases": {name: list(span) for name, span in SCHEDULE.phases.items()},
        "saliency": {"taylor_first_order": 1.0, "taylor_second_order": 3.0},
        "calibration": {"removed": {"attention_heads": [0.286, 0.571]}, "rises": {"attention_heads": [0.0987, 0.765]}},
        "scores": {"attention_heads": {"units": 7, "removed": 2, "points": [[0, 0.0123], [1, 0.0456], [2, 0.4567],
                                                                           [6, 0.9876]]}},
        "removed_by_step": [[0, 0.0], [19, 0.321], [27, 0.5682]],
        "stream_basis": {"error": 8.76e-7, "tokens": 16385, "clusters": 1, "rise": 0.0345, "energy": {"0.5": 0.789}},
        "steps": 40,
        "quality": {
            "eval_loss": {"examples": 63, "tokens": 987, "before": {"loss": 2.3456, "perplexity": 10.4394},
                          "after": {"loss": 2.5678, "perplexity": 13.0372}},
            "eval_retained_loss": {"examples": 62, "tokens": 986, "before": {"loss": 3.1234, "perplexity": 22.7235}},
        },
        "evaluation": {"dataset": "a.txt", "dtype": "bfloat16", "device": "cuda:0", "batch_size": 6, "block_size": 255,
                       "values": {"loss": {"before": 1.2345, "after": 1.3456}, "piqa acc": {"after": 0.6543}},
                       "errors": {"piqa acc": {"after": 0.0123}}},
        "hyperparameters": {"learning_rate": 0.00123, "seed": 41},
        "command": "hesso-hf prune a.yaml --max_steps 40",
        "recipe": {"model": "made/of-words", "hesso": HessoConfig(pruning_ratio=0.57, cric=True).to_dict()},
        "cric": {"mode": "path", "cycles": 2, "samples_per_cycle": 4, "samples": 8,
                 "structures": {"attention_heads": heads}},
        "distillation": {"teacher": "someone/large", "alpha": 0.9, "temperature": 2.5},
        "replay": {"share": 0.251, "source": "the model itself"},
        "vocabulary": {"tokens": {"before": 777, "after": 555}, "parameters_removed": 1, "kept": [0, 1]},
        "kept_units": {"attention_heads": {"num_units": 7, "kept": [[0, 1, 2, 5, 6], [1, 2, 3, 4]]},
                       "embedding_channels": {"num_units": 66, "kept": [list(range(44))]}},
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
    } | changes  # fmt: skip


BARE = {name: small_report()[name] for name in ("parameters", "pruning_ratio", "sizes", "verification")}
LOSSES = [{"step": step, "loss": 5.0 - step / 17} for step in (4, 12, 20, 40)]


def saved(folder: Path, report: dict[str, Any], losses: Any = None, max_steps: int = 40) -> Path:
    """Write a smaller model's folder as far as the command reads it, with a run's checkpoints beside it."""
    folder.mkdir(parents=True)
    (folder / "pruning_report.json").write_text(json.dumps(report))
    for step in (9, 10) if losses is not None else ():
        checkpoint = folder.parent / f"checkpoint-{step}"
        checkpoint.mkdir(exist_ok=True)
        state = {"max_steps": max_steps, "log_history": losses if step == 10 else [{"step": 1, "loss": 99.0}]}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return folder


class Parsed(HTMLParser):
    """What a page holds: its tags and their attributes, its text, and its tables; it refuses what isn't closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in ("meta", "wbr") else [tag]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += "\n"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


def parsed(*reports: dict[str, Any], **given: Any) -> Parsed:
    return Parsed(report_page([Model(f"small-{'abc'[i]}", report, **given) for i, report in enumerate(reports)]))


def numbers_in(value: Any, key: str = "") -> Iterator[float]:
    """Yield the numbers of a report, also in names and texts; of units kept by index, how many they are."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers_in(name)
            yield from numbers_in(inner, name)
    elif isinstance(value, list):
        if key == "kept":
            yield from (len(layer) for layer in value if isinstance(layer, list))
            return
        for inner in value:
            yield from numbers_in(inner)
    elif isinstance(value, str):
        yield from map(float, re.findall(r"\d+(?:\.\d+)?", value))
    elif isinstance(value, int | float):
        yield float(value)


def shown_as(token: str, values: set[float]) -> bool:
    """Whether a number on the page is one of the values, as far as its digits go."""
    digits, share = token.replace(",", "").removesuffix("%"), 100 if token.endswith("%") else 1
    mantissa, _, exponent = digits.partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return any(abs(value * share - float(digits)) <= 0.5001 * last for value in values)


@pytest.mark.parametrize("reports", [[small_report()], [BARE], [small_report(), BARE]], ids=["one", "bare", "two"])
def test_it_is_well_formed_and_loads_nothing(reports: list[dict[str, Any]]) -> None:
    page = report_page([Model(f"small-{i}", report) for i, report in enumerate(reports)])
    found = Parsed(page)
    assert not {"script", "link", "img", "iframe", "object", "base", "a"} & {tag for tag, _ in found.tags}
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bsrc=|href=", page)
    assert not [name for _, given in found.tags for name in given if name.startswith("on")]
    policy = next(given for _, given in found.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert "prefers-color-scheme: dark" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert ("num_<wbr>key_<wbr>value_<wbr>heads" in page) is ("num_key_value_heads" in reports[0]["sizes"]["after"])
    assert page.count("<table") == page.count('<div class="scroll"><table')


def test_every_number_on_it_is_in_the_report_or_the_log(tmp_path: Path) -> None:
    report = small_report()
    losses = losses_in(str(saved(tmp_path / "small", report, LOSSES).parent))
    found = parsed(report, losses=losses)
    values = set(numbers_in({**report, "vocabulary": report["vocabulary"]["tokens"], "log": LOSSES}))
    pairs = [report["parameters"], report["vocabulary"]["tokens"], {"before": 7, "after": 5}]
    pairs += [{when: report["sizes"][when][name] for when in ("before", "after")} for name in report["sizes"]["after"]]
    values |= {1 - pair["after"] / pair["before"] for pair in pairs}
    values |= {2 * count / 1000 for count in report["parameters"].values()}  # kB in bfloat16
    values |= {2.5678 - 2.3456, 1.3456 - 1.2345, 13.0372 / 10.4394 - 1}  # losses and perplexity, after against before
    values |= {0, 1}  # layers
    ends = (3, 3 + 4 * 2, 3 + 4 * 2 + 8 + 2 * 4, 40)  # of the phases; the period given up with its last step adds two
    values |= {0, *ends, *(end + 1 for end in ends[:-1])}
    shown = NUMBER.findall(re.sub(r"\d+(\.\d+){2}\S*", "", found.text))  # versions are no numbers
    assert len(shown) > 60
    assert [token for token in shown if not shown_as(token, values)] == []
    for expected in ("54,321", "56.8%", "108.64", "46.91", "3.2e-07", "1.2e-02", "0.0987", "8.765", "25.1%", "78.9%"):
        assert expected in shown
    assert {"2.3456", "13.04", "1.3456", "63"} <= set(shown)
    assert ["memory of the weights, in bfloat16", "108.64\u00a0kB", "46.91\u00a0kB", "-56.8%"] in found.rows
    assert ["loss on held-out examples (nats per token)", "2.3456", "2.5678", "+0.2222"] in found.rows
    assert ["loss on other text (nats per token)", "3.1234", "–", ""] in found.rows
    assert ["perplexity on held-out examples", "10.44", "13.04", "+24.9%"] in found.rows
    assert ["piqa acc", "–", "0.6543 ± 0.0123", ""] in found.rows
    assert ["loss on a.txt", "1.2345", "1.3456", "+0.1111"] in found.rows
    assert "hesso-hf prune a.yaml --max_steps 40" in found.text
    assert ["attention heads", "3", "1", "3 → 1"] in found.rows
    assert ["attention heads", "57.1%", "0.7650"] in found.rows
    assert ["tokens", "777", "555", "28.6%"] in found.rows


def test_what_a_report_says_is_text_whatever_it_says() -> None:
    def spoilt(value: Any) -> Any:
        if isinstance(value, dict):
            names = {
                "removed",
                "rises",
                "structures",
                "kept_units",
                "num_units",
                "saliency",
                "versions",
                "before",
                "after",
                "quality",
                "values",
                "hyperparameters",
                "scores",
            }
            fixed = ({"before"}, {"num_units"}, {"loss", "perplexity"})  # keys that are read by name
            return {name: {HOSTILE + k: spoilt(v) for k, v in inner.items()}
                    if name in names and isinstance(inner, dict) and not any(keys <= set(inner) for keys in fixed)
                    else spoilt(inner) for name, inner in value.items()}  # fmt: skip
        return HOSTILE + value if isinstance(value, str) else value

    plain, report = small_report(), spoilt(small_report())
    assert HOSTILE in report["base_model"]
    assert all(name.startswith(HOSTILE) for name in (*report["kept_units"], *report["sizes"]["after"]))
    for reports in ([plain], [report]), ([plain, plain], [report, report]):
        tags = [[tag for tag, _ in parsed(*of).tags] for of in reports]
        assert tags[0] == tags[1]
    found = Parsed(report_page([Model(HOSTILE, report), Model("other", plain)]))
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count(HOSTILE) > 20
    assert Parsed(element("p", aria_label=HOSTILE)).tags == [("p", {"aria-label": HOSTILE})]


def test_without_a_run_it_says_what_was_removed_and_how_exactly() -> None:
    text = parsed(BARE).text
    assert "What was removed" in text
    assert "How exact it is" in text
    assert not [title for title in ("How it went", "How it was decided") if title in text]


def test_a_run_without_a_logged_loss_says_how_to_log_it() -> None:
    said = "No loss was logged: set logging_steps."
    assert said in parsed(small_report()).text.replace("\n", "")
    assert said not in parsed(small_report(), losses=Losses({"loss": [(1, 2.0)]}, 0)).text.replace("\n", "")
    assert "No loss was logged" not in parsed(BARE).text  # without a run


SERVED = "vllm serve path/to/this/model\nhesso-hf export path/to/this/model --for gguf"


def test_how_to_serve_it_stands_above_what_misreads_it() -> None:
    even = {"mlp_channels": {"num_units": 4, "kept": [[0, 1], [2, 3]]}}
    engines = ["vLLM", "llama.cpp"]
    found = parsed(small_report(engines=engines, serving=["So does SGLang"], kept_units=even)).text
    assert SERVED in found
    assert found.index(SERVED) < found.index("docs/serving.md") < found.index("So does SGLang.")
    assert "vllm serve" not in parsed(small_report()).text
    uneven = {"mlp_channels": {"num_units": 4, "kept": [[0, 1], [2]]}}
    assert "Only Transformers serves it, with trust_remote_code" in parsed(small_report(kept_units=uneven)).text


SPEEDS = {
    "peak_memory": {"before": 7050, "after": 3500},
    "tokens_per_second_alone": {"before": 2000.4, "after": 3000.6},
    "first_token_seconds": {"before": 0.5, "after": 0.25},
    "tokens_written_per_second_in_batches": {"after": 33.33},
}


def test_what_eval_measured_is_called_as_in_its_own_table() -> None:
    evaluation = small_report()["evaluation"]
    found = parsed(small_report(evaluation=evaluation | {"values": SPEEDS}))
    for row in (
        ["peak memory (bytes)", "7,050", "3,500", "-50.4%"],
        ["prefill tokens/s, batch 1", "2,000", "3,001", "+50.0%"],
        ["first token (s)", "0.5000", "0.2500", "-50.0%"],
        ["decode tokens/s, batch 6", "–", "33.3", ""],
    ):
        assert row in found.rows


def test_several_have_a_column_each() -> None:
    found = parsed(small_report(), {**BARE, "parameters": {"before": 54321, "after": 34567}})
    assert found.rows[0] == ["", "small-a", "small-b"]
    assert ["parameters after", "23,456", "34,567"] in found.rows
    assert ["healing", "auto", "–"] in found.rows
    assert ["CRIC", "2 cycles, 8 samples", "–"] in found.rows
    assert ["piqa acc", "0.6543 ± 0.0123", "–"] in found.rows
    assert found.text.count("What was removed") == 2


def measured(share: float, loss: float, before: float = 3.0, **changes: Any) -> dict[str, Any]:
    """A report of a model that was measured before and after."""
    quality = {"eval_loss": {"examples": 64, "tokens": 640, "before": {"loss": before}, "after": {"loss": loss}}}
    return small_report(pruning_ratio=share, quality=quality, base_model="org/base", **changes)


def test_several_of_one_base_model_are_drawn_over_the_share_that_was_removed() -> None:
    one, two, three = measured(0.5, 3.75), measured(0.2, 3.125), measured(0.3, 3.25)
    drawn = [(0.0, 3.0), (0.2, 3.125), (0.3, 3.25), (0.5, 3.75)]
    assert losses_by_share([one, two, three]) == {"held-out examples": drawn}
    text = parsed(one, two, three).text
    assert "Loss over the share of the parameters that was removed; at 0% the base model as it came" in text
    assert ["loss on held-out examples, before", "3.0000", "3.0000"] in parsed(one, two).rows
    assert ["loss on held-out examples, after", "3.7500", "3.1250"] in parsed(one, two).rows
    for other in (measured(0.5, 3.8), measured(0.3, 3.5, before=2.9), {**two, "base_model": "else"}, small_report()):
        assert losses_by_share([one, other]) == {}


def test_a_look_in_each_period_is_told_as_one_and_cycles_as_cycles() -> None:
    path = small_report()["cric"]
    healed = path | {"mode": "healed", "cycles": 5, "samples_per_cycle": 1, "samples": 5}
    assert "go part of that way in 2 cycles of 4 looks each" in parsed(small_report()).text
    text = parsed(small_report(cric=healed)).text
    assert "go on trial once in each of the 5 pruning periods, the others standing in for them" in text
    assert "cycles of" not in text
    assert extent_of(path) == "2 cycles, 8 samples"
    assert extent_of(healed) == "a look in each of 5 periods"
    assert extent_of(healed | {"cycles": 1}) == "one look"


def test_of_what_stays_whole_nothing_is_said_to_be_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = small_report()
    none = {"first": 0, "violating": [0, 0], "num_corrected": 0, "corrected": {}, "replaced_by": {}, "paths": []}
    report["cric"]["structures"] |= {"mlp_channels": none}
    text = parsed(report).text
    tried = text[text.index("Corrections by CRIC") : text.index("How exact it is")]
    assert "attention heads" in tried
    assert "MLP channels" not in tried
    assert main(["report", str(saved(tmp_path / "small", report))]) == 0
    assert "; corrected: 1 attention_heads\n" in capsys.readouterr().out


def test_names_between_backticks_are_code_and_the_recipe_beside_is_named() -> None:
    page = report_page([Model("x", small_report(serving=["It serves 6 (`target_sizes`), not <b>"]))])
    assert "<li>It serves 6 (<code>target_sizes</code>), not &lt;b&gt;.</li>" in page
    assert f"(<code>{RECIPE_NAME}</code> beside the model)" in page
    assert RECIPE_NAME not in report_page([Model("x", small_report(recipe=None))])


def test_the_config_on_it_is_the_run_s() -> None:
    asked = HessoConfig(
        pruning_ratio=0.3, structures={"mlp_channels": 3, "attention_heads": 1}, replay_dataset="a: 'b' # <c>"
    )
    text = parsed(small_report(hesso_config=asked.to_dict(), recipe=None)).text
    recipe = yaml.safe_load(text[text.index("hesso:\n") :].partition("\n\n")[0])
    assert HessoConfig.from_dict(recipe["hesso"]) == asked


@pytest.mark.parametrize(
    ("kept", "model_class", "line"),
    [
        ([[0, 1], [2, 3]], "LlamaForCausalLM", 'AutoModelForCausalLM.from_pretrained("path/to/this/model")'),
        ([[0, 1], [2]], "LlamaForCausalLM", '.from_pretrained("path/to/this/model", trust_remote_code=True)'),
        ([[0, 1], [2, 3]], "T5Model", 'T5Model.from_pretrained("path/to/this/model")'),
    ],
)
def test_how_to_load_it(kept: list[list[int]], model_class: str, line: str) -> None:
    units = {"mlp_channels": {"num_units": 4, "kept": kept}}
    text = parsed(small_report(kept_units=units, model_class=model_class)).text
    code = text[text.index("from transformers import") :].partition("\n\n")[0]
    assert len(ast.parse(code).body) == 3
    assert line in code


def test_a_strip_is_as_dark_as_many_stayed() -> None:
    whole, none = strip(range(300), 300), strip([], 300)
    assert whole.count("<path") == 1
    assert 'fill-opacity="1.0"' in whole
    assert whole.count("h1v1h-1z") == 96
    assert "<path" not in none
    assert 'd="M0 0h1v1h-1zM2 0h1v1h-1z"' in strip([0, 2], 3)
    halves = strip([*range(0, 192, 2), 1], 192)  # two units a place, of which one or, in the first, both stayed
    assert 'd="M0 0h1v1h-1z" fill="currentColor" fill-opacity="1.0"' in halves
    assert halves.count('fill-opacity="0.5"') == 1
    assert 'd="M0 0h1v1h-1z" fill="currentColor" fill-opacity="0.25"' in strip([0], 960)  # one of ten is seen


def test_every_name_of_the_method_has_words() -> None:
    assert words.STRUCTURES.keys() == set(STRUCTURES)
    assert words.SALIENCIES.keys() == set(SALIENCIES)
    assert tuple(words.PHASES) == PHASES
    assert words.VERIFIED.keys() <= Verification.__annotations__.keys()


def paths(found: Parsed) -> list[str]:
    """Return the lines in the pictures of a page, but for axes and strips."""
    return [given["d"] or "" for tag, given in found.tags if tag == "path" and given.get("stroke")]


def test_the_losses_of_the_base_model_are_lines_beside_those_of_the_run() -> None:
    run = Losses({"loss": [(4, 4.0), (40, 2.0)], "eval_loss": [(40, 3.0)]}, 0)
    found = parsed(small_report(calibration=None, scores=None, removed_by_step=None), losses=run)
    loss, held_out, base, base_other = paths(found)
    # 2.0 lies at the bottom (196) and 4.0 at the top (10) of the picture; its 40 steps are 320 wide
    assert (loss, held_out) == ("M84.0 10.0L372.0 196.0", "M372.0 103.0")
    assert base == f"M52.0 {round(10 + 93 * (4.0 - 2.3456), 1)}L372.0 {round(10 + 93 * (4.0 - 2.3456), 1)}"
    assert base_other.startswith(f"M52.0 {round(10 + 93 * (4.0 - 3.1234), 1)}L372.0")
    named = ["training loss", "loss on held-out examples", "loss on held-out examples, base model",
             "loss on other text, base model"]  # fmt: skip
    legend = [given["class"] for tag, given in found.tags if tag == "i" and "key" in (given["class"] or "")]
    assert "\n\n".join(named) in found.text
    assert legend[:4] == ["key course c0", "key course c1", "key mark c1", "key mark c2"]


def test_the_share_that_is_gone_is_drawn_over_the_steps_also_without_a_loss() -> None:
    found = parsed(small_report(calibration=None, scores=None))
    assert paths(found) == [f"M52.0 196.0H204.0V{round(10 + 186 * (1 - 0.321 / 0.5682), 1)}H268.0V10.0H372.0V10.0"]
    assert "Share of the parameters that is removed" in found.text
    assert "Loss over the steps" not in found.text
    assert found.count("rect") == 4  # the phases


@pytest.mark.parametrize(("least", "said"), [(0.0123, "; scores by their logarithm"), (0.1, "")])
def test_the_scores_are_drawn_in_two_colours_with_the_cut_between(least: float, said: str) -> None:
    points = [[0, least], [1, 0.3], [2, 0.4567], [6, 0.9876]]
    scores = {"attention_heads": {"units": 7, "removed": 2, "points": points}}
    found = parsed(small_report(calibration=None, removed_by_step=None, scores=scores))
    went, stayed, cut = paths(found)
    assert went.startswith("M52.0 196.0L105.3 ")  # of ranks 0 to 6, the first two
    assert stayed.startswith("M158.7 ")
    assert (went.count("L"), stayed.count("L")) == (1, 1)
    assert stayed.endswith("L372.0 10.0")
    assert cut == "M132.0 196.0L132.0 10.0"
    legend = [given["class"] for tag, given in found.tags if tag == "i"]
    assert legend[-3:] == ["key course c1", "key course c0", "key mark plain"]
    assert f"attention heads: 2 of 7 went{said}\n" in found.text
    assert f"{least:.2g}\n" in found.text


def test_bytes_are_written_in_the_unit_of_the_largest() -> None:
    assert words.memory(861_888, 1_739_008) == "0.86\u00a0MB"
    assert words.memory(999_999, 999_999) == "1,000.00\u00a0kB"
    assert words.memory(14_483_464_192, 14_483_464_192) == "14.48\u00a0GB"


def test_the_log_beside_it_is_drawn_with_the_phases(tmp_path: Path) -> None:
    losses = [*LOSSES, {"step": 20, "eval_loss": 4.25}, {"step": 30, "loss": float("nan")}]
    small = saved(tmp_path / "run" / "small", small_report(calibration=None, scores=None, removed_by_step=None), losses)
    assert main(["report", str(small), "--html", str(tmp_path / "page.html")]) == 0
    found = Parsed((tmp_path / "page.html").read_text())
    assert found.count("rect") == 4
    assert "steps 12 to 27: the chosen units" in found.text
    assert found.count("circle") == len(LOSSES) + 1
    assert "as they aren't finite numbers: 1 logged losses" in found.text
    xs = [float(given["cx"] or 0) for tag, given in found.tags if tag == "circle"]
    assert xs[:4] == sorted(xs[:4])


def test_another_run_s_log_is_left_out_by_name_unless_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = saved(tmp_path / "run" / "small", small_report(), LOSSES, max_steps=41)
    flags = ["report", str(small), "--html", str(tmp_path / "page.html")]
    assert main(flags) == 0
    assert "Loss over the steps of the training" not in (tmp_path / "page.html").read_text()
    assert "is left out: it is of a run of 41 steps, and the report says 40" in capsys.readouterr().err
    assert main([*flags, "--run", str(tmp_path / "run")]) == 0
    assert "Loss over the steps of the training" in (tmp_path / "page.html").read_text()


def test_several_are_compared_and_folders_of_one_name_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(saved(tmp_path / name / "small", small_report(steps=n))) for n, name in enumerate(("x", "y"), 1)]
    assert main(["report", *folders, "--json"]) == 0
    assert [found["steps"] for found in json.loads(capsys.readouterr().out)] == [1, 2]
    assert main(["report", *folders, "--html", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n +x/small +y/small *\n", printed)
    assert re.search(r"\n *steps +1 +2 *\n", printed)
    assert re.search(r"\n *loss on held-out examples, after +2\.5678 +2\.5678 *\n", printed)
    assert re.search(r"\n *piqa acc +0\.6543 ± 0\.0123 +0\.6543 ± 0\.0123 *\n", printed)
    assert Parsed((tmp_path / "page.html").read_text()).rows[0] == ["", "x/small", "y/small"]
    assert not list(tmp_path.glob("*/small/report.html"))  # of one alone it is made again


def test_a_run_s_page_is_made_again_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = saved(run / "small", small_report())
    saved(run / "rung-0.3", BARE)  # a model that was saved on the way
    for given in (small, run):
        assert main(["report", str(given)]) == 0
        printed = capsys.readouterr().out
        assert f"{small}: 56.8% of the parameters removed" in printed
        assert re.search(r"loss on held-out examples \(nats per token\) +2\.3456 +2\.5678", printed)
        assert f"written: {small / 'report.html'}" in printed
        assert (small / "report.html").read_text() == report_page([Model.of("", small_report())])
        (small / "report.html").unlink()
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 40
    (small / "report.html").mkdir()
    assert main(["report", str(run)]) == 0
    told = capsys.readouterr()
    assert "the page isn't made again: `--html`" in told.err
    assert "written" not in told.out


def test_of_a_folder_with_several_models_one_has_to_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = saved(tmp_path / "hesso", small_report())
    assert main(["report", str(tmp_path)]) == 0  # the only one
    two = saved(tmp_path / "one-shot", BARE)
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} has several smaller models: name one of {one}, {two}, or several" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["small", "--html", "page"], "`--html` ('page') must end in .html or .htm"),
        (["small", "--html", "no/page.html"], "there is no folder 'no'; make it first"),
        (["small", "--html", "taken.html"], "`--html` ('taken.html') can't be written: Is a directory"),
        (["small", "--run", "run"], "`--run` ('run') is what the page of `--html` shows"),
        (["small", "other", "--run", "run", "--html", "page.html"], "`--run` is of one model, and 2 are given"),
        (["small", "other", "--plot", "cric.svg"], "`--plot` is of one model, and 2 are given"),
        (["small", "small", "--html", "page.html"], "a folder is named twice"),
        (["small", "--run", "other", "--html", "page.html"], "`--run` ('other'): neither it nor a checkpoint-*"),
        (["small", "--run", "silent", "--html", "page.html"], "has no loss in it; set `logging_steps`"),
        (["small", "--run", "broken", "--html", "page.html"], "isn't a log that Trainer wrote"),
        (["broken"], "isn't a report: Expecting"),
        (["foreign"], "isn't a report: it has no parameters, pruning_ratio"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {
        "small": json.dumps(small_report()),
        "other": json.dumps(BARE),
        "broken": "{",
        "foreign": "{}",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "pruning_report.json").write_text(text)
    (tmp_path / "broken" / "trainer_state.json").write_text('{"log_history": 3}')
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "trainer_state.json").write_text('{"log_history": [{"step": 3}]}')
    (tmp_path / "taken.html").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["report", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_engines_that_misread_a_size_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "small", small_report(serving=["So does SGLang", "vLLM takes 7 for 8"]))
    assert main(["report", str(folder)]) == 0
    assert "\nserving: So does SGLang\nserving: vLLM takes 7 for 8\n" in capsys.readouterr().out
