"""Texts that end an answer: found across pieces, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Lets the text of one answer through up to the first of some texts.

    Args:
        stops: The texts; empty ones are not allowed.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.stopped = False

    def take(self, text: str) -> str:
        """What may be shown now; sets `stopped` where the answer ends."""
        if not self._stops:
            return text
        self._pending += text
        places = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if places:
            self.stopped = True
            shown, self._pending = self._pending[: min(places)], ""
            return shown
        keep = max(self._partial_length(stop) for stop in self._stops)
        shown = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(shown) :]
        return shown

    def rest(self) -> str:
        """What was held back, at the end of an answer that no text ended."""
        pending, self._pending = self._pending, ""
        return pending

    def _partial_length(self, stop: str) -> int:
        """Characters at the end of what is held that may be the beginning of a stop."""
        longest = min(len(stop) - 1, len(self._pending))
        return next((n for n in range(longest, 0, -1) if self._pending.endswith(stop[:n])), 0)
