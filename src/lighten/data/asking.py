"""A question as token ids: the prompt of an answer that is about to be generated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lighten.data.conversation import Handling, Renderer
from lighten.data.encode import prompt_of
from lighten.data.examples import Example, Message
from lighten.data.spans import render
from lighten.data.stops import LearntAnswers
from lighten.errors import UserError

# A thought that a prompt opens, and one that it closes without a word.
OPENED = re.compile(r"<think>\s*$")
_EMPTY = re.compile(r"<think>\s*</think>\s*$")
# Stand for an answer while the prompt before it is looked for.
_THOUGHT, _ANSWER = "<think>\nWell\n</think>\n\n", "Answer"


def question_ids(
    messages: Sequence[Message],
    tokenizer: Any,
    handling: Handling,
    learnt: LearntAnswers,
    *,
    thinking: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a conversation up to the answer, with one BOS at most (trap 9).

    As training saw them where the model was trained on such answers (trap 18), else as the model's
    own template asks.

    Args:
        messages: The conversation; the answer to its last message is wanted.
        tokenizer: With its chat template chosen.
        handling: What happened to system messages and thoughts in training.
        learnt: The answers that the model learnt.
        thinking: Whether the answer begins with a thought.
        tools: Descriptions of tools, for the template.

    Raises:
        UserError: The chat template refuses it.
    """
    question = Example("chat", 1, tuple(messages), tools=tools)
    if learnt.answers and thinking <= learnt.thinks:
        answer = Message("assistant", _THOUGHT + _ANSWER if thinking else _ANSWER)
        with_answer = replace(question, messages=(*question.messages, answer))
        try:
            return prompt_of(with_answer, tokenizer, handling)[0]
        except UserError:  # the template may refuse or rewrite what it need not show here
            pass
    question, _ = Renderer(tokenizer, handling).system(question)
    text = render(
        question.messages, tokenizer, "chat", tools=tools, add_generation_prompt=True,
        enable_thinking=thinking,
    )  # fmt: skip
    # Not every template knows enable_thinking.
    text = (_EMPTY if thinking else OPENED).sub("", text)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
