"""Line charts as inline SVG: axes, grid, legend, error bars; light, dark and print.

Colours are CSS variables of the page (`--series-1` …), so one drawing serves every theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

# Series are told apart by dash as well as by colour.
DASHES = ("", "7 4", "2 3", "9 3 2 3", "1 4", "12 4")
# Colours of the page, and how far apart they are in number.
COLOURS = 12
# More points than this are thinned: the mean of each of so many equal stretches is drawn.
MOST_POINTS = 400

WIDTH, HEIGHT = 640, 320
# Room for text that a phone shows at twice its size here (see style.css).
LEFT, RIGHT, TOP, BOTTOM = 80, 16, 50, 58
# A label nearer than this to the right edge ends at its place instead of lying around it.
EDGE = 48


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: Its name in the legend.
        x: Places.
        y: Values; None where there is none.
        errors: Standard errors, drawn as bars, if known.
        faint: Drawn thin and pale, for raw values behind a smoothed line.
        markers: Drawn with a dot at each value.
        colour: Number of its colour.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    errors: Sequence[float | None] = field(default_factory=list)
    faint: bool = False
    markers: bool = False
    colour: int = 0

    def points(self) -> list[tuple[float, float, float | None]]:
        """Place, value and error where there is a finite value."""
        errors = [e if e is not None and math.isfinite(e) else None for e in self.errors]
        errors += [None] * (len(self.x) - len(errors))
        return [
            (x, y, e)
            for x, y, e in zip(self.x, self.y, errors, strict=True)
            if y is not None and math.isfinite(y)
        ]


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, from_zero: bool = False
) -> str:
    """An SVG of the series, or a sentence if there is nothing to draw.

    Args:
        series: The lines.
        title: What a screen reader says.
        x_label: What runs to the right, with its unit.
        y_label: What runs upwards, with its unit.
        from_zero: Start the vertical axis at zero, for amounts.
    """
    drawn = [(line, _thinned(line.points())) for line in series if line.points()]
    if not drawn:
        return f'<p class="absent">{escape(title)}: nothing was recorded.</p>'
    xs = [x for _, points in drawn for x, _, _ in points]
    lows = [y - (e or 0) for _, points in drawn for _, y, e in points]
    highs = [y + (e or 0) for _, points in drawn for _, y, e in points]
    if from_zero:
        lows.append(0.0)
    integers = all(float(x).is_integer() for x in xs)
    x_ticks, y_ticks = ticks(min(xs), max(xs), integers=integers), ticks(min(lows), max(highs))
    across = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    x_shown = [
        (across(tick), label)
        for tick, label in zip(x_ticks, _tick_labels(x_ticks), strict=True)
        if min(xs) <= tick <= max(xs)
    ]
    parts = [_frame(title, x_label, y_label, x_shown, y_ticks, up)]
    for line, points in drawn:
        parts.append(_line(line, points, across, up))
    return "".join(parts) + "</svg>" + _legend([line for line, _ in drawn if not line.faint])


@dataclass(frozen=True)
class Point:
    """One point of a scatter chart.

    Attributes:
        label: Written beside it.
        x: Place; above zero, since the axis is logarithmic.
        y: Value.
        error: Standard error of the value, drawn as a bar, if known.
        colour: Number of its colour.
    """

    label: str
    x: float
    y: float
    error: float | None = None
    colour: int = 0


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both: nothing lower costs less. By place."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return best


def scatter_chart(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> str:
    """An SVG of labelled points over a logarithmic axis with their frontier, lower left is best.

    Args:
        points: The points; those without a finite place and value are left out.
        title: What a screen reader says.
        x_label: What runs to the right, with its unit.
        y_label: What runs upwards, with its unit.
    """
    drawn = [
        point
        for point in points
        if point.x > 0 and math.isfinite(point.x) and math.isfinite(point.y)
    ]
    if not drawn:
        return f'<p class="absent">{escape(title)}: nothing was recorded.</p>'
    low, high = min(point.x for point in drawn), max(point.x for point in drawn)
    low, high = low / 1.25, high * 1.25  # room for labels
    y_ticks = ticks(
        min(point.y - (point.error or 0) for point in drawn),
        max(point.y + (point.error or 0) for point in drawn),
    )
    log = _Scale(math.log(low), math.log(high), LEFT + 12, WIDTH - RIGHT - 60)
    up = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    x_shown = [(log(math.log(tick)), number(tick)) for tick in log_ticks(low, high)]
    parts = [_frame(title, x_label, y_label, x_shown, y_ticks, up)]
    path = " ".join(
        f"{'M' if place == 0 else 'L'}{log(math.log(point.x)):.1f} {up(point.y):.1f}"
        for place, point in enumerate(frontier(drawn))
    )
    parts.append(f'<path class="frontier" d="{path}"><title>frontier</title></path>')
    for point in drawn:
        px, py = log(math.log(point.x)), up(point.y)
        side = 1 if px < (LEFT + WIDTH) / 2 else -1  # its label stays on the drawing
        tooltip = f"{escape(point.label)}: {number(point.y)} at {number(point.x)}"
        bar = ""
        if point.error:
            tooltip += f" ± {number(point.error)}"
            bar = (
                f'<line class="error" x1="{px:.1f}" x2="{px:.1f}" '
                f'y1="{up(point.y - point.error):.1f}" y2="{up(point.y + point.error):.1f}"/>'
            )
        parts.append(
            f'<g class="series" style="--ink: var(--series-{point.colour % COLOURS + 1})">{bar}'
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5"><title>{tooltip}</title></circle>'
            f'<text class="point" x="{px + side * 8:.1f}" y="{py - 6:.1f}" '
            f'text-anchor="{"start" if side > 0 else "end"}">{escape(point.label)}</text></g>'
        )
    return "".join(parts) + "</svg>"


def log_ticks(low: float, high: float) -> list[float]:
    """Values 1, 2 and 5 times a power of ten inside the range; powers alone where many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    candidates = [m * 10.0**power for power in range(first, last + 1) for m in steps]
    inside = [value for value in candidates if low <= value <= high]
    return inside or [math.sqrt(low * high)]


def _frame(
    title: str,
    x_label: str,
    y_label: str,
    x_shown: Sequence[tuple[float, str]],
    y_ticks: Sequence[float],
    up: _Scale,
) -> str:
    """The drawing's beginning: grid, ticks, axis and labels."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>"
    ]
    for tick, label in zip(y_ticks, _tick_labels(y_ticks), strict=True):
        y = up(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{label}</text>"
        )
    parts += [
        f'<text class="tick" x="{x if x <= WIDTH - EDGE else WIDTH - 2:.1f}" '
        f'y="{HEIGHT - BOTTOM + 20}" '
        f'text-anchor="{"middle" if x <= WIDTH - EDGE else "end"}">{label}</text>'
        for x, label in x_shown
    ]
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" '
        f'y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="axis-label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="axis-label" x="2" y="24">{escape(y_label)}</text>'
    )
    return "".join(parts)


class _Scale:
    """From values to places on the drawing."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self._low, self._start = low, start
        self._factor = (stop - start) / (high - low) if high > low else 0.0
        self._middle = None if high > low else (start + stop) / 2

    def __call__(self, value: float) -> float:
        if self._middle is not None:
            return self._middle
        return self._start + (value - self._low) * self._factor


def _line(
    line: Series, points: Sequence[tuple[float, float, float | None]], across: _Scale, up: _Scale
) -> str:
    style = f"--ink: var(--series-{line.colour % COLOURS + 1})"
    path = " ".join(
        f"{'M' if place == 0 else 'L'}{across(x):.1f} {up(y):.1f}"
        for place, (x, y, _) in enumerate(points)
    )
    dash = DASHES[line.colour % len(DASHES)]
    parts = [
        f'<g class="series{" faint" if line.faint else ""}" style="{style}">'
        f'<path d="{path}"{f""" stroke-dasharray="{dash}" """ if dash else ""}/>'
    ]
    for x, y, error in points if line.markers or len(points) == 1 else []:
        px, py = across(x), up(y)
        tooltip = f"{escape(line.label)}, {number(x)}: {number(y)}"
        if error:
            parts.append(
                f'<line class="error" x1="{px:.1f}" x2="{px:.1f}" y1="{up(y - error):.1f}" '
                f'y2="{up(y + error):.1f}"/>'
            )
            tooltip += f" ± {number(error)}"
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{tooltip}</title></circle>'
        )
    return "".join(parts) + "</g>"


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    items = []
    for line in series:
        dash = DASHES[line.colour % len(DASHES)]
        items.append(
            f'<li style="--ink: var(--series-{line.colour % COLOURS + 1})">'
            f'<svg viewBox="0 0 28 8" aria-hidden="true"><line x1="1" x2="27" y1="4" y2="4" '
            f'stroke-dasharray="{dash}"/></svg>{escape(line.label)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _thinned(
    points: list[tuple[float, float, float | None]],
) -> list[tuple[float, float, float | None]]:
    if len(points) <= MOST_POINTS:
        return points
    size = len(points) / MOST_POINTS
    chunks = [points[int(i * size) : int((i + 1) * size)] for i in range(MOST_POINTS)]
    return [
        (sum(p[0] for p in chunk) / len(chunk), sum(p[1] for p in chunk) / len(chunk), None)
        for chunk in chunks
    ]


def smoothed(values: Sequence[float | None], weight: float = 0.9) -> list[float | None]:
    """Exponential moving average, corrected for its start as in Adam (arXiv 1412.6980)."""
    out: list[float | None] = []
    total, count = 0.0, 0
    for value in values:
        if value is None or not math.isfinite(value):
            out.append(None)
            continue
        total, count = weight * total + (1 - weight) * value, count + 1
        out.append(total / (1 - weight**count))
    return out


def ticks(low: float, high: float, *, integers: bool = False) -> list[float]:
    """About five round numbers that enclose the range; steps are 1, 2 or 5 times a power of ten.

    Args:
        low: Where the range begins.
        high: Where it ends.
        integers: Whole numbers alone, for what is counted.
    """
    if integers and low == high:
        return [low]
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # flat, but for rounding
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(1.0, step) if integers else step
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tick_labels(values: Sequence[float]) -> list[str]:
    """Every tick with the decimals that its step needs, so that no two read alike."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]


def number(value: float | None) -> str:
    """A number as people write it: three significant digits, thousands with commas."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    if isinstance(value, int) or value == 0:
        return str(int(value))
    # With three digits before its point a number has none behind it.
    return f"{value:#.3g}" if 1e-4 <= abs(value) < 99.95 else f"{value:.3g}"
