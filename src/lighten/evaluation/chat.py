"""The verb `chat`: talk to a base or an adapter in the terminal, or through a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread
from typing import Any, TextIO

import torch
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.utils import logging as transformers_logging

from lighten import data, models
from lighten.artifacts.source import open_source
from lighten.data import Message
from lighten.data.asking import OPENED
from lighten.dialogue import converse
from lighten.errors import UserError
from lighten.evaluation.generate import hidden_tokens, settings_alone, stop_tokens
from lighten.evaluation.model_alone import adapter_folder
from lighten.evaluation.run_models import Models, Opened, open_adapter, open_model
from lighten.generation.request import Request
from lighten.generation.settings import Sampling
from lighten.machine import hardware
from lighten.runs import Run, folder_of

TOP_K = 50  # transformers' default where tokens are drawn


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
        target: A run folder, a run's name under `runs/`, a model or an adapter's folder.
        system: System message.
        thinking: Whether answers begin with a thought; None: as those of the training did.
        max_new_tokens: Longest answer.
        temperature: 0 answers greedily.

    Attributes:
        why_no_engine: Why transformers answers in place of our engine; None: it does not.

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
        folder = folder_of(target)
        run = None if folder is None else Run(folder)
        self.names: tuple[str, ...] = ()
        self.learnt, self.handling = data.LearntAnswers(), data.Handling()
        alone = adapter_folder(target) if run is None else None
        if alone is not None:
            artefact = open_source(alone)
            first = open_adapter(artefact, device)
            assert first.adapter is not None
            self.names = (first.adapter,)
            self._open: Callable[[str | None], Opened] = lambda name: replace(first, adapter=name)
            self._close = first.close
            if artefact.run is not None:
                recipe = artefact.run.recipe()
                self.learnt = data.LearntAnswers.of(artefact.run.info())
                self.handling = data.Handling(recipe.system_role, recipe.thinking)
        elif run is None:
            base = models.load(target, device=device)
            first = open_model(base, {}, data.choose_template(base.tokenizer, None).name)
            self._open = lambda _: first
            self._close = first.close
        else:
            run_models = Models(run, device, keep=True, talks=True)
            if not run_models.names and not run.is_model_alone():
                raise run.untrained()  # the base's answers would be taken for its own
            self.names, self._open = run_models.names, run_models.open
            self._close = run_models.close
            self.learnt, self.handling = run_models.learnt, run_models.handling
            first = run_models.open(run_models.names[0] if run_models.names else None)
        self.base, self.why_no_engine = first.base, first.why_no_engine
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
        decode = self._in_transformers if opened.engine is None else self._in_engine
        with decode(opened, ids, room, stops, streamer) as errors:
            if opened_thought is not None:
                yield opened_thought[0].lstrip()
            yield from streamer
        if errors:
            raise errors[0]

    @contextmanager
    def _in_engine(
        self, opened: Opened, ids: torch.Tensor, room: int, stops: Sequence[int],
        streamer: _Visible,
    ) -> Iterator[list[BaseException]]:  # fmt: skip
        """Stream an answer of our engine's; what it fails with is in the list at the end."""
        errors: list[BaseException] = []
        assert opened.engine is not None

        def end(reason: str | BaseException) -> None:
            if isinstance(reason, BaseException):
                errors.append(reason)
            streamer.end()

        streamer.put(ids)
        cancel = opened.engine.submit(Request(
            ids[0].tolist(), opened.adapter, room, frozenset(stops),
            Sampling(temperature=self._temperature, top_k=TOP_K), None,
            lambda chosen: streamer.put(torch.tensor([chosen.token])), end,
        ))  # fmt: skip
        try:
            yield errors
        finally:
            cancel()

    @contextmanager
    def _in_transformers(
        self, opened: Opened, ids: torch.Tensor, room: int, stops: Sequence[int],
        streamer: _Visible,
    ) -> Iterator[list[BaseException]]:  # fmt: skip
        """The same by transformers' `generate`."""
        model: Any = opened.base.model
        warm = self._temperature > 0
        sampling = {"do_sample": True, "temperature": self._temperature} if warm else {}
        settings = GenerationConfig(
            max_new_tokens=room,
            eos_token_id=list(stops) or None,
            pad_token_id=opened.base.tokenizer.pad_token_id,
            **{"do_sample": False, **sampling},
        )
        errors: list[BaseException] = []

        def work() -> None:
            try:
                model.generate(
                    input_ids=ids, attention_mask=ids.new_ones(ids.shape),
                    generation_config=settings, streamer=streamer,
                )  # fmt: skip
            except BaseException as error:
                errors.append(error)
                streamer.end()

        with opened.trained.using(opened.adapter), settings_alone(model):
            thread = Thread(target=work, daemon=True)
            thread.start()
            yield errors
            thread.join()

    def remember(self, question: str, answer: str) -> None:
        """Make a question and its answer part of the conversation."""
        self.messages += [Message("user", question), Message("assistant", answer)]

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def close(self) -> None:
        """End what answers; nothing can be asked any more."""
        self._close()


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
    log: Callable[[str], None] = lambda _: None,
) -> None:
    """Converse until `/exit` or the end of the input.

    Args:
        target: A run, a model, or an adapter's folder.
        adapter: Which adapter of a run; default its first.
        compare: Answer with the base too.
        system: System message.
        thinking: Let answers begin with a thought; None: as those of the training did.
        max_new_tokens: Longest answer.
        temperature: 0 answers greedily.
        lines: Where questions come from, standard input by default.
        out: Where answers go, standard output by default.
        log: Given a line where our engine does not take the model.

    Raises:
        UserError: No such run, model or adapter.
    """
    talk = Conversation(
        target, system=system, thinking=thinking, max_new_tokens=max_new_tokens,
        temperature=temperature,
    )  # fmt: skip
    if talk.why_no_engine is not None:
        log(f"transformers answers, not lighten's own engine: {talk.why_no_engine}")
    try:
        converse(talk, model=adapter, compare=compare, lines=lines, out=out)
    finally:
        talk.close()
