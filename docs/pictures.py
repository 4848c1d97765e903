"""Draw the pictures of method.md into pictures/: `python docs/pictures.py [--check]`.

They are plain SVG on a transparent ground, in colours that stand out from a white page as from a dark one.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).with_name("pictures")
INK, HEADS, MLP, STREAM = "#737d88", "#d4502f", "#3f78d8", "#3b8a4d"
FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"

# A small layer, in cells: tokens, channels of the hidden state, heads, key-value heads, a head's width, MLP channels.
V, D, H, K, WIDTH, INNER = 12, 10, 4, 2, 2, 14
CELL = 6
MATRICES = {  # rows (outputs) and columns (inputs), as torch stores them
    "embedding": (V, D), "norm": (1, D), "q": (H * WIDTH, D), "k": (K * WIDTH, D), "v": (K * WIDTH, D),
    "o": (D, H * WIDTH), "gate": (INNER, D), "up": (INNER, D), "down": (D, INNER), "output": (V, D),
}  # fmt: skip


@dataclass
class Drawing:
    """Collects the elements of one SVG."""

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def add(self, tag: str, text: str = "", **attributes: object) -> None:
        """Add an element; floats are rounded to a tenth, and `_` in names stands for `-`."""
        values = {name.replace("_", "-"): value for name, value in attributes.items()}
        rounded = {name: round(value, 1) if isinstance(value, float) else value for name, value in values.items()}
        written = "".join(f' {name}="{value}"' for name, value in rounded.items())
        self.parts.append(f"<{tag}{written}>{escape(text)}</{tag}>" if text else f"<{tag}{written}/>")

    def box(self, x: float, y: float, width: float, height: float, **style: object) -> None:
        """Add a rectangle."""
        self.add("rect", x=float(x), y=float(y), width=float(width), height=float(height), **style)

    def line(self, points: Iterable[tuple[float, float]], **style: object) -> None:
        """Add a line through points."""
        self.add("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), **({"fill": "none"} | style))

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1.6) -> None:
        """Add a line with a head at its end."""
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        sides = [(end[0] - 8 * math.cos(angle + turn), end[1] - 8 * math.sin(angle + turn)) for turn in (0.45, -0.45)]
        self.line([start, end], stroke=colour, stroke_width=width)
        self.line([sides[0], end, sides[1]], stroke=colour, stroke_width=width)

    def text(self, x: float, y: float, text: str, size: int = 12, colour: str = INK, **style: object) -> None:
        """Add a line of text, `anchor` start, middle or end."""
        self.add("text", text, x=float(x), y=float(y), font_size=size, fill=colour, **style)

    def svg(self) -> str:
        """Return the file's text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="{FONT}" role="img">'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", *self.parts, "</svg>"]) + "\n"


# -- the basis of the stream -------------------------------------------------------------------------------------------


def basis() -> Drawing:
    """Draw two channels of the hidden state before and after the turn, and the size of ten channels in both bases."""
    drawing = Drawing(760, 352, "The hidden state in the given basis and in its principal basis")
    rng = random.Random(3)
    points = [(rng.uniform(-1, 1), rng.uniform(-1, 1)) for _ in range(170)]
    points = [(98 * a, 26 * b) for a, b in points if a * a + b * b < 1]  # evenly within an ellipse
    _cloud(drawing, 190, points, math.radians(36), "given basis", "channel 1", "channel 2")
    _cloud(drawing, 570, points, 0.0, "principal basis", "channel 1", "channel 2")
    drawing.arrow((352, 105), (408, 105), INK, 2)
    drawing.text(380, 93, "turn by Q", text_anchor="middle")
    _bars(drawing, 190, [62, 48, 55, 41, 58, 50, 44, 60, 47, 53], 10, "every channel holds a part")
    _bars(drawing, 570, [96, 82, 66, 50, 37, 26, 12, 8, 5, 3], 6, "the last ones hold little: they can go")
    return drawing


def _cloud(
    drawing: Drawing, x: int, points: list[tuple[float, float]], angle: float, title: str, across: str, up: str
) -> None:
    y = 110
    drawing.text(x, 20, title, 14, text_anchor="middle", font_weight="bold")
    cos, sin = math.cos(angle), math.sin(angle)
    dots = "".join(f"M{x + a * cos - b * sin:.0f} {y - a * sin - b * cos:.0f}h0" for a, b in points)
    drawing.add("path", d=dots, stroke=STREAM, stroke_width=4.5, stroke_linecap="round")
    drawing.arrow((x - 130, y), (x + 135, y), INK)
    drawing.arrow((x, y + 72), (x, y - 76), INK)
    drawing.text(x + 138, y + 18, across, 11, text_anchor="end")
    drawing.text(x + 8, y - 66, up, 11)


def _bars(drawing: Drawing, x: int, heights: list[int], kept: int, note: str) -> None:
    base, step = 318, 24
    start = x - step * len(heights) / 2
    for index, height in enumerate(heights):
        stays = index < kept
        style: dict[str, object] = (
            {"fill": STREAM} if stays else {"fill": "none", "stroke": STREAM, "stroke_width": 1.3}
        )
        style |= {} if stays else {"stroke_dasharray": "3 2"}
        drawing.box(start + index * step + 3, base - 0.85 * height, step - 6, 0.85 * height, **style)
    drawing.line([(start, base), (start + step * len(heights), base)], stroke=INK)
    drawing.text(x, base + 18, note, text_anchor="middle")
    drawing.text(start, base - 96, "mean square of each channel", 11)


# -- the groups --------------------------------------------------------------------------------------------------------


def groups() -> Drawing:
    """Draw three copies of one layer's matrices, each with what belongs to one unit of a structure."""
    drawing = Drawing(800, 512, "The rows and columns that belong to one unit of each structure")
    heads = range(WIDTH, 2 * WIDTH)
    queries = range(H // K * WIDTH, 2 * (H // K) * WIDTH)
    rows = [
        (
            "attention_heads",
            "The second of two key-value heads and the two query heads that share it: rows of q, k, v, columns of o.",
            HEADS, {"q": (queries, None), "k": (heads, None), "v": (heads, None), "o": (None, queries)},
        ),
        (
            "mlp_channels", "One channel of the MLP: a row of gate and of up, a column of down.", MLP,
            {"gate": (range(5, 6), None), "up": (range(5, 6), None), "down": (None, range(5, 6))},
        ),
        (
            "embedding_channels",
            "One channel of the hidden state: all that writes or reads it, in every layer.",
            STREAM,
            {name: (range(3, 4), None) if name in ("o", "down") else (None, range(3, 4)) for name in MATRICES},
        ),
    ]  # fmt: skip
    for index, (name, meaning, colour, chosen) in enumerate(rows):
        y = 18 + index * 172
        drawing.text(12, y, name, 14, colour, font_weight="bold")
        drawing.text(12, y + 18, meaning)
        _layer(drawing, y + 48, colour, chosen)
    return drawing


def _layer(drawing: Drawing, y: float, colour: str, chosen: dict[str, tuple[range | None, range | None]]) -> None:
    """Draw all matrices of a layer in a row, with the chosen rows and columns of each filled."""
    x = 12.0
    for name, (rows, columns) in MATRICES.items():
        width, height = columns * CELL, rows * CELL
        drawing.text(x + width / 2, y - 6, name, 11, text_anchor="middle")
        drawing.box(x, y, width, height, fill=INK, fill_opacity=0.22, stroke=INK, stroke_width=1)
        for split in range(WIDTH, rows, WIDTH) if colour == HEADS and name in ("q", "k", "v") else ():
            drawing.line([(x, y + split * CELL), (x + width, y + split * CELL)], stroke=INK, stroke_width=0.6)
        for split in range(WIDTH, columns, WIDTH) if colour == HEADS and name == "o" else ():
            drawing.line([(x + split * CELL, y), (x + split * CELL, y + height)], stroke=INK, stroke_width=0.6)
        mine, beside = chosen.get(name, (None, None))
        if mine is not None:
            drawing.box(x, y + mine.start * CELL, width, len(mine) * CELL, fill=colour)
        if beside is not None:
            drawing.box(x + beside.start * CELL, y, len(beside) * CELL, height, fill=colour)
        x += width + 17.5


# -- the schedule ------------------------------------------------------------------------------------------------------


def schedule() -> Drawing:
    """Draw the scale of the units over the steps, and below it the size of the model in memory."""
    drawing = Drawing(760, 372, "The scale of units and the size of the model over the steps of a run")
    warmup, period, end = 70, 118, 740
    starts = [warmup + 108 + index * period for index in range(4)]  # the last one is where recovery begins
    phases = [("warm-up", warmup, starts[0])]
    phases += [(f"period {index + 1}", a, b) for index, (a, b) in enumerate(pairwise(starts))]
    phases += [("recovery", starts[-1], end)]
    for index, (name, a, b) in enumerate(phases):
        if index % 2:
            drawing.box(a, 40, b - a, 290, fill=INK, fill_opacity=0.1)
        drawing.text((a + b) / 2, 30, name, 13, text_anchor="middle", font_weight="bold")
    _scales(drawing, starts, warmup, end, 200, 70)
    _size(drawing, starts[-1], warmup, end, 330, 252)
    drawing.text(
        end, 352, "steps, not to scale: by default pruning is over after a tenth of the run", text_anchor="end"
    )
    return drawing


def _scales(drawing: Drawing, starts: list[float], left: float, right: float, base: float, top: float) -> None:
    _axis(drawing, left, right, base, top, ("0", "1"), "scale of units")
    for a, b in pairwise(starts):
        drawing.line([(a, top), (b, base)], stroke=HEADS, stroke_width=2.6)
        if b < starts[-1]:
            drawing.line([(b, base), (starts[-1], base)], stroke=HEADS, stroke_width=2.6)
        drawing.add("circle", cx=a, cy=float(top), r=4.5, fill=HEADS)
    drawing.line([(left, top), (right, top)], stroke=MLP, stroke_width=2.6)
    drawing.text(right, top - 8, "units that stay", 12, MLP, text_anchor="end")
    drawing.text(starts[-1] + 8, base - 8, "marked units: exactly zero", 12, HEADS)
    drawing.text(starts[0] - 8, top + 48, "units scored,", 11, HEADS, text_anchor="end")
    drawing.text(starts[0] - 8, top + 63, "lowest marked", 11, HEADS, text_anchor="end")
    drawing.line([(starts[0] - 14, top + 34), (starts[0] - 3, top + 8)], stroke=HEADS)


def _size(drawing: Drawing, cut: float, left: float, right: float, base: float, top: float) -> None:
    _axis(drawing, left, right, base, top, ("0", "100%"), "model in memory")
    low = (base + top) / 2
    drawing.line([(left, top), (cut, top), (cut, low), (right, low)], stroke=STREAM, stroke_width=2.6)
    drawing.text(cut + 8, top + 14, "compaction: zeros are cut out", 12, STREAM)
    drawing.text(cut + 8, top + 29, "in memory, steps take less time", 12, STREAM)


def _axis(
    drawing: Drawing, left: float, right: float, base: float, top: float, ends: tuple[str, str], name: str
) -> None:
    drawing.line([(left, top - 12), (left, base), (right, base)], stroke=INK, stroke_width=1.2)
    drawing.text(left - 6, base + 4, ends[0], 11, text_anchor="end")
    drawing.text(left - 6, top + 4, ends[1], 11, text_anchor="end")
    drawing.text(
        14, (base + top) / 2, name, 12, text_anchor="middle", transform=f"rotate(-90 14 {(base + top) / 2:.0f})"
    )


# -- the cut -----------------------------------------------------------------------------------------------------------


def cut() -> Drawing:
    """Draw an MLP and the norm before it: with zero rows and columns, and without them."""
    drawing = Drawing(800, 312, "A norm, an MLP's matrices and their zero rows and columns, before and after the cut")
    channels, inner = [0, 1, 3, 4, 6, 7, 9], [0, 2, 3, 4, 7, 8, 10, 11, 13]
    for x, title, by_channel, by_inner, width, height in (
        (20, "trained: units at zero", channels, inner, D, INNER),
        (488, "saved: zeros cut out", list(range(7)), list(range(9)), 7, 9),
    ):
        drawing.text(x, 20, title, 14, font_weight="bold")
        for name, at, y, rows, columns, whole, colours in (
            ("norm", x + 48, 40, [0], by_channel, (1, width), (STREAM, STREAM)),
            ("up", x + 48, 76, by_inner, by_channel, (height, width), (MLP, STREAM)),
            ("down", x + 116 + 11 * width, 76, by_channel, by_inner, (width, height), (STREAM, MLP)),
        ):
            drawing.text(at - 8, y + 10, name, 12, text_anchor="end")
            _cells(drawing, at, y, rows, columns, whole, colours)
    drawing.arrow((414, 110), (468, 110), INK, 2)
    drawing.text(441, 98, "same", text_anchor="middle")
    drawing.text(441, 130, "logits", text_anchor="middle")
    notes = (
        (MLP, "MLP channels that went: rows of up (and gate), columns of down"),
        (STREAM, "channels of the hidden state that went: an entry of the norm, columns of up, rows of down"),
    )
    for index, (colour, note) in enumerate(notes):
        drawing.box(20, 248 + 20 * index, 11, 11, fill=colour, fill_opacity=0.25, stroke=colour)
        drawing.text(40, 258 + 20 * index, note)
    drawing.text(20, 300, "With d of D channels left, down is multiplied by c = √(d/D) and the norm's weight by 1/c.")
    return drawing


def _cells(
    drawing: Drawing,
    x: float,
    y: float,
    rows: list[int],
    columns: list[int],
    whole: tuple[int, int],
    colours: tuple[str, str],
) -> None:
    """Draw a matrix: cells that stay are filled, those at zero have the colour of the row or column that went."""
    fills: dict[str, list[str]] = {INK: [], **{colour: [] for colour in colours}}
    for row in range(whole[0]):
        for column in range(whole[1]):
            colour = colours[0] if row not in rows else colours[1] if column not in columns else INK
            fills[colour].append(f"M{x + 11 * column:.0f} {y + 11 * row:.0f}h10v10h-10z")
    for colour, cells in fills.items():
        if cells:
            style = {"fill_opacity": 0.85} if colour == INK else {"fill_opacity": 0.2, "stroke": colour}
            drawing.add("path", d="".join(cells), fill=colour, **style)


PICTURES = {"basis": basis, "groups": groups, "schedule": schedule, "cut": cut}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a picture is out of date")
    check = parser.parse_args().check
    for name, draw in PICTURES.items():
        path, drawn = FOLDER / f"{name}.svg", draw().svg()
        if check and (not path.exists() or path.read_text(encoding="utf-8") != drawn):
            print(f"{path} isn't what docs/pictures.py draws", file=sys.stderr)
            return 1
        if not check:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
