"""What a sweep tries: arms, and the groups of them that one cohort run can train together."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.recipe import COHORT_LISTS, AdapterOptions, Range, Recipe, RecipeError
from lighten.recipe.fields import AdapterFields, RecipeFields
from lighten.recipe.swept import takes_whole_numbers

# May differ between the adapters of one run.
ADAPTER_SETTINGS = tuple(AdapterFields.model_fields)
# Where the result goes and how it is followed; they change nothing in the training.
_OUTPUT_SETTINGS = ("output_dir", "report_to", "logging_steps", "evaluate", "quantize", "sweep",
                    "adapters")  # fmt: skip
_SHORT_NAMES = {
    "lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "learning_rate": "lr",
    "seed": "seed", "lora_target_modules": "", "use_rslora": "rslora", "use_dora": "dora",
    "init_lora_weights": "init", "loraplus_lr_ratio": "loraplus", "optim": "", "dtype": "",
    "model_name_or_path": "",
}  # fmt: skip
FULL = "full"


@dataclass(frozen=True)
class Arm:
    """One thing that is tried.

    Attributes:
        name: Says what differs from the other arms; folder name of its adapter.
        sets: The settings that make it: what was swept, and the alpha that follows the rank.
        recipe: The completed recipe of this arm alone; training it is training the arm.
    """

    name: str
    sets: Mapping[str, Any]
    recipe: Recipe = field(repr=False, compare=False)

    @property
    def setting(self) -> str:
        """What the arm tries, whatever its seed: arms that agree in it are repetitions."""
        return json.dumps({k: v for k, v in self.sets.items() if k != "seed"}, sort_keys=True)

    @property
    def options(self) -> AdapterOptions:
        """Its adapter, every setting filled in."""
        return self.recipe.cohort()[0]

    @property
    def alone(self) -> bool:
        """Whether no other arm can share its run: PEFT's own modules, or no adapter at all."""
        options = self.options
        peft_init = options.init_lora_weights not in (True, False, "gaussian", "orthogonal")
        return (
            self.recipe.method == FULL or options.use_dora or options.peft is not None or peft_init
        )


@dataclass(frozen=True)
class Group:
    """Arms that share base, data and batch: one cohort run trains them in the same pass.

    Attributes:
        name: Folder name of the run inside the sweep's folder.
        arms: At least one.
    """

    name: str
    arms: tuple[Arm, ...]

    def recipe(self, folder: Path) -> Recipe:
        """The recipe of the run, whose adapters are called like the arms.

        Args:
            folder: The sweep's folder; the run goes into a folder of the group's name there.
        """
        first = self.arms[0].recipe
        changes = {"output_dir": str(folder / self.name)}
        if first.method == FULL:
            return first.changed(changes)
        if len(self.arms) == 1:
            return first.changed({**changes, "adapters": [{"name": self.arms[0].name}]})
        # An entry says what is set; where an arm sets nothing, the first arm's must not fill in.
        defaults = {key: RecipeFields.model_fields[key].default for key in ADAPTER_SETTINGS}
        return first.changed(
            {**defaults, **changes, "adapters": [_entry(arm) for arm in self.arms]}
        )

    def adapter(self, arm: Arm) -> str:
        """What the arm is called inside the run."""
        return "default" if arm.recipe.method == FULL else arm.name


def _entry(arm: Arm) -> dict[str, Any]:
    options = arm.options
    values = {key: getattr(options, key) for key in ADAPTER_SETTINGS}
    return {"name": arm.name, **{k: v for k, v in values.items() if v is not None}}


def grid_of(recipe: Recipe) -> dict[str, list[Any]]:
    """The swept settings of the recipe's `sweep` section with their values.

    Raises:
        RecipeError: A range that does not say how many values it has.
    """
    return {key: values_of(key, tried) for key, tried in recipe.sweep.grid.items()}


def values_of(key: str, tried: list[Any] | Range) -> list[Any]:
    """The values of one swept setting, as the recipe will hold them.

    Raises:
        RecipeError: A range that does not say how many values it has.
    """
    if isinstance(tried, Range):
        try:
            return tried.values(whole=takes_whole_numbers(key))
        except ValueError as error:
            raise RecipeError(f"sweep.{key}: {error}") from error
    # `1e-4` on a command line and in YAML are numbers already; text that a field reads as a
    # number becomes one here, so that names and sorting are right.
    required = {"model_name_or_path": "m", "dataset": "d"}
    return [getattr(RecipeFields.model_validate({**required, key: value}), key) for value in tried]


def expand(
    recipe: Recipe,
    grid: Mapping[str, Sequence[Any]] | None = None,
    scaling: str | None = None,
) -> list[Arm]:
    """Every combination of the swept settings, over every adapter that the recipe spells out.

    Args:
        recipe: What all arms share. If it makes a cohort by itself (`adapters`, or lists), each of
            its adapters is crossed with the grid.
        grid: Values by setting; default the recipe's `sweep` section.
        scaling: `fixed`, `rslora` or `alpha`; what is held over swept ranks (trap 25). Default the
            recipe's.

    Raises:
        RecipeError: An arm's settings contradict each other.
    """
    grid = grid_of(recipe) if grid is None else grid
    scaling = recipe.sweep.scaling if scaling is None else scaling
    entries, shared = _entries(recipe)
    combinations: list[tuple[dict[str, Any], Recipe]] = []
    adapter_names: list[str] = []
    entry_names = [entry.name for entry in recipe.adapters or ()] or [""] * len(entries)
    for name, entry in zip(entry_names, entries, strict=True):
        for values in itertools.product(*grid.values()):
            sets = {**entry, **dict(zip(grid, values, strict=True))}
            sets |= _scale(shared, entry, sets, grid, scaling)
            try:
                combinations.append((sets, shared.changed(sets)))
                adapter_names.append(name)
            except RecipeError as error:
                reason = str(error).replace("recipe: ", "", 1)
                raise RecipeError(f"arm {_describe(sets)}: {reason}") from error
    names = _names([sets for sets, _ in combinations], adapter_names, grid)
    arms = [
        Arm(name, sets, arm_recipe)
        for name, (sets, arm_recipe) in zip(names, combinations, strict=True)
    ]
    arm_by_recipe: dict[str, str] = {}
    for arm in arms:
        recipe_text = json.dumps(arm.recipe.completed(), sort_keys=True)
        if recipe_text in arm_by_recipe:
            raise RecipeError(
                f"arms {arm_by_recipe[recipe_text]} and {arm.name} are the same; remove one"
            )
        arm_by_recipe[recipe_text] = arm.name
    return arms


def _entries(recipe: Recipe) -> tuple[list[dict[str, Any]], Recipe]:
    """The adapters that the recipe itself makes (one: it says nothing), and the rest of it."""
    cohort = recipe.cohort()
    lists = [key for key in COHORT_LISTS if isinstance(getattr(recipe, key), list)]
    plain: dict[str, Any] = {key: getattr(cohort[0], key) for key in lists}
    shared = recipe.changed({**plain, "adapters": None, "sweep": {}, "output_dir": None})
    if recipe.adapters is None and not lists:
        return [{}], shared
    flat = shared.cohort()[0]
    differing = [
        key for key in ADAPTER_SETTINGS
        if any(getattr(adapter, key) != getattr(flat, key) for adapter in cohort)
        or key in lists
    ]  # fmt: skip
    return [{key: getattr(adapter, key) for key in differing} for adapter in cohort], shared


def _scale(
    shared: Recipe,
    entry: Mapping[str, Any],
    sets: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    scaling: str,
) -> dict[str, Any]:
    """The alpha that goes with a swept rank, so that rank is not confounded with step size."""
    if "lora_r" not in grid or "lora_alpha" in grid:
        return {"use_rslora": True} if scaling == "rslora" and "lora_r" in grid else {}
    flat = shared.cohort()[0]
    rank, alpha = entry.get("lora_r", flat.lora_r), entry.get("lora_alpha", flat.lora_alpha)
    squared = bool(sets.get("use_rslora", flat.use_rslora))
    if scaling == "alpha":
        return {"lora_alpha": alpha}
    if scaling == "rslora":
        # alpha / sqrt(r) as the recipe scales at its own rank.
        matched = alpha if squared else alpha / rank**0.5
        return {"use_rslora": True, "lora_alpha": matched}
    if squared:
        return {"lora_alpha": alpha * (sets["lora_r"] / rank) ** 0.5}
    return {"lora_alpha": alpha * sets["lora_r"] / rank}


def _names(
    all_sets: Sequence[Mapping[str, Any]], adapter_names: Sequence[str], grid: Mapping[str, Any]
) -> list[str]:
    """A name per arm from what differs; alpha is left out where it follows the rank.

    Args:
        all_sets: What each arm sets.
        adapter_names: The name of the recipe's own adapter that each arm came from, or nothing.
        grid: The swept settings.
    """
    keys = dict.fromkeys(key for sets in all_sets for key in sets)
    if any(adapter_names):
        keys = dict.fromkeys(key for key in keys if key in grid)
    lone = len(all_sets) == 1
    differing = [
        key
        for key in keys
        if len({json.dumps(sets.get(key)) for sets in all_sets}) > 1 or (lone and key in grid)
    ]
    if "lora_r" in differing and "lora_alpha" in differing:
        pairs = {(sets.get("lora_r"), sets.get("lora_alpha")) for sets in all_sets}
        if len(pairs) == len({rank for rank, _ in pairs}):
            differing.remove("lora_alpha")
    names: list[str] = []
    for adapter_name, sets in zip(adapter_names, all_sets, strict=True):
        label = "-".join(
            filter(None, (adapter_name, _name({key: sets.get(key) for key in differing})))
        )
        # `base` and `full` are the references' names.
        name = (
            label[:74]
            if label and label not in ("base", FULL)
            else f"{label}-arm"
            if label
            else "default"
        )
        names.append(name if name not in names else f"{name}-{names.count(name) + len(names)}")
    return names


def _name(sets: Mapping[str, Any]) -> str:
    parts = []
    for key, value in sets.items():
        short = _SHORT_NAMES.get(key, key)
        if isinstance(value, bool):
            parts.append(short if value else f"no-{short}")
        elif value is not None:
            parts.append(short + _text(value))
    text = re.sub(r"[^\w.=-]+", ".", "-".join(parts)).strip(".-")
    return text[:76]


def _text(value: Any) -> str:
    if isinstance(value, float | int):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ".".join(_text(item) for item in value)
    if isinstance(value, Mapping):
        return ".".join(f"{key}={_text(item)}" for key, item in value.items())
    return Path(value).name if isinstance(value, str) else str(value)


def _describe(sets: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sets.items()) or "default"


def group_arms(arms: Sequence[Arm]) -> list[Group]:
    """Arms that can share one cohort run stand together; groups run one after another.

    Only what an adapter may have for itself may differ inside a group; what PEFT's own modules
    train, and full fine-tuning, goes alone.
    """
    shared: dict[str, list[Arm]] = {}
    for place, arm in enumerate(arms):
        ignored = (*ADAPTER_SETTINGS, *_OUTPUT_SETTINGS)
        common = {k: v for k, v in arm.recipe.completed().items() if k not in ignored}
        key = f"alone {place}" if arm.alone else json.dumps(common, sort_keys=True)
        shared.setdefault(key, []).append(arm)
    groups = []
    for number, group in enumerate(shared.values(), start=1):
        name = group[0].name if len(group) == 1 else f"cohort-{number}"
        groups.append(Group(name, tuple(group)))
    return groups


def full_arm(recipe: Recipe) -> Arm:
    """The reference arm that trains all weights of the base, unquantised.

    Raises:
        UserError: The recipe is of full fine-tuning already.
    """
    if recipe.method == FULL:
        raise UserError("method: full trains no adapter, so there is nothing to sweep; use lora")
    _, shared = _entries(recipe)
    drop = {
        key for key, declared in RecipeFields.model_fields.items()
        if isinstance(declared.json_schema_extra, dict)
        and declared.json_schema_extra["section"] == "lora"
    } | {"load_in_4bit", "load_in_8bit", "learning_rate", "method"}  # fmt: skip
    drop |= {key for key in RecipeFields.model_fields if key.startswith("bnb_4bit_")}
    values = {key: value for key, value in shared.completed().items() if key not in drop}
    rate = recipe.sweep.full_learning_rate
    full_recipe = Recipe.from_values({**values, "method": FULL, "learning_rate": rate})
    return Arm(FULL, {"method": FULL, "learning_rate": rate}, full_recipe)
