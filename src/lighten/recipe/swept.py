"""What the swept settings of a recipe get wrong, found before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lighten.errors import UserError
from lighten.recipe import aliases
from lighten.recipe.fields import RecipeFields
from lighten.recipe.sweeping import Range, SweepOptions

if TYPE_CHECKING:
    from lighten.recipe import Recipe

# Losses of arms with different ones of these would be measured on different things.
_MEASURED = (
    "dataset", "eval_dataset", "dataset_columns", "val_size", "max_train_samples",
    "max_eval_samples", "max_length", "truncation_strategy", "assistant_only_loss",
    "completion_only_loss", "skip_bad_rows", "system_role", "thinking",
    "chat_template", "added_tokens",
)  # fmt: skip
_NEVER = {
    **dict.fromkeys(_MEASURED, "it changes what the loss is measured on; make a sweep for each"),
    "method": "use reference: full to compare with full fine-tuning",
    "trainable_layers": "use reference: full to compare with full fine-tuning",
    "adapter_name_or_path": "it says rank and targets of every arm; make a sweep for each",
    "max_time": "each arm would make another number of steps on each machine; sweep max_steps",
    "adapters": "each entry of the recipe's adapters is an arm already",
    "output_dir": "an arm's folder is inside the sweep's",
    "report_to": "every arm reports to the same trackers",
    "evaluate": "every arm is measured alike",
    "sweep": "a sweep does not hold another",
}


def translate(settings: MutableMapping[str, Any]) -> tuple[list[str], list[str]]:
    """Give swept settings their canonical names, in place.

    Returns:
        A notice per alias, and a sentence per setting that is named twice.
    """
    section = settings.get("sweep")
    if not isinstance(section, Mapping):
        return [], []
    renamed = {key: aliases.RENAMED.get(key, key) for key in section}
    settings["sweep"] = {renamed[key]: value for key, value in section.items()}
    notices = [
        f"sweep.{key} is called sweep.{name} here" for key, name in renamed.items() if key != name
    ]
    twice = {name for name in renamed.values() if [*renamed.values()].count(name) > 1}
    return notices, [
        f"sweep.{key} and another name of sweep.{name} both set the same thing; keep one"
        for key, name in renamed.items()
        if name in twice and key != name
    ]


def gathered(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of the verb `sweep`: what is swept or says how goes to the `sweep` section.

    A list of a setting that takes a list itself (`lora_target_modules`) is one value; to sweep it,
    write `sweep.lora_target_modules`.

    Raises:
        UserError: A setting is given under two names.
    """
    routed: dict[str, Any] = {}
    for key, given in overrides.items():
        name, value = aliases.RENAMED.get(key, key), aliases.plain(given)
        place = key
        if key in SweepOptions.model_fields and key != "grid":
            place = f"sweep.{key}"
        elif name not in _NEVER and name in RecipeFields.model_fields:
            is_range = isinstance(value, Mapping) and {"min", "max"} <= set(value)
            if is_range or (isinstance(value, list) and not _takes_lists(name)):
                place = f"sweep.{name}"
        if place in routed:
            raise UserError(f"{key} and another name of {name} both set the same thing; keep one")
        routed[place] = value
    return routed


def overridden(recipe: Recipe, routed: Mapping[str, Any]) -> Recipe:
    """The recipe in which a setting is what the command line says, alone or swept, and not both.

    A single value takes the place of those that the file sweeps; values to sweep take that of a
    list in the file, which would be crossed with them.

    Args:
        recipe: The file's, with the overrides in it.
        routed: These, as `gathered` gives them.
    """
    single = aliases.translate({key: routed[key] for key in routed if "." not in key})[0]
    listed = [key.removeprefix("sweep.") for key in routed if key.startswith("sweep.")]
    if isinstance(section := routed.get("sweep"), Mapping):  # from Python, as in a file
        listed += [str(aliases.RENAMED.get(key, key)) for key in section]
    settled = [key for key in recipe.sweep.grid if key in single and key not in listed]
    crossed = [
        key for key in listed if isinstance(getattr(recipe, key, None), list)
        and not _takes_lists(key)
    ]  # fmt: skip
    if not (settled or crossed):
        return recipe
    options = recipe.sweep.model_dump(mode="json")
    options["grid"] = {key: options["grid"][key] for key in options["grid"] if key not in settled}
    # Of a list the first is what the scale over swept ranks is taken from.
    changed = recipe.changed(
        {"sweep": options, **{key: getattr(recipe, key)[0] for key in crossed}}
    )
    changed.notices.extend(
        f"{key} {single[key]} takes the place of the recipe's sweep.{key}" for key in settled
    )
    changed.notices.extend(f"sweep.{key} takes the place of the recipe's {key}" for key in crossed)
    return changed


def _takes_lists(key: str) -> bool:
    """Whether one value of the setting may be a list; a list of numbers would be a cohort."""
    return "list[str]" in str(RecipeFields.model_fields[key].annotation)


def problems(options: SweepOptions) -> list[str]:
    """A sentence per problem, with the key's path."""
    faults = []
    for key, choices in options.grid.items():
        if key not in RecipeFields.model_fields:
            pool = [*RecipeFields.model_fields, *SweepOptions.model_fields]
            near = difflib.get_close_matches(key, pool, n=1, cutoff=0.55)
            mend = f"did you mean {near[0]}?" if near else "see: lighten schema"
            faults.append(f"sweep.{key} is not a setting; {mend}")
        elif key in _NEVER:
            faults.append(f"sweep.{key} cannot be swept: {_NEVER[key]}")
        elif isinstance(choices, Range):
            # Without a number of values only a search can draw from it: `values_of` says so.
            ends: list[Any] = [choices.min, choices.max]
            if choices.count is not None or choices.factor is not None:
                ends = choices.values(whole=takes_whole_numbers(key))
            faults += [fault for end in ends if (fault := _fault(key, _as_integer(end)))]
        elif not choices:
            faults.append(f"sweep.{key} is an empty list; give the values to try, or remove it")
        else:
            faults += [fault for value in choices if (fault := _fault(key, value))]
            if len({repr(value) for value in choices}) < len(choices):
                faults.append(f"sweep.{key}: {choices!r} holds a value twice; remove one")
    if options.scaling == "alpha" and "lora_alpha" in options.grid:
        faults.append("sweep.scaling: alpha has no effect where sweep.lora_alpha says every alpha")
    faults += _contradictions(options)
    return list(dict.fromkeys(faults))


def _contradictions(options: SweepOptions) -> list[str]:
    """Options that cannot hold together."""
    faults = []
    if options.search is None and options.trials is not None:
        faults.append("sweep.trials has no effect without sweep.search; set search: tpe")
    if options.search is not None:
        faults += [
            f"sweep.{key} has no effect with sweep.search, which {why}; remove one of the two"
            for key, why in (("tune", "draws the rate with the rest if it is swept"),
                             ("budget", "ends after its trials"),
                             ("truncate", "draws the rank with the rest if it is swept"))
            if getattr(options, key)
        ]  # fmt: skip
    if options.executor == "ray" and options.budget is not None:
        faults.append("sweep.budget is not kept over Ray's machines; remove it, or executor: ray")
    if options.executor == "ray" and options.tune is not None:
        faults.append("sweep.tune runs on this machine alone; use search: tpe with executor: ray")
    ranks = options.grid.get("lora_r")
    if options.truncate and (ranks is None or (isinstance(ranks, list) and len(ranks) < 2)):
        faults.append("sweep.truncate needs several ranks: give them as lora_r: [8, 32, 128]")
    return faults


def takes_whole_numbers(key: str) -> bool:
    """Whether a setting takes whole numbers only."""
    settings = {"model_name_or_path": "m", "dataset": "d", key: 0.5}
    try:
        RecipeFields.model_validate(settings)
    except ValidationError as error:
        return any(item["type"].startswith("int") for item in error.errors())
    return False


def _as_integer(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _fault(key: str, value: Any) -> str | None:
    """What is wrong with one value of a setting, or None."""
    # lora_target_modules and modules_to_save take lists; a list of numbers would be a cohort.
    if isinstance(value, list) and "list[str]" not in str(
        RecipeFields.model_fields[key].annotation
    ):
        return f"sweep.{key}: {value!r} is a list inside the list; give single values"
    settings = {"model_name_or_path": "m", "dataset": "d", key: value}
    try:
        RecipeFields.model_validate(settings)
    except ValidationError as error:
        item = error.errors()[0]
        choices = item.get("ctx", {}).get("expected")
        reason = f"use {choices}" if choices else item["msg"][0].lower() + item["msg"][1:]
        return f"sweep.{key}: {value!r} does not do; {reason}"
    return None
