"""An engine's server as a process of its own: started, watched, started again, ended.

Whatever the engine: it listens at a Unix socket in a folder that this user alone can open, is ready
when its `/health` says so, and ends when its standard input does, so that it never outlives the
front. One that dies by itself is started again with all that it served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.serving import wire
from lighten.serving.engine import EngineFailed, EngineRefused

log = logging.getLogger(__name__)
_POLL_S = 0.05
_SOCKET = "engine.sock"
_LONGEST_SOCKET = 103  # bytes of its path on macOS; Linux takes 107
_LOG_LINES = 60
_MOST_CRASHES = 3  # one after another; after one more it is left down
_STEADY_S = 60.0  # a process that lived so long does not count with those before it


def visible_gpus() -> dict[str, str]:
    """What `LIGHTEN_DEVICE` says, as CUDA is told of it: environment variables of an engine.

    Raises:
        UserError: It names no GPU of `CUDA_VISIBLE_DEVICES`.
    """
    device, _, number = os.environ.get("LIGHTEN_DEVICE", "").strip().lower().partition(":")
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    if device != "cuda" or not number.isdecimal():
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible:
        return {"CUDA_VISIBLE_DEVICES": number}
    names = visible.split(",")
    if int(number) >= len(names):
        raise UserError(
            f"LIGHTEN_DEVICE: cuda:{number} is not there; CUDA_VISIBLE_DEVICES={visible} has "
            f"{len(names)}"
        )
    return {"CUDA_VISIBLE_DEVICES": names[int(number)]}


def _socket_folder() -> Path:
    """A folder of this user alone for a socket: where temporary files go, unless that is too deep.

    A job's own folder on a cluster may be.
    """
    rest = len("/lighten-engine-12345678/") + len(_SOCKET)
    too_deep = len(os.fsencode(tempfile.gettempdir())) + rest > _LONGEST_SOCKET
    return Path(tempfile.mkdtemp(prefix="lighten-engine-", dir="/tmp" if too_deep else None))


class ServerProcess:
    """One process.

    Args:
        name: Of the engine, for messages.
        grace_s: Seconds to end by itself before it is killed.

    Attributes:
        adapters: Keys of the adapters that it holds, in the order in which it knows them.
    """

    def __init__(self, name: str, *, grace_s: float = 5.0) -> None:
        self.name = name
        self.adapters: list[str] = []
        self._folder = _socket_folder()
        self._grace_s = grace_s
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._child: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._answering = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self._folder / _SOCKET

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._child is not None and self._child.returncode is None

    async def start(
        self, words: Sequence[str], *, environment: Mapping[str, str], first_line: str = "",
        within_s: float,
    ) -> None:  # fmt: skip
        """Start it and wait until it is ready.

        Args:
            words: The command.
            environment: Its environment variables, all of them.
            first_line: What its standard input begins with.
            within_s: Seconds that it may take.

        Raises:
            UserError: It ended, or was not ready in time; what it said last is told.
        """
        try:
            self._child = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT, env=environment,
                start_new_session=True,  # Ctrl-C is the front's: answers under way are finished
            )  # fmt: skip
            self._reading = asyncio.create_task(self._keep_log(self._child.stdout))
            assert self._child.stdin is not None
            with contextlib.suppress(ConnectionError):  # it ended already: told below
                self._child.stdin.write(first_line.encode())
                await self._child.stdin.drain()
            async with asyncio.timeout(within_s):
                await self._until_ready()
        except TimeoutError as error:
            await self.end()
            raise UserError(
                f"{self.name} was not ready after {within_s:.0f} s: {self.last_words()}"
            ) from error
        except BaseException:
            await self.end()
            raise

    async def _keep_log(self, stream: asyncio.StreamReader | None) -> None:
        """Read what it says, so that it never waits for a reader; the end is kept."""
        assert stream is not None
        rest = b""
        while part := await stream.read(2**16):
            *lines, rest = (rest + part).split(b"\n")
            self._log.extend(line.decode(errors="replace").strip() for line in lines)
            rest = rest[-(2**16) :]
        self._log.append(rest.decode(errors="replace").strip())

    async def _until_ready(self) -> None:
        while self.alive:
            with contextlib.suppress(EngineFailed):
                if (await wire.get(self.socket, "/health"))[0] == 200:
                    return
            await asyncio.sleep(_POLL_S)
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=1)
        raise UserError(f"{self.name} could not be started: {self.last_words()}")

    def last_words(self) -> str:
        """The last error that it wrote, else its last line."""
        lines = [line for line in self._log if line]
        errors = [line for line in lines if "Error" in line or "FAILED" in line]
        return (errors or lines or ["no message"])[-1][:500]

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count an answer under way; its errors are the client's or the engine's.

        Raises:
            EngineRefused: The server answered with a status of 400 to 499.
            EngineFailed: It answered with another one, or it hung up.
        """
        self._answering += 1
        self._idle.clear()
        try:
            yield
        except wire.WireError as error:
            if 400 <= error.status < 500:
                raise EngineRefused(str(error)) from error
            if error.status == 0:
                raise EngineFailed(
                    f"{self.name} ended while it answered; it is started again, try again in a few "
                    "seconds"
                ) from error
            raise EngineFailed(str(error)) from error
        finally:
            self._answering -= 1
            if not self._answering:
                self._idle.set()

    async def drained(self) -> None:
        """Wait for the last of the answers under way."""
        await self._idle.wait()

    async def ended(self) -> int:
        """Wait until the process is gone; its exit code, or minus the signal that ended it."""
        assert self._child is not None
        return await self._child.wait()

    async def end(self) -> None:
        """End it; answers under way fail."""
        child = self._child
        if child is not None and child.returncode is None:
            assert child.stdin is not None
            child.stdin.close()  # it ends by itself
            try:
                await asyncio.wait_for(child.wait(), self._grace_s)
            except TimeoutError:
                child.kill()
                await child.wait()
        if self._reading is not None:
            self._reading.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)


class Supervisor:
    """Holds the process that answers, and starts one that died by itself again.

    Args:
        name: Of the engine, for messages.
        start: Starts a process, ready, that serves all that is to be served.
        pause_s: Seconds before the first start again; each further one waits twice as long.

    Attributes:
        exchanging: Held by whoever changes the process or what it serves.
        restarts: How often one was started again.
    """

    def __init__(
        self, name: str, start: Callable[[], Awaitable[ServerProcess]], *, pause_s: float = 0.5
    ) -> None:
        self.name = name
        self.exchanging = asyncio.Lock()
        self.restarts = 0
        self._start, self._pause_s = start, pause_s
        self._current: ServerProcess | None = None
        self._obstacle: str | None = f"{name} is being started"
        self._crashes = 0
        self._given_up = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = 0

    @property
    def given_up(self) -> bool:
        """Whether it is left down: nothing but starting the server again helps."""
        return self._given_up

    @property
    def processes(self) -> int:
        """How many there are, those that finish their answers among them."""
        return self._draining + (self._current is not None)

    def obstacle(self) -> str | None:
        """Why no process takes requests now; None: one does."""
        if self._obstacle is None and (self._current is None or not self._current.alive):
            return f"{self.name} has ended and is being started again"
        return self._obstacle

    def running(self) -> ServerProcess:
        """The process that answers.

        Raises:
            EngineFailed: None does now.
        """
        obstacle = self.obstacle()
        if obstacle is not None or self._current is None:
            raise EngineFailed(obstacle or f"{self.name} has ended")
        return self._current

    async def exchange(self) -> None:
        """Start a process and answer from it; the one before ends with its last answer.

        `exchanging` has to be held.

        Raises:
            UserError: It cannot be started; the one before stays.
            EngineFailed: The same.
        """
        before, fresh = self._current, await self._start()
        self._current, self._obstacle, self._given_up = fresh, None, False
        self._keep(self._watch(fresh))
        if before is not None:
            self._keep(self._drain(before))

    async def stop(self) -> None:
        """End all processes."""
        self._obstacle = f"{self.name} is being stopped"
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        current, self._current = self._current, None
        if current is not None:
            await current.end()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self, process: ServerProcess) -> None:
        self._draining += 1
        try:
            await process.drained()
        finally:
            self._draining -= 1
            await process.end()

    async def _watch(self, process: ServerProcess) -> None:
        """Wait for the end of a process; start again, if it was the one that answers."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        code = await process.ended()
        async with self.exchanging:
            if process is not self._current:
                return
            log.error("%s ended with code %d: %s", self.name, code, process.last_words())
            self._current = None
            await process.end()
            if loop.time() - began > _STEADY_S:
                self._crashes = 0
            await self._start_again(code)

    async def _start_again(self, code: int) -> None:
        while self._crashes < _MOST_CRASHES:
            self._crashes += 1
            self._obstacle = f"{self.name} ended with code {code} and is being started again"
            await asyncio.sleep(self._pause_s * 2 ** (self._crashes - 1))
            try:
                await self.exchange()
            except (UserError, EngineFailed) as error:
                log.error("%s does not start again: %s", self.name, error)
                continue
            self.restarts += 1
            return
        self._given_up = True
        self._obstacle = (
            f"{self.name} ended again and again, with code {code}, and is left down; see the "
            "server's log, and start it again"
        )
        log.error(self._obstacle)
