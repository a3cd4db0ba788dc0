"""The text and the optimiser steps that the benchmarks train on, the same for every contender."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import statistics
import sysconfig
from pathlib import Path
from typing import Any

ROWS_PER_STEP, LONGEST_TOKENS = 8, 512

Row = tuple[list[int], list[bool]]
Steps = list[list[Row]]


def documentation() -> list[dict[str, str]]:
    """Real text of real lengths: objects of the standard library and their whole docstrings."""
    examples = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if 400 < len(text) < 2400:
                    prompt = f"Document {node.name} of the Python module {path.stem}."
                    examples.append({"prompt": prompt, "completion": text})
    return examples


def encoded(model: str, longest: int = LONGEST_TOKENS) -> list[Row]:
    """The documentation as token ids and masks; longer rows are left out."""
    from lighten import data
    from lighten.data import Example, Message
    from lighten.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    data.choose_template(tokenizer, None)
    examples = [
        Example(
            "stdlib", i, (Message("user", row["prompt"]), Message("assistant", row["completion"])),
            single_turn=True,
        )
        for i, row in enumerate(documentation())
    ]  # fmt: skip
    rows = data.encode(examples, tokenizer, max_length=longest, truncation_strategy="drop").rows
    return [(row.input_ids, row.supervised) for row in rows]


def steps_of(rows: list[Row], count: int, *, grouped: bool) -> Steps:
    """Whole optimiser steps, cut from as many passes over the rows as it takes.

    Args:
        rows: What to learn from.
        count: How many steps.
        grouped: Rows of like length in each step; else eight at random, TRL's own default.
    """
    from lighten.data.batches import steps_of_epoch

    lengths = [len(ids) for ids, _ in rows]
    order: list[list[int]] = []
    for epoch in itertools.count():
        order += steps_of_epoch(
            lengths, ROWS_PER_STEP, seed=0, epoch=epoch, group_by_length=grouped
        )
        # A step with fewer rows would shift every later step of a trainer that counts rows.
        order = [step for step in order if len(step) == ROWS_PER_STEP]
        if len(order) >= count:
            break
    return [[rows[i] for i in step] for step in order[:count]]


def largest_first(steps: Steps) -> Steps:
    """The step with the most padded tokens first, so that the shortest run has its peak too."""
    largest = max(range(len(steps)), key=lambda i: _padded(steps[i]))
    return [steps[largest], *steps[:largest], *steps[largest + 1 :]]


def slices(rows: list[Row], length: int, count: int) -> list[Row]:
    """Rows of exactly `length` tokens cut from the text; the first quarter is the prompt."""
    text = list(itertools.chain.from_iterable(ids for ids, _ in rows))
    while len(text) < length * count:
        text += text
    mask = [place >= length // 4 for place in range(length)]
    return [(text[i * length : (i + 1) * length], mask) for i in range(count)]


def tokens_of(steps: Steps) -> list[int]:
    """Real tokens of each step."""
    return [sum(len(ids) for ids, _ in step) for step in steps]


def facts(steps: Steps) -> dict[str, Any]:
    """What a result file keeps of the steps."""
    lengths = [len(ids) for step in steps for ids, _ in step]
    return {
        "sha256": hashlib.sha256(json.dumps(steps).encode()).hexdigest(),
        "tokens_per_row": statistics.mean(lengths),
        "longest_row_tokens": max(lengths),
        "tokens_per_step": statistics.mean(tokens_of(steps)),
        "padded_tokens_per_step": statistics.mean(map(_padded, steps)),
        "supervised_tokens_per_step": statistics.mean(
            sum(sum(mask[1:]) for _, mask in step) for step in steps
        ),
    }


def _padded(step: list[Row]) -> int:
    return len(step) * max(len(ids) for ids, _ in step)
