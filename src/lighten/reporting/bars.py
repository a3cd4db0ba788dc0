"""Stacked bars as inline SVG: what fills a device's memory, beside what was measured.

Colours are the page's CSS variables, with the light theme's values where there is no page (a
notebook): one drawing serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lighten.reporting.charts import number, ticks

# The light theme's series, for where no style sheet is.
_INKS = ("#0b6e5f", "#b4520e", "#4a56a8", "#8a2f6b", "#6b6f12", "#35617d")
# Above each bar there is room for its label, which a phone shows at twice its size here.
WIDTH, LEFT, RIGHT, BAR, GAP, TOP, BOTTOM = 640, 4, 16, 34, 34, 30, 58
# Narrower than this many units of the drawing, a segment shows no text of its own.
ROOM_FOR_TEXT = 64
# Text on colours weaker than this is that of the page: they are nearly its background.
STRONG = 0.7


@dataclass(frozen=True)
class Segment:
    """A piece of a bar.

    Attributes:
        label: Its name in the legend.
        value: Its length.
        colour: Number of its colour.
        strength: How strong the colour is, 1 being full; tells pieces of one colour apart.
    """

    label: str
    value: float
    colour: int = 0
    strength: float = 1.0

    @property
    def style(self) -> str:
        """Its fill, with a colour for where the page's variables are not known."""
        number_of = self.colour % len(_INKS)
        return f"fill:var(--series-{number_of + 1},{_INKS[number_of]});opacity:{self.strength:.2f}"


@dataclass(frozen=True)
class Bar:
    """A stack of segments.

    Attributes:
        label: What stands above it.
        segments: From left to right.
        low: Where its end might lie at least, if that is known.
        high: Where its end might lie at most.
    """

    label: str
    segments: Sequence[Segment]
    low: float | None = None
    high: float | None = None

    @property
    def total(self) -> float:
        """Its length."""
        return sum(segment.value for segment in self.segments)


def stacked_bars(
    bars: Sequence[Bar], *, title: str, unit: str, limit: tuple[str, float] | None = None
) -> str:
    """An SVG of the bars over one scale, with a legend of the first bar's segments.

    Args:
        bars: From top to bottom.
        title: What a screen reader says.
        unit: Of the values.
        limit: Label and place of a line that the bars should not cross.
    """
    ends = [max(bar.total, bar.high or 0.0) for bar in bars] + [limit[1] if limit else 0.0]
    marks = ticks(0.0, max(*ends, 1e-9))
    scale = (WIDTH - LEFT - RIGHT) / marks[-1]
    height = TOP + len(bars) * (BAR + GAP) + BOTTOM
    floor = height - BOTTOM
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'style="max-width:100%;height:auto"><title>{escape(title)}</title>'
    ]
    for mark in marks:
        x = LEFT + mark * scale
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}" '
            f'stroke="currentColor" stroke-opacity="0.15"/>'
            f'<text class="tick" x="{x:.1f}" y="{floor + 20}" text-anchor="{anchored(x)}" '
            f'font-size="12" fill="currentColor">{number(mark)}</text>'
        )
    parts.append(
        f'<text class="axis-label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 8}" '
        f'text-anchor="middle" font-size="12" fill="currentColor">{escape(unit)}</text>'
    )
    for place, bar in enumerate(bars):
        parts.append(_bar(bar, TOP + GAP - 8 + place * (BAR + GAP), scale, unit))
    if limit is not None:
        x = LEFT + limit[1] * scale
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 2}" y2="{floor}" stroke="currentColor" '
            f'stroke-width="2" stroke-dasharray="5 3"/>'
            f'<text class="tick" x="{x:.1f}" y="{TOP - 6}" text-anchor="{anchor}" font-size="12" '
            f'fill="currentColor">{escape(limit[0])}</text>'
        )
    return "".join(parts) + "</svg>" + _legend(bars[0].segments if bars else ())


def anchored(x: float) -> str:
    """How a tick's label lies around its place, so that it stays on the drawing."""
    return "start" if x < WIDTH * 0.05 else "end" if x > WIDTH * 0.95 else "middle"


def _bar(bar: Bar, y: int, scale: float, unit: str) -> str:
    middle = y + BAR / 2
    parts = [
        f'<text class="tick" x="{LEFT}" y="{y - 7}" font-size="12" '
        f'fill="currentColor">{escape(bar.label)}</text>'
    ]
    x = float(LEFT)
    for segment in bar.segments:
        width = segment.value * scale
        tooltip = f"{segment.label}: {number(segment.value)} {unit}"
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0):.2f}" height="{BAR}" '
            f'style="{segment.style}"><title>{escape(tooltip)}</title></rect>'
        )
        if width >= ROOM_FOR_TEXT:
            ink = "var(--inside,#fff)" if segment.strength >= STRONG else "currentColor"
            parts.append(
                f'<text class="inside" x="{x + width / 2:.1f}" y="{middle + 5}" '
                f'text-anchor="middle" '
                f'font-size="11" style="pointer-events:none;fill:{ink}">'
                f"{number(segment.value)}</text>"
            )
        x += width
    if bar.low is not None and bar.high is not None:
        low, high = LEFT + bar.low * scale, LEFT + bar.high * scale
        tooltip = f"between {number(bar.low)} and {number(bar.high)} {unit}"
        parts.append(
            f'<g stroke="currentColor" stroke-width="1.6"><title>{escape(tooltip)}</title>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
            f'<line x1="{low:.1f}" x2="{low:.1f}" y1="{middle - 6}" y2="{middle + 6}"/>'
            f'<line x1="{high:.1f}" x2="{high:.1f}" y1="{middle - 6}" y2="{middle + 6}"/></g>'
        )
    return "".join(parts)


def _legend(segments: Sequence[Segment]) -> str:
    items = [
        f'<li style="display:inline-block;margin:0 14px 2px 0"><svg viewBox="0 0 12 12" '
        f'aria-hidden="true" style="display:inline-block;width:12px;height:12px;'
        f'margin-right:6px"><rect width="12" height="12" style="{segment.style}"/></svg>'
        f"{escape(segment.label)} {number(segment.value)}</li>"
        for segment in segments
    ]
    return (
        '<ul class="legend" style="list-style:none;padding:0;margin:6px 0 0;font-size:0.88rem">'
        f"{''.join(items)}</ul>"
    )
