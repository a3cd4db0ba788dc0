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
        self._held = ""
        self.stopped = False

    def take(self, text: str) -> str:
        """What may be shown now; sets `stopped` where the answer ends."""
        if not self._stops:
            return text
        self._held += text
        places = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max(self._begun(stop) for stop in self._stops)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def rest(self) -> str:
        """What was held back, at the end of an answer that no text ended."""
        held, self._held = self._held, ""
        return held

    def _begun(self, stop: str) -> int:
        """Characters at the end of what is held that may be the beginning of a stop."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
