"""The benchmark of training beside peers: what makes a row count, and what a step costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import arithmetic, cohort_worker, comparison, engine, limit
from benchmarks import contenders as who
from benchmarks.arithmetic import Work
from benchmarks.steps import Steps, facts, largest_first, slices, steps_of
from lighten.machine.hardware import PeakMemory
from lighten.models.describe import of_model
from tests.lessons import lesson, ours, peft
from tests.tiny import VOCAB, tiny_model


def alone(run: dict[str, Any], name: str = "a") -> dict[str, Any]:
    """The run as a row of `train_vs_peers` has it."""
    return {**run, **{key: run[key][name] for key in ("losses", "grad_norms", "moved")},
            "first_step_s": 1.0, "wall_s": 2.0}  # fmt: skip


def test_given_steps_are_trained_as_given_by_both_engines(tmp_path: Path) -> None:
    lessons = {"one": lesson(), "two": lesson(seed=1)}
    our_run, theirs = ours(lessons, tmp_path), peft(lessons, micro_rows=2)
    assert cohort_worker.largest_difference(our_run["losses"], theirs["losses"]) < 1e-5
    for name in lessons:
        assert our_run["grad_norms"][name] == pytest.approx(theirs["grad_norms"][name], rel=1e-4)
        assert our_run["moved"][name] == pytest.approx(theirs["moved"][name], rel=1e-3)
    assert len(our_run["step_seconds"]) == 3
    assert our_run["choices"]["micro-batch"] == "1024 tokens"  # the training loop's own choice


def test_the_worker_packs_where_the_recipe_does(tmp_path: Path) -> None:
    from lighten.models import attention

    attention.register()
    lessons = {"one": lesson()}
    recipe = engine.recipe_of("tiny", ["one"], 3, settings={"dtype": "float32"})
    model = tiny_model("llama")
    model.set_attn_implementation(attention.NAME)
    setup = engine.set_up(recipe, lessons, "cpu", engine.base_in_memory(model, "float32"))
    our_run = engine.train(setup, lessons, tmp_path, PeakMemory())
    assert our_run["packing"].startswith("rows packed without padding")
    theirs = peft(lessons)
    assert cohort_worker.largest_difference(our_run["losses"], theirs["losses"]) < 1e-5


def test_trap51_a_row_that_does_not_learn_does_not_count(tmp_path: Path) -> None:
    learnt = alone(ours({"a": lesson()}, tmp_path))
    control = alone(ours({"a": lesson()}, tmp_path, learns=False))
    reference = {**learnt}
    assert comparison.why_not(learnt, reference, 0.0) is None
    assert control["moved"] == 0.0
    # Even where its losses pass: they are the reference here.
    assert comparison.why_not(control, control, 0.0) == "no weight has changed"
    without = {**learnt, "grad_norms": [1.0, 0.0, 1.0]}
    assert comparison.why_not(without, reference, 0.0) == "a step had no gradient"
    unknown = {**learnt, "grad_norms": [1.0, float("nan"), 1.0]}
    assert comparison.why_not(unknown, reference, 0.0) == "a step had no gradient"
    assert cohort_worker.idle(ours({"a": lesson()}, tmp_path, learns=False))
    assert not cohort_worker.idle(ours({"a": lesson()}, tmp_path))


def test_trap51_peft_without_a_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.OPTIMISER, "learning_rate", 0.0)
    assert cohort_worker.idle(peft({"one": lesson()}))


def run(speed: float, losses: list[float], peak: float = 8.0, **fields: Any) -> dict[str, Any]:
    """A run over steps of 10 tokens each."""
    return {"losses": losses, "grad_norms": [1.0] * len(losses), "moved": 1e-4,
            "step_seconds": [10.0 / speed] * len(losses), "peak_bytes": peak, "dtype": "bfloat16",
            "first_step_s": 1.0, "wall_s": 100.0 / speed, **fields}  # fmt: skip


STEPS = {data: [[([1] * 10, [True] * 10)]] * 3 for data in (who.GROUPED, who.SHUFFLED)}
REFERENCE = run(1.0, [3.0, 2.0, 1.0], dtype="float32")


CONTROLS = {data: run(9.0, [3.0, 2.05, 1.03], moved=0.0) for data in who.CONTROLS}


def table_of(**changes: dict[str, Any]) -> comparison.Table:
    rows = {
        who.REFERENCE: REFERENCE, who.REFERENCE_SHUFFLED: REFERENCE, who.FLOAT32: REFERENCE,
        who.OURS: run(9.0, [3.0, 2.0, 1.004], 2.0),
        who.OURS_SHUFFLED: run(8.0, [3.0, 2.012, 1.0], 2.0),
        who.OURS_SAVING: run(7.0, [3.0, 2.0], 1.0), who.DEFAULTS: run(2.0, [3.0, 2.01, 1.0]),
        who.BEST: run(3.0, [3.0, 2.0, 1.005]), who.BEST_SAVING: run(2.5, [3.0, 2.0], 5.0),
        **changes,
    }  # fmt: skip
    best = who.CANDIDATES["eager, no autocast"]
    contenders = {**who.CONTENDERS, who.BEST: best, who.BEST_SAVING: best.checkpointed()}
    results = {k: [v] for k, v in rows.items()}
    return comparison.tabulate(results, contenders, STEPS, 1, CONTROLS)


def test_ratios_are_ours_over_theirs_on_the_same_steps() -> None:
    tried = {
        "a": {"accumulate": 1, "why_not": None, "tokens_per_s": 3.0, "peak_bytes": 8.0},
        "b": {"accumulate": 1, "why_not": None, "tokens_per_s": 2.0, "peak_bytes": 1.0},
        "c": {"accumulate": 4, "why_not": None, "tokens_per_s": 1.0, "peak_bytes": 4.0},
        "d": {"accumulate": 4, "why_not": "an error", "tokens_per_s": None, "peak_bytes": None},
    }
    walls = {who.OURS: [run(9.0, [3.0, 2.0])], who.BEST: [run(3.0, [3.0, 2.0])]}
    ratios = comparison.ratios(table_of(), walls, 60, tried)
    assert ratios == pytest.approx(
        {
            "speed_vs_best": 3.0, "speed_vs_defaults": 4.0, "speed_vs_float32_defaults": 8.0,
            "memory_vs_best": 0.25, "memory_vs_checkpointed": 0.2, "memory_vs_defaults": 0.25,
            "memory_vs_fastest_of_whole_steps": 0.25,
            "memory_vs_fastest_of_small_microbatches": 0.5, "wall_60_steps_vs_best": 1 / 3,
        }
    )  # fmt: skip
    assert comparison.ratios(table_of(), walls, 20, {})["wall_60_steps_vs_best"] is None
    walls[who.BEST] = [run(3.0, [3.0, 2.5])]
    assert comparison.ratios(table_of(), walls, 60, {})["wall_60_steps_vs_best"] is None


@pytest.mark.parametrize(
    ("changes", "null"),
    [
        ({who.OURS: run(9.0, [3.0, 2.0, 1.2])}, {"speed_vs_best", "memory_vs_best"}),
        # As near to float32 as TRL is, and not as TRL trains.
        ({who.OURS: run(9.0, [3.0, 2.0, 0.998])}, {"speed_vs_best", "memory_vs_best"}),
        ({who.OURS: run(9.0, [3.0, 2.0, float("nan")])}, {"speed_vs_best", "memory_vs_best"}),
        ({who.BEST: run(9.0, [3.0, 2.0, 1.005], moved=0.0)},
         {"speed_vs_best", "memory_vs_best", "memory_vs_checkpointed"}),
        # TRL, and whoever follows it, more than half of the way to who never learns.
        ({who.BEST: run(9.0, [3.0, 2.0, 1.016]), who.OURS: run(9.0, [3.0, 2.0, 1.016])},
         {"speed_vs_best", "memory_vs_best", "memory_vs_checkpointed"}),
        ({who.BEST: {"error": "killed"}},
         {"speed_vs_best", "memory_vs_best", "memory_vs_checkpointed"}),
        ({who.FLOAT32: {"error": "killed"}}, {"speed_vs_float32_defaults"}),
        ({who.REFERENCE_SHUFFLED: {"error": "killed"}},
         {"speed_vs_defaults", "speed_vs_float32_defaults", "memory_vs_defaults"}),
        ({who.OURS_SAVING: run(9.0, [3.0, 2.5])}, {"memory_vs_checkpointed"}),
    ],
)  # fmt: skip
def test_a_row_that_does_not_count_has_no_ratio(changes: dict[str, Any], null: set[str]) -> None:
    table = table_of(**changes)
    ratios = comparison.ratios(table, {}, 0, {})
    always = {key for key in ratios if key.startswith(("wall", "memory_vs_fastest"))}
    assert {key for key, value in ratios.items() if value is None} == null | always
    assert not all(row["valid"] for row in table.values())


def test_a_row_follows_exact_arithmetic_on_its_own_weights() -> None:
    rounded, float32_run = run(1.0, [3.0, 2.0, 1.0]), run(1.0, [3.1, 2.1, 1.1], dtype="float32")
    results = {who.REFERENCE_SHUFFLED: [rounded], who.FLOAT32: [float32_run]}
    contender = who.CONTENDERS[who.OURS_SHUFFLED]
    assert comparison.exact(contender, run(8.0, []), results) is rounded
    assert comparison.exact(contender, run(8.0, [], dtype="float32"), results) is float32_run
    exact = who.CONTENDERS[who.REFERENCE_SHUFFLED]
    assert comparison.exact(exact, run(8.0, [], dtype="float32"), results) is rounded
    assert comparison.exact(contender, run(8.0, [], dtype="float16"), results) is None


def test_rounded_products_follow_those_of_trl_and_these_float32() -> None:
    float32_run, trl = run(1.0, [3.0, 2.0], dtype="float32"), run(2.0, [3.0, 2.02])
    results = {who.REFERENCE: [float32_run], who.BEST: [trl]}
    controls = {who.GROUPED: run(9.0, [3.0, 2.1], moved=0.0)}
    ours, best = who.CONTENDERS[who.OURS], who.CANDIDATES["eager, autocast"]
    reference = comparison.reference_of(who.OURS, ours, run(9.0, []), results, controls)
    assert reference == (trl, 2.0**-9)
    reference = comparison.reference_of(who.BEST, best, trl, results, controls)
    assert reference == (float32_run, pytest.approx(0.05 / 2))
    exact = who.CONTENDERS[who.REFERENCE]
    assert comparison.reference_of(who.REFERENCE, exact, float32_run, results, controls) == (
        float32_run,
        1e-4,
    )
    assert comparison.unlearned(controls, results) == pytest.approx(0.08 / 2.02)
    assert comparison.unlearned({}, results) is None


def test_speed_counts_real_tokens_after_the_warmup() -> None:
    steps: Steps = [[([1] * 5, []), ([1] * 3, [])], [([1] * 4, [])], [([1] * 6, [])]]
    seconds = [100.0, 2.0, 1.0]
    assert comparison.speed({"step_seconds": seconds}, steps, 1) == pytest.approx((2.0 + 6.0) / 2)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_step_flops_are_those_that_pytorch_counts(changes: dict[str, Any]) -> None:
    """Counted on PEFT's plain layers: PyTorch's counter passes over products made in place."""
    # As wide in its keys as in its queries, for the counter sees the repeated keys.
    model = tiny_model("llama", num_key_value_heads=4, **changes)
    model.set_attn_implementation("eager")
    description = of_model("tiny", model)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    ids = torch.randint(3, VOCAB, (1, 32))
    # The first layer's input gradient, which the formula counts too.
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    with FlopCounterMode(display=False) as counter:
        logits = adapted(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        nn.functional.cross_entropy(logits[0].float(), ids[0, 1:]).backward()
    step_flops = arithmetic.step_flops(description, count, [[(ids[0].tolist(), [True] * 32)]])
    # Plain attention computes the other half too, and transformers the last position's logits.
    square = 6.0 * 32**2 * description.hidden_size * description.layers
    last_logits = 4.0 * VOCAB * 32
    assert counter.get_total_flops() == pytest.approx(step_flops + square + last_logits, rel=1e-6)


def test_the_work_of_parts_sums_to_that_of_the_step(tmp_path: Path) -> None:
    from lighten.models import attention

    attention.register()
    model = tiny_model("llama")
    model.set_attn_implementation(attention.NAME)
    description = of_model("tiny", model)
    lessons = {"a": lesson(steps=1)}
    recipe = engine.recipe_of("tiny", ["a"], 1, settings={"dtype": "float32"})
    setup = engine.set_up(recipe, lessons, "cpu", engine.base_in_memory(model, "float32"))
    batch = limit.first_micro_batch(setup, lessons, tmp_path)
    parts = limit.Parts(setup, batch)
    assert batch.tokens == sum(len(ids) for ids, _ in lessons["a"][0])
    total = Work()
    for part in limit.PARTS:
        assert part == "low-rank" or parts.run(part) > 0.0
        work = parts.work(part)
        assert work.bytes > 0.0
        total += work
    count = sum(p.numel() for p in setup.adapters[0].parameters.values())
    step_flops = arithmetic.step_flops(description, count, lessons["a"])
    # The step's formula knows no filler behind packed rows, and takes a first layer's gradient in.
    filler = batch.input_ids.numel() / batch.tokens
    assert 0.8 * step_flops < total.flops < 1.05 * filler * step_flops
    seconds = limit.whole_step(setup, lessons, 1, tmp_path)
    assert len(seconds) == 1
    assert seconds[0] > 0.0


def test_a_limit_is_the_longer_of_arithmetic_and_memory() -> None:
    assert Work(10.0, 4.0).least_seconds(5.0, 1.0) == 4.0
    assert Work(10.0, 1.0).least_seconds(5.0, 1.0) == 2.0


def test_both_sets_of_steps_hold_whole_steps_of_the_same_rows() -> None:
    rows = [([7] * (10 + place), [True] * (10 + place)) for place in range(37)]
    grouped, shuffled = (steps_of(rows, 6, grouped=is_grouped) for is_grouped in (True, False))
    for steps in (grouped, shuffled):
        assert [len(step) for step in steps] == [8] * 6
    assert facts(grouped)["padded_tokens_per_step"] < facts(shuffled)["padded_tokens_per_step"]
    by_size = largest_first(shuffled)
    assert max(len(ids) for ids, _ in by_size[0]) == max(
        len(ids) for step in shuffled for ids, _ in step
    )
    assert sorted(map(str, by_size)) == sorted(map(str, shuffled))
    assert all(len(ids) == 6 and sum(mask) == 5 for ids, mask in slices(rows, 6, 50))
