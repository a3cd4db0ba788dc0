"""What an artefact says of itself: a card for people, `export.json` for other software."""

from __future__ import annotations

import filecmp
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lighten.artifacts import NAMED_TEMPLATES, Artefact
from lighten.errors import UserError
from lighten.machine import hardware
from lighten.models.names import card_line, card_name
from lighten.runs import QUANTIZE

MANIFEST = "export.json"
# In it, of an adapter that learnt on a quantised base: the weights that it was merged onto.
ONTO_KEY, ORIGINAL, DEQUANTIZED = "onto", "original", "dequantized"
# What an artefact's folder may hold; anything else beside it is a person's.
_BELONGS = (
    "README.md", "*config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "tekken.json", "*.index.json", MANIFEST, "receipt.json", "calibration.json",
    "*.jinja", NAMED_TEMPLATES, "model*.safetensors", "adapter_model.safetensors",
    "pytorch_model*.bin", "*.gguf",
    "*.pte", "Modelfile", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*",
)  # fmt: skip
# What file managers put beside what they show.
_SHOWN = (".DS_Store", "._*", "Thumbs.db", "desktop.ini")
_ONE = ("*.gguf", "*.pte")  # an export has one such file: of several some are a person's


def require_replaceable(folder: Path) -> None:
    """An artefact may be written here: nothing is there, or an older artefact and no more.

    Raises:
        UserError: Anything else is in it, which would be lost.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--output_dir {folder} is a link or a file; choose another name")
    if folder.name in ("", ".."):
        raise UserError(f"--output_dir {folder} is a folder in use; name one in it")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    names = [name for name in names if not any(fnmatch(name, p) for p in _SHOWN)]
    foreign = [name for name in names if not any(fnmatch(name, p) for p in _BELONGS)]
    for pattern in _ONE:
        several = [name for name in names if fnmatch(name, pattern)]
        foreign += several if len(several) > 1 else []
    if names and (foreign or not _is_artefact(folder)):
        listing = ", ".join((foreign or names)[:3])
        raise UserError(
            f"--output_dir {folder} holds files that are not an export's ({listing}); nothing was "
            "changed, choose another folder"
        )


def require_same_gguf(partial: Path, folder: Path, there: str) -> None:
    """What takes the place of a GGUF file is the same file, byte for byte.

    `export` and `quantize` write one file of a type into one folder, except where an adapter is
    merged onto other weights. What is known of the file that is there would be said of another.

    Args:
        partial: Folder with the new file.
        folder: Whose place it takes.
        there: What is there, in words.

    Raises:
        UserError: It is another file.
    """
    (file,) = partial.glob("*.gguf")
    if not all(filecmp.cmp(file, old, shallow=False) for old in folder.glob("*.gguf")):
        raise UserError(
            f"{folder} holds {there}, and this would be another file of the same type; nothing was "
            "changed: choose another --output_dir, or remove that folder"
        )


def is_measured(folder: Path) -> bool:
    """Whether the table of `quantize` that lies beside a folder tells of it."""
    path = folder.parent / QUANTIZE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["formats"]
        return any(Path(row.get("folder", "")).name == folder.name for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # there is none, or another version's


def _is_artefact(folder: Path) -> bool:
    if (folder / MANIFEST).is_file():
        return True
    card = folder / "README.md"  # a quantised copy has a card and no manifest
    return card.is_file() and "tags: [lighten, quantized]" in card.read_text("utf-8", "replace")


def write_manifest(artefact: Artefact, folder: Path, form: str, **facts: Any) -> None:
    """What an artefact was made of, for other software: `export.json`."""
    run, adapter = artefact.run, artefact.adapter
    base = (run.info().get("base") or {}) if run else {}
    manifest = {
        "form": form,
        "base": card_name(artefact.origin),
        "base_revision": artefact.revision or base.get("revision"),
        "base_sha256": base.get("checksum"),
        "license": artefact.facts.get("license"),
        "adapter": adapter.name if adapter else None,
        "diverged": "diverged" in artefact.facts,
        "run": run.name if run else None,
        "data": artefact.facts.get("data"),
        "data_sha256": artefact.facts.get("data_sha256"),
        "versions": hardware.versions(),
        **facts,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def card(artefact: Artefact, notes: list[str]) -> str:
    """A model card for the hub."""
    trained = ""
    if artefact.run is not None:
        checksum = artefact.facts.get("data_sha256")
        trained = f"\nTrained on `{artefact.facts['data']}`" + (
            f" (SHA-256 `{checksum}`).\n" if checksum else ".\n"
        )
    if "diverged" in artefact.facts:
        trained += f"{artefact.facts['diverged']}\n"
    bullets = "".join(f"\n- {note}" for note in notes)
    licence = artefact.facts.get("license")
    head = f"license: {licence.lower()}\n" if licence else ""
    return (
        f"---\n{head}{card_line(artefact.origin)}tags: [lighten]\n---\n\n# {artefact.name}\n\n"
        f"Made with lighten from `{card_name(artefact.origin)}` "
        f"(licence: {licence or 'look at the base'}).\n{trained}{bullets}\n"
    )
