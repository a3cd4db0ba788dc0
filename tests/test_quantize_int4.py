"""INT4 on a processor: GPTQ against its definition, and the file against auto-round's own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lighten import models
from lighten.api import plan_formats
from lighten.quantization import calibrated, gptq
from lighten.quantization.calibrated import quantised_layers, rounded_layers
from lighten.quantization.verify import InTransformers
from lighten.quantization.weights import make
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("auto_round")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tied"
    llama = tiny_model("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128,
                       num_hidden_layers=1, tie_word_embeddings=True)  # fmt: skip
    llama.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def layer(seed: int = 0, rows: int = 256) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that go together as activations do."""
    torch.manual_seed(seed)
    inputs = torch.randn(rows, 16) @ torch.randn(16, 64) + 0.1 * torch.randn(rows, 64)
    inputs[:, 3] *= 20  # an outlier column
    return torch.randn(24, 64), inputs


def dense(integers: Tensor, scales: Tensor) -> Tensor:
    size = integers.shape[1] // scales.shape[1]
    return (integers.float().unflatten(1, (-1, size)) * scales[..., None]).flatten(1)


def error(rounded: Tensor, weight: Tensor, x: Tensor) -> float:
    return float((x @ (rounded - weight).T).pow(2).sum())


def one_by_one(weight: Tensor, moments: Tensor, scales: Tensor, size: int) -> Tensor:
    """GPTQ as optimal brain surgeon says it, in float64: a column, then the exact best rest."""
    H = moments.double().clone()
    H.diagonal().add_(gptq.DAMPING * H.diagonal().mean())
    order = torch.argsort(moments.diagonal(), descending=True, stable=True).tolist()
    remaining, integers = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for place, column in enumerate(order):
        later = order[place + 1 :]
        scale = scales[:, column // size].double()
        integers[:, column] = (remaining[:, column] / scale).round().clamp(-8, 7)
        errors = remaining[:, column] - integers[:, column] * scale
        if later:  # least squares over the columns that are still free
            coefficients = torch.linalg.solve(H[later][:, later], H[later][:, [column]])
            remaining[:, later] += errors[:, None] * coefficients.T
    return integers


def test_each_column_is_made_up_for_by_the_rest() -> None:
    weight, x = layer()
    integers, scales = gptq.rounded(weight, x.T @ x, 32)
    expected = one_by_one(weight, x.T @ x, scales, 32)
    # Ties in float32 may fall the other way, and what follows them with it.
    assert (integers != expected).float().mean() < 0.01
    plain = dense(*gptq.rounded_plainly(weight, 32))
    assert error(dense(integers, scales), weight, x) < 0.3 * error(plain, weight, x)


def test_searched_scales_are_never_worse_than_the_plain_ones() -> None:
    weight, x = layer(1)
    importance = (x * x).sum(0)
    weighted = []
    for scales in (gptq.searched_scales(weight, 32, importance), gptq.plain_scales(weight, 32)):
        groups = weight.unflatten(1, (-1, 32))
        integers = (groups / scales[..., None]).round().clamp(-8, 7)
        errors = ((integers * scales[..., None] - groups).flatten(1).pow(2) * importance).sum(1)
        weighted.append(errors)
    assert (weighted[0] <= weighted[1]).all()
    assert weighted[0].sum() < weighted[1].sum()


def test_inputs_that_are_all_alike_or_none_still_round() -> None:
    weight, x = layer(2, rows=2)
    for moments in (x.T @ x, torch.zeros(64, 64)):
        integers, scales = gptq.rounded(weight, moments, 32)
        assert integers.abs().max() <= 8
        assert scales.isfinite().all()


def test_plain_rounding_is_auto_rounds_own_file(model: Path, tmp_path: Path) -> None:
    """Tensor by tensor: the layout that its loader and vLLM read is the one it writes."""
    from auto_round import AutoRound

    make("int4:rounded", model, tmp_path, [])
    logging.getLogger("autoround").setLevel(logging.ERROR)
    theirs = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tiny_tokenizer(),
        scheme={"bits": 4, "group_size": 64, "sym": True, "data_type": "int", "act_bits": 16},
        iters=0, nsamples=1, seqlen=32, dataset=[torch.full((1, 32), 5)], device_map="cpu",
        enable_torch_compile=False, amp=False, disable_opt_rtn=True,
    )  # fmt: skip
    theirs.quantize_and_save(str(tmp_path / "theirs"), format="auto_round")
    file = next((tmp_path / "theirs").rglob("*.safetensors"))
    ours, expected = load_file(tmp_path / "model.safetensors"), load_file(file)
    assert set(ours) == set(expected)
    for name, value in expected.items():
        if name.endswith(".qzeros"):
            assert torch.equal(ours[name], value), name
        elif name.endswith((".qweight", ".scales")):
            # Where a group's largest and smallest are opposite, its sign is anybody's.
            assert (ours[name] != value).float().mean() < 0.05, name
        else:
            torch.testing.assert_close(ours[name].float(), value.float(), rtol=1e-2, atol=0)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    reference = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
    for key in ("bits", "group_size", "sym", "packing_format", "quant_method", "data_type"):
        assert config["quantization_config"][key] == reference["quantization_config"][key], key


def test_a_calibrated_folder_loads_and_is_nearer_than_plain_rounding(
    model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    rows = torch.randint(5, 300, (60, 48)).tolist()
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.randint(5, 300, (4, 48))
    divergence: dict[str, float] = {}
    sizes: dict[str, int] = {}
    with torch.no_grad():
        original_log_probs = torch.log_softmax(original(ids).logits, -1)
        for format_name in ("int4:rounded", "int4"):
            folder = tmp_path / format_name.replace(":", "-")
            folder.mkdir()
            make(format_name, model, folder, rows)
            sizes[format_name] = (folder / "model.safetensors").stat().st_size
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            loaded_log_probs = torch.log_softmax(loaded(ids).logits.float(), -1)
            divergence[format_name] = float(
                (original_log_probs.exp() * (original_log_probs - loaded_log_probs)).sum(-1).mean()
            )
    assert divergence["int4"] < 0.8 * divergence["int4:rounded"]
    assert sizes["int4"] == sizes["int4:rounded"]


@pytest.mark.parametrize("format_name", ["int4:rounded", "int4"])
def test_layers_that_its_products_do_not_take_stay_in_16_bits(
    format_name: str, tmp_path: Path
) -> None:
    """Falcon-H1's `in_proj` has a number of outputs that 32 does not divide."""
    folder, out = tmp_path / "model", tmp_path / "out"
    out.mkdir()
    model = tiny_model("falcon_h1", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = torch.randint(5, 300, (4, 24)).tolist()
    (planned,) = plan_formats(str(folder), format_name).formats
    make(format_name, folder, out, rows)
    layers = quantised_layers(model)
    kept = {p for p, layer in layers.items() if layer.in_features % 32 or layer.out_features % 32}
    assert kept
    assert f"{len(kept)} linear layers of {len(layers)}" in planned.note
    size = (out / "model.safetensors").stat().st_size
    assert size == pytest.approx(planned.file_bytes, rel=0.01)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for path in layers:
        module = loaded.get_submodule(path)
        assert (type(module) is torch.nn.Linear) == (path in kept), path
    for path in kept:
        assert torch.equal(loaded.get_submodule(path).weight, layers[path].weight)


def test_calibration_calls_layers_as_their_model_does() -> None:
    """Gemma 3n gives what belongs to a layer by its place among the arguments."""
    model = tiny_model("gemma3n_text")
    rounded = rounded_layers(model, torch.randint(5, 300, (2, 24)).tolist(), lambda _: 2)
    assert rounded.keys() == quantised_layers(model).keys()


def test_layers_of_several_kinds_get_their_own_masks() -> None:
    """Gemma's layers are called with one of two masks; the first layer's would be wrong."""
    model = tiny_model("gemma3_text", hidden_size=64, intermediate_size=128)
    layers = model.model.layers
    states, calls = calibrated._inputs(model, layers, [list(range(5, 40))])
    with torch.no_grad():
        out = states[0]
        for number, decoder_layer in enumerate(layers):
            out = calibrated._first(decoder_layer(out, **calls[0][number]))
        expected = model.model(torch.arange(5, 40)[None]).last_hidden_state
        torch.testing.assert_close(model.model.norm(out), expected)


@pytest.mark.parametrize("by", ["loading", "a receipt"])
def test_a_folder_that_is_wanted_in_float32_is_computed_with_in_it(
    by: str, model: Path, tmp_path: Path
) -> None:
    """auto-round makes float16 of it, in which weights above 65,504 are infinite."""
    make("int4:rounded", model, tmp_path, [])
    tiny_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] *= 2**20
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = {key: value.float() for key, value in tensors.items() if key.endswith(".weight")}
    for key, words in tensors.items():
        path, _, kind = key.rpartition(".")
        if kind == "qweight":
            nibbles = words[:, None] >> torch.arange(0, 32, 4)[None, :, None] & 15
            integers = nibbles.flatten(0, 1).T - 8
            weights[f"{path}.weight"] = dense(integers, tensors[f"{path}.scales"].float().T)
    expected.load_state_dict(weights, strict=False)
    if by == "loading":
        base = models.load(str(tmp_path), dtype="float32")
        assert base.dtype.value == "float32"
        loaded: Any = base.model
    else:
        loaded = InTransformers(tmp_path).model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    positions = loaded.model.rotary_emb.inv_freq
    assert torch.equal(positions, expected.model.rotary_emb.inv_freq)
    ids = torch.tensor([[5, 9, 7, 14, 200, 31, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-3)
