"""What the commands share: settings from words, and tables on the screen."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lighten.streams import heard_by, takes_any_text

if TYPE_CHECKING:
    from rich.console import Console

# Characters between two columns, and fewer where words would be cut otherwise; the least that a
# column is folded to.
_BETWEEN, _NARROWEST = (3, 2), 12
# A log that is no terminal gets a line this often while something is measured.
LOG_EVERY_S = 15.0
OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}
# Settings whose value is taken to the letter.
TEXTS = (
    "model_name_or_path", "adapter_name_or_path", "revision", "dataset", "eval_dataset",
    "chat_template", "output_dir",
)  # fmt: skip
Settings = (
    "Any setting of the recipe: --learning_rate 1e-4 or learning_rate=1e-4 (lighten settings)."
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """Settings from `--key value`, `--key=value`, `key=value` and lone `--flag` words.

    Raises:
        UserError: A word that is none of these, a setting without its value, a number with a
            decimal comma, or a data set twice.
    """
    import yaml

    from lighten.errors import UserError
    from lighten.recipe.aliases import RENAMED
    from lighten.recipe.fields import RecipeFields
    from lighten.recipe.numbers import ambiguous_list
    from lighten.recipe.yaml_lines import parse

    settings: dict[str, Any] = {}
    remaining = list(words)
    while remaining:
        word, is_flag = remaining.pop(0), False
        key, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("--") and not equals:
            raise UserError(f"{word!r} is not a setting; write --name value or name=value")
        if not equals:
            is_flag = not remaining or remaining[0].startswith("--") or is_assignment(remaining[0])
            value = "true" if is_flag else remaining.pop(0)
        head, dot, tail = key.partition(".")
        name = f"{head.replace('-', '_')}{dot}{tail.replace('-', '_')}"
        is_text = RENAMED.get(name, name) in TEXTS
        if is_text and is_flag:
            raise UserError(f"--{name} needs a value: --{name} VALUE, or {name}=VALUE")
        if not value.strip():  # a variable of the shell that is not set, as a rule
            raise UserError(f"{name} is given an empty value; write {name}=VALUE, or leave it out")
        if name in settings and RENAMED.get(name, name) in ("dataset", "eval_dataset"):
            raise UserError(
                f"--{name} is given twice; several data sets are one list: --{name} "
                f"{settings[name]},{value}"
            )
        listed = "," in value and not value.startswith(("[", "{", '"', "'"))
        if listed and (why := ambiguous_list(name, value, RecipeFields.model_fields)) is not None:
            raise UserError(why)
        try:
            settings[name] = parse(f"[{value}]" if listed and not is_text else value)
        except yaml.YAMLError:
            settings[name] = value
        if is_text and not isinstance(settings[name], str | None):
            settings[name] = value  # a path or a commit is never a number or a list
    return settings


def take_positionals(words: list[str]) -> list[str]:
    """Take the words before the first setting off the list."""
    positionals: list[str] = []
    while words and not words[0].startswith("-") and not is_assignment(words[0]):
        positionals.append(words.pop(0))
    return positionals


def require_model_and_data(words: Sequence[str]) -> None:
    """The words before the first setting may be a model and a data set.

    Raises:
        UserError: They are others, or too many.
    """
    from lighten.errors import UserError

    if len(words) > 1 and words[0].endswith((".yaml", ".yml")):
        raise UserError(
            f"{words[0]} is a recipe, which names its own data; to take others: --dataset "
            f"{','.join(words[1:])}"
        )
    if len(words) > 2:
        raise UserError(
            f"{', '.join(words[1:])} behind the model {words[0]}: several data sets are one list: "
            f"{words[0]} {','.join(words[1:])}"
        )
    if len(words) < 2:
        raise UserError(
            "give a recipe (recipe.yaml), or a model and a data set: lighten train M DATA"
        )


def with_positionals(words: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with a model, and data perhaps, that were given without their names.

    Raises:
        UserError: One is among the settings too, by any of its names.
    """
    from lighten.errors import UserError
    from lighten.recipe.aliases import RENAMED

    positionals = dict(zip(("model_name_or_path", "dataset"), words, strict=False))
    for name, value in settings.items():
        if (said := positionals.get(RENAMED.get(name, name), value)) != value:
            raise UserError(f"{said} and --{name} {value} both set the same thing; keep one")
    return {**settings, **positionals}


def is_assignment(word: str) -> bool:
    """Whether a word reads `name=value`."""
    name, equals, _ = word.partition("=")
    return bool(equals) and name.replace(".", "_").isidentifier()


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback that draws a bar in a terminal, and writes a line now and then elsewhere.

    The bar is there only while something is under way, so that others can draw theirs between.
    """
    from rich.console import Console
    from rich.progress import Progress

    screen = Console(stderr=True)
    live = screen.is_terminal and not screen.is_dumb_terminal
    progress = Progress(console=screen, transient=True, disable=not live)
    tasks: dict[str, Any] = {}
    said_s = heard_s = time.monotonic()
    heard = ""

    def tell(what: str, done: int, total: int) -> None:
        nonlocal said_s, heard_s, heard
        if not live:
            now = time.monotonic()
            if what != heard and now - heard_s >= LOG_EVERY_S:
                said_s = now  # others were at work, a training for one: this has only begun
            heard_s, heard = now, what
            if now - said_s >= LOG_EVERY_S:
                said_s = now
                typer.echo(f"{what}: {done:,} of {total:,}", err=True)
            return
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.start()
        progress.update(tasks[what], completed=done, total=total)
        if progress.finished:
            progress.stop()

    try:
        with heard_by(tell):
            yield tell
    finally:
        if live:  # elsewhere it would end with an empty line
            progress.stop()


def console() -> Console:
    """Standard output; words in brackets or between colons are words, as in `lighten[quant]`."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def print_json(value: Any) -> None:
    """Print JSON; in an encoding that lacks some of its text, that text is escaped, not lost.

    Numbers that are not finite become null, which every reader of JSON takes.
    """
    import json

    from lighten.runs import finite

    typer.echo(json.dumps(finite(value), ensure_ascii=not takes_any_text(sys.stdout)))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, fold_last: Sequence[int] = ()
) -> None:
    """Print rows under their columns.

    Args:
        columns: Their names.
        rows: Text of each cell.
        fold_last: Columns that are folded last, the first of them before the others.
    """
    from rich.box import SIMPLE
    from rich.cells import cell_len
    from rich.table import Table

    screen = console()
    natural = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    longest_word = [
        max((cell_len(word) for text in cells for word in text.split()), default=1)
        for cells in zip(columns, *rows, strict=True)
    ]
    # Cells are folded between words where there is room for the longest word of each column.
    between = next(
        (gap for gap in _BETWEEN if sum(longest_word) + gap * len(columns) <= screen.width),
        _BETWEEN[-1],
    )
    room = screen.width - between * len(columns)
    whole_words = sum(longest_word) <= room
    width: list[int | None] = [None] * len(columns)
    if whole_words and sum(natural) > room:
        fixed, spare = list(longest_word), room - sum(longest_word)
        for place in dict.fromkeys([*fold_last, *range(len(columns))]):
            more = min(spare, natural[place] - fixed[place])
            fixed[place], spare = fixed[place] + more, spare - more
        width = [*fixed]
    elif fold_last and sum(natural) > room:
        first = fold_last[0]
        least = [min(cells, _NARROWEST) for cells in natural]
        fixed = [natural[i] if i in fold_last else cells for i, cells in enumerate(least)]
        others = sum(fixed) - fixed[first]
        fixed[first] = max(least[first], min(natural[first], room - others))
        width = [*fixed]
    left = 1 if between == _BETWEEN[0] else 0
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, left))
    for place, column in enumerate(columns):
        # A name that is cut names nothing: it goes on in the next line.
        table.add_column(
            column, overflow="fold", width=width[place],
            min_width=longest_word[place] if whole_words else None,
        )  # fmt: skip
    for row in rows:
        table.add_row(*row)
    screen.print(table)


def cell(value: Any) -> str:
    """A value of four digits; a measured one with its interval."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        if value["low"] is None:  # a single example has no interval
            return f"{value['value']:.4g}"
        return f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
