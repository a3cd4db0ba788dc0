"""Our engine as the front sees it: texts in place of tokens, and answers piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch

from lighten import models, streams
from lighten.errors import UserError
from lighten.generation import kernels
from lighten.generation.engine import Engine
from lighten.generation.request import Request
from lighten.generation.sampling import Chosen
from lighten.machine.hardware import choose_device
from lighten.serving.adapters import require_unchanged
from lighten.serving.engine import (
    Adapter,
    EngineFailed,
    EngineRefused,
    Finish,
    Generation,
    Piece,
    change_adapters,
)
from lighten.serving.grammar import Grammar, Grammars
from lighten.serving.schemas import field_of, grammar_of
from lighten.serving.texts import Texts


class CohortEngine:
    """The base in this process, in transformers, with the cohort's product for all adapters.

    Args:
        base: Name of the base, as `lighten.models.load` takes it.
        context: Tokens of a prompt with its answer.
        slots: Answers made at the same time.
        revision: Of a hub id.
        dtype: Format of the base; `auto`: bfloat16 where the processor computes in it.
        threads: Of the processor.
        prefix_caching: Whether a slot's state serves prompts with the same beginning.
    """

    name = "lighten"
    tells_prompts = True

    def __init__(
        self, base: str, *, context: int, slots: int, revision: str | None = None,
        dtype: str = "auto", threads: int | None = None, prefix_caching: bool = True,
    ) -> None:  # fmt: skip
        self.context, self.slots = context, slots
        self._base, self._revision, self._dtype = base, revision, dtype
        self._threads, self._prefix_caching = threads, prefix_caching
        self._engine: Engine | None = None
        self._opened: models.Base | None = None
        self._texts: Texts | None = None
        self._grammars: Grammars | None = None
        self._stopped = False

    async def start(self, adapters: Sequence[Adapter]) -> None:
        """Load base and adapters.

        Raises:
            UserError: The base or an adapter cannot be served.
        """
        await asyncio.to_thread(self._open)
        await self.set_adapters(adapters)

    def _open(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        with streams.heard_by(self._require_wanted):
            opened = models.load(
                self._base, revision=self._revision, dtype=self._dtype,
                attn_implementation="eager", device=choose_device().value,
            )  # fmt: skip
        self._require_wanted()
        self._engine = Engine(
            opened.model, max_sequences=self.slots, max_tokens=self.context,
            prefix_caching=self._prefix_caching,
        )  # fmt: skip
        self._texts, self._opened = Texts(opened.tokenizer), opened
        vocabulary: int = opened.model.config.get_text_config().vocab_size
        self._grammars = Grammars(opened.tokenizer, vocabulary)

    def _require_wanted(self, *_progress: Any) -> None:
        """Called while the base is loaded, which takes minutes: nobody waits for the rest.

        Raises:
            UserError: The engine was stopped.
        """
        if self._stopped:
            raise UserError("the engine was stopped while it loaded its base")

    async def stop(self) -> None:
        """End it."""
        self._stopped = True
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close, 10.0)

    async def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Serve these adapters from now on; answers in progress go on under the old ones.

        Raises:
            UserError: One of them cannot be served; the old ones stay.
        """
        engine = self._running()

        async def load(adapter: Adapter) -> None:
            await asyncio.to_thread(engine.load_adapter, adapter.key, adapter.folder)
            try:
                await asyncio.to_thread(require_unchanged, adapter)
            except UserError:
                await unload(adapter.key)
                raise

        async def unload(key: str) -> None:
            await asyncio.to_thread(engine.unload_adapter, key)

        await change_adapters(engine.adapters, adapters, load, unload)

    async def generate(self, generation: Generation) -> AsyncIterator[Piece]:
        """The answer piece by piece; closing the iterator stops the generation.

        Raises:
            EngineRefused: The client has to change the request.
            EngineFailed: The engine broke.
        """
        engine, texts, grammars = self._running(), self._texts, self._grammars
        assert texts is not None
        assert grammars is not None
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[int | Chosen | list[Chosen] | str | BaseException] = asyncio.Queue()

        def put(event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            grammar = None
            if generation.schema is not None or generation.grammar is not None:
                grammar = await asyncio.to_thread(_grammar, grammars, generation)
            request = Request(
                list(generation.prompt), generation.adapter, generation.max_tokens,
                generation.stop_ids, generation.sampling, generation.logprobs,
                on_token=put, on_end=put, on_begin=put, grammar=grammar,
                prompt_logprobs=generation.prompt_logprobs, on_prompt=put,
                tells_end=generation.tells_end,
            )  # fmt: skip
            cancel = engine.submit(request)
        except UserError as error:
            raise EngineRefused(str(error)) from error
        stream = texts.stream_of(generation)
        tokens, cached, ended, ended_by_token = 0, 0, False, False
        try:
            while not ended:
                event = await events.get()
                if isinstance(event, Chosen):
                    tokens += 1
                    logprobs = () if event.logprob is None else (
                        texts.token_logprob(event.token, event.logprob, event.top),
                    )  # fmt: skip
                    ended_by_token = event.token in generation.stop_ids
                    text = "" if ended_by_token else stream.text(event.token)
                    yield Piece(text, logprobs, tokens=tokens, cached=cached)
                    continue
                if isinstance(event, int):
                    cached = event
                    continue
                if isinstance(event, list):
                    first = generation.prompt[0]
                    prompt_logprobs = await asyncio.to_thread(texts.prompt, first, event)
                    yield Piece("", prompt=prompt_logprobs)
                    continue
                ended = True
                if isinstance(event, UserError):
                    raise EngineRefused(str(event)) from event
                if isinstance(event, BaseException):
                    raise EngineFailed(str(event) or type(event).__name__) from event
                if event == "cancelled":
                    raise EngineFailed("the answer was cancelled")
                finish: Finish = "length" if event == "length" else "stop"
                count = tokens + (event == "stop" and not ended_by_token)
                yield Piece(stream.rest(), finish=finish, tokens=count, cached=cached)
        finally:
            if not ended:
                cancel()

    def obstacle(self) -> str | None:
        """Why it takes no requests now; see `Engine`."""
        if self._engine is None:
            return "the engine is being started"
        return None if self._engine.alive else "the engine has ended; start the server again"

    def alive(self) -> bool:
        """Whether it takes requests now or will by itself; see `Engine`."""
        return self._engine is None or self._engine.alive

    def facts(self) -> dict[str, Any]:
        """What it is and how it is set."""
        opened = self._opened
        return {
            "engine": self.name,
            "context": self.context,
            "slots": self.slots,
            "dtype": None if opened is None else opened.dtype.value,
            "kernels": kernels.obstacle() or "compiled for this processor",
            "threads": torch.get_num_threads(),
        }

    def _running(self) -> Engine:
        if self._engine is None:
            raise EngineFailed("the engine has not started")
        return self._engine


def _grammar(grammars: Grammars, generation: Generation) -> Grammar | None:
    text = grammar_of(generation)
    if text is None:
        return None
    return grammars.of(text, generation.stop_ids, field_of(generation))
