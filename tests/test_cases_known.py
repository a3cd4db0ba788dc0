"""Known shapes: a plan of a well-known model without a file of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lighten import api
from lighten.errors import UserError
from lighten.models import known
from lighten.models.configuration import build_empty, read_config
from lighten.models.load import locate
from lighten.models.names import public_name, resolve


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("shape", known.SHAPES, ids=lambda shape: shape.hub_id)
def test_a_shape_has_the_published_parameters(shape: known.Shape) -> None:
    model = build_empty(shape.hub_id, read_config(known.folder_of(shape)))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert count == pytest.approx(shape.parameters, rel=0.006)  # published to three digits


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [("llama-3.1-8b", "meta-llama/Llama-3.1-8B"), ("Qwen3-32B", "Qwen/Qwen3-32B"),
     ("META-LLAMA/llama-3.2-1b-INSTRUCT", "meta-llama/Llama-3.2-1B-Instruct"),
     ("gemma-2-9b-it", "google/gemma-2-9b-it"), ("gemma-3-12b-it", "google/gemma-3-12b-it"),
     ("exaone-4.0-1.2b", "LGAI-EXAONE/EXAONE-4.0-1.2B"), ("SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B"),
     ("phi-4-mini-instruct", "microsoft/Phi-4-mini-instruct")],
)  # fmt: skip
def test_names_in_any_case_and_short(name: str, hub_id: str) -> None:
    match = known.shape_of(name)
    assert match is not None
    assert match[1] == hub_id
    source, folder = locate(name, weights=False)
    assert source == "known"
    assert json.loads((folder / "config.json").read_text()) == match[0].config
    if "/" not in name:
        assert public_name(name) == hub_id


def test_near_names_weights_and_folders(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"did you mean llama-3\.1-8b"):
        resolve("lama-3.1-8b")
    with pytest.raises(UserError, match=r"did you mean exaone-4\.0"):
        resolve("EXAONE")
    with pytest.raises(UserError, match=r"did you mean gemma-3-4b"):
        resolve("gemma-3-4b")
    assert resolve("gpt2") == ("hub", None)
    with pytest.raises(UserError, match="not on this machine"):
        locate("llama-3.1-8b")  # a plan needs no weights, training does
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "llama-3.1-8b")
    assert locate("llama-3.1-8b", weights=False)[0] == "folder"


def test_what_is_downloaded_are_the_files_whatever_becomes_of_them() -> None:
    for settings in ({}, {"load_in_4bit": True}, {"dtype": "float32"}, {"method": "full"}):
        plan = api.plan(model="llama-3.2-1b", device="t4", changes=False, max_length=64, **settings)
        assert plan.download_bytes == pytest.approx(2 * 1.236e9, rel=1e-3), settings
