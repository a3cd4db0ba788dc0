"""What a person sees while a run trains: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
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

from lighten.streams import heard_by

# A log that is not a terminal gets a line this often.
LOG_EVERY_S = 15.0
# What takes less than this is not worth a line or a bar.
NEWS_S = 2.0
REDRAWN_S = 0.1


@dataclass
class _Encoding:
    """How far the data are encoded.

    Attributes:
        began_s: When it began.
        line_s: When there was a line last, as if.
        line_at: At how many examples.
        lines: How many lines there were.
        done: Examples so far.
        task: The bar.
    """

    began_s: float
    line_s: float
    line_at: int = 0
    lines: int = 0
    done: int = 0
    task: TaskID | None = None


class TrainingProgress:
    """Step, loss, real tokens per second, memory and time left.

    While it is open it hears of libraries: what is fetched, converted and loaded.

    Args:
        enabled: False prints nothing at all.
        console: Where to print; standard error by default, so that output can be piped.
    """

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, quiet=not enabled, emoji=False)
        # A terminal that cannot move its cursor is read as a log.
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._live),
        )
        self._task: TaskID | None = None
        self._encoding: _Encoding | None = None
        self._hears = ExitStack()
        self._loading: dict[str, tuple[float, TaskID | None]] = {}
        self._total, self._last_line_s, self._began_s, self._began_at = 0, 0.0, 0.0, 0

    def __enter__(self) -> Self:
        self._bar.start()
        self._hears.enter_context(heard_by(self.loading))
        return self

    def __exit__(self, *_: object) -> None:
        self._hears.close()
        self._bar.stop()

    def note(self, text: str) -> None:
        """One line of news above the bar."""
        # What is piped or kept is wrapped by whoever shows it.
        self._console.print(escape(text), highlight=False, soft_wrap=not self._live)

    def encoding(self, done: int, total: int) -> None:
        """Show how many examples of the data are encoded."""
        now = time.monotonic()
        # The held-out examples are counted anew behind those of the training.
        if self._encoding is None or done < self._encoding.done:
            self._encoding = _Encoding(began_s=now, line_s=now - LOG_EVERY_S + NEWS_S)
        state = self._encoding
        state.done = done
        if not self._live:
            lines_due = now - state.line_s >= LOG_EVERY_S or (done == total and state.lines)
            if lines_due and state.line_at != done:
                state.line_s, state.line_at, state.lines = now, done, state.lines + 1
                left_s = (now - state.began_s) / max(1, done) * (total - done)
                remaining = f", {left_s:.0f} s left" if done < total else ""
                self._console.print(
                    f"encoding: {done:,} of {total:,} examples{remaining}", highlight=False
                )
        elif state.task is not None:
            if now - state.line_s > REDRAWN_S:
                self._bar.update(state.task, completed=done)
                state.line_s = now
        elif now - state.began_s > NEWS_S / 4 and done < total:
            state.task = self._bar.add_task("encoding", total=total, completed=done, facts="")
        if done == total and state.task is not None:
            self._bar.remove_task(state.task)
            state.task = None

    def loading(self, name: str, done: int, total: int) -> None:
        """Show how far a library is, in a terminal: how many weights of the base are loaded."""
        now = time.monotonic()
        began_s, task = self._loading.setdefault(name, (now, None))
        if task is None and self._live and now - began_s > NEWS_S / 4 and done < total:
            task = self._bar.add_task(name, total=total, facts="")
            self._loading[name] = (began_s, task)
        if task is not None:
            self._bar.update(task, completed=done, total=total)
        if done >= total:
            del self._loading[name]
            if task is not None:
                self._bar.remove_task(task)

    def begin(self, total_steps: int, done: int = 0) -> None:
        """Show the bar of a run of so many steps, of which some are done already."""
        self._total, self._began_s, self._began_at = total_steps, time.monotonic(), done
        self._task = self._bar.add_task("training", total=total_steps, completed=done, facts="")

    def end_at(self, total_steps: int) -> None:
        """The run that has begun ends after so many steps."""
        self._total = total_steps
        if self._task is not None:
            self._bar.update(self._task, total=total_steps)

    def step(self, step: int, loss: float, tokens_per_s: float, peak_bytes: int) -> None:
        """Show a step: its loss, speed and the peak memory so far."""
        facts = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s  {peak_bytes / 2**30:.2f} GiB"
        if self._task is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        if self._live:
            return
        now = time.monotonic()
        if now - self._last_line_s >= LOG_EVERY_S or step == self._total:
            self._last_line_s = now
            left_s = (now - self._began_s) / max(1, step - self._began_at) * (self._total - step)
            self._console.print(
                f"step {step}/{self._total}  {facts}  {left_s / 60:.1f} min left",
                highlight=False,
                soft_wrap=True,
            )
