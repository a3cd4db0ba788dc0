"""What reaches the console: in any encoding, with bars in a terminal alone, in our own lines.

Libraries draw bars and log to standard error by themselves. Theirs are taken over: progress goes to
whoever listens, and what no user of a command can act on is not shown.
"""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

T = TypeVar("T")
# Told what is under way, how far it is, and of how much.
Listener = Callable[[str, int, int], None]

# The name under which the marks below stand in for those that an encoding lacks.
PLAIN = "lighten.plain"
_PLAIN = {
    "–": "-", "—": "-", "−": "-", "×": "x", "·": "*", "±": "+", "…": ".", "→": ">", "▶": ">",
    "█": "#", "▉": "#", "━": "-", "╸": "-", "╺": "-", "─": "-", "│": "|", "•": "*", "⟦": "[",
    "⟧": "]", "“": '"', "”": '"', "‘": "'", "’": "'", "\N{NO-BREAK SPACE}": " ",
}  # fmt: skip
# Loggers of libraries that warn about this machine or themselves when they are imported.
_LOGGERS = ("bitsandbytes", "torchao", "torch.utils._pytree")
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """The codec's question what to write instead: a like mark, as wide as the one it stands for."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(map(_instead, lacking)), error.end


def _instead(mark: str) -> str:
    if mark in _PLAIN:
        return _PLAIN[mark]
    if unicodedata.combining(mark):
        return ""
    if "\u2800" <= mark <= "\u28ff":  # what rich's spinners are drawn with
        return "*"
    return "??" if unicodedata.east_asian_width(mark) in "WF" else "?"


codecs.register_error(PLAIN, _plain)


class _Outlet(io.FileIO):
    """An open descriptor whose reader may leave: what is written from then on goes nowhere.

    `lighten train … 2>&1 | head`, a pager that is left, a terminal that is gone: nobody reads any
    more, and no training is lost for that.
    """

    def write(self, data: Any) -> int:
        """Write, or pass over what nobody can read."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for libraries and child processes, too
            os.close(nowhere)
            return memoryview(data).nbytes


def prepare() -> None:
    """Let standard output and error take any text, whatever the console's encoding, at any time."""
    if os.environ.get("COLUMNS") == "0":  # it does not know how wide it is: nothing would be shown
        del os.environ["COLUMNS"]
    for name in ("stdout", "stderr"):
        with suppress(AttributeError, ValueError, OSError):  # none, closed, or somebody's own
            stream = _lasting(getattr(sys, name))
            stream.reconfigure(errors=PLAIN)
            setattr(sys, name, stream)


def _lasting(stream: Any) -> Any:
    """The stream over an outlet, where it is one of Python's own."""
    plain = isinstance(stream.buffer, io.FileIO)  # python -u
    raw = stream.buffer if plain else getattr(stream.buffer, "raw", None)
    if type(stream) is not io.TextIOWrapper or not isinstance(raw, io.FileIO):
        return stream
    stream.flush()
    outlet = _Outlet(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        outlet if plain else io.BufferedWriter(outlet),
        encoding=stream.encoding, errors=stream.errors, newline=None if os.name == "nt" else "\n",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


def encodable(text: str, stream: TextIO) -> str:
    """The text with other marks where the stream's encoding lacks them."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, PLAIN).decode(encoding)


def takes_any_text(stream: TextIO) -> bool:
    """Whether nothing is lost of a text that is written to the stream."""
    with suppress(LookupError):
        name = codecs.lookup(getattr(stream, "encoding", None) or "ascii").name
        return name.startswith("utf")
    return False


def quieten_libraries() -> None:
    """Of libraries, only errors are heard; a user's own settings for them stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """Who hears of the progress of libraries meanwhile; None: nobody."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


@contextmanager
def library_bars() -> Iterator[None]:
    """Bars of transformers go to the listener; none of its own is drawn."""
    from transformers.utils import logging as transformers_logging

    listener = _listener.get()
    before = transformers_logging.set_tqdm_hook(
        lambda _factory, args, kwargs: LibraryBar(listener, *args, **kwargs)
    )
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


def counted(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Go through items while whoever hears of libraries is told how far it is.

    Args:
        items: What is gone through.
        what: What is done, in words: `converting model.gguf`.
        total: How many there are, or a few more.
    """
    with LibraryBar(_listener.get(), total=total) as bar:
        bar.desc = what
        for item in items:
            yield item
            bar.update()


@contextmanager
def under_way(what: str) -> Iterator[None]:
    """Whoever hears of libraries is told what begins and ends; nothing says how far it is."""
    with LibraryBar(_listener.get(), total=1) as bar:
        bar.desc = what
        bar.begin()
        yield


def download_bar(what: str) -> Any:
    """A bar's class for `snapshot_download` that tells the listener of the bytes and draws nothing.

    Args:
        what: What is under way, in words.

    Returns:
        A subclass of tqdm; None where nobody listens: the hub draws its own then.
    """
    listener = _listener.get()
    if listener is None:
        return None
    tell: Listener = listener  # the hub's threads would not see who listens
    from tqdm.std import tqdm  # type: ignore[import-untyped]  # its stubs are a package apart

    class Heard(tqdm):
        def __init__(self, *values: Any, **options: Any) -> None:
            # Of several bars one counts the bytes that are on disk, of files seen so far.
            self._counts = "incomplete total" in str(options.get("desc"))
            super().__init__(*values, **{**options, "disable": False, "file": io.StringIO()})

        def display(self, *_drawn: Any, **_how: Any) -> None:
            if self._counts and self.total:
                tell(what, int(self.n), int(self.total))

    return Heard


class LibraryBar:
    """Stands for a library's tqdm bar and tells the listener how far it is.

    Args:
        listener: Who is told, if anybody.
        iterable: What is gone through, as tqdm takes it.
        options: tqdm's; `desc` and `total` are looked at.
    """

    def __init__(self, listener: Listener | None, iterable: Any = None, **options: Any) -> None:
        self._listener, self._iterable = listener, iterable
        self.desc = str(options.get("desc") or "loading").strip().rstrip(".:").lower()
        length = len(iterable) if hasattr(iterable, "__len__") else 0
        self.total, self.n = int(options.get("total") or length), 0

    def __iter__(self) -> Iterator[Any]:
        for each in self._iterable:
            yield each
            self.update()

    def __enter__(self) -> LibraryBar:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def begin(self) -> None:
        """Tell of it before anything is done."""
        if self._listener is not None:
            self._listener(self.desc, self.n, self.total)

    def update(self, count: float = 1) -> None:
        """So much more is done."""
        before, self.n = self.n, min(self.n + int(count), self.total or sys.maxsize)
        # A model has thousands of weights; a hundred redraws are enough.
        step = max(1, self.total // 100)
        if self._listener is not None and (self.n // step > before // step or self.n == self.total):
            self._listener(self.desc, self.n, self.total)

    def set_description(self, desc: str | None = None, **_options: Any) -> None:
        """What is under way has another name from now on; a bar of ours keeps its first."""

    def set_postfix(self, *_values: Any, **_options: Any) -> None:
        """Figures beside the bar, which are not shown."""

    def close(self) -> None:
        """It has ended, also where not all was needed."""
        if self._listener is not None and self.total and self.n < self.total:
            self._listener(self.desc, self.total, self.total)
