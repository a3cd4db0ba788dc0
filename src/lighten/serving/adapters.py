"""What is served: a base and adapters by name, checked and converted before an engine sees them."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import time
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from lighten import data, models
from lighten.errors import UserError
from lighten.machine.hardware import cache_folder
from lighten.models import configuration, gguf
from lighten.models.load import checksum, locate, tokenizer_in, weight_files
from lighten.models.same import names_another
from lighten.paths import expanded
from lighten.peft_config import CONFIG, TOKENIZER, WEIGHTS, from_hub, may_be_on_hub, read_config
from lighten.quantization.export_card import MANIFEST
from lighten.quantization.gguf_adapter import write_gguf_adapter
from lighten.quantization.gguf_source import read_json
from lighten.runs import INFO, RECIPE, Run, folder_of, whole_folder
from lighten.serving.engine import Adapter
from lighten.serving.prompts import Asking, asking
from lighten.wording import typed

log = logging.getLogger(__name__)
# Raised when what is converted for llama.cpp changes, so that an old copy is not taken for it.
LAYOUT = 1
_NAME = re.compile(r"\w[\w./=-]{0,127}")
_TEMPLATE = "chat_template.jinja"
_READ = ("*.json", "*.jinja", "*.model")  # of a base, beside its weights
# Beside the weights and settings, what decides how an adapter is asked.
_FILES = (CONFIG, WEIGHTS, _TEMPLATE, "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
          "special_tokens_map.json", "generation_config.json")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Model:
    """Something that answers under a name.

    Attributes:
        name: What clients call it.
        asking: How it is asked.
        adapter: Which adapter it is; None: the base.
        created: Unix time at which it was named.
    """

    name: str
    asking: Asking
    adapter: Adapter | None
    created: int


@dataclass
class Base:
    """The base: where it lies, how it is asked, and the tokenizers of its adapters in use."""

    name: str
    folder: Path
    config: Any
    asking: Asking
    gguf: Path | None  # where it is a GGUF file itself
    checksum: str | None = None
    declared: Any = None
    tokenizers: WeakValueDictionary[str, Any] = field(default_factory=WeakValueDictionary)

    def contents(self) -> str:
        """SHA-256 over all that its conversion reads."""
        if self.checksum is None:
            self.checksum = checksum(weight_files(self.folder))
        digest = hashlib.sha256(str(self.checksum).encode())
        for file in (file for kind in _READ for file in sorted(self.folder.glob(kind))):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()


def open_base(name: str, *, revision: str | None = None, chat_template: str | None = None) -> Base:
    """Find a base and read all but its weights.

    Args:
        name: As for `lighten train`: a hub id, a folder, a GGUF file, a packaged model; or a run
            of full fine-tuning.
        revision: Of a hub id.
        chat_template: As a recipe's; None: its own.

    Raises:
        UserError: No such model, no tokenizer, or no such template.
    """
    run = run_of(name)
    if run is not None:
        model = run.model()
        if model is None:
            raise UserError(
                f"{name} is a run of adapters; serve its base: lighten serve "
                f"{typed(run.recipe().model_name_or_path)} --adapters {typed(name)}"
            )
        name, recipe, info = str(model), run.recipe(), run.info()
        handling = data.Handling(recipe.system_role, recipe.thinking)
        learnt, template = data.LearntAnswers.of(info), recipe.chat_template
    else:
        handling, learnt, template = data.Handling(), data.LearntAnswers(), None
    source, path = locate(name, revision=revision)
    tokenizer = models.load_tokenizer(name, revision=revision)
    # llama.cpp reads a GGUF file as it is: no copy of it is made for what its header says.
    config = gguf.read_config(path) if source == "gguf" else configuration.read_config(path)
    declared = _declared(path, config)
    how_asked = asking(tokenizer, chat_template or template, declared, handling, learnt)
    return Base(
        name, path, config, how_asked, path if source == "gguf" else None, declared=declared
    )


def spelt(name: str) -> str:
    """A name in the form in which names are compared: a Mac's files have 가 in two characters."""
    return unicodedata.normalize("NFC", name)


def require_name(name: str, folder: Path | None = None) -> None:
    """Refuse what cannot stand in addresses, logs and metrics.

    Args:
        name: What a model is to be called.
        folder: Of the adapter that it names, where that is known.

    Raises:
        UserError: Says which letters can.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name[:200]!r} cannot be the name of a model; use letters, digits, '.', '_', '=', "
            "'-' and '/', beginning with a letter or a digit, 128 at most: "
            f"NAME={'PATH' if folder is None else typed(folder)}"
        )


def open_adapter(name: str, folder: Path, base: Base) -> Model:
    """Read an adapter: how it is asked, and a fingerprint of what it is.

    Where only its name of its base tells that the base is another, that is said and it is taken.

    Args:
        name: What clients call it; see `require_name`.
        folder: Where it is.
        base: What it is an adapter of.

    Raises:
        UserError: It is no adapter, or one of another base.
    """
    config = read_config(folder)
    key = fingerprint(folder)
    run = run_of_adapter(folder)
    handling, learnt, template = data.Handling(), data.LearntAnswers(), None
    if run is not None:
        recipe, info = run.recipe(), run.info()
        _require_same_base(folder, info, base)
        handling = data.Handling(recipe.system_role, recipe.thinking)
        learnt, template = data.LearntAnswers.of(info), recipe.chat_template
    elif (folder / MANIFEST).is_file():  # it was exported
        manifest = read_json(folder / MANIFEST)
        of_export = {"checksum": manifest.get("base_sha256"), "name": manifest.get("base")}
        _require_same_base(folder, {"base": of_export}, base)
    elif names_another(recorded := config.get("base_model_name_or_path"), base.name, base.folder):
        log.warning(
            "%s: %s names %s as its base, and %s is served: over another model's weights it "
            "answers wrongly, without any error", folder, CONFIG, recorded, base.name,
        )  # fmt: skip
    if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        tokenizer, template = _tokenizer(folder, base), None
    else:
        tokenizer = copy.copy(base.asking.tokenizer)  # which shares all but the template
        own = folder / _TEMPLATE
        template = str(own) if own.is_file() else template
    if len(tokenizer) > base.config.get_text_config().vocab_size:
        raise UserError(
            f"{folder} has a tokenizer of {len(tokenizer):,} tokens and the base "
            f"{base.config.get_text_config().vocab_size:,}: tokens were added, which cannot be "
            f"served unmerged; merge it first: {_merge(folder)}"
        )
    declared = _declared(folder, None) or base.declared
    how_asked = asking(tokenizer, template, declared, handling, learnt)
    return Model(name, how_asked, Adapter(key, folder), now())


def _tokenizer(folder: Path, base: Base) -> Any:
    """The tokenizer beside an adapter, one object for all that have the same.

    It takes tens of megabytes and half a second, and adapters come in hundreds.
    """
    digest = hashlib.sha256()
    files = {file for kind in TOKENIZER for file in folder.glob(kind) if file.is_file()}
    for file in sorted(files):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    key = digest.hexdigest()
    tokenizer = base.tokenizers.get(key)
    if tokenizer is None:
        tokenizer = base.tokenizers[key] = tokenizer_in(folder, str(folder))
        if tokenizer.chat_template is None:
            tokenizer.chat_template = base.asking.tokenizer.chat_template
    return tokenizer


def resolve(paths: Mapping[str, str] | Iterable[str], most: int | None = None) -> dict[str, Path]:
    """Folders of adapters by name from what a user gives.

    Args:
        paths: `name=path`, or paths alone: a path is an adapter's folder, a run, a folder of
            adapters, or an adapter's id on the hub.
        most: Adapters at most; None: any number.

    Raises:
        UserError: No adapter there, two of one name, or too many.
    """
    pairs = paths.items() if isinstance(paths, Mapping) else [_pair(word) for word in paths]
    folders: dict[str, Path] = {}
    for name, path in pairs:
        for written, folder in _below(name, path).items():
            key = spelt(written)
            if key in folders:
                raise UserError(
                    f"two adapters are called {key!r}: {folders[key]} and {folder}; name them: "
                    f"--adapters first={typed(folders[key])} second={typed(folder)}"
                )
            folders[key] = folder
    if most is not None and len(folders) > most:
        raise UserError(f"{len(folders)} adapters are more than --max-cpu-loras {most}")
    return folders


def _pair(word: str) -> tuple[str | None, str]:
    name, equals, path = word.partition("=")
    return (name, path) if equals and not Path(word).exists() else (None, word)


def _below(name: str | None, given: str) -> dict[str, Path]:
    """The adapters at a path, or the one of the hub."""
    path = expanded(given)
    if (path / CONFIG).is_file():
        return {name or path.resolve().name: path}
    run = run_of(str(path))
    if run is not None:
        folders = run.adapters()
        if not folders and run.model() is not None:
            raise UserError(
                f"{path} trained a whole model, no adapter: lighten serve {typed(path)}"
            )
        if not folders:
            raise run.untrained("no adapter")
    elif path.is_dir():
        folders = {config.parent.name: config.parent for config in sorted(path.glob(f"*/{CONFIG}"))}
    elif may_be_on_hub(given):
        folders = {given.rpartition("/")[2]: from_hub(given)}
    else:
        raise UserError(f"{path} does not exist; give an adapter's folder, a run, or NAME=PATH")
    if not folders:
        raise UserError(f"{path} holds no adapter ({CONFIG})")
    if name is None:
        return folders
    if len(folders) == 1:
        return {name: next(iter(folders.values()))}
    return {f"{name}/{key}": folder for key, folder in folders.items()}


def run_of(target: str) -> Run | None:
    """The run at a path, or of a name under `runs/`."""
    folder = folder_of(target)
    return None if folder is None else Run(folder)


def run_of_adapter(folder: Path) -> Run | None:
    """The run that an adapter's folder lies in."""
    above = folder.resolve().parent
    inside = above.name == "adapters" and (above.parent / RECIPE).is_file()
    return Run(above.parent) if inside and (above.parent / INFO).is_file() else None


def fingerprint(folder: Path) -> str:
    """SHA-256 over the files that decide what an adapter answers."""
    digest = hashlib.sha256()
    for name in _FILES:
        path = folder / name
        digest.update(name.encode())
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def adapter_as_gguf(adapter: Adapter, base: Base) -> Path:
    """The adapter as GGUF, from the cache or written there.

    Raises:
        UserError: It cannot be served unmerged; says why, and how to merge it.
    """
    folder = cache_folder() / "serve" / f"{adapter.key}-{_shape(base.config)}-{LAYOUT}"
    target = folder / "adapter.gguf"
    if not target.is_file():
        with whole_folder(folder) as partial:
            write_gguf_adapter(adapter.folder, base.config, partial / "adapter.gguf")
            require_unchanged(adapter)
    return target


def _shape(config: Any) -> str:
    """A base's kind and a digest of its settings: an adapter's file depends on its heads, too."""
    settings = config.get_text_config().to_dict()
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{config.model_type}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def require_unchanged(adapter: Adapter) -> None:
    """Refuse an adapter whose folder was written to since it was named: after it was read.

    Raises:
        UserError: Its contents are others now.
    """
    if fingerprint(adapter.folder) != adapter.key:
        raise UserError(f"{adapter.folder} was changed while it was read; load it again")


def now() -> int:
    """Unix time, in seconds."""
    return int(time.time())


def _merge(folder: Path) -> str:
    return f"lighten export {typed(folder)} --as merged"


def _require_same_base(folder: Path, info: Mapping[str, Any], base: Base) -> None:
    """Refuse an adapter whose run names another base of known contents."""
    of_run = info.get("base") or {}
    if of_run.get("checksum") is None or base.gguf is not None:
        return
    if base.checksum is None:
        base.checksum = checksum(weight_files(base.folder))
    if of_run["checksum"] != base.checksum:
        raise UserError(
            f"{folder} was trained on another base ({of_run.get('name')}) than {base.name}: their "
            "weights differ; serve it over its own"
        )


def _declared(folder: Path, config: Any) -> Any:
    """`eos_token_id` of the generation settings, else of the configuration."""
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            token_ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} is not valid JSON: {error}; fetch it again") from error
        several = token_ids if isinstance(token_ids, list) else [token_ids]
        if token_ids is not None and not all(type(token) is int for token in several):
            raise UserError(
                f"{file}: eos_token_id is {token_ids!r}, which is neither a token's id nor a list "
                "of ids; fetch or save it again"
            )
        if token_ids is not None:
            return token_ids
    return None if config is None else config.get_text_config().eos_token_id
