"""Counters and histograms in Prometheus's text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_Labels = tuple[tuple[str, str], ...]


class Metrics:
    """What a server counts. Labels are models that it serves, never what a client wrote."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[_Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[str, dict[_Labels, list[float]]] = defaultdict(dict)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._counters[name][tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add to a histogram."""
        row = self._histograms[name].setdefault(
            tuple(sorted(labels.items())), [0.0] * (len(_SECONDS) + 2)
        )
        row[bisect_left(_SECONDS, seconds)] += 1
        row[-1] += seconds

    def forget(self, model: str) -> None:
        """Drop what was counted of a model that is served no more: others come for ever."""
        kinds: tuple[dict[str, Any], ...] = (self._counters, self._histograms)
        for rows in (rows for kind in kinds for rows in kind.values()):
            for labels in [labels for labels in rows if ("model", model) in labels]:
                del rows[labels]

    def text(self, gauges: Mapping[str, float]) -> str:
        """The page; gauges are of this moment."""
        return "".join(f"{line}\n" for line in self._lines(gauges))

    def _lines(self, gauges: Mapping[str, float]) -> Iterable[str]:
        for name, value in gauges.items():
            yield f"# TYPE lighten_{name} gauge"
            yield f"lighten_{name} {value:g}"
        for name, rows in self._counters.items():
            yield f"# TYPE lighten_{name}_total counter"
            for labels, value in rows.items():
                yield f"lighten_{name}_total{_format_labels(labels)} {value:.15g}"
        for name, series in self._histograms.items():
            yield f"# TYPE lighten_{name}_seconds histogram"
            for labels, row in series.items():
                total = 0.0
                for bound, number in zip([*map(str, _SECONDS), "+Inf"], row, strict=False):
                    total += number
                    bounded = (*labels, ("le", bound))
                    yield f"lighten_{name}_seconds_bucket{_format_labels(bounded)} {total:.15g}"
                yield f"lighten_{name}_seconds_sum{_format_labels(labels)} {row[-1]:.15g}"
                yield f"lighten_{name}_seconds_count{_format_labels(labels)} {total:.15g}"


def _format_labels(labels: _Labels) -> str:
    if not labels:
        return ""
    escaped = (
        (key, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
        for key, value in labels
    )
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}"
