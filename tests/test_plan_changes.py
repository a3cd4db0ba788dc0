"""What would need less memory: ranked, joined where none is enough alone, told once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lighten import api
from lighten.planning import predict
from lighten.planning.changes import ALONE, SHORTEST, cheapest, ideas, smaller_micro_batch
from lighten.planning.result import Change, Memory, MemoryPart, Plan, Shape, StepTime
from lighten.planning.trace import plan_recipe
from lighten.recipe import Recipe
from tests.test_plan_trace import Card, Cpu, folder_of, recipe_of

MIB = 2**20


def formula(capacity_mib: int, planned: list[Recipe]) -> Callable[[Recipe], Plan]:
    """A planner whose memory and time one can work out by hand.

    MiB: 800 of weights or 200 in four bits, 100 of AdamW or 25, and a fortieth for each token of
    the micro-batch, a tenth of that when recomputed. Time: a second for a token, a quarter more
    when recomputed and a half more in four bits.
    """

    def planner(recipe: Recipe) -> Plan:
        planned.append(recipe)
        rows, length = recipe.per_device_train_batch_size, recipe.max_length
        weights = 200 if recipe.load_in_4bit else 800
        optimiser = 25 if recipe.optim == "adamw_8bit" else 100
        activations = rows * length / (400 if recipe.gradient_checkpointing else 40)
        sizes = {"base weights": weights, "optimiser": optimiser, "activations: other": activations}
        parts = tuple(MemoryPart(name, int(size * MIB)) for name, size in sizes.items())
        peak = sum(part.bytes for part in parts)
        tokens = rows * length * recipe.gradient_accumulation_steps
        seconds = tokens * (1 + 0.25 * recipe.gradient_checkpointing + 0.5 * recipe.load_in_4bit)
        time = StepTime(seconds, seconds, seconds, 1.0, 1.0, "by hand")
        return Plan(
            "m", "d", "lora", Shape(rows, length, recipe.gradient_accumulation_steps),
            Memory(parts, peak, peak, peak, "backward", None), time, capacity_mib * MIB, 0, 0, None,
            {}, (), step_tokens=tokens,
        )  # fmt: skip

    return planner


def recipe_for(folder: Path) -> Recipe:
    return api.plannable(
        None, model_name_or_path=str(folder), max_length=512, per_device_train_batch_size=8,
        tokens_per_microbatch=None,
    )  # fmt: skip


def changes_for(folder: Path, capacity_mib: int) -> tuple[list[Change], list[Recipe]]:
    planned: list[Recipe] = []
    planner = formula(capacity_mib, planned)
    recipe = recipe_for(folder)
    plan = planner(recipe)
    assert plan.memory.expected == pytest.approx((800 + 100 + 102.4) * MIB, rel=1e-6)
    assert plan.fits() is False
    return list(cheapest(recipe, plan, planner)), planned


def test_what_fits_comes_first_then_what_costs_least(tiny_folder: Path) -> None:
    changes, planned = changes_for(tiny_folder, 920)
    assert [(change.settings, change.fits) for change in changes] == [
        ({"gradient_checkpointing": True}, True),  # 1.25 times the time
        ({"load_in_4bit": True, "load_in_8bit": False}, True),  # 1.5 times
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, False),
        ({"optim": "adamw_8bit"}, False),
        ({"max_length": 256}, False),
    ]
    assert [change.slowdown for change in changes] == pytest.approx([1.25, 1.5, 1, 1, 1])
    saved_mib = [change.saves_bytes / MIB for change in changes]
    assert saved_mib == pytest.approx([92.16, 600, 51.2, 75, 51.2], rel=1e-5)
    assert len(planned) == 7, "the recipe and each change, planned once"


def test_where_none_is_enough_they_are_joined_as_far_as_it_takes(tiny_folder: Path) -> None:
    """300 MiB: a base in 4 bits, and neither its optimiser nor its activations as they were."""
    changes, _ = changes_for(tiny_folder, 300)
    together, *alone = changes
    assert len(alone) == 5
    assert not any(change.fits for change in alone)
    assert together.fits is True
    assert together.settings["load_in_4bit"] is True
    assert together.settings["per_device_train_batch_size"] == 1
    assert together.settings["gradient_accumulation_steps"] == 8, "as many rows per step"
    assert together.what.count("micro-batches") == 1
    assert "max_length" not in together.settings, "a shorter context is the last resort"
    assert "micro-batches of one row" in together.what, "halved until there is one"
    joined = formula(300, [])(recipe_for(tiny_folder).changed(together.settings))
    assert joined.fits() is True
    assert together.saves_bytes / MIB == pytest.approx(
        1002.4 - joined.memory.expected / MIB, rel=1e-5
    )


@pytest.mark.parametrize("capacity_mib", [240, 300, 380, 700, 800])
def test_nothing_is_joined_that_is_not_needed(capacity_mib: int, tiny_folder: Path) -> None:
    together = changes_for(tiny_folder, capacity_mib)[0][0]
    assert together.fits is True
    recipe, planner = recipe_for(tiny_folder), formula(capacity_mib, [])
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    bits = {"load_in_4bit", "load_in_8bit"}
    for keys in (batch, bits, {"gradient_checkpointing"}, {"optim"}, {"max_length"}):
        fewer = {key: value for key, value in together.settings.items() if key not in keys}
        if fewer != together.settings:
            assert planner(recipe.changed(fewer)).fits() is not True


def together(share: float) -> bool:
    """The time for looking is over before several changes are looked at together."""
    return share > ALONE


def test_a_base_that_is_streamed_to_a_gpu_takes_the_time_of_its_link(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, layers=8, hidden_size=512, intermediate_size=2048)
    recipe = recipe_of(folder, max_length=64)
    base = plan_recipe(recipe, Card())
    assert base.time is not None
    for bytes_per_s in (1.0, None):
        card = Card()
        card.host_link = bytes_per_s
        planner = functools.partial(plan_recipe, device=card)
        (change,) = (
            change for change in cheapest(recipe, base, planner, over=together)
            if change.settings == {"offload_base": "cpu"}
        )  # fmt: skip
        if bytes_per_s is None:  # and not "as fast"
            assert change.slowdown is None
        else:
            assert change.slowdown is not None
            assert change.slowdown * base.time.seconds > 1e4  # bytes


def test_whole_weights_that_do_not_fit_are_told_that_their_state_can_wait(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, layers=8, hidden_size=512, intermediate_size=2048)
    recipe = recipe_of(folder, max_length=64, method="full")
    card = Card(2**30)
    card.host_link = 1e9
    plan = plan_recipe(recipe, card)
    assert plan.states is not None
    assert plan.time is not None
    changes = cheapest(recipe, plan, functools.partial(plan_recipe, device=card), over=together)
    (change,) = (c for c in changes if c.settings == {"offload_optimizer": "cpu"})
    (all_states,) = (c for c in changes if c.settings.get("offload_params") == "cpu")
    assert all_states.settings["strategy"] == "zero3"
    assert all_states.saves_bytes > change.saves_bytes + plan.states.gradients / 2
    assert 0.5 * plan.states.optimiser < change.saves_bytes <= plan.states.optimiser + 2**25
    # It comes and goes over the link.
    longer_s = 2 * plan.states.optimiser / 1e9
    assert change.slowdown == pytest.approx(1 + longer_s / plan.time.seconds, rel=0.01)
    on_disk = [idea.settings for idea in ideas(recipe, plan_recipe(recipe, Cpu()))]
    assert {"offload_optimizer": "nvme"} in on_disk


def test_whole_weights_are_told_of_qlora_where_adapters_alone_do_not_fit(tmp_path: Path) -> None:
    """As of 7B on a card of 16 GB."""
    pytest.importorskip("bitsandbytes")
    folder = folder_of(tmp_path, layers=12, hidden_size=2048, intermediate_size=8192,
                       num_attention_heads=16, num_key_value_heads=4)  # fmt: skip
    recipe = recipe_of(folder, method="full", dtype="bfloat16", max_length=16)
    lora = plan_recipe(recipe.changed({"method": "lora"}), Card())
    planner = functools.partial(plan_recipe, device=Card(lora.memory.low - 1))
    plan = planner(recipe)
    best = cheapest(recipe, plan, planner)[0]
    assert best.fits is True
    assert best.differing["load_in_4bit"] is True
    assert planner(recipe.changed(best.differing)).fits() is True


def test_rows_become_shorter_where_nothing_else_is_left(tiny_folder: Path) -> None:
    """226.28 MiB is the least with rows of 512 tokens, 225.64 with 256."""
    together = changes_for(tiny_folder, 226)[0][0]
    assert together.fits is True
    assert together.settings["max_length"] == 256
    assert together.what.count("tokens at most") == 1, "halved until it fits, told once"


def test_where_all_of_it_is_not_enough_nothing_is_joined(tiny_folder: Path) -> None:
    changes, planned = changes_for(tiny_folder, 100)
    assert len(changes) == 5
    assert not any(change.fits for change in changes)
    least = planned[-1]
    assert len(planned) == 8, "one plan in place of a dozen"
    assert (least.per_device_train_batch_size, least.max_length) == (1, SHORTEST)
    assert least.load_in_4bit
    assert least.gradient_checkpointing


def test_a_plan_is_told_before_its_changes_and_none_is_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path)
    recipe = recipe_of(folder, max_length=256, gradient_accumulation_steps=1)
    counts = tmp_path / "planned.txt"  # forked processes plan too

    def plan_and_count(recipe: Recipe, *args: Any, **kwargs: Any) -> Plan:
        with counts.open("a") as file:
            file.write(recipe.model_dump_json() + "\n")
        return plan_recipe(recipe, *args, **kwargs)

    def planned() -> list[str]:
        return counts.read_text().splitlines()

    monkeypatch.setattr(predict, "plan_recipe", plan_and_count)
    announced: list[tuple[Plan, int]] = []
    final_plan = predict.plan(
        recipe, Card(2**20), on_plan=lambda plan: announced.append((plan, len(planned())))
    )
    assert final_plan.fits() is False
    assert [(plan.changes, plans) for plan, plans in announced] == [((), 1)]
    assert final_plan.changes
    assert len(planned()) == len(set(planned())) > 3


def test_a_cohort_s_runs_apart_are_planned_by_its_largest_adapter(tiny_folder: Path) -> None:
    entries = [
        {"name": "a", "lora_r": 4},
        {"name": "b", "lora_r": 16, "lora_target_modules": ["q_proj"], "use_rslora": True},
    ]
    recipe = recipe_of(tiny_folder, adapters=entries)
    *_, apart = ideas(recipe, formula(1, [])(recipe))
    assert apart.what == "2 runs, one per adapter"
    (alone,) = recipe.changed(apart.settings).cohort()
    assert alone == recipe.cohort()[1].model_copy(update={"name": "default"})


def test_a_micro_batch_of_several_adapters_is_halved_too(tiny_folder: Path) -> None:
    """Where they share passes (a streamed base, gathered layers), it has rows of each of them."""
    recipe = recipe_for(tiny_folder).changed({"lora_r": [4, 8, 16], "offload_base": "disk"})
    sizes = []
    rows = 3 * recipe.per_device_train_batch_size
    while step := smaller_micro_batch(recipe, rows, 512):
        recipe, rows = recipe.changed(step[0]), rows // 2
        sizes.append((recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps))
    assert sizes == [(4, 2), (2, 4), (1, 8)]
