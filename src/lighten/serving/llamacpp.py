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
- Tokens that are no whole character are missing from its stream (a Korean syllable of three
  tokens is told as one); their number is known, their log-probabilities are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
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
from lighten.serving.schemas import compiled, laid_out

log = logging.getLogger(__name__)
_START_S = 600.0  # a large model from a slow disk
_MOST_CRASHES = 3  # within `_CRASH_WINDOW_S`; then it is left down
_CRASH_WINDOW_S = 60.0
_MOST_SCHEMAS = 1000  # remembered
# Threads that wait for each other sleep instead of spinning. A spinning one keeps the others from
# the core as soon as anything else runs, the front for one: on two busy cores 4 tokens per second
# became 74.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


@dataclass
class _Process:
    """One process with its set of adapters."""

    folder: Path
    adapters: tuple[str, ...]  # keys, by llama.cpp's id
    child: asyncio.subprocess.Process | None = None
    log: list[str] = field(default_factory=list)
    answering: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def socket(self) -> Path:
        return self.folder / "engine.sock"

    def alive(self) -> bool:
        return self.child is not None and self.child.returncode is None


class LlamaCpp:
    """The engine.

    Args:
        model: The base as GGUF.
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

    def __init__(
        self,
        model: Path,
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
        self._convert = convert
        self._threads = threads or containers.cores()
        self._gpu_layers, self._cache, self._flags = gpu_layers, cache, flags or {}
        self._prefix_caching = prefix_caching
        self._adapters: tuple[Adapter, ...] = ()
        self._current: _Process | None = None
        self._draining: set[asyncio.Task[None]] = set()
        self._watchers: set[asyncio.Task[None]] = set()
        self._crashes: list[float] = []
        self._swap = asyncio.Lock()
        self._letter: int | None = None
        self._obeyed: dict[str, bool] = {}
        self._stopped = False
        self.restarts = 0

    async def start(self, adapters: Sequence[Adapter]) -> None:
        """Load base and adapters; see `Engine`."""
        self._adapters = tuple(adapters)
        self._current = await self._spawn(self._adapters)
        self._watch(self._current)

    async def stop(self) -> None:
        """End all processes."""
        self._stopped = True
        tasks = [*self._watchers, *self._draining]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._current is not None:
            await _end(self._current)

    async def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Move to a process with these; see `Engine`.

        Adapters that are there already cost nothing: what is no longer wanted stays loaded until
        something new has to be.
        """
        async with self._swap:
            here = set() if self._current is None else set(self._current.adapters)
            wanted = tuple(adapters)
            if self._current is not None and {own.key for own in wanted} <= here:
                self._adapters = wanted
                return
            fresh = await self._spawn(wanted)
            self._adapters, old, self._current = wanted, self._current, fresh
            self._watch(fresh)
            if old is not None:
                task = asyncio.create_task(self._drain(old))
                self._draining.add(task)
                task.add_done_callback(self._draining.discard)

    def alive(self) -> bool:
        """Whether the process is there."""
        return self._current is not None and self._current.alive()

    def facts(self) -> dict[str, Any]:
        """What it is; see `Engine`."""
        return {
            "engine": self.name, "model": self.model.name, "context": self.context,
            "slots": self.slots, "threads": self._threads, "restarts": self.restarts,
            "processes": 1 + len(self._draining),
        }  # fmt: skip

    async def generate(self, wanted: Generation) -> AsyncIterator[Piece]:
        """The answer piece by piece; see `Engine`."""
        _require_applied(wanted.sampling)
        process = self._current
        if process is None or not process.alive():
            raise EngineFailed("the engine is being started again; try again in a few seconds")
        if wanted.adapter is not None and wanted.adapter not in process.adapters:
            raise EngineFailed("this adapter is not loaded any more")
        process.answering += 1
        try:
            if wanted.schema is not None:
                await self._require_obeyed(process, wanted.schema)
            body = request_body(wanted, process.adapters, prefix_caching=self._prefix_caching)
            async for piece in _pieces(process, wanted, body):
                yield piece
        except EngineFailed as error:
            status, said = (*error.args, "")[:2] if len(error.args) > 1 else (0, str(error))
            if 400 <= int(status) < 500:
                raise EngineRefused(said) from error
            raise EngineFailed(said) from error
        finally:
            process.answering -= 1
            if not process.answering:
                process.idle.set()

    async def _require_obeyed(self, process: _Process, schema: dict[str, Any]) -> None:
        """Refuse a schema that llama.cpp cannot follow: it would answer as if there were none.

        llguidance says what is wrong with it. Once for each other schema one token is generated
        with a letter that begins no JSON favoured over all others: only a schema that is followed
        keeps it out.
        """
        try:
            await asyncio.to_thread(compiled, schema)
        except UserError as error:
            raise EngineRefused(f"response_format: {error}") from error
        text = json.dumps(schema, sort_keys=True)
        if text not in self._obeyed:
            if self._letter is None:
                (self._letter, *_) = await wire.post(process.socket, "/tokenize", {"content": "Z"})
            probe = Generation((self._letter,), None, 1, Sampling(0.0), schema=schema)
            body = request_body(probe, process.adapters)
            body["logit_bias"] = [[self._letter, 1e4]]
            chosen: list[int] = []
            async with contextlib.aclosing(
                wire.post_stream(process.socket, "/completion", body)
            ) as events:
                async for event in events:
                    chosen += event["tokens"]
            if len(self._obeyed) >= _MOST_SCHEMAS:
                self._obeyed.clear()
            self._obeyed[text] = self._letter not in chosen
        if not self._obeyed[text]:
            raise EngineRefused(
                "response_format: llama.cpp cannot follow this JSON schema; make it simpler"
            )

    async def _spawn(self, adapters: Sequence[Adapter]) -> _Process:
        files = [await asyncio.to_thread(self._convert, own) for own in adapters]
        process = _Process(
            # Short, for a socket's path has 108 characters at most; readable by this user alone.
            Path(tempfile.mkdtemp(prefix="lighten-engine-")),
            tuple(own.key for own in adapters),
        )
        settings = {
            "model": str(self.model), "socket": str(process.socket), "slots": self.slots,
            "context": self.context, "threads": self._threads, "poll": 0,
            "gpu_layers": self._gpu_layers, "adapters": [str(file) for file in files],
            "verbosity": 2, "cache": self._cache, "flags": self._flags,
        }  # fmt: skip
        try:
            process.child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lighten.serving.child",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE, env={**_ENVIRONMENT, **os.environ},
            )  # fmt: skip
            assert process.child.stdin is not None
            process.child.stdin.write(json.dumps(settings).encode() + b"\n")
            await process.child.stdin.drain()
            asyncio.get_running_loop().create_task(_keep_log(process))
            await asyncio.wait_for(_until_ready(process), _START_S)
        except BaseException:
            await _end(process)
            raise
        return process

    async def _drain(self, process: _Process) -> None:
        """End a process with its last answer."""
        try:
            while process.answering:
                process.idle.clear()
                await process.idle.wait()
        finally:
            await _end(process)

    def _watch(self, process: _Process) -> None:
        task = asyncio.create_task(self._restart_if_crashed(process))
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    async def _restart_if_crashed(self, process: _Process) -> None:
        """Start a process again that ended by itself, unless they do so again and again."""
        assert process.child is not None
        await process.child.wait()
        async with self._swap:
            if process is not self._current or self._stopped:
                return
            now = asyncio.get_running_loop().time()
            self._crashes = [at for at in self._crashes if now - at < _CRASH_WINDOW_S] + [now]
            said = " / ".join(process.log[-3:])
            log.error("the engine ended with code %s: %s", process.child.returncode, said)
            await _end(process)
            if len(self._crashes) > _MOST_CRASHES:
                log.error("the engine crashed %d times in a minute: left down", len(self._crashes))
                return
            try:
                self._current = await self._spawn(self._adapters)
            except (UserError, EngineFailed) as error:
                log.error("the engine does not start again: %s", error)
                return
            self.restarts += 1
            self._watch(self._current)


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
    wanted: Generation, adapters: Sequence[str], *, prefix_caching: bool = True
) -> dict[str, Any]:
    """A generation as llama.cpp's `/completion` takes it; nothing is left to its defaults."""
    sampling = wanted.sampling
    bias = dict(sampling.logit_bias)
    if sampling.frequency_penalty:
        for token, times in Counter(wanted.prompt).items():
            bias[token] = bias.get(token, 0.0) + sampling.frequency_penalty * times
    body: dict[str, Any] = {
        "prompt": list(wanted.prompt),
        "n_predict": wanted.max_tokens,
        "stream": True,
        "return_tokens": True,
        "cache_prompt": prefix_caching,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": len(wanted.prompt) + wanted.max_tokens,  # all there is
        # The largest number stands for a different seed each time.
        "seed": -1 if sampling.seed is None else sampling.seed % (2**32 - 1),
        "logit_bias": [[token, value] for token, value in bias.items()],
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "preserved_tokens": list(wanted.shown),
        "n_probs": 0 if wanted.logprobs is None else max(1, wanted.logprobs),
        "lora": [
            {"id": number, "scale": float(key == wanted.adapter)}
            for number, key in enumerate(adapters)
        ],
    }
    if wanted.schema is not None:
        body["json_schema"] = laid_out(wanted.schema)
    return body


async def _pieces(
    process: _Process, wanted: Generation, body: dict[str, Any]
) -> AsyncIterator[Piece]:
    events = wire.post_stream(process.socket, "/completion", body)
    async with contextlib.aclosing(events):
        tokens = told = 0
        async for event in events:
            tokens = event.get("tokens_predicted", tokens)
            if event.get("stop"):
                finish: Finish = "length" if event["stop_type"] == "limit" else "stop"
                cached = event.get("timings", {}).get("cache_n", 0)
                yield Piece(event.get("content", ""), (), finish, tokens, cached)
                return
            if any(token in wanted.stop_ids for token in event["tokens"]):
                yield Piece("", (), "stop", tokens)  # hanging up frees its slot
                return
            logprobs = tuple(_logprobs(event, wanted))
            # A character of several tokens is told with its last one.
            untold = 0 if wanted.logprobs is None else tokens - told - len(logprobs)
            told = tokens
            yield Piece(event["content"], logprobs, None, tokens, 0, untold)
    raise EngineFailed("the engine ended its answer without an end")


def _logprobs(event: dict[str, Any], wanted: Generation) -> list[TokenLogprob]:
    if wanted.logprobs is None:
        return []
    return [
        _token(own, tuple(_token(top) for top in own["top_logprobs"][: wanted.logprobs]))
        for own in event.get("completion_probabilities", ())
    ]


def _token(told: dict[str, Any], top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(told["id"], told["token"], tuple(told["bytes"]), told["logprob"], top)


async def _keep_log(process: _Process) -> None:
    """Read the process's log, so that it never waits for a reader; its end is kept."""
    assert process.child is not None
    assert process.child.stderr is not None
    with contextlib.suppress(ValueError):
        while line := await process.child.stderr.readline():
            process.log.append(line.decode(errors="replace").strip())
            del process.log[:-40]


async def _until_ready(process: _Process) -> None:
    assert process.child is not None
    assert process.child.stdout is not None
    while line := await process.child.stdout.readline():
        if line.strip() == b"READY":
            break
        process.log.append(line.decode(errors="replace").strip())
    else:
        await process.child.wait()
        await asyncio.sleep(0)
        said = next((own for own in reversed(process.log) if own), "no message")
        raise UserError(f"llama.cpp could not be started: {said}")
    while (await wire.get(process.socket, "/health"))[0] != 200:
        await asyncio.sleep(0.05)


async def _end(process: _Process) -> None:
    child = process.child
    if child is not None and child.returncode is None:
        assert child.stdin is not None
        child.stdin.close()  # it ends by itself
        try:
            await asyncio.wait_for(child.wait(), 5)
        except TimeoutError:
            child.kill()
            await child.wait()
    shutil.rmtree(process.folder, ignore_errors=True)
