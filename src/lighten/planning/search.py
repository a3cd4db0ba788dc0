"""What fits best: the fastest configuration, the largest model, the longest context, the most rows.

Every answer is a plan of the step that would run; nothing is guessed from parameter counts. Memory
grows with the rows and the length of a micro-batch, nearly in a straight line, so the largest that
fits is found by interpolation between a few plans, and is itself planned before it is named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lighten.errors import UserError
from lighten.planning.changes import SHORTEST, Planner
from lighten.planning.result import MOST_TOKENS, Plan
from lighten.recipe import Recipe
from lighten.recipe.fields import RecipeFields
from lighten.recipe.section import FULL_LEARNING_RATE, LORA_LEARNING_RATE
from lighten.recipe.steps import rows_per_step
from lighten.wording import first_line

# How a base may be trained, by name; what is not named stays as the recipe has it.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora", "load_in_4bit": False, "load_in_8bit": False},
    "LoRA in 8 bits": {"method": "lora", "load_in_4bit": False, "load_in_8bit": True},
    "QLoRA": {"method": "lora", "load_in_4bit": True, "load_in_8bit": False},
    "full": {"method": "full", "load_in_4bit": False, "load_in_8bit": False},
}
# Longest context that is looked for: models state less, and those that do not are old.
LONGEST = 2**20
MOST_ROWS = 4096
Log = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A configuration that was looked at.

    Attributes:
        what: In words.
        settings: What it sets.
        plan: Its plan; None where it was not planned, or cannot be.
        why: Why it is not the answer, or that it is.
    """

    what: str
    settings: dict[str, Any]
    plan: Plan | None
    why: str

    @property
    def tokens_per_s(self) -> float | None:
        """Real tokens per second."""
        plan = self.plan
        if plan is None or plan.time is None or not plan.time.seconds or not plan.step_tokens:
            return None
        return plan.step_tokens / plan.time.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "what": self.what, "settings": self.settings, "why": self.why,
            "tokens_per_s": self.tokens_per_s,
            "plan": None if self.plan is None else self.plan.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: The fastest that fits; None where nothing does.
        tried: All that was looked at, in order, with reasons.
    """

    best: Candidate | None
    tried: tuple[Candidate, ...]

    @property
    def fits(self) -> bool | None:
        """Whether anything fits; None where that cannot be told."""
        might = any(c.plan is not None and c.plan.fits() is None for c in self.tried)
        return True if self.best is not None else None if might else False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "best": None if self.best is None else self.best.to_dict(),
            "tried": [candidate.to_dict() for candidate in self.tried],
        }


def fastest(
    recipe: Recipe, planner: Planner, *, fixed: Sequence[str] = (), log: Log | None = None
) -> SearchResult:
    """The configuration with the most tokens per second among those that fit.

    Where no time is predicted it is the first that fits: they are tried in an order in which what
    saves memory at the cost of time comes later.

    Over method, checkpointing and micro-batch, the rows per step staying as they are; and
    over shorter contexts where nothing fits at the recipe's. A configuration that another one
    surely beats is not planned, which its reason says.

    Args:
        recipe: What is wanted; its settings stand wherever the search does not set them.
        planner: Plans recipes for one device.
        fixed: Settings that must stay as they are.
        log: Given a line about what is being looked at.
    """
    tried: list[Candidate] = []
    length = recipe.max_length
    while True:
        shortened = (
            recipe if length == recipe.max_length else recipe.changed({"max_length": length})
        )
        tried += _at_one_length(shortened, planner, fixed, log, len(recipe.cohort()))
        fitting = [c for c in tried if c.plan is not None and c.plan.fits()]
        if fitting or length // 2 < SHORTEST or "max_length" in fixed:
            break
        length //= 2
    if not fitting:
        return SearchResult(None, tuple(tried))
    best = max(fitting, key=lambda candidate: candidate.tokens_per_s or 0.0)
    why = "the fastest" if best.tokens_per_s else "the first that fits; no time is predicted"
    explained = [
        candidate if candidate is not best else replace(candidate, why=why) for candidate in tried
    ]
    return SearchResult(explained[tried.index(best)], tuple(explained))


def _at_one_length(
    recipe: Recipe, planner: Planner, fixed: Sequence[str], log: Log | None, cohort: int
) -> list[Candidate]:
    """Every method with and without memory savers, until each fits or cannot."""
    tried: list[Candidate] = []
    whole_step = False  # LoRA fits with a whole step in one micro-batch and no memory saver
    for name, settings in METHODS.items():
        if not _allowed(recipe, settings, fixed) or (name == "full" and cohort > 1):
            continue
        if settings["load_in_8bit"] and not recipe.load_in_8bit:
            continue  # of little use between the others: for those alone who ask for it
        if name == "QLoRA" and whole_step:
            tried.append(Candidate("QLoRA", settings, None, "LoRA fits whole and is faster"))
            continue
        for saver, saver_settings in _savers(fixed):
            what = ", ".join([name, *saver, f"{recipe.max_length} tokens"])
            if log is not None:
                log(what)
            candidate_settings = {**as_method(recipe, name), **saver_settings}
            candidate = largest_micro_batch(recipe, candidate_settings, planner, what)
            tried.append(candidate)
            plan = candidate.plan
            if plan is not None and plan.fits() and plan.shape.micro_batches == 1:
                # With checkpointing it might be slower than QLoRA without.
                whole_step |= name == "LoRA" and not saver
                break  # what saves memory from here on only costs time
    return tried


def as_method(recipe: Recipe, name: str) -> dict[str, Any]:
    """Settings that train the recipe by another method, with what that one does not know unset."""
    settings = dict(METHODS[name])
    if not settings["load_in_4bit"]:
        of_4_bits = (key for key in RecipeFields.model_fields if key.startswith("bnb_4bit_"))
        settings |= {key: field_default(key) for key in of_4_bits}
    if settings["method"] == recipe.method:
        return settings
    if name == "full":
        adapters = [
            key
            for key, field in RecipeFields.model_fields.items()
            if dict(field.json_schema_extra or {}).get("section") == "lora"  # type: ignore[arg-type]
        ]
        unset = {key: field_default(key) for key in adapters}
        return {**unset, **settings, "learning_rate": FULL_LEARNING_RATE}
    return {**settings, "trainable_layers": None, "learning_rate": LORA_LEARNING_RATE}


def _savers(fixed: Sequence[str]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Memory savers, the cheapest in time first.

    Offloaded activations are not among them: the trace does not follow them off the device yet.
    """
    if "gradient_checkpointing" in fixed:
        yield [], {}
        return
    details = {
        key: field_default(key)
        for key in ("gradient_checkpointing_layers", "gradient_checkpointing_part",
                    "gradient_checkpointing_kwargs")
    }  # fmt: skip
    yield [], {"gradient_checkpointing": False, **details}
    yield ["checkpointing"], {"gradient_checkpointing": True, **details}


def _allowed(recipe: Recipe, settings: Mapping[str, Any], fixed: Sequence[str]) -> bool:
    return all(name not in fixed or getattr(recipe, name) == v for name, v in settings.items())


def largest_micro_batch(
    recipe: Recipe, settings: Mapping[str, Any], planner: Planner, what: str
) -> Candidate:
    """The recipe with the most rows per micro-batch that fit, and as many per step as before."""
    per_step = rows_per_step(recipe)
    # Micro-batches of more tokens are not traced; one of a single row says why not even that is.
    most_rows = max(1, min(per_step, MOST_TOKENS // recipe.max_length))
    sizes = [size for size in range(1, most_rows + 1) if per_step % size == 0]
    plans: dict[int, tuple[dict[str, Any], Plan]] = {}

    def planned(size: int) -> Plan:
        if size not in plans:
            candidate_settings = {
                **settings,
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": per_step // size,
            }
            plans[size] = candidate_settings, planner(recipe.changed(candidate_settings))
        return plans[size][1]

    try:
        if planned(1).fits() is not True:
            candidate_settings, plan = plans[1]
            return Candidate(what, candidate_settings, plan, _too_much(plan))
        place = most(lambda i: _margin(planned(sizes[i])), 0, len(sizes) - 1)
    except UserError as error:
        return Candidate(what, dict(settings), None, first_line(error))
    candidate_settings, plan = plans[sizes[place]]
    return Candidate(what, candidate_settings, plan, "slower")


def most(margin: Callable[[int], float], low: int, high: int) -> int:
    """The largest number up to `high` whose margin is not negative; `low` is known to have one.

    By interpolation between the two nearest margins, and by halves where that does not move: a
    margin that falls in a straight line takes three or four calls.
    """
    margin = functools.cache(margin)
    if high <= low or (top := margin(high)) >= 0:
        return max(low, high)
    bottom = margin(low)
    while high - low > 1:
        share = bottom / (bottom - top) if bottom > top else 0.5
        guess = min(high - 1, max(low + 1, low + int((high - low) * share)))
        if (guess_margin := margin(guess)) >= 0:
            low, bottom = guess, guess_margin
            if high - low > 1:  # a straight line is over at the next one
                following = margin(low + 1)
                if following < 0:
                    return low
                low, bottom = low + 1, following
        else:
            high, top = guess, guess_margin
    return low


@dataclass(frozen=True)
class Limits:
    """How far a configuration goes on a device.

    Attributes:
        context: Tokens of the longest row, alone in its micro-batch; None: not one fits.
        context_limited_by: What ends it: memory, or the model.
        rows: Of the largest micro-batch at the recipe's length; None: not one fits.
        rows_limited_by: What ends it: memory, or how far was looked.
    """

    context: int | None
    context_limited_by: str
    rows: int | None
    rows_limited_by: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(vars(self))


def limits(recipe: Recipe, planner: Planner, *, longest: int | None = None) -> Limits:
    """The longest context with one row, and the most rows at the recipe's length.

    Args:
        recipe: Its settings.
        planner: Plans recipes for one device, without data: rows are `max_length` long.
        longest: Positions that the model was made for.
    """
    one_row = recipe.changed({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1})
    step = SHORTEST // 2
    end = max(1, (longest or LONGEST) // step)

    def of_length(place: int) -> float:
        return _margin(planner(one_row.changed({"max_length": place * step})))

    context = None
    if of_length(1) >= 0:
        context = step * _doubled(of_length, 1, end)
    free = recipe.changed({"tokens_per_microbatch": None, "gradient_accumulation_steps": 1})

    def of_rows(rows: int) -> float:
        return _margin(planner(free.changed({"per_device_train_batch_size": rows})))

    most_rows = max(1, min(MOST_ROWS, MOST_TOKENS // recipe.max_length))
    rows = _doubled(of_rows, 1, most_rows) if of_rows(1) >= 0 else None
    model_ends = context is not None and context >= end * step
    return Limits(
        context, "the model's positions" if model_ends else "memory",
        rows, "looked no further" if rows == most_rows else "memory",
    )  # fmt: skip


def _doubled(margin: Callable[[int], float], low: int, end: int) -> int:
    """`most`, with an upper end that is raised until it is too much: far ends take long to plan."""
    margin = functools.cache(margin)
    high = min(end, max(2 * low, 8))
    while margin(high) >= 0:
        if high >= end:
            return end
        low, high = high, min(end, 4 * high)
    return most(margin, low, high - 1) if high - low > 1 else low


@dataclass(frozen=True)
class Sized:
    """One model of a list.

    Attributes:
        model: Its name.
        parameters: Of it; None where it cannot be described.
        best: The fastest configuration that fits.
        why: Why there is none, or why it was not looked for.
        fits: Whether it can be trained; None: that cannot be told.
    """

    model: str
    parameters: int | None
    best: Candidate | None
    why: str
    fits: bool | None = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.model, "parameters": self.parameters, "why": self.why, "fits": self.fits,
            "best": None if self.best is None else self.best.to_dict(),
        }  # fmt: skip


def largest(
    models: Sequence[tuple[str, int | None]],
    recipe: Callable[[str], Recipe],
    planner: Planner,
    *,
    fixed: Sequence[str] = (),
    log: Log | None = None,
) -> list[Sized]:
    """Which of the models is the largest that can be trained, from the largest down.

    Args:
        models: Names with their parameters; None where a model cannot be described.
        recipe: The recipe of a model.
        planner: Plans recipes for one device.
        fixed: Settings that must stay as they are.
        log: Given a line about what is being looked at.
    """
    sized: list[Sized] = []
    fits = False
    for name, parameters in sorted(models, key=lambda model: -(model[1] or 0)):
        if parameters is None:
            sized.append(Sized(name, None, None, "it cannot be described"))
            continue
        if fits:
            sized.append(Sized(name, parameters, None, "smaller than one that fits", True))
            continue
        if log is not None:
            log(name)
        model_recipe = recipe(name)
        least = _least(model_recipe, planner, fixed)
        if isinstance(least, str):
            sized.append(Sized(name, parameters, None, least))
            continue
        best = fastest(model_recipe, planner, fixed=fixed, log=log).best
        fits = best is not None
        why = "the largest that fits" if fits else "it might fit: lighten plan says what is known"
        sized.append(Sized(name, parameters, best, why, fits or None))
    return sized


def _least(recipe: Recipe, planner: Planner, fixed: Sequence[str]) -> Plan | str:
    """The plan that needs the least, or why not even that one fits: it spares a whole search."""
    in_4bit = recipe.method == "lora" and not (recipe.load_in_8bit and "load_in_8bit" in fixed)
    settings: dict[str, Any] = {
        "load_in_4bit": in_4bit, "load_in_8bit": recipe.load_in_8bit and not in_4bit,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 1, "max_length": min(recipe.max_length, SHORTEST),
    }  # fmt: skip
    unfixed = {name: value for name, value in settings.items() if name not in fixed}
    try:
        plan = planner(recipe.changed(unfixed))
    except UserError as error:
        if unfixed.get("load_in_4bit") and not recipe.load_in_4bit:  # files of 8 bits have no 4
            return _least(recipe, planner, (*fixed, "load_in_4bit"))
        return first_line(error)
    return _too_much(plan) if plan.fits() is False else plan


def recipe_text(recipe: Recipe, why: str) -> str:
    """A recipe file with what differs from the defaults, for `lighten train`.

    Args:
        recipe: What was found.
        why: A line that says where it comes from.
    """
    import yaml

    values = recipe.completed()
    non_defaults = {
        name: value
        for name, value in values.items()
        if (value != field_default(name) and not (name == "dataset" and not value))
        # What is left out there is the rate of whole weights, not of adapters.
        or (name == "learning_rate" and recipe.method == "full")
    }
    text = yaml.safe_dump(non_defaults, sort_keys=False, allow_unicode=True)
    missing = "" if recipe.dataset else "# add your data: dataset: data.jsonl (or --dataset)\n"
    return f"# {why}\n{missing}{text}"


def field_default(name: str) -> Any:
    """The default of a setting, as a completed recipe writes it."""
    default = RecipeFields.model_fields[name].get_default(call_default_factory=True)
    return default.model_dump(mode="json") if hasattr(default, "model_dump") else default


def _margin(plan: Plan) -> float:
    """Bytes between the upper bound and what the device offers."""
    return float("inf") if plan.capacity is None else float(plan.capacity - plan.memory.high)


def _too_much(plan: Plan) -> str:
    if plan.capacity is None:
        return "how much memory there is, is not known"
    over = plan.memory.high - plan.capacity
    return f"one row needs {plan.memory.high / 2**30:.2f} GiB, {over / 2**30:.2f} too many"
