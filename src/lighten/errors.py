"""The errors a user can mend: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import importlib.util


class UserError(ValueError):
    """A mistake in what the user gave: shown as one sentence, without a traceback."""


class DiskFull(UserError):
    """A file could not be written for want of space; an older one is intact."""


class MissingExtra(UserError):
    """An optional dependency is not installed."""


class NoHeldOut(UserError):
    """There are no held-out examples to measure on."""


def missing_extra(package: str, extra: str) -> MissingExtra:
    """Say which package is missing and the command that installs it.

    Args:
        package: The import's package name, as a user would search for it.
        extra: The extra of `lighten` that brings it.
    """
    return MissingExtra(
        f"{package} is not installed; install it with: pip install 'lighten[{extra}]'"
    )


def require_package(module: str, extra: str) -> None:
    """A package is installed; it is not imported.

    Args:
        module: As it is imported.
        extra: The extra of `lighten` that brings it.

    Raises:
        MissingExtra: It is not.
    """
    if importlib.util.find_spec(module) is None:
        raise missing_extra(module.replace("_", "-"), extra)
