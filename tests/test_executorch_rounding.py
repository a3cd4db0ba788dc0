"""How a program for a phone is rounded, before it is lowered: bits, scales and what is lost."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighten
from lighten.artifacts import open_source
from lighten.quantization.executorch import program_rounding
from lighten.quantization.executorch_rounding import ProgramRounding
from tests.tiny import save_tiny, tiny_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="the extra phone is not installed"
)
ROWS = [torch.randint(5, 200, (96,), generator=torch.Generator().manual_seed(row)).tolist()
        for row in range(6)]  # fmt: skip


def model(kind: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    return tiny_model(kind, **changes).float().eval()


def scores(model: Any, row: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].log_softmax(-1)


def divergence(plain: Any, rounded: Any) -> float:
    """Mean KL divergence over all tokens, nats."""
    pairs = [(scores(plain, row), scores(rounded, row)) for row in ROWS]
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3_text", "phi3"])
def test_layers_have_4_bits_and_head_and_words_8(kind: str) -> None:
    wide: dict[str, Any] = {"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64}
    rounded = model(kind, **wide, **({} if kind == "gpt2" else {"intermediate_size": 96}))
    ProgramRounding(32, ROWS[:2]).apply(rounded)
    head = rounded.get_output_embeddings()
    layers = [layer for layer in rounded.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) > 4
    for layer in layers:
        weight: Any = layer.weight
        bits = 8 if layer is head else 4
        assert weight.target_dtype == getattr(torch, f"int{bits}")
        low, high = int(weight.qdata.amin()), int(weight.qdata.amax())
        assert -(2 ** (bits - 1)) <= low < high < 2 ** (bits - 1)
        assert weight.activation_quantization is not None
        if layer is not head:
            assert weight.block_size == (1, 32)
            assert (weight.scale > 0).all()
            # XNNPACK's scales are bfloat16: others would be rounded once more on the phone.
            assert torch.equal(weight.scale, weight.scale.bfloat16().float())
    assert rounded.get_input_embeddings().weight.target_dtype == torch.int8


def test_rounding_by_data_loses_less_than_to_the_nearest() -> None:
    plain, nearest, calibrated = (model(hidden_size=128, intermediate_size=128) for _ in range(3))
    assert ProgramRounding(32).apply(nearest) == []
    assert ProgramRounding(32, ROWS[:4]).apply(calibrated) == []
    assert divergence(plain, calibrated) < 0.7 * divergence(plain, nearest)


def test_rows_that_no_group_divides_have_8_bits_and_are_told() -> None:
    odd = model(intermediate_size=72)
    (note,) = ProgramRounding(64, ROWS[:2]).apply(odd)
    assert "linear layers have 8-bit weights" in note
    down = odd.model.layers[0].mlp.down_proj.weight
    assert (down.target_dtype, down.block_size) == (torch.int8, (1, 72))


def test_smaller_groups_are_taken_where_the_trained_ones_do_not_fit() -> None:
    mixed = model(hidden_size=96, intermediate_size=128)
    assert ProgramRounding(64).apply(mixed) == []
    layer = mixed.model.layers[0].mlp
    assert layer.up_proj.weight.block_size == (1, 32)
    assert layer.down_proj.weight.block_size == (1, 64)


def test_a_run_is_rounded_on_its_data_and_a_qat_run_as_it_learnt(
    tmp_path: Path, chat_file: Path
) -> None:
    base = save_tiny(tmp_path / "base", hidden_size=64, intermediate_size=128)
    rows = shutil.copyfile(chat_file, tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {
        "model_name_or_path": str(base), "dataset": str(rows), "max_steps": 1, "lora_r": 2,
        "progress": False, "planned": False,
    }  # fmt: skip
    run = lighten.train(**settings, output_dir=str(tmp_path / "run"))
    rounding, recorded, notes = program_rounding(open_source(run))
    assert notes == []
    assert rounding.calibration is not None
    assert recorded["calibration"]["rows"] == len(rounding.calibration)
    assert program_rounding(open_source(run))[1] == recorded  # the same rows every time

    learnt = lighten.train(
        **settings, output_dir=str(tmp_path / "qat"),
        qat="int8-dynamic-act-int4-weight", qat_group_size=64,
    )  # fmt: skip
    rounding, recorded, notes = program_rounding(open_source(learnt))
    assert (rounding, notes) == (ProgramRounding(64, None), [])
    assert recorded == {"group_size": 64, "calibration": None}

    rows.unlink()
    rounding, recorded, notes = program_rounding(open_source(run))
    assert rounding.calibration is None
    assert "rounded to their nearest" in notes[0]
    assert "rows.jsonl" in notes[0]
    assert "no run says" in program_rounding(open_source(str(base)))[2][0]
