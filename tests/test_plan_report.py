"""The plan's picture and what the report says of it."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lighten import runs
from lighten.cli import plan as cli_plan
from lighten.cli.console import overrides
from lighten.cli.plan import print_changes, print_plan
from lighten.machine import devices
from lighten.planning import predict, text
from lighten.planning.result import Change, Memory, MemoryPart, Plan, Shape, StepTime
from lighten.reporting import planned
from lighten.reporting.bars import Bar, Segment, stacked_bars
from lighten.reporting.page import page
from lighten.reporting.planned import figure, section, verdict
from tests.report_fixture import write_run

GIB = 2**30


def a_plan(capacity: int | None = 8 * GIB) -> Plan:
    parts = (MemoryPart("base weights", 3 * GIB), MemoryPart("gradients", GIB // 2),
             MemoryPart("activations: linear", GIB // 2))  # fmt: skip
    memory = Memory(parts, int(3.8 * GIB), 4 * GIB, int(4.4 * GIB), "backward", None)
    time = StepTime(2.0, 1.5, 2.5, 1e12, 1e9, "measured here")
    return Plan("m<b>", "cpu", "lora", Shape(4, 512, 2), memory, time, capacity, 5 * GIB, 10**9,
                None, {"dtype": "bfloat16: amx"}, (), step_tokens=4096, steps=100,
                run_seconds=180.0)  # fmt: skip


def bars_of(drawing: str) -> list[float]:
    """Widths of the bar's pieces, without the legend's squares."""
    svg = ElementTree.fromstring(drawing[: drawing.index("</svg>") + 6])
    return [float(rect.attrib["width"]) for rect in svg.iter("rect")]


def test_pieces_are_to_scale() -> None:
    drawing = figure(a_plan().to_dict())
    base, gradients, linear = bars_of(drawing)
    assert gradients == pytest.approx(linear)
    assert base == pytest.approx(6 * gradients, rel=1e-3)
    with_measured = bars_of(figure(a_plan().to_dict(), 4 * GIB))
    assert with_measured[-1] == pytest.approx(sum(with_measured[:-1]), rel=1e-3)


def test_the_limit_is_drawn_where_it_helps_and_names_are_escaped() -> None:
    svg = figure(a_plan().to_dict())
    assert "8.00 GiB" in svg
    assert "m&lt;b&gt;" in svg
    assert "m<b>" not in svg
    assert "stroke-dasharray" not in figure(a_plan(1000 * GIB).to_dict())
    assert "not known" in verdict(a_plan(None).to_dict())
    assert "which does not fit" in verdict(a_plan(GIB).to_dict())
    assert "which might not fit" in verdict(a_plan(4 * GIB).to_dict())


def test_a_bar_of_nothing_is_still_a_drawing() -> None:
    text = stacked_bars([Bar("x", [Segment("a", 0.0)])], title="t", unit="GiB")
    assert text.startswith("<svg")


def test_the_page_shows_predicted_beside_measured(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    assert "Planned and measured" not in page([run])
    plan = replace(a_plan(), notes=("peak memory: corrected by +3 %",))
    runs.write_json(run.folder / "plan.json", plan.to_dict())
    text = page([run])
    assert "Planned and measured" in text
    assert "corrected by +3 %" in text
    run.update(prediction={"memory": {"predicted": 4 * GIB, "measured": 5 * GIB},
                           "step_seconds": {"predicted": 2.0, "measured": 2.5}})  # fmt: skip
    text = page([run])
    assert text.count("-20.0 %") == 2
    assert "measured peak" in text
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org)""", text)
    # A process that trained before may need no more memory than it has.
    run.update(prediction={"memory": {"predicted": 4 * GIB, "measured": 0},
                           "step_seconds": {"predicted": 2.0, "measured": 2.5}})  # fmt: skip
    assert page([run]).count("-20.0 %") == 1
    assert section(None, {}) is None
    assert section({"unreadable": 1}, {}) is None


def test_a_plan_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan = a_plan()
    (line,) = text.lines(plan)
    assert "plan: 4.00 GiB at the peak of 8.00 GiB (base weights 3.00 GiB" in line
    assert "2.00 s per step, 3 min 0 s in all" in line
    assert len(text.lines(a_plan(4 * GIB))) == 2
    rows = {row[0]: row[1] for row in text.fact_rows(plan)}
    assert rows["micro-batch"] == "4 rows of 512 tokens, 2 per step"
    assert rows["download"] == "not known"
    change = Change(
        "QLoRA", {"load_in_4bit": True}, GIB, 1.25, True, differing={"load_in_4bit": True}
    )
    assert text.change(change) == "QLoRA: saves 1.00 GiB, 25 % slower; it fits then"
    too_large = replace(a_plan(GIB), changes=(change,))
    print_plan(too_large)
    print_changes(too_large)
    printed = capsys.readouterr().out
    for phrase in ("which does not fit", "what would need less", "QLoRA", "1.00 GiB", "25 % slower",
                   "--load_in_4bit true"):  # fmt: skip
        assert phrase in printed, phrase
    assert text.flags({"a": True, "b": None, "c": 3, "d": "x", "e": [1]}) == (
        "--a true --b null --c 3 --d x --e '[1]'"
    )
    # As a shell hands them on, which takes quotation marks, spaces and brackets for its own.
    changed = {"lora_target_modules": ["q_proj", "v_proj"], "rank_pattern": {"a|b": 2}}
    assert overrides(shlex.split(text.flags(changed))) == changed


def test_what_a_plan_notes_after_changes_were_sought_is_printed_once(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(devices.DEVICES, "t4", replace(devices.DEVICES["t4"], memory_bytes=2**20))
    monkeypatch.setattr(devices, "_BY_PLAIN", dict(devices.DEVICES))
    monkeypatch.setattr(predict, "MOST_CHANGES_S", -1.0)
    settings = {"model_name_or_path": str(tiny_folder), "max_length": 32}
    assert cli_plan._plan(None, settings, "t4", False, probe=False) is False
    printed = capsys.readouterr().out
    assert printed.count("no further changes were looked for") == 1
    assert printed.count("no data set is given") == 1
    names = [line.split("  ")[0].strip() for line in printed.splitlines()]
    assert names.count("micro-batch") == names.count("micro-batch filled by") == 1


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_figures_on_the_bars_are_legible_in_both_themes(theme: int) -> None:
    """Text on every colour and strength that a plan's parts have, as the page mixes them."""
    style = (Path(planned.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    block = style.split(":root")[1 + theme]
    colours = {
        name: [int(value[i : i + 2], 16) for i in (0, 2, 4)]
        for name, value in re.findall(r"--([\w-]+): #(\w{6});", block)
    }

    def luminance(colour: list[float]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, (ink, strength) in planned._INKS.items():
        drawing = stacked_bars(
            [Bar("x", [Segment(name, 1.0, ink, strength)])], title="t", unit="GiB"
        )
        fill = re.search(r'class="inside".*?fill:([^"]+)"', drawing)
        assert fill is not None
        text = {"currentColor": colours["text"]}.get(
            fill[1], colours.get("inside", [255, 255, 255])
        )  # fmt: skip
        behind = [
            strength * a + (1 - strength) * b
            for a, b in zip(colours[f"series-{ink + 1}"], colours["card"], strict=True)
        ]
        low, high = sorted((luminance([*map(float, text)]), luminance(behind)))
        assert (high + 0.05) / (low + 0.05) >= 3.0, name
