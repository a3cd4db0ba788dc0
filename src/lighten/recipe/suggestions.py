"""What to do about a name that is no setting: another tool's, or one that is mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lighten.recipe import aliases, other_tools
from lighten.recipe.evaluating import EvaluateOptions
from lighten.recipe.fields import AdapterEntry, QuantizeOptions, RecipeFields
from lighten.recipe.sweeping import Range

# How alike a mistyped name is to what was meant (difflib's ratio). Other tools' names share that
# many letters with hundreds of ours only by mistake; within a section there are few to confuse.
_TYPED, _IN_SECTION = 0.82, 0.55
_SECTIONS = {
    "evaluate": EvaluateOptions.model_fields, "quantize": QuantizeOptions.model_fields,
}  # fmt: skip
_SHORTEST = 6  # of what may be a setting's beginning (`warmup`); a shorter word begins many


def mend(key: str) -> str:
    """What to do about a setting that there is none of.

    Args:
        key: Its name; of one in a section, with the section's before a point.
    """
    if key == "evaluate.dataset":
        return "set eval_dataset, which a run is measured on in place of what it held out"
    if answer := other_tools.instead(key):
        return answer
    section, _, name = key.rpartition(".")
    pool: Iterable[str] = (
        *RecipeFields.model_fields, *aliases.RENAMED, *aliases.SPECIAL, *other_tools.PASSED_OVER
    )  # fmt: skip
    if section:
        pool = _SECTIONS.get(section, (*AdapterEntry.model_fields, *Range.model_fields))
    near = difflib.get_close_matches(
        name, list(pool), n=1, cutoff=_IN_SECTION if section else _TYPED
    )
    if not near and not section and len(name) >= _SHORTEST:
        near = [setting for setting in RecipeFields.model_fields if setting.startswith(f"{name}_")]
    return f"did you mean {near[0]}?" if near else "see: lighten schema"
