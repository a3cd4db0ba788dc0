"""The benchmarks: what makes a row count, and that each runs at tiny size."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    arithmetic,
    audit_check,
    audit_context,
    cohort,
    cohort_worker,
    comparison,
    engine,
    float32,
    gpu_suite,
    limit,
    long_rows,
    machine,
    peers_generate,
    quantize_gguf,
    sweep_vs_peers,
)
from benchmarks import contenders as who
from benchmarks import plain_peft as peers
from benchmarks.arithmetic import Work
from benchmarks.steps import Steps, facts, largest_first, slices, steps_of
from lighten.errors import UserError
from lighten.machine.hardware import PeakMemory
from lighten.models.describe import of_model
from lighten.recipe import Recipe
from tests.tiny import VOCAB, save_tiny, tiny_model


def lesson(steps: int = 3, rows: int = 4, longest: int = 24, seed: int = 0) -> Steps:
    generator = torch.Generator().manual_seed(seed)

    def row(place: int) -> tuple[list[int], list[bool]]:
        length = longest - 3 * place
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        return ids, [i >= length // 3 for i in range(length)]

    return [[row(place) for place in range(rows)] for _ in range(steps)]


def ours(
    lessons: dict[str, Steps], folder: Path, *, learns: bool = True, **settings: Any
) -> dict[str, Any]:
    steps = len(next(iter(lessons.values())))
    recipe_settings = {"per_device_train_batch_size": 64, "dtype": "float32", **settings}
    recipe = engine.recipe_of("tiny", list(lessons), steps, settings=recipe_settings)
    base = engine.base_in_memory(tiny_model("llama"), "float32")
    setup = engine.set_up(recipe, lessons, "cpu", base)
    return engine.train(setup, lessons, folder, PeakMemory(), learns=learns)


def peft(lessons: dict[str, Steps], **options: Any) -> dict[str, Any]:
    """PEFT from the same start: a recipe's adapters have their places as seeds."""
    from lighten.adapters import AdapterSpec, attach

    specs = [AdapterSpec(name, r=engine.RANK, seed=place) for place, name in enumerate(lessons)]
    cohort = attach(tiny_model("llama"), specs)
    config = LoraConfig(r=engine.RANK, lora_alpha=2 * engine.RANK, target_modules="all-linear",
                        task_type="CAUSAL_LM")  # fmt: skip
    first_name, *other_names = lessons
    model = get_peft_model(tiny_model("llama"), config, adapter_name=first_name)
    for name in other_names:
        model.add_adapter(name, config)
    for name in lessons:
        set_peft_model_state_dict(model, cohort.parameters(name), adapter_name=name)
    return peers.train(model, lessons, "cpu", engine.OPTIMISER, **options)


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
    """In real processes; TRL's rows too where its environment has been made."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
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


def test_long_rows_are_timed_beside_pytorch_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(long_rows, "SHAPES", {"tiny": (4, 2, 8, 0), "tiny, window": (4, 2, 8, 5)})
    long_rows.main(["--lengths", "16,40", "--repeats", "1", "--dtypes", "float32"])
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(ratios) == 4
    assert min(ratios.values()) > 0.0
    stored = json.loads((tmp_path / "trial" / "long_rows.json").read_text(encoding="utf-8"))
    assert stored["cells"][0]["seconds"].keys() == {"ours", "grouped", "repeated", "one thread"}
    q, k, v = (torch.randn(1, heads, 40, 8) for heads in (4, 2, 2))
    for window in (0, 5):
        ours, *theirs = (attend(q, k, v) for attend in long_rows.ways(window, 40).values())
        assert all(torch.allclose(ours, x, atol=1e-5) for x in theirs)


def test_a_result_tells_no_folder_of_this_machine(tmp_path: Path) -> None:
    told = {"data": str(machine.ROOT / "examples" / "a.jsonl"), "rows": (1, [str(tmp_path)])}
    assert machine.portable(told) == {
        "data": "examples/a.jsonl", "rows": [1, [str(tmp_path.relative_to(gettempdir()))]],
    }  # fmt: skip


def test_nf4_of_a_version_that_has_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {k: v for k, v in Recipe.model_fields.items() if k != "load_in_4bit"}
    monkeypatch.setattr(Recipe, "__pydantic_fields__", fields)
    with pytest.raises(UserError, match="load_in_4bit"):
        engine.recipe_of("tiny", ["a"], 1, settings={"load_in_4bit": True})


def test_the_gpu_suite_runs_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["gpu_suite.py", "--out", str(tmp_path), "--device", "cpu", "--tiny", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", command)
    gpu_suite.main()
    stored = json.loads((tmp_path / "gpu_suite.json").read_text(encoding="utf-8"))
    results = stored["models"]["tiny"]
    assert not [row["error"] for row in results["rows"].values() if "error" in row]
    assert not any(row["idle"] for row in results["rows"].values())
    assert stored["left_out"] == []
    # Same start, same rows: PEFT's losses are ours, or there would be no ratio.
    assert results["ratios"]["speed_vs_peft_float32"] is not None
    assert results["ratios"]["time_8, 16 tokens each"] is not None
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"tiny": results["ratios"]}


def test_the_gpu_suite_keeps_rows_that_failed() -> None:
    def full() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = {"speed, lighten": gpu_suite.attempt(full)}
    assert rows == {"speed, lighten": {"error": "out of memory"}}
    assert gpu_suite.ratios(rows, 1e-2)["speed_vs_peft_float32"] is None


def test_the_gpu_suite_needs_no_installed_package() -> None:
    source = Path(gpu_suite.__file__)
    before = list(sys.path)
    try:
        runpy.run_path(str(source), run_name="looked at")
        assert str(source.parents[1] / "src") in sys.path
    finally:
        sys.path[:] = before


def test_gguf_files_are_compared_on_the_same_tokens(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    greedy = quantize_gguf.greedy(model, tmp_path, ("the question",))
    assert (greedy["tokens"], greedy["unexplained"]) == (quantize_gguf.ANSWER_TOKENS, 0)
    assert greedy["largest_logit_difference"] < 1e-3
    for name in ("ours", "theirs"):
        shutil.copy(tmp_path / "f32.gguf", tmp_path / f"{name}-q8_0.gguf")
    quality = quantize_gguf.perplexities(tmp_path, model, "q8_0", 2)
    assert quality["ours"] == quality["theirs"]
    assert quality["tokens"] == 2 * (quantize_gguf.WINDOW_TOKENS - 1)


def test_an_audit_is_checked() -> None:
    rows = [
        {"group": "training", "name": "plain", "status": "measured", "plan_error": -0.04},
        {"group": "training", "name": "LoRA", "status": "measured", "plan_error": 0.02},
        {"group": "answers", "name": "NF4", "status": "not measured", "why": "budget"},
    ]
    audit = {"rows": rows, "spent_s": 10.0, "status": "finished", "settings": {"budget_s": 11.0}}
    checked = audit_check.check(audit)
    assert (checked["rows_explained"], checked["plan_max_error"]) == (1.0, 0.04)
    assert audit_check.check({**audit, "spent_s": 12.0})["rows_explained"] == 0.0
    silent = {**audit, "rows": [*rows, {**rows[2], "why": None}]}
    assert audit_check.check(silent)["rows_explained"] == 0.75


@pytest.mark.parametrize("limit", [500, 1024, 5000, 70000, 2**17])
def test_the_longest_row_is_found(limit: int) -> None:
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    longest = audit_context.longest(fits, audit_context.LEAST, 2**17)
    if limit < audit_context.LEAST:
        assert longest is None
    else:
        assert longest is not None
        assert limit / (1 + audit_context.NEAR) - 128 <= longest <= limit
    assert len(tried) == len(set(tried)) <= 14


def test_losses_on_shared_rows_are_compared() -> None:
    ours = [{"tries": [{"tokens": 1024, "loss": 2.0}, {"tokens": 2048, "loss": None}]}]
    theirs = [{"tries": [{"tokens": 1024, "loss": 2.1}, {"tokens": 512, "loss": 9.0}]}]
    assert audit_context.loss_difference(ours, theirs) == pytest.approx(0.1 / 2.1)
    assert audit_context.loss_difference(ours, []) is None


def test_the_peer_of_evaluation_measures_what_we_do(tmp_path: Path) -> None:
    """Losses row by row, and answers, against the same model without any padding."""
    model = tiny_model("llama")
    rows = lesson(steps=1, rows=4)[0]
    losses = peers_generate.losses(model, rows, 3, 0)
    for (ids, mask), loss in zip(rows, losses, strict=True):
        labels = torch.tensor([[i if on else -100 for i, on in zip(ids, mask, strict=True)]])
        mean_loss = model(input_ids=torch.tensor([ids]), labels=labels).loss.detach()
        assert loss == pytest.approx(float(mean_loss) * sum(mask[1:]), rel=1e-4)
    job = {"stops": [2], "pad": 0, "new_tokens": 5, "batch_size": 3}
    prompts = [ids[:9] for ids, _ in rows]
    together = peers_generate.answers(model, prompts, job)
    alone = [peers_generate.answers(model, [prompt], job)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"losses": [2.0, 1.0, 0.6]}, "its losses are up to"),
        ({"dtype": "bfloat16"}, "not both are in float32: bfloat16, float32"),
        ({"moved": 0.0}, "no weight has changed"),
    ],
)
def test_float32_beside_trl_counts_only_where_both_train_alike(
    changes: dict[str, Any], why: str | None
) -> None:
    """The first of three steps takes long: it is in one of the speeds and not in the other."""
    steps = lesson()
    theirs = {"losses": [2.0, 1.0, 0.5], "grad_norms": [1.0, 1.0, 1.0], "moved": 1.0,
              "dtype": "float32", "step_seconds": [4.0, 2.0, 2.0], "peak_bytes": 400}  # fmt: skip
    ours = {**theirs, "step_seconds": [2.0, 1.0, 1.0], "peak_bytes": 100, **changes}
    few = {**ours, "step_seconds": [1.0, 2.0, 1.0], "peak_bytes": 200}
    runs = {float32.OURS: [ours], float32.OURS_FEW: [few], float32.TRL: [theirs]}
    result = float32.ratios(runs, steps, 1)
    figures = [result[key] for key in float32.KEYS]
    if why is None:
        assert (result["why_not"], figures) == (None, [2.0, 2.0, 0.25, 0.5, 0.0])
    else:
        assert why in result["why_not"]
        assert figures == [None] * 5
