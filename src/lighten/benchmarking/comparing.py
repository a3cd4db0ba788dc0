"""`lighten bench --compare`: two files, record by record, as ratios with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import UserError

LEVEL, DRAWS = 0.95, 4000
# Fewer repeats than this say nothing about what another run of them would give.
FEWEST = 5
# What of a record says how much work it is of; a name does not tell all of it.
WORK = ("new_tokens", "dtype", "rows", "tokens", "longest", "parameters", "max_length",
        "memory_bytes")  # fmt: skip
# What is a timing, and what one number (the larger it is, the more it takes).
TIMES = ("seconds", "first_token_s", "decode_s")
NUMBERS = ("peak_bytes", "resident_bytes", "weights_bytes", "file_bytes", "largest")


def read(path: Path) -> dict[str, Any]:
    """A file that `lighten bench` wrote.

    Raises:
        UserError: There is none, or it is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(result, dict) or not isinstance(result.get("records"), list):
        raise UserError(f"{path} is no result of lighten bench: it has no records")
    for place, record in enumerate(result["records"], 1):
        if not _can_be_read(record):
            raise UserError(
                f"{path}: record {place} is none of this version of lighten bench; measure it again"
            )
    return result


def _can_be_read(record: Any) -> bool:
    """Whether a record has its name, and of each time a median and the repeats behind it."""
    if not isinstance(record, dict):
        return False
    names = ("part", "what") if record.get("part") == "max-batch" else ("part", "name")
    timings = [record[figure] for figure in TIMES if figure in record]
    return all(isinstance(record.get(name), str) for name in names) and all(
        isinstance(timing, dict) and _is_above_zero(timing.get("median"))
        and isinstance(timing.get("samples"), list) and all(map(_is_above_zero, timing["samples"]))
        for timing in timings
    )  # fmt: skip


def _is_above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Each figure of `after` over that of `before`.

    Args:
        before: Result of `lighten bench`.
        after: Another.

    Returns:
        `rows` with ratio, 95 % interval where there are repeats, and a `verdict`; `notes` on what
        differs beside the figures, and on records that only one of them has.
    """
    first, second = _by_name(before), _by_name(after)
    notes = list(_differences(before, after))
    for name in [n for n in first if n not in second]:
        notes.append(f"{name[0]}: {name[1]} is in the first file alone")
    for name in [n for n in second if n not in first]:
        notes.append(f"{name[0]}: {name[1]} is in the second file alone")
    rows = []
    for key in first:
        if key in second:
            notes += _other_work(key, first[key], second[key])
            rows += list(_figures(key, first[key], second[key]))
    return {"rows": rows, "notes": notes}


def _by_name(result: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    # A largest batch is called after the memory that it was within, which is never quite the same.
    return {
        (record["part"], record["what" if record["part"] == "max-batch" else "name"]): record
        for record in result["records"]
    }


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    words = {"base_sha256": "the model's weights differ", "adapter_sha256": "the adapters differ",
             "versions": "the versions differ"}  # fmt: skip
    for key in ("base_sha256", "adapter_sha256", "device", "machine", "versions"):
        if before.get(key) != after.get(key):
            subject = words.get(key, f"the {key} differs")
            yield f"{subject}: the ratios are not of the code alone"


def _other_work(
    key: tuple[str, str], first: Mapping[str, Any], second: Mapping[str, Any]
) -> list[str]:
    """What was measured of other work under one name: longer answers, larger batches."""
    changes = [
        f"{name} is {first[name]} and {second[name]}"
        for name in WORK
        if name in first and name in second and first[name] != second[name]
    ]
    if not changes:
        return []
    return [f"{key[0]}: {key[1]}: {', '.join(changes)}: the ratios are of other work"]


def _figures(
    key: tuple[str, str], first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    part, name = key
    for figure in TIMES:
        if figure in first and figure in second:
            a, b = first[figure], second[figure]
            row = {"part": part, "name": name, "figure": figure, "before": a["median"],
                   "after": b["median"], "ratio": b["median"] / a["median"]}  # fmt: skip
            yield {**row, **significance(a["samples"], b["samples"])}
    for figure in NUMBERS:
        if first.get(figure) and second.get(figure) is not None:
            yield {"part": part, "name": name, "figure": figure, "before": first[figure],
                   "after": second[figure], "ratio": second[figure] / first[figure],
                   "low": None, "high": None, "verdict": "measured once"}  # fmt: skip
    if bool(first.get("why")) != bool(second.get("why")):
        why = first.get("why") or second.get("why")
        verdict = "now measured" if first.get("why") else "no longer measured"
        yield {"part": part, "name": name, "figure": "seconds", "before": None, "after": None,
               "ratio": None, "low": None, "high": None,
               "verdict": f"{verdict}: {why}"}  # fmt: skip


def significance(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """An interval of the medians' ratio by bootstrap, and what it says.

    The samples of one process lie nearer to each other than those of two: a difference that is
    real between two processes need not be one between two versions.
    """
    if min(len(before), len(after)) < FEWEST:
        return {"low": None, "high": None, "verdict": f"fewer than {FEWEST} repeats"}
    random = np.random.default_rng(0)
    medians = [
        np.median(random.choice(np.asarray(samples), (DRAWS, len(samples))), axis=1)
        for samples in (before, after)
    ]
    low, high = np.quantile(medians[1] / medians[0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    verdict = "no difference found"
    if high < 1:
        verdict = "less"
    elif low > 1:
        verdict = "more"
    return {"low": float(low), "high": float(high), "verdict": verdict}
