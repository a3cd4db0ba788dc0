"""The plan: fake steps are the real ones, repeated layers are layers, and more never costs less."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import flop_registry

from lighten import models
from lighten.adapters.whole import decoder_layers
from lighten.cpu import products
from lighten.cpu.kernels import formats
from lighten.data import Encoded, TemplateChoice
from lighten.data.tokenise import EncodingCounts
from lighten.engine import loss
from lighten.machine.hardware import Choice
from lighten.models import quantized
from lighten.models.attention_setting import set_attention
from lighten.planning import few_chunks, memory, repeat
from lighten.planning.build import config_of
from lighten.planning.process_overhead import Context
from lighten.planning.result import PARTS, Plan
from lighten.planning.steps import (
    OneRank,
    Traced,
    collated,
    follow_recipe,
    largest_step,
    run_steps,
    traced_places,
)
from lighten.planning.storage_tracker import Pass, StorageTracker, Timeline
from lighten.planning.trace import plan_recipe
from lighten.recipe import Recipe
from lighten.training.prepare import prepare
from lighten.training.rows import Rows
from tests.tiny import tiny_config, tiny_model

FLOAT32 = Choice("float32", "the test's")
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "nf4": {"load_in_4bit": True},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "full": {"method": "full"},
    "checkpointing": {"gradient_checkpointing": True},
    "cohort": {"lora_r": [4, 8]},
    "dropout": {"lora_dropout": 0.1},
}


class Cpu:
    """A processor for tests: no time is predicted for a kind that has no rates."""

    name, label, kind, bandwidth, is_here = "cpu", "cpu", "cpu", None, True
    flops: dict[str, float] = {}  # noqa: RUF012
    formats = {"float32": "native"}  # noqa: RUF012

    def __init__(self, memory_bytes: int | None = None) -> None:
        self.memory_bytes = memory_bytes

    def dtype(self, requested: str) -> Choice:
        """Always the same."""
        return Choice("float32" if requested == "auto" else requested, "the test's")


class Card(Cpu):
    """A GPU by its figures."""

    name, label, kind, bandwidth, is_here = "card", "card", "cuda", 1e12, False
    memory_alone = False
    flops = {"float32": 1e13, "bfloat16": 1e14}  # noqa: RUF012
    formats = {"float32": "native", "bfloat16": "native"}  # noqa: RUF012


def recipe_of(folder: Path, **values: Any) -> Recipe:
    return Recipe.from_values(
        {"model_name_or_path": str(folder), "dataset": __file__, "val_size": 0,
         "max_length": 64, **values}
    )  # fmt: skip


def folder_of(tmp_path: Path, arch: str = "llama", layers: int = 2, **changes: Any) -> Path:
    depth = "n_layer" if arch == "gpt2" else "num_hidden_layers"
    tiny_config(arch, **{depth: layers, **changes}).save_pretrained(tmp_path)
    return tmp_path


def follow(recipe: Recipe, shape: tuple[int, int], **options: Any) -> Traced:
    return follow_recipe(recipe, config_of(recipe)[0], FLOAT32, "cpu", rows_tokens=shape, **options)


def really(recipe: Recipe, shape: tuple[int, int], arch: str, layers: int) -> Timeline:
    """The same steps on real tensors, followed in the same way."""
    model = tiny_model(arch, num_hidden_layers=layers)
    four, eight = recipe.load_in_4bit, recipe.load_in_8bit
    storage = quantized.choose(four, eight, "nf4", recipe.bnb_4bit_use_double_quant)
    quantized.finish(model, storage, torch.float32, "cpu")
    model.requires_grad_(False)
    base = models.Base(
        model=model.eval(), tokenizer=None, name="tiny", source="folder", path=Path(),
        revision=None, file_bytes=None, dtype=FLOAT32,
        attention=set_attention(model, "sdpa", "cpu"),
    )  # fmt: skip
    tracker = StorageTracker()
    with tracker:
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.mark(tensor, "base weights")
        rows = Rows(Encoded([], EncodingCounts()), None, TemplateChoice("", "", ""), {})
        setup = prepare(recipe, OneRank(), base, rows)
    cut, lengths = largest_step(setup, shape)
    batches = collated(setup, [cut[i] for i in traced_places(setup, cut)], lengths, 1.0)
    with tracker:
        run_steps(setup, batches, tracker, {id(x): i for i, x in enumerate(decoder_layers(model))})
    return tracker.timeline


def steps_of(timeline: Timeline) -> list[tuple[str, bool, int]]:
    """Births and deaths of the steps' tensors.

    Without single numbers: asking for one makes others. Real kernels are not followed.
    """
    return [
        (timeline.runs[event.run].phase, event.born, event.block.bytes)
        for event in timeline.events
        if timeline.runs[event.run].phase not in ("loading", "check")
        and event.block.bytes > 8
        and event.block.part != "device context"
    ]


@pytest.mark.parametrize("way", WAYS)
def test_fake_steps_are_born_and_die_as_real_ones(way: str, tmp_path: Path) -> None:
    recipe = recipe_of(folder_of(tmp_path), **WAYS[way])
    fake, real = follow(recipe, (4, 48)).timeline, really(recipe, (4, 48), "llama", 2)
    assert steps_of(fake) == steps_of(real)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_experts_are_planned_in_every_format(dtype: str, tmp_path: Path) -> None:
    """PyTorch tells the shapes of their product for bfloat16 alone."""
    recipe = recipe_of(folder_of(tmp_path, "mixtral"), dtype=dtype)
    format_ = Choice(dtype, "the test's")
    fake = follow_recipe(recipe, config_of(recipe)[0], format_, "cpu", rows_tokens=(2, 32)).timeline
    if dtype == "float32":
        assert steps_of(fake) == steps_of(really(recipe, (2, 32), "mixtral", 2))
    assert any(work.name.startswith("aten::_grouped_mm") for _, _, work in fake.work)


def test_of_many_chunks_of_the_loss_a_few_are_traced_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large batches have thousands: the plan is the same as with all of them followed."""
    recipe = recipe_of(folder_of(tmp_path))
    vocabulary_bytes = 4 * 320
    monkeypatch.setattr(loss, "CHUNKS", dict.fromkeys(loss.CHUNKS, (16 * vocabulary_bytes, 16)))
    few_traced = follow(recipe, (3, 48)).timeline
    monkeypatch.setattr(few_chunks, "TRACED", 10**6)
    all_traced = follow(recipe, (3, 48)).timeline
    assert len(few_traced.events) < len(all_traced.events)
    assert max(few_traced.live()) == max(all_traced.live())
    assert few_traced.live()[-1] == all_traced.live()[-1]

    def amounts(timeline: Timeline) -> Counter[tuple[str, int, int]]:
        return Counter((work.name, work.flops, work.bytes) for _, _, work in timeline.work)

    assert amounts(few_traced) == amounts(all_traced)


def same_course(short: Traced, full: Traced) -> None:
    """Bytes alive after every event, but for the vector of norms: one number per parameter."""
    live, full_live = short.timeline.live(), full.timeline.live()
    parameters = sum(len(member.parameters) for member in full.setup.adapters)
    assert len(live) == len(full_live)
    assert max(abs(a - b) for a, b in zip(live, full_live, strict=True)) <= 4 * parameters


@pytest.mark.parametrize(
    ("arch", "layers", "way"),
    [("llama", 9, "lora"), ("llama", 7, "nf4"), ("llama", 8, "full"), ("llama", 9, "checkpointing"),
     ("qwen3", 8, "cohort"), ("gpt2", 7, "lora"), ("gemma2", 11, "lora")],
)  # fmt: skip
def test_repeated_layers_are_the_whole_model(
    arch: str, layers: int, way: str, tmp_path: Path
) -> None:
    recipe = recipe_of(folder_of(tmp_path, arch, layers), **WAYS[way])
    short, full = follow(recipe, (3, 32)), follow(recipe, (3, 32), all_layers=True)
    same_course(short, full)
    peak = short.timeline.live().index(max(short.timeline.live()))
    assert short.timeline.alive_at(peak) == pytest.approx(full.timeline.alive_at(peak), abs=4096)
    flops = [sum(work.flops for _, _, work in t.timeline.work) for t in (short, full)]
    assert flops[0] == flops[1] > 0


def test_what_repeats_is_found() -> None:
    assert repeat.repetition("aaaaaaaa") == repeat.Repetition(1, 8, 0)
    assert repeat.repetition("aabaabaabaabaabaa") == repeat.Repetition(3, 5, 2)
    assert repeat.repetition("abcdefgh").units == 1
    assert repeat.repetition("aabaabaabaabaabaa").traced == [*range(9), *range(12, 17)]
    assert repeat.Repetition(1, 3).traced == [0, 1, 2]


def test_every_other_layer_recomputed_repeats_by_two(tmp_path: Path) -> None:
    recipe = recipe_of(
        folder_of(tmp_path, layers=12), gradient_checkpointing=True,
        gradient_checkpointing_layers=2,
    )  # fmt: skip
    same_course(follow(recipe, (3, 32)), follow(recipe, (3, 32), all_layers=True))


def expected(plan: Plan) -> int:
    """Without the allocator's own ups and downs."""
    return sum(p.bytes for p in plan.memory.parts if p.name != "allocator overhead")


@given(
    batch=st.integers(1, 6), length=st.integers(8, 60), rank=st.integers(1, 16),
    layers=st.integers(1, 9), doubled=st.sampled_from(["batch", "length", "rank", "layers"]),
)  # fmt: skip
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_more_never_takes_less_and_what_must_be_held_is_held(
    tmp_path_factory: pytest.TempPathFactory, batch: int, length: int, rank: int, layers: int,
    doubled: str,
) -> None:  # fmt: skip
    def plan(**options: int) -> Plan:
        folder = folder_of(tmp_path_factory.mktemp("base"), layers=options["layers"])
        recipe = recipe_of(folder, lora_r=options["rank"], tokens_per_microbatch=None,
                           per_device_train_batch_size=options["batch"])  # fmt: skip
        return plan_recipe(recipe, Card(), rows_tokens=(options["batch"], options["length"]))

    sizes = {"batch": batch, "length": length, "rank": rank, "layers": layers}
    less, greater = plan(**sizes), plan(**{**sizes, doubled: 2 * sizes[doubled]})
    assert expected(greater) > expected(less)
    assert greater.time is not None
    assert less.time is not None
    assert greater.time.seconds >= less.time.seconds
    model = tiny_model("llama", num_hidden_layers=layers)
    weights = sum(p.numel() * 4 for p in model.parameters())
    adapters = layers * rank * 4 * sum(
        layer.in_features + layer.out_features
        for layer in decoder_layers(model)[0].modules() if isinstance(layer, torch.nn.Linear)
    )  # fmt: skip
    assert less.memory.low >= weights + 3 * adapters, "weights, adapters, two moments"


def test_the_parts_sum_to_what_is_expected_and_stand_in_order(tmp_path: Path) -> None:
    recipe = recipe_of(folder_of(tmp_path), load_in_4bit=True)
    for device in (Cpu(2**40), Card(2**40)):
        plan = plan_recipe(recipe, device, rows_tokens=(4, 48))
        assert tuple(part.name for part in plan.memory.parts) == PARTS
        assert sum(part.bytes for part in plan.memory.parts) == plan.memory.expected
        assert plan.memory.low <= plan.memory.expected <= plan.memory.high
        assert plan.fits() is True
        assert plan.method == "qlora"
        assert (plan.memory.allocated is None) == (device.kind == "cpu")
    assert plan_recipe(recipe, Cpu(2**20), rows_tokens=(4, 48)).fits() is False


def test_the_longest_rows_of_the_data_decide(tmp_path: Path) -> None:
    recipe = recipe_of(folder_of(tmp_path), per_device_train_batch_size=2)
    plan = plan_recipe(recipe, Card(), rows_tokens=[5, 9, 60, 7, 50, 8])
    assert plan.shape.tokens_per_row == 60
    alike = plan_recipe(recipe, Card(), rows_tokens=[9] * 6)
    assert expected(alike) < expected(plan)


def test_a_7b_model_is_planned_in_seconds(tmp_path: Path) -> None:
    import time

    from transformers import AutoConfig

    AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32000,
    ).save_pretrained(tmp_path)  # fmt: skip
    recipe = recipe_of(tmp_path, load_in_4bit=True, max_length=2048, dtype="bfloat16")
    began = time.process_time()
    plan = plan_recipe(recipe, Card(16 * 2**30), rows_tokens=(4, 2048))
    assert time.process_time() - began < 10.0
    parts = {part.name: part.bytes for part in plan.memory.parts}
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert parts["base weights"] == pytest.approx(linear / 2 + 2 * 2 * 32000 * 4096, rel=0.01)
    assert parts["quantisation constants"] == pytest.approx(linear / 64 * 4, rel=0.01)


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_recomputed_layers_can_be_planned_for_a_gpu(part: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, num_hidden_layers=4)
    peaks = []
    for saving in (False, True):
        options = {"gradient_checkpointing_part": part} if saving else {}
        recipe = recipe_of(folder, gradient_checkpointing=saving, **options)
        # What is reserved comes in segments of 20 MiB, all of so small a model in few of them.
        peaks.append(plan_recipe(recipe, Card(), rows_tokens=(8, 64)).memory.allocated or 0)
    assert 0 < peaks[1] < peaks[0]


def steps_on_cuda(
    folder: Path, shape: tuple[int, int], *, dtype: str = "bfloat16", **options: Any
) -> Traced:
    recipe, chosen = recipe_of(folder), Choice(dtype, "the test's")
    return follow_recipe(recipe, config_of(recipe)[0], chosen, "cuda", rows_tokens=shape, **options)


def grouped_folder(tmp_path: Path, heads: int, groups: int, features: int) -> Path:
    return folder_of(
        tmp_path, num_attention_heads=heads, num_key_value_heads=heads // groups,
        hidden_size=heads * features,
    )  # fmt: skip


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_a_gpus_attention_keeps_what_its_kernels_keep(
    capability: tuple[int, int], tmp_path: Path
) -> None:
    """Grouped keys as they are where a kernel reads them, repeated where none does; no scores."""
    tokens, rows, heads, groups, features = 64, 2, 8, 4, 16
    folder = grouped_folder(tmp_path, heads, groups, features)
    traced = steps_on_cuda(folder, (rows, tokens), capability=capability)
    live = traced.timeline.live()
    parts = traced.timeline.alive_at(max(range(len(live)), key=live.__getitem__))
    query = rows * tokens * heads * features * 2
    keys = query // (groups if capability >= (8, 0) else 1)
    normaliser = rows * heads * tokens * 4
    # Query, keys, result and its normaliser of two layers, and the values where they are repeated:
    # else they are what a linear layer gave.
    values = keys if capability < (8, 0) else 0
    expected_bytes = 2 * (2 * query + keys + values + normaliser)
    assert parts["activations: attention"] == pytest.approx(expected_bytes, rel=0.02)


@pytest.mark.parametrize(("capability", "pieces"), [((9, 0), 1), ((8, 0), 4)])
def test_a_gpus_attention_has_room_of_its_own_in_the_backward_pass(
    capability: tuple[int, int], pieces: int, tmp_path: Path
) -> None:
    """Of float32 sums for the queries, and of keys' gradients before a group's are added."""
    tokens, rows, heads, groups, features = 96, 2, 8, 4, 16
    folder = grouped_folder(tmp_path, heads, groups, features)
    timeline = steps_on_cuda(folder, (rows, tokens), capability=capability).timeline
    sums, normaliser = rows * tokens * heads * features * 4, rows * heads * tokens * 4
    keys = rows * tokens * heads * features * 2  # of every query head
    expected = [normaliser, sums, keys, keys] if pieces == 4 else [normaliser + sums + 2 * keys]
    runs = [run for run, phase in enumerate(timeline.runs) if phase == Pass("backward", 0, 1)]
    sizes = [event.block.bytes for event in timeline.events if event.born and event.run in runs]
    windows = [sizes[i : i + pieces] for i in range(len(sizes))]
    assert windows.count(expected) == 2, "once in each layer"


def test_grouped_keys_are_counted_where_pytorchs_formula_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch 2.11's does: a GPU that had it could not be planned for."""
    folder = grouped_folder(tmp_path, 8, 4, 16)

    def flops() -> dict[str, int]:
        by_kernel: dict[str, int] = {}
        for _, _, work in steps_on_cuda(folder, (2, 64)).timeline.work:
            if "flash" in work.name:
                by_kernel[work.name] = by_kernel.get(work.name, 0) + work.flops
        return by_kernel

    expected_flops, calls = flops(), 0
    aten = torch.ops.aten
    for packet in (aten._scaled_dot_product_flash_attention,
                   aten._scaled_dot_product_flash_attention_backward):  # fmt: skip

        def strict(*args: Any, real: Any = flop_registry[packet], **options: Any) -> Any:
            nonlocal calls
            calls += 1
            assert (
                len({x.shape[1] for x in args if isinstance(x, torch.Tensor) and x.dim() == 4}) == 1
            )
            return real(*args, **options)

        monkeypatch.setitem(flop_registry, packet, strict)
    assert flops() == expected_flops
    assert calls
    assert min(expected_flops.values()) > 0
    assert len(expected_flops) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_plan_for_a_gpu_is_the_same_whatever_kernels_this_processor_has(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, peaks = folder_of(tmp_path), []
    for why in (None, "there is no C++ compiler"):
        monkeypatch.setattr(formats, "obstacle", lambda dtype, why=why: why)
        peaks.append(steps_of(steps_on_cuda(folder, (2, 64), dtype=dtype).timeline))
    assert peaks[0] == peaks[1]


def part(planned: memory.Memory, name: str) -> int:
    return next(p.bytes for p in planned.parts if p.name == name)


def test_every_further_lane_is_a_process_with_activations_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "is_slow_on_mkl", lambda: False)  # no kernels in the context
    traced = follow(recipe_of(folder_of(tmp_path), max_length=512), (8, 512))
    loading = memory.Loading(0, 0, 0)
    one, two, three = (
        memory.processor_memory(
            traced.timeline,
            loading,
            context=Context(7, 5, 0),
            workers=workers,
            arena=True,
            margin=0.1,
        )
        for workers in (1, 2, 3)
    )
    for name in ("base weights", "adapters"):
        assert part(two, name) == part(three, name) == part(one, name) > 0
    assert [part(planned, "device context") for planned in (one, two, three)] == [7, 12, 17]
    for name in ("activations: linear", "activations: attention"):
        assert part(three, name) - part(two, name) == part(two, name) - part(one, name) > 0
    assert three.expected - two.expected == pytest.approx(two.expected - one.expected, rel=0.01)


def test_while_a_base_is_loaded_nothing_of_its_first_products_is_there(tmp_path: Path) -> None:
    """SmolLM2 in bfloat16 from float32 files: 775 MiB, 770 of them weights and their files."""
    traced = follow(recipe_of(folder_of(tmp_path)), (1, 16))
    context, files, tokenizer = Context(10**9, 5, 0), 2 * 10**9, 10**6
    loading, step = (
        memory.processor_memory(
            traced.timeline, memory.Loading(mapped, 0, tokenizer), context=context, arena=True,
            margin=0.1,
        )
        for mapped in (files, 0)
    )  # fmt: skip
    tokenizer_bytes = int(memory.TOKENIZER_FACTOR * tokenizer)
    weights = part(step, "base weights")
    assert loading.expected + loading.mapped == weights + files + tokenizer_bytes
    assert loading.expected == step.expected  # what is mapped is no memory that it needs
    assert part(step, "device context") == context.bytes + tokenizer_bytes


def test_every_adapter_learns_in_a_traced_step_and_lanes_sum_what_is_theirs(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path)
    four = recipe_of(folder, lora_r=[8] * 4, seed=[0, 1, 2, 3], tokens_per_microbatch=64, workers=2)
    traced = follow(four, (1, 64))
    assert len(traced.batches) == 4, "one for each adapter"
    sizes = [sum(p.numel() for p in member.parameters.values()) for member in traced.setup.adapters]
    parts = traced.timeline.alive_at(len(traced.timeline.events) - 1)
    assert parts["optimiser"] == pytest.approx(2 * 4 * sum(sizes), rel=0.02)
    assert traced.further_sums(2) == 0, "each adapter's gradients are summed in one worker"
    alone = recipe_of(folder, tokens_per_microbatch=64, workers=2)
    assert follow(alone, (4, 64)).further_sums(2) == 4 * sizes[0]


def test_what_comes_before_lanes_is_there_once(tmp_path: Path) -> None:
    # A vocabulary so large that the check of the loss is the peak.
    traced = follow(recipe_of(folder_of(tmp_path, vocab_size=500_000)), (2, 64))
    one, two = (
        memory.processor_memory(
            traced.timeline,
            memory.Loading(),
            context=Context(7, 5, 0),
            workers=workers,
            arena=True,
            margin=0.1,
        )
        for workers in (1, 2)
    )
    assert one.when == two.when == "forward"
    assert one.expected == two.expected


def test_code_that_saving_loads_counts_where_nothing_of_a_step_is_left(tmp_path: Path) -> None:
    """PEFT's, 80 MB: the peak of a streamed base, of which little is in memory."""
    traced = follow(recipe_of(folder_of(tmp_path)), (2, 64))
    step, little, saving = (
        memory.processor_memory(
            traced.timeline, memory.Loading(), context=Context(7, 5, saved), arena=True, margin=0.1
        )
        for saved in (0, 1000, 10**9)
    )
    assert step.expected == little.expected
    assert saving.when == "saving"
    assert part(saving, "device context") - part(step, "device context") == 10**9


@pytest.mark.parametrize(("dtype", "kernels"), [("bfloat16", True), ("float32", False)])
def test_each_product_of_a_format_that_onednn_multiplies_makes_a_kernel(
    dtype: str, kernels: bool, tmp_path: Path
) -> None:
    shallow, deep = (
        follow_recipe(
            recipe_of(folder_of(tmp_path / str(layers), layers=layers)),
            tiny_config("llama", num_hidden_layers=layers),
            Choice(dtype, "the test's"),
            "cpu",
            rows_tokens=(4, 16),
        ).timeline
        for layers in (4, 8)
    )
    shallow, deep = (timeline.alive_at(len(timeline.events) - 1) for timeline in (shallow, deep))
    assert (shallow.get("device context", 0) > 0) is kernels
    assert shallow.get("device context") == deep.get("device context"), "layers share them"


@pytest.mark.parametrize("tied", [True, False])
def test_two_gradients_of_a_tied_head_are_added_in_place_as_autograd_does(
    tied: bool, tmp_path: Path
) -> None:
    """Of fake tensors it makes a third one; real ones never are three at a time."""
    vocabulary_size, width = 50_000, 32
    config = {"vocab_size": vocabulary_size, "tie_word_embeddings": tied, "hidden_size": width}
    folder = folder_of(tmp_path, **config)
    traced = follow(recipe_of(folder, method="full"), (2, 32))
    size, most = 4 * vocabulary_size * width, 0
    alive: set[int] = set()
    for event in traced.timeline.events:
        if event.block.bytes == size and event.block.part != "base weights":
            alive ^= {id(event.block)}
        if traced.timeline.runs[event.run] == Pass("backward", 0, 0):
            most = max(most, len(alive))
    assert most == 2, "the head's gradient and the embedding's"


@pytest.mark.parametrize(("stored", "converted"), [("float32", True), ("bfloat16", False)])
def test_weights_of_another_format_are_mapped_while_they_are_converted(
    stored: str, converted: bool, tmp_path: Path
) -> None:
    """The model that is made for the trace has the wanted format: it must not be asked."""
    tiny_model("llama", dtype=getattr(torch, stored)).save_pretrained(tmp_path)
    plan = plan_recipe(recipe_of(tmp_path, dtype="bfloat16"), Card())
    assert ("loading" in plan.choices) is converted


@pytest.mark.parametrize(("device", "warned"), [("h100", False), ("t4", True)])
def test_a_plan_says_which_gpus_were_never_compared(
    device: str, warned: bool, tmp_path: Path
) -> None:
    from lighten.machine.devices import named

    plan = plan_recipe(recipe_of(folder_of(tmp_path)), named(device))
    assert any("of GPUs h100 has been compared" in line for line in plan.outside) is warned


@pytest.mark.parametrize(("optim", "state"), [("adamw_8bit", 2), ("lion_32bit", 4)])
def test_state_of_paged_optimisers_is_in_main_memory_in_a_plan_for_a_gpu(
    optim: str, state: int, tmp_path: Path
) -> None:
    """All of large tensors'; on a processor there is nothing to page, and nothing changes."""
    pytest.importorskip("bitsandbytes")
    folder = folder_of(tmp_path, hidden_size=512, intermediate_size=1024)
    usual, paged = (
        plan_recipe(recipe_of(folder, method="full", learning_rate=1e-5, optim=name), Card(2**34))
        for name in (optim, f"paged_{optim}")
    )
    moved = paged.host_bytes - usual.host_bytes
    parameters = sum(p.numel() for p in models.skeleton(str(folder)).parameters())
    assert moved == pytest.approx(state * parameters, rel=0.05)
    assert paged.memory.low < usual.memory.low
    parts = {part.name: part.bytes for part in paged.memory.parts}
    assert parts["optimiser"] < 0.05 * moved
    assert any(f"paged_{optim} keeps" in note for note in paged.notes)
    assert not any("keeps" in note for note in usual.notes)
    assert paged.disk_bytes == usual.disk_bytes


def test_a_checkpoint_has_8_bits_of_state_where_the_optimiser_has(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = folder_of(tmp_path)
    dense, eight, lion, paged = (
        plan_recipe(
            recipe_of(folder, optim=name, save_total_limit=1, lora_r=64), Card(2**34)
        ).disk_bytes
        for name in ("adamw_torch", "adamw_8bit", "lion_32bit", "paged_lion_32bit")
    )
    # Two checkpoints and the result: of each number 4 bytes, and two states, or one.
    assert dense / eight == pytest.approx(
        (2 * 12 + 4) / (2 * (4 + 2 * (1 + 4 / 256)) + 4), rel=0.01
    )
    assert dense / lion == pytest.approx((2 * 12 + 4) / (2 * 8 + 4), rel=0.01)
    assert paged == lion


def test_the_best_checkpoint_of_each_adapter_takes_room_beside_the_newest_ones(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path)
    settings = {"save_total_limit": 1, "lora_r": [8, 8], "val_size": 5}
    newest, best = (
        plan_recipe(
            recipe_of(folder, load_best_model_at_end=kept, **settings), Card(2**34)
        ).disk_bytes
        for kept in (False, True)
    )
    # Of each number 12 bytes in a checkpoint, and 4 in the result.
    assert best / newest == pytest.approx((4 * 12 + 4) / (2 * 12 + 4), rel=0.01)
