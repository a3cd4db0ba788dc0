"""What a sweep tries: arms from a grid, alpha that follows the rank, groups that share a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import UserError
from lighten.recipe import Recipe, RecipeError
from lighten.recipe.swept import gathered, overridden
from lighten.sweeps import tuning
from lighten.sweeps.arms import Arm, expand, full_arm, group_arms


@pytest.fixture
def values(chat_file: Path) -> dict[str, Any]:
    return {"model_name_or_path": "m", "dataset": str(chat_file), "lora_r": 16, "lora_alpha": 32}


def arms(values: dict[str, Any], **sweep: Any) -> list[Arm]:
    return expand(Recipe.from_values({**values, "sweep": sweep}))


def test_every_combination_is_an_arm_named_for_what_differs(values: dict[str, Any]) -> None:
    expanded = arms(values, lora_r=[8, 32], learning_rate=["1e-4", 3e-4], seed=[0])
    assert [arm.name for arm in expanded] == ["r8-lr0.0001", "r8-lr0.0003", "r32-lr0.0001",
                                              "r32-lr0.0003"]  # fmt: skip
    assert [(a.options.lora_r, a.options.learning_rate, a.options.seed) for a in expanded] == [
        (8, 1e-4, 0), (8, 3e-4, 0), (32, 1e-4, 0), (32, 3e-4, 0),
    ]  # fmt: skip
    for arm in expanded:
        reread = Recipe.from_values(arm.recipe.completed())
        assert reread.completed() == arm.recipe.completed()
        assert len(arm.recipe.cohort()) == 1


def scale(arm: Arm) -> float:
    options = arm.options
    return options.lora_alpha / (
        math.sqrt(options.lora_r) if options.use_rslora else options.lora_r
    )


def test_trap25_rank_is_not_confounded_with_the_scale(values: dict[str, Any]) -> None:
    assert {scale(arm) for arm in arms(values, lora_r=[4, 8, 64])} == {2.0}
    followed = arms({**values, "use_rslora": True}, lora_r=[4, 16, 64])
    assert [scale(arm) for arm in followed] == pytest.approx([8.0] * 3)
    rslora = arms(values, lora_r=[4, 16, 64], scaling="rslora")
    assert all(arm.options.use_rslora for arm in rslora)
    assert [scale(arm) for arm in rslora] == pytest.approx([4.0, 2.0, 1.0])
    alpha = arms(values, lora_r=[4, 16, 64], scaling="alpha")
    assert [arm.options.lora_alpha for arm in alpha] == [32, 32, 32]
    swept = arms(values, lora_r=[4, 16], lora_alpha=[8, 16])
    assert [(a.options.lora_r, a.options.lora_alpha) for a in swept] == [
        (4, 8), (4, 16), (16, 8), (16, 16),
    ]  # fmt: skip
    assert [arm.name for arm in swept] == ["r4-alpha8", "r4-alpha16", "r16-alpha8", "r16-alpha16"]


def test_ranges_become_values(values: dict[str, Any]) -> None:
    ranks = arms(values, lora_r={"min": 8, "max": 128, "factor": 2})
    assert [arm.options.lora_r for arm in ranks] == [8, 16, 32, 64, 128]
    rates = arms(values, learning_rate={"min": 1e-4, "max": 1e-3, "count": 3, "log": True})
    assert [arm.options.learning_rate for arm in rates] == [1e-4, 3.16228e-4, 1e-3]
    drops = arms(values, lora_dropout={"min": 0.0, "max": 0.2, "count": 3})
    assert [arm.options.lora_dropout for arm in drops] == [0.0, 0.1, 0.2]
    epochs = arms(values, num_train_epochs={"min": 1, "max": 3, "count": 5})
    assert [arm.recipe.num_train_epochs for arm in epochs] == [1.0, 1.5, 2.0, 2.5, 3.0]
    rounded = arms(values, lora_r={"min": 4, "max": 9, "count": 3})
    assert [arm.options.lora_r for arm in rounded] == [4, 6, 9]
    with pytest.raises(RecipeError, match=r"sweep\.lora_r: add count or factor"):
        arms(values, lora_r={"min": 8, "max": 128})


def test_target_modules_may_be_names_or_lists_of_them(values: dict[str, Any]) -> None:
    expanded = arms(values, lora_target_modules=["attention", ["q_proj", "v_proj"]])
    assert [arm.name for arm in expanded] == ["attention", "q_proj.v_proj"]
    assert expanded[1].options.lora_target_modules == ["q_proj", "v_proj"]
    assert len(group_arms(expanded)) == 1


def test_a_cohort_of_the_recipe_is_crossed_with_the_grid(values: dict[str, Any]) -> None:
    lists = arms({**values, "lora_r": [4, 8], "lora_alpha": None}, seed=[0, 1])
    assert [arm.name for arm in lists] == ["r4-seed0", "r4-seed1", "r8-seed0", "r8-seed1"]
    assert {scale(arm) for arm in lists} == {2.0}
    spelled = [{"name": "all"}, {"name": "few", "lora_target_modules": "attention"}]
    crossed = arms({**values, "adapters": spelled}, lora_r=[4, 8])
    assert [arm.name for arm in crossed] == ["all-r4", "all-r8", "few-r4", "few-r8"]
    assert [arm.options.lora_target_modules for arm in crossed] == [
        "all-linear", "all-linear", "attention", "attention",
    ]  # fmt: skip


def test_arms_that_can_share_a_run_share_one(values: dict[str, Any], tmp_path: Path) -> None:
    expanded = arms(
        values, lora_r=[4, 8], learning_rate=[1e-4], seed=[0, 1], lora_dropout=[0.0, 0.1],
        init_lora_weights=[True, "gaussian"],
    )  # fmt: skip
    (group,) = group_arms(expanded)
    cohort = group.recipe(tmp_path).cohort()
    for arm, member in zip(expanded, cohort, strict=True):
        assert member.model_dump(exclude={"name"}) == arm.options.model_dump(exclude={"name"})
        assert member.name == group.adapter(arm) == arm.name
    assert group.recipe(tmp_path).run_folder == tmp_path / group.name


def test_what_one_arm_sets_and_another_does_not_stays_apart(
    values: dict[str, Any], tmp_path: Path
) -> None:
    expanded = arms(
        values, loraplus_lr_ratio=[16, None], modules_to_save=[["lm_head"], None], lora_r=[4]
    )
    (group,) = group_arms(expanded)
    cohort = group.recipe(tmp_path).cohort()
    assert [(member.loraplus_lr_ratio, member.modules_to_save) for member in cohort] == [
        (16, ["lm_head"]), (16, None), (None, ["lm_head"]), (None, None),
    ]  # fmt: skip


def test_what_cannot_share_runs_apart(values: dict[str, Any], tmp_path: Path) -> None:
    expanded = arms(values, lora_r=[4, 8], dtype=["float32", "bfloat16"])
    assert [[arm.name for arm in group.arms] for group in group_arms(expanded)] == [
        ["r4-float32", "r8-float32"], ["r4-bfloat16", "r8-bfloat16"],
    ]  # fmt: skip
    alone = arms(values, lora_r=[4, 8], use_dora=[True, False])
    assert [len(group.arms) for group in group_arms(alone)] == [1, 2, 1]
    batch = arms(values, per_device_train_batch_size=[4, 8])
    assert len(group_arms(batch)) == 2
    assert len({group.name for group in group_arms([*expanded, *batch])}) == 4


def test_the_full_reference_is_a_recipe_of_its_own(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.from_values(
        {**values, "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "learning_rate": 1e-3,
         "max_steps": 7, "sweep": {"lora_r": [4], "full_learning_rate": 3e-5}},
    )  # fmt: skip
    arm = full_arm(recipe)
    assert (arm.recipe.method, arm.recipe.learning_rate, arm.recipe.max_steps) == ("full", 3e-5, 7)
    assert not arm.recipe.load_in_4bit
    assert arm.alone
    (group,) = group_arms([arm])
    assert group.recipe(tmp_path).run_folder == tmp_path / "full"
    assert group.recipe(tmp_path).cohort()[0].name == group.adapter(arm)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"lora_rr": [1]}, r"sweep\.lora_rr is not a setting; did you mean lora_r\?"),
        ({"lora_r": [0]}, r"sweep\.lora_r: 0 does not do; input should be greater than"),
        ({"lora_r": [4, "x"]}, r"sweep\.lora_r: 'x' does not do"),
        ({"lora_r": []}, r"sweep\.lora_r is an empty list"),
        ({"lora_r": [4, 4]}, r"sweep\.lora_r: \[4, 4\] holds a value twice"),
        ({"lora_r": [[4, 8]]}, r"sweep\.lora_r: \[4, 8\] is a list inside the list"),
        ({"lora_r": {"min": 8, "max": 4}}, r"sweep\.lora_r: .* min 8 must be below max 4"),
        ({"lora_r": {"min": 8, "mx": 4}}, r"sweep\.lora_r\.mx is not a setting; did you mean max"),
        ({"learning_rate": {"min": 0, "max": 1, "factor": 2}}, "min must be above 0"),
        ({"lora_r": {"min": 1, "max": 9, "factor": 2, "count": 3}}, "keep one"),
        ({"learning_rate": {"min": -1, "max": 1, "count": 3}}, r"sweep\.learning_rate: -1 does"),
        ({"dataset": ["a", "b"]}, r"sweep\.dataset cannot be swept: it changes what the loss is"),
        ({"system_role": ["fold", "drop"]}, r"sweep\.system_role cannot be swept: it changes"),
        ({"thinking": ["keep", "drop"]}, r"sweep\.thinking cannot be swept: it changes what"),
        ({"method": ["full"]}, "use reference: full"),
        ({"tune": "lora_r"}, r"sweep\.tune: 'lora_r' does not do; use 'learning_rate'"),
        ({"scaling": "none"}, r"sweep\.scaling: 'none' does not do; use 'fixed'"),
        ({"budget": "soon"}, r"sweep\.budget: 'soon' does not do; write a time such as 90s"),
        ({"lora_alpha": [1], "scaling": "alpha"}, "alpha has no effect where"),
    ],
)
def test_mistakes_are_told_with_the_keys_path(
    values: dict[str, Any], sweep: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_values({**values, "sweep": sweep})


def test_an_arm_whose_settings_contradict_says_which(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"arm gradient_checkpointing_layers 2: .* no effect"):
        arms(values, gradient_checkpointing_layers=[1, 2])
    with pytest.raises(RecipeError, match="are the same; remove one"):
        arms({**values, "adapters": [{"name": "a"}, {"name": "b"}]}, lora_r=[4])


def test_aliases_and_times_are_understood(values: dict[str, Any]) -> None:
    recipe = Recipe.from_values({**values, "sweep": {"lora_rank": 8, "lr": [1e-4], "budget": "2h"}})
    assert recipe.sweep.grid == {"lora_r": [8], "learning_rate": [1e-4]}
    assert recipe.sweep.budget_s == 7200
    assert any("sweep.lora_rank is called sweep.lora_r" in notice for notice in recipe.notices)
    assert Recipe.from_values(recipe.completed()).completed() == recipe.completed()


def test_lists_of_the_verb_are_swept_and_its_own_options_are_found(values: dict[str, Any]) -> None:
    arguments = {
        "lora_r": [8, 32], "lr": {"min": 1e-4, "max": 1e-3, "factor": 10}, "seed": 3,
        "lora_target_modules": ["q_proj", "v_proj"], "budget": "30m", "tune": "learning_rate",
        "sweep.lora_dropout": [0.0, 0.1], "report_to": ["none"],
    }  # fmt: skip
    recipe = Recipe.from_values(values, gathered(arguments))
    assert set(recipe.sweep.grid) == {"lora_r", "learning_rate", "lora_dropout"}
    assert (recipe.sweep.budget, recipe.sweep.tune) == ("30m", "learning_rate")
    assert (recipe.seed, recipe.lora_r) == (3, 16)
    assert recipe.lora_target_modules == ["q_proj", "v_proj"]
    assert len(expand(recipe)) == 8
    assert {scale(arm) for arm in expand(recipe)} == {2.0}
    # A whole section takes nothing back that is said beside it, in either order.
    for said in (["metric", "sweep"], ["sweep", "metric"]):
        given = {"metric": "loss", "sweep": {"load_in_4bit": [True, False]}}
        recipe = Recipe.from_values(values, gathered({name: given[name] for name in said}))
        assert (recipe.sweep.metric, list(recipe.sweep.grid)) == ("loss", ["load_in_4bit"])


def test_a_setting_in_the_file_and_on_the_command_line_is_swept_as_the_latter_says(
    values: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: m\ndataset: {values['dataset']}\nsweep:\n  lora_r: [1, 2]\n  seed: [0, 1]\n"
    )
    recipe = Recipe.from_file(path, gathered({"lora_r": [4, 8]}))
    assert recipe.sweep.grid == {"lora_r": [4, 8], "seed": [0, 1]}
    path.write_text(f"model: m\ndataset: {values['dataset']}\nsweep:\n  lora_r: [1, x]\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml.*sweep\.lora_r: 'x' does not do"):
        Recipe.from_file(path)


def test_what_the_command_line_says_of_a_setting_is_all_that_is_said_of_it(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """One value where the file sweeps it, and values to sweep where the file lists a cohort."""
    head = f"model: m\ndataset: {values['dataset']}\n"
    path = tmp_path / "recipe.yaml"

    def read(text: str, **said: Any) -> Recipe:
        path.write_text(head + text)
        routed = gathered(said)
        return overridden(Recipe.from_file(path, routed), routed)

    swept = "lora_alpha: 32\nsweep:\n  lora_r: [1, 2]\n  seed: [0, 1]\n  scaling: alpha\n"
    recipe = read(swept, lora_rank=64)
    assert (recipe.lora_r, recipe.sweep.grid, recipe.sweep.scaling) == (
        64,
        {"seed": [0, 1]},
        "alpha",
    )
    assert "lora_r 64 takes the place of the recipe's sweep.lora_r" in recipe.notices
    assert recipe.run_folder == Path("runs") / tmp_path.name
    recipe = read("lora_r: [4, 8]\n", lora_r=[2, 4, 8])
    assert [arm.name for arm in expand(recipe)] == ["r2", "r4", "r8"]
    assert {scale(arm) for arm in expand(recipe)} == {2.0}
    assert read(swept, lora_r=[4, 8]).sweep.grid == {"lora_r": [4, 8], "seed": [0, 1]}
    assert read("", lora_r=64, sweep={"lora_rank": [4, 8]}).sweep.grid == {"lora_r": [4, 8]}
    names = {"lora_target_modules": ["q_proj"]}
    assert read("lora_target_modules: [k_proj, q_proj]\n", **names).lora_target_modules == [
        "q_proj"
    ]


def test_a_swept_setting_under_two_names_is_told(values: dict[str, Any]) -> None:
    """One of the two would be lost."""
    with pytest.raises(RecipeError, match=r"sweep\.lora_rank and another name of sweep\.lora_r"):
        Recipe.from_values({**values, "sweep": {"lora_r": [8], "lora_rank": [32]}})
    with pytest.raises(UserError, match="lora_rank and another name of lora_r both"):
        gathered({"lora_r": [8, 16], "lora_rank": [32, 64]})


def test_rates_that_the_recipe_lists_are_those_that_tuning_tries(values: dict[str, Any]) -> None:
    listed = Recipe.from_values(
        {**values, "learning_rate": [1e-3, 1e-4], "max_steps": 8, "sweep": {"tune": tuning.RATE}}
    )
    grids: list[dict[str, list[int]]] = [{}, {"lora_r": [2, 4]}]
    for grid in grids:
        tried = tuning.tuning_arms(listed, grid, tuning.rates_of(listed, grid))
        rates = [arm.options.learning_rate for arm in tried]
        assert rates == [1e-3, 1e-4] * max(1, len(grid.get("lora_r", [])))
        best = {tuning.untuned(arm): {"best": 1e-4} for arm in tried}
        compared = tuning.with_best_rates(listed, grid, best)
        assert len(compared) == len(best)
        assert {arm.options.learning_rate for arm in compared} == {1e-4}


@pytest.mark.parametrize(
    ("warmup", "shorter"), [(100, 25), (1, 1), (0, 0), (0.1, 0.1), (None, None)]
)
def test_tuning_runs_warm_up_for_the_same_part_of_them(
    values: dict[str, Any], warmup: float | None, shorter: float | None
) -> None:
    """An absolute warm-up would be all that a run of a quarter of the steps makes."""
    for length in ({"max_steps": 400}, {"num_train_epochs": 2}):
        whole = Recipe.from_values({**values, **length, "warmup_steps": warmup})
        (tried,) = tuning.tuning_arms(whole, {}, [1e-3])
        assert tried.recipe.warmup_steps == shorter


def test_a_plan_says_how_long_shortened_runs_warm_up(values: dict[str, Any]) -> None:
    whole = Recipe.from_values({**values, "warmup_steps": 100})
    assert tuning.shorter_warmup(whole, 1.0) == {}
    warmup = tuning.shorter_warmup(whole, 0.5)
    assert warmup == {"warmup_steps": 50}
    assert tuning.describe_warmup(warmup, whole) == ", warm-up 50 of 100 steps"
