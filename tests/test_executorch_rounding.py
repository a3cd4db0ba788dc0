"""How a program for a phone is rounded, before it is lowered: bits, scales and what is lost."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighten
from lighten.adapters.fake_quant import fake_layers, fake_quantise, really_quantised
from lighten.artifacts import open_source
from lighten.models.known import shape_of
from lighten.quantization.executorch import program_rounding
from lighten.quantization.executorch_rounding import (
    ProgramRounding,
    _round_layer,
    write_rounded,
)
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


def test_scales_are_xnnpack_s_where_no_data_choose_them_and_integers_stay() -> None:
    """Those of torchao are float32: the program computed with others than its receipt."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    plain = model(hidden_size=64, intermediate_size=96)
    layer = copy.deepcopy(plain.model.layers[0].mlp.down_proj)
    quantize_(layer, Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    ))  # fmt: skip
    ProgramRounding(32).apply(plain)
    weight, learnt = plain.model.layers[0].mlp.down_proj.weight, layer.weight
    assert torch.equal(weight.qdata, learnt.qdata)
    assert not torch.equal(weight.scale, learnt.scale)
    assert torch.equal(weight.scale, learnt.scale.bfloat16().float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_integers_are_those_that_a_run_in_16_bits_learnt(dtype: str) -> None:
    """From float32 some numbers go to the other side of a step."""
    plain = model(hidden_size=64, intermediate_size=96)
    learnt = copy.deepcopy(plain)
    fake_quantise(learnt, 32, computes=getattr(torch, dtype))
    layers = {path: really_quantised(layer).weight for path, layer in fake_layers(learnt).items()}
    assert len(layers) == 14
    others = copy.deepcopy(plain)
    ProgramRounding(32).apply(others)
    ProgramRounding(32, learnt_in=dtype).apply(plain)
    differ = 0
    for path, weight in layers.items():
        rounded: Any = plain.get_submodule(path).weight
        assert torch.equal(rounded.qdata, weight.qdata)
        assert torch.equal(rounded.scale, weight.scale.bfloat16().float())
        differ += int((others.get_submodule(path).weight.qdata != weight.qdata).sum())
    assert differ > 100
    assert all(score.isfinite().all() for score in [scores(plain, ROWS[0])])


@pytest.mark.parametrize("rows", [None, ROWS[:2]])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_handed_on_are_those_that_were_chosen(
    kind: str, rows: list[list[int]] | None, tmp_path: Path
) -> None:
    """Bit for bit, onto a model of another training: nothing is chosen by what it computes."""
    wide: dict[str, Any] = {"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64}
    chosen, given = model(kind, **wide), model(kind, **wide)
    with torch.no_grad():
        for name, parameter in given.named_parameters():
            if parameter.ndim == 2 and "wpe" not in name:  # GPT-2's positions are not rounded
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    rounding = ProgramRounding(32, rows)
    notes = rounding.apply(chosen)
    write_rounded(chosen, tmp_path / "rounded.safetensors")
    assert rounding.apply(given, tmp_path / "rounded.safetensors") == notes
    for row in ROWS[:2]:
        assert torch.equal(scores(chosen, row), scores(given, row))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="the extra phone is not installed"
)
@pytest.mark.filterwarnings("ignore")  # ExecuTorch calls what others call outdated
def test_a_layer_computes_as_in_xnnpack(tmp_path: Path) -> None:
    """The real runtime: with scales in float32 no row was as there.

    A row in a thousand has an input that falls to the other side of a step, where the two round a
    scale of activations to another last bit.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
    )
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    torch.manual_seed(0)
    layer = nn.Linear(576, 64)
    rounded = nn.Sequential(layer).eval()
    _round_layer(layer, 32)
    x = torch.randn(256, 576) * torch.rand(256, 1) * 3 + torch.randn(256, 1)
    x[5], x[6], x[7] = x[5].abs(), -x[6].abs(), torch.zeros(576)
    with torch.no_grad():
        traced = torch.export.export(rounded, (x,), strict=False)
    lowered = to_edge_transform_and_lower(
        traced, partitioner=[XnnpackDynamicallyQuantizedPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    ).to_executorch()  # fmt: skip
    file = tmp_path / "layer.pte"
    file.write_bytes(bytes(lowered.buffer))
    program = Runtime.get().load_program(file)
    (told,) = program.load_method("forward").execute([x])
    with torch.no_grad():
        apart = (rounded(x) - told).abs().amax(-1)
    assert int((apart < 2e-6 * told.abs().max()).sum()) >= 250


def test_the_page_counts_keys_and_values_once() -> None:
    known_shape = shape_of("SmolLM2-135M")
    assert known_shape is not None
    config = known_shape[0].config
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    head = config["hidden_size"] // heads
    numbers = 2 * layers * config["num_key_value_heads"] * head
    page = (Path(__file__).parent.parent / "docs" / "phone.md").read_text(encoding="utf-8")
    words = " ".join(page.split())
    assert (
        f"{numbers:,} numbers a token, in float32 {4 * numbers / 1e3:.0f} KB, "
        f"{4 * numbers * 512 / 1e6:.0f} MB for 512"
    ) in words


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
    (dtype,) = (c["value"] for c in learnt.info()["choices"] if c["what"] == "dtype")
    assert (rounding, notes) == (ProgramRounding(64, None, dtype), [])
    assert recorded == {"group_size": 64, "calibration": None, "learnt_in": dtype}

    rows.unlink()
    rounding, recorded, notes = program_rounding(open_source(run))
    assert rounding.calibration is None
    assert "rounded to their nearest" in notes[0]
    assert "rows.jsonl" in notes[0]
    assert "no run says" in program_rounding(open_source(str(base)))[2][0]
