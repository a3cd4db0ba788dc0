"""`lighten bench`: times that are known, memory that is measured right, models that truly train."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import lighten
from lighten import api
from lighten.artifacts import open_source
from lighten.benchmarking import (
    attention,
    comparing,
    generation,
    limits,
    running,
    size,
    text,
    training,
)  # fmt: skip
from lighten.benchmarking.limits import Try, search_from
from lighten.errors import UserError
from lighten.jobs import Outcome, in_child
from lighten.machine import hardware
from lighten.machine.timing import Timing, measure_step
from lighten.planning.search import Limits
from lighten.quantization.weights import make
from tests.processes import call
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

MIB = 2**20
pytestmark = pytest.mark.usefixtures("forked_jobs")


def test_a_time_is_repeated_until_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks as told: three slow steps, then steady ones."""
    took = iter([9.0, 1.0, 3.0, 1.0] + [1.0] * 60)
    now = [0.0]
    monkeypatch.setattr("lighten.machine.timing.time.perf_counter", lambda: now[0])

    def step() -> None:
        now[0] += next(took)

    timing = measure_step(step, warmup=1, least=3, bound=0.05, budget_s=1e9)
    assert 9.0 not in timing.samples  # it warmed up
    assert timing.samples[:3] == (1.0, 3.0, 1.0)
    assert timing.settled
    assert len(timing.samples) == 9  # the first count whose interval leaves the slow one out
    assert timing.median == 1.0


def test_a_time_that_does_not_settle_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    now, count = [0.0], [0]
    monkeypatch.setattr("lighten.machine.timing.time.perf_counter", lambda: now[0])

    def step() -> None:
        count[0] += 1
        now[0] += 1.0 + count[0] % 2

    timing = measure_step(step, least=5, most=12, budget_s=1e9)
    assert len(timing.samples) == 12
    assert not timing.settled
    assert "not settled" in text.spread(timing.to_dict())
    assert "did not come within 5 %" in str(text.unsettled([{"seconds": timing.to_dict()}]))


def test_the_interval_of_a_median_covers_as_often_as_it_says() -> None:
    """Against the binomial tail: of n samples, P(k or fewer below the median) <= 2.5 %."""
    for count in range(6, 60):
        values = tuple(float(i) for i in range(count))
        low, high = Timing(values, 0, 0.05).interval
        below = int(low)
        assert high == count - 1 - below
        tail = sum(math.comb(count, i) for i in range(below + 1)) / 2**count
        longer = tail + math.comb(count, below + 1) / 2**count
        assert 2 * tail <= 0.05 < 2 * longer


def test_trap50_a_known_allocation_is_measured_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's peak is its own, whatever its parent holds; a limit ends it and nothing else."""
    monkeypatch.chdir(Path(__file__).parents[1])
    block = torch.ones(300 * MIB, dtype=torch.uint8)
    outcome = in_child("tests.bench_known", {"mib": 400})
    del block
    assert outcome.error is None
    assert outcome.records[0]["peak_bytes"] == pytest.approx(400 * MIB, rel=0.01)
    process_bytes = outcome.process_peak_bytes
    ended = in_child("tests.bench_known", {"mib": 4000}, memory_bytes=process_bytes + 200 * MIB)
    assert ended.out_of_memory
    assert "holds more than" in str(ended.error)


def test_attention_grows_as_its_kind_does() -> None:
    assert attention.growth([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2.0)
    assert attention.growth([10, 20, 40], [7, 14, 28]) == pytest.approx(1.0)
    assert attention.growth([10, 20], [7, 14]) is None


def test_what_cannot_run_here_needs_no_process_to_say_so(
    tiny_folder: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[tuple[str, bool]] = []

    def child(module: str, settings: dict[str, Any], **limits: Any) -> Outcome:
        began.append((settings["kind"], settings["training"]))
        return Outcome()

    monkeypatch.setattr(running, "in_child", child)
    source = open_source(str(tiny_folder))
    recipe = lighten.Recipe.from_values(
        {"model_name_or_path": str(tiny_folder), "dataset": str(chat_file)}, {}
    )
    settings = running.Settings(lengths=(8, 16))
    records = list(running.Bench(source, recipe, settings, lambda _: None).attention())
    forward = [("eager", False), ("sdpa", False), ("flex", False), ("lighten", False)]
    if running.devices.named(None).kind == "cpu":
        assert began == [*forward, *((kind, True) for kind, _ in forward if kind != "flex")]
    reasons = {(r["name"], r["why"]) for r in records if r["kind"] == "flash_attention_3"}
    assert len(reasons) == 4
    assert all("CUDA" in why or "not installed" in why for _, why in reasons)


@pytest.mark.parametrize("name", ["sdpa", "lighten"])
def test_each_attention_computes_the_same(name: str) -> None:
    """Forward and gradients against plain attention, written out, in float64."""
    torch.manual_seed(0)
    shapes = [(1, 4, 70, 8), (1, 2, 70, 8), (1, 2, 70, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    out = attention.implementation(name, 70, "cpu")(*inputs)
    expected = attention.implementation("eager", 70, "cpu")(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_measured_says_why() -> None:
    run = attention.run(kind="flex", heads=4, key_heads=2, features=8, lengths=[16], device="cpu",
                        dtype="float32", training=True, budget_s=0.1)  # fmt: skip
    assert "refuses inputs that want a gradient" in next(run)["why"]
    assert "CUDA" in str(attention.obstacle("flash_attention_2", "cpu", False))


def test_where_memory_ends_stays_in_the_table() -> None:
    timing = Timing((1.0,) * 6, 1, 0.05).to_dict()
    measurements = [
        {"tokens": 64, "seconds": timing, "peak_bytes": 10},
        {"why": "it holds more than 1.00 GiB", "out_of_memory": True},
    ]
    records = list(running.attention_records("eager", "forward", [64, 128, 256], measurements))
    assert [record.get("why") for record in records] == [
        None, "it holds more than 1.00 GiB", "not tried: a shorter one did not end", None,
    ]  # fmt: skip
    assert records[-1]["runs_out_at"] == 128


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4:rounded"])
def test_a_quantised_model_has_as_many_parameters_as_it_was_made_of(
    kind: str, tmp_path: Path
) -> None:
    for module in ("torchao", "auto_round", "bitsandbytes"):
        pytest.importorskip(module)
    folder, made = tmp_path / "dense", tmp_path / "made"
    model = tiny_model("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128,
                       num_hidden_layers=1)  # fmt: skip
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    make(kind, folder, made, [])
    (record,) = size.run(str(made), adapter=None, revision=None, device="cpu")
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    # Without bfloat16 arithmetic what is dense is float32 in memory, twice what it is in files.
    if hardware.choose_dtype("auto", "cpu").value == "bfloat16":
        # The file has names beside the weights and their scales.
        assert 0 <= size.file_bytes(made) - record["weights_bytes"] < 20_000


@pytest.mark.parametrize("engine", ["transformers", "lighten"])
def test_answers_are_timed_token_by_token(engine: str, tiny_folder: Path) -> None:
    (record,) = generation.run(
        str(tiny_folder), variant="base", adapter=None, revision=None, device="cpu",
        dtype="float32", prompt_tokens=[8], batch_sizes=[2], new_tokens=4, budget_s=0.05,
        engine=engine,
    )  # fmt: skip
    assert record["engine"] == engine
    assert record["first_token_s"]["median"] < record["seconds"]["median"]
    rate = 2 * 3 / record["decode_s"]["median"]
    assert record["decode_tokens_per_s"] == pytest.approx(rate)
    assert record["prefill_tokens_per_s"] == pytest.approx(16 / record["first_token_s"]["median"])
    assert record["between_tokens_s"]["p50"] <= record["between_tokens_s"]["p99"]


def test_a_model_that_our_engine_does_not_take_says_why(tmp_path: Path) -> None:
    (record,) = generation.run(
        str(save_tiny(tmp_path / "falcon", "falcon")), variant="base", adapter=None, revision=None,
        device="cpu", dtype="float32", prompt_tokens=[8], batch_sizes=[2], new_tokens=4,
        budget_s=0.05, engine="lighten",
    )  # fmt: skip
    assert "attention cannot be replaced" in record["why"]
    rows = text.tables({"records": [{"part": "generate", "name": "base, our engine", **record}]})
    assert rows[0][1] == [["base, our engine", *["–"] * 7]]


def test_trap51_a_model_that_does_not_train_is_no_result(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With optimisers that never move, the bench fails; with true ones it counts real tokens."""
    recipe = running.way_of(
        api.plannable(model_name_or_path=str(tiny_folder), max_length=32, workers=1),
        training.WAYS["LoRA"], checkpointing=False,
    )  # fmt: skip
    how: dict[str, Any] = {
        "kind": "cpu", "lengths": [20] * 8, "supervised": 0.5,
        "least": 2, "most": 2, "budget_s": 0.0,
    }  # fmt: skip
    (record,) = training.run(recipe.completed(), **how)
    assert record["tokens"] == 160
    assert record["tokens_per_s"] == pytest.approx(160 / record["seconds"]["median"])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: None)
    with pytest.raises(UserError, match="nothing was trained"):
        list(training.run(recipe.completed(), **how))


def test_every_way_to_train_is_measured_whatever_the_recipe_says(tiny_folder: Path) -> None:
    """Ranks are nothing to weights that learn whole, and one line names what is not followed."""
    recipe = api.plannable(
        model_name_or_path=str(tiny_folder), lora_r=[4, 16], lora_dropout=0.1, seed=[1, 2],
        learning_rate=[1e-3, 1e-4], warmup_ratio=0.1, load_in_4bit=True,
        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32",
        gradient_checkpointing=True, gradient_checkpointing_part="mlp",
    )  # fmt: skip
    for settings in training.WAYS.values():
        for checkpointing in (False, True):
            way = running.way_of(recipe, settings, checkpointing=checkpointing)
            assert way.gradient_checkpointing is checkpointing
            assert way.compute_dtype == "float32"
            assert len(way.cohort()) == (1 if way.method == "full" else 2)
            assert way.bnb_4bit_use_double_quant is way.load_in_4bit
    assert running.not_followed(recipe) == (
        "train: load_in_4bit, gradient_checkpointing, warmup_ratio of the recipe are not followed: "
        "each row of the table has its own"
    )
    assert running.not_followed(api.plannable(model_name_or_path=str(tiny_folder))) is None


@pytest.fixture
def weights_on_disk(tiny_folder: Path) -> lighten.Recipe:
    """Of one process, which gathers its layers from a file."""
    return api.plannable(
        model_name_or_path=str(tiny_folder), method="full", strategy="zero3", max_length=32,
        offload_params="nvme", offload_optimizer="nvme", per_device_train_batch_size=2, workers=1,
    )  # fmt: skip


def test_weights_that_wait_elsewhere_are_on_the_device_in_each_way(
    weights_on_disk: lighten.Recipe,
) -> None:
    for settings in training.WAYS.values():
        way = running.way_of(weights_on_disk, settings, checkpointing=False)
        assert way.offload_params == "none"
    full = running.way_of(weights_on_disk, training.WAYS["full"], checkpointing=False)
    (record,) = training.run(full.completed(), kind="cpu", lengths=None, supervised=1.0, least=1,
                             most=1, budget_s=0.0)  # fmt: skip
    assert record["peak_bytes"] > 0
    line = running.not_followed(weights_on_disk)
    assert line is not None
    assert line.startswith("train: method, offload_params of the recipe are not followed")


def test_the_largest_is_found_with_all_weights_on_the_device(
    weights_on_disk: lighten.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST_TRIES", 1)
    near = Limits(64, "memory", 2, "memory")  # where a search on a real device would take long
    monkeypatch.setattr(limits.search, "limits", lambda *_, **__: near)
    lines: list[str] = []
    rows, context = limits.largest(
        weights_on_disk, running.devices.named(None), 2**40, timeout_s=100, log=lines.append
    )
    assert (rows["largest"], context["largest"]) == (2, 64)
    assert "offload_params of the recipe is not followed" in lines[0]


def test_a_probe_of_weights_that_wait_elsewhere_is_refused(weights_on_disk: lighten.Recipe) -> None:
    with pytest.raises(UserError, match=r"offload_params: nvme keeps them elsewhere; leave one of"):
        api.plan_probe(weights_on_disk)


@pytest.mark.parametrize(("limit", "planned"), [(37, 30), (37, 60), (37, 37), (1, 5), (200, 10)])
def test_the_largest_is_found_from_either_side(limit: int, planned: int) -> None:
    largest, tries = search_from(planned, lambda size: Try(size, size <= limit, size, None))
    assert largest is not None
    assert largest <= limit
    misfits = [attempt.size for attempt in tries if not attempt.fits]
    assert misfits == [] or min(misfits) > largest
    if planned in (30, 37):  # near enough for the tries there are
        assert largest >= 0.95 * limit


def test_nothing_that_fits_is_said() -> None:
    assert search_from(8, lambda size: Try(size, False, size, "x"))[0] is None
    capped, tries = search_from(100, lambda size: Try(size, True, size, None), most=128, step=4)
    assert capped == 128
    assert max(attempt.size for attempt in tries) == 128


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * 2**30), ("8g", 8 * 2**30), ("512 MiB", 512 * MIB), ("1.5GB", 1_500_000_000),
     ("1000", 1000)],
)  # fmt: skip
def test_memory_in_every_usual_form(text: str, expected: int) -> None:
    assert running.bytes_of(text) == expected


@pytest.mark.parametrize("text", ["much", "-1GiB", "0", "8 pies"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UserError, match="is no amount of memory"):
        running.bytes_of(text)


def test_a_time_has_a_unit_that_fits() -> None:
    shown = {0.99949: "999 ms", 0.9996: "1.00 s", 0.00099949: "999 µs", 0.0009996: "1 ms"}
    assert {seconds: text.time(seconds) for seconds in shown} == shown


def _result(seconds: list[float], **fields: Any) -> dict[str, Any]:
    record = {"part": "train", "name": "LoRA", "peak_bytes": 100,
              "seconds": Timing(tuple(seconds), 1, 0.05).to_dict()}  # fmt: skip
    return {"records": [{**record, **fields}], "device": "d"}


def test_two_results_are_compared_with_significance() -> None:
    slow, fast = [1.0, 1.01, 0.99, 1.02, 1.0, 0.98], [0.5, 0.51, 0.49, 0.5, 0.52, 0.5]
    time, memory = comparing.compare(_result(slow), _result(fast, peak_bytes=50))["rows"]
    assert time["ratio"] == pytest.approx(0.5)
    assert time["low"] < 0.5 < time["high"]
    assert time["verdict"] == "less"
    assert (memory["ratio"], memory["verdict"]) == (0.5, "measured once")
    same = comparing.compare(_result(slow), _result(slow[::-1]))["rows"][0]
    assert same["verdict"] == "no difference found"
    few = comparing.compare(_result(slow[:3]), _result(fast))["rows"][0]
    assert few["verdict"] == "fewer than 5 repeats"
    other_device = {**_result(fast), "device": "another"}
    assert "the device differs:" in comparing.compare(_result(slow), other_device)["notes"][0]
    other_adapter = {**_result(fast), "adapter_sha256": "of another"}
    assert "the adapters differ:" in comparing.compare(_result(slow), other_adapter)["notes"][0]
    batches = [
        {"records": [{"part": "max-batch", "name": f"micro-batch within {size} GiB",
                      "what": "micro-batch", "memory_bytes": size, "largest": size}]}
        for size in (4, 6)
    ]  # fmt: skip
    compared = comparing.compare(*batches)
    assert compared["rows"][0]["ratio"] == 1.5
    assert "memory_bytes is 4 and 6" in compared["notes"][0]
    longer = comparing.compare(_result(slow, new_tokens=32), _result(fast, new_tokens=16))
    assert longer["notes"] == ["train: LoRA: new_tokens is 32 and 16: the ratios are of other work"]


@pytest.mark.parametrize(
    "record",
    [1, {"part": "train"}, {"part": "max-batch", "name": "micro-batch", "largest": 3},
     {"part": "train", "name": "x", "seconds": 1.0},
     {"part": "train", "name": "x", "seconds": {"median": None, "samples": []}},
     {"part": "train", "name": "x", "seconds": {"median": 0.0, "samples": [0.0] * 5}}],
)  # fmt: skip
def test_a_record_that_cannot_be_read_is_told(record: Any, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"records": [record]}))
    with pytest.raises(UserError, match=r"old\.json: record 1 is none of this version"):
        api.bench_compare(tmp_path / "old.json", tmp_path / "old.json")


def test_the_command_measures_stores_and_compares(tiny_folder: Path, tmp_path: Path) -> None:
    stored = tmp_path / "a.json"
    result = call("bench", str(tiny_folder), "size", "--output", str(stored), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(stored.read_text())
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["torch"] == torch.__version__
    (record,) = report["records"]
    assert record["file_bytes"] == (tiny_folder / "model.safetensors").stat().st_size
    again = call("bench", "--compare", str(stored), str(stored), "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["rows"][0]["ratio"] == 1.0


def test_a_second_command_keeps_the_other_parts_of_a_run(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    """Part by part, as people bench; what is of other weights goes."""
    run = lighten.train(
        model=str(tiny_folder), dataset=str(chat_file), dtype="float32", max_steps=1,
        output_dir=str(tmp_path / "run"), progress=False,
    )  # fmt: skip
    path = run.folder / "bench.json"
    first = api.bench(str(run.folder), ["size"])
    assert first["earlier_parts"] == []
    stored = json.loads(path.read_text())
    stored["records"].append({"part": "attention", "name": "eager, forward, 64 tokens"})
    path.write_text(json.dumps(stored))
    second = api.bench(run, "size")
    assert second["earlier_parts"] == ["attention"]
    parts = [record["part"] for record in json.loads(path.read_text())["records"]]
    assert parts == ["size", "size", "size", "attention"]
    names = [record["name"] for record in second["records"] if record["part"] == "size"]
    assert names == ["base", "adapter", "checkpoint-1"]
    path.write_text(json.dumps({**second, "adapter_sha256": "of others"}))
    assert running._earlier_records(path, second, {"size"}) == []


def test_a_part_that_fails_loses_no_other(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has what came before it while it runs, and what comes after it in the end."""
    path = tmp_path / "bench.json"
    seen: list[str] = []

    def fail(self: running.Bench) -> Any:
        seen.extend(record["part"] for record in json.loads(path.read_text())["records"])
        yield {"part": "attention", "name": "first"}
        raise RuntimeError("of a library\nand more")

    monkeypatch.setattr(running.Bench, "attention", fail)
    monkeypatch.setattr(
        running.Bench, "max_batch", lambda self: iter([{"part": "max-batch", "name": "rows"}])
    )
    result = api.bench(str(tiny_folder), ["size", "attention", "max-batch"], output=path)
    assert seen == ["size"]
    assert [(record["part"], record.get("why")) for record in result["records"]] == [
        ("size", None), ("attention", None), ("attention", "RuntimeError: of a library"),
        ("max-batch", None),
    ]  # fmt: skip
    assert json.loads(path.read_text())["records"] == result["records"]


def test_a_command_of_which_no_part_can_be_measured_fails(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: running.Bench) -> Any:
        raise UserError("no such data")

    monkeypatch.setattr(running.Bench, "size", fail)
    with pytest.raises(UserError, match="no such data"):
        api.bench(str(tiny_folder), ["size"], output=tmp_path / "bench.json")
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.parametrize(
    ("arch", "settings", "expected"),
    [
        ("gemma4_text", {"head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1,
                         "attention_k_eq_v": True, "layer_types": ["sliding_attention",
                                                                   "full_attention"]}, (4, 1, 16)),
        ("mamba", {}, None),
    ],
)  # fmt: skip
def test_attention_is_measured_in_the_shape_of_layers_with_heads_of_their_own(
    arch: str, settings: dict[str, Any], expected: tuple[int, int, int] | None, tmp_path: Path,
    tiny_folder: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    jobs: list[tuple[int, int, int]] = []

    def child(module: str, settings: dict[str, Any], **limits: Any) -> Outcome:
        jobs.append((settings["heads"], settings["key_heads"], settings["features"]))
        return Outcome()

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    if arch != "mamba":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    AutoConfig.for_model(arch, **sizes, **settings).save_pretrained(tmp_path)
    monkeypatch.setattr(running, "in_child", child)
    recipe = lighten.Recipe.from_values(
        {"model_name_or_path": str(tmp_path), "dataset": str(chat_file)}, {}
    )
    benchmark = running.Bench(
        open_source(str(tiny_folder)), recipe, running.Settings(lengths=(8,)), lambda _: None
    )
    records = list(benchmark.attention())
    assert set(jobs) == (set() if expected is None else {expected})
    if expected is None:
        assert [record["why"] for record in records] == ["its layers do not attend"]


def test_mistakes_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'speed' is no part; parts are size"):
        api.bench(str(tiny_folder), ["speed"])
    with pytest.raises(UserError, match="2 tokens or more"):
        api.bench(str(tiny_folder), ["size"], new_tokens=1)
    with pytest.raises(UserError, match=r"is a folder; name a file in it"):
        api.bench(str(tiny_folder), ["size"], output=tmp_path, log=pytest.fail)
    with pytest.raises(UserError, match="cannot be read"):
        api.bench_compare(tmp_path / "none.json", tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="has no records"):
        api.bench_compare(tmp_path / "other.json", tmp_path / "other.json")
