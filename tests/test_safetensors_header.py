"""Headers of safetensors files: as the library reads them, and one sentence for a torn file."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.errors import UserError
from lighten.parallel.streamed.shards import Shards
from lighten.peft_config import tensor_shapes
from lighten.quantization.gguf_source import read_weights
from lighten.safetensors_header import read_header

READERS: dict[str, Callable[[Path], Any]] = {
    "a streamed base": lambda path: Shards.of(path.parent),
    "an export": lambda path: read_weights(path.parent),
    "an adapter": tensor_shapes,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {
        "matrix": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "vector": torch.arange(5, dtype=torch.float32),
        "number": torch.tensor(7, dtype=torch.uint8),
    }  # fmt: skip
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_every_tensor_is_where_the_library_finds_it(file: Path) -> None:
    content, stored = file.read_bytes(), read_header(file)
    tensors = load_file(file)
    assert {name: tensor.kind for name, tensor in stored.items()} == {
        "matrix": "BF16", "vector": "F32", "number": "U8",
    }  # fmt: skip
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        place = stored[name]
        assert place.shape == tuple(tensor.shape)
        data = content[place.start : place.start + place.bytes]
        read = torch.frombuffer(bytearray(data), dtype=tensor.dtype)
        assert torch.equal(read.view(tensor.shape), tensor)


@pytest.mark.parametrize("reader", READERS)
def test_a_torn_file_is_one_sentence_wherever_it_is_read(file: Path, reader: str) -> None:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    torn = {
        "its header is torn": [
            b"", content[:5], content[:40], b"\xff" * 8 + content[8:],
            content[:8] + b"[" + content[9:], struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 10) + b'{"a": [1]}', struct.pack("<Q", 9) + b'{"a": {}}',
        ],
        r"it ends before \w+": [content[:-1], content[: 8 + length]],
        "it goes on after its last tensor": [content + b"\0", content + content],
    }  # fmt: skip
    for problem, contents in torn.items():
        for broken in contents:
            file.write_bytes(broken)
            with pytest.raises(UserError) as caught:
                READERS[reader](file)
            start = re.escape(f"{file} is not a whole safetensors file: ")
            expected = f"{start}{problem}; fetch or copy it anew"
            assert re.fullmatch(expected, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("reader", [Shards.of, read_weights])
def test_an_index_of_an_earlier_save_is_passed_over_as_transformers_does(
    tmp_path: Path, reader: Callable[[Path], Any]
) -> None:
    """`save_pretrained` leaves it where a model of several files was, and writes one file."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.tiny import VOCAB

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    kept = index.read_bytes()
    assert reader(tmp_path).keys() == model.state_dict().keys()
    model.save_pretrained(tmp_path)
    index.write_bytes(kept)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reader(tmp_path).keys() == model.state_dict().keys()
