"""Other ways through a sweep: a search, Ray, and one run whose adapter is cut to lower ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.errors import MissingExtra, UserError
from lighten.recipe import Recipe, RecipeError
from lighten.reporting import comparison
from lighten.reporting.sweep_page import sweep_page
from lighten.reporting.sweep_table import ordered, shown
from lighten.runs import Run
from lighten.sweeps import ray_tune, running
from lighten.sweeps.arms import expand, group_arms
from lighten.sweeps.measure import Measurement
from lighten.sweeps.running import sweep
from tests.tiny import save_tiny


def recipe(tiny_folder: Path, chat_file: Path, folder: Path, **settings: Any) -> Recipe:
    return Recipe.from_values(
        {"model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "val_size": 0.6,
         "max_steps": 4, "learning_rate": 1e-2, "dtype": "float32", "lora_r": 4, "lora_alpha": 8,
         "output_dir": str(folder), "evaluate": {"max_new_tokens": 2, "bootstrap_samples": 100},
         **settings}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 5}, "sweep.trials has no effect without sweep.search"),
        ({"search": "tpe", "budget": "5m"}, "sweep.budget has no effect with sweep.search"),
        ({"search": "tpe", "truncate": True}, "sweep.truncate has no effect with sweep.search"),
        ({"executor": "ray", "budget": "5m"}, "sweep.budget is not kept over Ray's machines"),
        ({"executor": "ray", "tune": "learning_rate"}, "sweep.tune runs on this machine alone"),
        ({"truncate": True, "lora_r": [4]}, "sweep.truncate needs several ranks"),
    ],
)
def test_ways_that_cannot_be_joined_are_told(
    options: dict[str, Any], message: str, tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    section = {"lora_r": [2, 4], **options}
    with pytest.raises(RecipeError, match=message):
        recipe(tiny_folder, chat_file, tmp_path, sweep=section)


def test_truncate_trains_the_largest_rank_alone(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    section = {"lora_r": [1, 2, 8], "truncate": True, "metric": "loss"}
    result = sweep(recipe(tiny_folder, chat_file, tmp_path / "s", sweep=section), progress=False)
    (name,) = result.data["truncated"]
    curve = result.data["truncated"][name]
    assert [point["rank"] for point in curve["points"]] == [8, 2, 1]
    trained = [row for row in result.arms if row["reference"] is None]
    assert [row["sets"]["lora_r"] for row in trained] == [8]
    # Both stand on the same examples: the uncut adapter has the arm's own loss.
    assert curve["points"][0]["loss"] == pytest.approx(trained[0]["loss"]["value"], rel=1e-6)
    base = next(row for row in result.arms if row["reference"] == "base")
    assert curve["base_loss"] == pytest.approx(base["loss"]["value"], rel=1e-6)
    page = sweep_page(tmp_path / "s")
    assert f"{name}, trained at rank 8: " in page
    assert f"{curve['points'][2]['loss']:.4f}" in page
    assert {
        adapter["r"] for adapter in Run(tmp_path / "s" / trained[0]["group"]).info()["adapters"]
    } == {8}


@pytest.mark.slow
def test_a_search_trains_cohorts_and_tells_their_losses(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")
    section = {"lora_r": [1, 2, 4], "search": "tpe", "trials": 6, "metric": "loss",
               "learning_rate": {"min": 1e-4, "max": 1e-1, "log": True}}  # fmt: skip
    search_recipe = recipe(tiny_folder, chat_file, tmp_path / "s", sweep=section)
    result = sweep(search_recipe, progress=False)
    trained = [row for row in result.arms if row["reference"] is None]
    assert len(trained) == 6
    assert len(result.data["groups"]) == 2  # four together, then the two that are left
    for row in trained:
        measurement = Measurement.read(tmp_path / "s", row["name"])
        assert measurement is not None
        assert row["loss"]["value"] == pytest.approx(sum(measurement.nll) / sum(measurement.tokens))
        assert row["sets"]["lora_alpha"] == pytest.approx(2 * row["sets"]["lora_r"])
    assert result.data["recommendation"]["arm"] in {row["name"] for row in trained}
    resumed = sweep(search_recipe, resume=True, progress=False)
    assert resumed.data["groups"] == result.data["groups"]
    more = search_recipe.changed({"sweep.trials": 8})
    longer = sweep(more, resume=True, progress=False)
    assert [arm["name"] for arm in longer.arms if arm["name"] == "trial-7"]
    assert longer.data["groups"][:2] == result.data["groups"]


def test_groups_are_spread_over_what_there_is(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    section = {"lora_r": [1, 2, 4, 8, 16]}
    groups = group_arms(expand(recipe(tiny_folder, chat_file, tmp_path, sweep=section)))
    assert len(groups) == 1
    assert ray_tune.spread(groups, 1) == groups
    two = ray_tune.spread(groups, 2)
    assert [[arm.name for arm in group.arms] for group in two] == [
        ["r1", "r2", "r4"],
        ["r8", "r16"],
    ]
    assert len({group.name for group in two}) == 2
    alone = ray_tune.spread(groups, 64)
    assert [len(group.arms) for group in alone] == [1] * 5
    assert len({group.name for group in alone}) == 5


def test_without_ray_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"ray\[tune\] is not installed.*lighten\[ray\]"):
        ray_tune.slots()


@pytest.mark.slow
def test_ray_trains_what_one_process_trains(
    tiny_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real workers of a real Ray, started here; the losses are those of the same sweep without."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    pytest.importorskip("ray.tune", reason="the extra ray is not installed")
    monkeypatch.chdir(tmp_path)  # and a relative folder, which workers have to find
    section = {"lora_r": [1, 2, 4], "metric": "loss"}
    alone = sweep(
        recipe(tiny_folder, chat_file, Path("alone"), sweep=section), progress=False
    )  # fmt: skip
    listening = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    ray.init(num_cpus=1, log_to_driver=False)
    try:
        monkeypatch.setattr(ray_tune, "slots", lambda: 2)  # as on two machines
        spread = recipe(
            tiny_folder, chat_file, Path("spread"), sweep={**section, "executor": "ray"}
        )  # fmt: skip
        result = sweep(spread, progress=False)
    finally:
        ray.shutdown()
    assert listening == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    assert len(result.data["groups"]) == 2
    losses = {row["name"]: row["loss"]["value"] for row in alone.arms}
    assert {row["name"]: row["loss"]["value"] for row in result.arms} == pytest.approx(
        losses, rel=1e-5
    )
    for name in ("cohort-1.a", "cohort-1.b"):
        assert Run(Path("spread") / name).info()["status"] == "finished"


def test_arms_of_another_model_are_not_compared_with_a_base_that_is_not_theirs(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=5)
    section = {"model_name_or_path": [str(tiny_folder), str(other)], "metric": "perplexity"}
    result = sweep(recipe(tiny_folder, chat_file, tmp_path / "s", sweep=section), progress=False)
    first, second, base = result.arms
    assert base["reference"] == "base"
    assert set(first["against"]) == {"base"}
    assert not second["against"]
    recommendation = result.data["recommendation"]
    assert not any("untouched base" in reason for reason in recommendation["reasons"])
    assert any(f"is that of {tiny_folder}: arms that" in note for note in result.data["notes"])


def test_arms_over_another_storage_of_the_base_are_not_compared_with_its_figures(
    tmp_path: Path, chat_file: Path
) -> None:
    """What NF4 costs the base is nothing that an arm over the dense base has gained."""
    base = save_tiny(tmp_path / "base", hidden_size=128, intermediate_size=256)
    section = {"load_in_4bit": [True, False], "metric": "perplexity"}
    result = sweep(recipe(base, chat_file, tmp_path / "s", sweep=section), progress=False)
    small, dense, untouched = result.arms
    assert small["model"] == untouched["model"] == f"{base} in nf4"
    assert dense["model"] == str(base)
    assert set(small["against"]) == {"base"}
    assert not dense["against"]
    assert any(f"is that of {base} in nf4: arms that" in note for note in result.data["notes"])


def ended_after_its_first_group(chosen: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a sweep that is interrupted between its groups."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running.Sweep, "_measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(chosen, progress=False)


def test_a_sweep_goes_on_with_the_data_that_its_arms_learnt_on(
    tiny_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    rows = chat_file.read_text(encoding="utf-8")
    data.write_text(rows, encoding="utf-8")
    section = {"per_device_train_batch_size": [2, 4], "metric": "loss"}
    settings: dict[str, Any] = {"sweep": section, "max_steps": 2}
    chosen = recipe(tiny_folder, data, tmp_path / "s", **settings)
    ended_after_its_first_group(chosen, monkeypatch)
    data.write_text(rows + rows.splitlines()[0], encoding="utf-8")
    with pytest.raises(UserError, match=r"data have changed since it began.*put the files back"):
        sweep(chosen, progress=False)
    data.write_text(rows, encoding="utf-8")
    # What changes the memory alone may be another from here on: the first group ran out of it.
    settings |= {"gradient_checkpointing": True, "per_device_eval_batch_size": 2}
    settings["evaluate"] = {"max_new_tokens": 2, "bootstrap_samples": 100, "batch_size": 2}
    result = sweep(recipe(tiny_folder, data, tmp_path / "s", **settings), progress=False)
    assert [arm["status"] for arm in result.arms] == ["finished"] * 3
    said = "went on with another gradient_checkpointing, per_device_eval_batch_size: times and"
    assert any(said in note for note in result.data["notes"])
    settings["evaluate"]["max_examples"] = 3
    with pytest.raises(UserError, match="holds another sweep: evaluate was"):
        sweep(recipe(tiny_folder, data, tmp_path / "s", **settings), progress=False, resume=True)


def test_arms_are_compared_by_any_metric_of_answers(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    section = {"lora_r": [1, 2], "metric": "rougeL", "reference": ["base", "full"]}
    chosen = recipe(tiny_folder, chat_file, tmp_path / "s", sweep=section,
                    evaluate={"max_new_tokens": 2, "extra_metrics": ["token_f1"]})  # fmt: skip
    result = sweep(chosen, progress=False)
    for arm in result.arms:
        assert {"chrf", "rougeL", "token_f1"} <= set(arm["metrics"])
        assert arm["reference"] or arm["against"]["base"]["verdict"]
    assert "ROUGE-L" in sweep_page(tmp_path / "s")
    cut_off = [note for note in result.data["notes"] if "cut off" in note]
    assert any(note.endswith(" of full") for note in cut_off)
    assert not any(note.endswith(" of default") for note in cut_off)
    _, rows, _ = shown(tmp_path / "s")
    assert [row[2].partition(" ")[0] for row in rows] == [
        f"{arm['metrics']['rougeL']['value']:.1f}" for arm in ordered(result.data)
    ]


def test_sweeps_over_other_questions_with_the_same_answers_are_not_compared(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Of labels every data set has as many tokens."""
    runs = []
    for name in ("first", "second"):
        data = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {i}", "completion": "good"} for i in range(60)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = {"lora_r": [1, 2], "metric": "loss"}
        result = sweep(recipe(tiny_folder, data, tmp_path / name, sweep=section), progress=False)
        runs.append(Run(result.folder))
    first = runs[0].folder / str(comparison.arm_of_sweep(runs[0])["group"])  # type: ignore[index]
    compared = comparison.compare(runs)
    assert "measured on different held-out examples" in compared.sentences[0]
    assert compared.best["loss"] == set()
    assert lighten.report(result) == result.folder / "report.html"
    assert lighten.report(result, first).name == "comparison.html"
    lighten.evaluate(first, max_new_tokens=2)
    same = comparison.compare([runs[0], Run(first)])
    assert "has the lowest held-out loss" in same.sentences[0]
    # A sweep knows from its arms on what they were trained, as a run does from its training.
    gpu = {"machine": {"gpus": [{"name": "Tesla T4"}]}}
    data = json.loads((runs[0].folder / "sweep.json").read_text())
    for arm in data["arms"]:
        arm["peak_method"] = "cuda allocator"
    (runs[0].folder / "sweep.json").write_text(json.dumps(data))
    runs[0].update(**gpu)
    Run(first).update(**gpu, training={**Run(first).info()["training"], "method": "cuda allocator"})
    on_gpu = comparison.compare([runs[0], Run(first)]).sentences
    assert not any("machines" in sentence for sentence in on_gpu)
    assert not any("different" in sentence or "settings" in sentence for sentence in same.sentences)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "cuts plain LoRA adapters to lower ranks, and r2 is DoRA"),
        ({"evaluate": {"extra_metrics": ["rougel"]}}, "'rougel' is not known"),
    ],
)
def test_what_would_fail_behind_the_training_is_told_before_it(
    settings: dict[str, Any], message: str, tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    section = {"lora_r": [1, 2], "truncate": True, "metric": "loss"}
    with pytest.raises(UserError, match=message):
        sweep(recipe(tiny_folder, chat_file, tmp_path / "s", sweep=section, **settings))
    assert not (tmp_path / "s").exists()


def test_what_arms_are_not_compared_by_is_said(tiny_folder: Path, chat_file: Path) -> None:
    evaluate = {"forgetting": "builtin", "tasks": ["a_task"]}
    chosen = recipe(tiny_folder, chat_file, Path("s"), evaluate=evaluate)
    (said,) = running._not_measured(chosen)
    assert "by loss and chrf, not by evaluate.forgetting, evaluate.tasks" in said
    assert running._not_measured(recipe(tiny_folder, chat_file, Path("s"))) == []
