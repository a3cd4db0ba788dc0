"""Whole sweeps on tiny models: the same as alone, killed and resumed, within a budget, the page."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lighten
from lighten.engine import workers
from lighten.errors import UserError
from lighten.evaluation import together
from lighten.evaluation.partial_results import PartialResults
from lighten.generation import kernels
from lighten.recipe import EvaluateOptions
from lighten.reporting import charts, comparison
from lighten.runs import Run
from lighten.sweeps.arms import expand, group_arms
from lighten.sweeps.measure import Measurement
from lighten.sweeps.result import SweepResult, _add_measured
from tests import processes
from tests.processes import Forked
from tests.test_report import CONTRAST, opened


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "sweep"), "learning_rate": 1e-2, "max_steps": 6,
        "eval_steps": 2, "save_steps": 2, "val_size": 24, "per_device_train_batch_size": 4,
        "evaluate.max_new_tokens": 4,
    }  # fmt: skip


def sweep(settings: dict[str, Any], **changes: Any) -> SweepResult:
    return lighten.sweep(progress=False, **{**settings, **changes})


def curves(result: SweepResult) -> dict[str, list[Any]]:
    return {arm["name"]: arm["train_curve"] for arm in result.arms}


def losses(result: SweepResult) -> dict[str, float]:
    return {arm["name"]: arm["loss"]["value"] for arm in result.arms if "loss" in arm}


def test_arms_train_as_they_would_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    """Trained in one pass, every arm has the losses that its own recipe gives."""
    result = sweep(settings, lora_r=[2, 8], seed=[1, 2], lora_dropout=0.1, metric="loss")
    (together,) = result.data["groups"]
    assert len(together["arms"]) == 4
    recipe = lighten.Recipe.from_values(Run(result.folder).recipe().completed())
    for arm in expand(recipe):
        alone = lighten.train(
            arm.recipe.changed({"output_dir": str(tmp_path / arm.name)}), progress=False
        )
        cohort_losses = {(m["kind"], m["step"]): m["loss"]
                         for m in Run(result.folder / "cohort-1").metrics()
                         if m["adapter"] == arm.name}  # fmt: skip
        alone_losses = {(m["kind"], m["step"]): m["loss"] for m in alone.metrics()}
        assert cohort_losses.keys() == alone_losses.keys()
        for place, loss in alone_losses.items():
            # Sums in another order; six steps of AdamW at a high rate let it grow a little.
            assert cohort_losses[place] == pytest.approx(loss, rel=2e-5), (arm.name, place)


def test_the_result_holds_what_each_arm_is_worth(settings: dict[str, Any]) -> None:
    result = sweep(settings, lora_r=[2, 8], reference=["base", "full"], full_learning_rate=1e-3)
    data = SweepResult.read(result.folder).data
    assert data["status"] == "finished"
    arms = {arm["name"]: arm for arm in data["arms"]}
    assert list(arms) == ["r2", "r8", "full", "base"]
    for name in ("r2", "r8", "full"):
        arm = arms[name]
        assert arm["steps"] == 6
        assert arm["status"] == "finished"
        assert arm["loss"]["se"] > 0
        assert {"chrf", "bleu", "exact_match"} <= set(arm["metrics"])
        assert arm["tokens"] > 0
        assert arm["peak_bytes"] > 0
        assert arm["tokens_per_second"] > 0
        assert [step for step, _, _ in arm["curve"]] == [2, 4, 6]
        assert arm["against"]["base"]["verdict"]
    assert arms["r8"]["trainable_parameters"] == 4 * arms["r2"]["trainable_parameters"]
    assert arms["r8"]["file_bytes"] > arms["r2"]["file_bytes"]
    assert arms["r8"]["served"]["flops_per_token"] == 2 * arms["r8"]["trainable_parameters"]
    assert arms["r8"]["state_bytes"] == 16 * arms["r8"]["trainable_parameters"]
    assert arms["full"]["served"]["flops_per_token"] == 0
    assert arms["r2"]["time_share"] + arms["r8"]["time_share"] == pytest.approx(1)
    assert arms["r2"]["seconds"] < arms["r8"]["seconds"]
    # Losses are those of the run's own last evaluation: the same rows, the same weights.
    eval_losses = {m["adapter"]: m["loss"] for m in Run(result.folder / "cohort-1").metrics()
                   if m["kind"] == "eval"}  # fmt: skip
    assert arms["r2"]["loss"]["value"] == pytest.approx(eval_losses["r2"], rel=1e-5)
    assert data["recommendation"]["arm"] in ("r2", "r8", None)
    assert data["recommendation"]["reasons"]
    assert result.recommended == data["recommendation"]["arm"]


def test_the_page_shows_all_of_it(settings: dict[str, Any]) -> None:
    result = sweep(settings, lora_r=[2, 8], reference=["base", "full"], full_learning_rate=1e-3)
    text = (result.folder / "report.html").read_text()
    for part in ("Every arm", "Against the best", "Curves together", "What it costs", "frontier",
                 "held-out loss", "chrF", "real tokens/s", "peak memory", "% FLOPs", "to ship",
                 "Against full fine-tuning", "lora_r", "The completed recipe"):  # fmt: skip
        assert part in text, part
    assert text.count("<svg") >= 4
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org)""", text)
    rewritten = lighten.report(result.folder, output=result.folder / "again.html")
    assert rewritten.read_text() == text
    place = result.folder / "cohort-1" / "adapters" / str(result.recommended)
    assert f"{result.recommended} is in <code>{place}</code>" in text
    with pytest.raises(UserError, match=r"is a sweep; what it trained .*: name \S*cohort-1"):
        lighten.evaluate(result.folder)


def test_two_sweeps_side_by_side_are_the_arms_that_they_recommend(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    results = [
        sweep({**settings, "output_dir": str(tmp_path / name), **changes}, lora_r=[2, 8])
        for name, changes in (("first", {}), ("second", {"max_steps": 2, "eval_steps": 1}))
    ]
    arms = [
        min((arm for arm in losses(result) if arm in ("r2", "r8")), key=losses(result).__getitem__)
        for result in results
    ]
    assert all(result.recommended in (None, "r2", "r8") for result in results)
    arms = [result.recommended or arm for result, arm in zip(results, arms, strict=True)]
    labels = [f"{result.folder.name}: {arm}" for result, arm in zip(results, arms, strict=True)]
    compared = comparison.compare([Run(result.folder) for result in results])
    assert [entry.label for entry in compared.entries] == labels
    for entry, result, arm in zip(compared.entries, results, arms, strict=True):
        assert entry.figures["loss"] == losses(result)[arm]
        assert entry.figures["chrf"] > 0
        assert entry.figures["file_bytes"] > 0
    assert compared.sentences[0].startswith(f"{labels[0]} has the lowest held-out loss")
    page = lighten.report(*(result.folder for result in results)).read_text()
    assert all(label in page for label in labels)
    assert not any("Not evaluated" in sentence for sentence in compared.sentences)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_a_phone_and_a_desktop(
    settings: dict[str, Any], browser: Any, width: int
) -> None:
    result = sweep(settings, lora_r=[2, 8], seed=[0, 1], learning_rate=[1e-3, 1e-2])
    path = result.folder / "report.html"
    tab = opened(browser, path, viewport={"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("svg[role=img]").count() >= 4
    assert tab.evaluate(CONTRAST) >= 4.5
    assert opened(browser, path, color_scheme="dark").evaluate(CONTRAST) >= 4.5


def test_an_ended_sweep_is_moved_aside_and_a_resumed_one_is_measured_once(
    settings: dict[str, Any],
) -> None:
    ended = sweep(settings, lora_r=[2], metric="loss")
    path = ended.folder / "arms" / "r2.json"
    before = path.stat().st_mtime_ns
    resumed = sweep(settings, lora_r=[2], metric="loss", resume=True)
    assert path.stat().st_mtime_ns == before
    assert losses(resumed) == losses(ended)
    with pytest.raises(UserError, match="holds another sweep"):
        sweep(settings, lora_r=[4], metric="loss", resume=True)
    sweep(settings, lora_r=[4], metric="loss")
    assert (ended.folder.with_name("sweep-1") / "sweep.json").is_file()


def test_what_is_missing_is_said_before_anything_runs(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="nothing to sweep"):
        sweep(settings)
    with pytest.raises(UserError, match="no held-out examples"):
        sweep({**settings, "val_size": 0, "eval_steps": None}, lora_r=[2])
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize("full_tokens", [workers.FULL_TOKENS, 16], ids=["together", "apart"])
def test_an_arm_that_diverges_leaves_and_the_others_go_on(
    settings: dict[str, Any], full_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart, the good one has already moved in the step in which the bad one leaves."""
    monkeypatch.setattr(workers, "FULL_TOKENS", full_tokens)
    result = sweep(
        settings, learning_rate=[1e-2, 1e30], lora_r=2, metric="loss", max_grad_norm=None
    )
    good, bad = result.arms[:2]
    assert (good["status"], good["steps"]) == ("finished", 6)
    assert bad["status"] == "left"
    assert bad["steps"] < 6
    assert "not a number" in bad["why"]
    assert "loss" not in bad
    alone = sweep(
        {**settings, "output_dir": settings["output_dir"] + "-alone"}, lora_r=[2], metric="loss",
        max_grad_norm=None,
    )  # fmt: skip
    curve, alone_curve = good["train_curve"], alone.arms[0]["train_curve"]
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in alone_curve], rel=2e-5)
    assert f"{bad['name']} did not train to the end" in " ".join(
        result.data["recommendation"]["reasons"]
    )


def test_a_group_of_which_all_arms_diverged_is_not_trained_again(settings: dict[str, Any]) -> None:
    swept = {"learning_rate": [1e29, 1e30], "metric": "loss", "max_grad_norm": None}
    result = sweep(settings, **swept)
    run = result.folder / "cohort-1" / "run.json"
    assert [arm["status"] for arm in result.arms] == ["left", "left"]
    assert Run(run.parent).info()["status"] == "failed"
    written_ns = run.stat().st_mtime_ns
    resumed = sweep(settings, **swept, resume=True)
    assert run.stat().st_mtime_ns == written_ns
    assert resumed.data["status"] == "finished"
    assert resumed.data["recommendation"] == result.data["recommendation"]


def test_an_arm_that_overflows_in_its_last_step_has_no_loss_and_the_page_stands(
    settings: dict[str, Any],
) -> None:
    result = sweep(
        {**settings, "max_steps": 1, "eval_steps": 1, "save_steps": 1}, learning_rate=[1e-2, 1e30],
        lora_r=2, metric="loss", max_grad_norm=None, reference=["base"],
    )  # fmt: skip
    good, bad = result.arms[:2]
    assert (good["status"], bad["status"]) == ("finished", "finished")
    assert result.recommended != bad["name"]
    (sentence,) = [text for text in result.data["recommendation"]["reasons"] if bad["name"] in text]
    assert sentence.startswith(f"The held-out loss of {bad['name']} is not a number")
    read = SweepResult.read(result.folder)
    assert next(arm for arm in read.arms if arm["name"] == bad["name"])["loss"]["value"] is None
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert ">loss is not a number<" in page
    # Taken up again, it is read as it was written.
    resumed = sweep(
        {**settings, "max_steps": 1, "eval_steps": 1, "save_steps": 1}, learning_rate=[1e-2, 1e30],
        lora_r=2, metric="loss", max_grad_norm=None, reference=["base"], resume=True,
    )  # fmt: skip
    assert resumed.data["recommendation"] == result.data["recommendation"]


def test_each_rank_gets_its_own_rate_first(settings: dict[str, Any]) -> None:
    result = sweep(
        {**settings, "max_steps": 16}, lora_r=[2, 8], learning_rate=[1e-6, 1e-2], seed=[0, 1],
        tune="learning_rate", metric="loss",
    )  # fmt: skip
    assert [tuned["best"] for tuned in result.data["tuned"].values()] == [1e-2, 1e-2]
    assert {arm["sets"]["learning_rate"] for arm in result.arms if not arm["reference"]} == {1e-2}
    assert len([arm for arm in result.arms if not arm["reference"]]) == 4
    assert Run(result.folder / "tune" / "cohort-1").recipe().max_steps == 4
    assert {row["name"]: len(row["arms"]) for row in result.data["settings"]} == {"r2": 2, "r8": 2}
    assert "Learning rates tried first" in (result.folder / "report.html").read_text()


def start(settings: dict[str, Any], *words: str) -> Forked:
    flags = [f"{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in settings.items()]
    return processes.start("sweep", *flags, *words)


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_goes_on_and_ends_the_same(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    swept = {"lora_r": [2, 4], "gradient_accumulation_steps": [1, 2], "metric": "loss"}
    settings |= {"max_steps": 30, "save_steps": 1, "eval_steps": 10}
    uninterrupted = sweep(settings, **swept, output_dir=str(tmp_path / "whole"))
    assert len(uninterrupted.data["groups"]) == 2
    folder = Path(settings["output_dir"])
    # In the first group, then in the second.
    for name, checkpoint in (("cohort-1", "checkpoint-7"), ("cohort-2", "checkpoint-11")):
        process = start({**settings, **swept})
        until = time.monotonic() + 90
        while not (folder / name / "checkpoints" / checkpoint).exists():
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert SweepResult.read(folder).data["status"] == "running"
    written_ns = (folder / "cohort-1" / "metrics.jsonl").stat().st_mtime_ns
    process = start({**settings, **swept})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    assert "going on after step" in output
    assert (folder / "cohort-1" / "metrics.jsonl").stat().st_mtime_ns == written_ns
    resumed = SweepResult.read(folder)
    assert resumed.data["status"] == "finished"
    assert curves(resumed) == curves(uninterrupted)
    assert losses(resumed) == losses(uninterrupted)
    assert resumed.data["recommendation"] == uninterrupted.data["recommendation"]


@pytest.mark.slow
def test_a_stopped_sweep_says_how_to_go_on(settings: dict[str, Any]) -> None:
    process = start({**settings, "max_steps": 5000, "lora_r": [2, 4]})
    folder = Path(settings["output_dir"])
    until = time.monotonic() + 60
    while not (folder / "cohort-1" / "metrics.jsonl").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: lighten sweep --resume {folder}" in output.replace("\n", " ")
    assert SweepResult.read(folder).data["status"] == "interrupted"


def test_a_sweep_killed_while_it_measures_loses_no_batch(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"lora_r": [2, 4], "evaluate.batch_size": 4, "evaluate.max_examples": 12}
    settings |= {"eval_steps": 6, "max_steps": 6}
    parts: list[str] = []
    put = PartialResults.put

    def note_put(self: PartialResults, key: str, values: Any) -> None:
        parts.append(f"{self.path.name} {key}")
        put(self, key, values)

    monkeypatch.setattr(PartialResults, "put", note_put)
    monkeypatch.setattr(together, "ENOUGH_ROWS", 4)
    uninterrupted = sweep(settings, output_dir=str(tmp_path / "whole"))
    every, parts[:] = list(parts), []
    # The base and two arms: three batches of losses and answers, or losses and three of answers.
    in_one_pass = kernels.obstacle() is None
    assert len(every) == 3 * (3 if in_one_pass else 4)

    def until_the_second_batch(stage: str, done: int, total: int) -> None:
        if stage == ("r2: loss and answers" if in_one_pass else "r2: answers") and done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(settings, measuring_progress=until_the_second_batch)
    stages: list[str] = []
    resumed = sweep(settings, measuring_progress=lambda stage, *_: stages.append(stage))
    assert parts == every  # nothing twice, nothing left out
    assert "r2: loss" not in stages
    assert not list((resumed.folder / "arms").glob("*.partial.jsonl"))
    assert losses(resumed) == losses(uninterrupted)
    for resumed_arm, arm in zip(resumed.arms, uninterrupted.arms, strict=True):
        assert resumed_arm["metrics"]["chrf"] == arm["metrics"]["chrf"]


def test_the_command_line_prints_the_table_and_the_reasons(settings: dict[str, Any]) -> None:
    process = start(settings, "--lora_r", "2,4", "--metric", "loss", "--reference", "none")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-2000:]
    assert "held-out loss" in output
    assert f"report: {Path(settings['output_dir']) / 'report.html'}" in output.splitlines()
    flat = " ".join(output.split())
    assert "No difference found" in flat or "Take r" in flat


def test_the_frontier_holds_what_nothing_beats_in_both() -> None:
    points = [charts.Point(n, x, y) for n, x, y in
              (("a", 1, 3), ("b", 2, 4), ("c", 3, 2), ("d", 9, 1), ("e", 9, 5))]  # fmt: skip
    assert [point.label for point in charts.frontier(points)] == ["a", "c", "d"]
    text = charts.scatter_chart(points, title="t", x_label="x", y_label="y")
    assert text.count("<circle") == 5
    assert 'class="frontier"' in text
    assert "nothing was recorded" in charts.scatter_chart([], title="t", x_label="", y_label="")
    assert charts.log_ticks(0.9, 30) == [1, 2, 5, 10, 20]


def rank4(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A tiny base, and text drawn from it after its head was changed by a matrix of rank four.

    All four singular values are alike, so that each rank is worth as much as another: what ranks
    one and two lack is large, what eight and sixteen add is nothing.
    """
    from transformers import AutoModelForCausalLM

    from tests.tiny import VOCAB, save_tiny

    save_tiny(folder / "base")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    width = teacher.config.hidden_size
    left = torch.linalg.qr(torch.randn(VOCAB, 4, generator=draw))[0]
    right = torch.linalg.qr(torch.randn(width, 4, generator=draw))[0]
    with torch.no_grad():
        change = left @ right.T
        change *= 12.0
        teacher.lm_head.weight += change
        ids = torch.randint(5, VOCAB, (1200, 4), generator=draw)
        for _ in range(20):
            chances = teacher(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=draw)], dim=1)
    path = folder / "drawn.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in ids.tolist()))
    return folder / "base", path


@pytest.mark.slow
def test_where_the_truth_is_rank_four_the_recommendation_is_four(tmp_path: Path) -> None:
    model, data = rank4(tmp_path)
    result = lighten.sweep(
        progress=False, model_name_or_path=str(model), dataset=str(data), dtype="float32",
        output_dir=str(tmp_path / "sweep"), lora_target_modules="lm_head", lora_r=[1, 2, 4, 8, 16],
        learning_rate=2e-2, lr_scheduler_type="cosine", max_steps=250, eval_steps=50,
        per_device_train_batch_size=32, val_size=160, metric="loss",
    )  # fmt: skip
    recommendation = result.data["recommendation"]
    assert result.recommended == "r4", recommendation
    worse = {setting["name"]: setting["worse"] for setting in result.data["settings"]}
    assert worse == {"r1": True, "r2": True, "r4": False, "r8": worse["r8"], "r16": worse["r16"]}


def test_groups_of_the_recipe_are_what_the_result_names(settings: dict[str, Any]) -> None:
    recipe = lighten.Recipe.from_values(
        {k: v for k, v in settings.items() if "." not in k} | {"sweep": {"lora_r": [2, 4]}}
    )
    assert [group.name for group in group_arms(expand(recipe))] == ["cohort-1"]


def test_errors_are_drawn_by_the_evaluations_seed() -> None:
    measurement = Measurement("r2", [1.0, 2.0, 5.0] * 10, [2] * 30)
    rows: list[dict[str, Any]] = [{}, {}]
    for seed, row in enumerate(rows):
        _add_measured(row, measurement, "loss", EvaluateOptions(seed=seed))
    assert rows[0]["loss"]["value"] == rows[1]["loss"]["value"]
    assert rows[0]["loss"]["se"] != rows[1]["loss"]["se"]
