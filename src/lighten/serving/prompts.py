"""How a model is asked: with the tokenizer and template of its training; what ends its answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lighten import data
from lighten.data import Message
from lighten.data.special import special_tokens


@dataclass(frozen=True)
class Asking:
    """How one model, the base or an adapter, is asked.

    Attributes:
        tokenizer: With its chat template chosen.
        template: Which one that is, and why.
        handling: What happened to system messages and thoughts in training.
        learnt: The answers that it learnt.
        stop_ids: Tokens that end its answers.
        shown: Special tokens that its answers hold, as text.
    """

    tokenizer: Any
    template: data.TemplateChoice
    handling: data.Handling
    learnt: data.LearntAnswers
    stop_ids: frozenset[int]
    shown: tuple[str, ...]

    def conversation(
        self, messages: Sequence[Message], thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:  # fmt: skip
        """Token ids of a conversation up to the answer (traps 9 and 18).

        Args:
            messages: The conversation.
            thinking: Whether the answer begins with a thought; None: as those of the training did.
            tools: Descriptions of tools that may be called.

        Raises:
            UserError: The chat template refuses it.
        """
        thinks = self.learnt.thinks if thinking is None else thinking
        return data.question_ids(
            messages, self.tokenizer, self.handling, self.learnt, thinking=thinks, tools=tools
        )

    @property
    def end_texts(self) -> list[str]:
        """The tokens that end its answers, as they are written."""
        return [str(text) for text in self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))]

    def ends(
        self, stops: Iterable[str], more: Iterable[int] = (), *, usual: bool = True
    ) -> frozenset[int]:
        """Tokens that end an answer, with special ones that a client names: no text holds them.

        Args:
            stops: Texts that end it.
            more: Tokens that do.
            usual: Whether those that end this model's answers do.
        """
        special = special_tokens(self.tokenizer).texts
        named = self.tokenizer.convert_tokens_to_ids([stop for stop in stops if stop in special])
        return (self.stop_ids if usual else frozenset()) | frozenset((*named, *more))

    def plain(self, prompt: str) -> list[int]:
        """Token ids of a plain text alone."""
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def text(self, prompt: str) -> list[int]:
        """Token ids of a plain text, with the beginning that the tokenizer gives to texts."""
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[0] == ids[1] == begin:
            return ids[1:]  # the text wrote it out
        if len(ids) > 1 and ids[-1] == end and not prompt.endswith(self.tokenizer.eos_token or ""):
            return ids[:-1]  # some tokenizers end texts, which would end the answer before it began
        return ids


def asking(
    tokenizer: Any,
    template: str | None,
    declared: int | Sequence[int] | None,
    handling: data.Handling | None = None,
    learnt: data.LearntAnswers | None = None,
) -> Asking:
    """How a model is asked.

    Args:
        tokenizer: Its own; the template is set on it.
        template: As a recipe's `chat_template`.
        declared: `eos_token_id` of its generation configuration.
        handling: Of the recipe that trained it.
        learnt: Of the run that trained it.

    Raises:
        UserError: No such template.
    """
    choice = data.choose_template(tokenizer, template)
    learnt = learnt or data.LearntAnswers()
    stops = frozenset(data.stop_tokens(tokenizer, declared, learnt))
    special = special_tokens(tokenizer).ids
    inside = [token for token in learnt.inside if token in special and token not in stops]
    return Asking(
        tokenizer,
        choice,
        handling or data.Handling(),
        learnt,
        stops,
        tuple(tokenizer.convert_ids_to_tokens(inside)),
    )
