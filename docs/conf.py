"""Sphinx: `make docs` builds the site from these pages into docs/_build, with warnings as errors."""

from __future__ import annotations

import re
from typing import Any

import hesso_hf

project = "hesso_hf"
author = "the hesso_hf contributors"
release = version = hesso_hf.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "hesso_hf"
html_show_copyright = False
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
napoleon_google_docstring = True
napoleon_use_ivar = True

OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./[^)]*\)")  # a link to a file beside this folder, but no picture


def link_inside_only(app: Any, name: str, source: list[str]) -> None:
    """Turn links to files that aren't part of the site into plain words."""
    source[0] = OUTSIDE.sub(r"\1", source[0])


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", link_inside_only)
