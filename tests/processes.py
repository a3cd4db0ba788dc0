"""The command line in processes of its own that need not import the libraries each time.

Importing torch, transformers, peft and lighten takes a process longer than most of what the tests
ask of it. So each process here is forked from one that has imported them and done nothing else, and
has the environment, folder and streams of the call. Tests of how a process starts and of what it
holds in memory start Python instead.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, TypeVar

import torch

from lighten import forked_jobs, job_server
from lighten.jobs import Outcome
from lighten.parallel.spawn import free_port

LIBRARIES = [
    "torch", "torch._dynamo", "torch.utils.flop_counter", "transformers", "peft", "accelerate",
    "bitsandbytes", "safetensors.torch", "sacrebleu", "jinja2", "psutil", "yaml",
    "transformers.models.llama.modeling_llama", "transformers.models.gemma.modeling_gemma",
    "transformers.integrations.bitsandbytes", "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion", "pydantic.main", "pydantic.root_model",
    "typer.main", "rich.console", "rich.table", "rich.progress", "rich.markup", "shellingham",
    "pydantic.type_adapter", "zoneinfo", "encodings.utf_8_sig",
]  # fmt: skip
# Beside a GPU nothing that computes can be forked: the libraries have asked for it while they were
# imported. Processes begin afresh there, and slowly.
_FORKS = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_FORKS.set_forkserver_preload([*LIBRARIES, "tests.imported"])
MOST_SECONDS = 900.0
# Verbs whose work is done by `lighten.jobs`.
WITH_JOBS = {"quantize", "bench", "audit", "export", "run"}
T = TypeVar("T")


class Forked:
    """A process that runs, with as much of `subprocess.Popen` as the tests need.

    Args:
        body: What it does with `words`, in the child.
        words: Its arguments.
        cwd: Its folder; None: this process's.
        stdin: All that it can read.
        environment: Added to this process's, whose number of threads it has too.
        merged: Whether what it says as errors is among what it says.
    """

    def __init__(
        self, body: Callable[..., None], words: tuple[Any, ...], *, cwd: Path | None = None,
        stdin: str = "", environment: Mapping[str, str] | None = None, merged: bool = False,
    ) -> None:  # fmt: skip
        self._folder = tempfile.TemporaryDirectory()
        paths = [Path(self._folder.name) / name for name in ("in", "out", "err")]
        paths[0].write_text(stdin, encoding="utf-8")
        self._paths = [*paths[:2], paths[1] if merged else paths[2]]
        self._merged = merged
        self._process = _FORKS.Process(
            target=_child,
            args=(body, words, str(cwd or Path.cwd()), self._paths,
                  {**os.environ, **(environment or {})}),
            daemon=True,  # it ends with the tests, whatever they think of it
        )  # fmt: skip
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, timeout: float = MOST_SECONDS) -> int:
        """Its exit code, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(
                f"still running after {timeout} s; it said: {self._output(2)[-2000:]}"
            )
        return self._process.exitcode

    def communicate(self, timeout: float = MOST_SECONDS) -> tuple[str, str]:
        """All that it said until its end, and as errors."""
        self.wait(timeout)
        return self._output(1), "" if self._merged else self._output(2)

    def _output(self, number: int) -> str:
        return self._paths[number].read_text(encoding="utf-8")


def start(
    *words: str, merged: bool = True, cwd: Path | None = None, **environment: str
) -> Forked:  # fmt: skip
    """`lighten` with these words, running."""
    return Forked(_lighten, words, merged=merged, cwd=cwd, environment=environment)


def call(
    *words: str,
    cwd: Path | None = None,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`lighten` with these words, to its end, on a wide screen; its ranks are forks, too."""
    wide = {"COLUMNS": "200", **(environment or {})}
    body = _launcher if "--processes" in words else _lighten
    process = Forked(body, words, cwd=cwd, stdin=stdin, environment=wide)
    return _completed(process, words)


def python(code: str, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python -c` with this code and these arguments, to its end."""
    return _completed(Forked(_code, (code, *words), cwd=cwd), words)


def script(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python` with this file and these arguments, to its end."""
    return _completed(Forked(_script, (str(path), *words)), words)


def in_fork(
    module: str, settings: Mapping[str, Any], *, libraries: tuple[str, ...] = (),
    memory_bytes: int | None = None, timeout_s: float | None = None, on_record: Any = None,
) -> Outcome:  # fmt: skip
    """`lighten.jobs.in_child` from a process that has the libraries already; it watches nothing."""
    del libraries, memory_bytes, timeout_s, on_record
    job = json.dumps({"module": module, "settings": dict(settings)})
    process = Forked(_job, (), stdin=job)
    out, err = process.communicate()
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    outcome = Outcome(records)
    if process.wait():
        outcome.error, outcome.is_user_error = (err.strip().splitlines() or ["?"])[-1], True
    return outcome


def start_ranks(
    body: Callable[[str, str], None], runs: Sequence[Mapping[str, Any]], file: Path
) -> list[Forked]:
    """Two ranks on processors, which make runs together.

    Args:
        body: What each does: it goes through `runs_of_rank` of its arguments.
        runs: Settings of each run.
        file: They are written there, and what rank N notes beside it.
    """
    ports: dict[int, None] = {}
    while len(ports) < len(runs):
        ports[free_port()] = None
    file.write_text(json.dumps(runs))
    return [
        Forked(
            body, (",".join(map(str, ports)), str(file)),
            environment={
                "LIGHTEN_DEVICE": "cpu", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            },
        )
        for rank in ("0", "1")
    ]  # fmt: skip


def wait_for(started: Sequence[Forked]) -> None:
    """Until all of them have ended, well."""
    for process in started:
        assert process.wait() == 0, process.communicate()


def runs_of_rank(ports: str, file: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """In a rank: each run's settings, and where it notes what it sees of it."""
    from accelerate.state import AcceleratorState

    runs = json.loads(Path(file).read_text())
    notes: list[dict[str, Any]] = []
    # A port each: the last run's may still be there.
    for port, settings in zip(ports.split(","), runs, strict=True):
        os.environ["MASTER_PORT"] = port
        notes.append({})
        yield settings, notes[-1]
        AcceleratorState._reset_state(True)
    Path(f"{file}.{os.environ['RANK']}").write_text(json.dumps(notes))


def notes_of(file: Path, run: int) -> list[dict[str, Any]]:
    """What each rank has noted of a run."""
    return [json.loads(Path(f"{file}.{rank}").read_text())[run] for rank in (0, 1)]


def _completed(process: Forked, words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate()
    return subprocess.CompletedProcess(words, process.wait(), out, err)


def _child(
    body: Callable[..., None], words: tuple[Any, ...], cwd: str, paths: list[Path],
    environment: Mapping[str, str],
) -> None:  # fmt: skip
    multiprocessing.current_process()._config["daemon"] = False  # it may have children
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.dont_write_bytecode = False  # as tests/conftest.py has it
    for number, path in enumerate(paths):
        opened = os.open(path, os.O_APPEND | os.O_RDWR | os.O_CREAT if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 -- open until the end
    if body is _lighten and words[0] in WITH_JOBS and _is_job():
        body, words = _job, ()
    try:
        body(*words)
    finally:
        atexit._run_exitfuncs()  # multiprocessing passes over them


def _is_job() -> bool:
    """Fork a server of jobs before anything is done that its jobs should not begin with.

    Returns:
        Whether this is a job's process.
    """
    # The command line sets them for its own process and its jobs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        if job_server.serve(theirs):
            return True
        os._exit(0)
    theirs.close()
    forked_jobs.adopt(ours)
    return False


class JobServers:
    """In the place of `forked_jobs.Server.started`: forked, and so there at once."""

    def __init__(self) -> None:
        self._forks: list[Forked] = []

    def started(self, libraries: tuple[str, ...]) -> forked_jobs.Server:
        """A server with the environment and folder of this moment."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._forks.append(Forked(_serve_jobs, (theirs,)))
        return forked_jobs.Server(ours, None, libraries)

    def close(self) -> None:
        """End the last one; the others have ended."""
        forked_jobs.close()
        for fork in self._forks:
            assert fork.wait() == 0


def _serve_jobs(connection: socket.socket) -> None:
    if job_server.serve(connection):
        _job()


def _lighten(*words: str) -> None:
    sys.argv = ["lighten", *words]
    runpy.run_module("lighten", run_name="__main__", alter_sys=True)


def _launcher(*words: str) -> None:
    from lighten.parallel import spawn

    ranks: Any = SimpleNamespace(Popen=_Rank, DEVNULL=subprocess.DEVNULL)
    spawn.subprocess = ranks  # type: ignore[attr-defined]
    _lighten(*words)


class _Rank:
    """`subprocess.Popen` of `python -m lighten`, forked from the process that starts it."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], stderr: IO[bytes] | None,
        preexec_fn: Callable[[], None], **_: Any,
    ) -> None:  # fmt: skip
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                preexec_fn()
                os.environ.clear()
                os.environ.update(env)
                null = os.open(os.devnull, os.O_RDWR)
                for number, stream in enumerate((null, null, stderr.fileno() if stderr else 2)):
                    os.dup2(stream, number)
                code = _exit_code(command[command.index("lighten") + 1 :])
            finally:
                sys.stderr.flush()
                os._exit(code)  # what it would tidy up is its parent's

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def _wait(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _exit_code(words: Sequence[str]) -> int:
    try:
        _lighten(*words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _job() -> None:
    from lighten import jobs

    jobs.main()


def _code(code: str, *words: str) -> None:
    sys.argv = ["-c", *words]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _script(path: str, *words: str) -> None:
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns; in a thread, for another test's browser has a loop at work here."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
