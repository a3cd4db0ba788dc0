"""What generation stops at: the tokens that end the answers that a model learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lighten.data.examples import Message
from lighten.data.findings import Findings
from lighten.data.spans import RefusedError, render
from lighten.data.special import special_tokens

# Tokens that end a turn in well-known families, for models whose template does not show them.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


@dataclass(frozen=True)
class LearntAnswers:
    """What the supervised answers of a training set look like.

    Attributes:
        ends: Ids of the tokens that end them, the most frequent first.
        inside: Ids of special tokens that stand inside them.
        answers: How many there are; 0 where none were counted.
        thoughts: How many of them are learnt with a thought.
    """

    ends: tuple[int, ...] = ()
    inside: tuple[int, ...] = ()
    answers: int = 0
    thoughts: int = 0

    @property
    def thinks(self) -> bool:
        """Whether answers begin with a thought, as a rule."""
        return 2 * self.thoughts > self.answers > 0

    @classmethod
    def of(cls, info: dict[str, Any]) -> LearntAnswers:
        """As a run's `run.json` keeps them; none where it does not."""
        answers = (info.get("data") or {}).get("answers") or {}
        return cls(
            tuple(answers.get("ends", ())),
            tuple(answers.get("inside", ())),
            answers.get("answers", 0),
            answers.get("thoughts", 0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "ends": list(self.ends), "inside": list(self.inside)}


def learnt_answers(findings: Findings) -> LearntAnswers:
    """What encoding saw of the answers."""
    return LearntAnswers(
        tuple(token for token, _ in findings.ends.most_common()),
        tuple(sorted(findings.inside)),
        findings.counts["answers"],
        findings.counts["thoughts learnt"],
    )


def stop_tokens(
    tokenizer: Any, declared: int | Sequence[int] | None, learnt: LearntAnswers | None = None
) -> list[int]:
    """Ids that end an answer, those that end the answers learnt first.

    A model that was not trained here stops at what it declares, at its tokenizer's end and at what
    its chat template writes after an answer. One that was trained stops at the tokens that ended
    its answers, and still at those that it declares, unless they stand inside its answers.

    Args:
        tokenizer: With its chat template chosen.
        declared: `eos_token_id` of the model's generation configuration.
        learnt: The answers that the model learnt, if it did.
    """
    learnt = learnt or LearntAnswers()
    candidates: list[int | None] = [declared] if isinstance(declared, int) else list(declared or ())
    candidates.append(tokenizer.eos_token_id)
    if not learnt.ends:
        candidates.append(special_tokens(tokenizer).terminator)
        special = special_tokens(tokenizer).texts
        candidates += [
            tokenizer.convert_tokens_to_ids(name) for name in TURN_ENDS if name in special
        ]
    stops = [*learnt.ends, *(token for token in candidates if token not in learnt.inside)]
    return list(dict.fromkeys(int(token) for token in stops if token is not None))


def end_token(tokenizer: Any, learnt: LearntAnswers) -> str | None:
    """The token to declare as the tokenizer's end in place of its present one, None to keep it."""
    if not learnt.ends or tokenizer.eos_token_id in learnt.ends:
        return None
    token: str = tokenizer.convert_ids_to_tokens(learnt.ends[0])
    return token


def writes_alike(first: Any, second: Any) -> bool:
    """Whether two tokenizers' chat template writes conversations alike."""
    turns = [
        Message("system", "s"), Message("user", "q"), Message("assistant", "a"),
        Message("user", "r"), Message("assistant", "b"),
    ]  # fmt: skip
    prompt_options: dict[str, Any] = {"add_generation_prompt": True}
    cases: list[tuple[list[Message], dict[str, Any]]] = [
        (turns[1:], {}), (turns, {}), (turns[1:2], prompt_options),
    ]  # fmt: skip
    for messages, options in cases:
        try:
            text = render(messages, first, "", **options)
        except RefusedError:
            continue
        try:
            if render(messages, second, "", **options) != text:
                return False
        except RefusedError:
            return False
    return True
