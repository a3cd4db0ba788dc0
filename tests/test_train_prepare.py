"""What is chosen before the first step: packing, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.data.batches import MicroBatch
from lighten.engine.batching import choose_packing, choose_tokens
from lighten.errors import UserError
from lighten.machine import hardware
from lighten.models import attention
from lighten.training import loop
from tests.tiny import tiny_model


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_trap21_attention_that_looks_across_rows_is_never_packed(name: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(name)
    assert name not in attention.PACKS
    for packing in ("auto", False):
        assert choose_packing(packing, model).value == "off"
    with pytest.raises(UserError, match=f"packing: {name} attention would let rows look") as said:
        choose_packing(True, model)
    assert ("one of flash_attention_2, flash_attention_3, sdpa" in str(said.value)) == (
        name == "eager"
    )


def test_attention_is_called_by_its_setting_s_name() -> None:
    model = tiny_model("llama")
    for name, on in ((attention.NAME, "on"), (attention.REPEATS, "off")):
        model.config._attn_implementation = name
        choice = choose_packing("auto", model)
        assert choice.value == on
        assert choice.reason.startswith("sdpa attention ")


def test_trap21_our_own_attention_is_packed_unless_something_hinders_it() -> None:
    attention.register()
    model = tiny_model("llama")
    model.set_attn_implementation(attention.NAME)
    assert choose_packing("auto", model).value == "on"
    assert choose_packing(False, model).value == "off"
    assert choose_packing("auto", model, "a prompt stands in front").value == "off"
    with pytest.raises(UserError, match="packing: a prompt stands in front"):
        choose_packing(True, model, "a prompt stands in front")


@pytest.mark.parametrize("arch", ["falcon_h1", "lfm2"])
def test_trap21_rows_are_never_packed_where_layers_carry_a_state(arch: str) -> None:
    """In bfloat16 the loss of the first batch need not tell."""
    attention.register()
    model = tiny_model(arch)
    model.set_attn_implementation(attention.NAME)
    choice = choose_packing("auto", model)
    assert choice.value == "off"
    assert "carry a state from one row to the next" in choice.reason
    with pytest.raises(UserError, match="carry a state"):
        choose_packing(True, model)


def test_trap23_a_packed_run_has_the_same_steps_of_the_same_tokens(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    def steps(packing: bool) -> list[tuple[int, int, int]]:
        run = lighten.train(
            model=str(tiny_folder), dataset=str(chat_file), output_dir=str(tmp_path / str(packing)),
            packing=packing, per_device_train_batch_size=3, gradient_accumulation_steps=2,
            val_size=0, dtype="float32", progress=False,
        )  # fmt: skip
        choices = {choice["what"]: choice["value"] for choice in run.info()["choices"]}
        assert choices["packing"] == ("on" if packing else "off")
        return [(m["step"], m["tokens"], m["supervised_tokens"]) for m in run.metrics()]

    packed = steps(True)
    assert packed == steps(False)
    assert len(packed) == 7  # 40 rows, six a step
    assert all(tokens > supervised > 0 for _, tokens, supervised in packed)


@pytest.mark.parametrize(
    ("flags", "dtype", "tokens"),
    [({"amx_bf16"}, "bfloat16", 1536), ({"amx_bf16"}, "float32", 1024), (set(), "bfloat16", 1024)],
)
def test_a_micro_batch_fills_the_products_of_its_format(
    flags: set[str], dtype: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "processor_flags", lambda: frozenset(flags))
    assert choose_tokens("auto", "cpu", dtype)[0] == tokens
    assert choose_tokens(77, "cpu", dtype)[0] == 77
    assert choose_tokens(None, "cpu", dtype)[0] is None
    assert choose_tokens("auto", "cuda", dtype)[0] is None


def test_one_process_fills_micro_batches_as_one_process_whatever_its_strategy(
    tiny_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows in a micro-batch save gathering a layer, and here none is gathered."""
    sizes: list[int] = []
    train_step = loop.train_step

    def noted(batches: Sequence[MicroBatch], *args: Any, **options: Any) -> Any:
        sizes.extend(len(batch.items) for batch in batches)
        return train_step(batches, *args, **options)

    monkeypatch.setattr(loop, "train_step", noted)
    filled = {}
    for strategy in ("single", "zero3", "fsdp"):
        lighten.train(
            model=str(tiny_folder), dataset=str(chat_file), output_dir=str(tmp_path / strategy),
            strategy=strategy, lora_r=[1, 2, 3], max_steps=1, per_device_train_batch_size=2,
            packing=False, val_size=0, dtype="float32", progress=False,
        )  # fmt: skip
        filled[strategy] = sizes.copy()
        sizes.clear()
    assert filled["zero3"] == filled["fsdp"] == filled["single"] == [2, 2, 2]
