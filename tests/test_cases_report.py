"""What people meet beside the training: help, settings, comparisons, pages, notebooks."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import typer.testing

import lighten
from lighten import cli, hardware
from lighten.cli_settings import matching, settings
from lighten.errors import UserError
from lighten.recipe import EvaluateOptions, SweepOptions
from lighten.recipe.fields import RecipeFields

ROOT = Path(__file__).parents[1]


def told(*words: str, code: int = 0, **environment: str) -> str:
    """What the command prints, in a wide terminal."""
    done = typer.testing.CliRunner().invoke(
        cli.app, list(words), env={"COLUMNS": "120", **environment}, prog_name="lighten"
    )
    assert done.exit_code == code, done.output
    return done.output


def test_every_setting_is_listed_with_type_default_and_help() -> None:
    known = {own.name: own for own in settings()}
    declared = {name for name in RecipeFields.model_fields if name not in ("evaluate", "sweep")}
    declared |= {f"evaluate.{name}" for name in EvaluateOptions.model_fields}
    declared |= {f"sweep.{name}" for name in SweepOptions.model_fields}
    assert set(known) == declared
    assert all(own.type not in ("", "any") and own.help and own.default for own in known.values())
    assert known["lora_r"].type == "whole number from 1 or a list of these"
    assert known["dtype"].type == "auto | float32 | bfloat16 | float16"
    assert known["dataset"].default == "required"
    assert "cutoff_len" in known["max_length"].aliases


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["qlora"], "load_in_4bit"),
        (["lora_rank"], "lora_r"),
        (["--micro-batch-size"], "per_device_train_batch_size"),
        (["held-out", "share"], "val_size"),
        (["Optuna"], "sweep.search"),
    ],
)
def test_settings_are_searched_by_name_alias_and_meaning(words: list[str], name: str) -> None:
    assert name in [own.name for own in matching(words, settings())]


@pytest.mark.parametrize(
    ("word", "near"),
    [("lerning_rate", "learning_rate"), ("max_lenght", "max_length"), ("bacth_size", "batch_size"),
     ("budgett", "sweep.budget")],
)  # fmt: skip
def test_a_mistyped_setting_is_offered_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"did you mean .*{near}"):
        matching([word], settings())


def test_a_word_about_nothing_points_at_the_list() -> None:
    with pytest.raises(UserError, match="lighten settings lists them all"):
        matching(["zzzzqqqq"], settings())


def test_settings_print_in_groups_and_as_json() -> None:
    shown = told("settings", "early")
    assert "early_stopping_patience  (whole number from 1; default none)" in shown
    assert [own["name"] for own in json.loads(told("settings", "lora_r", "--json"))] == ["lora_r"]
    groups = {own["group"] for own in json.loads(told("settings", "--json"))}
    assert groups == {"model", "data", "training", "run", "lora", "evaluate", "sweep"}


def test_help_names_the_settings_and_the_flags_of_a_sweep() -> None:
    for verb in ("train", "run"):
        shown = told(verb, "-h")
        assert "lighten settings" in shown
        assert all(own.name in shown for own in settings() if own.group == "lora")
    shown = told("sweep", "-h")
    for name in SweepOptions.model_fields.keys() - {"grid"}:
        assert f"--{name}" in shown


@pytest.mark.parametrize(
    "words", [(), ("plan",), ("runs",), ("runs", "compare"), ("data", "check"), ("adapter",)]
)
def test_the_short_form_of_help_is_known_everywhere(words: tuple[str, ...]) -> None:
    assert told(*words, "-h") == told(*words, "--help")


def test_the_version_is_printed() -> None:
    assert told("--version") == f"lighten {lighten.__version__}\n"


@pytest.mark.parametrize(("typed", "full"), [("sett", "settings"), ("tra", "train"),
                                             ("runs comp", "compare")])  # fmt: skip
def test_the_tab_key_completes(typed: str, full: str) -> None:
    words = ["lighten", *typed.split()]
    shown = told(_LIGHTEN_COMPLETE="complete_bash", COMP_WORDS=" ".join(words),
                 COMP_CWORD=str(len(words) - 1))  # fmt: skip
    assert full in shown.split()


def test_only_extras_that_something_uses_are_offered() -> None:
    """An extra that no code reads would be installed for nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(hardware.EXTRAS.values()) == set(extras) - {"dev"}
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "src").rglob("*.py")
        if path.name != "hardware.py"
    )
    for module, extra in hardware.EXTRAS.items():
        packages = [re.split(r"[\[>=<]", own)[0] for own in extras[extra]]
        assert module in packages
        assert re.search(rf"import {module}\b|from {module}\b|\"{module}\"", sources), module
