"""Token ids as text, for engines that tell ids alone."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from lighten.generation.sampling import Chosen
from lighten.serving.engine import Generation, TokenLogprob

# Tokens that the last character of a prompt may have.
_OF_A_CHARACTER = 8
_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_LEAST = -9999.0  # of a word that cannot come; JSON has no infinity


class Texts:
    """Token ids as text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder  # made anew each time
        self._special = set(tokenizer.all_special_ids) | {
            token for token, added in self._added.items() if added.special
        }
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_level = "ByteLevel" in str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
        self._bytes = {c: b for b, c in bytes_to_unicode().items()} if byte_level else {}

    def stream_of(self, generation: Generation) -> Stream:
        """A decoder of the answer that is made."""
        prompt = generation.prompt if generation.continues else ()
        return self.stream(generation.shown, prompt)

    def stream(self, shown: Sequence[str], prompt: Sequence[int] = ()) -> Stream:
        """A decoder of one answer.

        Args:
            shown: Special tokens that are part of its text.
            prompt: What it goes on with; none: it begins a text, where tokenizers as Llama 2's
                leave out a space.
        """
        return self._stream(
            self._special - set(self._tokenizer.convert_tokens_to_ids(list(shown))), prompt
        )

    def _stream(self, hidden: set[int], prompt: Sequence[int] = ()) -> Stream:
        return Stream(self, self._tokenizer.backend_tokenizer, hidden, prompt)

    def whole(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """The text of tokens, special ones among them, and where each begins in it."""
        stream, parts, offsets, length = self._stream(set()), [], [], 0
        for token in tokens:
            offsets.append(length)
            parts.append(stream.text(token))
            length += len(parts[-1])
        return "".join(parts) + stream.rest(), offsets

    def prompt(self, first: int, others: Sequence[Chosen]) -> tuple[TokenLogprob, ...]:
        """A prompt's tokens with their texts and bytes; nothing says how likely the first was."""
        likelihoods = (
            self.token_logprob(chosen.token, chosen.logprob, chosen.top, chosen.rank)
            for chosen in others
        )
        return self.token_logprob(first, None, ()), *likelihoods

    def token_logprob(
        self, token: int, logprob: float | None, top: Sequence[tuple[int, float]], rank: int = 0
    ) -> TokenLogprob:
        """A token and its alternatives, the likeliest first, with their texts and bytes."""
        alternatives = tuple(
            self._with_text(*alternative, (), place)
            for place, alternative in enumerate(top, start=1)
        )
        return self._with_text(token, logprob, alternatives, rank)

    def _with_text(
        self, token: int, logprob: float | None, top: tuple[TokenLogprob, ...], rank: int
    ) -> TokenLogprob:
        data = self.bytes_of(token)
        finite = None if logprob is None else max(logprob, _LEAST)
        return TokenLogprob(token, data.decode(errors="replace"), tuple(data), finite, top, 0, rank)

    def bytes_of(self, token: int) -> bytes:
        """What a token writes; it may be a part of a character."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # models have rows beyond the last token, for the sake of their shape
            return b""
        if token in self._added:
            return piece.encode()
        if match := _BYTE.match(piece):
            return bytes([int(match[1], 16)])
        if self._bytes and all(letter in self._bytes for letter in piece):
            return bytes(self._bytes[letter] for letter in piece)
        return piece.replace("\u2581", " ").encode()


class Stream:
    """The text of an answer, whole characters at a time."""

    def __init__(
        self, texts: Texts, core: Any, hidden: set[int], prompt: Sequence[int] = ()
    ) -> None:
        self._texts, self._core, self._hidden = texts, core, hidden
        self._decoder = DecodeStream(skip_special_tokens=False)
        for token in _whole_end(prompt, core):
            self._decoder.step(core, token)
        self._held: list[int] = []

    def text(self, token: int) -> str:
        """What one more token adds; nothing while a character is not whole."""
        if token in self._hidden:
            return ""
        try:
            text = self._decoder.step(self._core, token)
        except Exception as error:  # tokenizers has no class of its own for it
            if "Invalid prefix" not in str(error):
                raise
            text = self._past_invalid_bytes(token)
        if text is None:
            self._held.append(token)
            return ""
        self._held.clear()
        return text

    def _past_invalid_bytes(self, token: int) -> str:
        """What was held and one more token, where an invalid byte stands among them.

        A tokenizer that writes characters as bytes decodes a run of them as one: an invalid one
        makes characters before it, which are given out already, signs for what is none.
        """
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._decoder.step(self._core, token)
        return self._decoded([*self._held, token])

    def _decoded(self, tokens: Sequence[int]) -> str:
        """Text of the bytes that tokens write, but for the beginning of a character at the end."""
        data = b"".join(self._texts.bytes_of(token) for token in tokens)
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data)

    def rest(self) -> str:
        """What was held back at the end of an answer, but for the beginning of a character.

        A token may end a character and begin the next, and may be the sign for what is none.
        """
        held, self._held = self._held, []
        if not str(self._core.decode(held, False)).endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # tokens that write nothing
        return self._decoded(held)


def _whole_end(prompt: Sequence[int], core: Any) -> Sequence[int]:
    """The fewest last tokens of a prompt that are whole characters; none where it ends in half."""
    for count in range(1, min(_OF_A_CHARACTER, len(prompt)) + 1):
        end = list(prompt[-count:])
        text: str = core.decode(end, False)
        if text and "\N{REPLACEMENT CHARACTER}" not in text:
            return end
    return ()
