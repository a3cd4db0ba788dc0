"""Whether a base in use is the one that an adapter's files name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lighten.models.names import hub_id

# The hub's cache calls a folder `models--OWNER--NAME`.
_IN_CACHE = re.compile(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)(?:/|$)")
# Words of a model's name that say who copied it, or in how many bits.
_OF_COPIES = {
    "hf", "meta", "unsloth", "dynamic", "quantized", "bnb", "gptq", "awq", "gguf", "mlx", "nf4",
    "4bit", "8bit", "int4", "int8", "fp8", "fp16", "bf16", "w4a16", "w8a8",
}  # fmt: skip


def names_another(recorded: object, name: str, folder: Path) -> bool:
    """Whether what an adapter calls its base is clearly another model than the base in use.

    Only ids of the hub are clear, for the place of a folder says nothing of what is in it. A copy
    under another owner, or in fewer bits, is the same model.

    Args:
        recorded: `base_model_name_or_path` of its `adapter_config.json`.
        name: Of the base in use, as `models.load` takes it.
        folder: Where that lies.
    """
    named = _hub_id(recorded)
    in_use = [known for given in (name, str(folder), _name_in(folder)) if (known := _hub_id(given))]
    if named is None or not in_use:
        return False
    return all(_words(named) != _words(other) for other in (*in_use, name, folder.name))


def _hub_id(name: object) -> str | None:
    """The hub's id, with its owner, of a name or a folder of the hub's cache; else None."""
    if not isinstance(name, str):
        return None
    if (cached := _IN_CACHE.search(name.replace("\\", "/"))) is not None:
        return f"{cached[1]}/{cached[2]}"
    try:
        known = hub_id(name)
    except (OSError, RuntimeError):  # too long for a path, or of nobody's home
        return None
    return known if known is not None and known.count("/") == 1 else None


def _name_in(folder: Path) -> object:
    """What a model's configuration says that it was loaded from."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _words(name: str) -> list[str]:
    """The words of a model's name that tell it from others."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return sorted(set(re.findall(r"[a-z0-9]+", last)) - _OF_COPIES)
