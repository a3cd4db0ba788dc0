"""The answers of one request: made together, whole or as a stream, and counted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from lighten.errors import UserError
from lighten.serving.adapters import Model
from lighten.serving.answers import Choice, Form, Usage, failure_event
from lighten.serving.engine import (
    Engine,
    EngineFailed,
    EngineRefused,
    Finish,
    Generation,
    Piece,
    TokenLogprob,
)
from lighten.serving.metrics import Metrics
from lighten.serving.registry import Registry
from lighten.serving.requests import Refused
from lighten.serving.stopping import StopTexts
from lighten.serving.tools.reader import Call, CallReader

if TYPE_CHECKING:
    from starlette.requests import Request

T = TypeVar("T")


class Disconnected(Exception):
    """The client hung up before it was answered."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body_bytes: Of a request.
        waiting: Answers under way and waiting; more are told to come back.
    """

    body_bytes: int = 8 * 2**20
    waiting: int = 512


@dataclass
class Front:
    """Everything that the routes share.

    Attributes:
        registry: What is served.
        engine: Who makes tokens.
        api_keys: One of them opens the routes below `/v1`; none: they are open.
        admin_keys: One of them opens loading and unloading; none: these are shut.
        hosts: Values of `Host` that are answered; None: all.
    """

    registry: Registry
    engine: Engine
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    limits: Limits = Limits()
    metrics: Metrics = field(default_factory=Metrics)
    ready: bool = False
    stopping: bool = False
    answering: int = 0

    def obstacle(self) -> str | None:
        """Why no request is taken now, in words for clients; None: they are."""
        if self.stopping:
            return "the server is being stopped"
        if not self.ready:
            return "the engine is being started"
        return self.engine.obstacle()

    async def warm_up(self) -> None:
        """Answer one request; only then is the server ready.

        Raises:
            UserError: The engine does not answer.
        """
        how_asked = self.registry.models[self.registry.name].asking
        prompt = how_asked.text("Hello") or [0]
        try:
            async for _ in self.engine.generate(Generation(prompt, None, 1)):
                pass
        except (EngineRefused, EngineFailed) as error:
            raise UserError(f"the engine does not answer: {error}") from error
        self.ready = True


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result, unless the client hangs up first: then the work is cancelled."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for future in (task, disconnect):
            future.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
        del task, future, disconnect  # its error holds this frame


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def chained(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream whose first event was waited for."""
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        yield first
        async for event in events:
            yield event


class Answering:
    """The answers of one request while they are made.

    Args:
        front: What the routes share.
        model: Who answers.
        generations: Of each prompt, one after another.
        stops: Texts that end an answer.
        answers: To each prompt.
        calls: Gives a reader of one answer's calls of tools; None: there are no tools.
    """

    def __init__(
        self, front: Front, model: Model, generations: Sequence[Generation], stops: Sequence[str],
        answers: int, calls: Callable[[], CallReader] | None = None,
    ) -> None:  # fmt: skip
        self._front, self._model, self._generations = front, model, generations
        self._stops, self._answers, self._calls = stops, answers, calls
        self._prompt_tokens = sum(len(each.prompt) for each in generations[::answers])
        self._began = time.perf_counter()
        self._first = True
        self._reserved = 0

    def reserve(self) -> None:
        """Count these answers as under way, from the moment in which there was room for them."""
        self._reserved = len(self._generations)
        self._front.answering += self._reserved

    def release(self) -> None:
        """Count them no more; again does nothing."""
        self._front.answering -= self._reserved
        self._reserved = 0

    def usage(self, choices: Sequence[Choice]) -> Usage:
        """Tokens; a prompt that has several answers counts once."""
        completion = sum(choice.tokens for choice in choices)
        # Whichever of a prompt's answers was made first has read it; the others had it from there.
        prompts = range(0, len(choices), self._answers)
        cached = sum(min(c.cached for c in choices[i : i + self._answers]) for i in prompts)
        return Usage(self._prompt_tokens, completion, min(self._prompt_tokens, cached))

    async def collect(self) -> list[Choice]:
        """All answers, when all are made."""
        choices = [Choice() for _ in self._generations]
        async with self._counted(choices):
            tasks = [
                asyncio.create_task(self._fill(*pair))
                for pair in zip(self._generations, choices, strict=True)
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                await _ended(tasks)
        self._tell_end()
        return choices

    async def events(self, form: Form, *, usage: bool) -> AsyncIterator[str]:
        """The events of a stream; parts of several answers as they come."""
        choices = [Choice() for _ in self._generations]
        parts: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

        async def make(number: int, generation: Generation) -> None:
            try:
                async for piece in self._pieces(generation, choices[number]):
                    parts.put_nowait((number, piece))
                parts.put_nowait(None)
            except Exception as error:
                parts.put_nowait(error)

        async with self._counted(choices):
            tasks = [
                asyncio.create_task(make(*numbered)) for numbered in enumerate(self._generations)
            ]
            try:
                unfinished = len(tasks)
                begun: set[int] = set()
                while unfinished:
                    part = await parts.get()
                    if part is None:
                        unfinished -= 1
                        continue
                    if isinstance(part, BaseException):
                        if not begun:
                            try:
                                raise part
                            finally:
                                del part
                        error = self._refused(part)
                        refused = error if isinstance(error, Refused) else Refused(500, str(error))
                        yield failure_event(refused.body())
                        return
                    number, piece = part
                    if number not in begun:
                        begun.add(number)
                        if (opening := form.first(number, choices[number].prompt)) is not None:
                            yield opening
                    has_logprobs = piece.logprobs or piece.missing_logprobs
                    if piece.text or piece.finish or has_logprobs or piece.calls:
                        yield form.part(number, piece)
                if usage:
                    yield form.usage(self.usage(choices))
                yield "data: [DONE]\n\n"
                self._tell_end()
            finally:
                await _ended(tasks)
                while not parts.empty():
                    parts.get_nowait()  # an error among them would hold what holds it

    async def _fill(self, generation: Generation, choice: Choice) -> None:
        async for _ in self._pieces(generation, choice):
            pass

    async def _pieces(self, generation: Generation, choice: Choice) -> AsyncIterator[Piece]:
        """The engine's pieces up to a stop text, each added to the choice before it is given."""
        stops, length = StopTexts(self._stops), 0
        if not generation.max_tokens and generation.prompt_logprobs is None:
            choice.finish = "length"  # an echo alone
            yield Piece("", finish="length")
            return
        reader = None if self._calls is None else self._calls()
        pieces = self._front.engine.generate(generation)
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            async for piece in pieces:
                self._tell_first()
                logprobs = _placed(piece, length)
                length += len(piece.text)
                text = stops.take(piece.text)
                finish = "stop" if stops.stopped else piece.finish
                if finish is not None and not stops.stopped:
                    text += stops.rest()
                calls: list[Call] = []
                if reader is not None:
                    text, calls = reader.take(text, final=finish is not None)
                    finish = _finish(finish, reader)
                choice.text += text
                choice.calls += calls
                choice.logprobs += logprobs
                choice.finish, choice.tokens = finish, piece.tokens
                choice.cached = piece.cached
                choice.missing_logprobs += piece.missing_logprobs
                choice.prompt += piece.prompt
                yield replace(
                    piece, text=text, logprobs=logprobs, finish=finish, calls=tuple(calls)
                )
                if finish is not None:
                    return

    def _tell_first(self) -> None:
        if self._first:
            self._first = False
            took = time.perf_counter() - self._began
            if self._is_served:
                self._front.metrics.observe("time_to_first_token", took, model=self._model.name)

    def _tell_end(self) -> None:
        took = time.perf_counter() - self._began
        if self._is_served:
            self._front.metrics.observe("request", took, model=self._model.name)

    @property
    def _is_served(self) -> bool:
        """Whether anything has the model's name still; what is not served is not counted."""
        return self._model.name in self._front.registry.models

    @contextlib.asynccontextmanager
    async def _counted(self, choices: Sequence[Choice]) -> AsyncIterator[None]:
        """Count the tokens of answers, those of clients that hang up among them.

        An engine's errors are told as the client's or the server's.
        """
        try:
            yield
        except Exception as error:
            refused = self._refused(error)
            try:
                raise refused from (None if refused is error else error)
            finally:
                del refused  # an error that its own frame holds keeps all of the request
        finally:
            self.release()
            generated = sum(choice.tokens for choice in choices)
            # A prompt may be read alone.
            if self._is_served and (generated or any(choice.finish for choice in choices)):
                metrics, name = self._front.metrics, self._model.name
                metrics.count("prompt_tokens", self._prompt_tokens, model=name)
                metrics.count("generated_tokens", generated, model=name)

    def _refused(self, error: BaseException) -> BaseException:
        """An engine's error as a client hears of it; others as they are."""
        if isinstance(error, EngineRefused):
            return Refused(400, str(error), _refused_field(str(error)))
        if isinstance(error, EngineFailed):
            if self._is_served:
                self._front.metrics.count("engine_failures", model=self._model.name)
            return Refused(503, f"the engine failed: {error}")
        return error


def _finish(finish: Finish | None, reader: CallReader) -> Finish | None:
    """Why an answer with calls ends: for them, unless there was no room for more."""
    if reader.complete or (finish == "stop" and reader.count):
        return "tool_calls"
    return finish


def _placed(piece: Piece, begin: int) -> tuple[TokenLogprob, ...]:
    """A piece's tokens with their places in the answer's text, where the piece begins at `begin`.

    Tokens that are parts of one character begin where it does.
    """
    placed, at = [], begin
    for token in piece.logprobs:
        placed.append(replace(token, offset=at))
        at = min(at + len(token.text), begin + len(piece.text))
    return tuple(placed)


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel what is not complete, wait for its end and let go of all of it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()


# Fields that an engine may refuse.
_BLAMED = {"response_format", "tools", "presence_penalty", "frequency_penalty", "model"}


def _refused_field(message: str) -> str | None:
    """The field that an engine refuses, which it names first; others are checked in the front."""
    name = message.partition(" ")[0].rstrip(":")
    return name if name in _BLAMED else None
