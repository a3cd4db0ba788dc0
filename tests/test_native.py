"""Compiled libraries are loaded from the cache only where nobody else can have put them there."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lighten.cpu import dropout, kernels, native
from lighten.cpu.kernels import float32
from lighten.generation import kernels as generation_kernels
from lighten.machine.hardware import processor_flags

pytestmark = pytest.mark.skipif(
    not hasattr(os, "getuid") or shutil.which("g++") is None, reason="needs POSIX and g++"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a library's source; the cache is empty."""
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    return folder


def test_where_there_is_a_compiler_there_are_kernels() -> None:
    """Without one of them, the tests that need it are skipped."""
    assert dropout.library() is not None
    assert generation_kernels.obstacle() is None
    assert float32.obstacle() is None
    if kernels.NEEDED in processor_flags():
        assert kernels.obstacle() in (None, kernels.TILES_REFUSED)


def answer(path: Path) -> int:
    # Under another name: a library that is loaded already would be given back.
    copy = path.with_name(f"copy-{path.stat().st_ino}.so")
    shutil.copy(path, copy)
    return int(ctypes.CDLL(str(copy)).answer())


def test_a_library_is_kept_for_its_user_alone(source: Path, tmp_path: Path) -> None:
    path = native.compiled(source, [])
    assert answer(path) == 42
    assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700
    modified_ns = path.stat().st_mtime_ns
    assert native.compiled(source, []) == path
    assert path.stat().st_mtime_ns == modified_ns


def test_a_cache_may_be_named_from_here(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    monkeypatch.setenv("LIGHTEN_CACHE", "here")
    path = native.compiled(source, [])
    assert answer(path) == 42
    assert path.parent == source.parent / "here" / "kernels"


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_library_that_others_could_write_to_is_made_anew(source: Path, mode: int) -> None:
    path = native.compiled(source, [])
    path.write_bytes(b"planted")
    path.chmod(mode)
    assert native.compiled(source, []) == path
    assert answer(path) == 42
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_link_to_a_library_elsewhere_is_not_followed(source: Path, tmp_path: Path) -> None:
    path = native.compiled(source, [])
    planted = tmp_path / "planted.so"
    path.rename(planted)
    path.symlink_to(planted)
    assert not native.compiled(source, []).is_symlink()


def test_an_open_folder_of_an_earlier_version_is_closed(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    native.compiled(source, [])
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_or_library_of_another_user_is_left_alone(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = native.compiled(source, [])
    os.chown(theirs.parent, 4321, -1)
    os.chown(theirs, 4321, -1)
    other_user = 4322
    monkeypatch.setattr(os, "getuid", lambda: other_user)
    with pytest.raises(native.NotCompiled, match="belongs to another user"):
        native.compiled(source, [])
    other_folder = theirs.parent.with_name(f"kernels-{other_user}")
    os.chown(other_folder, other_user, -1)
    (other_folder / theirs.name).write_bytes(b"planted")
    os.chown(other_folder / theirs.name, 4321, -1)
    path = native.compiled(source, [])
    assert path.parent == other_folder
    assert answer(path) == 42


@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root gives files away")
def test_a_library_of_the_system_is_taken(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.compiled(source, [])
    modified_ns = path.stat().st_mtime_ns
    monkeypatch.setattr(os, "getuid", lambda: 4322)
    assert native.compiled(source, []) == path
    assert path.stat().st_mtime_ns == modified_ns


def test_loading_the_kernels_leaves_subnormal_numbers_alone() -> None:
    """In a process of its own: others may have loaded libraries that change the mode."""
    script = (
        "from lighten.generation import kernels; from lighten.cpu import kernels as shared; "
        "import sys; kernels.library(); shared.library(); tiny = sys.float_info.min; "
        "print(tiny / 4 > 0)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert completed.stdout == "True\n", completed.stderr


@pytest.mark.parametrize(
    ("says", "told"),
    [(r"\377 \260\241", "\ufffd"), (r"\n", "exit status 1"), ("", "exit status 1")],
)
def test_whatever_a_compiler_says_there_is_no_library_and_no_crash(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, told: str
) -> None:
    """Paths and messages in another encoding than Python's, as on a Korean Windows; nothing."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f"#!/bin/sh\n[ \"$1\" = --version ] && exit 0\nprintf '{says}' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    library, why = native.loaded(source, [])
    assert library is None
    assert f"{compiler} made nothing of source: " in str(why)
    assert told in str(why)


def test_a_compiler_may_be_named_with_words_around_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in CXX='ccache g++ -m64'; options make another library."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'a b'}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", "env g++ -g0")
    path = native.compiled(source, [])
    assert answer(path) == 42
    monkeypatch.setenv("CXX", "env g++ -g1")
    assert native.compiled(source, []) != path
    (tmp_path / "a b").mkdir()
    spaced = tmp_path / "a b" / "g++ x"
    spaced.symlink_to(str(shutil.which("g++")))
    monkeypatch.setenv("CXX", str(spaced))
    assert answer(native.compiled(source, [])) == 42
