"""The entries of Axolotl's `datasets`: which data each names, and what it asks for beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.paths import with_config
from lighten.recipe import other_tools

# One of a data set's configs: LLaMA-Factory's and ms-swift's, TRL's, of transformers' scripts.
SUBSETS = ("subset", "dataset_config", "dataset_config_name")
_READ = ("path", "type", "ds_type", "name", *SUBSETS)
# Columns of a type of one's own, by ours.
_FIELDS = {
    "instruction": "field_instruction", "input": "field_input", "output": "field_output",
    "system": "field_system",
}  # fmt: skip


def named(entry: Any) -> str:
    """The data set of an entry, with the config that its `name` chooses."""
    if not isinstance(entry, Mapping):
        return str(entry)
    chosen = next((entry[k] for k in ("name", *SUBSETS) if entry.get(k) is not None), None)
    return str(entry["path"]) if chosen is None else with_config(entry["path"], str(chosen))


def answers(entry: Any) -> tuple[list[str], list[str]]:
    """What is told of an entry's other keys.

    Returns:
        Notices, and a sentence for each key that asks for what is not read.
    """
    if not isinstance(entry, Mapping):
        return [], []
    kind = entry.get("type")
    notices, problem = _of_type(kind, entry)
    read = (*_READ, "field") if kind == "completion" else _READ
    others = {key: entry[key] for key in entry if key not in read}
    return notices, problem + [
        f"datasets: {key} is not read; "
        + (other_tools.instead(key) or "remove it (dataset_columns names columns called otherwise)")
        for key, value in others.items()
        if value is not None and not other_tools.changes_nothing(key, value)
        and (key, value) != ("split", "train")
    ]  # fmt: skip


def _of_type(kind: Any, entry: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is told of an entry's type: how Axolotl writes a row as the model sees it."""
    if kind is None or str(kind).partition(".")[0] == "chat_template":
        return [], []
    if isinstance(kind, Mapping):
        columns = ", ".join(
            f"{ours}: {kind[theirs]}"
            for ours, theirs in _FIELDS.items()
            if kind.get(theirs) is not None and kind[theirs] != ours
        )
        return [], [
            "datasets: a type of one's own is not read; remove it"
            + (f", set dataset_columns: {{{columns}}}" if columns else "")
            + ", and set chat_template to the prompt's format"
        ]
    if kind == "completion":
        return [], [
            "datasets: type: completion is not read, for a text beyond max_length is not split "
            "here as it is there; remove it, and set dataset_columns: "
            f"{{text: {entry.get('field') or 'text'}}} to learn each row's text whole"
        ]
    if kind == "input_output":
        return [], [
            "datasets: type: input_output is not read; remove it, and write rows of segments as "
            "input_ids and labels"
        ]
    return [
        f"datasets: type: {kind} is passed over: rows are recognised by their columns, and prompts "
        "are written by the chat template, not in Axolotl's format of that name"
    ], []
