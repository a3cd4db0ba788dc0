"""A slice of `benchmarks/fuzz.py`: damaged inputs are read, or refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["recipe", "data", "adapter"])
def test_fuzz_damaged_inputs_are_read_or_refused_in_words(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    (work / "home").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(work / "home"))
    monkeypatch.chdir(work / "home")
    outcome = fuzz.fuzz(fuzz.TARGETS[name](), 250, 1, work, tmp_path / "kept")
    assert outcome.failures == {}
    assert outcome.read + outcome.refused == 250
    assert min(outcome.read, outcome.refused) > 5


def test_fuzz_tells_a_traceback_a_hang_and_a_changed_file(tmp_path: Path) -> None:
    user_file = tmp_path / "work" / "beside"
    user_file.parent.mkdir()
    user_file.write_text("a user's own")

    def read(folder: Path) -> None:
        content = (folder / "x").read_bytes()
        if content == b"whole":
            return
        if len(content) < 4:
            raise KeyError("a bug")
        if len(content) == 6:
            while True:
                pass
        user_file.write_text("a user's own, overwritten")

    target = fuzz.Target("none", [{"x": b"whole"}], read)
    limit_before, fuzz.LIMIT_S = fuzz.LIMIT_S, 0.01
    try:
        outcome = fuzz.fuzz(target, 100, 0, tmp_path / "work", tmp_path / "kept")
    finally:
        fuzz.LIMIT_S = limit_before
    failures = " ".join(outcome.failures)
    assert all(failure in failures for failure in ("KeyError", "TooLongError", "changed files"))
    assert all(
        Path(saved_input).is_dir() for inputs in outcome.failures.values() for saved_input in inputs
    )
