"""What the user asks for: a typed recipe, read from YAML and overrides, checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import PrivateAttr, ValidationError

from lighten.errors import UserError
from lighten.paths import (
    data_label,
    data_sets,
    expanded,
    may_be_data,
    may_have_splits,
    named,
)
from lighten.recipe import (
    aliases,
    bits,
    empty,
    messages,
    offloading,
    places,
    schedules,
    schema,
    spread,
    start,
    swept,
    yaml_lines,
)
from lighten.recipe.evaluating import EvaluateOptions
from lighten.recipe.fields import (
    AdapterEntry,
    AdapterFields,
    AdapterOptions,
    QuantizeOptions,
    RecipeFields,
    lora_settings,
)
from lighten.recipe.section import FULL_LEARNING_RATE, LORA_LEARNING_RATE
from lighten.recipe.sweeping import Range, SweepOptions

__all__ = [
    "COHORT_LISTS",
    "AdapterEntry",
    "AdapterOptions",
    "EvaluateOptions",
    "QuantizeOptions",
    "Range",
    "Recipe",
    "RecipeError",
    "SweepOptions",
]

# A list in one of these makes a cohort, one adapter per entry.
COHORT_LISTS = ("lora_r", "lora_alpha", "lora_dropout", "learning_rate", "seed")


class RecipeError(UserError):
    """All problems of a recipe, told together."""


class Recipe(RecipeFields):
    """A complete recipe. Make one with `from_file` or `from_values`."""

    _notices: list[str] = PrivateAttr(default_factory=list)
    _name: str | None = PrivateAttr(default=None)
    _packs_blocks: bool = PrivateAttr(default=False)

    @property
    def notices(self) -> list[str]:
        """A sentence for each alias that was translated."""
        return self._notices

    @property
    def name(self) -> str:
        """What to call a run of this recipe."""
        if self._name:
            return self._name
        model = named(Path(self.model_name_or_path)).name.removesuffix(".gguf")
        return f"{model}-{data_label(self.dataset)}"

    @property
    def packs_blocks_elsewhere(self) -> bool:
        """Whether it says `packing`, which fills blocks of `max_length` tokens in other tools."""
        return self._packs_blocks

    @property
    def compute_dtype(self) -> str:
        """What the base computes in, under either of its two names."""
        return self.bnb_4bit_compute_dtype if self.dtype == "auto" else self.dtype

    @property
    def qat_groups(self) -> int | None:
        """Group size of quantisation-aware training; None: there is none."""
        return None if self.qat is None else self.qat_group_size

    @property
    def run_folder(self) -> Path:
        """Where the run goes."""
        return expanded(self.output_dir) if self.output_dir else Path("runs") / self.name

    @classmethod
    def from_file(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a recipe file; overrides may be dotted (`evaluate.max_examples`).

        Relative paths of data, models, templates, DeepSpeed's configuration and what evaluation
        reads mean the recipe's folder if they exist there, else the working directory.

        Raises:
            RecipeError: Every problem found, each with key, value, line and what to change.
        """
        path = expanded(str(path))
        values, lines = yaml_lines.read(path)
        recipe = cls._build(values, overrides, str(path), lines, folder=path.parent)
        recipe._name = named(path.parent).name if path.stem == "recipe" else path.stem
        return recipe

    @classmethod
    def from_values(
        cls, values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> Recipe:
        """Make a recipe from settings by name.

        Raises:
            RecipeError: Every problem found.
        """
        return cls._build(values, overrides, "recipe", {})

    @classmethod
    def _build(
        cls,
        values: Mapping[str, Any],
        overrides: Mapping[str, Any] | None,
        source: str,
        lines: Mapping[str, int],
        applied_adapter: str | None = None,
        folder: Path | None = None,
    ) -> Recipe:
        values, empty_names, problems = empty.left_out(values)
        overrides, _, override_problems = empty.left_out(overrides or {})
        settings, notices, faults = aliases.translate(values, folder, beside=overrides)
        problems += faults
        if folder is not None:
            settings = places.beside(settings, folder)
        over, override_notices, faults = aliases.translate(
            overrides, beside=values if folder is None else places.beside(values, folder)
        )
        override_problems += faults
        where = messages.Places(source, lines, {*overrides, *over})
        sweep_notices, sweep_problems = swept.translate(settings)
        # A whole section comes before its parts, in whichever order they were given.
        for key, value in sorted(over.items(), key=lambda given: "." in given[0]):
            section, _, name = key.partition(".")
            if name and isinstance(settings.get(section) or {}, Mapping):
                name = aliases.RENAMED.get(name, name) if section == "sweep" else name
                settings[section] = {**(settings.get(section) or {}), name: value}
            else:
                settings[key] = value
        for section in schema.SECTIONS:
            if settings.get(section, ...) is None:  # left empty, it asks for nothing
                del settings[section]
        override_notices += aliases.keep_one_end(settings, over)
        for told, faults in (swept.translate(settings), start.fill_in(settings, applied_adapter)):
            override_notices += told
            problems += faults
        problems = [where.told(fault) for fault in problems + override_problems + sweep_problems]
        if settings.get("trainable_layers") is not None:
            said_last = over.get("trainable_layers") is not None and "method" not in over
            settings["method"] = "full" if said_last else settings.get("method", "full")
        if settings.get("method") == "full":
            settings.setdefault("learning_rate", FULL_LEARNING_RATE)
        try:
            recipe = cls.model_validate(settings)
        except ValidationError as error:
            problems += messages.of_validation(error, where)
        else:
            problems += map(where.told, _contradictions(recipe, settings))
        if problems:
            raise RecipeError("\n".join(problems))
        override_notices += sweep_notices
        recipe._notices = [
            *notices, *override_notices, *recipe._notices, *empty.told(empty_names, recipe)
        ]  # fmt: skip
        recipe._packs_blocks = recipe.packing is True and not any(
            said.get("padding_free") for said in (values, overrides)
        )
        return recipe

    @property
    def last_layers(self) -> int | None:
        """How many of the last decoder layers `trainable_layers` names; None: it names none."""
        if self.trainable_layers is None:
            return None
        return int(self.trainable_layers.partition("_")[2])

    def cohort(self) -> list[AdapterOptions]:
        """The adapters to train, every setting filled in; one entry for a base that learns."""
        if self.adapters is not None:
            adapters = [entry.model_dump(exclude_none=True) for entry in self.adapters]
        else:
            size = max((len(v) for v in map(self._list, COHORT_LISTS) if v), default=1)
            adapters = [
                {key: values[i] for key in COHORT_LISTS if (values := self._list(key))}
                for i in range(size)
            ]
            for name, adapter in zip(_names(adapters), adapters, strict=True):
                adapter["name"] = name
        return [self._filled(adapter) for adapter in adapters]

    def _list(self, key: str) -> list[Any] | None:
        value = getattr(self, key)
        return value if isinstance(value, list) else None

    def _filled(self, adapter: dict[str, Any]) -> AdapterOptions:
        flat = {
            key: getattr(self, key) for key in AdapterFields.model_fields if self._list_free(key)
        }
        filled = {**flat, **adapter}
        if filled.get("lora_alpha") is None:
            filled["lora_alpha"] = 2 * filled["lora_r"]
        filled["peft"] = self.peft
        return AdapterOptions.model_validate(filled)

    def _list_free(self, key: str) -> bool:
        return key not in COHORT_LISTS or self._list(key) is None

    def changed(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with some settings changed, under the same name.

        Raises:
            RecipeError: Every problem found.
        """
        values, applied = self.completed(), self.adapter_name_or_path
        full = self.method == "full"
        if self.learning_rate == (FULL_LEARNING_RATE if full else LORA_LEARNING_RATE):
            del values["learning_rate"]  # another method learns at another one
        recipe = Recipe._build(values, overrides, "recipe", {}, applied_adapter=applied)
        recipe._name = self._name
        recipe._notices = [*self._notices, *recipe._notices]
        recipe._packs_blocks &= self._packs_blocks or self.packing is not True
        return recipe

    def with_evaluate(self, options: Mapping[str, Any]) -> EvaluateOptions:
        """The `evaluate` section with other settings, given as `name` or `evaluate.name`.

        Raises:
            RecipeError: Every problem found.
        """
        settings = {key.removeprefix("evaluate."): value for key, value in options.items()}
        try:
            return EvaluateOptions.model_validate({**self.evaluate.model_dump(), **settings})
        except ValidationError as error:
            problems = messages.of_validation(error, messages.COMMAND_LINE, section="evaluate")
            raise RecipeError("\n".join(problems)) from error

    def completed(self) -> dict[str, Any]:
        """Every setting with its value, defaults written out."""
        return self.model_dump(mode="json")

    def without_effect(self) -> frozenset[str]:
        """The settings that its method does not read."""
        if self.method == "full":
            return frozenset(lora_settings())
        if self.peft is None:
            return frozenset()
        return frozenset(lora_settings()) - {"peft", "adapters"}

    def to_yaml(self) -> str:
        """The completed recipe as YAML."""
        text: str = yaml.safe_dump(self.completed(), sort_keys=False, allow_unicode=True)
        return text

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema of a recipe file, with all that may stand in it."""
        return schema.complete(cls.model_json_schema())


def _names(adapters: list[dict[str, Any]]) -> list[str]:
    """A name per adapter that says what differs."""
    if len(adapters) == 1:
        return ["default"]
    short = {
        "lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "learning_rate": "lr",
        "seed": "seed",
    }  # fmt: skip
    differing = [key for key in adapters[0] if len({str(adapter[key]) for adapter in adapters}) > 1]
    names = ["-".join(f"{short[key]}{adapter[key]:g}" for key in differing) for adapter in adapters]
    if len(set(names)) < len(names):
        names = [f"{name or 'adapter'}-{i + 1}" for i, name in enumerate(names)]
    return names


def _contradictions(recipe: Recipe, settings: Mapping[str, Any]) -> list[str]:
    """Settings that cannot hold together, or that have no effect in the chosen mode."""
    # A completed recipe writes every default out; those contradict nothing.
    settings = {
        key: value
        for key, value in settings.items()
        if value != RecipeFields.model_fields[key].default
    }
    problems = [
        f"{key}: {value!r} does not exist; give a file, a folder or a hub id"
        for key in ("dataset", "eval_dataset")
        for value in data_sets(getattr(recipe, key) or [])
        if value and not may_be_data(value)
    ]
    sizes = {key: len(v) for key in COHORT_LISTS if (v := recipe._list(key)) is not None}
    if any(size == 0 for size in sizes.values()):
        problems.append(f"{next(k for k, s in sizes.items() if s == 0)} is an empty list")
    elif len(set(sizes.values())) > 1:
        lengths = ", ".join(f"{key} has {size}" for key, size in sizes.items())
        problems.append(f"lists that make a cohort must be of one length, but {lengths}")
    if recipe.adapters is not None:
        problems += [
            f"{key} is a list, but adapters: spells the cohort out already; keep one of the two"
            for key in sizes
        ]
        names = [entry.name for entry in recipe.adapters]
        if not names:
            problems.append("adapters is empty; leave it out for a single adapter")
        problems += [
            f"adapters: two are called {name!r}; give each its own name"
            for name in sorted({n for n in names if names.count(n) > 1})
        ]
        problems += places.one_folder("adapters", names)
        if "base" in names:
            problems.append(
                "adapters: 'base' is what the untouched model is called beside its adapters; give "
                "the adapter another name"
            )
    problems += _method_problems(recipe, settings)
    if not problems:
        problems += _peft_problems(recipe, settings)
    if "warmup_ratio" in settings and recipe.warmup_steps is not None:
        problems.append("warmup_ratio has no effect beside warmup_steps; keep one")
    problems += schedules.problems(recipe, recipe.cohort() if not problems else [])
    if recipe.lr_scheduler_type == "constant":
        problems += [
            f"{key} has no effect with lr_scheduler_type: constant; use constant_with_warmup"
            for key in ("warmup_ratio", "warmup_steps")
            if settings.get(key)
        ]
    if not recipe.gradient_checkpointing:
        problems += [
            f"{key} has no effect without gradient_checkpointing: true"
            for key in settings
            if key.startswith("gradient_checkpointing_")
        ]
    unread = {"sgd": 3, "adafactor": 3}.get(recipe.optim, 1 if "lion" in recipe.optim else 0)
    problems += [
        f"{key} has no effect with optim: {recipe.optim}; remove it"
        for key in ("adam_epsilon", "adam_beta1", "adam_beta2")[:unread]
        if key in settings
    ]
    if "num_train_epochs" in settings and "max_steps" in settings:
        # transformers lets max_steps win silently; many recipes carry both, so it is no error.
        recipe._notices.append("max_steps is set, so num_train_epochs has no effect")
    if "max_steps" in settings and "max_time" in settings:
        problems.append(
            "max_steps and max_time both say when training ends; keep one (max_time makes as many "
            "steps as fit, up to num_train_epochs)"
        )
    if recipe.eval_dataset is not None and "val_size" in settings:
        problems.append("val_size has no effect beside eval_dataset; remove one")
    if not _has_held_out(recipe):
        problems += [
            f"{key} needs held-out data: set eval_dataset, or val_size above 0"
            for key in ("eval_steps", "early_stopping_patience", "load_best_model_at_end",
                        "max_eval_samples")
            if getattr(recipe, key)
        ]  # fmt: skip
    problems += bits.problems(recipe, recipe.cohort() if not problems else [], settings)
    problems += offloading.problems(recipe)
    problems += spread.problems(recipe) if not problems else []
    problems += swept.problems(recipe.sweep)
    if "early_stopping_threshold" in settings and recipe.early_stopping_patience is None:
        problems.append("early_stopping_threshold has no effect without early_stopping_patience")
    attention = recipe.attn_implementation
    if attention.startswith("flash_attention") and recipe.compute_dtype == "float32":
        problems.append(f"attn_implementation: {attention} computes no float32: use sdpa")
    return problems


def _method_problems(recipe: Recipe, settings: Mapping[str, Any]) -> list[str]:
    """Settings that the method does not know."""
    if recipe.method != "full":
        return [
            "trainable_layers trains layers of the base, which method: lora keeps frozen; remove "
            "one of the two"
        ] * (recipe.trainable_layers is not None)
    adapters_only = [key for key in lora_settings() if key in settings]
    quantised = [
        f"{key}: weights in so few bits cannot learn; with method: full leave it out, or use lora"
        for key in ("load_in_4bit", "load_in_8bit")
        if getattr(recipe, key)
    ]
    return (
        quantised
        + [
            f"{key} has no effect with method: full, which trains the base's own weights; remove it"
            for key in adapters_only
        ]
        + [
            f"{key} is a list, which makes several adapters, but method: full trains one set of "
            "weights; give one value"
            for key in COHORT_LISTS
            if recipe._list(key) is not None and key not in adapters_only
        ]
    )


def _peft_problems(recipe: Recipe, settings: Mapping[str, Any]) -> list[str]:
    """What cannot hold where PEFT's own modules train the adapter."""
    options = recipe.cohort()
    problems = []
    plain_inits = (True, False, "gaussian", "orthogonal")
    for adapter in options:
        custom_init = adapter.init_lora_weights not in plain_inits
        if len(options) > 1 and (adapter.use_dora or custom_init or adapter.peft is not None):
            feature = (
                "peft" if adapter.peft is not None else "use_dora" if adapter.use_dora else "init"
            )
            label = {"init": f"init_lora_weights: {adapter.init_lora_weights}"}.get(
                feature, feature
            )
            problems.append(
                f"{label} trains one adapter at a time: PEFT's own modules cannot tell the rows of "
                f"a cohort's {len(options)} adapters apart; train them in runs of their own"
            )
            break
        if adapter.use_dora and custom_init:
            problems.append(
                f"use_dora and init_lora_weights: {adapter.init_lora_weights} exclude each other: "
                "what they train could not be used on the untouched base; keep one"
            )
    if recipe.peft is None:
        return problems
    if not recipe.peft.get("peft_type"):
        problems.append("peft names no peft_type; add one (IA3, PREFIX_TUNING, VERA, ...)")
    set_too = [
        key
        for key in lora_settings()
        if key not in ("peft", "adapters")
        and (key in settings or any(getattr(e, key, None) for e in recipe.adapters or ()))
    ]
    problems += [
        f"{key} has no effect beside peft: put what the method needs into the peft section"
        for key in set_too
    ]
    return problems


def _has_held_out(recipe: Recipe) -> bool:
    return bool(recipe.eval_dataset or recipe.val_size or may_have_splits(recipe.dataset))
