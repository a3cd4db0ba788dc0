"""Why something that may be on the hub cannot be had, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lighten.errors import UserError
from lighten.wording import first_line


@contextmanager
def explained(missing: str, nothing: str) -> Iterator[None]:
    """Fetch something of the hub's inside.

    Args:
        missing: The sentence that it is not there.
        nothing: What the hub has instead, where it does not know the name: `no data set a/b`.

    Raises:
        UserError: It is no hub id, the hub has nothing of that name, or it cannot be reached.
    """
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise UserError(missing) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{missing}, and the hub has {nothing}, or it is private (set HF_TOKEN)"
        ) from error
    except OSError as error:
        raise UserError(
            f"{missing}, and the hub cannot be reached ({first_line(error)})"
        ) from error
