"""Tensors of safetensors files that are read a few pages at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lighten.parallel.streamed import build as building
from lighten.parallel.streamed.shards import Shards
from tests.mapped_files import resident_bytes
from tests.tiny import tiny_model


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_no_page_of_a_file_stays_once_small_tensors_were_read(tmp_path: Path) -> None:
    """Linux maps the pages around one that is looked at: of many norms that was megabytes."""
    file = tmp_path / "model.safetensors"
    tensors = {f"{n} {kind}": torch.ones(size) for n in range(8)
               for kind, size in (("a weight", 2**18), ("norm", 64))}  # fmt: skip
    save_file(tensors, file)
    shards = Shards.of(tmp_path)
    for name, value in tensors.items():
        if name.endswith("norm"):
            read = torch.empty_like(value)
            shards.read(name, read)
            assert torch.equal(read, value)
    assert resident_bytes(file) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_an_embedding_that_were_looked_up_do_not_stay(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer Linux maps up to 2 MiB around each of them: of 64 words that was the embedding."""
    monkeypatch.setattr(building, "LEFT_IN_FILE_BYTES", 1024)
    model = tiny_model("llama", tie_word_embeddings=tied, vocab_size=16384)
    model.save_pretrained(tmp_path)
    built = building.build("tiny", tmp_path, torch.float32, device="cpu").model
    (file,) = tmp_path.glob("*.safetensors")
    embedding = model.get_input_embeddings()
    words = torch.arange(0, model.config.vocab_size, 16)  # in each of its pages
    assert torch.equal(built.get_input_embeddings()(words), embedding(words))
    share = resident_bytes(file) / embedding.weight.nbytes
    # The head needs it whole; of other tensors, what lies about the embedding's ends may stay.
    assert share >= 1 if tied else share < 0.5
