"""The pictures: quality.svg draws what its JSON holds, those of method.md are up to date; all are legible."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import ROOT

GAPS = {
    "dense": 0.0, "hesso": 0.35, "hesso, without healing": 0.55, "hesso, healing, replay": 0.36, "OBS": 0.5,
    "FLAP": 0.9, "one-shot, magnitude": 6.0, "scratch": 4.0,
}  # fmt: skip
PAGES = ("#ffffff", "#0d1117")  # GitHub's, light and dark


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import picture

    return picture


def loss(method: str, ratio: float, tokens: int) -> float:
    return 3.0 + GAPS[method] * ratio - tokens / 1e6


def measured() -> dict[str, Any]:
    """Return results of two models: of the large one 20% at one number of tokens and 50% at two, with three seeds."""
    runs = []
    for method in GAPS:
        for ratio, tokens in ((0.5, 10_000), (0.5, 40_000), (0.2, 40_000)):
            if method == "dense" and ratio == 0.2:
                continue
            for seed, off in enumerate((0.0, -0.01, 5.0)):  # the median is that of seed 0
                ratio_of_run = 0.0 if method == "dense" else ratio
                found = {"in": loss(method, ratio_of_run, tokens) + off, "out": 8.0 if method == "dense" else 9.0}
                parameters = round(2000 * (1 - ratio_of_run)) + (40 if method == "FLAP" else 0)
                run = {"model": "big", "method": method, "ratio": ratio_of_run, "tokens": tokens, "seed": seed}
                runs.append(run | found | {"parameters": parameters})
    small = {"model": "small", "method": "hesso", "ratio": 0.3, "tokens": 90_000, "seed": 0, "in": 1.0, "out": 1.0}
    return {
        "settings": {name: {"text": "docs"} for name in ("big", "small")},
        "base": {"big": {"parameters": 2000}, "small": {"parameters": 100}},
        "runs": [*runs, small | {"parameters": 70}],
    }


def test_the_panels_hold_the_medians_of_the_largest_model(picture: ModuleType) -> None:
    result = measured()
    assert picture.largest(result) == "big"
    one_ratio = [run for run in result["runs"] if run["model"] != "big" or run["ratio"] in (0.0, 0.5)]
    of_small = [run | {"ratio": ratio} for run in one_ratio if run["model"] == "small" for ratio in (0.2, 0.7)]
    assert picture.largest(result | {"runs": one_ratio + of_small}) == "small", "of the other there is no curve"
    (by_share, other_by_share), (by_tokens, other_by_tokens) = picture.panels(result, "big")
    assert by_share.x_label.endswith("after 40,000 tokens"), "at which most ratios were measured"
    assert (by_share.title, other_by_share.title) == ("held-out Python documentation", "other text: WikiText-2")
    assert (by_tokens.title, other_by_tokens.title) == ("50% removed", "50% removed, other text")
    assert {series.method for series in by_share.series} == set(GAPS) - {"dense"}
    for series in by_share.series:
        off = 40 / 2000 if series.method == "FLAP" else 0.0  # what was really removed
        expected = [(ratio - off, loss(series.method, ratio, 40_000)) for ratio in (0.2, 0.5)]
        assert list(itertools.chain(*series.points)) == pytest.approx(list(itertools.chain(*expected)))
    for series in by_tokens.series:
        expected = [(tokens, loss(series.method, 0.5, tokens)) for tokens in (10_000, 40_000)]
        assert list(itertools.chain(*series.points)) == pytest.approx(list(itertools.chain(*expected)))
    assert by_share.dense == ((0.0, loss("dense", 0.0, 40_000)),)
    assert [x for x, _ in by_tokens.dense] == [10_000, 40_000]
    for panel, other in ((by_share, other_by_share), (by_tokens, other_by_tokens)):
        assert {y for series in other.series for _, y in series.points} == {9.0}
        assert [[x for x, _ in each.points] for each in other.series] == [
            [x for x, _ in each.points] for each in panel.series
        ]


def test_shares_are_shown_where_most_were_measured_and_tokens_for_what_was_measured_as_often_as_hesso(
    picture: ModuleType,
) -> None:
    result = measured()
    at_more = [run for run in result["runs"] if run["model"] == "big" and run["method"] in ("hesso", "OBS", "dense")]
    result["runs"] += [run | {"tokens": 90_000} for run in at_more if run["ratio"] != 0.2 and run["tokens"] == 40_000]
    (by_share, _), (by_tokens, _) = picture.panels(result, "big")
    assert by_share.x_label.endswith("after 40,000 tokens")
    assert by_tokens.ticks == (10_000, 40_000, 90_000)
    long = [run | {"tokens": 70_000} for run in result["runs"] if run["tokens"] == 40_000]
    three = ["OBS", "FLAP", "Wanda-sp", "hesso"]
    for methods, shown in ((three[1:], 40_000), (three, 70_000)):
        more = [run | {"method": name} for run in long if run["method"] == "hesso" for name in methods]
        (found, _), _ = picture.panels(result | {"runs": result["runs"] + more}, "big")
        assert found.x_label.endswith(f"after {shown:,} tokens"), methods
    assert {series.method for series in by_tokens.series} == {"hesso", "OBS"}


def test_a_variant_that_was_measured_less_often_than_hesso_is_left_to_the_tables(picture: ModuleType) -> None:
    result = measured()
    like = [run for run in result["runs"] if run["model"] == "big" and run["method"] == "hesso"]
    often = [run | {"method": "hesso, often"} for run in like]
    once = [run | {"method": "hesso, once"} for run in like if run["ratio"] == 0.5]
    result["runs"] += often + once
    by_share, _ = picture.panels(result, "big")[0]
    assert {series.method for series in by_share.series} == {*GAPS, "hesso, often"} - {"dense"}
    with pytest.raises(SystemExit, match="no run of small"):
        picture.panels({**result, "runs": [run for run in result["runs"] if run["model"] == "big"]}, "small")


def test_where_tokens_make_no_curve_there_is_one_row(picture: ModuleType) -> None:
    result = measured()
    result["runs"] = [run for run in result["runs"] if run["tokens"] != 10_000]
    assert len(picture.panels(result, "big")) == 1
    short, tall = picture.draw(result, "big"), picture.draw(measured(), "big")
    assert [axis.get_xscale() for axis in short.axes] == ["linear", "linear"]
    assert [axis.get_xscale() for axis in tall.axes] == ["linear", "linear", "log", "log"]
    assert short.get_figheight() < tall.get_figheight()


def test_every_line_is_drawn_and_named_and_what_is_far_off_has_its_number(picture: ModuleType) -> None:
    result = measured()
    figure = picture.draw(result, "big")
    for axis, panel in zip(figure.axes, itertools.chain(*picture.panels(result, "big")), strict=True):
        lines = {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axis.lines}
        texts = {text.get_text() for text in axis.texts}
        for series in panel.series:
            assert lines[series.label] == list(series.points)
            last = series.points[-1][1]
            assert f"{series.label} {last:.2f}" + (" ↑" if last > axis.get_ylim()[1] else "") in texts
        assert f"dense {panel.dense[-1][1]:.2f}" in texts
        if axis in figure.axes[::2]:  # on the other text all are alike here
            above = {text.split()[0] for text in texts if "↑" in text}
            assert above == {"magnitude", "from"}  # HESSO, its variants and the best peers are within
        assert [round(tick, 9) for tick in axis.get_xticks()] == [round(tick, 9) for tick in panel.ticks]


def test_no_two_labels_touch_and_none_leaves_the_picture(picture: ModuleType) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    result = measured()
    for method in ("ShortGPT", "Wanda-sp", "one-shot, first-order Taylor", "hesso, principal basis"):
        alike = [run for run in result["runs"] if run["method"] == "hesso" and run["model"] == "big"]
        result["runs"] += [run | {"method": method} for run in alike]
    figure = picture.draw(result, "big")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # of labels the text alone, without the lines that lead to them
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for axis in figure.axes for text in axis.texts]
    assert len(boxes) == 48
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.shrunk(1.0, 0.85).overlaps(other.shrunk(1.0, 0.85))


@pytest.mark.parametrize("places", [[0.1, 0.5, 0.9], [0.5] * 5, [0.0, 0.01, 0.99, 1.0], [0.3]])
def test_places_are_moved_apart_and_no_more_than_they_must(picture: ModuleType, places: list[float]) -> None:
    moved = picture.spread(places, 0.1)
    assert all(b - a >= 0.1 - 1e-12 for a, b in itertools.pairwise(moved))
    assert all(-1e-12 <= place <= 1 for place in moved)
    if all(b - a >= 0.1 for a, b in itertools.pairwise(places)) and max(places) < 0.98:
        assert moved == pytest.approx(places)
    elif len(set(places)) == 1:
        assert sum(moved) == pytest.approx(sum(places))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def assert_legible(colours: set[str]) -> None:
    for colour, page in itertools.product(colours, PAGES):
        light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.1, (colour, page)


def test_every_method_has_a_colour_that_stands_out_from_both_pages(picture: ModuleType) -> None:
    import quality

    methods = [method for method in quality.METHODS if method != "dense"]
    assert set(picture.PEERS) == {method for method in methods if method not in quality.HESSO}
    colours = {picture.Series(method, ()).colour for method in methods} | {picture.INK}
    assert_legible(colours)


def test_the_pictures_of_the_method_are_what_the_script_draws_and_stand_in_the_docs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import pictures

    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    for name in pictures.PICTURES:
        assert re.search(rf"^!\[\w.{{20,}}\]\(pictures/{name}\.svg\)$", page, re.MULTILINE), name
    assert_legible({pictures.INK, pictures.HEADS, pictures.MLP, pictures.STREAM})
    monkeypatch.setattr("sys.argv", ["pictures.py", "--check"])
    assert pictures.main() == 0, "run python docs/pictures.py"
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    assert pictures.main() == 1, "a missing picture isn't noticed"


def test_the_same_results_make_the_same_file(picture: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text(json.dumps(measured()))
    made = []
    for name in ("one.svg", "two.svg", "three.png"):
        picture.main(["--results", str(tmp_path / "quality.json"), "--output", str(tmp_path / name)])
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    assert made[2].startswith(b"\x89PNG")
    assert f"HESSO {loss('hesso', 0.5, 40_000):.2f}" in labels(tmp_path / "one.svg")


def labels(path: Path) -> set[str]:
    """Return all text of an SVG."""
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8")))


def test_the_picture_in_the_docs_is_of_the_results(picture: ModuleType) -> None:
    result = json.loads(picture.RESULTS.read_text(encoding="utf-8"))
    figure = picture.draw(result, picture.largest(result))
    shown = labels(picture.PICTURE)
    for axis in figure.axes:
        assert {text.get_text() for text in axis.texts} <= shown, "run `make picture`"
