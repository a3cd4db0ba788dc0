"""What reading passed over in the files, told once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lighten.wording import counted

# As many keys of messages are told before the rest is only counted.
SHOWN_KEYS = 8


@dataclass
class ReadFindings:
    """What there is to say of files that were read.

    Attributes:
        unread_keys: Keys of messages that nothing reads, by file.
        first_unread: Where the first of them stands, by file.
    """

    unread_keys: dict[str, set[str]] = field(default_factory=dict)
    first_unread: dict[str, int] = field(default_factory=dict)

    def add_unread(self, file: str, line: int, keys: Iterable[str]) -> None:
        """Keep that messages of a row have keys that nothing reads."""
        self.unread_keys.setdefault(file, set()).update(keys)
        self.first_unread.setdefault(file, line)

    def sentences(self) -> list[str]:
        """What to tell a user; files in which the same was found are told together."""
        return self._about_keys()

    def _about_keys(self) -> list[str]:
        files_of: dict[tuple[str, ...], list[str]] = {}
        for file, keys in self.unread_keys.items():
            files_of.setdefault(tuple(sorted(keys)), []).append(file)
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
