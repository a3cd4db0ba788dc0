"""Folders belong to people: an export replaces an older export and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from lighten import api
from lighten.errors import UserError
from lighten.quantization.export_card import require_replaceable


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "README.md", "sub/x", ".hidden"])
def test_a_folder_with_a_persons_files_is_neither_written_nor_emptied(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "int8"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("mine")
    before = sorted(target.rglob("*"))
    with pytest.raises(UserError, match=r"are not an export's .*; nothing was changed"):
        api.export(str(tiny_folder), "merged", output_dir=target, verify=False)
    with pytest.raises(UserError, match=r"are not an export's .*; nothing was changed"):
        api.quantize(str(tiny_folder), "int8", output_dir=tmp_path)
    assert sorted(target.rglob("*")) == before
    assert (target / name).read_text() == "mine"


def test_an_older_export_is_replaced_until_a_file_is_put_beside_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "e"
    for _ in range(2):
        api.export(str(tiny_folder), "merged", output_dir=target, verify=False)
    for name in ("mine.txt", "results.json", "weights.safetensors"):
        (target / name).write_text("mine")
        with pytest.raises(UserError, match=name):
            api.export(str(tiny_folder), "merged", output_dir=target, verify=False)
        (target / name).unlink()
    assert (target / "model.safetensors").is_file()
    for name in ("run.f16.gguf", "run.q4_0.gguf"):  # llama-quantize puts one beside the other
        (target / name).touch()
    with pytest.raises(UserError, match=r"q4_0\.gguf"):
        require_replaceable(target)


def test_links_and_files_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(UserError, match="link or a file"):
            require_replaceable(tmp_path / name)
