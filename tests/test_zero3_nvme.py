"""The benchmark against DeepSpeed over NVMe: what makes it count, and the adapter of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks import scale_table, streamed_base, zero3_nvme
from benchmarks.streamed_base import Shape

SMALL = Shape(2, 128, 512)
BASE_BYTES = 1000
FORMAT = "bfloat16"


def rows(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Two repeats of all three, with seconds of 2, 8 and 6."""
    return [
        {"who": who, "median_step_s": seconds + 0.5 * repeat, "losses": [2.0, 1.0],
         "peak_bytes": 400, **changes.get(who, {})}
        for repeat in range(2)
        for who, seconds in (("lighten", 2.0), ("deepspeed", 8.0),
                             ("lighten, past the page cache", 6.0))
    ]  # fmt: skip


def test_ratios_are_of_medians_over_repeats() -> None:
    result = zero3_nvme.summary(rows(), BASE_BYTES, FORMAT)
    assert [result[name] for name in zero3_nvme.RATIOS] == [2.25 / 8.25, 6.25 / 8.25]
    assert result["loss_difference"] == 0.0


@pytest.mark.parametrize("changed", [
    {"lighten": {"losses": [2.0, 1.003]}},
    {"lighten, past the page cache": {"losses": [2.0, 1.003]}},
    {"deepspeed": {"peak_bytes": 701}},
])  # fmt: skip
def test_other_losses_and_too_much_memory_give_no_ratio(changed: dict[str, Any]) -> None:
    result = zero3_nvme.summary(rows(**changed), BASE_BYTES, FORMAT)
    assert [result[name] for name in zero3_nvme.RATIOS] == [None, None]


def test_losses_of_float32_have_to_agree_more_closely() -> None:
    nearly = rows(lighten={"losses": [2.0, 1.0001]})
    ratios = {
        dtype: zero3_nvme.summary(nearly, BASE_BYTES, dtype)["streamed_vs_zero3_nvme"]
        for dtype in ("bfloat16", "float32")
    }
    assert ratios == {"bfloat16": 2.25 / 8.25, "float32": None}


def test_the_adapter_is_on_all_linear_layers(tmp_path: Path) -> None:
    folder = streamed_base.write_llama(tmp_path / "llama", SMALL)
    adapter = zero3_nvme.write_adapter(tmp_path / "adapter", SMALL)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    layers = {name for name, module in model.get_base_model().named_modules()
              if isinstance(module, nn.Linear) and "lora_" not in name}  # fmt: skip
    assert len(adapted) == 7 * SMALL.layers == len(layers) - 1  # the head has none
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.abs().max() > 0, name


def test_the_table_s_last_line_has_the_ratios() -> None:
    result = zero3_nvme.summary(rows(), BASE_BYTES, FORMAT)
    line = scale_table.last_line({"nvme": result})
    assert {name: line[name] for name in zero3_nvme.RATIOS} == {
        name: result[name] for name in zero3_nvme.RATIOS
    }
    assert line["streamed_vs_zero3_nvme"] == 2.25 / 8.25
    assert scale_table.last_line({})["streamed_vs_zero3_nvme"] is None
