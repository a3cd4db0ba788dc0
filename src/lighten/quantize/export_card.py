"""What an artefact says of itself: a card for people, `export.json` for other software."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lighten import hardware
from lighten.artifacts import Artefact

MANIFEST = "export.json"


def write_manifest(artefact: Artefact, folder: Path, form: str, **facts: Any) -> None:
    """What an artefact was made of, for other software: `export.json`."""
    run, adapter = artefact.run, artefact.adapter
    base = (run.info().get("base") or {}) if run else {}
    manifest = {
        "form": form,
        "base": artefact.base if not Path(artefact.base).exists() else Path(artefact.base).name,
        "base_revision": artefact.revision,
        "base_sha256": base.get("checksum"),
        "license": artefact.facts.get("license"),
        "adapter": adapter.name if adapter else None,
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
    told = "".join(f"\n- {note}" for note in notes)
    known = artefact.facts.get("license")
    head = [f"license: {known.lower()}"] if known else []
    if not Path(artefact.base).exists() and "/" in artefact.base:
        head.append(f"base_model: {artefact.base}")
    base = Path(artefact.base).name if Path(artefact.base).exists() else artefact.base
    front = "\n".join(["---", *head, "tags: [lighten]", "---"])
    return (
        f"{front}\n\n# {artefact.name}\n\n"
        f"Made with lighten from `{base}` (licence: {known or 'look at the base'}).\n"
        f"{trained}{told}\n"
    )
