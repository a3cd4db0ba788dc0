"""What a name on the command line ships: a run, an adapter's folder, a model's folder or a base."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.errors import UserError
from lighten.peft_config import CONFIG, read_config

# What stands beside weights and tells other software how a model is spoken to.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Artefact:
    """Something that was trained, or a base as it came.

    Attributes:
        name: Short, for folders and messages.
        base: Name or folder of the base, as `lighten.models.load` takes it.
        base_folder: Where its safetensors files are.
        revision: Of the base on the hub.
        adapter: Folder of the adapter in PEFT's format; None: a model of its own.
        companions: Folder of tokenizer, chat template and generation settings.
        run: The run that it is of.
        facts: What its card says where it is known: `data`, `data_sha256`, `stored` (how the base
            was quantised while it was trained on).
    """

    name: str
    base: str
    base_folder: Path
    revision: str | None
    adapter: Path | None
    companions: Path
    run: runs.Run | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def open_source(
    source: str | os.PathLike[str] | runs.Run, *, adapter: str | None = None
) -> Artefact:
    """What a run, an adapter's folder, a model's folder or a base's name ships.

    Args:
        source: Which.
        adapter: Of a run with several, whose.

    Raises:
        UserError: There is nothing of that name, nothing was trained yet, or the run holds
            several adapters and none was named.
    """
    if isinstance(source, runs.Run):
        return _of_run(source, adapter)
    path = Path(source).expanduser()
    if (path / runs.RECIPE).is_file():
        return _of_run(runs.Run(path), adapter)
    if adapter is not None:
        raise UserError(f"{source} is no run, so it holds no adapter called {adapter!r}")
    if (path / CONFIG).is_file():
        config = read_config(path)
        base = config.get("base_model_name_or_path")
        if not base:
            raise UserError(
                f"{path / CONFIG} does not name its base; set base_model_name_or_path in it"
            )
        revision = config.get("revision")
        folder = _folder(str(base), revision)
        companions = path if (path / "tokenizer_config.json").is_file() else folder
        return Artefact(path.name, str(base), folder, revision, path, companions)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path} holds no run ({runs.RECIPE}), no adapter ({CONFIG}) and no model (config.json)"
        )
    folder = _folder(str(source), None)
    return Artefact(_short(str(source)), str(source), folder, None, None, folder)


def _of_run(run: runs.Run, adapter: str | None) -> Artefact:
    recipe, info = run.recipe(), run.info()
    facts = {
        "data": Path(recipe.dataset).name,
        "data_sha256": info.get("data", {}).get("sha256"),
        "stored": "4 bits" if recipe.load_in_4bit else "8 bits" if recipe.load_in_8bit else None,
    }
    whole = run.model()
    if whole is not None:
        if adapter is not None:
            raise UserError(f"{run.folder} trained the model whole; it has no adapter {adapter!r}")
        return Artefact(run.name, str(whole), whole, None, None, whole, run, facts)
    trained = run.adapters()
    if not trained:
        raise UserError(f"{run.folder} has nothing trained yet; train it first")
    if adapter is None and len(trained) > 1:
        raise UserError(
            f"{run.folder} holds {len(trained)} adapters; choose one with --adapter "
            f"{' | '.join(trained)}"
        )
    name = adapter or next(iter(trained))
    if name not in trained:
        raise UserError(f"{run.folder} has no adapter {name!r}; it has {', '.join(trained)}")
    base = recipe.model_name_or_path
    return Artefact(
        run.name if len(trained) == 1 else f"{run.name}-{name}", base,
        _folder(base, recipe.revision), recipe.revision, trained[name], trained[name], run, facts,
    )  # fmt: skip


def _folder(base: str, revision: str | None) -> Path:
    """Where a base's safetensors files are; fetched or converted where they are not yet here."""
    from lighten.models.gguf import converted
    from lighten.models.load import locate

    source, path = locate(base, revision=revision)
    return converted(path) if source == "gguf" else path


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def copy_companions(artefact: Artefact, folder: Path) -> None:
    """Put tokenizer, chat template and generation settings beside weights.

    What the adapter's folder lacks is the base's.
    """
    for source in (artefact.base_folder, artefact.companions):
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
