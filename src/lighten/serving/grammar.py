"""Answers that follow a JSON schema: which tokens may come next, by llguidance.

A schema becomes a grammar of bytes, and the grammar a mask over the vocabulary for each token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lighten.errors import UserError


class Grammar:
    """One answer's place in its grammar.

    Args:
        matcher: llguidance's, at its beginning.
        stops: Tokens that end an answer; allowed where the JSON is whole.
        field: Of the request that it comes from.
    """

    def __init__(self, matcher: Any, stops: frozenset[int], field: str) -> None:
        self._matcher, self._stops, self._field = matcher, stops, field

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""
        return bool(self._matcher.is_stopped())

    def restrict(self, logits: Tensor) -> None:
        """Set the logits of all tokens that may not come next to -inf, in place: [V]."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._require_no_error()
        allowed = np.unpackbits(mask, bitorder="little", count=len(logits)).astype(bool)
        allowed[[token for token in self._stops if token < len(allowed)]] = (
            self._matcher.is_accepting()
        )
        logits.masked_fill_(torch.from_numpy(~allowed), float("-inf"))

    def take(self, token: int) -> None:
        """Go on by the token that was chosen."""
        if token not in self._stops:
            self._matcher.consume_token(token)
            self._require_no_error()

    def _require_no_error(self) -> None:
        if self._matcher.is_error():
            # Its first line; what follows is the state of llguidance's parser.
            reason = self._matcher.get_error().partition("\n")[0][:300]
            raise UserError(
                f"{self._field}: this JSON schema cannot be followed any further ({reason}); "
                "make it simpler"
            )


class Grammars:
    """Grammars over one vocabulary.

    Args:
        tokenizer: Of the base, with its Rust core.
        vocabulary: Logits of a token.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._words: Any = None

    def of(self, text: str, stops: frozenset[int], field: str) -> Grammar:
        """A grammar at its beginning; takes milliseconds, and a second for the first one.

        Args:
            text: As `schemas.grammar_of` gives it.
            stops: Tokens that end an answer.
            field: Of the request that it comes from.

        Raises:
            UserError: It cannot be followed.
        """
        import llguidance.hf

        if self._words is None:
            self._words = llguidance.hf.from_tokenizer(self._tokenizer, self._vocabulary)
        matcher = llguidance.LLMatcher(self._words, text, log_level=0)
        if matcher.is_error():
            raise UserError(
                f"{field}: this JSON schema cannot be followed: {matcher.get_error()[:300]}"
            )
        return Grammar(matcher, stops, field)
