"""The docstring example: frozen, small, without overlap, and made as its script says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lighten.recipe import Recipe
from lighten.recipe.section import seconds

FOLDER = Path(__file__).parents[1] / "examples" / "docstrings"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(split: str) -> list[dict[str, str]]:
    text = (FOLDER / "data" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_frozen_files_are_as_they_were_made() -> None:
    completed = subprocess.run([sys.executable, str(FOLDER / "make.py"), "--check"], check=False)
    assert completed.returncode == 0


def test_it_is_small_licensed_and_large_enough() -> None:
    assert sum(path.stat().st_size for path in (FOLDER / "data").iterdir()) < 1_000_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (FOLDER / "LICENSE-PSF.txt").read_text()
    assert len(rows("train")) > 2000
    assert len(rows("valid")) > 200
    assert len(rows("test")) > 150


def test_the_recipe_fits_itself_to_the_machine() -> None:
    """`make demo` is said to end in minutes: whatever the processor, training has a time."""
    recipe = Recipe.from_file(FOLDER / "recipe.yaml")
    assert recipe.max_steps is None
    assert seconds(str(recipe.max_time)) <= 300
    short = Recipe.from_file(FOLDER / "recipe.yaml", {"max_steps": 2})
    assert (short.max_steps, short.max_time) == (2, None)
    assert short.notices == ["max_steps takes the place of the recipe's max_time"]


def test_no_module_stands_in_two_splits() -> None:
    def modules(split: str) -> set[str]:
        return {row["prompt"].split("# ")[1].split("\n")[0] for row in rows(split)}

    assert modules("train").isdisjoint(modules("valid") | modules("test"))
    assert modules("valid").isdisjoint(modules("test"))


def test_extraction_keeps_good_lines_only(make: ModuleType) -> None:
    source = '''
def good(a: int, b=2) -> str:
    """Join a and b into one string

    More."""
def _private(): "Do the private thing quickly."
def short(): "Too short."
def old(): "Deprecated function, use good instead."
class Box:
    async def open(self): """open(self) -> Box Open the box and look inside. Then more."""
    def same(self): "Join a and b into one string."
'''
    examples = list(make.examples_of(source, "m"))
    assert [(e["prompt"].split("\n\n")[1], e["completion"]) for e in examples] == [
        ("# m\ndef good(a: int, b=2) -> str:", "Join a and b into one string."),
        ("# m\nclass Box:\n    async def open(self):", "Open the box and look inside."),
        ("# m\nclass Box:\n    def same(self):", "Join a and b into one string."),
    ]


def test_a_library_gives_no_prompt_and_no_answer_twice(make: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        'def f(x): "Return the thing of x."\ndef g(x): "Add x to it all."'
    )
    (tmp_path / "b.py").write_text('def h(x): "return the thing, of X"\n')
    (tmp_path / "_c.py").write_text('def f(x): "Return something else of x."')
    examples = make.collect(tmp_path)
    assert [e["completion"] for e in examples] == ["Return the thing of x.", "Add x to it all."]
    assert make.collect(tmp_path) == examples
