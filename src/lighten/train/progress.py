"""What a person sees while a run trains: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

# A log that is not a terminal gets a line this often.
LOG_EVERY_S = 15.0


class TrainingProgress:
    """Step, loss, real tokens per second, memory and time left.

    Args:
        enabled: False prints nothing at all.
        console: Where to print; standard error by default, so that output can be piped.
    """

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, quiet=not enabled)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task: TaskID | None = None
        self._total, self._last_line_s, self._began_s, self._began_at = 0, 0.0, 0.0, 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """One line of news above the bar."""
        self._console.print(escape(text), highlight=False)

    def begin(self, total_steps: int, done: int = 0) -> None:
        """Show the bar of a run of so many steps, of which some are done already."""
        self._total, self._began_s, self._began_at = total_steps, time.monotonic(), done
        self._task = self._bar.add_task("training", total=total_steps, completed=done, facts="")

    def step(self, step: int, loss: float, tokens_per_s: float, peak_bytes: int) -> None:
        """Show a step: its loss, speed and the peak memory so far."""
        facts = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s  {peak_bytes / 2**30:.2f} GiB"
        if self._task is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        if self._console.is_terminal:
            return
        now = time.monotonic()
        if now - self._last_line_s >= LOG_EVERY_S or step == self._total:
            self._last_line_s = now
            left_s = (now - self._began_s) / max(1, step - self._began_at) * (self._total - step)
            self._console.print(
                f"step {step}/{self._total}  {facts}  {left_s / 60:.1f} min left", highlight=False
            )
