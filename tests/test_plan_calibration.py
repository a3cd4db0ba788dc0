"""What earlier runs teach later plans: bounded, whole, shown, and never feeding on itself."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lighten.planning import calibration
from lighten.planning.result import Memory, MemoryPart, Plan, Shape, StepTime

GIB = 2**30


@pytest.fixture(autouse=True)
def calibration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "calibration.json"
    monkeypatch.setenv("LIGHTEN_CALIBRATION", str(path))
    return path


def a_plan(method: str = "lora") -> Plan:
    parts = (MemoryPart("base weights", 3 * GIB), MemoryPart("allocator overhead", GIB // 4),
             MemoryPart("device context", 3 * GIB // 4))  # fmt: skip
    memory = Memory(parts, int(3.8 * GIB), 4 * GIB, int(4.2 * GIB), "backward", None)
    time = StepTime(2.0, 1.5, 2.5, 1e12, 1e9, "measured here")
    return Plan("m", "cpu", method, Shape(1, 64, 1), memory, time, 8 * GIB, 0, 0, None, {}, ())


def pair(memory: float, seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "when": "2026-01-01", "device": "here", "model": "m", "method": "lora",
        "memory": {"predicted": 4 * GIB, "measured": 4 * GIB * memory},
        "step_seconds": {"predicted": 2.0, "measured": 2.0 * seconds}, **changes,
    }  # fmt: skip


def test_a_few_runs_correct_a_plan_and_it_says_so() -> None:
    for memory in (1.08, 1.10, 1.30):
        calibration.add(pair(memory, 1.5))
    corrected = calibration.corrected(a_plan(), "here")
    assert corrected.memory.expected == pytest.approx(4.4 * GIB, rel=1e-9)
    assert sum(part.bytes for part in corrected.memory.parts) == corrected.memory.expected
    assert corrected.memory.low <= corrected.memory.expected <= corrected.memory.high
    assert corrected.memory.low == a_plan().memory.low
    assert corrected.time is not None
    assert corrected.time.seconds == pytest.approx(2.0 * calibration.MOST_CORRECTION)
    assert any("+10.0 %" in note and "3 runs" in note for note in corrected.notes)
    assert corrected.traced == {"expected": 4 * GIB, "seconds": 2.0}


def test_too_few_runs_or_those_of_others_correct_nothing() -> None:
    calibration.add(pair(1.1, 1.1))
    calibration.add(pair(1.1, 1.1))
    calibration.add(pair(1.1, 1.1, device="elsewhere"))
    calibration.add(pair(1.1, 1.1, method="full"))
    assert calibration.corrected(a_plan(), "here") == a_plan()


def test_a_correction_downwards_keeps_the_parts_summing_up() -> None:
    for _ in range(3):
        calibration.add(pair(0.85, 1.0))
    corrected = calibration.corrected(a_plan(), "here")
    assert corrected.memory.expected == pytest.approx(3.4 * GIB, rel=1e-9)
    assert sum(part.bytes for part in corrected.memory.parts) == corrected.memory.expected
    assert min(part.bytes for part in corrected.memory.parts) >= 0
    assert corrected.memory.low <= corrected.memory.expected
    assert corrected.memory.high >= corrected.memory.expected


def test_the_file_is_bounded_and_survives_damage(calibration_file: Path) -> None:
    old_pairs = [pair(1.0, 1.0, model=str(i)) for i in range(calibration.MOST_PAIRS)]
    calibration_file.write_text(json.dumps({"version": 1, "pairs": old_pairs}))
    calibration.add(pair(1.0, 1.0, model="new"))
    stored_pairs = calibration.pairs()
    assert len(stored_pairs) == calibration.MOST_PAIRS
    assert stored_pairs[-1]["model"] == "new"
    assert stored_pairs[0]["model"] == "1"
    for broken in ("{", "[]", '{"pairs": 3}', '{"pairs": [1, {"device": "here"}]}'):
        calibration_file.write_text(broken)
        calibration.corrected(a_plan(), "here")
        calibration.add(pair(1.0, 1.0))
        assert calibration.pairs()[-1]["model"] == "m"


def test_pairs_without_a_figure_do_not_count() -> None:
    for _ in range(3):
        calibration.add(pair(1.1, 1.0, step_seconds=None))
    corrected = calibration.corrected(a_plan(), "here")
    assert corrected.time == a_plan().time
    assert corrected.memory.expected > a_plan().memory.expected


def test_pairs_of_runs_that_end_at_once_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads before the other has written, unless it has to wait for it."""
    read = calibration.pairs

    def slowly() -> list[dict[str, Any]]:
        before = read()
        time.sleep(0.02)
        return before

    monkeypatch.setattr(calibration, "pairs", slowly)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: calibration.add(pair(1.0, 1.0, model=f"m{n}")), range(8)))
    assert {entry["model"] for entry in read()} == {f"m{n}" for n in range(8)}
