"""Which slot an answer is made in, and what slots hold of prompts that another begins like.

Whole blocks of a prompt alone are taken over, whose numbers are the same wherever they are
computed: an answer does not depend on what a cache held.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lighten.generation.attention import SlotCache


@dataclass
class _Slot:
    """Keys and values of the first tokens of a prompt under an adapter."""

    prompt: tuple[int, ...] = ()
    held: int = 0
    adapter: Any = None
    released: int = 0  # the larger, the later


class Slots:
    """The slots of a cache.

    Args:
        cache: Theirs.
        block: Tokens that are taken over whole or not at all.
        reuse: Whether prompts that begin alike start from what a slot holds.

    Attributes:
        free: Those that no answer is made in.
    """

    def __init__(self, cache: SlotCache, block: int, *, reuse: bool) -> None:
        self.free = set(range(cache.slots))
        self._cache, self._block, self._reuse = cache, block, reuse
        self._slots = [_Slot() for _ in range(cache.slots)]
        self._times = itertools.count(1)

    def take(self, prompt: Sequence[int], adapter: Any, *, empty: bool = False) -> tuple[int, int]:
        """A free slot for an answer, and how many of its prompt's tokens it holds; never the last.

        What an answer under way has read of the same beginning is copied. What else slots hold is
        kept as long as there are empty ones, then overwritten where it was used longest ago.

        Args:
            prompt: Its tokens.
            adapter: That reads it.
            empty: Whether it is read whole, whatever slots hold.
        """
        shared = [0 if empty else self._shared(prompt, adapter, slot) for slot in self._slots]
        most = max(shared)
        oldest = min(self.free, key=lambda free: (
            self._slots[free].held and self._slots[free].released, free
        ))  # fmt: skip
        # One that goes on where the prompt it was read for ended loses nothing.
        whole = [
            free for free in self.free if most and self._slots[free].held == most == shared[free]
        ]
        place = whole[0] if whole else oldest
        if shared[place] < most:
            self._cache.copy(shared.index(most), place, 0, most)
        self.free.remove(place)
        self._slots[place] = _Slot(tuple(prompt), most, adapter)
        return place, most

    def alike(self, place: int, other: int) -> int:
        """Tokens that two slots' prompts begin with alike under one adapter, read or not."""
        slot, reader = self._slots[place], self._slots[other]
        if not self._reuse or slot.adapter is not reader.adapter:
            return 0
        return self._alike(slot.prompt, reader.prompt, len(reader.prompt))

    def catch_up(self, place: int) -> int:
        """Copy what another slot holds more of a slot's prompt; how much it holds then."""
        slot = self._slots[place]
        shared = [self._shared(slot.prompt, slot.adapter, other) for other in self._slots]
        if (most := max(shared)) > slot.held:
            self._cache.copy(shared.index(most), place, slot.held, most)
            slot.held = most
        return slot.held

    def computed(self, place: int, tokens: int) -> None:
        """A slot holds so many tokens of its answer, the prompt's first."""
        if self._reuse:
            slot = self._slots[place]
            slot.held = self._whole(min(tokens, len(slot.prompt)))

    def give_back(self, place: int, *, broken: bool = False) -> None:
        """No answer is made in a slot any more; what a broken step left in it is of no use."""
        self._slots[place].released = next(self._times)
        self.free.add(place)
        if broken:
            self._slots[place] = _Slot()

    def forget(self, adapter: Any) -> None:
        """Forget what slots hold under an adapter that no answer takes."""
        self._slots = [_Slot() if slot.adapter is adapter else slot for slot in self._slots]

    def _shared(self, prompt: Sequence[int], adapter: Any, slot: _Slot) -> int:
        """Tokens of a prompt whose keys and values a slot holds."""
        if slot.adapter is not adapter:
            return 0
        return self._alike(prompt, slot.prompt, slot.held)

    def _alike(self, prompt: Sequence[int], other: tuple[int, ...], most: int) -> int:
        """Tokens of whole blocks that a prompt, its last token apart, begins with as another."""
        most = min(self._whole(most), self._whole(len(prompt) - 1))
        alike = 0
        while alike < most:
            end = alike + self._block
            if tuple(prompt[alike:end]) != other[alike:end]:
                break
            alike = end
        return alike

    def _whole(self, tokens: int) -> int:
        return tokens - tokens % self._block
