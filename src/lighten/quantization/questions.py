"""What an artefact is asked, and how its answers are scored: as `lighten evaluate` scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lighten import data, models
from lighten.artifacts import Artefact
from lighten.data.special import visible
from lighten.data.storage import chosen, spread_evenly
from lighten.errors import UserError
from lighten.evaluation import answer_length, forgetting, registry
from lighten.evaluation.bootstrap import Resamples
from lighten.evaluation.evaluation import askable, held_out_examples
from lighten.evaluation.generate import as_shown, hidden_tokens
from lighten.models import Limits
from lighten.quantization.gguf_source import declared_ends
from lighten.recipe import Recipe
from lighten.runs import Run

# Of an answer at most: every format of a table answers every question, one at a time.
LONGEST_ANSWER = 64
PROMPTS = 8  # of a run's held-out ones
TEXTS = 64
PLAIN = (  # asked where nothing is held out
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "대한민국의 수도는 어디인가요?",
    "Summarise in one sentence: the cat sat on the mat because it was warm.",
    "List three colours.",
    "Translate to Korean: good morning.",
)
METRICS = ("exact_match", "chrf")  # beside those that the recipe names
SAMPLES = 1000  # resamples behind each interval
Values = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class TaskMetrics:
    """How answers are scored.

    Attributes:
        names: Of metrics, the recipe's first.
        answer_tokens: An answer's most tokens.
        stops: Ids that end an answer.
        hidden: Ids that no answer shows.
        tokenizer: Of the model.
        notes: What has to be said of the figures.
    """

    names: tuple[str, ...]
    answer_tokens: int
    stops: frozenset[int]
    hidden: frozenset[int]
    tokenizer: Any
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> dict[str, str]:
        """Names as people read them."""
        return {name: registry.scorer(name).metric.label for name in self.names}

    def until_stop(self, answer: Sequence[int]) -> list[int]:
        """An answer's ids before the one that ends it."""
        ends = (place for place, token in enumerate(answer) if token in self.stops)
        return list(answer[: next(ends, None)])

    def text(self, answer: Sequence[int]) -> str:
        """An answer's ids as `lighten evaluate` shows them."""
        return visible(answer, self.tokenizer, hidden=self.hidden)

    def values(self, answers: Sequence[Sequence[int]], references: Sequence[str]) -> Values:
        """Each metric with its standard error and 95 % interval over the questions.

        Args:
            answers: Token ids; the one that ends each, and what follows it, do not count.
            references: The right answer to each.

        Raises:
            UserError: A metric of the user's cannot be imported, or returned no number.
        """
        predictions = registry.nfc([self.text(self.until_stop(answer)) for answer in answers])
        right = registry.nfc([as_shown(reference, self.tokenizer) for reference in references])
        draws = Resamples(len(predictions), SAMPLES)
        estimates = {}
        for name in self.names:
            scorer = registry.scorer(name)
            statistics = scorer.statistics(predictions, right)
            estimates[name] = draws.estimate(statistics, scorer.formula).to_dict()
        return estimates


def task_metrics(
    recipe: Recipe, tokenizer: Any, ends: Sequence[int], run: Run | None,
    references: Sequence[str],
) -> TaskMetrics:  # fmt: skip
    """The metrics that a recipe names, and the two of every table.

    Args:
        recipe: Of the run, or of the data.
        tokenizer: With its chat template chosen.
        ends: Ids that end an answer by the model's settings.
        run: Whose training showed what ends an answer.
        references: The right answers.

    Raises:
        UserError: A metric of the user's cannot be imported.
    """
    learnt = None if run is None else data.LearntAnswers.of(run.info())
    sweep_metrics = [recipe.sweep.metric] if recipe.sweep.metric in registry.OF_ANSWERS else []
    names = dict.fromkeys([*recipe.evaluate.extra_metrics, *sweep_metrics, *METRICS])
    for name in names:
        registry.scorer(name)
    reference_tokens = answer_length.tokens_of(references, tokenizer)
    answer_tokens = recipe.evaluate.max_new_tokens
    notes = []
    if answer_tokens is None:
        answer_tokens = answer_length.long_enough(reference_tokens)
    elif answer_tokens > LONGEST_ANSWER:
        notes.append(
            f"answers end after {LONGEST_ANSWER} tokens, where evaluate.max_new_tokens is "
            f"{answer_tokens}"
        )
    answer_tokens = min(answer_tokens, LONGEST_ANSWER)
    if longer := sum(tokens > answer_tokens for tokens in reference_tokens):
        notes.append(
            f"{longer} of {len(references)} right answers are longer than the {answer_tokens} "
            "tokens that an answer has here: those cannot match"
        )
    return TaskMetrics(
        tuple(names), answer_tokens,
        frozenset(data.stop_tokens(tokenizer, ends, learnt)),
        frozenset(hidden_tokens(tokenizer, learnt)), tokenizer, tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """What is asked of an artefact and of its source.

    Attributes:
        prompts: Rendered texts.
        references: The right answers, where they are known.
        task: How answers are scored; None without references.
        limits: Of the model.
    """

    prompts: list[str]
    references: list[str] = field(default_factory=list)
    task: TaskMetrics | None = None
    limits: Limits | None = None


def texts_of(artefact: Artefact, tokenizer: Any) -> list[str]:
    """Texts to compare next tokens on: the run's held-out ones with their answers, then any others.

    Args:
        artefact: What was made.
        tokenizer: Of the model.

    Raises:
        UserError: A metric of the recipe's cannot be imported.
    """
    general = [str(example.text) for example in forgetting.read(forgetting.BUILTIN)]
    questions = None
    if artefact.run is not None:
        questions = _held_out(artefact, artefact.run, tokenizer, TEXTS)
    if questions is None:
        return general
    pairs = zip(questions.prompts, questions.references, strict=True)
    return [*(prompt + answer for prompt, answer in pairs), *general]


def questions_of(artefact: Artefact, tokenizer: Any) -> Questions:
    """What an artefact is compared on: the run's held-out questions, else some of ours.

    Args:
        artefact: What it was made from.
        tokenizer: Of that.

    Raises:
        UserError: A metric of the recipe's cannot be imported.
    """
    if artefact.run is not None:
        held_out = _held_out(artefact, artefact.run, tokenizer, PROMPTS)
        if held_out is not None:
            return held_out
    if not getattr(tokenizer, "chat_template", None):
        return Questions(list(PLAIN))
    return Questions([
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        )
        for text in PLAIN
    ])  # fmt: skip


def _held_out(artefact: Artefact, run: Run, tokenizer: Any, count: int) -> Questions | None:
    recipe = run.recipe()
    handling = data.Handling(recipe.system_role, recipe.thinking)
    try:
        held_out = held_out_examples(recipe, artefact.facts.get("data_sha256"))
    except UserError:
        return None  # gone or changed since: the artefact can be checked all the same
    data.choose_template(tokenizer, recipe.chat_template)
    some = chosen(held_out.examples, spread_evenly(count, len(held_out.examples)))
    examples, _ = askable(some, recipe, tokenizer)
    pairs = [data.prompt_of(example, tokenizer, handling) for example in examples]
    if not pairs:
        return None
    texts = [str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids, _ in pairs]
    references = [reference for _, reference in pairs]
    task = task_metrics(recipe, tokenizer, declared_ends(artefact.companions), run, references)
    return Questions(texts, references, task, models.limits(str(artefact.base_folder)))
