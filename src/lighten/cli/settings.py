"""The command `lighten settings`, and the settings in the help of the commands that take them."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lighten.cli.console import Json, console, print_json

# Parts of a recipe that have settings of their own: `evaluate.max_examples`.
_SECTIONS = ("evaluate", "quantize", "sweep")
_WIDTH = 100


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe, as people read it.

    Attributes:
        name: As in a recipe, with its section's name before it (`evaluate.seed`).
        group: What it belongs to: model, data, training, run, lora, evaluate or sweep.
        type: Which values it takes.
        default: What it is when nothing is said.
        help: What it does.
        aliases: Its names in other tools, which are understood too.
        set_by: Settings of other tools that say it in words of their own (`bf16`).
    """

    name: str
    group: str
    type: str
    default: str
    help: str
    aliases: tuple[str, ...] = ()
    set_by: tuple[str, ...] = ()


def settings() -> list[Setting]:
    """Every setting of a recipe, in the order in which they are declared."""
    from lighten.recipe import Recipe, aliases, other_tools

    renamed = {alias: (name,) for alias, name in aliases.RENAMED.items()}
    rhythms = {alias: (name,) for alias, name in other_tools.RHYTHMS.items()}
    special = {**aliases.SPECIAL, **rhythms}
    schema = Recipe.model_json_schema()
    return [
        replace(
            setting, aliases=_naming(setting.name, renamed),
            set_by=_naming(setting.name, {k: special[k] for k in special if k not in renamed}),
        )
        for setting in _settings(schema, schema["$defs"])
    ]  # fmt: skip


def _naming(name: str, others: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Other tools' settings that stand for one of ours."""
    return tuple(other for other, ours in others.items() if name in ours)


def _settings(
    schema: Mapping[str, Any], shared: Mapping[str, Any], section: str | None = None
) -> Iterator[Setting]:
    required = set(schema.get("required", ()))
    for name, field in schema["properties"].items():
        if section is None and name in _SECTIONS:
            yield from _settings(_resolved(field, shared), shared, name)
            continue
        default = "required" if name in required else json.dumps(field.get("default"))
        yield Setting(
            name if section is None else f"{section}.{name}",
            section or field.get("section", "recipe"),
            _type(field, shared),
            "none" if default == "null" else default.strip('"'),
            field.get("description", ""),
        )


def _resolved(field: Mapping[str, Any], shared: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference of a JSON schema stands for."""
    name = str(field.get("$ref", "")).rpartition("/")[2]
    resolved: Mapping[str, Any] = shared[name] if name else field
    return resolved


def _type(field: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "$ref" in field:
        return "mapping"
    for union in ("anyOf", "oneOf"):
        if union in field:
            words = [
                _type(option, shared) for option in field[union] if option.get("type") != "null"
            ]
            lists = {f"list of {word}": "a list of these" for word in words}
            return " or ".join(dict.fromkeys(lists.get(word, word) for word in words))
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    kind = field.get("type")
    if kind == "array":
        inner = _type(field["items"], shared) if field.get("items") else ""
        return f"list of {inner}" if inner else "list"
    if kind in ("integer", "number"):
        word = "whole number" if kind == "integer" else "number"
        bounds = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"),
                  ("exclusiveMaximum", "below"))  # fmt: skip
        return " ".join(
            [word, *(f"{label} {field[key]:g}" for key, label in bounds if key in field)]
        )
    return {"boolean": "true | false", "string": "text", "object": "mapping"}.get(str(kind), "any")


def matching(words: list[str], all_settings: list[Setting]) -> list[Setting]:
    """The settings that hold every word in their name, their aliases or their help.

    A lone word that is a group's or a setting's name means that alone.

    Raises:
        UserError: None does; names the nearest.
    """
    from lighten.errors import UserError
    from lighten.recipe import other_tools

    terms = [word.lstrip("-").replace("-", "_").casefold() for word in words]
    if len(terms) == 1:
        exact = [setting for setting in all_settings if terms[0] == setting.group]
        exact += [
            setting
            for setting in all_settings
            if terms[0] in (setting.name, *setting.aliases, *setting.set_by)
        ]
        if exact:
            return list(dict.fromkeys(exact))
    chosen = [
        setting
        for setting in all_settings
        if all(
            word in f"{setting.name} {' '.join(setting.aliases)} {setting.help}".casefold()
            or word.replace("_", " ") in setting.help.casefold()
            for word in terms
        )
    ]
    if chosen:
        return chosen
    for word in terms:
        if answer := other_tools.meaning(word):
            raise UserError(f"{word} is another tool's setting and none here: {answer}")
    names = {
        alias: setting.name
        for setting in all_settings
        for alias in (setting.name, *setting.aliases, *setting.set_by)
    }
    names |= {setting.name.rpartition(".")[2]: setting.name for setting in all_settings}
    near = [near for word in terms for near in difflib.get_close_matches(word, names, n=3)]
    offer = ", ".join(dict.fromkeys(names[name] for name in near))
    raise UserError(
        f"no setting is about {' '.join(words)!r}"
        + (f"; did you mean {offer}?" if offer else "; lighten settings lists them all")
    )


def show_settings(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]...", help="What to look for, or a group such as lora."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the settings of a recipe: type, default, meaning and other names; search by a word."""
    all_settings = settings()
    chosen = matching(words, all_settings) if words else all_settings
    if as_json:
        print_json([asdict(setting) for setting in chosen])
        return
    screen = console()
    width = min(_WIDTH, screen.width)
    group = None
    for setting in chosen:
        if setting.group != group:
            group = setting.group
            screen.print(f"\n{group}", style="bold", highlight=False, markup=False)
        default = setting.default if setting.default == "required" else f"default {setting.default}"
        screen.print(
            f"  {setting.name}  ({setting.type}; {default})",
            style="cyan", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        also = f" Also called {', '.join(setting.aliases)}." if setting.aliases else ""
        if setting.set_by:
            also += f" Other tools set it by {', '.join(setting.set_by)}."
        indent = " " * 6
        paragraph = textwrap.fill(
            f"{setting.help}.{also}", width, initial_indent=indent, subsequent_indent=indent
        )
        screen.print(paragraph, highlight=False, markup=False, soft_wrap=True)


class TakesSettings(TyperCommand):
    """A command that takes a recipe's settings; its help names them, group by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Add the settings after the command's own options."""
        super().format_options(ctx, formatter)
        groups: dict[str, list[str]] = {}
        for setting in settings():
            groups.setdefault(setting.group, []).append(
                setting.name.removeprefix(f"{setting.group}.")
            )
        with formatter.section("Settings, as --name value; `lighten settings NAME` explains one"):
            formatter.write_dl(
                [(group, ", ".join(names)) for group, names in groups.items() if group != "sweep"]
            )


class TakesSweep(TyperCommand):
    """`lighten sweep`: its help shows the settings of the `sweep` section, and how to give them."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Add what a sweep is told after the command's own options."""
        super().format_options(ctx, formatter)
        rows = [
            (
                f"--{setting.name.removeprefix('sweep.')}",
                f"{setting.help} [{setting.type}; default {setting.default}]",
            )
            for setting in settings()
            if setting.group == "sweep" and setting.name != "sweep.grid"
        ]
        with formatter.section("Sweep"):
            formatter.write_dl(
                [("--SETTING A,B,C", "try each value of any setting: --lora_r 8,32,128"), *rows]
            )
        with formatter.section("Settings"):
            formatter.write_text("Any setting of a recipe as --name value (see: lighten settings).")
