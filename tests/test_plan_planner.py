"""Plans asked for once, and several side by side: the same as one after another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lighten import api
from lighten.errors import UserError
from lighten.machine.devices import named
from lighten.machine.forks import computing
from lighten.planning import predict
from lighten.planning.planner import Planner
from lighten.planning.result import Plan
from lighten.recipe import Recipe
from tests.test_plan_changes import formula

linux = pytest.mark.skipif(not computing(), reason="processes are forked on Linux without a GPU")


def recipes(folder: Path) -> list[Recipe]:
    recipe = api.plannable(None, model_name_or_path=str(folder), max_length=512)
    return [recipe.changed({"per_device_train_batch_size": rows}) for rows in (1, 2, 4)]


def test_no_recipe_is_planned_twice(tiny_folder: Path) -> None:
    planned: list[Recipe] = []
    planner = Planner(formula(900, planned), in_processes=False)
    for recipe in (*recipes(tiny_folder), *recipes(tiny_folder)):
        planner(recipe)
    assert [recipe.per_device_train_batch_size for recipe in planned] == [1, 2, 4]


@linux
def test_what_is_planned_ahead_is_planned_in_other_processes(tiny_folder: Path) -> None:
    planned: list[Recipe] = []
    planner = Planner(formula(900, planned), in_processes=True)
    planner.plan_ahead(recipes(tiny_folder))
    plans = [planner(recipe) for recipe in recipes(tiny_folder)]
    if len(os.sched_getaffinity(0)) > 1:
        assert planned == [], "not in this one"
    assert plans == [formula(900, [])(recipe) for recipe in recipes(tiny_folder)]


@linux
def test_an_error_of_another_process_comes_when_the_plan_is_asked_for(tiny_folder: Path) -> None:
    def refuse(recipe: Recipe) -> Plan:
        raise UserError(f"not {recipe.per_device_train_batch_size} rows")

    planner = Planner(refuse, in_processes=True)
    planner.plan_ahead(recipes(tiny_folder))
    for recipe in recipes(tiny_folder):
        with pytest.raises(UserError, match=f"not {recipe.per_device_train_batch_size} rows"):
            planner(recipe)


@linux
def test_where_a_process_is_killed_this_one_plans(tiny_folder: Path) -> None:
    planned: list[Recipe] = []
    parent, plan_here = os.getpid(), formula(900, planned)

    def deadly(recipe: Recipe) -> Plan:
        if os.getpid() != parent:
            os._exit(9)  # as where memory runs out
        return plan_here(recipe)

    planner = Planner(deadly, in_processes=True)
    planner.plan_ahead(recipes(tiny_folder))
    assert [planner(recipe).shape.rows for recipe in recipes(tiny_folder)] == [1, 2, 4]
    assert len(planned) == 3


@linux
def test_a_traced_plan_is_the_same_from_another_process(tiny_folder: Path) -> None:
    ahead = predict.planner_for(named("t4"), calibrate=False)
    ahead.plan_ahead(recipes(tiny_folder))
    alone = predict.planner_for(named("t4"), calibrate=False)
    for recipe in recipes(tiny_folder):
        assert ahead(recipe) == alone(recipe)


@linux
@pytest.mark.parametrize("device", ["apple-16gb", "t4"])
def test_what_is_planned_ahead_is_what_is_planned_alone(device: str, tiny_folder: Path) -> None:
    """A processor's workers are as many as threads allow, of which a forked process has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        settings = {"max_length": 512, "per_device_train_batch_size": 8}
        recipe = api.plannable(None, model_name_or_path=str(tiny_folder), **settings)
        both = [recipe, recipe.changed({"lora_r": 4})]
        planner, alone = (predict.planner_for(named(device)) for _ in range(2))
        planner.plan_ahead(both)
        for wanted in both:
            assert planner(wanted).shape == alone(wanted).shape
    finally:
        torch.set_num_threads(before)
