"""Bases in NF4, FP4 and INT8 from every source: formats, bytes, memory, and what is refused."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lighten import models
from lighten.errors import MissingExtra, UserError
from lighten.models.quantized import Storage, finish
from tests.gguf_files import write_gguf
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model, tiny_tokenizer

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True},
    "nf4, scales quantised too": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
IDS = torch.tensor([[5, 9, 14, 200, 31, 7]])


def linear_paths(model: torch.nn.Module) -> set[str]:
    """Layers that hold a quantised weight."""
    return {path for path, module in model.named_modules() if hasattr(module, "dense_weight")}


@pytest.mark.parametrize("storage", ["nf4, scales quantised too", "int8"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_trap32_the_census_is_what_we_say(arch: str, storage: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / arch, arch)
    base = models.load(str(folder), dtype="bfloat16", **FORMATS[storage])
    plain = models.load(str(folder), dtype="bfloat16")
    assert base.quantization is not None
    assert base.quantization.value == storage
    assert plain.quantization is None
    packed = torch.int8 if storage == "int8" else torch.uint8
    quantized_paths = linear_paths(base.model)
    head = base.model.get_output_embeddings()
    plain_weights = dict(plain.model.named_parameters())
    for name, parameter in base.model.named_parameters():
        if name.removesuffix(".weight") in quantized_paths:
            assert parameter.dtype == packed
        else:  # norms, embeddings, biases and head: not one of them in float32
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, plain_weights[name]), name
        assert not parameter.requires_grad
    # Every linear layer but the head is quantised.
    expected_paths = {
        path
        for path, module in plain.model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and module is not plain.model.get_output_embeddings()
    }
    assert quantized_paths == expected_paths
    assert not hasattr(head, "dense_weight")
    census = models.census(base.model)
    assert census.parameters == sum(p.numel() for p in plain_weights.values())
    assert census.quantized == sum(
        plain_weights[f"{path}.weight"].numel() for path in quantized_paths
    )
    reason = base.quantization.reason
    assert f"{census.quantized / census.parameters:.0%}" in reason
    stacked = sum(p.numel() for name, p in plain_weights.items() if ".experts." in name)
    assert (stacked > 0) == (arch == "mixtral")
    assert census.stacked == stacked
    experts_note = (
        f", {stacked:,} of fused experts, which bitsandbytes has no layer for" if stacked else ""
    )
    assert reason.endswith(f"the rest is dense{experts_note}")
    assert not base.model.training


@pytest.mark.parametrize("storage", FORMATS)
def test_bytes_are_those_of_the_tensors(storage: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama")
    base = models.load(str(folder), dtype="float32", **FORMATS[storage])
    storage_bytes: dict[int, int] = {}
    for key, value in base.model.state_dict().items():
        if not key.endswith((".weight_format", "quant_state.bitsandbytes__nf4",
                             "quant_state.bitsandbytes__fp4")):  # fmt: skip
            storage_bytes[value.data_ptr()] = value.numel() * value.element_size()
    offsets = 4 * len(linear_paths(base.model)) if "scales" in storage else 0
    assert models.census(base.model).weight_bytes == sum(storage_bytes.values()) + offsets
    numbers = models.census(base.model).quantized
    packed_bytes = numbers if storage == "int8" else numbers // 2
    dense = 4 * (models.census(base.model).parameters - numbers)
    assert models.census(base.model).weight_bytes > dense + packed_bytes


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_reading_layer_by_layer_equals_quantising_what_is_loaded(
    arch: str, storage: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / arch, arch)
    streamed = models.load(str(folder), dtype="float32", **FORMATS[storage]).model
    loaded = models.load(str(folder), dtype="float32").model
    storage_type, _, double = storage.partition(",")
    finish(loaded, Storage(storage_type, bool(double)), torch.float32, "cpu")
    assert linear_paths(streamed) == linear_paths(loaded)
    state = streamed.state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(streamed(IDS).logits, loaded(IDS).logits)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_no_file_stays_mapped_once_a_base_is_quantised(storage: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "llama", "llama")
    plain = models.load(str(folder), dtype="float32").model
    assert str(folder) in Path("/proc/self/smaps").read_text(encoding="utf-8"), "what is compared"
    expected = {key: value.clone() for key, value in plain.state_dict().items()}
    del plain
    gc.collect()
    model = models.load(str(folder), dtype="float32", **FORMATS[storage]).model
    assert str(folder) not in Path("/proc/self/smaps").read_text(encoding="utf-8")
    for key in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[key], expected[key]), key
    tied = model.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_gguf_file_is_quantised_too(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "some.gguf", tiny_model("llama"))
    base = models.load(str(path), dtype="float32", **FORMATS[storage])
    assert base.source == "gguf"
    assert base.quantization is not None
    assert base.quantization.value == storage
    assert len(linear_paths(base.model)) == 14


def test_a_hub_model_is_quantised_too(hub_model: str) -> None:
    base = models.load(hub_model, load_in_4bit=True)
    assert base.source == "hub"
    assert len(linear_paths(base.model)) == 14


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder whose files hold 4 bits already, as many on the hub do."""
    folder = save_tiny(tmp_path / "dense", "llama")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "stored")
    tiny_tokenizer().save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


def test_files_that_hold_four_bits_already_load_as_they_are(stored: Path) -> None:
    dense = models.load(
        str(stored.parent / "dense"), dtype="float32", load_in_4bit=True,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    for options in ({}, {"load_in_4bit": True}):
        base = models.load(str(stored), dtype="float32", **options)
        assert base.quantization is not None
        assert base.quantization.value == "nf4, scales quantised too"
        assert len(linear_paths(base.model)) == 14
        assert torch.equal(base.model(IDS).logits, dense.model(IDS).logits)
    assert models.describe(str(stored)).total_parameters == models.census(dense.model).parameters
    with pytest.raises(UserError, match="is quantised already"):
        models.load(str(stored), load_in_8bit=True)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize(("arch", "stored"), [
    ("llama", torch.bfloat16), ("gpt2", torch.bfloat16), ("opt", torch.float16),
])  # fmt: skip
def test_what_a_quantised_folder_holds_dense_comes_in_the_wanted_format(
    arch: str, stored: torch.dtype, storage: str, tmp_path: Path
) -> None:
    """Compared with a dense model of the same numbers: packed ones as bitsandbytes reads them."""
    # Rows of whole blocks: of others bitsandbytes itself gives wrong numbers on processors.
    wide = {"hidden_size": 64, "n_embd": 64, "word_embed_proj_dim": 64}
    save_tiny(tmp_path / "dense", arch, intermediate_size=64, ffn_dim=64, **wide)
    config = BitsAndBytesConfig(
        load_in_4bit=storage == "nf4", load_in_8bit=storage == "int8", bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=stored,
    )  # fmt: skip
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=stored
    )
    small.save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")

    base = models.load(str(tmp_path / "small"), dtype="float32")
    assert base.dtype.value == "float32"
    layers = linear_paths(base.model)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for path in layers if storage == "nf4" else ():
        small.get_submodule(path).weight.quant_state.dtype = torch.float32  # of what is unpacked
    dense = small.dequantize(dtype=torch.float32).state_dict()
    for path in layers:
        if type(expected.get_submodule(path)).__name__ == "Conv1D":
            dense[f"{path}.weight"] = dense[f"{path}.weight"].T
    expected.load_state_dict({key: value.float() for key, value in dense.items()})
    assert layers
    with torch.no_grad():
        ours, theirs = base.model(IDS).logits, expected(IDS).logits
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for name, parameter in base.model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert parameter.dtype == torch.float32, name


def test_both_widths_at_once_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="cannot both be true"):
        models.load(str(tiny_folder), load_in_4bit=True, load_in_8bit=True)


@pytest.mark.usefixtures("without_bitsandbytes")
@pytest.mark.parametrize("setting", ["load_in_4bit", "load_in_8bit", None])
def test_a_missing_bitsandbytes_names_the_extra(
    setting: str | None, stored: Path, tiny_folder: Path
) -> None:
    folder = stored if setting is None else tiny_folder  # stored files ask for it themselves
    options: dict[str, Any] = {} if setting is None else {setting: True}
    with pytest.raises(MissingExtra, match=r"bitsandbytes is not installed.*lighten\[quant\]"):
        models.load(str(folder), **options)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    match = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match is not None
    return int(match[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_real_model_in_nf4_is_small_while_it_loads_and_reads_as_well(
    smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "The Moon is the only natural satellite of the Earth. In 1969, people walked on it for "
        "the first time, and twelve of them have been there since."
    )

    def loss(base: models.Base) -> float:
        ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return float(base.model(input_ids=ids, labels=ids).loss)

    dense = models.load("smollm2-135m", dtype="bfloat16")
    dense_loss = loss(dense)
    del dense
    models.load_tokenizer("smollm2-135m")
    highest, bytes_before = 0, anonymous_bytes()
    plain = bnb.nn.Params4bit.to

    def record_memory(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal highest
        moved = plain(self, *args, **options)
        highest = max(highest, anonymous_bytes() - bytes_before)
        return moved

    monkeypatch.setattr(bnb.nn.Params4bit, "to", record_memory)
    base = models.load("smollm2-135m", dtype="bfloat16", load_in_4bit=True)
    census = models.census(base.model)
    assert (census.parameters, census.quantized) == (134_515_008, 106_168_320)
    # Half a byte a number, a float32 per 64 of them, a table of 16 in each of 210 layers; the rest
    # in bfloat16.
    packed_bytes = census.quantized // 2 + census.quantized // 64 * 4
    dense_bytes = 2 * (census.parameters - census.quantized)
    assert (
        packed_bytes + dense_bytes <= census.weight_bytes <= packed_bytes + dense_bytes + 210 * 64
    )
    # Dense it would be 269 MB in bfloat16 and 538 MB in the file's float32.
    assert highest < census.weight_bytes + 40e6
    assert abs(loss(base) - dense_loss) < 0.3
