"""The picture of `lighten bench RUN attention`: a line per implementation, and its growth."""

from __future__ import annotations

from typing import Any

from lighten.benchmarking import running
from lighten.machine.timing import Timing
from lighten.reporting import attention


def records(implementation: str, power: int) -> list[dict[str, Any]]:
    """As the bench has them, of an attention that grows with a power of the length."""
    lengths = [1024, 2048, 4096, 8192]
    measurements: list[dict[str, Any]] = [
        {"tokens": n, "seconds": Timing((1e-9 * n**2,) * 5, 1, 0.05).to_dict(),
         "peak_bytes": n**power}
        for n in lengths[:-1]
    ]  # fmt: skip
    measurements.append({"why": "it holds more than 8.00 GiB", "out_of_memory": True})
    return list(running.attention_records(implementation, "training step", lengths, measurements))


def test_growth_is_named_and_each_kind_has_a_line() -> None:
    section = attention.section({"records": [*records("eager", 2), *records("lighten", 1)]})
    assert section is not None
    assert section["growth"] == [
        {"name": "eager, training step", "memory": "n² (n^2.00)", "time": "n² (n^2.00)",
         "ends": "8,192 tokens"},
        {"name": "lighten, training step", "memory": "n (n^1.00)", "time": "n² (n^2.00)",
         "ends": "8,192 tokens"},
    ]  # fmt: skip
    assert section["memory"].count('<g class="series') == 2
    assert section["absent"][0] == "eager, training step: it holds more than 8.00 GiB"


def test_nothing_measured_is_no_section() -> None:
    assert attention.section(None) is None
    assert attention.section({"records": [{"part": "size", "name": "base"}]}) is None
