"""What reading passed over in the files or took otherwise, told once."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

from lighten.data.examples import Example
from lighten.wording import counted

# As many keys of messages are told before the rest is only counted.
SHOWN_KEYS = 8


@dataclass
class ReadFindings:
    """What there is to say of files that were read.

    Attributes:
        unread_keys: Keys of messages that nothing reads, by file.
        first_unread: Where the first of them stands, by file.
        decomposed: Rows with letters that are written in parts.
        first_decomposed: The first of them.
        literal_quotes: Tables whose quotes are read as they stand.
    """

    unread_keys: dict[str, set[str]] = field(default_factory=dict)
    first_unread: dict[str, int] = field(default_factory=dict)
    decomposed: int = 0
    first_decomposed: str = ""
    literal_quotes: list[str] = field(default_factory=list)

    def add_unread(self, file: str, line: int, keys: Iterable[str]) -> None:
        """Keep that messages of a row have keys that nothing reads."""
        self.unread_keys.setdefault(file, set()).update(keys)
        self.first_unread.setdefault(file, line)

    def look_at(self, example: Example) -> None:
        """Count a row whose text would be shorter in Unicode's composed form, NFC."""
        texts = [m.content for m in example.messages] if example.messages else [example.text or ""]
        for text in texts:
            if text.isascii() or unicodedata.is_normalized("NFC", text):
                continue
            # A sign that NFC writes as another, such as the ohm's, is no letter in parts.
            if len(unicodedata.normalize("NFC", text)) < len(text):
                self.decomposed += 1
                self.first_decomposed = self.first_decomposed or example.where
                return

    def sentences(self, rows: int) -> list[str]:
        """What to tell a user; files in which the same was found are told together.

        Args:
            rows: How many were read.
        """
        sentences = [
            f"{file} is read with its quotes as they stand: one begins a cell and does not end it, "
            "and between tabs every line has as many cells as there are columns"
            for file in self.literal_quotes
        ]
        sentences += self._about_keys()
        if self.decomposed:
            sentences.append(
                f"{self.decomposed:,} of {counted(rows, 'row')} "
                f"{'writes' if self.decomposed == 1 else 'write'} letters in parts (Unicode's NFD: "
                f"Hangul as single jamo, é as e and an accent), first in {self.first_decomposed}: "
                "that takes more tokens, and the model learns to answer so; convert the "
                'files to NFC, for example by unicodedata.normalize("NFC", text)'
            )
        return sentences

    def _about_keys(self) -> list[str]:
        files_of: dict[tuple[str, ...], list[str]] = {}
        for file, unread in self.unread_keys.items():
            files_of.setdefault(tuple(sorted(unread)), []).append(file)
        sentences = []
        for keys, files in files_of.items():
            more_keys = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
            more_files = f", and so in {counted(len(files) - 1, 'other file')}" * (len(files) > 1)
            sentences.append(
                f"{files[0]}:{self.first_unread[files[0]]}: messages have keys that are not read: "
                f"{', '.join(keys[:SHOWN_KEYS])}{more_keys}{more_files}; what they say is neither "
                "shown to the model nor followed"
            )
        return sentences
