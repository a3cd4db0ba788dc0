"""What a name on the command line ships: a run, an adapter's folder, a model's folder or a base."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.errors import UserError
from lighten.paths import data_names, expanded, name_of
from lighten.peft_config import CONFIG, is_adapter, read_config
from lighten.wording import diverged

# What stands beside weights and tells other software how a model is spoken to, or shown pictures.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip

_TEMPLATE, _TOKENIZER = "chat_template.jinja", "tokenizer.json"
# Where transformers keeps templates of other names than `default`, such as `tool_use`.
NAMED_TEMPLATES = "additional_chat_templates"
# What they say goes before `tokenizer_config.json`; transformers 5 writes neither.
_OLDER = ("special_tokens_map.json", "added_tokens.json")

# Settings of a base that is quantised while it is loaded for training.
QUANTIZED = (
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
)  # fmt: skip
_LICENSE = re.compile(r"^license:\s*[\"']?([^\"'\s#]+)", re.MULTILINE)


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
        facts: What its card says where it is known: `data`, `data_sha256`, `license` of the base,
            and `diverged`, a sentence, where its training did not come to its end.
        quantization: The settings of `lighten.models.load` under which the run quantised its base;
            empty where it did not.
        added_tokens: Special tokens that the run gave its base.
    """

    name: str
    base: str
    base_folder: Path
    revision: str | None
    adapter: Path | None
    companions: Path
    run: runs.Run | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    added_tokens: tuple[str, ...] = ()

    @property
    def stored(self) -> str | None:
        """How the base was quantised while it was trained on; None: it was not."""
        if self.quantization.get("load_in_4bit"):
            return str(self.quantization["bnb_4bit_quant_type"])
        return "int8" if self.quantization else None

    @property
    def origin(self) -> str:
        """Name or folder of the model that was trained, or that it is."""
        if self.run is not None and self.adapter is None:
            return self.run.recipe().model_name_or_path
        return self.base

    @property
    def exports(self) -> Path:
        """Where its exports go unless a folder is named.

        Each adapter of several has its own, and so has what is of no run.
        """
        if self.run is None:
            return Path.cwd() / "exports" / self.name
        folder = self.run.folder / "exports"
        several = self.adapter is not None and len(self.run.adapters()) > 1
        return folder / self.adapter.name if several and self.adapter is not None else folder


def open_source(
    source: str | os.PathLike[str] | runs.Run, *, adapter: str | None = None,
    base: str | None = None,
) -> Artefact:  # fmt: skip
    """What a run, an adapter's folder, a model's folder or a base's name ships.

    An adapter's folder in a run is that run's adapter, with all that the run knows of its base.

    Args:
        source: Which.
        adapter: Of a run with several, whose.
        base: Of an adapter's folder, in place of the one that it names.

    Raises:
        UserError: There is nothing of that name, nothing was trained yet, or the run holds
            several adapters and none was named.
    """
    if isinstance(source, runs.Run):
        return _of_run(source, adapter)
    path = expanded(os.fspath(source))
    if path.name in ("", ".."):  # `.` has no name of its own, and files are named by it
        source = path = path.resolve()
    if (path / runs.RECIPE).is_file():
        return _of_run(runs.Run(path), adapter)
    if adapter is not None:
        raise UserError(f"{source} is no run, so it holds no adapter called {adapter!r}")
    if is_adapter(path) or (base is not None and (path / CONFIG).is_file()):
        trained_in = path.resolve().parent.parent
        if base is None and (trained_in / runs.RECIPE).is_file():
            run = runs.Run(trained_in)
            if run.adapters().get(path.name, Path()).resolve() == path.resolve():
                return _of_run(run, path.name)
        config = read_config(path)
        revision = None if base else config.get("revision")
        base = base or config.get("base_model_name_or_path")
        if not base:
            raise UserError(
                f"{path / CONFIG} does not name its base; set base_model_name_or_path in it"
            )
        folder = _folder(str(base), revision)
        companions = path if (path / "tokenizer_config.json").is_file() else folder
        facts = {"license": license_of(str(base), revision)}
        return Artefact(
            name_of(path), str(base), folder, revision, path, companions, facts=facts
        )  # fmt: skip
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path} holds no run ({runs.RECIPE}), no adapter ({CONFIG}) and no model (config.json)"
        )
    folder = _folder(str(source), None)
    facts = {"license": license_of(str(source), None)}
    return Artefact(_short_name(str(source)), str(source), folder, None, None, folder, facts=facts)


def _of_run(run: runs.Run, adapter: str | None) -> Artefact:
    recipe, info = run.recipe(), run.info()
    facts = {
        "data": data_names(recipe.dataset),
        "data_sha256": info.get("data", {}).get("sha256"),
        "license": license_of(recipe.model_name_or_path, recipe.revision),
    }
    keys = QUANTIZED if recipe.load_in_4bit or recipe.load_in_8bit else ()
    quantization = {key: getattr(recipe, key) for key in keys}
    full_model = run.model()
    if full_model is not None:
        if adapter is not None:
            raise UserError(f"{run.folder} trained the model whole; it has no adapter {adapter!r}")
        return Artefact(run.name, str(full_model), full_model, None, None, full_model, run, facts)
    trained = run.adapters()
    if not trained:
        raise run.untrained()
    if adapter is None and len(trained) > 1:
        raise UserError(
            f"{run.folder} holds {len(trained)} adapters; choose one with --adapter "
            f"{' | '.join(trained)}"
        )
    name = adapter or next(iter(trained))
    if name not in trained:
        raise UserError(f"{run.folder} has no adapter {name!r}; it has {', '.join(trained)}")
    base = recipe.model_name_or_path
    records = {entry["name"]: entry for entry in info.get("adapters") or []}
    if (record := records.get(name, {})).get("diverged"):
        best = record.get("best_step") if recipe.load_best_model_at_end else None
        facts["diverged"] = diverged(record["steps"], best)
    return Artefact(
        run.name if len(trained) == 1 else f"{run.name}-{name}", base,
        _folder(base, recipe.revision), recipe.revision, trained[name], trained[name], run, facts,
        quantization, tuple(recipe.added_tokens or ()),
    )  # fmt: skip


def license_of(base: str, revision: str | None) -> str | None:
    """A base's licence where it can be known: its package's, or what its card says."""
    from lighten.models.load import locate
    from lighten.models.names import PACKAGED

    if base.lower() in PACKAGED:
        return PACKAGED[base.lower()].license
    try:
        _, path = locate(base, revision=revision, weights=False)
    except UserError:  # a base that is gone leaves its licence unknown
        return None
    card = path / "README.md"
    if not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    match = _LICENSE.search(head) if head.startswith("---") else None
    return match[1] if match else None


def _folder(base: str, revision: str | None) -> Path:
    """Where a base's safetensors files are; fetched or converted where they are not yet here."""
    from lighten.models.gguf import converted
    from lighten.models.load import locate

    source, path = locate(base, revision=revision)
    return converted(path) if source == "gguf" else path


def _short_name(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def copy_companions(artefact: Artefact, folder: Path) -> None:
    """Put tokenizer, chat template and generation settings beside weights.

    What the adapter's folder lacks is the base's.
    """
    for source in (artefact.base_folder, artefact.companions):
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if (artefact.companions / _TOKENIZER).is_file():
        for name in _OLDER:
            if not (artefact.companions / name).is_file():
                (folder / name).unlink(missing_ok=True)
    has_file = (artefact.companions / _TEMPLATE).is_file()
    has_template = has_file or _holds_template(artefact.companions)
    if has_template and not has_file:
        (folder / _TEMPLATE).unlink(missing_ok=True)  # the base's would be read in its place
    # An adapter that learnt by a template of its own did not learn by its base's other ones.
    copy_named_templates(artefact.companions if has_template else artefact.base_folder, folder)


def copy_named_templates(source: Path, folder: Path) -> None:
    """Put a model's chat templates of other names than `default` beside weights."""
    for file in sorted((source / NAMED_TEMPLATES).glob("*.jinja")):
        (folder / NAMED_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / NAMED_TEMPLATES / file.name)


def _holds_template(folder: Path) -> bool:
    """Whether a tokenizer keeps its chat template in its settings, as older trainers write it."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def added_words(artefact: Artefact) -> int:
    """Rows that the vocabulary needs for added tokens; 0 where there are none.

    Of an adapter without its run they are those that its tokenizer has and its base's has not.
    """
    if artefact.adapter is None or not (artefact.added_tokens or new_tokens(artefact)):
        return 0
    from lighten.models.load import tokenizer_in

    return len(tokenizer_in(artefact.companions, artefact.name))


def new_tokens(artefact: Artefact) -> list[str]:
    """Tokens that an adapter brings and its base's tokenizer does not have."""
    folders = (artefact.companions, artefact.base_folder)
    alone = artefact.run is not None and not artefact.added_tokens
    if alone or artefact.adapter is None or folders[0] == folders[1]:
        return []
    if not all((folder / _TOKENIZER).is_file() for folder in folders):
        return []
    from lighten.models.load import tokenizer_in

    ids, known = (tokenizer_in(folder, artefact.name).get_vocab() for folder in folders)
    return sorted(ids.keys() - known.keys(), key=lambda token: int(ids[token]))
