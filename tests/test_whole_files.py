"""What is being written and is interrupted, and who is at work in a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lighten import folders, locks, runs
from lighten.whole_files import append_line, read_lines, remove_unfinished, whole_folder


def folder_with(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / name).write_text(name)
    return folder


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_interrupt_while_an_older_folder_is_deleted_leaves_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were lost: what was being deleted, and what was to take its place."""
    final, rmtree = folder_with(tmp_path / "merged", "old"), shutil.rmtree

    def interrupted(path: Path, *args: Any, **options: Any) -> None:
        holds_old = (Path(path) / "old").is_file()
        rmtree(path, *args, **options)
        if holds_old:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(final) as partial:
        (partial / "new").write_text("new")
    assert files_in(tmp_path) == {"merged/new"}


def test_a_kill_between_the_two_renames_leaves_the_older_folder(tmp_path: Path) -> None:
    """It gets its name again from whoever writes there next, or takes the run up again."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from lighten import whole_files\n"
        "whole_files.os.replace = lambda *paths: os._exit(9)\n"
        "with whole_files.whole_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'new').write_text('new')\n"
    )
    final = folder_with(tmp_path / "model", "old")
    assert subprocess.run([sys.executable, "-c", code, str(final)]).returncode == 9
    assert not final.exists()
    (tmp_path / folders.INFO).write_text('{"version": 1}')
    folders.require_ours(tmp_path)  # what was left is a run's
    remove_unfinished(tmp_path)
    assert files_in(tmp_path) == {"model/old", folders.INFO}
    with whole_folder(final) as partial:
        (partial / "new").write_text("new")
    assert files_in(tmp_path) == {"model/new", folders.INFO}


def test_a_folder_that_cannot_take_its_place_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = folder_with(tmp_path / "merged", "old")

    def refused(*paths: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(ValueError, match="cannot write"), whole_folder(final) as partial:
        (partial / "new").write_text("new")
    assert files_in(tmp_path) == {"merged/old"}


def test_a_link_to_a_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """The new folder was thrown away: no folder can be renamed to a link's name."""
    elsewhere = folder_with(tmp_path / "disk", "old")
    (tmp_path / "merged").symlink_to(elsewhere)
    with whole_folder(tmp_path / "merged") as partial:
        (partial / "new").write_text("new")
    assert files_in(tmp_path) == {"merged/new", "disk/old"}


def test_a_line_after_a_torn_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for number in range(2):
        append_line(path, {"line": number})
    assert path.read_bytes() == b'{"line": 0}\n{"line": 1}\n'
    with path.open("ab") as file:
        file.write(b'{"loss": ')  # the disk was full
    for number in (2, 3):
        append_line(path, {"line": number})
    assert [line["line"] for line in read_lines(path)] == [0, 1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not shift starts")
def test_a_clock_that_is_set_leaves_a_lock_held(tmp_path: Path) -> None:
    """The clock of WSL jumps when a laptop wakes up, and Linux tells starts by the clock."""
    locks.acquire(tmp_path)
    held = json.loads((tmp_path / locks.LOCK).read_text())
    (tmp_path / locks.LOCK).write_text(json.dumps({**held, "began": held["began"] + 3600}))
    assert locks.is_held(tmp_path)
    # Another process has the id now, which began by chance in the same second.
    (tmp_path / locks.LOCK).write_text(json.dumps({**held, "ticks": held["ticks"] - 50}))
    assert not locks.is_held(tmp_path)
    runs.write_json(tmp_path / locks.LOCK, held)
    locks.release(tmp_path)
    assert not (tmp_path / locks.LOCK).exists()
