"""Which tokens of a tokenizer are special, wherever it declares them, and which end an answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

# Stands for an answer while its place is looked for; no text holds it.
MARKER = "\u2060lighten\u2060answer\u2060"


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer.

    Attributes:
        texts: As they are written, longest first.
        ids: Their ids.
        tail: What its chat template writes after the last answer, without white space at its end.
        terminator: The id of the first special token of that tail, None without one.
    """

    texts: tuple[str, ...]
    ids: frozenset[int]
    tail: str
    terminator: int | None

    def starts(self, text: str) -> str | None:
        """The special token that a text begins with."""
        return next((token for token in self.texts if text.startswith(token)), None)


_CACHE: WeakKeyDictionary[Any, tuple[Any, SpecialTokens]] = WeakKeyDictionary()


# Of tokenizers that are `unchanged` just now, by identity.
_UNCHANGED: dict[int, SpecialTokens] = {}


@contextmanager
def unchanged(tokenizer: Any) -> Iterator[None]:
    """Until the end of the block nothing is looked up again: that takes longer than a short row."""
    before = _UNCHANGED.get(id(tokenizer))
    _UNCHANGED[id(tokenizer)] = special_tokens(tokenizer)
    try:
        yield
    finally:
        del _UNCHANGED[id(tokenizer)]
        if before is not None:
            _UNCHANGED[id(tokenizer)] = before


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """The special tokens of a tokenizer.

    Many declare the token that ends a turn among their added tokens alone (Gemma 3, Phi), so that
    `all_special_tokens` does not name it. What the template itself writes after an answer ends it
    too, where that is one added token, declared special or not.
    """
    if (tokens := _UNCHANGED.get(id(tokenizer))) is not None:
        return tokens
    state = (_size(tokenizer), tuple(tokenizer.all_special_tokens), _template(tokenizer))
    entry = _CACHE.get(tokenizer)
    if entry is None or entry[0] != state:
        entry = state, _special_tokens(tokenizer)
        _CACHE[tokenizer] = entry
    return entry[1]


def _size(tokenizer: Any) -> int:
    """How many tokens there are; a fast tokenizer knows without listing them."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    return int(core.get_vocab_size()) if core is not None else len(tokenizer)


def _template(tokenizer: Any) -> Any:
    template = tokenizer.chat_template
    return tuple(template.items()) if isinstance(template, dict) else template


def _special_tokens(tokenizer: Any) -> SpecialTokens:
    added = tokenizer.added_tokens_decoder
    texts = {str(token) for token in tokenizer.all_special_tokens}
    texts |= {token.content for token in added.values() if token.special}
    tail = _tail(tokenizer)
    terminator = next(
        (t.content for t in added.values() if tail.lstrip().startswith(t.content)), None
    )
    if terminator is not None:
        texts.add(terminator)
    texts.discard("")
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in texts}
    first = next((t for t in sorted(texts, key=len, reverse=True)
                  if tail.lstrip().startswith(t)), None)  # fmt: skip
    return SpecialTokens(
        tuple(sorted(texts, key=lambda text: (-len(text), text))),
        frozenset(number for number in ids.values() if number is not None),
        tail,
        ids[first] if first is not None else None,
    )


def _tail(tokenizer: Any) -> str:
    """What the chat template writes after the last answer; empty where it shows none."""
    if not tokenizer.chat_template:
        return ""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARKER}]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template may raise anything, and says so again where it is used
        return ""
    return text.rpartition(MARKER)[2].rstrip() if MARKER in text else ""


def visible(ids: Sequence[int], tokenizer: Any, *, hidden: Collection[int] = ()) -> str:
    """Ids as text, special tokens included but for the hidden ones."""
    visible_ids = [token for token in ids if token not in hidden]
    text: str = tokenizer.decode(
        visible_ids, skip_special_tokens=False, spaces_between_special_tokens=False
    )
    return text
