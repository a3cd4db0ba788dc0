"""What only a processor needs: C++ kernels, patched norms and gates, the arena.

One switch turns all of it off, with attention in blocks (`models/attention.py`): PyTorch's own
operations and the C library's memory then give the same results, and take longer.
"""

from __future__ import annotations

import os

from lighten.errors import UserError

SWITCH, PLAIN = "LIGHTEN_CPU", "plain"
OFF = f"{SWITCH} is {PLAIN}"


def enabled() -> bool:
    """Whether what is here is used; False: the user wants PyTorch's own operations alone.

    Raises:
        UserError: `LIGHTEN_CPU` has a value that means nothing.
    """
    value = os.environ.get(SWITCH, "")
    if value not in ("", PLAIN):
        raise UserError(
            f"{SWITCH}: {value!r} means nothing; set it to {PLAIN}, which leaves everything to "
            "PyTorch's own operations, or unset it"
        )
    return not value
