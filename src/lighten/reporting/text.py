"""What the numbers of a run say, in sentences and in marks on answers."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from lighten.reporting.charts import number
from lighten.runs import MODEL_ALONE

_LONGEST_SETTING = 60
_WORD = re.compile(r"\s+|\w+|[^\w\s]")


def headline(info: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[str]:
    """One honest sentence per adapter about what training changed."""
    if evaluation is None:
        nothing = (info.get("data") or {}).get("nothing_held_out")
        if nothing and info.get("status") == "finished":
            return [f"This run is trained, and not measured: {nothing}."]
        ended = {"failed": "This run failed", "interrupted": "This run was interrupted",
                 "killed": "This run was killed", "running": "This run has not ended"}  # fmt: skip
        start = ended.get(str(info.get("status")), "This run is trained")
        return [f"{start}; it has not been evaluated yet (lighten evaluate)."]
    if info.get("status") == MODEL_ALONE and info.get("adapter") is None:
        return ["A model as it is: nothing was trained."]
    values = {model["name"]: model["metrics"] for model in evaluation["models"]}
    sentences = []
    for name, metrics in values.items():
        if name == "base":
            continue
        changes = [
            _change(label, values["base"], metrics, evaluation.get("differences", []), name, metric)
            for metric, label in (("perplexity", "perplexity"), ("chrf", "chrF"))
            if metric in metrics and metric in values.get("base", {})
        ]
        if not changes:
            continue
        lead = "Held-out " if name == "default" else f"{name}: held-out "
        sentences.append(f"{lead}{' and '.join(changes)}.")
    return sentences or ["Evaluated, without a base to compare with."]


def held_out_notes(info: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[str]:
    """What has to be said of the examples that the held-out figures were measured on."""
    if evaluation is None:
        return list((info.get("data") or {}).get("held_out_notes", []))
    return list(evaluation["dataset"].get("notes", []))


def watched_notes(info: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[str]:
    """What has to be said of the examples that the loss was watched on, and is not said above.

    An evaluation may be of others: a test set, or fewer of them.
    """
    shown = held_out_notes(info, evaluation)
    return [note for note in held_out_notes(info, None) if note not in shown]


def _change(
    label: str,
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    differences: Sequence[Mapping[str, Any]],
    name: str,
    metric: str,
) -> str:
    verdict = verdict_of(differences, name, metric)
    phrase = {
        "better": "better, outside the 95 % interval",
        "worse": "worse, outside the 95 % interval",
        "": "not compared",
    }.get(verdict, verdict)
    return f"{label} {number(base[metric]['value'])} → {number(tuned[metric]['value'])} ({phrase})"


def verdict_of(differences: Sequence[Mapping[str, Any]], adapter: str, metric: str) -> str:
    """The verdict on one adapter and metric, empty if it was not compared."""
    for difference in differences:
        if difference["adapter"] == adapter and difference["metric"] == metric:
            return str(difference["verdict"])
    return ""


def marked(answer: str, reference: str) -> Markup:
    """The answer with the words that the reference has too in `<mark>`, underlined by the page."""
    words, reference_words = _WORD.findall(answer), _WORD.findall(reference)
    matcher = difflib.SequenceMatcher(
        a=[word.casefold() for word in words],
        b=[word.casefold() for word in reference_words],
        autojunk=False,
    )
    out, place = [], 0
    for start, _, size in matcher.get_matching_blocks():
        out.append(escape("".join(words[place:start])))
        common = "".join(words[start : start + size])
        if common.strip():
            out.append(Markup("<mark>{}</mark>").format(common))
        else:
            out.append(escape(common))
        place = start + size
    return Markup("").join(out)


def setting(value: Any) -> str:
    """A recipe's value in a few characters."""
    if value is None:
        return "not set"
    if isinstance(value, bool | Mapping | list):
        shown = json.dumps(value, ensure_ascii=False)
    else:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= _LONGEST_SETTING else f"{shown[: _LONGEST_SETTING - 1]}…"


def size(count: float | None) -> str:
    """Bytes as MB of files (10^6), in kB or GB where that reads better."""
    if count is None:
        return "not known"
    if 0 < count < 1e6:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def gib(count: float | None) -> str:
    """Bytes of memory as GiB (2^30)."""
    return "not known" if count is None else f"{count / 2**30:.2f} GiB"


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "not known"
    if seconds < 90:
        digits = 0 if seconds >= 10 or seconds == 0 else 1 if seconds >= 1 else 2
        return f"{seconds:.{digits}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
