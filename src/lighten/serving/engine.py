"""What an engine is to the front: it makes tokens for prompts, under an adapter or none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from lighten.errors import UserError
from lighten.generation.settings import Sampling
from lighten.serving.tools.reader import Call

Finish = Literal["stop", "length", "tool_calls"]


class EngineRefused(Exception):
    """The engine does not take this request; the client has to change it."""


class EngineFailed(Exception):
    """The engine broke while it answered, or is not there just now."""


@dataclass(frozen=True)
class Generation:
    """One answer that an engine is to make.

    Attributes:
        prompt: Token ids, BOS included where there is one.
        adapter: Its key (`Adapter.key`); None: the base alone.
        max_tokens: Tokens at most; 0, with `prompt_logprobs` alone: the prompt is only read.
        sampling: How they are chosen.
        stop_ids: Tokens that end the answer and are no part of it.
        shown: Special tokens that are shown where the answer holds them.
        logprobs: As many alternatives for each token, 0 for none but its own; None: no
            log-probabilities at all.
        schema: JSON schema that the answer has to follow, None for free text.
        grammar: The same in llguidance's Lark, for calls of tools; one of both at most.
        continues: Whether the answer goes on in the prompt's text, as completions do, and does not
            begin one.
        prompt_logprobs: As `logprobs`, for the tokens of the prompt.
        tells_end: Whether the token that ends the answer is told among those with
            log-probabilities.
        ignores_ends: Whether tokens that end this model's answers end this one only where
            `stop_ids` has them.
    """

    prompt: Sequence[int]
    adapter: str | None
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    shown: tuple[str, ...] = ()
    logprobs: int | None = None
    schema: dict[str, Any] | None = None
    grammar: str | None = None
    continues: bool = False
    prompt_logprobs: int | None = None
    tells_end: bool = False
    ignores_ends: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its natural log-probability before sampling settings, and its alternatives.

    A prompt's first token has none. `offset` is where it begins in the answer's text, in letters:
    that of the character that it is a part of. `rank` is its place among all words, the likeliest's
    1, where it is known.
    """

    id: int
    text: str
    bytes: tuple[int, ...]
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()
    offset: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Piece:
    """The next part of an answer.

    Attributes:
        text: What is shown; whole characters only.
        logprobs: Of its tokens, where they were asked for.
        finish: Why the answer ends here, None where it goes on.
        tokens: Tokens generated so far, the one that ended the answer included.
        cached: Prompt tokens whose state was there already.
        missing_logprobs: Tokens whose log-probabilities were asked for and are not known.
        prompt: The prompt's tokens, where their log-probabilities were asked for: in the first
            piece, which has nothing else.
        calls: Calls of tools that are whole with it; engines know of none.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    tokens: int = 0
    cached: int = 0
    missing_logprobs: int = 0
    prompt: tuple[TokenLogprob, ...] = ()
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """An adapter as engines load it.

    Attributes:
        key: A fingerprint of its contents: an adapter that was trained anew has another one, so
            that nothing an engine remembers is taken for it.
        folder: In PEFT's format.
    """

    key: str
    folder: Path


class Engine(Protocol):
    """Makes answers. One is shared by all requests; its methods are called from one event loop."""

    name: str
    context: int
    """Tokens that a prompt and its answer may have together."""
    slots: int
    """Answers made at the same time; more wait inside the engine."""
    tells_prompts: bool
    """Whether it gives log-probabilities of prompts."""

    async def start(self, adapters: Sequence[Adapter]) -> None:
        """Load base and adapters; returns when it can answer.

        Raises:
            UserError: It cannot be started with these.
        """

    async def stop(self) -> None:
        """End it; answers in progress fail."""

    async def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Serve these adapters from now on; answers in progress go on under the old ones.

        Raises:
            UserError: One of them cannot be served; the old ones stay.
            EngineFailed: The engine takes none now; see `obstacle`.
        """

    def generate(self, generation: Generation) -> AsyncIterator[Piece]:
        """The answer piece by piece; closing the iterator stops the generation.

        Raises:
            EngineRefused: The client has to change the request.
            EngineFailed: The engine broke.
        """

    def obstacle(self) -> str | None:
        """Why it takes no requests now, in words for clients; None: it does."""

    def alive(self) -> bool:
        """Whether it takes requests now or will by itself; else the server has to be restarted."""

    def facts(self) -> dict[str, Any]:
        """What it is and how it is set, for logs and `/health`."""


async def change_adapters(
    loaded_keys: Iterable[str],
    adapters: Sequence[Adapter],
    load: Callable[[Adapter], Awaitable[None]],
    unload: Callable[[str], Awaitable[None]],
) -> None:
    """Load what is missing, then unload what is not wanted; nothing changes where one fails.

    Args:
        loaded_keys: Keys of the adapters that are loaded.
        adapters: Wanted.
        load: Loads one.
        unload: Unloads one, by its key.

    Raises:
        UserError: One of them cannot be served; the old ones stay.
    """
    previous, by_key = list(loaded_keys), {adapter.key: adapter for adapter in adapters}
    loaded: list[str] = []
    try:
        for key, adapter in by_key.items():
            if key not in previous:
                await load(adapter)
                loaded.append(key)
    except UserError:
        for key in loaded:
            await unload(key)
        raise
    for key in previous:
        if key not in by_key:
            await unload(key)
