"""The page at `/`: two models of the server asked side by side."""

from __future__ import annotations

import html
from importlib.resources import files


def page(base: str) -> str:
    """The page as HTML; it loads nothing from elsewhere.

    Args:
        base: Name of the base, for the title.
    """
    text = files("lighten.serving").joinpath("page.html").read_text(encoding="utf-8")
    return text.replace("{{ base }}", html.escape(base))
