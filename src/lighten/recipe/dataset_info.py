"""Names of data sets in LLaMA-Factory's `dataset_info.json`, read as their files or hub ids.

An entry says where a data set is (`file_name`, `hf_hub_url`, `subset`), how it is formed
(`formatting`, `tags`) and what its columns are called. Rows are recognised by their columns here,
so of an entry the place and other names of columns are taken; what asks for more than that is told.
Source: LLaMA-Factory's data/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten.paths import exists, expanded, with_config
from lighten.recipe.places import json_in

FILE, FOLDER = "dataset_info.json", "data"  # where LLaMA-Factory looks unless `dataset_dir` says
# What an entry calls a column, and its name here; without a word it has the first of these there.
_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output",
               "history": "history", "system": "system", "tools": "tools"},
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
}  # fmt: skip
_CHATS = ("messages", "conversations")
# Names of roles and keys of a turn that are read as they are.
_TAGS = {
    "role_tag": ("role", "from"), "content_tag": ("content", "value"),
    "user_tag": ("user", "human"), "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"), "function_tag": ("function_call",),
    "system_tag": ("system",),
}  # fmt: skip
_READ = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "formatting", "columns", "tags",
         "num_samples", "split", "ranking", "subset"}  # fmt: skip


def resolved(
    names: Sequence[str], directory: str | None, folder: Path | None
) -> tuple[list[str], dict[str, str], list[str]]:
    """Data sets by their files, where a `dataset_info.json` knows their names.

    Args:
        names: Of data sets, each perhaps with `#` and a number of rows.
        directory: `dataset_dir`, if it is set.
        folder: That holds the recipe's file, where it may lie too.

    Returns:
        The same with places for names; `dataset_columns` of theirs; what was read as what.

    Raises:
        ValueError: An entry asks for what is not read, or there is no such file.
    """
    place = _place(directory or FOLDER, folder)
    if place is None:
        if directory is None:
            return [*names], {}, []
        raise ValueError(f"dataset_dir: {directory} has no {FILE}; remove it, and set dataset to "
                         "the file itself")  # fmt: skip
    entries = _entries(place / FILE)
    places, notices = list[str](), list[str]()
    columns: dict[str, dict[str, str]] = {}
    for text in names:
        name, rows = _rows(text, entries)
        entry = entries.get(name)
        if entry is None or (directory is None and exists(expanded(text))):
            places.append(text)
            columns[text] = {}
            continue
        where, most = _where(name, entry, place), rows or entry.get("num_samples")
        places.append(where if most is None else f"{where}#{most}")
        columns[text] = _columns(name, entry)
        notices.append(f"{name} is an entry of {place / FILE}; read as {where}")
    others = [found for found in columns.values() if found]
    if others and any(found != others[0] for found in columns.values()):
        raise ValueError(
            f"{FILE}: {', '.join(names)} call their columns by different names, and "
            "dataset_columns is for all; rename columns in their files, or train on one of them"
        )
    return places, others[0] if others else {}, notices


def _place(directory: str, folder: Path | None) -> Path | None:
    """The folder that has the file: from where we are, or from where the recipe is."""
    here = expanded(directory)
    for place in (here, *([] if folder is None else [folder / here])):
        if exists(place / FILE):
            return place
    return None


def _rows(text: str, entries: Mapping[str, Any]) -> tuple[str, int | None]:
    """The name of an entry, and how many rows of it are asked for."""
    name, _, count = text.rpartition("#")
    return (name, int(count)) if name in entries and count.isdecimal() else (text, None)


def _entries(file: Path) -> Mapping[str, Any]:
    entries = json_in(file)
    # The same name has what `datasets` writes beside a data set: no entries.
    if not isinstance(entries, Mapping):
        return {}
    return {name: entry for name, entry in entries.items() if isinstance(entry, Mapping)}


def _where(name: str, entry: Mapping[str, Any], place: Path) -> str:
    """File, folder or hub id of an entry."""
    unread = sorted(key for key in entry if key not in _READ and entry[key] is not None)
    if entry.get("ranking"):
        raise ValueError(f"{name} in {FILE} is ranked: preferences are not built; name another")
    if entry.get("split", "train") != "train":
        raise ValueError(f"{name} in {FILE}: split is {entry['split']!r}, and train is what is "
                         "read; set dataset to the file itself")  # fmt: skip
    if unread:
        raise ValueError(f"{name} in {FILE}: {unread[0]} is not read; set dataset to the file "
                         "itself, or to owner/name/FOLDER of the hub")  # fmt: skip
    for key, value in _section(name, entry, "tags").items():
        if value not in _TAGS.get(key, ()):
            known = " or ".join(_TAGS.get(key, ())) or "nothing"
            raise ValueError(f"{name} in {FILE}: {key} is {value!r}, and {known} is what is read; "
                             "rename it in the file")  # fmt: skip
    where = entry.get("hf_hub_url")
    if isinstance(file := entry.get("file_name"), str):
        where = str(place / file)
    if isinstance(where, str):
        subset = entry.get("subset")
        return where if subset is None else with_config(where, str(subset))
    raise ValueError(f"{name} in {FILE} has no file_name; set dataset to the file itself")


def _columns(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """`dataset_columns` of an entry: none where its columns are called as they are here."""
    formatting = str(entry.get("formatting") or "alpaca")
    known = _COLUMNS.get({"openai": "sharegpt"}.get(formatting, formatting))
    if known is None:
        raise ValueError(f"{name} in {FILE}: formatting {formatting!r} is none of alpaca, "
                         "sharegpt, openai")  # fmt: skip
    said = {key: value for key, value in _section(name, entry, "columns").items() if value}
    if other := sorted(said.keys() - known.keys()):
        raise ValueError(f"{name} in {FILE}: columns: {other[0]} is not read: only text can be "
                         "trained here; name another")  # fmt: skip
    named = {known[key]: str(value) for key, value in said.items()}
    # Columns of a shape are named together.
    if "messages" in known:
        chat = named.pop("conversations", "conversations")
        named[chat if chat in _CHATS else "conversations"] = chat
    else:
        named = {"instruction": "instruction", "output": "output", **named}
    return named if any(ours != theirs for ours, theirs in named.items()) else {}


def _section(name: str, entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = entry.get(key) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} in {FILE}: {key} must hold names")
    return section
