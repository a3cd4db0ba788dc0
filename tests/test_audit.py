"""`lighten audit`: each row measured or explained, within a budget, and resumed after a kill."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lighten
from lighten import locks, whole_files
from lighten.benchmarking import audit as auditing
from lighten.benchmarking import learning, measuring, ratios, techniques
from lighten.benchmarking.audit import Audit
from lighten.errors import UserError
from lighten.recipe import Recipe
from lighten.reporting import audit_page, audit_table
from lighten.training.base import tokenizer_of
from lighten.training.rows import load_rows
from tests.processes import Forked, call, in_fork

# Fewer steps than any budget would ask for, and a long row that is none.
SMALL: dict[str, Any] = {
    "steps": 2, "long_tokens": 48, "new_tokens": 2, "prompt_tokens": 8, "examples": 8,
    "val_size": 8, "per_device_train_batch_size": 4, "max_length": 64,
}  # fmt: skip


SOME = {
    "training": ("plain", "last 2 layers", "LoRA", "all together"),
    "long context": ("plain", "all together"),
    "answers": ("plain", "LoRA beside", "LoRA merged", "GGUF q8_0"),
}  # fmt: skip


KEYS = [f"{group}: {name}" for group, names in SOME.items() for name in names]


def narrow(patch: pytest.MonkeyPatch, *keys: str) -> None:
    """Audits have the rows of these keys alone."""
    every = techniques.techniques
    patch.setattr(techniques, "techniques", lambda *how: [t for t in every(*how) if t.key in keys])


@pytest.fixture(scope="module")
def forks() -> Any:
    """Rows in processes that need not import everything anew, and answers timed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "in_child", in_fork)
        patch.setattr(measuring, "ANSWER_S", 0.01)
        patch.setattr(measuring, "QUANTIZED_REPEATS", 1)
        patch.setattr(auditing, "MOST_PROCESSES", 1)
        yield patch


@pytest.fixture(scope="module")
def finished_audit(
    forks: Any, tiny_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Audit:
    """A small audit: of every kind of row there are some."""
    folder = tmp_path_factory.mktemp("audit") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch, *KEYS)
        return lighten.audit(
            str(tiny_folder), data=str(chat_file), budget="2h", output_dir=folder, **SMALL
        )


def test_every_row_is_measured_or_explained(finished_audit: Audit) -> None:
    rows = finished_audit.to_dict()["rows"]
    for row in rows:
        assert row["status"] == "measured", (row["name"], row.get("why"))
    assert {row["group"]: 0 for row in rows} == dict.fromkeys(SOME, 0)
    assert [(row["group"], row["name"]) for row in rows] == [
        (group, name) for group, names in SOME.items() for name in names
    ]  # in the order of the page, whatever was measured first
    stored = json.loads((finished_audit.folder / "audit.json").read_text())
    assert stored["status"] == "finished"
    assert stored["rows"] == json.loads(json.dumps(rows))


def test_trainings_take_the_same_tokens_and_learn(finished_audit: Audit) -> None:
    trained = [row for row in finished_audit.rows if row["group"] == "training" if row["processes"]]
    first = trained[0]["processes"][0]
    for row in trained:
        (process,) = row["processes"]
        assert process["step_tokens"] == first["step_tokens"], row["name"]
        assert len(process["step_seconds"]) == 2
        assert row["predicted_bytes"] > 0
    shipped = {row["name"]: row["processes"][0]["shipped_bytes"] for row in trained}
    assert shipped["LoRA"] < shipped["plain"] / 2


def test_what_a_row_lost_is_paired_over_the_examples(finished_audit: Audit) -> None:
    """The merged adapter predicts what the one beside the weights does, in the same format."""
    beside, merged = (finished_audit.row("answers", f"LoRA {how}") for how in ("beside", "merged"))
    ours, theirs = (np.asarray(row["processes"][0]["losses"]) for row in (beside, merged))
    np.testing.assert_array_equal(ours[:, 1], theirs[:, 1])
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=2e-2)
    plain = np.asarray(finished_audit.row("answers", "plain")["processes"][0]["losses"])
    expected = ours[:, 0].sum() / ours[:, 1].sum() - plain[:, 0].sum() / plain[:, 1].sum()
    assert beside["quality"]["difference"] == pytest.approx(expected)
    assert beside["quality"]["low"] <= beside["quality"]["difference"]


def test_the_page_and_the_table_show_every_row(finished_audit: Audit) -> None:
    page = (finished_audit.folder / "report.html").read_text(encoding="utf-8")
    for row in finished_audit.rows:
        assert row["name"] in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    tables = audit_table.tables(finished_audit.to_dict())
    assert [columns[0] for columns, _ in tables] == ["training", "long context", "answers"]
    assert sum(len(rows) for _, rows in tables) == len(finished_audit.rows)


def test_a_finished_audit_is_shown_again(
    finished_audit: Audit, tiny_folder: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "in_child", None)  # nothing is measured
    again = lighten.audit(
        str(tiny_folder),
        data=str(chat_file),
        budget="2h",
        output_dir=finished_audit.folder,
        **SMALL,
    )
    assert again.to_dict()["rows"] == json.loads(json.dumps(finished_audit.to_dict()["rows"]))
    with pytest.raises(UserError, match="was measured with other recipe"):
        lighten.audit(str(tiny_folder), data=str(chat_file), budget="2h",
                      output_dir=finished_audit.folder, **{**SMALL, "max_length": 32})  # fmt: skip
    before = chat_file.read_bytes()
    try:
        chat_file.write_bytes(b"".join(reversed(before.splitlines(keepends=True))))
        with pytest.raises(UserError, match="was measured with other data"):
            lighten.audit(str(tiny_folder), data=str(chat_file), budget="2h",
                          output_dir=finished_audit.folder, **SMALL)  # fmt: skip
    finally:
        chat_file.write_bytes(before)


def _audit(model: str, data: str, folder: str) -> None:
    measuring.in_child = in_fork  # type: ignore[assignment]
    narrow(pytest.MonkeyPatch(), *KEYS)
    lighten.audit(model, data=data, budget="2h", output_dir=folder, **SMALL)


def test_after_a_kill_it_goes_on(
    forks: Any, tiny_folder: Path, chat_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The kill is a real one, while the second row is measured or a later one."""
    folder = tmp_path / "killed"
    process = Forked(_audit, (str(tiny_folder), str(chat_file), str(folder)))
    ends = time.monotonic() + 300
    while time.monotonic() < ends and process.poll() is None:
        file = folder / "audit.json"
        if file.is_file() and len(json.loads(file.read_text())["rows"]) >= 1:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = json.loads((folder / "audit.json").read_text())["rows"]
    measured = {row["name"]: row["cost_s"] for row in before if row["group"] == "training"}
    assert before
    started: list[str] = []

    def counted(module: str, settings: Any, **limits: Any) -> Any:
        started.append(module)
        if len(started) > 1:
            raise KeyboardInterrupt  # enough is seen
        return in_fork(module, settings, **limits)

    monkeypatch.setattr(measuring, "in_child", counted)
    narrow(monkeypatch, *KEYS)
    with pytest.raises(KeyboardInterrupt):
        lighten.audit(
            str(tiny_folder), data=str(chat_file), budget="2h", output_dir=folder, **SMALL
        )
    after = json.loads((folder / "audit.json").read_text())
    assert after["status"] == "running"
    assert len(after["rows"]) > len(before)
    for row in after["rows"]:
        if row["group"] == "training" and row["name"] in measured:
            assert row["cost_s"] == measured[row["name"]]


def test_what_the_budget_leaves_out_is_measured_with_a_larger_one(
    forks: Any, tiny_folder: Path, chat_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    few = ("training: plain", "training: LoRA", "answers: plain")
    narrow(monkeypatch, *few)
    how: dict[str, Any] = {
        "data": str(chat_file), "output_dir": tmp_path / "small", **SMALL, "steps": None,
    }  # fmt: skip
    audit = lighten.audit(str(tiny_folder), budget="1s", **how)
    assert [row["status"] for row in audit.rows] == ["not measured"] * len(few)
    assert all("budget" in row["why"] for row in audit.rows)
    page = (audit.folder / "report.html").read_text(encoding="utf-8")
    assert "a larger --budget measures it" in page
    # This time it looks for itself how many steps there is room for: as many as may be.
    monkeypatch.setattr(auditing, "MOST_STEPS", 5)
    audit = lighten.audit(str(tiny_folder), budget="2h", **how)
    assert audit.steps == 5
    assert [row["status"] for row in audit.rows] == ["measured"] * len(few)


def test_what_needs_an_adapter_is_measured_once_there_is_budget_for_it(
    forks: Any, tiny_folder: Path, chat_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    narrow(monkeypatch, "training: all together", "answers: LoRA beside")
    how: dict[str, Any] = {"data": str(chat_file), "output_dir": tmp_path / "small", **SMALL}
    audit = lighten.audit(str(tiny_folder), budget="1s", **how)
    assert "needs the adapter" in audit.row("answers", "LoRA beside")["why"]
    audit = lighten.audit(str(tiny_folder), budget="2h", **how)
    assert [row["status"] for row in audit.rows] == ["measured"] * 2


def test_a_row_that_failed_is_tried_again_when_the_audit_goes_on(
    forks: Any, tiny_folder: Path, chat_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Something in the adapter's place lets its row fail; once it is gone, nothing does."""
    narrow(monkeypatch, "training: plain", "training: all together", "answers: LoRA beside")
    folder = tmp_path / "audit"
    started: list[str] = []

    def counted(module: str, settings: Any, **limits: Any) -> Any:
        started.append(module)
        if len(started) == 1:
            (folder / measuring.ADAPTER).touch()
        return in_fork(module, settings, **limits)

    monkeypatch.setattr(measuring, "in_child", counted)
    how: dict[str, Any] = {"data": str(chat_file), "output_dir": folder, **SMALL}
    audit = lighten.audit(str(tiny_folder), budget="2h", **how)
    before = {row["name"]: row["status"] for row in audit.rows}
    assert before == {
        "plain": "measured", "all together": "failed", "LoRA beside": "not measured",
    }  # fmt: skip
    assert measuring.ADAPTER in audit.row("training", "all together")["why"]

    (folder / measuring.ADAPTER).unlink()
    measured = len(started)
    lines: list[str] = []
    audit = lighten.audit(str(tiny_folder), budget="2h", log=lines.append, **how)
    assert any("1 that failed tried again" in line for line in lines)
    assert [row["status"] for row in audit.rows] == ["measured"] * 3
    assert len(started) == measured + 2, "what was measured is not measured again"


def test_what_ran_out_of_memory_is_not_tried_again_nor_without_time(
    forks: Any, tiny_folder: Path, chat_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    narrow(monkeypatch, "training: plain", "training: LoRA")
    how: dict[str, Any] = {"data": str(chat_file), "output_dir": tmp_path / "audit", **SMALL}
    lighten.audit(str(tiny_folder), budget="2h", **how)
    file = tmp_path / "audit" / "audit.json"
    stored = json.loads(file.read_text())
    for row, out_of_memory in zip(stored["rows"], (False, True), strict=True):
        row |= {"status": "failed", "why": "so it was", "processes": [],
                "out_of_memory": out_of_memory}  # fmt: skip
    for spent_s, statuses in ((7200.0, ["failed", "failed"]), (1.0, ["measured", "failed"])):
        file.write_text(json.dumps({**stored, "spent_s": spent_s}))
        lines: list[str] = []
        audit = lighten.audit(str(tiny_folder), budget="2h", log=lines.append, **how)
        assert [row["status"] for row in audit.rows] == statuses
        assert ("a larger --budget to try 1 failed row again" in lines[0]) == (spent_s == 7200)


def test_two_audits_do_not_write_one_folder(
    forks: Any, tiny_folder: Path, chat_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    narrow(monkeypatch)
    folder = tmp_path / "one"
    folder.mkdir()
    how: dict[str, Any] = {"data": str(chat_file), "output_dir": folder, "budget": "1s", **SMALL}
    other = Forked(_hold, (str(folder),))
    ends = time.monotonic() + 60
    while not (folder / locks.LOCK).is_file() and time.monotonic() < ends:
        time.sleep(0.05)
    with pytest.raises(UserError, match="is being written by process"):
        lighten.audit(str(tiny_folder), **how)
    other.send_signal(signal.SIGKILL)  # what a killed one leaves is taken over
    assert other.wait() == -signal.SIGKILL
    assert lighten.audit(str(tiny_folder), **how).status == "finished"
    assert not (folder / locks.LOCK).exists()


def _hold(folder: str) -> None:
    locks.acquire(Path(folder))
    time.sleep(600)


def test_a_file_of_another_version_is_no_audit(
    tiny_folder: Path, chat_file: Path, finished_audit: Audit, tmp_path: Path
) -> None:
    for change in ("null", "[]", '{"rows": 1}', None):
        text = change
        if text is None:
            whole = json.loads((finished_audit.folder / "audit.json").read_text())
            text = json.dumps({key: value for key, value in whole.items() if key != "spent_s"})
        (tmp_path / "audit.json").write_text(text)
        with pytest.raises(UserError, match="is no audit of this version"):
            lighten.audit(str(tiny_folder), data=str(chat_file), budget="2h", output_dir=tmp_path,
                          **SMALL)  # fmt: skip


def test_a_loss_that_is_no_number_does_not_end_the_page(tmp_path: Path) -> None:
    """Half an hour was measured; JSON has null where a loss diverged."""
    data = json.loads(Path("docs/audit-smollm2-cpu.json").read_text(encoding="utf-8"))
    for row in data["rows"]:
        if row["name"] == "all together" and row["group"] == "training":
            for process in row["processes"]:
                for pair in process.get("losses", []):
                    pair[0] = None
    data["rows"] = ratios.summarised(data["rows"])
    whole_files.write_json(tmp_path / "audit.json", data)
    # As a killed audit leaves it, which has no page yet.
    page = lighten.report(tmp_path).read_text(encoding="utf-8")
    assert page.count('<td data-label="held-out loss">not a number</td>') == 1
    assert "All together train" in page
    assert "held-out loss nan" not in page
    tables = {head[0]: rows for head, rows in audit_table.tables(data)}
    assert ["all together", "not a number"] in [[row[0], row[-1]] for row in tables["training"]]


def test_the_headline_names_what_all_together_is_set_beside() -> None:
    """Where the plain way runs out of memory, the first row measured stands in its place."""
    data = json.loads(Path("docs/audit-smollm2-cpu.json").read_text(encoding="utf-8"))
    assert "as fast as the plain way in" in audit_page.headline(ratios.summarised(data["rows"]))
    for row in data["rows"]:
        if (row["group"], row["name"]) == ("training", "plain"):
            row.update(status="failed", processes=[], why="it holds more than 8.00 GiB")
    headline = audit_page.headline(ratios.summarised(data["rows"]))
    assert "as fast as “attention in blocks” (the plain way was not measured) in" in headline
    assert "as fast as the plain way" not in headline


def test_what_runs_out_of_memory_stays_in_the_table() -> None:
    row = {"group": "training", "name": "plain", "what": "", "plain": True, "status": "failed",
           "processes": [], "why": "it holds more than 8.00 GiB", "out_of_memory": True,
           "predicted_bytes": 9 * 2**30}  # fmt: skip
    (summary,) = ratios.summarised([row])
    assert audit_table.cells(summary)[3:5] == ["out of memory", "9.00 GiB"]
    assert "it holds more than 8.00 GiB" in audit_table.reasons({"rows": [summary]})[0]


def test_ratios_have_intervals_that_hold() -> None:
    """Of made-up rows with a known spread, 95 % of the ratios lie in another audit's interval."""
    random = np.random.default_rng(0)

    def audit() -> list[dict[str, Any]]:
        rows = []
        for place, true in enumerate((1.0, 0.5, 2.0, 0.8, 3.0)):
            processes = [
                {"decode_samples": [true * math.exp(random.normal(0, 0.05))]} for _ in range(2)
            ]
            rows.append({"group": "answers", "name": str(place), "plain": not place, "what": "",
                         "status": "measured", "processes": processes})  # fmt: skip
        return ratios.summarised(rows)

    covered = []
    for _ in range(200):
        first, second = audit(), audit()
        for ours, theirs in zip(first[1:], second[1:], strict=True):
            speed, other_speed = ours["brought"]["speed"], theirs["brought"]["speed"]
            covered.append(speed["low"] <= other_speed["value"] <= speed["high"])
    assert 0.93 <= float(np.mean(covered)) <= 0.97


def test_mistakes_are_told(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"data": str(chat_file), "output_dir": tmp_path / "new"}
    with pytest.raises(UserError, match=r"none\.gguf does not exist"):
        lighten.audit(tmp_path / "none.gguf", data=chat_file)
    with pytest.raises(UserError, match="--budget soon: write a time such as 90s"):
        lighten.audit(str(tiny_folder), budget="soon", **how)
    with pytest.raises(UserError, match="2 steps or more"):
        lighten.audit(str(tiny_folder), steps=1, **how)
    for tokens in (-5, 1):
        with pytest.raises(UserError, match="long_tokens: a row has 2 tokens or more"):
            lighten.audit(str(tiny_folder), long_tokens=tokens, **how)
    with pytest.raises(UserError, match="dtype has no effect on an audit: each row has its own"):
        lighten.audit(str(tiny_folder), dtype="float32", **how)
    with pytest.raises(UserError, match="num_train_epochs has no effect on an audit: give --steps"):
        lighten.audit(str(tiny_folder), epochs=2, **how)
    assert not how["output_dir"].exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        lighten.audit(str(tiny_folder), data=str(chat_file), output_dir=tmp_path / "full")
    result = call("audit", str(tmp_path / "none"), "--data", str(chat_file))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_how_many_steps_there_was_time_for_does_not_decide_the_longest_row(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """A few rows are very long: the more steps, the likelier one of them would be among these."""
    draw = np.random.default_rng(0)
    lengths = [*draw.integers(1, 40, 400).tolist(), 90, 110, 120]
    draw.shuffle(lengths)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": "a"},
                                 {"role": "assistant", "content": f"{number} " + "b " * length}]})
        + "\n" for number, length in enumerate(lengths)
    ))  # fmt: skip
    recipe = Recipe.from_values({
        "model_name_or_path": str(tiny_folder), "dataset": str(data), "val_size": 0,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_length": 256,
        "output_dir": str(tmp_path / "run"),
    })  # fmt: skip
    rows = load_rows(recipe, tokenizer_of(recipe))
    every = [tuple(row.input_ids) for row in rows.train.rows]
    longest = set()
    for steps in range(2, 20):
        selected = learning.select_rows(rows, recipe, steps).train.rows
        places = [every.index(tuple(row.input_ids)) for row in selected]
        assert places == sorted(set(places))
        assert len(places) == 8 * steps
        longest.add(max(len(row.input_ids) for row in selected))
    assert len(longest) == 1
    assert longest.pop() < max(len(row.input_ids) for row in rows.train.rows) / 2


def test_the_peak_of_a_training_is_without_the_reading_of_its_data(
    tiny_folder: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run's is, whose data are read for its plan."""
    from lighten.training import rows as training_rows

    read = training_rows.load_rows

    def reads_much(*arguments: Any) -> Any:
        np.ones(2**28, dtype=np.uint8)  # freed at once, but it was held
        return read(*arguments)

    monkeypatch.setattr(training_rows, "load_rows", reads_much)
    recipe = Recipe.from_values({
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "val_size": 4,
        "dtype": "float32", "workers": 1, "per_device_train_batch_size": 2,
    })  # fmt: skip
    records = learning.run(recipe.completed(), kind="cpu", steps=2, measures_loss=False)
    assert 0 < next(records)["peak_bytes"] < 2**27
    assert list(records) == []
