"""What can be loaded here and what is already on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lighten.models.names import PACKAGED, Source
from lighten.models.packaged import folder_of


@dataclass(frozen=True)
class ModelEntry:
    """A model that `load` takes by name.

    Attributes:
        name: What to call it.
        source: Where it comes from.
        cached: Whether it is on this machine.
        path: Where, if so.
        size_bytes: Its size on disk, if so.
        note: What it is.
    """

    name: str
    source: Source
    cached: bool
    path: Path | None
    size_bytes: int | None
    note: str


def available() -> list[ModelEntry]:
    """Packaged models, then hub models in the local cache. Folders and GGUF files load by path."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    entries: list[ModelEntry] = []
    for name, package in PACKAGED.items():
        folder = folder_of(name)
        cached = (folder / "config.json").is_file()
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if cached else None
        note = f"{package.note}, {package.license}"
        entries.append(ModelEntry(name, "packaged", cached, folder if cached else None, size, note))
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return entries
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type == "model":
            entries.append(
                ModelEntry(
                    repo.repo_id, "hub", True, repo.repo_path, repo.size_on_disk, "hub cache"
                )
            )
    return entries
