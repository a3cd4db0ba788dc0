"""What a run has shipped, and a run as a kill leaves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, equal

from lighten.runs import Run
from lighten.training import checkpoints


def weights(run: Run) -> dict[str, Tensor]:
    """Of its adapters, or of its model, each behind the name of its folder."""
    files = sorted(run.folder.glob("adapters/*/adapter_model.safetensors"))
    files += sorted(run.folder.glob("model/*.safetensors"))
    return {f"{file.parent.name}/{key}": value
            for file in files for key, value in load_file(file).items()}  # fmt: skip


def same_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether they have the same names and are the same, bit for bit."""
    return set(tensors) == set(expected) and all(equal(tensors[k], expected[k]) for k in expected)


def assert_equal(run: Run, reference: Run) -> None:
    """Losses, held-out ones among them, norms before clipping, and what is shipped."""
    for record, reference_record in zip(run.metrics(), reference.metrics(), strict=True):
        keys = ("loss", "grad_norm") if record["kind"] == "train" else ("loss",)
        for key in keys:
            assert record[key] == pytest.approx(reference_record[key], rel=1e-5)
    expected, trained = weights(reference), weights(run)
    assert trained.keys() == expected.keys()
    assert expected
    for key, value in trained.items():
        assert float((value - expected[key]).abs().max()) < 1e-5, key


def losses(run: Run) -> list[tuple[Any, ...]]:
    """Of each line of its metrics, with what it is of."""
    return [(m["kind"], m["step"], m["adapter"], m["loss"]) for m in run.metrics()]


def cut_short(run: Run, folder: Path, keep: slice = slice(1)) -> Run:
    """A copy of a run that is not finished, with some of its checkpoints: only its first one."""
    shutil.copytree(run.folder, folder)
    written = checkpoints.listing(folder / "checkpoints")
    for checkpoint in set(written) - set(written[keep]):
        shutil.rmtree(checkpoint)
    for result in ("adapters", "model"):
        shutil.rmtree(folder / result, ignore_errors=True)
    (folder / "run.json").write_text(json.dumps({**run.info(), "status": "interrupted"}))
    return Run(folder)
