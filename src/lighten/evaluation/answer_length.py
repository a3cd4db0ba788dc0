"""How long an answer may be, and what it means that answers or references are longer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lighten import data
from lighten.data import Example
from lighten.evaluation.result import Measured
from lighten.recipe import EvaluateOptions, Recipe

# Tokens beyond the longest reference, as a share of it and at least: an answer may be a little
# longer. A model that does not know where to end answers up to the limit, so that there is one.
ROOM, LEAST_ROOM, LONGEST = 0.25, 8, 512


def tokens_of(references: Sequence[str], tokenizer: Any) -> list[int]:
    """How many tokens each reference has, without the one that ends it."""
    return [
        len(tokenizer(reference, add_special_tokens=False)["input_ids"]) for reference in references
    ]


def long_enough(reference_tokens: Sequence[int]) -> int:
    """Tokens that an answer may have so that it can be as long as any reference."""
    longest = max(reference_tokens, default=0)
    return min(LONGEST, longest + max(LEAST_ROOM, round(ROOM * longest)))


def settled(
    settings: EvaluateOptions, answered: Sequence[Example], recipe: Recipe, tokenizer: Any
) -> tuple[EvaluateOptions, list[int]]:
    """The settings with the longest answer in them, and how many tokens each reference has.

    Args:
        settings: With `max_new_tokens`, or None for as many as the references need.
        answered: Examples that end with an answer.
        recipe: Of the run.
        tokenizer: With its chat template chosen.
    """
    handling = data.Handling(recipe.system_role, recipe.thinking)
    references = [data.prompt_of(example, tokenizer, handling)[1] for example in answered]
    tokens = tokens_of(references, tokenizer)
    if settings.max_new_tokens is not None:
        return settings, tokens
    return settings.model_copy(update={"max_new_tokens": long_enough(tokens)}), tokens


def sentences(
    limit: int, reference_tokens: Sequence[int], results: Sequence[Measured]
) -> list[str]:
    """What of answers and references does not fit into the longest answer."""
    count, notes = len(reference_tokens), []
    if longer := sum(tokens > limit for tokens in reference_tokens):
        notes.append(
            f"{longer} of {count} references are longer than max_new_tokens ({limit}): their "
            "answers cannot match, and chrF and BLEU compare a part with the whole"
        )
    limited = [
        (result.name, result.answers.limited) for result in results if result.answers.limited
    ]
    if limited:
        counts = ", ".join(f"{number} of {count} of {name}" for name, number in limited)
        notes.append(f"answers that max_new_tokens ({limit}) cut off: {counts}")
    return notes
