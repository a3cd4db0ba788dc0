"""The search: the most that fits, found with few plans; the fastest; the largest; the limits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighten import api
from lighten.errors import UserError
from lighten.machine.devices import DEVICES, Device
from lighten.planning import predict, search
from lighten.planning.result import MOST_TOKENS, Plan
from lighten.recipe import Recipe
from tests.test_plan_changes import formula

GIB = 2**30


@given(
    high=st.integers(1, 5000), last=st.integers(0, 6000), gradient=st.floats(1, 1e6),
    bend=st.floats(0, 100),
)  # fmt: skip
def test_the_most_that_fits_is_found_whatever_the_slope(
    high: int, last: int, gradient: float, bend: float
) -> None:
    """Against counting up: memory that grows in a line and a square, as length makes it grow."""

    def margin(n: int) -> float:
        return gradient * (last - n) + bend * (last**2 - n**2)

    assert search.most(margin, 0, high) == min(high, last)


def test_a_straight_line_takes_few_plans() -> None:
    calls: list[int] = []

    def margin(n: int) -> float:
        calls.append(n)
        return 1000.0 - n

    assert search.most(margin, 1, 4000) == 1000
    assert len(set(calls)) <= 5


def small(memory_bytes: int | None, name: str = "t4") -> Device:
    """A T4 with another amount of memory."""
    return replace(DEVICES[name], memory_bytes=memory_bytes)


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    return api.plannable(
        None,
        **{"model_name_or_path": str(folder), "max_length": 128, "per_device_train_batch_size": 8,
           **changes},
    )  # fmt: skip


def peak(device: Device, recipe: Recipe) -> Plan:
    return predict.planner_for(device, calibrate=False)(recipe)


def test_the_fastest_fits_and_says_why_the_others_lose(tiny_folder: Path) -> None:
    recipe = make_recipe(tiny_folder)
    unlimited = peak(small(80 * GIB), recipe)
    outcome = search.fastest(recipe, predict.planner_for(small(80 * GIB), calibrate=False))
    assert outcome.best is not None
    assert outcome.best.plan is not None
    assert outcome.best.plan.fits() is True
    assert outcome.best.plan.shape.rows == 8
    assert outcome.best.settings["gradient_checkpointing"] is False
    assert all(candidate.why for candidate in outcome.tried)
    assert any("LoRA fits whole" in candidate.why for candidate in outcome.tried)
    rates = [
        candidate.tokens_per_s or 0.0
        for candidate in outcome.tried
        if candidate.plan and candidate.plan.fits()
    ]
    assert outcome.best.tokens_per_s == max(rates)
    assert unlimited.shape.rows == 8


def test_less_memory_means_smaller_micro_batches_and_as_many_rows_per_step(
    tiny_folder: Path,
) -> None:
    recipe = make_recipe(tiny_folder, max_length=256, tokens_per_microbatch=None)
    one_row = peak(small(80 * GIB), recipe.changed({"per_device_train_batch_size": 1}))
    eight_rows = peak(small(80 * GIB), recipe)
    assert eight_rows.memory.high > one_row.memory.high
    between = (one_row.memory.high + eight_rows.memory.high) // 2
    candidate = search.largest_micro_batch(
        recipe, {}, predict.planner_for(small(between), calibrate=False), "x"
    )
    assert candidate.plan is not None
    assert candidate.plan.fits() is True
    size = candidate.settings["per_device_train_batch_size"]
    assert 1 <= size < 8
    assert size * candidate.settings["gradient_accumulation_steps"] == 8


def test_where_nothing_fits_shorter_rows_are_tried_too(tiny_folder: Path) -> None:
    """By figures that are worked out by hand: twelve plans of real steps say no more."""
    planned: list[Recipe] = []
    nothing = search.fastest(make_recipe(tiny_folder, max_length=256), formula(1, planned))
    assert nothing.best is None
    assert all("GiB" in candidate.why for candidate in nothing.tried if candidate.plan is not None)
    assert {recipe.max_length for recipe in planned} == {256, 128}
    assert {(recipe.method, recipe.load_in_4bit) for recipe in planned} == {
        ("lora", False), ("lora", True), ("full", False)
    }  # fmt: skip
    assert len(nothing.tried) == len(planned) == 2 * 3 * 2, (
        "lengths, methods, with checkpoints or not"
    )


def test_the_written_recipe_is_one_that_train_takes(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    outcome, best = api.plan_search(
        model_name_or_path=str(tiny_folder), dataset=str(chat_file), device="t4",
        per_device_train_batch_size=4, lora_r=4, method="lora",
    )  # fmt: skip
    assert best is not None
    assert outcome.best is not None
    path = tmp_path / "found.yaml"
    path.write_text(search.recipe_text(best, "why"))
    read_back = Recipe.from_file(path)
    assert read_back.completed() == best.completed()
    assert read_back.lora_r == 4
    bare = api.plannable(None, model_name_or_path=str(tiny_folder))
    path.write_text(search.recipe_text(bare, "why"))
    assert Recipe.from_file(path, {"dataset": str(chat_file)}).max_length == 1024
    whole = bare.changed({"method": "full", "learning_rate": 2e-4, "dataset": str(chat_file)})
    path.write_text(search.recipe_text(whole, "why"))
    assert Recipe.from_file(path).learning_rate == 2e-4


def test_full_fine_tuning_unsets_what_only_adapters_have(tiny_folder: Path) -> None:
    recipe = make_recipe(tiny_folder, lora_r=64, lora_dropout=0.1, learning_rate=1e-3)
    full = recipe.changed(search.as_method(recipe, "full"))
    assert (full.method, full.lora_r, full.learning_rate) == ("full", 8, 2e-5)
    qlora = full.changed(search.as_method(full, "QLoRA"))
    assert (qlora.method, qlora.load_in_4bit, qlora.learning_rate) == ("lora", True, 2e-4)


def test_the_largest_of_several_models(tiny_folder: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_config

    big = tmp_path / "big"
    tiny_config("llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
                architectures=["LlamaForCausalLM"]).save_pretrained(big)  # fmt: skip
    choices = api.plan_largest(
        [str(tiny_folder), str(big), str(tmp_path / "nowhere")], device="t4", max_length=128,
        per_device_train_batch_size=1,
    )  # fmt: skip
    by_name = {choice.model: choice for choice in choices}
    assert by_name[str(big)].best is None
    assert "too many" in by_name[str(big)].why
    assert by_name[str(big)].parameters == pytest.approx(70e9, rel=0.02)
    assert by_name[str(tiny_folder)].why == "the largest that fits"
    assert "cannot be described" in by_name[str(tmp_path / "nowhere")].why


def test_the_limits_are_limits(tiny_folder: Path) -> None:
    recipe = make_recipe(tiny_folder, max_length=64)
    device = small(80 * GIB)
    large_batch = recipe.changed({"per_device_train_batch_size": 64, "tokens_per_microbatch": None})
    room = peak(device, large_batch).memory.high
    limits = search.limits(recipe, predict.planner_for(small(room), calibrate=False), longest=2048)
    assert limits.rows is not None
    assert limits.context is not None
    assert limits.rows >= 64
    fits = peak(small(room), recipe.changed({"per_device_train_batch_size": limits.rows,
                                             "tokens_per_microbatch": None}))  # fmt: skip
    too_many = peak(small(room), recipe.changed({"per_device_train_batch_size": limits.rows + 1,
                                                 "tokens_per_microbatch": None}))  # fmt: skip
    assert fits.fits() is True
    assert too_many.fits() is not True
    assert limits.rows_limited_by == "memory"
    assert limits.context_limited_by in ("memory", "the model's positions")
    nothing = search.limits(
        recipe, predict.planner_for(small(2**20), calibrate=False), longest=2048
    )
    assert nothing.context is None
    assert nothing.rows is None


def test_settings_that_are_given_stay(tiny_folder: Path) -> None:
    outcome, best = api.plan_search(
        model_name_or_path=str(tiny_folder), device="a100-80", max_length=64,
        gradient_checkpointing=True, method="lora",
    )  # fmt: skip
    assert best is not None
    assert best.gradient_checkpointing is True
    assert {candidate.settings.get("method") for candidate in outcome.tried} == {"lora"}
    assert math.isfinite(outcome.best.tokens_per_s or 0) if outcome.best else False


def test_what_cannot_be_planned_is_a_reason_not_a_crash(tiny_folder: Path) -> None:
    def broken(recipe: Recipe) -> Plan:
        raise UserError("no such thing\nand more")

    outcome = search.fastest(make_recipe(tiny_folder), broken)
    assert outcome.best is None
    assert {candidate.why for candidate in outcome.tried if candidate.plan is None} >= {
        "no such thing"
    }


def test_8_bits_are_planned_where_they_are_asked_for(tiny_folder: Path) -> None:
    eight = {"fixed": ("load_in_8bit",)}
    recipe = make_recipe(tiny_folder, load_in_8bit=True)
    outcome = search.fastest(recipe, formula(10**6, []), **eight)
    assert outcome.best is not None
    assert {candidate.settings["load_in_8bit"] for candidate in outcome.tried} == {True}
    (sized,) = search.largest([("m", 1)], lambda _: recipe, formula(10**6, []), **eight)
    assert sized.why == "the largest that fits"


def test_a_search_from_a_recipe_in_4_bits_leaves_them(tiny_folder: Path) -> None:
    recipe = make_recipe(tiny_folder, load_in_4bit=True, bnb_4bit_use_double_quant=True)
    best = search.fastest(recipe, formula(10**6, [])).best
    assert best is not None
    assert best.what == "LoRA, 128 tokens"
    assert recipe.changed(best.settings).load_in_4bit is False


def test_what_might_fit_is_not_called_too_large(tiny_folder: Path) -> None:
    """Between its bounds a prediction cannot tell, and the exit code says so."""
    recipe = make_recipe(tiny_folder, max_length=64, load_in_4bit=True, gradient_checkpointing=True,
                         per_device_train_batch_size=1)  # fmt: skip
    fixed = tuple(recipe.model_fields_set)
    memory = peak(small(2**40), recipe).memory
    for room, fits in ((memory.high + 2**20, True), (memory.expected, None), (2**20, False)):
        planner = predict.planner_for(small(room))
        assert search.fastest(recipe, planner, fixed=fixed).fits is fits
        (sized,) = search.largest([("tiny", 1)], lambda _: recipe, planner, fixed=fixed)
        assert sized.fits is fits
        assert ("might fit" in sized.why) == (fits is None)


def test_qlora_is_planned_where_lora_fits_whole_with_checkpointing_alone(tiny_folder: Path) -> None:
    """Recomputing may cost more than 4 bits do: 920 MiB hold LoRA's 910 with it, not its 1002."""
    recipe = make_recipe(tiny_folder, max_length=512, tokens_per_microbatch=None)
    for capacity_mib, qlora_is_planned in ((920, True), (1100, False)):
        tried = search.fastest(recipe, formula(capacity_mib, [])).tried
        candidates = [c for c in tried if c.settings.get("load_in_4bit")]
        assert candidates
        assert all((c.plan is not None) == qlora_is_planned for c in candidates)


def test_a_step_too_large_to_be_traced_at_once_is_planned_in_smaller_micro_batches(
    tiny_folder: Path,
) -> None:
    by_hand = formula(10**6, [])

    def planner(recipe: Recipe) -> Plan:
        if recipe.per_device_train_batch_size * recipe.max_length > MOST_TOKENS:
            raise UserError("more than is planned")
        return by_hand(recipe)

    recipe = make_recipe(tiny_folder, max_length=2**14, per_device_train_batch_size=1024,
                         tokens_per_microbatch=None)  # fmt: skip
    best = search.fastest(recipe, planner).best
    assert best is not None
    assert best.settings["per_device_train_batch_size"] == MOST_TOKENS // 2**14 == 512
    assert best.settings["gradient_accumulation_steps"] == 2
