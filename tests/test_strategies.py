"""Weights, gradients and optimiser state spread over two ranks: the result is one process's.

One pair of ranks makes all the runs, and each rank notes what it held and gathered in them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import lighten
from lighten.adapters import dtensors
from lighten.adapters.decoder import decoder_layers
from lighten.engine import step as train_step_module
from lighten.errors import UserError
from lighten.parallel import sharded, strategies
from lighten.parallel.offloaded import stores
from lighten.recipe import Recipe, RecipeError, spread
from lighten.runs import Run
from lighten.training import loop
from lighten.training.base import load_base
from lighten.training.method import what_learns
from tests.cut_runs import cut_short, weights
from tests.processes import notes_of, runs_of_rank, start_ranks, wait_for
from tests.tiny import save_tiny

LAYERS = 2
# AdamW moves a number whose gradients are hardly more than rounding by its whole rate: that is what
# bounds how far runs whose sums are split otherwise can be from each other.
COHORT = {
    "adapters": [
        {"name": "quick", "lora_r": 2, "learning_rate": 3e-3},
        {"name": "slow", "lora_r": 3, "learning_rate": 1e-3},
    ],
    "lora_dropout": 0.1,
}
SETUPS: dict[str, dict[str, Any]] = {
    "cohort": COHORT,
    "full": {"method": "full", "learning_rate": 1e-3},
    "nvme": {"method": "full", "learning_rate": 1e-3, "offload_optimizer": "nvme"},
    "params": {
        "method": "full",
        "learning_rate": 1e-3,
        "offload_optimizer": "nvme",
        "offload_params": "nvme",
    },
    # In main memory, which is what a processor computes in: the way is a GPU's.
    "memory": {"method": "full", "learning_rate": 1e-3, "offload_params": "cpu"},
    "half": {"method": "full", "learning_rate": 1e-3},  # bfloat16 in its files
    "half frozen": {"lora_r": 2, "learning_rate": 1e-3},
    "half last": {"trainable_layers": "last_1", "learning_rate": 1e-3},
    "last": {"trainable_layers": "last_1", "learning_rate": 1e-3},
    "sgd": {"method": "full", "learning_rate": 0.1, "optim": "sgd"},
    "sgd low": {"lora_r": 2, "learning_rate": 0.1, "optim": "sgd"},
    "short": {"lora_r": 2, "learning_rate": 1e-3},
    # One row in a micro-batch: of five held-out ones a rank has three, the other two.
    "narrow": {
        "lora_r": 2,
        "learning_rate": 1e-3,
        "max_length": 32,
        "packing": False,
        "tokens_per_microbatch": 32,
    },
    # A rank's rows of all adapters are one micro-batch.
    "four": {
        "lora_r": [1, 2, 3, 4],
        "max_steps": 1,
        "max_train_samples": 4,
    },
    "nf4": {"load_in_4bit": True, "lora_r": [2, 3], "learning_rate": 1e-3},
    "int8": {"load_in_8bit": True, "lora_r": 2, "learning_rate": 1e-3},
}
LEARN_BASE = ("full", "nvme", "params", "memory", "half", "last", "half last", "sgd")
# What learns, the strategy and the accumulation; `zero3` is `fsdp` by another name.
RUNS = [
    *(("cohort", strategy, count) for strategy in ("fsdp", "zero1", "zero2") for count in (1, 3)),
    ("full", "zero3", 1), ("full", "fsdp", 3), ("full", "zero2", 1), ("full", "zero1", 3),
    ("nvme", "zero1", 1), ("nvme", "zero2", 1), ("last", "fsdp", 1), ("last", "zero2", 1),
    ("half", "zero3", 1), ("half", "zero2", 1), ("half frozen", "fsdp", 1),
    ("half last", "zero3", 1), ("params", "zero3", 1), ("params", "fsdp", 3),
    ("memory", "zero3", 3),
    ("sgd", "zero3", 1), ("sgd low", "zero2", 1),
    ("four", "fsdp", 1), ("short", "ddp", 1), ("narrow", "fsdp", 1),
    ("nf4", "ddp", 1), ("nf4", "zero1", 3), ("nf4", "zero2", 1),
    ("int8", "ddp", 1), ("int8", "zero1", 1), ("int8", "zero2", 3),
]  # fmt: skip


def settings(
    root: Path, data: Path, setup: str, strategy: str, accumulation: int, ranks: int
) -> dict[str, Any]:
    """Thirteen rows with a tied head: in the last step of an epoch one rank has no row."""
    alone = {"offload_params": "none"} if strategy == "single" else {}
    return {
        "model_name_or_path": str(root / ("half" if setup.startswith("half") else "base")),
        "dataset": str(data), "dtype": "float32",
        "output_dir": str(root / f"{setup}-{strategy}-{accumulation}"), "strategy": strategy,
        "per_device_train_batch_size": 2, "max_train_samples": 13, "max_steps": 4,
        # A step has as many examples with fewer ranks.
        "gradient_accumulation_steps": accumulation * 2 // ranks, "save_steps": 2,
        "eval_dataset": str(data), "max_eval_samples": 5, "eval_steps": 3, "save_total_limit": 10,
        "load_best_model_at_end": setup == "full", **SETUPS[setup], **alone,
    }  # fmt: skip


def train_all(ports: str, file: str) -> None:
    """In a rank: one run after another, and what was gathered and held in their steps."""
    notes: list[dict[str, Any]] = []
    members: list[Any] = []
    step, gather_count = loop.train_step, [0]

    def noted_step(*args: Any, **options: Any) -> Any:
        batches, members[:], objective, *_ = args
        before = gather_count[0]
        report = step(*args, **options)
        layers = decoder_layers(objective.model)
        notes[-1] |= {
            "adapters": [len({item.adapter for item in batch.items}) for batch in batches],
            "gathers": gather_count[0] - before,
            "layer_bytes": sum(dtensors.local_part(p).untyped_storage().nbytes()
                               for layer in layers for p in layer.parameters()),
            "layer_bytes_in_files": sum(
                local.nbytes for layer in layers for p in layer.parameters()
                if in_file(local := dtensors.local_part(p.detach()))
            ),
            "state": sum(dtensors.local_part(value).numel() for member in members
                         for value in member.optimizer_tensors().values()),
            "learns": sum(p.numel() for member in members for p in member.parameters.values()),
        }  # fmt: skip
        return report

    def count_gathers(gather: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            gather_count[0] += 1
            return gather(*args, **options)

        return run

    def noted_gather(tensor: torch.Tensor) -> torch.Tensor:
        result = full_tensor(tensor)
        if isinstance(tensor, DTensor):
            whole[:] = [reference for reference in whole if reference() is not None]
            whole.append(weakref.ref(result))
            alive = [value for reference in whole if (value := reference()) is not None]
            size = sum(value.nbytes for value in alive)
            notes[-1]["whole_bytes"] = max(size, notes[-1].get("whole_bytes", 0))
        return result

    def noted_float32(layer: Any) -> None:
        """How much of the layers is float32 and whole as the next one becomes so."""
        whole = [p for other in decoder_layers(models[0]) for p in other.parameters()
                 if p.dim() > 1 and not isinstance(p, DTensor)]  # fmt: skip
        size = sum(p.nbytes for p in whole if p.dtype == torch.float32)
        notes[-1]["whole_float32"] = max(size, notes[-1].get("whole_float32", 0))
        make_float32(layer)

    def noted_spread(strategy: Any, trained: Any) -> None:
        models[:] = [trained.model]
        spread_layers(strategy, trained)

    models: list[Any] = []
    make_float32, sharded.make_float32 = sharded.make_float32, noted_float32
    spread_layers, sharded.Sharded.spread = sharded.Sharded.spread, noted_spread  # type: ignore[method-assign]
    loop.train_step = noted_step
    whole: list[weakref.ref[torch.Tensor]] = []
    full_tensor, dtensors.full_tensor = dtensors.full_tensor, noted_gather
    for name in ("all_gather_single", "all_gather_into_tensor"):  # before and since PyTorch 2.13
        if hasattr(distributed, name):
            setattr(distributed, name, count_gathers(getattr(distributed, name)))
            break
    for run_settings, noted in runs_of_rank(ports, file):
        notes.append(noted)
        if run_settings["output_dir"].endswith("short-ddp-1") and os.environ["RANK"] == "1":
            memory_runs_out_once()
        lighten.train(progress=False, **run_settings)
        notes[-1]["state_at_end"] = sum(len(member.optimizer.state) for member in members)


def in_file(local: torch.Tensor) -> bool:
    return any(local.untyped_storage().data_ptr() in scratch._places for scratch in stores._OPEN)


def memory_runs_out_once() -> None:
    """On this rank, in the midst of its first step."""
    learn = train_step_module.learn

    def fail_once(*args: Any, **options: Any) -> Any:
        train_step_module.learn = learn
        raise MemoryError

    train_step_module.learn = fail_once


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Path:
    """The runs of two ranks and of one process, and what the ranks noted."""
    root = tmp_path_factory.mktemp("strategies")
    save_tiny(root / "base", "qwen2")
    save_tiny(root / "half", "qwen2", dtype=torch.bfloat16)
    runs = [settings(root, chat_file, *run, ranks=2) for run in RUNS]
    started = start_ranks(train_all, runs, root / "runs.json")
    for setup, count in sorted({(setup, count) for setup, _, count in RUNS if setup != "four"}):
        lighten.train(
            progress=False, **settings(root, chat_file, setup, "single", count, ranks=1)
        )  # fmt: skip
    wait_for(started)
    return root


def notes(root: Path, *run: Any) -> list[dict[str, int]]:
    """Of each rank."""
    return notes_of(root / "runs.json", RUNS.index(run))


def assert_equal(run: Run, reference: Run) -> None:
    """Losses, norms before clipping, and what is shipped."""
    for record, reference_record in zip(run.metrics(), reference.metrics(), strict=True):
        keys = ("loss", "grad_norm") if record["kind"] == "train" else ("loss",)
        for key in keys:
            assert record[key] == pytest.approx(reference_record[key], rel=1e-5)
        assert record["supervised_tokens"] == reference_record["supervised_tokens"]
    expected, trained = weights(reference), weights(run)
    assert trained.keys() == expected.keys()
    assert expected
    for key, value in trained.items():
        assert float((value - expected[key]).abs().max()) < 1e-5, key


@pytest.mark.parametrize(("setup", "strategy", "count"), [run for run in RUNS if run[0] != "four"])
def test_trap_3_two_ranks_of_any_strategy_are_one_process(
    root: Path, setup: str, strategy: str, count: int
) -> None:
    run = Run(root / f"{setup}-{strategy}-{count}")
    assert_equal(run, Run(root / f"{setup}-single-{count}"))
    choices = {choice["what"]: choice for choice in run.info()["choices"]}
    assert choices["strategy"]["value"] == strategy
    assert "2 ranks" in choices["strategy"]["reason"]
    gathers = spread.gathers(strategy, full=setup in LEARN_BASE)
    assert (choices["memory"]["value"] == "given back") == gathers


def test_memory_that_runs_out_on_one_rank_makes_all_of_them_try_again(root: Path) -> None:
    run = Run(root / "short-ddp-1")
    (retry,) = run.info()["retries"]
    assert retry["step"] == 1
    assert retry["new_tokens"] == retry["tokens"] // 2
    assert_equal(run, Run(root / "short-single-1"))


def test_a_layer_is_gathered_once_per_pass_for_a_whole_cohort(root: Path) -> None:
    for rank in notes(root, "four", "fsdp", 1):
        assert rank["adapters"] == [4]
        assert rank["gathers"] == 2 * LAYERS  # forward and backward


def test_ranks_hold_what_the_strategy_says(root: Path) -> None:
    layers = decoder_layers(AutoModelForCausalLM.from_pretrained(root / "base"))
    layer_bytes = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    for run in RUNS:
        rank_notes = notes(root, *run)
        if run[1] in ("fsdp", "zero3"):
            assert all(rank["layer_bytes"] < 0.55 * layer_bytes for rank in rank_notes), run
        state = [rank["state"] / rank["learns"] for rank in rank_notes]
        spread = run[1] in ("zero1", "zero2") or run[0] in LEARN_BASE
        assert all(rank["state_at_end"] == 0 for rank in rank_notes), run
        in_files = [rank["layer_bytes_in_files"] for rank in rank_notes]
        if run[0] == "params":
            assert in_files == [layer_bytes // 2] * 2, run
        else:
            assert in_files == [0, 0], run
        # AdamW has two numbers for each that learns, SGD none.
        each = 0.0 if run[0].startswith("sgd") else 2.0
        assert sum(state) == pytest.approx(each * (1 if spread else 2), rel=0.02), run


@pytest.mark.parametrize(("setup", "strategy", "count"), [
    run for run in RUNS if run[0] in LEARN_BASE and spread.gathers(run[1], full=True)
])  # fmt: skip
def test_a_finished_model_is_written_a_weight_at_a_time(
    root: Path, setup: str, strategy: str, count: int
) -> None:
    run = Run(root / f"{setup}-{strategy}-{count}")
    (adapter,) = run.info()["adapters"]
    step = adapter["best_step"] if setup == "full" else adapter["steps"]
    files = (run.folder / "checkpoints" / f"checkpoint-{step}" / "weights").rglob("*.safetensors")
    saved = {key: value for file in files for key, value in load_file(file).items()}
    written = weights(run)
    largest = max(value.nbytes for value in written.values())
    for rank in notes(root, setup, strategy, count):
        assert 0 < rank["whole_bytes"] <= largest
    assert saved
    for key, value in saved.items():
        assert torch.equal(written[f"model/{key}"], value), key
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    for key, value in model.state_dict().items():
        name = "model.embed_tokens.weight" if key == "lm_head.weight" else key  # it is tied
        assert torch.equal(value, written[f"model/{name}"]), key


@pytest.mark.parametrize(("setup", "strategy", "count"), [
    ("full", "fsdp", 3), ("params", "zero3", 1), ("memory", "zero3", 3), ("cohort", "zero1", 1),
])  # fmt: skip
def test_a_checkpoint_of_two_ranks_goes_on_as_one_process(
    root: Path, tmp_path: Path, chat_file: Path, setup: str, strategy: str, count: int
) -> None:
    run = Run(root / f"{setup}-{strategy}-{count}")
    folder = tmp_path / "alone"
    cut_short(run, folder)
    run_settings = settings(root, chat_file, setup, strategy, count, ranks=2)
    run_settings |= {"output_dir": str(folder)}
    lighten.train(progress=False, resume=True, **run_settings)
    assert_equal(Run(folder), run)


def test_trap_36_saved_adapters_are_whole_and_load_in_peft(root: Path) -> None:
    for strategy in ("fsdp", "zero2"):
        folder = root / f"cohort-{strategy}-1" / "adapters" / "slow"
        saved = load_file(folder / "adapter_model.safetensors")
        assert {value.dtype for value in saved.values()} == {torch.float32}
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        live = dict(PeftModel.from_pretrained(base, str(folder)).named_parameters())
        for key, value in saved.items():
            name = key.replace(".weight", ".default.weight")
            assert torch.equal(live[name], value)


def test_layers_are_mapped_in_their_format_until_they_are_spread(
    root: Path, chat_file: Path
) -> None:
    recipe = Recipe.from_values(settings(root, chat_file, "half", "zero3", 1, ranks=2))
    base = load_base(recipe, "cpu", learns=True, layers_later=True)
    trained = what_learns(recipe, base, layers_later=True)
    in_layers = {id(p) for layer in decoder_layers(base.model) for p in layer.parameters()
                 if p.dim() > 1}  # fmt: skip
    for parameter in trained.parameters("default").values():
        later = id(parameter) in in_layers
        assert parameter.dtype == (torch.bfloat16 if later else torch.float32)
    assert base.attention == load_base(recipe, "cpu", learns=True).attention
    assert base.model.dtype == torch.float32


def test_a_frozen_layer_becomes_float32_as_it_is_spread(root: Path, chat_file: Path) -> None:
    for rank in notes(root, "half frozen", "fsdp", 1):
        assert rank["whole_float32"] == 0
    recipe = Recipe.from_values(settings(root, chat_file, "half frozen", "fsdp", 1, ranks=2))
    base = load_base(recipe, "cpu", learns=True, layers_later=True)
    whole = load_base(recipe, "cpu", learns=True)
    assert (base.dtype, base.attention) == (whole.dtype, whole.attention)
    in_layers = {id(p) for layer in decoder_layers(base.model) for p in layer.parameters()
                 if p.dim() > 1}  # fmt: skip
    for key, parameter in base.model.named_parameters():
        later = id(parameter) in in_layers
        assert parameter.dtype == (torch.bfloat16 if later else torch.float32)
        assert torch.equal(parameter.float(), whole.model.get_parameter(key))


def test_constants_are_those_of_a_model_read_in_float32(tmp_path: Path, chat_file: Path) -> None:
    """gemma3 scales its embedding by a constant that it rounds to the format that it is read in."""
    save_tiny(tmp_path / "half", "gemma3_text", dtype=torch.bfloat16)
    recipe = Recipe.from_values(settings(tmp_path, chat_file, "half", "zero3", 1, ranks=2))
    base = load_base(recipe, "cpu", learns=True, layers_later=True)
    whole = load_base(recipe, "cpu", learns=True)
    expected = dict(whole.model.named_buffers())
    assert expected
    for key, buffer in base.model.named_buffers():
        assert buffer.dtype == expected[key].dtype
        assert torch.equal(buffer, expected.pop(key)), key
    assert not expected


def test_a_rank_that_holds_too_much_is_told() -> None:
    full_tensor = torch.zeros(5, 3)
    strategies.require_share("fsdp", "weights", [dtensors.rows_of(full_tensor, 0, 2)], 1)
    with pytest.raises(UserError, match="strategy: fsdp should leave 36 bytes of weights"):
        strategies.require_share("fsdp", "weights", [full_tensor], 2)


@pytest.mark.parametrize(("values", "message"), [
    ({"strategy": "fsdp", "activation_offload": True}, "use gradient_checkpointing"),
    ({"strategy": "zero1", "optim": "adafactor"}, "optim: adafactor needs whole parameters"),
    ({"strategy": "zero2", "method": "full", "torch_compile": True}, "torch_compile: layers are"),
    ({"strategy": "zero3", "workers": 2}, "workers: 2 would gather"),
    ({"strategy": "fsdp", "use_dora": True}, "PEFT's own modules .* need whole weights"),
    ({"strategy": "deepspeed"}, "strategy: 'deepspeed' does not do"),
])  # fmt: skip
def test_what_does_not_combine_is_refused_before_anything_loads(
    values: dict[str, Any], message: str, chat_file: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_values({"model_name_or_path": "x", "dataset": str(chat_file), **values})


def test_rows_of_ranks_are_the_whole() -> None:
    tensor = torch.arange(10.0).reshape(5, 2)
    for count in (1, 2, 3, 7):
        parts = [dtensors.rows_of(tensor, rank, count) for rank in range(count)]
        assert torch.equal(torch.cat(parts), tensor)
