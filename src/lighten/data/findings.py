"""What chat templates did to conversations: counted, with the first row of each kind, and told."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lighten.data.examples import Example
from lighten.data.spans import RefusedError
from lighten.errors import UserError
from lighten.wording import counted

SYSTEM = ("system", "developer")
# As many refused rows of one reason are named before the rest is only counted.
SHOWN_ROWS = 10


@dataclass
class Findings:
    """What templates did to conversations; findings of several parts of a file add up.

    Attributes:
        counts: How often, by kind.
        first: The first row of each kind.
        ends: How many answers end with each special token.
        inside: Special tokens that stand inside answers.
        refused: Rows that the template refuses, by reason.
        dates: Dates that the template wrote.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    ends: Counter[int] = field(default_factory=Counter)
    inside: set[int] = field(default_factory=set)
    refused: dict[str, list[str]] = field(default_factory=dict)
    dates: set[str] = field(default_factory=set)

    def add(self, kind: str, location: str, number: int = 1) -> None:
        """Count something that befell a row."""
        if number:
            self.counts[kind] += number
            self.first.setdefault(kind, location)

    def merge(self, later: Findings) -> None:
        """Add what was found in a later part of the data."""
        self.counts += later.counts
        self.first = {**later.first, **self.first}
        self.ends += later.ends
        self.inside |= later.inside
        self.dates |= later.dates
        for reason, rows in later.refused.items():
            self.refused.setdefault(reason, []).extend(rows)

    @property
    def refused_rows(self) -> int:
        """How many rows the template refuses."""
        return sum(map(len, self.refused.values()))

    def refuse(self, error: RefusedError, example: Example) -> None:
        """Remember a row that the template refuses."""
        reason = error.reason
        if any(message.role in SYSTEM for message in example.messages):
            reason += " (system_role: fold puts system messages into user turns, drop leaves them)"
        self.refused.setdefault(reason, []).append(example.where)

    def require_none_refused(self) -> None:
        """Raise if the template refused a row.

        Raises:
            UserError: Every such row, by reason.
        """
        if self.refused:
            sentences = "\n".join(self.refusals())
            raise UserError(f"{sentences}\nfix these rows, or go on without them: --skip-bad-rows")

    def refusals(self) -> list[str]:
        """A sentence per reason, with its rows."""
        sentences = []
        for reason, rows in self.refused.items():
            file = rows[0].rpartition(":")[0]
            other_rows = [
                row.rpartition(":")[2] if row.startswith(f"{file}:") else row for row in rows[1:]
            ]
            continuation = ""
            if other_rows:
                unlisted = len(other_rows) - SHOWN_ROWS
                continuation = f"; and {len(other_rows)} more row{'s' * (len(other_rows) > 1)}: "
                continuation += ", ".join(other_rows[:SHOWN_ROWS])
                continuation += f" and {counted(unlisted, 'other')}" if unlisted > 0 else ""
            sentences.append(f"{rows[0]}: {reason}{continuation}")
        return sentences

    def sentences(self) -> list[str]:
        """What to tell a user, a sentence per kind."""
        sentences = [
            template.format(
                n=self.counts[kind], of=self.counts[total], first=self.first[kind],
                tokens=self.counts["tokens moved"], dates=", ".join(sorted(self.dates)),
            )
            for kind, (total, template) in _SENTENCES.items()
            if self.counts[kind]
        ]  # fmt: skip
        for kind, number in self.counts.items():
            if kind.startswith("left out "):
                role = kind.removeprefix("left out ")
                sentences.append(
                    f"the chat template leaves out {number} {role} "
                    f"message{'s' * (number != 1)}, first in {self.first[kind]}"
                )
        return sentences


_SENTENCES = {
    "thoughts cut": (
        "thoughts",
        "the chat template removes {n} of {of} thoughts from the answers to learn, first in "
        "{first}: what is left is learnt without them; set thinking to keep to learn them, or to "
        "drop if that is meant",
    ),
    "thoughts kept": (
        "thoughts",
        "{n} of {of} thoughts that the chat template removes are written back into their answers "
        "(thinking: keep)",
    ),
    "thoughts lost": (
        "thoughts",
        "{n} of {of} thoughts cannot be written back (the chat template rewrites their answers), "
        "first in {first}; use another chat_template",
    ),
    "thoughts dropped": (
        "thoughts",
        "{n} of {of} thoughts are removed from the answers (thinking: drop)",
    ),
    "answers changed": (
        "answers",
        "the chat template changes or shortens {n} of {of} answers, first in {first}: they are "
        "learnt as it writes them",
    ),
    "system folded": (
        "system",
        "the chat template takes no system message: {n} of {of} are put at the beginning of the "
        "next user turn (system_role: fold says so, drop leaves them out, keep refuses them)",
    ),
    "system fold": (
        "system", "{n} system messages are put into user turns (system_role: fold)",
    ),
    "system drop": ("system", "{n} system messages are left out (system_role: drop)"),
    "system moved": (
        "system",
        "the chat template moves {n} of {of} system messages behind earlier turns, first in "
        "{first}",
    ),
    "answers moved": (
        "answers",
        "the chat template writes what stands before {n} of {of} answers otherwise than when they "
        "are asked for (it moves a system message or tools to the last user turn), first in "
        "{first}: their {tokens} tokens are not learnt",
    ),
    "tools left out": (
        "conversations",
        "the chat template leaves out the tool descriptions of {n} of {of} conversations, first "
        "in {first}",
    ),
    "calls left out": (
        "answers",
        "the chat template leaves out {n} calls of tools, first in {first}: they are not learnt",
    ),
    "texts endless": (
        "texts endless",
        "the tokenizer has no eos_token: {n} texts are learnt without an end, so the model cannot "
        "learn to stop",
    ),
    "dated": (
        "conversations",
        "the chat template writes today's date ({dates}) into {n} of {of} conversations: trained "
        "on another day they differ",
    ),
}  # fmt: skip
