"""llama.cpp through `xllamacpp`: its own server in a process of its own, at a Unix socket.

What is guarded here, since its server takes it without a word (measured, b11549):

- A request that names fewer adapters than there are is answered from the state of another one:
  every request carries the full list, the base as all scales zero.
- It loads adapters only at its start. A new set starts a second process over the same mapped
  weights; requests move over when it answers, and the first one ends with its last answer.
- A JSON schema that its grammar does not know is dropped: each new schema is tried first.
- Its penalties count the tokens of the prompt, too, which OpenAI's do not: what they take from a
  prompt's tokens for their frequency is given back as a bias; for their presence there is no such
  way, and the field is refused.
- It takes likely tokens before it looks at the temperature; the order is told, as OpenAI's is.
- An adapter under which numbers overflow answers with nothing and may spoil the cache of later
  answers: each is tried before it serves.
- Tokens that are no whole character are missing from its stream: a Korean syllable of three tokens
  is told as one, with the probability of the last. That one alone is told here, as the part that it
  is; the number of the others is known, their log-probabilities are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.generation.settings import Sampling
from lighten.machine import containers
from lighten.serving import wire
from lighten.serving.engine import (
    Adapter,
    EngineFailed,
    EngineRefused,
    Finish,
    Generation,
    Piece,
    TokenLogprob,
)
from lighten.serving.schemas import field_of, grammar_of, laid_out
from lighten.serving.server_process import ServerProcess, Supervisor, visible_gpus
from lighten.serving.texts import Texts

_START_S = 600.0  # a large model from a slow disk
_MOST_SCHEMAS = 1000  # remembered
# Threads that wait for each other sleep instead of spinning. A spinning one keeps the others from
# the core as soon as anything else runs, the front for one: on two busy cores 4 tokens per second
# became 74.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


def environment() -> dict[str, str]:
    """Of its process: a llama.cpp that is built for CUDA would take whatever GPU it sees.

    Raises:
        UserError: `LIGHTEN_DEVICE` names no GPU of `CUDA_VISIBLE_DEVICES`.
    """
    return {**_ENVIRONMENT, **os.environ, **visible_gpus()}


class LlamaCpp:
    """The engine.

    Args:
        model: The base as GGUF.
        tokenizer: Of the base.
        convert: Path of an adapter as GGUF; may take a second, so it runs in a thread.
        context: Tokens that a prompt and its answer may have together.
        slots: Answers made at the same time.
        threads: Of the processor; default its cores.
        gpu_layers: Layers on a GPU, where the installed `xllamacpp` is built for one.
        cache: Format of keys and values, `f16` or `f32`.
        flags: More of llama.cpp's `common_params`, by name.
        prefix_caching: Whether a slot's state serves prompts with the same beginning.
    """

    name = "llama.cpp"
    tells_prompts = False

    def __init__(
        self,
        model: Path,
        tokenizer: Any,
        convert: Callable[[Adapter], Path],
        *,
        context: int,
        slots: int,
        threads: int | None = None,
        gpu_layers: int = -1,
        cache: str = "f16",
        flags: dict[str, Any] | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.model, self.context, self.slots = model, context, slots
        self._convert, self._texts = convert, Texts(tokenizer)
        self._threads = threads or containers.cores()
        self._gpu_layers, self._cache, self._flags = gpu_layers, cache, flags or {}
        self._prefix_caching = prefix_caching
        self._adapters: tuple[Adapter, ...] = ()
        self._supervisor = Supervisor(self.name, self._spawn)
        self._letter: int | None = None
        self._obeyed: dict[str, bool] = {}
        self._finite: set[str] = set()  # keys of adapters

    async def start(self, adapters: Sequence[Adapter]) -> None:
        """Load base and adapters; see `Engine`."""
        self._adapters = tuple(adapters)
        async with self._supervisor.exchanging:
            await self._supervisor.exchange()

    async def stop(self) -> None:
        """End all processes."""
        await self._supervisor.stop()

    async def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Move to a process with these; see `Engine`.

        Adapters that are there already cost nothing: what is no longer wanted stays loaded until
        something new has to be.
        """
        async with self._supervisor.exchanging:
            previous, self._adapters = self._adapters, tuple(adapters)
            if self.obstacle() is None:
                loaded = self._supervisor.running().adapters
                if {adapter.key for adapter in adapters} <= set(loaded):
                    return
            try:
                await self._supervisor.exchange()
            except BaseException:
                self._adapters = previous
                raise

    def obstacle(self) -> str | None:
        """Why it takes no requests now; see `Engine`."""
        return self._supervisor.obstacle()

    def alive(self) -> bool:
        """Whether its process is there, or will be; see `Engine`."""
        return not self._supervisor.given_up

    def facts(self) -> dict[str, Any]:
        """What it is; see `Engine`."""
        return {
            "engine": self.name, "model": self.model.name, "context": self.context,
            "slots": self.slots, "threads": self._threads, "restarts": self._supervisor.restarts,
            "processes": self._supervisor.processes,
        }  # fmt: skip

    async def generate(self, generation: Generation) -> AsyncIterator[Piece]:
        """The answer piece by piece; see `Engine`."""
        _require_applied(generation.sampling)
        process = self._supervisor.running()
        if generation.adapter is not None and generation.adapter not in process.adapters:
            raise EngineFailed("this adapter is not loaded any more")
        with process.answering():
            if generation.schema is not None or generation.grammar is not None:
                await self._require_obeyed(process, generation)
            body = request_body(generation, process.adapters, prefix_caching=self._prefix_caching)
            async for piece in _pieces(process, generation, body, self._texts):
                yield piece

    async def _require_obeyed(self, process: ServerProcess, generation: Generation) -> None:
        """Refuse a grammar that llama.cpp cannot follow: it would answer as if there were none.

        llguidance says what is wrong with it. Once for each other grammar one token is generated
        with a letter favoured that only a grammar that is followed keeps out.
        """
        text = await asyncio.to_thread(grammar_of, generation)
        assert text is not None
        if text not in self._obeyed:
            chosen = [
                token
                for event in await self._tried(
                    process, None, schema=generation.schema, grammar=generation.grammar
                )
                for token in event["tokens"]
            ]
            if len(self._obeyed) >= _MOST_SCHEMAS:
                self._obeyed.clear()
            self._obeyed[text] = self._letter not in chosen
        if not self._obeyed[text]:
            raise EngineRefused(
                f"{field_of(generation)}: llama.cpp cannot follow this JSON schema; make it simpler"
            )

    async def _require_finite(self, process: ServerProcess, adapters: Sequence[Adapter]) -> None:
        """Refuse adapters under which numbers overflow: llama.cpp answers with nothing then.

        Without flash attention, which a cache in float32 does without, what such an answer leaves
        in the cache makes nothing of later answers under other adapters, too.

        Raises:
            UserError: Names the adapter.
        """
        for adapter in adapters:
            if adapter.key in self._finite:
                continue
            for event in await self._tried(process, adapter.key, logprobs=1):
                if any(entry["logprob"] is None
                       for entry in event.get("completion_probabilities", ())):  # fmt: skip
                    raise UserError(
                        f"{adapter.folder} makes the model compute numbers that are not finite; "
                        "its training diverged, take an earlier checkpoint"
                    )
            self._finite.add(adapter.key)

    async def _tried(
        self, process: ServerProcess, adapter: str | None, **options: Any
    ) -> list[dict[str, Any]]:
        """The events of one token, a letter favoured that begins neither JSON nor a call."""
        if self._letter is None:
            (self._letter, *_) = await wire.post(process.socket, "/tokenize", {"content": "Z"})
        probe = Generation((self._letter,), adapter, 1, Sampling(0.0), **options)
        body = request_body(probe, process.adapters)
        body["logit_bias"] = [[self._letter, 1e4]]
        events = wire.post_stream(process.socket, "/completion", body)
        async with contextlib.aclosing(events):
            return [event async for event in events]

    async def _spawn(self) -> ServerProcess:
        """A process, ready, with the adapters that are to be served."""
        adapters = self._adapters
        files = [await asyncio.to_thread(self._convert, adapter) for adapter in adapters]
        process = ServerProcess(self.name)
        process.adapters += [adapter.key for adapter in adapters]
        settings = {
            "model": str(self.model), "socket": str(process.socket), "slots": self.slots,
            "context": self.context, "threads": self._threads, "poll": 0,
            "gpu_layers": self._gpu_layers, "adapters": [str(file) for file in files],
            "verbosity": 2, "cache": self._cache, "flags": self._flags,
        }  # fmt: skip
        await process.start(
            [sys.executable, "-m", "lighten.serving.child"],
            environment=environment(),
            first_line=json.dumps(settings) + "\n", within_s=_START_S,
        )  # fmt: skip
        try:
            await self._require_finite(process, adapters)
        except BaseException:
            await process.end()
            raise
        return process


def _require_applied(sampling: Sampling) -> None:
    """Refuse penalties that would count the prompt."""
    if sampling.presence_penalty:
        raise EngineRefused(
            "presence_penalty is not applied by llama.cpp as it is meant, on generated tokens "
            "alone; use frequency_penalty, or start the server with --engine lighten"
        )
    if sampling.frequency_penalty and sampling.repetition_penalty != 1.0:
        raise EngineRefused(
            "frequency_penalty and repetition_penalty are not applied together by llama.cpp; leave "
            "one out, or start the server with --engine lighten"
        )


def request_body(
    generation: Generation, adapters: Sequence[str], *, prefix_caching: bool = True
) -> dict[str, Any]:
    """A generation as llama.cpp's `/completion` takes it; nothing is left to its defaults."""
    sampling = generation.sampling
    bias = dict(sampling.logit_bias)
    if sampling.frequency_penalty:
        for token, times in Counter(generation.prompt).items():
            bias[token] = bias.get(token, 0.0) + sampling.frequency_penalty * times
    body: dict[str, Any] = {
        "prompt": list(generation.prompt),
        "n_predict": generation.max_tokens,
        "stream": True,
        "return_tokens": True,
        "cache_prompt": prefix_caching,
        "return_progress": True,  # tells how much of the prompt was there before it is computed
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": len(generation.prompt) + generation.max_tokens,  # all there is
        # The largest number stands for a different seed each time.
        "seed": -1 if sampling.seed is None else sampling.seed % (2**32 - 1),
        "logit_bias": [[token, value] for token, value in bias.items()],
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "ignore_eos": generation.ignores_ends,
        "preserved_tokens": list(generation.shown),
        "n_probs": 0 if generation.logprobs is None else max(1, generation.logprobs),
        "lora": [
            {"id": number, "scale": float(key == generation.adapter)}
            for number, key in enumerate(adapters)
        ],
    }
    if generation.schema is not None:
        body["json_schema"] = laid_out(generation.schema)
    elif generation.grammar is not None:
        body["grammar"] = f"%llguidance {{}}\n{generation.grammar}"
    return body


async def _pieces(
    process: ServerProcess, generation: Generation, body: dict[str, Any], texts: Texts
) -> AsyncIterator[Piece]:
    events = wire.post_stream(process.socket, "/completion", body)
    async with contextlib.aclosing(events):
        tokens = reported_tokens = cached = 0

        def missing(told: int) -> int:
            """Tokens since the last event whose log-probabilities are wanted and not known."""
            return 0 if generation.logprobs is None else max(0, tokens - reported_tokens - told)

        async for event in events:
            if (progress := event.get("prompt_progress")) is not None:
                cached = progress["cache"]
                continue
            tokens = event.get("tokens_predicted", tokens)
            if event.get("stop"):
                finish: Finish = "length" if event["stop_type"] == "limit" else "stop"
                # A token that ends an answer is never told.
                untold = missing(int(finish == "stop"))
                yield Piece(event.get("content", ""), (), finish, tokens, cached, untold)
                return
            if any(token in generation.stop_ids for token in event["tokens"]):
                yield Piece("", (), "stop", tokens, cached, missing(1))  # hanging up frees its slot
                return
            logprobs = tuple(_logprobs(event, generation, texts))
            untold = missing(len(logprobs))
            reported_tokens = tokens
            yield Piece(event["content"], logprobs, None, tokens, cached, untold)
    raise EngineFailed("the engine ended its answer without an end")


def _logprobs(
    event: dict[str, Any], generation: Generation, texts: Texts
) -> Iterator[TokenLogprob]:
    """What is told of an event's tokens, each with the text of that token alone."""
    if generation.logprobs is None:
        return
    for entry in event.get("completion_probabilities", ()):
        top = entry["top_logprobs"][: generation.logprobs]
        yield texts.token_logprob(
            entry["id"], entry["logprob"], [(other["id"], other["logprob"]) for other in top]
        )
