"""The benchmarks of cohorts and sweeps."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cohort, cohort_worker, engine, machine, sweep_vs_peers
from tests import processes
from tests.lessons import lesson
from tests.tiny import tiny_model


def test_a_cohort_counts_only_with_the_losses_of_its_adapters_alone(tmp_path: Path) -> None:
    def cohort_run(difference: float, loss: float = 2.002) -> dict[str, Any]:
        return {"alone_s": [1.0, 1.0], "cohort_s": {"2": 1.0}, "idle": False,
                "losses": {"a0": [2.0, loss]},
                "largest_loss_difference": {"2": difference}}  # fmt: skip

    theirs, exact = {"alone_s": [2.0, 2.0], "idle": False}, cohort_run(1e-6, loss=2.0)

    def table(*ours: dict[str, Any], exact: dict[str, Any] = exact, peft: Any = theirs) -> Any:
        return cohort.tabulate("nf4", 64, (1, 2), ours, [peft] * len(ours), exact)

    good = table(*[cohort_run(1e-3)] * 3)
    assert [row["time"] for row in good] == [1.0, 0.5]
    assert [row["time_vs_peft"] for row in good] == [0.5, 0.25]
    # Alone, rounding takes the adapter 1e-3 from float32: its cohort may be twice as far from it.
    assert table(cohort_run(1.9e-3))[1]["time"] == 0.5
    assert "2.1e-03" in table(cohort_run(2.1e-3))[1]["why_not"]
    assert "2.1e-03" in table(cohort_run(1e-3), cohort_run(2.1e-3))[1]["why_not"]
    assert table(cohort_run(float("nan")))[1]["time"] is None
    assert "in float32" in table(cohort_run(1e-3), exact=cohort_run(1e-3, loss=2.0))[1]["why_not"]
    assert table(cohort_run(1e-3), exact={"error": "no memory"})[1]["why_not"] == "no memory"
    assert table({**cohort_run(0.0), "idle": True})[1]["time"] is None
    assert table(cohort_run(1e-3), exact={**exact, "idle": True})[1]["time"] is None
    failed = table(cohort_run(0.0), peft={"error": "no NF4 here"})[1]
    assert (failed["time"], failed["time_vs_peft"]) == (0.5, None)

    names = ["a0", "a1"]
    rows = lesson(steps=4, rows=8)
    lessons = cohort.lessons([row for step in rows for row in step], names, 64, 2)
    job = {"model": "tiny", "device": "cpu", "settings": {"dtype": "float32"}, "lessons": lessons,
           "start": start(tmp_path, names), "sizes": (1, 2), "scratch": str(tmp_path)}  # fmt: skip
    our_run = cohort_worker.ours(job, engine.base_in_memory(tiny_model("llama"), "float32"))
    assert our_run["largest_loss_difference"][2] < 1e-5
    assert {name: len(losses) for name, losses in our_run["losses"].items()} == {"a0": 2, "a1": 2}
    assert not our_run["idle"]
    assert len(our_run["alone_s"]) == 2
    base = tiny_model("llama")
    assert not cohort_worker.peft(job, lambda: base)["idle"]


def start(folder: Path, names: list[str]) -> dict[str, str]:
    from lighten import adapters
    from lighten.adapters import AdapterSpec

    specs = [AdapterSpec(name, r=engine.RANK, seed=place) for place, name in enumerate(names)]
    attached = adapters.attach(tiny_model("llama"), specs)
    for name in names:
        (folder / name).mkdir()
        for file, content in adapters.files.contents(attached, name).items():
            (folder / name / file).write_bytes(content)
    return {name: str(folder / name) for name in names}


def test_memory_of_a_cohort_is_a_ratio_of_runs_that_trained() -> None:
    def cohort_run(peak: float, *, idle: bool = False) -> dict[str, Any]:
        return {"peak_bytes": peak, "idle": idle}

    ratios = cohort.ratios([], {1: [cohort_run(4.0)], 4: [cohort_run(4.4)]})
    assert ratios["memory_4"] == pytest.approx(1.1)
    assert {"time_8_at_64", "time_8_at_512", "nf4_time_8_at_64", "nf4_time_8_at_512"} <= set(ratios)
    assert (
        cohort.ratios([], {1: [cohort_run(4.0)], 4: [cohort_run(4.4, idle=True)]})["memory_4"]
        is None
    )
    assert cohort.ratios([], {1: [cohort_run(4.0)], 4: [{"error": "killed"}]})["memory_4"] is None


def arms(scale: float = 1.0, **changes: Any) -> dict[str, list[dict[str, Any]]]:
    """Runs over two ranks: TRL takes four times as long as the cohort; its losses times `scale`."""

    def arm(names: list[str], wall: float, peak: float, factor: float = 1.0) -> dict[str, Any]:
        losses = [3.0, 2.0 * factor, 1.0 * factor]
        return {"losses": dict.fromkeys(names, losses), "moved": dict.fromkeys(names, 0.1),
                "grad_norms": dict.fromkeys(names, [1.0] * 3), "wall_s": wall, "peak_bytes": peak,
                "step_seconds": [wall / 2, wall / 4, wall / 4]}  # fmt: skip

    rows = {"cohort": arm(["r2", "r4"], 10.0, 6.0), "alone, r2": arm(["r2"], 6.0, 4.0),
            "alone, r4": arm(["r4"], 9.0, 5.0), "trl, r2": arm(["r2"], 15.0, 7.0, scale),
            "trl, r4": arm(["r4"], 25.0, 7.0, scale)}  # fmt: skip
    return {label: [{**row, **changes.get(label, {})}] for label, row in rows.items()}


def test_a_sweep_is_compared_with_its_runs_one_after_another() -> None:
    ratios = sweep_vs_peers.ratios(arms(), ["r2", "r4"])
    assert ratios == pytest.approx(
        {"peak_vs_largest_single": 6 / 5, "wall_vs_three_own_runs": 10 / 15,
         "wall_vs_three_trl_runs": 0.25, "steps_vs_three_trl_runs": 0.25,
         "largest_loss_difference_alone": 0.0, "largest_loss_difference_trl": 0.0}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "null"),
    [
        (arms(1.05), {"wall_vs_three_trl_runs", "steps_vs_three_trl_runs"}),
        (arms(float("nan")), {"wall_vs_three_trl_runs", "steps_vs_three_trl_runs"}),
        (arms(**{"trl, r2": {"moved": {"r2": 0.0}}}),
         {"wall_vs_three_trl_runs", "steps_vs_three_trl_runs"}),
        (arms(**{"alone, r4": {"error": "killed"}}),
         {"peak_vs_largest_single", "wall_vs_three_own_runs"}),
        (arms(cohort={"grad_norms": {"r2": [1.0] * 3, "r4": [0.0] * 3}}),
         {"peak_vs_largest_single", "wall_vs_three_own_runs", "wall_vs_three_trl_runs",
          "steps_vs_three_trl_runs"}),
    ],
)  # fmt: skip
def test_a_sweep_with_an_arm_that_does_not_count_has_no_ratio(
    runs: dict[str, list[dict[str, Any]]], null: set[str]
) -> None:
    ratios = sweep_vs_peers.ratios(runs, ["r2", "r4"])
    assert {k for k, v in ratios.items() if v is None and not k.startswith("largest")} == null


@pytest.mark.slow
def test_the_sweep_s_benchmark_runs_on_a_tiny_model(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In real processes, of which most are forked; TRL's too where its environment was made."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "LOOK_S", 0.1)
    fresh = machine.in_fresh_process
    begun: list[str] = []

    def in_process(name: str, job: dict[str, Any], scratch: Path, **options: Any) -> dict[str, Any]:
        begun.append(name)
        if options or len(begun) == 1:  # another environment's Python; or once as it is
            return fresh(name, job, scratch, **options)
        began, file = time.time(), scratch / "job.json"
        file.write_text(json.dumps({**job, "scratch": str(scratch / "out"), "began": began}))
        ended = processes.script(Path(machine.__file__).with_name(name), str(file))
        assert ended.returncode == 0, ended.stderr[-2000:]
        return {**json.loads(ended.stdout.splitlines()[-1]), "wall_s": time.time() - began}

    monkeypatch.setattr(machine, "in_fresh_process", in_process)
    trl = (sweep_vs_peers.PEERS / "bin" / "python").exists()
    theirs = ["--best", "sdpa, no autocast"] if trl else ["--no-trl"]
    words = ["--model", str(tiny_folder), "--ranks", "2", "4", "--steps", "2", *theirs]
    sweep_vs_peers.main(words, lesson(steps=2, rows=8))
    printed = capsys.readouterr().out
    ratios = json.loads(printed.splitlines()[-1])
    assert set(ratios) == set(sweep_vs_peers.KEYS)
    assert ratios["peak_vs_largest_single"] is not None, printed
    assert (ratios["wall_vs_three_trl_runs"] is not None) == trl, printed
    (path,) = (tmp_path / "trial").glob("sweep_vs_peers-*.json")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert set(stored["table"]) >= {"cohort", "alone, r2", "alone, r4"}
    assert stored["machine"]["cores"] >= 1
    assert stored["control_loss_difference"] is not None
    assert stored["runs"]["cohort"][0]["losses"].keys() == {"r2", "r4"}
