"""Encoded data kept between runs: a second start maps it from disk.

An entry is a folder, named for everything that its rows follow from: the bytes of the data files,
the tokenizer, the chat template, the model's limits, the settings of the recipe, and the code and
packages that make rows of them. It is written beside its place and renamed; one that is torn is
made again. Numbers are raw arrays and the rest is JSON: nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import IO, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lighten import data
from lighten.data import Encoded, EncodedRows, Findings
from lighten.data.files import Content, checksum
from lighten.data.storage import pieces
from lighten.data.tokenise import EncodingCounts
from lighten.machine.hardware import cache_folder, version_of
from lighten.models import Limits
from lighten.recipe import Recipe
from lighten.training.encoding import tokenizer_facts

# Smaller data are encoded before a cache would be looked up.
LEAST_BYTES = 2**20
# The entries that were not used for longest go, until the others and the new one take no more.
MOST_BYTES = 8 * 2**30
# Entries that are being written: a folder, in it a lock, and once that is held the entry. One that
# nobody has locked is what a killed process left behind; between its making and its lock pass
# moments.
NEW, LOCK, ENTRY, LEFT_S = ".new-", "lock", "entry", 60.0
PACKAGES = ("lighten", "transformers", "tokenizers", "jinja2", "numpy", "pyarrow")
_SETTINGS = (
    "dataset", "eval_dataset", "dataset_columns", "max_train_samples", "max_eval_samples",
    "skip_bad_rows", "val_size", "max_length", "truncation_strategy", "assistant_only_loss",
    "completion_only_loss", "system_role", "thinking",
)  # fmt: skip
_DTYPES = {"ids": np.int32, "supervised": np.uint8, "starts": np.int64, "lines": np.int64,
           "files": np.int32, "ready": np.bool_}  # fmt: skip
PARTS, EXTRAS = ("train", "held_out"), ("facts", "notes")
Parts = dict[str, Encoded | None]


class RowCache:
    """The place of one data set's encoded rows.

    Args:
        recipe: How the data are encoded.
        files: Every file that the rows come from, by split.
        tokenizer: With its chat template chosen.
        limits: Of the model.

    Attributes:
        contents: What the files held, by split; empty where nothing is kept.
        folder: Where they are or will be; None where nothing is kept: small data,
            `LIGHTEN_DATA_CACHE=off`, or no such files.
    """

    def __init__(
        self,
        recipe: Recipe,
        files: Mapping[str, Sequence[Path]],
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
    ) -> None:
        self.folder: Path | None = None
        self.contents: dict[str, Content] = {}
        if os.environ.get("LIGHTEN_DATA_CACHE") == "off":
            return
        if (
            sum(file.stat().st_size for split_files in files.values() for file in split_files)
            < LEAST_BYTES
        ):
            return
        self.contents = {split: Content.of(split_files) for split, split_files in files.items()}
        template = str(tokenizer.chat_template)
        identity = {
            "code": _code(),
            "versions": {name: version_of(name) for name in PACKAGES},
            "files": [
                (
                    split,
                    [str(file) for file in content.files],
                    [size for size, _, _ in content.stamps],
                    content.sha256,
                )
                for split, content in sorted(self.contents.items())
            ],
            "settings": {name: getattr(recipe, name) for name in _SETTINGS},
            "limits": asdict(limits),
            "template": template,
            # a template may write the date
            "date": str(date.today()) if re.search(r"strftime_now|date", template) else None,
            "tokenizer": tokenizer_facts(tokenizer),
        }
        text = json.dumps(identity, sort_keys=True, default=str)
        self.folder = _root() / hashlib.sha256(text.encode()).hexdigest()[:32]

    def load(self) -> tuple[Parts, dict[str, Any]] | None:
        """The encoded parts by name and what was kept beside them; None where there is no entry."""
        if self.folder is None or not self.folder.is_dir():
            return None
        try:
            entry = json.loads((self.folder / "entry.json").read_text(encoding="utf-8"))
            stored = entry["kept"]
            if entry["sha256"] != _checksum(stored):
                return None
            parts = {name: self._part(name, stored["parts"][name]) for name in PARTS}
            extras = {name: stored["beside"][name] for name in EXTRAS}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None  # torn: as if it were not there
        if parts["train"] is None:
            return None
        with contextlib.suppress(OSError):  # a cache that may only be read is used all the same
            os.utime(self.folder)
        return parts, extras

    def save(self, parts: Parts, extras: dict[str, Any]) -> Parts:
        """Keep encoded parts, and hand them over as mapped from there.

        Where nothing can be kept (a full disk), the parts are those given.
        """
        if self.folder is None:
            return parts
        try:
            root = _root()
            root.mkdir(parents=True, exist_ok=True)
            _prune(root, self.folder, room=sum(map(_bytes, parts.values())))
            with _scratch(root) as scratch:
                entry_folder = scratch / ENTRY
                entry_folder.mkdir()
                stored_parts = {
                    name: _write(entry_folder, name, part) for name, part in parts.items()
                }
                stored = {"parts": stored_parts, "beside": extras}
                entry = json.dumps({"sha256": _checksum(stored), "kept": stored})
                (entry_folder / "entry.json").write_text(entry, encoding="utf-8")
                shutil.rmtree(self.folder, ignore_errors=True)  # a torn entry
                with contextlib.suppress(OSError):  # another process has just kept the same
                    os.rename(entry_folder, self.folder)
        except OSError:
            return parts
        loaded = self.load()
        return parts if loaded is None else loaded[0]

    def _part(self, name: str, stored: dict[str, Any] | None) -> Encoded | None:
        if stored is None:
            return None
        assert self.folder is not None
        arrays = {}
        for key, dtype in _DTYPES.items():
            file = self.folder / f"{name}.{key}"
            if file.stat().st_size != stored["bytes"][key] or _crc(file) != stored["crc"][key]:
                raise ValueError(f"{file} is torn")
            arrays[key] = np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else (
                np.zeros(0, dtype)
            )  # fmt: skip
        stored_findings = stored["findings"]
        findings = Findings(
            counts=Counter(stored_findings["counts"]),
            first=stored_findings["first"],
            ends=Counter({int(token): count for token, count in stored_findings["ends"]}),
            inside=set(stored_findings["inside"]),
            refused=stored_findings["refused"],
            dates=set(stored_findings["dates"]),
        )
        rows = EncodedRows(arrays, stored["names"])
        return Encoded(rows, EncodingCounts(**stored["counts"]), stored["problems"], findings)


def _write(folder: Path, name: str, part: Encoded | None) -> dict[str, Any] | None:
    if part is None:
        return None
    assert isinstance(part.rows, data.EncodedRows)
    sizes, sums = {}, {}
    for key, array in part.rows.arrays().items():
        file = folder / f"{name}.{key}"
        total = 0
        with file.open("wb") as stream:
            for piece in pieces(array):
                content = piece.tobytes()
                stream.write(content)
                total = zlib.crc32(content, total)
        sizes[key], sums[key] = array.nbytes, total
    findings = part.findings
    return {
        "bytes": sizes,
        "crc": sums,
        "names": part.rows.names,
        "counts": asdict(part.counts),
        "problems": part.problems,
        "findings": {
            "counts": dict(findings.counts),
            "first": findings.first,
            "ends": findings.ends.most_common(),
            "inside": sorted(findings.inside),
            "refused": findings.refused,
            "dates": sorted(findings.dates),
        },
    }


def _root() -> Path:
    return cache_folder() / "data"


def _crc(file: Path) -> int:
    total = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            total = zlib.crc32(chunk, total)
    return total


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Checksum of the code that makes rows; empty where it is not there as text."""
    data_files = sorted(Path(str(data.__file__)).parent.glob("*.py"))
    names = ("rows.py", "encoding.py", "held_out_data.py")
    training_files = [Path(__file__).with_name(name) for name in names]
    return checksum([*data_files, *training_files]) if data_files else ""


def _bytes(part: Encoded | None) -> int:
    """What a part will take on disk, nearly."""
    if part is None:
        return 0
    assert isinstance(part.rows, data.EncodedRows)
    return sum(array.nbytes for array in part.rows.arrays().values())


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A folder to fill, which others see is being written."""
    with (
        tempfile.TemporaryDirectory(dir=root, prefix=NEW, ignore_cleanup_errors=True) as name,
        (Path(name) / LOCK).open("wb") as lock,
    ):
        _lock(lock)
        yield Path(name)


def _lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed or its process has ended; False: another has it."""
    try:
        import fcntl
    except ImportError:  # Windows, where a file that is open cannot be deleted either
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return False
    return True


def _left_behind(folder: Path) -> bool:
    """Whether a folder that was being written never will be whole.

    At once, where it can be told: whoever starts a killed run again does so within the minute, and
    writes the entry itself, after which nobody comes to look until other data are encoded.
    """
    told = sys.platform != "win32" and (folder / ENTRY).exists()
    if not told and time.time() - folder.stat().st_mtime < LEFT_S:
        return False
    try:
        with (folder / LOCK).open("rb") as lock:
            return _lock(lock)
    except FileNotFoundError:
        return True


def _prune(root: Path, new_entry: Path, room: int) -> None:
    """Take away what was not used for longest, until there is room for a new entry.

    Args:
        root: Where the entries are.
        new_entry: The one that is to be written.
        room: What it will take, in bytes.
    """
    entries = []
    for folder in root.iterdir():
        with contextlib.suppress(OSError):  # another process may take it away meanwhile
            if folder.name.startswith(NEW):
                if _left_behind(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            size = sum(file.stat().st_size for file in folder.iterdir())
            if folder != new_entry:
                entries.append((folder.stat().st_mtime, size, folder))
    total = room + sum(size for _, size, _ in entries)
    for _, size, folder in sorted(entries):
        if total <= MOST_BYTES:
            break
        shutil.rmtree(folder, ignore_errors=True)
        total -= size
