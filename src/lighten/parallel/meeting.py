"""Where ranks meet: a store of keys, in which each meeting has a name that no other one had.

torchrun's agents keep one store for all times that they start ranks (PyTorch 2.13), in which gloo
would find ranks that have ended; and each agent counts the starts for itself, so that a count is
not the same on all machines. So every rank draws a ticket, the first one calls those that it sees,
and once all of them have answered the same call their meeting is named after it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from lighten.errors import UserError
from lighten.parallel.launch import Launch
from lighten.wording import first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# While the first rank plans, encodes or saves, the others wait for it: as long as gloo waits by
# itself. NCCL would give up after ten minutes, in the midst of a large model's checkpoint.
PATIENCE = timedelta(minutes=30)
# Before they meet, the first one may read and encode all rows; that it is there can be seen.
ENCODING_PATIENCE = timedelta(hours=24)
_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5


@contextmanager
def opened(launch: Launch) -> Iterator[None]:
    """Inside, other ranks see that the first one is there before it comes to their meeting.

    Raises:
        UserError: The port where they meet is another program's.
    """
    alone = launch.world_size == 1 or not launch.main or _of_agent()
    store = None if alone else _connected(launch)
    try:
        yield
    finally:
        del store


def meet(launch: Launch) -> Store:
    """Wait for the other ranks; a store that they alone have.

    Raises:
        UserError: Not all have come, or the port where they meet is another program's.
        RuntimeError: The first one has ended.
    """
    from torch._C._distributed_c10d import PrefixStore  # not of every build

    store = _connected(launch)
    of_meetings = PrefixStore("lighten", store)
    ticket = secrets.token_hex(8)
    of_meetings.set(f"ticket {launch.rank}", ticket)
    name = _call(of_meetings, launch) if launch.main else _answer(of_meetings, launch, ticket)
    return PrefixStore(name, store)


def _connected(launch: Launch) -> Store:
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed import DistNetworkError

    host = os.environ.get("MASTER_ADDR") or "127.0.0.1"
    port = int(os.environ.get("MASTER_PORT") or 29500)
    try:
        return TCPStore(
            host, port, is_master=launch.main and not _of_agent(), timeout=PATIENCE,
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} of this machine, where rank {launch.rank} waits for the others, is "
                "another program's; start again"
                + ("" if launch.launcher == "lighten" else " with MASTER_PORT set to another one")
            ) from error
        if not launch.main:
            raise
        raise UserError(
            f"rank 0 cannot wait for the others at {host}, port {port}: {first_line(error)}"
        ) from error


def _of_agent() -> bool:
    """Whether the store is torchrun's, and there before the ranks and after them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _call(store: Store, launch: Launch) -> str:
    """Call the ranks by their tickets until all have answered; one that has ended never does."""
    tickets = [f"ticket {rank}" for rank in range(launch.world_size)]
    answers = [f"answer {rank}" for rank in range(1, launch.world_size)]
    call = None
    for _ in _until(PATIENCE):
        seen = b",".join(store.multi_get(tickets)).decode() if store.check(tickets) else None
        if seen is not None and seen != call:
            call = seen
            store.set("call", call)
        if call is not None and store.check(answers):
            name = _name_of(call)
            if {answer.decode() for answer in store.multi_get(answers)} == {name}:
                store.set("met", name)
                return name
    here = [rank for rank, key in enumerate(tickets) if store.check([key])]
    raise UserError(
        f"of {launch.world_size} ranks these have come to the meeting within "
        f"{_described(PATIENCE)}: {here}; the others may have ended, or still load"
    )


def _answer(store: Store, launch: Launch, ticket: str) -> str:
    """Answer each call that holds this rank's ticket until the meeting is that of one of them."""
    answered = None
    for _ in _until(ENCODING_PATIENCE):
        call = store.get("call").decode() if store.check(["call"]) else ""
        if call.split(",")[launch.rank : launch.rank + 1] != [ticket]:
            continue  # of ranks before
        if (name := _name_of(call)) != answered:
            answered = name
            store.set(f"answer {launch.rank}", name)
        if store.check(["met"]) and store.get("met").decode() == name:
            return name
    raise UserError(
        f"rank 0 has not come to the meeting within {_described(ENCODING_PATIENCE)}, in which it "
        "plans and encodes the data; it may still do so"
    )


def _until(patience: timedelta) -> Iterator[None]:
    until, pause = time.monotonic() + patience.total_seconds(), _PAUSE_S
    while time.monotonic() < until:
        yield
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE_S, 1.2 * pause)


def _name_of(call: str) -> str:
    return hashlib.sha256(call.encode()).hexdigest()


def _described(patience: timedelta) -> str:
    minutes = patience.total_seconds() / 60
    return f"{minutes:g} minutes" if minutes < 120 else f"{minutes / 60:g} hours"
