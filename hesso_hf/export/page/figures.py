"""Small pictures as inline SVG: lines over an axis with shaded spans, and which of a layer's units stayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from .markup import Markup, element

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 220, 52, 8, 10, 24
_COLOURS, _TINTS = 6, 4  # of lines, and of spans
_BINS, _SHADES = 96, 4  # of a strip: places beside each other, and shades of each
_FEW = 12  # points that are drawn one by one

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Span:
    """A part of the horizontal axis that is shaded, from `start` to `end`, and what it is called."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Line:
    """A line of a picture.

    Attributes:
        name: in the legend; without one it isn't there.
        colour: number of its colour, None for that of the text.
        kind: a course from point to point, a value that stays until the next point, or a mark that others are seen by.
    """

    name: str
    points: Points
    colour: int | None = 0
    kind: Literal["course", "steps", "mark"] = "course"


def courses(lines: Iterable[tuple[str, Points]]) -> list[Line]:
    """Return lines by name, each of a colour of its own."""
    return [Line(name, points, index) for index, (name, points) in enumerate(lines)]


def chart(
    lines: Sequence[Line],
    end: Callable[[float], str],
    label: str,
    spans: Sequence[Span] = (),
    value: Callable[[float], str] = "{:.3g}".format,
) -> Markup:
    """Return a figure of lines; the least and greatest value stand at the axis.

    Args:
        end: what stands below the left and right end, by their place.
        label: what the picture shows, for who can't see it and as its caption.
        spans: shaded parts; the picture is as wide as lines and spans together.
        value: how a value is written.
    """
    xs = [x for line in lines for x, _ in line.points] + [x for span in spans for x in (span.start, span.end)]
    ys = [y for line in lines for _, y in line.points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    inner, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(_LEFT + inner * (x - left) / ((right - left) or 1), 1),
            round(_TOP + tall * (high - y) / ((high - low) or 1), 1),
        )

    floor = _HEIGHT - _BOTTOM
    drawn = [_shaded(index, place(span.start, low)[0], place(span.end, low)[0]) for index, span in enumerate(spans)]
    drawn.append(element("path", class_="axis", fill="none", d=f"M{_LEFT} {_TOP}V{floor}H{_WIDTH - _RIGHT}"))
    drawn += [_line([place(x, y) for x, y in line.points], line) for line in lines]
    drawn += [
        element("text", value(high), x=_LEFT - 4, y=_TOP + 8, text_anchor="end"),
        element("text", value(low), x=_LEFT - 4, y=floor, text_anchor="end"),
        element("text", end(left), x=_LEFT, y=_HEIGHT - 8),
        element("text", end(right), x=_WIDTH - _RIGHT, y=_HEIGHT - 8, text_anchor="end"),
    ]
    picture = element("svg", *drawn, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", class_="chart", role="img", aria_label=label)
    legend = [_key(line.name, class_=f"key {line.kind} {colour(line.colour)}") for line in lines if line.name]
    legend += [_key(span.name, class_=f"key {_tint(index)}") for index, span in enumerate(spans)]
    return element("figure", picture, element("div", *legend, class_="legend soft"), element("figcaption", label))


def strip(kept: Iterable[int], num_units: int) -> Markup:
    """Return a row of places, the darker the more of the units of that place stayed."""
    places = min(num_units, _BINS)
    counts, sizes = [0] * places, [0] * places
    for unit in range(num_units):
        sizes[unit * places // num_units] += 1
    for unit in kept:
        counts[unit * places // num_units] += 1
    shades: dict[int, str] = {}
    for index, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        shade = ceil(_SHADES * count / size)
        if shade:
            shades[shade] = shades.get(shade, "") + f"M{index} 0h1v1h-1z"
    drawn = (
        element("path", d=path, fill="currentColor", fill_opacity=shade / _SHADES)
        for shade, path in sorted(shades.items())
    )
    label = f"{sum(counts)} of {num_units} kept"
    return element("svg", *drawn, viewBox=f"0 0 {places} 1", preserveAspectRatio="none", class_="strip", role="img",
                   aria_label=label, shape_rendering="crispEdges")  # fmt: skip


def colour(index: int | None) -> str:
    """Return the class of the line or strip of that number."""
    return "plain" if index is None else f"c{index % _COLOURS}"


def _line(points: Points, line: Line) -> Markup:
    """Draw one line, and the points of a course where they are few."""
    (x, y), *others = points
    path = f"M{x} {y}" + "".join(f"H{x}V{y}" if line.kind == "steps" else f"L{x} {y}" for x, y in others)
    look = {"stroke_width": 1.5, "stroke_dasharray": "5 4"} if line.kind == "mark" else {"stroke_width": 2}
    drawn = [element("path", d=path, fill="none", stroke="currentColor", stroke_linejoin="round", **look)]
    if line.kind == "course" and len(points) <= _FEW:
        drawn += [element("circle", cx=x, cy=y, r=3, fill="currentColor") for x, y in points]
    return element("g", *drawn, class_=colour(line.colour))


def _shaded(index: int, start: float, end: float) -> Markup:
    """Draw a span."""
    return element("rect", x=start, y=_TOP, width=round(end - start, 1), height=_HEIGHT - _TOP - _BOTTOM,
                   class_=_tint(index))  # fmt: skip


def _tint(index: int) -> str:
    return f"s{index % _TINTS}"


def _key(name: str, **look: str) -> Markup:
    """Return a legend's entry: a square that looks as what it names."""
    return element("span", element("i", **look), name)
