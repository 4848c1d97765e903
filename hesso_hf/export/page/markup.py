"""HTML and SVG as text. Whatever isn't `Markup` already is escaped, so what a report says can't become markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, /, *content: object, **attributes: object) -> Markup:
    """Return an element; attributes are written `class_` for `class` and `stroke_width` for `stroke-width`."""
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(str(v))}"' for name, v in attributes.items())
    inside = "".join(part if isinstance(part, Markup) else escape(str(part)) for part in content)
    return Markup(f"<{tag}{given}>{inside}</{tag}>")


def joined(parts: Iterable[object]) -> Markup:
    """Return parts one after another, escaped where they aren't markup."""
    return Markup("".join(part if isinstance(part, Markup) else escape(str(part)) for part in parts))


def coded(text: str) -> Markup:
    """Return text whose parts between backticks are code."""
    return joined(element("code", part) if odd % 2 else part for odd, part in enumerate(text.split("`")))


def breakable(name: object) -> Markup:
    """Return a name that may go on in the next line after each of its underscores."""
    return Markup(escape(str(name)).replace("_", "_<wbr>"))


def table(header: Iterable[object], rows: Iterable[Iterable[object]], **attributes: object) -> Markup:
    """Return a table that scrolls by itself where the page is narrow; the first cell of a row names it."""
    head = element("thead", element("tr", *(element("th", name, scope="col") for name in header)))
    body = (
        element("tr", element("th", breakable(first), scope="row"), *(element("td", cell) for cell in cells))
        for first, *cells in rows
    )
    return element("div", element("table", head, element("tbody", *body), **attributes), class_="scroll")


def terms(pairs: Iterable[tuple[object, object]]) -> Markup:
    """Return a list of terms and what is said of each."""
    return element("dl", *(joined([element("dt", term), element("dd", said)]) for term, said in pairs))


def page(title: str, *content: Markup) -> str:
    """Return a whole page; its policy lets a browser load nothing at all."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"{element('title', title)}\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(content)
        + "\n</main>\n</body>\n</html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --text: #1d2430; --soft: #5b6675; --back: #ffffff; --panel: #f4f6f9; --line: #d5dbe3;
  --c0: #1f6fb4; --c1: #b4531f; --c2: #2b8a4b; --c3: #8a3fa8; --c4: #a37a00; --c5: #a8324f; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ee; --soft: #9aa6b5; --back: #14181e; --panel: #1d232b; --line: #39424e;
    --c0: #6db3f2; --c1: #f2a06d; --c2: #74d193; --c3: #cf97e6; --c4: #e3c04f; --c5: #f08aa3; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h3::first-letter { text-transform: uppercase; }
h2 { margin-top: 2.2rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p, dd, li { max-width: 44rem; overflow-wrap: anywhere; }
.soft, figcaption, thead th { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: 500; }
thead th { font-weight: 500; }
table.units { width: 100%; }
table.units th, table.units td { padding: 1px .6rem 1px 0; border: 0; line-height: 1.2; vertical-align: middle; }
table.units tbody td { white-space: nowrap; }
table.units th:nth-child(2) { text-align: left; }
table.units td:nth-child(2) { width: 100%; }
figure { margin: 1rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 1.5rem; }
svg { display: block; width: 100%; }
svg.chart { max-width: 34rem; }
svg.strip { height: 12px; background: var(--panel); }
svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--soft); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .4em 0 0; border: 1px solid;
  background: currentColor; }
rect { fill: currentColor; fill-opacity: .18; }
.s0 { color: #8a8f98; } .s1 { color: #c45ab3; } .s2 { color: #4fa36c; } .s3 { color: #b59a2c; }
.key.s0, .key.s1, .key.s2, .key.s3 { opacity: .5; }
.key.mark { background: none; border-style: dashed; }
.legend span { margin-right: 1.2em; white-space: nowrap; }
dt { margin-top: .8rem; font-weight: 600; }
dd { margin: 0; }
pre { overflow-x: auto; padding: .8rem; background: var(--panel); border-radius: 6px; font-size: .85rem; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .8rem 0; }
@media (max-width: 40rem) {
  table, pre { font-size: .85rem; }
  th, td { padding-right: .5rem; }
  tbody th { overflow-wrap: anywhere; min-width: 6rem; }
  table.units tbody th { min-width: 0; }
}
summary { cursor: pointer; color: var(--soft); }
details.model > summary { font-size: 1.3rem; color: var(--text); overflow-wrap: anywhere; }
"""
