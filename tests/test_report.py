"""The page: what it says, and how it looks and behaves in a real browser without a network."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.reporting import charts, comparison, text
from lighten.reporting.page import page
from tests.report_fixture import write_run


def test_the_page_says_what_changed_and_escapes_what_came_from_data(tmp_path: Path) -> None:
    text = page([write_run(tmp_path / "r")])
    assert "perplexity 39.3 → 12.2 (better, outside the 95 % interval)" in text
    assert "<script>alert(1)</script>" not in text
    assert "&lt;script&gt;" in text
    for part in ("Loss", "Before and after", "Answers", "Speed and memory", "Size to ship",
                 "How it was made", "The completed recipe", "model_name_or_path: smollm2-135m",
                 "Some Processor", "269.0 MB", "9.8 MB", "with local changes"):  # fmt: skip
        assert part in text, part
    assert len(text.encode()) < 1_000_000


def test_another_run_a_judge_and_tasks_are_on_the_page(tmp_path: Path) -> None:
    page = lighten.report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    run, judge, tasks = (
        page.split(f'<section id="{name}">')[1].split("</section>")[0]
        for name in ("against", "judged", "tasks")
    )
    assert "Against 다른실행_with_a_very_long_name" in run
    assert run.count("<b>+0.432</b> <small>[0.100, 0.900]</small>") == 6  # without the bases
    assert "a_task, acc" in run
    for figure in (">77<", ">31<", ">52<", ">41<", ">3 <small>2 without room<", "<b>64.4</b>",
                   "a-judge-of-70b judges"):  # fmt: skip
        assert figure in judge
    assert tasks.count("<b>0.457</b>") == 2
    assert "24 documents" in tasks
    assert "no difference found" in tasks
    assert "The chat template stood" in tasks


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = page([write_run(tmp_path / "r")])
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org)""", text)


@pytest.mark.parametrize("status", ["running", "interrupted", "killed", "failed"])
def test_a_run_that_did_not_end_well_says_so(tmp_path: Path, status: str) -> None:
    text = page([write_run(tmp_path / "r", status=status, evaluated=False, steps=1)])
    assert 'role="alert"' in text
    assert "not been evaluated yet" in text
    assert "This run is trained" not in text


def test_a_run_without_a_step_makes_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", steps=0, evaluated=False, status="failed")
    (run.folder / "run.json").write_text('{"status": "failed", "error": "no data"}')
    text = page([run])
    assert "nothing was recorded" in text
    assert "no data" in text


def test_figures_that_are_missing_leave_a_note_not_a_crash(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", adapters=("small", "large"))
    evaluation = json.loads((run.folder / "evaluation.json").read_text())
    evaluation["models"][1]["metrics"]["perplexity"] = dict.fromkeys(("value", "se", "low", "high"))
    evaluation["models"][2]["metrics"]["loss"]["value"] = 1.0
    evaluation["differences"] = evaluation["differences"][3:]
    evaluation["examples"][0]["answers"]["small"] = None
    (run.folder / "evaluation.json").write_text(json.dumps(evaluation))
    text = page([run])
    assert "not compared" in text
    assert "Perplexity, large" in text
    assert "(no answer)" in text
    del evaluation["differences"], evaluation["models"][0]
    (run.folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert "without a base to compare with" in page([run])


def test_ticks_of_a_narrow_range_read_differently() -> None:
    text = charts.line_chart(
        [charts.Series("a", [1, 2], [3.5, 3.512])], title="t", x_label="x", y_label="y"
    )
    labels = re.findall(r'text-anchor="end">([\d.,]+)<', text)
    assert len(set(labels)) == len(labels) >= 3


def test_no_difference_is_said_as_such() -> None:
    metrics = {"perplexity": {"value": 10.0}, "chrf": {"value": 20.0}}
    evaluation = {
        "models": [{"name": "base", "metrics": metrics}, {"name": "r8", "metrics": metrics}],
        "differences": [{"adapter": "r8", "metric": m, "verdict": "no difference found"}
                        for m in ("perplexity", "chrf")],
    }  # fmt: skip
    (line,) = text.headline({}, evaluation)
    assert line.count("no difference found") == 2
    assert line.startswith("r8: held-out perplexity 10.0 → 10.0 (no difference")


def test_shared_words_are_marked_and_the_rest_is_escaped() -> None:
    html = str(text.marked("Compare <b> two files!", "compare two files"))
    assert html == "<mark>Compare</mark> &lt;b&gt;<mark> two files</mark>!"


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (2.13, 3.97), (-5, 12345), (3, 3), (0, 0), (1e-5, 3e-5), (341.0, 341.0 + 1e-10)],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float) -> None:
    ticks = charts.ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 12
    steps = {round(b - a, 9) for a, b in pairwise(ticks)}
    assert len(steps) == 1


def test_a_single_step_and_its_average_make_a_chart(tmp_path: Path) -> None:
    assert page([write_run(tmp_path / "r", steps=1)]).count("<svg") >= 3
    speed = 341.0 + 1e-10
    text = charts.line_chart(
        [charts.Series("a", [1], [341.0]), charts.Series("b", [1], [speed])],
        title="t", x_label="x", y_label="y",
    )  # fmt: skip
    assert text.count("<circle") == 2


def test_smoothing_starts_at_the_first_value_and_keeps_gaps() -> None:
    assert charts.smoothed([3.0, 3.0, None, 3.0]) == pytest.approx([3.0, 3.0, None, 3.0])


def test_a_long_curve_is_thinned_to_its_means() -> None:
    text = charts.line_chart(
        [charts.Series("a", list(range(10_000)), [1.0] * 5000 + [3.0] * 5000)],
        title="t", x_label="x", y_label="y",
    )  # fmt: skip
    assert text.count(" L") == charts.MOST_POINTS - 1


def test_a_run_that_is_given_twice_has_two_names_and_each_curve_its_own_run(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name) for name in ("one", "two"))
    folder = str(first.folder)
    assert comparison.run_names([first, second]) == ["one", "two"]
    names = comparison.run_names([first, first, second])
    assert names == [f"{folder} (1)", f"{folder} (2)", "two"]
    entries = comparison.compare([first, first, second]).entries
    assert list(dict.fromkeys(entry.run for entry in entries)) == names
    html = page([first, first, second])
    assert all(name in html for name in names)


def test_costs_are_ranked_where_they_are_of_one_machine_and_of_as_many_adapters(
    tmp_path: Path,
) -> None:
    """A GPU's time says nothing of the settings, and a pass of three adapters is no one's alone."""
    first, second = (write_run(tmp_path / name) for name in ("one", "two"))

    def take(seconds: float, method: str, **machine: Any) -> None:
        info = second.info()
        info["training"] |= {"seconds": seconds, "peak_bytes": 10**9, "method": method}
        second.update(**{**info, "machine": {**info["machine"], **machine}})

    take(20.0, "samples of 5 ms")
    compared = comparison.compare([first, second])
    assert compared.best["seconds"] == compared.best["peak_bytes"] == {1}
    assert not any("machines" in sentence for sentence in compared.sentences)
    gpu = {"name": "Tesla T4", "memory_bytes": 16 * 2**30, "capability": "7.5"}
    take(20.0, "samples of 5 ms", gpus=[gpu])  # which computed nothing
    assert comparison.compare([first, second]).best["seconds"] == {1}
    take(20.0, "cuda allocator", gpus=[gpu])
    compared = comparison.compare([first, second])
    assert all(compared.best[name] == set() for name in comparison.TRAINING)
    assert any("on different machines, so times and memory" in s for s in compared.sentences)
    cohort = write_run(tmp_path / "three", adapters=("a", "b", "c"))
    compared = comparison.compare([first, cohort])
    assert all(compared.best[name] == set() for name in comparison.TRAINING)
    said = "three trained 3 adapters in one pass: its time and memory are that of all of them."
    assert said in compared.sentences
    assert said in page([first, cohort])


def test_an_adapter_that_diverged_is_not_the_smallest_to_ship(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", adapters=("small", "large"))
    adapters = run.info()["adapters"]
    adapters[1] |= {"file_bytes": 0, "diverged": True, "eval_loss": None}
    run.update(adapters=adapters)
    compared = comparison.compare([run, write_run(tmp_path / "two")])
    assert [entry.figures.get("file_bytes") for entry in compared.entries[:3]] == [
        9785000, None, 9785000,
    ]  # fmt: skip
    assert compared.best["file_bytes"] == set()
    evaluation = json.loads((run.folder / "evaluation.json").read_text())
    evaluation["models"].pop()  # it has no weights to measure
    (run.folder / "evaluation.json").write_text(json.dumps(evaluation))
    compared = comparison.compare([run, write_run(tmp_path / "two")])
    assert compared.entries[1].verdict == "diverged"
    assert not any("Not evaluated" in sentence for sentence in compared.sentences)


def test_losses_watched_on_as_many_labels_of_other_data_have_no_best(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, evaluated=False) for name in ("one", "two")]
    adapters = runs[1].info()["adapters"]
    runs[1].update(adapters=[{**adapters[0], "eval_loss": 1.9}])
    assert comparison.compare(runs).best["watched"] == {1}
    runs[1].update(data={**runs[1].info()["data"], "sha256": "ef" * 32})
    assert comparison.compare(runs).best["watched"] == set(), "parts of other training data"
    for run in runs:
        run.update(data={**run.info()["data"], "eval_sha256": "ab" * 32})
    assert comparison.compare(runs).best["watched"] == {1}, "a file that both were watched on"


def test_bases_that_are_stored_otherwise_stand_beside_each_other(tmp_path: Path) -> None:
    plain, small = write_run(tmp_path / "one"), write_run(tmp_path / "two", load_in_4bit=True)
    small.update(base={**small.info()["base"], "quantization": "nf4"})
    compared = comparison.compare([plain, small, plain])
    bases = [entry.label for entry in compared.entries if entry.is_base]
    assert bases == ["base smollm2-135m", "base smollm2-135m in nf4"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    first_run = write_run(folder / "one")
    second_run = write_run(folder / "two", adapters=("small", "중간", "large"), learning_rate=1e-4)
    return {
        "one": lighten.report(first_run),
        "many": lighten.report(first_run, second_run, output=folder / "many.html"),
    }


def opened(browser: Any, path: Path, **options: Any) -> Any:
    """The page in a fresh offline context; any request or console error fails the test."""
    context = browser.new_context(offline=True, **options)
    tab = context.new_page()
    troubles: list[str] = []
    tab.on("console", lambda m: troubles.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith("file:") else troubles.append(r.url))
    tab.goto(path.as_uri())
    assert troubles == []
    return tab


@pytest.mark.parametrize("name", ["one", "many"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_overflows_on_a_phone_or_a_desktop(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    tab = opened(browser, pages[name], viewport={"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("svg[role=img]").count() >= 3
    assert tab.locator("mark").count() > 10


def test_seven_runs_are_readable_without_scrolling_sideways(browser: Any, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run {place}", learning_rate=1e-4 * (place + 1))
            for place in range(7)]  # fmt: skip
    page = lighten.report(*runs, output=tmp_path / "page.html")
    tab = opened(browser, page, viewport={"width": 1280, "height": 800})
    table = "document.querySelector('#comparison .scroll')"
    assert tab.evaluate(f"{table}.scrollWidth <= {table}.clientWidth")
    names = tab.locator("#comparison tbody th")
    assert min(names.nth(place).bounding_box()["width"] for place in range(7)) > 100


CONTRAST = """() => {
  const lum = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const back = e => { for (; e; e = e.parentElement) {
    const b = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(b) && b !== 'transparent') return b; } return 'rgb(255,255,255)'; };
  let worst = 99;
  const all = 'h1,h2,p,dt,dd,th,td,small,mark,summary,figcaption,.verdict';
  for (const e of document.querySelectorAll(all)) {
    if (!e.innerText.trim() || !e.offsetParent) continue;
    const a = lum(getComputedStyle(e).color), b = lum(back(e));
    worst = Math.min(worst, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  } return worst; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(
    browser: Any, pages: dict[str, Path], scheme: str
) -> None:
    tab = opened(browser, pages["one"], color_scheme=scheme)
    assert tab.evaluate(CONTRAST) >= 4.5
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 23)"
    assert dark == (scheme == "dark")


def test_the_button_switches_and_the_choice_is_kept(browser: Any, pages: dict[str, Path]) -> None:
    tab = opened(browser, pages["one"], color_scheme="light")
    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click("#theme")
    after = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after
    tab.reload()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == after


def test_everything_is_readable_without_javascript(browser: Any, pages: dict[str, Path]) -> None:
    tab = opened(browser, pages["one"], java_script_enabled=False)
    assert "Held-out perplexity" in tab.inner_text("h1")
    assert tab.locator("section").count() >= 6


def test_print_is_light_and_clips_no_table(browser: Any, pages: dict[str, Path]) -> None:
    tab = opened(
        browser, pages["many"], color_scheme="dark", viewport={"width": 720, "height": 900}
    )
    tab.emulate_media(media="print")
    background = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(background) == "rgb(255, 255, 255)"
    assert not tab.is_visible("#theme")
    tables = "[...document.querySelectorAll('.scroll')]"
    overflow = f"Math.max(...{tables}.map(e => e.scrollWidth - e.clientWidth))"
    assert tab.evaluate(overflow) <= 1


def test_a_number_has_three_digits_and_no_point_behind_them() -> None:
    values = (0.0002, 9.996, 99.94, 99.97, 123.4, 999.6, -99.97)
    assert [charts.number(value) for value in values] == [
        "0.000200", "10.0", "99.9", "100", "123", "1,000", "-100",
    ]  # fmt: skip
