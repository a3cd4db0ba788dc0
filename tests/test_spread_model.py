"""The finished model written weight by weight: the files that `save_pretrained` writes of it whole.

Between ranks it is tested in `test_strategies.py`.
"""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.adapters import WholeBase
from lighten.errors import DiskFull
from lighten.training.spread_model import SpreadModel
from lighten.whole_files import whole_folder
from tests.tiny import save_tiny


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def trained(folder: Path, dtype: torch.dtype, last: int | None = None) -> WholeBase:
    """A base in the middle of its training: float32, and no longer what the files hold."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    whole = WholeBase(model, dtype=dtype, last=last)
    draw = torch.Generator().manual_seed(0)
    for parameter in whole.parameters("default").values():
        parameter.data.add_(torch.empty_like(parameter).normal_(std=0.01, generator=draw))
    return whole


@pytest.mark.parametrize(("architecture", "dtype", "shard_size", "last"), [
    ("qwen2", torch.float32, "5GB", None),  # with a tied head
    ("qwen2", torch.bfloat16, "20KB", None),
    ("llama", torch.bfloat16, "5GB", 1),
    ("mixtral", torch.bfloat16, "30KB", None),  # its experts are one tensor in memory
    ("glm4_moe", torch.bfloat16, "5GB", None),  # its routers are float32
])  # fmt: skip
def test_the_files_are_those_of_a_model_written_whole(
    tmp_path: Path, architecture: str, dtype: torch.dtype, shard_size: str, last: int | None
) -> None:
    base = save_tiny(tmp_path / "base", architecture, num_hidden_layers=3)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    calls: list[int] = []
    whole = trained(base, dtype, last)
    model = SpreadModel(whole.model, whole.format_of, shard_size, lambda: calls.append(1))
    model.write(ours)
    trained(base, dtype, last).fuse("default").save_pretrained(theirs, max_shard_size=shard_size)
    expected = written(theirs)
    assert written(ours) == expected
    assert ("model.safetensors.index.json" in expected) == (shard_size != "5GB")
    assert len(calls) < 2 * len(model._weights)
    loaded, reference = map(AutoModelForCausalLM.from_pretrained, (ours, theirs))
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids).logits, reference(ids).logits)


def test_a_full_disk_leaves_the_older_model(tmp_path: Path) -> None:
    """A limit on a file's size ends the writing of the weights in the middle."""
    base = save_tiny(tmp_path / "base", "llama")
    whole = trained(base, torch.float32)
    model = SpreadModel(whole.model, whole.format_of, "5GB", lambda: None)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "older").touch()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(DiskFull, match="the disk is full"), whole_folder(folder) as partial:
            model.write(partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.glob("**/older")] == ["older"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]
