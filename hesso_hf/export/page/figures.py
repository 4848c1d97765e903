"""Small pictures as inline SVG: lines over an axis with shaded spans, and which of a layer's units stayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from .markup import Markup, element

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 220, 48, 8, 10, 24
_COLOURS = 6
_BINS, _SHADES = 96, 4  # of a strip: places beside each other, and shades of each
_FEW = 12  # points that are drawn one by one

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Span:
    """A part of the horizontal axis that is shaded, from `start` to `end`, and what it is called."""

    name: str
    start: int
    end: int


def chart(lines: Mapping[str, Points], end: Callable[[float], str], label: str, spans: Sequence[Span] = ()) -> Markup:
    """Return a figure of lines by name; the least and greatest value stand at the axis.

    Args:
        end: what stands below the left and right end, by their place.
        label: what the picture shows, for who can't see it and as its caption.
        spans: shaded parts; the picture is as wide as lines and spans together.
    """
    xs = [x for points in lines.values() for x, _ in points] + [x for span in spans for x in (span.start, span.end)]
    ys = [y for points in lines.values() for _, y in points]
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
    for index, points in enumerate(lines.values()):
        drawn.append(_line([place(x, y) for x, y in points], index))
    drawn += [
        element("text", f"{high:.3g}", x=_LEFT - 4, y=_TOP + 8, text_anchor="end"),
        element("text", f"{low:.3g}", x=_LEFT - 4, y=floor, text_anchor="end"),
        element("text", end(left), x=_LEFT, y=_HEIGHT - 8),
        element("text", end(right), x=_WIDTH - _RIGHT, y=_HEIGHT - 8, text_anchor="end"),
    ]
    picture = element("svg", *drawn, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", class_="chart", role="img", aria_label=label)
    legend = [_key(name, class_=f"key {colour(index)}") for index, name in enumerate(lines)]
    legend += [
        _key(span.name, class_="key", style=f"background: rgb(128 128 128 / {_opacity(index)})")
        for index, span in enumerate(spans)
    ]
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


def colour(index: int) -> str:
    """Return the class of the line or strip of that number."""
    return f"c{index % _COLOURS}"


def _line(points: Points, index: int) -> Markup:
    """Draw one line, and its points where they are few."""
    path = element("polyline", points=" ".join(f"{x},{y}" for x, y in points), fill="none", stroke="currentColor",
                   stroke_width=2, stroke_linejoin="round")  # fmt: skip
    dots = points if len(points) <= _FEW else ()
    drawn = (element("circle", cx=x, cy=y, r=3, fill="currentColor") for x, y in dots)
    return element("g", path, *drawn, class_=colour(index))


def _shaded(index: int, start: float, end: float) -> Markup:
    """Draw a span: all in a grey that light and dark pages let through, each fuller than the one before."""
    return element("rect", x=start, y=_TOP, width=round(end - start, 1), height=_HEIGHT - _TOP - _BOTTOM,
                   fill="gray", fill_opacity=_opacity(index))  # fmt: skip


def _opacity(index: int) -> float:
    return round(0.08 + 0.12 * (index % 4), 2)


def _key(name: str, **look: str) -> Markup:
    """Return a legend's entry: a square that looks as what it names."""
    return element("span", element("i", **look), name)
