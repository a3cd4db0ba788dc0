"""What `lighten plan` prints and how it ends: errors apart, flags whole, what is enough."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lighten import api
from lighten.errors import UserError
from lighten.planning import predict, text
from lighten.planning.changes import cheapest, differing
from lighten.planning.result import Change
from lighten.planning.trace import plan_recipe
from lighten.recipe import Recipe
from lighten.training.prediction import compare
from tests.processes import call
from tests.test_plan_changes import formula, recipe_for
from tests.test_plan_trace import Card, Cpu, folder_of, recipe_of
from tests.tiny import tiny_config

MIB = 2**20


@pytest.mark.parametrize(
    "arguments",
    [["no-such-model"], ["--gpus", "many", "smollm2-135m"], ["smollm2-135m", "--device", "t5"],
     ["smollm2-135m", "--zero", "7"], ["serve"], []],
)  # fmt: skip
def test_an_error_is_no_answer(arguments: list[str]) -> None:
    result = call("plan", *arguments)
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert "rror" in result.stderr


def test_the_exit_codes_are_in_the_help() -> None:
    result = call("plan", "--help")
    assert result.returncode == 0
    assert "3 an error" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "rows",
    ['{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl',
     '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n',
     '{"input_ids": [5, 6, 7], "labels": [5, 6, 8]}\n',
     '{"prompt": "a", "completion": null}\n', ""],
)  # fmt: skip
@pytest.mark.parametrize("verb", [api.plan, api.plan_search, api.plan_spread])
def test_rows_that_training_refuses_are_no_plan_that_fits(
    rows: str, verb: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(rows, encoding="utf-8")
    settings = {"model": str(tiny_folder), "dataset": str(file), "val_size": 0}
    with pytest.raises(UserError) as refused:
        api.train(**settings, output_dir=str(tmp_path / "run"), progress=False, planned=False)
    assert "rows.jsonl" in str(refused.value)
    with pytest.raises(UserError, match=re.escape(str(refused.value))):
        verb(**settings, device="t4")


def test_one_change_that_is_enough_stands_in_the_headline(tiny_folder: Path) -> None:
    planner = formula(920, [])
    recipe = recipe_for(tiny_folder)
    plan = planner(recipe)
    plan = dataclasses.replace(plan, changes=cheapest(recipe, plan, planner))
    headline = "does not fit as it is; with gradient checkpointing it does (0.89 GiB)"
    assert text.with_change(plan) == headline
    assert headline in text.verdict(plan)
    tight = dataclasses.replace(plan, changes=())
    assert text.with_change(tight) is None
    assert text.verdict(tight).endswith("which does not fit")


def test_flags_are_those_that_differ(tiny_folder: Path) -> None:
    recipe = recipe_for(tiny_folder)
    assert differing(recipe, {"load_in_4bit": True, "load_in_8bit": False}) == {
        "load_in_4bit": True
    }
    eight = recipe.changed({"load_in_8bit": True})
    assert set(differing(eight, {"load_in_4bit": True, "load_in_8bit": False})) == {
        "load_in_4bit", "load_in_8bit",
    }  # fmt: skip
    change = Change("x", {"max_length": 512}, 1, None, True, {"max_length": 256})
    plan = dataclasses.replace(formula(920, [])(recipe), changes=(change,))
    assert text.change_flags(plan) == ["1: --max_length 256"]


def test_changes_stop_when_time_is_over(tiny_folder: Path) -> None:
    planned_recipes: list[Recipe] = []
    planner = formula(300, planned_recipes)
    recipe = recipe_for(tiny_folder)
    plan = planner(recipe)
    looks = iter([False, False])
    changes = cheapest(recipe, plan, planner, over=lambda _: next(looks, True))
    assert len(planned_recipes) == 3, "the plan and two changes"
    assert {change.what for change in changes} == {
        "gradient checkpointing",
        "the base in 4 bits (QLoRA)",
    }


def test_time_is_left_for_changes_together_where_none_alone_is_enough(tiny_folder: Path) -> None:
    """What makes it fit is the answer; the list of what does not is cut for it."""
    planned_recipes: list[Recipe] = []
    planner = formula(340, planned_recipes)
    recipe = recipe_for(tiny_folder)
    plan = planner(recipe)

    def over(share: float) -> bool:
        return share < 1 and len(planned_recipes) >= 3  # half of the time is over

    together, *alone = cheapest(recipe, plan, planner, over=over)
    assert together.fits is True
    assert together.what == "gradient checkpointing; the base in 4 bits (QLoRA)"
    assert not any(change.fits for change in alone)
    assert len(alone) == 2


def test_changes_that_are_planned_already_are_told_though_time_is_over(tiny_folder: Path) -> None:
    """On a busy machine those planned side by side used up all of it, and none was told."""
    planned_recipes: list[Recipe] = []
    planner = formula(300, planned_recipes)
    recipe = recipe_for(tiny_folder)
    plan = planner(recipe)
    changes = cheapest(
        recipe,
        plan,
        planner,
        over=lambda _: True,
        is_planned=lambda changed: bool(changed.load_in_4bit),
    )
    assert {change.what for change in changes} == {"the base in 4 bits (QLoRA)"}


def test_a_plan_says_that_it_looked_no_further(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "MOST_CHANGES_S", 0.0)
    plan = predict.plan(recipe_for(tiny_folder), Card(2**20), calibrate=False)
    assert plan.fits() is False
    assert plan.changes == ()
    assert any("no further changes" in note for note in plan.notes)


def test_no_word_of_grouped_keys_without_them_and_one_line_of_the_method(tmp_path: Path) -> None:
    tiny_config("llama", num_key_value_heads=4).save_pretrained(tmp_path)
    result = call("plan", str(tmp_path), "--device", "t4", "--max_length", "64", "--max_steps", "1")
    assert result.returncode == 0, result.stderr
    assert "grouped keys" not in result.stdout
    assert sum(line.strip().startswith("method") for line in result.stdout.splitlines()) == 1
    assert "1 steps" not in result.stdout


@pytest.mark.usefixtures("without_bitsandbytes")
def test_a_plan_names_what_is_missing_for_changes(tiny_folder: Path) -> None:
    plan = predict.plan(recipe_for(tiny_folder), Card(2**20), calibrate=False)
    assert plan.fits() is False
    assert not any("4 bits" in change.what for change in plan.changes)
    (note,) = [note for note in plan.notes if "bitsandbytes" in note]
    assert "pip install 'lighten[quant]'" in note


def test_a_run_of_several_ranks_is_planned_by_a_rank_s_part_of_its_steps(
    tiny_folder: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_values(
        {"model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "val_size": 0,
         "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
         "max_steps": 10}
    )  # fmt: skip
    plans = []
    for ranks in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))  # as their launcher does
        plans.append(predict.plan(recipe, Card(2**40), calibrate=False, changes=False, ranks=ranks))
    alone, one_of_two = plans
    assert alone.steps == one_of_two.steps == 10
    assert one_of_two.run_seconds == pytest.approx(alone.run_seconds)


def test_one_of_several_ranks_is_compared_with_its_plan() -> None:
    record: dict[str, Any] = {
        "memory": {"parts": [], "expected": 100, "allocated": None, "mapped": 20},
        "time": {"seconds": 3.0}, "step_tokens": 50,
    }  # fmt: skip
    lines = [{"kind": "train", "step": step, "tokens": 100, "seconds": 4.0} for step in (1, 2)]
    measured = {"peak_bytes": 70}
    alone = compare(record, measured, lines)
    assert alone["memory"] == {"predicted": 120, "measured": 70}
    assert alone["step_seconds"] == {"predicted": 3.0, "measured": 2.0}
    spread = {**record, "spread": {"device_bytes": 65.0, "ranks": 2}}
    one = compare(spread, measured, lines)
    assert one["memory"] == {"predicted": 65, "measured": 70}
    # The two ranks' 100 tokens took 4 s, in which this one trained on 50.
    assert one["step_seconds"] == {"predicted": 3.0, "measured": 4.0}


def test_a_gpu_that_is_here_is_known_by_its_own_name(tmp_path: Path) -> None:
    recipe = recipe_of(folder_of(tmp_path))
    for label, warned in (("NVIDIA H100 80GB HBM3", False), ("Tesla T4", True)):
        card = Card()
        card.name, card.label, card.is_here = "cuda", label, True
        plan = plan_recipe(recipe, card)
        assert any(f"has been compared, not {label}" in line for line in plan.outside) is warned
        assert plan.time is not None
        assert plan.time.rates.startswith(f"{label}'s datasheet")


def test_files_that_are_mapped_while_a_base_is_read_are_no_memory_that_it_needs(
    tmp_path: Path,
) -> None:
    """Their pages are the system's to take back: what fits beside them is trained."""
    folder, size = folder_of(tmp_path), 4 * 2**30
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size)
    recipe = recipe_of(folder, load_in_4bit=True)
    plan = plan_recipe(recipe, Cpu(2**30), rows_tokens=(4, 48))
    assert plan.fits() is True
    assert plan.memory.high < 2**30
    # A process that loads where there is room is so large, as it is measured.
    assert size < plan.memory.expected + plan.memory.mapped < size + 2**30
    assert "4.29 GB of weight files are mapped" in plan.choices["loading"]
    (folder / "model.safetensors").unlink()
    unread = plan_recipe(recipe, Cpu(2**30), rows_tokens=(4, 48))
    assert unread.memory.expected == pytest.approx(plan.memory.expected, rel=1e-3)
