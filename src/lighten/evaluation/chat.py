"""The verb `chat`: talk to a base or an adapter in the terminal, or through a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

import torch
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.utils import logging as transformers_logging

from lighten import adapters, data, models
from lighten.data import Message
from lighten.data.asking import OPENED
from lighten.dialogue import converse
from lighten.errors import UserError
from lighten.evaluation.generate import hidden_tokens, settings_alone, stop_tokens
from lighten.evaluation.run_models import Models, Opened
from lighten.machine import hardware
from lighten.runs import Run


class _Visible(TextIteratorStreamer):
    """Streams an answer with the special tokens in it, without those that are no part of it."""

    def __init__(self, tokenizer: Any, hidden: set[int]) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )
        self._hidden = hidden

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; the first are the prompt."""
        if not self.next_tokens_are_prompt:
            visible = [token for token in value.flatten().tolist() if token not in self._hidden]
            if not visible:
                return
            value = torch.tensor(visible)
        super().put(value)


class Conversation:
    """A base with what was trained on it, and the words said so far.

    Args:
        target: A run folder, a run's name under `runs/`, or a model.
        system: System message.
        thinking: Whether answers begin with a thought; None: as those of the training did.
        max_new_tokens: Longest answer.
        temperature: 0 answers greedily.

    Raises:
        UserError: No such run or model.
    """

    def __init__(
        self,
        target: str,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        transformers_logging.disable_progress_bar()
        device = hardware.choose_device().value
        run = _run_of(target)
        self.names: tuple[str, ...] = ()
        self.learnt, self.handling = data.LearntAnswers(), data.Handling()
        if run is None:
            base = models.load(target, device=device)
            template = data.choose_template(base.tokenizer, None).name
            first = Opened(base, adapters.attach(base.model, []), template)
            self._open: Callable[[str | None], Opened] = lambda _: first
        else:
            run_models = Models(run, device, keep=True)
            self.names, self._open = run_models.names, run_models.open
            self.learnt, self.handling = run_models.learnt, run_models.handling
            first = run_models.open(run_models.names[0] if run_models.names else None)
        self.base, self.cohort = first.base, first.trained
        self.system = system
        self.thinking = self.learnt.thinks if thinking is None else thinking
        self.messages: list[Message] = []
        self._max_new_tokens, self._temperature = max_new_tokens, temperature

    def prompt(self, question: str) -> Any:
        """Token ids [1, T] of the conversation with one more question, one BOS at most (trap 9).

        Raises:
            UserError: The chat template refuses it.
        """
        ids = torch.tensor([self._ids(question)])
        return ids.to(self.base.model.device)

    def _ids(self, question: str) -> list[int]:
        """As training saw it, where the model was trained on such answers; else as it asks."""
        start = [Message("system", self.system)] if self.system else []
        return data.question_ids(
            [*start, *self.messages, Message("user", question)],
            self.base.tokenizer, self.handling, self.learnt, thinking=self.thinking,
        )  # fmt: skip

    def resolve(self, name: str | None) -> str | None:
        """The adapter of a name, by default the run's first; None is the base."""
        if not name:
            return self.names[0] if self.names else None
        if name == "base":
            return None
        if name not in self.names:
            names = ", ".join(self.names) or "none"
            raise UserError(f"no adapter is called {name!r}; there are: {names}, and base")
        return name

    def compared(self, name: str | None) -> tuple[str | None, ...]:
        """The base, and an adapter if one is named."""
        return (None, name) if name else (None,)

    def answer(self, question: str, name: str | None) -> Iterator[str]:
        """The answer piece by piece, as it is made.

        Raises:
            UserError: The conversation fills the model's positions.
        """
        opened = self._open(name)
        model, tokenizer = opened.base.model, opened.base.tokenizer
        ids = self.prompt(question)
        opened_thought = OPENED.search(tokenizer.decode(ids[0, -8:]))
        limits = models.limits_of(model)
        room = limits.room(ids.shape[1], self._max_new_tokens)
        if room == 0:
            raise UserError(
                f"the conversation has {ids.shape[1]} tokens and the model {limits.positions} "
                "positions: no room is left for an answer; /reset forgets the conversation"
            )
        stops = stop_tokens(model, tokenizer, self.learnt)
        streamer = _Visible(tokenizer, {*stops, *hidden_tokens(tokenizer, self.learnt)})
        warm = self._temperature > 0
        sampling = {"do_sample": True, "temperature": self._temperature} if warm else {}
        settings = GenerationConfig(
            max_new_tokens=room,
            eos_token_id=stops or None,
            pad_token_id=tokenizer.pad_token_id,
            **{"do_sample": False, **sampling},
        )
        errors: list[BaseException] = []

        def work() -> None:
            try:
                model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=ids.new_ones(ids.shape),
                    generation_config=settings, streamer=streamer,
                )  # fmt: skip
            except BaseException as error:
                errors.append(error)
                streamer.end()

        with ExitStack() as stack:
            stack.enter_context(opened.trained.using(opened.adapter))
            stack.enter_context(settings_alone(model))
            thread = Thread(target=work, daemon=True)
            thread.start()
            if opened_thought is not None:
                yield opened_thought[0].lstrip()
            yield from streamer
            thread.join()
        if errors:
            raise errors[0]

    def remember(self, question: str, answer: str) -> None:
        """Make a question and its answer part of the conversation."""
        self.messages += [Message("user", question), Message("assistant", answer)]

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()


def chat(
    target: str,
    *,
    adapter: str | None = None,
    compare: bool = False,
    system: str | None = None,
    thinking: bool | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    lines: TextIO | None = None,
    out: TextIO | None = None,
) -> None:
    """Converse until `/exit` or the end of the input.

    Args:
        target: A run or a model.
        adapter: Which adapter of a run; default its first.
        compare: Answer with the base too.
        system: System message.
        thinking: Let answers begin with a thought; None: as those of the training did.
        max_new_tokens: Longest answer.
        temperature: 0 answers greedily.
        lines: Where questions come from, standard input by default.
        out: Where answers go, standard output by default.

    Raises:
        UserError: No such run, model or adapter.
    """
    talk = Conversation(
        target, system=system, thinking=thinking, max_new_tokens=max_new_tokens,
        temperature=temperature,
    )  # fmt: skip
    converse(talk, model=adapter, compare=compare, lines=lines, out=out)


def _run_of(target: str) -> Run | None:
    for folder in (Path(target).expanduser(), Path("runs") / target):
        if (folder / "recipe.yaml").is_file():
            return Run(folder)
    return None
