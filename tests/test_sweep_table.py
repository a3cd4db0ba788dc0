"""What a sweep's table and sentences say, from figures made up for it."""

from __future__ import annotations

from typing import Any

import pytest

from lighten.cli.console import print_table
from lighten.reporting import sweep_table


def arm(name: str, parameters: int, loss: float | None, **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": name, "reference": None, "status": "finished", "steps": 100, "seconds": 60.0,
        "tokens_per_second": 400.0, "peak_bytes": 4 * 2**30, "trainable_parameters": parameters,
        "file_bytes": 4 * parameters, "together": 2, "sets": {"lora_r": 8},
        "served": {"share_of_base": parameters / 1e8},
        "metrics": {"chrf": {"value": 29.0, "se": 1.0}},
        "against": {"full": {"value": -0.4, "verdict": "no difference found"}},
    }  # fmt: skip
    if loss is not None:
        record["loss"] = {"value": loss, "se": 0.05}
    return {**record, **changes}


@pytest.fixture
def data() -> dict[str, Any]:
    full = arm("full", 10**8, 2.0, reference="full", peak_bytes=15 * 2**30, together=1,
               tokens_per_second=200.0, sets={"learning_rate": 2e-5}, against={},
               served={"share_of_base": 0.0})  # fmt: skip
    return {
        "arms": [full, arm("r32", 4 * 10**6, 2.01), arm("r8", 10**6, 2.02),
                 arm("r128", 16 * 10**6, None, status="left", steps=25, metrics={})],
        "settings": [{"name": "r8", "arms": ["r8"], "recommended": True},
                     {"name": "r32", "arms": ["r32"], "recommended": False}],
        "recommendation": {"arm": "r8"},
    }  # fmt: skip


def test_the_table_has_a_row_per_arm_by_size_references_last(data: dict[str, Any]) -> None:
    columns, rows = sweep_table.table(data, "chrf")
    assert [row[0] for row in rows] == ["r8", "r32", "r128", "full"]
    assert all(len(row) == len(columns) for row in rows)
    assert rows[0][1:3] == ["2.0200 ± 0.0500", "29.00 ± 1.00"]
    assert rows[0][-1] == "← take this"
    assert rows[2][1:3] == ["–", "–"]
    assert rows[2][-1] == "left after step 25"
    assert rows[3][-1] == "reference"
    assert "1 % FLOPs" in rows[0]
    assert len(sweep_table.table(data, "loss")[0]) == len(columns) - 1


def test_full_fine_tuning_is_compared_with_in_one_sentence(data: dict[str, Any]) -> None:
    sentence = sweep_table.against_full(data, "chrf")
    assert sentence is not None
    for part in ("peak memory 15.00 GiB → 4.00 GiB (shared with 1 more)", "2x faster per token",
                 "held-out loss +0.020", "chrF -0.40 (no difference found)",
                 "400.0 MB → 4.0 MB to ship", "learning rate 2e-05, not tuned"):  # fmt: skip
        assert part in sentence, part
    assert sweep_table.against_full({**data, "arms": data["arms"][1:]}, "chrf") is None
    assert sweep_table.against_full({**data, "recommendation": {"arm": None}}, "chrf") is None


def test_full_fine_tuning_that_the_time_cut_is_said_to_be_cut_and_not_judged_by(
    data: dict[str, Any],
) -> None:
    full = data["arms"][0]
    full |= {"status": "left", "steps": 25, "of_steps": 100}
    data["arms"][2]["against"] = {}
    (row,) = [row for row in sweep_table.table(data, "chrf")[1] if row[0] == "full"]
    assert row[-1] == "reference, left after step 25"
    sentence = sweep_table.against_full(data, "chrf")
    assert sentence is not None
    assert "peak memory 15.00 GiB → 4.00 GiB" in sentence
    assert sentence.endswith("full left after step 25 of 100, so their losses are not compared.")
    assert "held-out loss" not in sentence


def test_arms_of_one_pass_are_told_to_share_its_peak(data: dict[str, Any]) -> None:
    assert "share its peak memory" in sweep_table.shared_peak(data)
    assert sweep_table.shared_peak({"arms": [arm("r8", 1, 1.0, together=1)]}) == ""


def test_the_terminals_table_says_the_same_in_eighty_columns(data: dict[str, Any]) -> None:
    columns, rows = sweep_table.table(data, "chrf", narrow=True)
    assert rows[0] == ["r8", "2.020 ± 0.050", "29.0 ± 1.0", "1:00", "400", "4.00", "1M", "4",
                       "+1%", "← take"]  # fmt: skip
    widths = [max(len(row[i]) for row in [columns, *rows[:2]]) for i in range(len(columns))]
    assert sum(widths) + 2 * len(widths) <= 80


def test_no_word_of_the_terminals_table_is_cut(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    columns, rows = sweep_table.table(data, "chrf", narrow=True)
    # As of a small model: so many digits, and a remark of a word.
    rows = [[*row[:6], "0.00205M", "0.0116", "+7.1%", "reference"] for row in rows]
    print_table(columns, rows)
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    words = {word for row in [columns, *rows] for text in row for word in text.split()}
    assert words <= set(output.split())


def test_large_figures_are_written_out(data: dict[str, Any]) -> None:
    data["arms"] = [arm("r512", 1_540_000_000, 2.0, served={"share_of_base": 1.16})]
    (row,) = sweep_table.table(data, "loss", narrow=True)[1]
    assert row[5:8] == ["1,540M", "6,160", "+116%"]
    (row,) = sweep_table.table(data, "loss")[1]
    assert "116 % FLOPs" in row


def test_an_arm_that_a_search_numbered_says_what_was_drawn(data: dict[str, Any]) -> None:
    data["arms"] = [arm("trial-7", 10**6, 2.0, sets={"learning_rate": 0.00047, "lora_r": 16})]
    for narrow in (False, True):
        (row,) = sweep_table.table(data, "loss", narrow=narrow)[1]
        assert row[0] == "trial-7: learning_rate 0.00047, lora_r 16"
