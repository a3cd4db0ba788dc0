"""Going on from an adapter: what its files say about the settings of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.paths import exists, expanded
from lighten.peft_config import (
    CONFIG,
    WEIGHTS,
    from_hub,
    is_adapter,
    may_be_on_hub,
    more_than_low_rank,
    needs_peft,
    read_config,
    settings,
    tensor_shapes,
)
from lighten.recipe.section import listed, targets

TARGETS, SAVED = "lora_target_modules", "modules_to_save"
# Settings that say what an adapter is, by their names in its file.
ADAPTER_SETTINGS = {
    "lora_r": "r", "lora_alpha": "alpha", TARGETS: "target_modules",
    "use_rslora": "use_rslora", SAVED: SAVED,
    "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
}  # fmt: skip
MODEL, START = "model_name_or_path", "adapter_name_or_path"
COHORT = ("lora_r", "lora_alpha")  # of the settings above, those that a cohort lists


def fill_in(
    recipe: MutableMapping[str, Any], applied: str | None = None
) -> tuple[list[str], list[str]]:
    """Fill in what the adapter that a recipe starts from says, in place.

    Args:
        recipe: The recipe's settings by their own names.
        applied: The adapter whose settings are filled in already; it may have moved since.

    Returns:
        What is told to the user, and a sentence per problem.
    """
    notices: list[str] = []
    try:
        notices += _split(recipe)
        if recipe.get(START) is None:
            return notices, []
        if problem := _excluded(recipe):
            del recipe[START]
            return notices, [problem]
        if applied is not None and recipe[START] == applied and not exists(expanded(applied)):
            return notices, []
        folder = find(str(recipe[START]))
        adapter = settings_of(folder)
    except UserError as error:
        recipe.pop(START, None)
        return notices, [str(error)]
    problems = _conflicts(recipe, adapter, folder, "")
    for entry in _entries(recipe):
        problems += _conflicts(entry, adapter, folder, f"adapters: {entry.get('name')}: ")
    recipe[START] = str(folder)
    for key, value in adapter.items():
        # A list of equal ranks still says how many adapters there are.
        if key not in COHORT or not isinstance(recipe.get(key), list):
            recipe[key] = value
    return notices, problems


def _split(recipe: MutableMapping[str, Any]) -> list[str]:
    """A model that is an adapter's folder becomes its base, and the adapter to start from."""
    name = recipe.get(MODEL)
    if not isinstance(name, str) or not name:
        return []
    folder = expanded(name)
    if not is_adapter(folder):
        return []
    config = read_config(folder)
    base = config.get("base_model_name_or_path")
    if recipe.get(START) is not None and expanded(str(recipe[START])) != folder:
        raise UserError(
            f"{MODEL} is the adapter {name} and {START} is {recipe[START]}; name the base and one "
            "adapter"
        )
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{MODEL}: {name} is an adapter whose {CONFIG} names no base model; give the base as "
            f"{MODEL} and this folder as {START}"
        )
    recipe[MODEL], recipe[START] = base, name
    if recipe.get("revision") is None and isinstance(config.get("revision"), str):
        recipe["revision"] = config["revision"]
    return [f"{name} is an adapter of {base}: read as {MODEL}: {base} and {START}: {name}"]


def _excluded(recipe: Mapping[str, Any]) -> str | None:
    """Why the recipe cannot start from an adapter at all."""
    if recipe.get("method") == "full" or recipe.get("trainable_layers") is not None:
        return (
            f"{START} has no effect with method: full, which trains the base's own weights; remove "
            "it, or use method: lora"
        )
    if recipe.get("peft") is not None:
        return f"{START} goes on with a plain LoRA adapter, not with peft:; remove one of the two"
    entries = _entries(recipe)
    if any(entry.get("use_dora") is True for entry in (recipe, *entries)):
        return f"{START} goes on with a plain LoRA adapter, not with use_dora; remove one of them"
    inits = [entry.get("init_lora_weights", True) for entry in (recipe, *entries)]
    if custom_inits := [init for init in inits if init not in (True, None)]:
        return (
            f"init_lora_weights: {custom_inits[0]} has no effect beside {START}; remove one of the "
            "two"
        )
    return None


def find(name: str) -> Path:
    """The folder of the one adapter that a name means: its own, a run's, a checkpoint's, the hub's.

    Raises:
        UserError: There is none, or more than one.
    """
    folder = expanded(name)
    if exists(folder / CONFIG):
        return folder
    if not exists(folder):
        if not may_be_on_hub(name):
            raise UserError(f"{START}: {name} does not exist; give the folder of an adapter")
        try:
            return from_hub(name)
        except UserError as error:
            raise UserError(f"{START}: {error}") from error
    inside = sorted(path.parent for path in folder.glob(f"adapters/*/{CONFIG}"))
    if len(inside) > 1:
        names = ", ".join(path.name for path in inside)
        raise UserError(f"{START}: {name} holds several adapters ({names}); give {inside[0]}")
    if not inside:
        raise UserError(f"{START}: {name} is not an adapter: it has no {CONFIG}")
    return inside[0]


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a recipe that an adapter's files say.

    Raises:
        UserError: It is no plain LoRA adapter, or a file is broken.
    """
    config = read_config(folder)
    if needs_peft(config):
        method = more_than_low_rank(config) or "LoRA adapter with biases or tokens of its own"
        raise UserError(
            f"{START}: {folder} is of another kind ({method}); training goes on from plain LoRA "
            "adapters alone"
        )
    values = settings(config, folder, tensor_shapes(folder / WEIGHTS))
    values["target_modules"] = _listed(values["target_modules"])
    values["modules_to_save"] = _listed(values["modules_to_save"]) or None
    return {key: values[name] for key, name in ADAPTER_SETTINGS.items()}


def _conflicts(
    recipe: Mapping[str, Any], adapter: Mapping[str, Any], folder: Path, prefix: str
) -> list[str]:
    """A sentence per setting that differs from the adapter's."""
    conflicts = []
    for key, value in adapter.items():
        read_as = {TARGETS: targets, SAVED: listed}.get(key)
        mine = recipe.get(key) if read_as is None else read_as(recipe.get(key))
        cohort = isinstance(mine, list) and key in COHORT
        for entry in mine if cohort and isinstance(mine, list) else [mine]:
            if entry is not None and _comparable(entry) != _comparable(value):
                conflicts.append(
                    f"{prefix}{key} is {entry!r}, but the adapter {folder} that training starts "
                    f"from has {value!r}; remove {key}"
                )
                break
    return conflicts


def _entries(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the recipe's `adapters` spells out, as far as it has the right form."""
    entries = recipe.get("adapters")
    return (
        [entry for entry in entries if isinstance(entry, Mapping)]
        if isinstance(entries, list)
        else []
    )


def _comparable(value: Any) -> Any:
    """Lists of names are sets; empty and left out are the same."""
    if isinstance(value, list | tuple):
        return frozenset(map(str, value)) or None
    if value == {}:
        return None
    return value


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
