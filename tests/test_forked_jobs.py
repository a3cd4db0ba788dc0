"""A job's process that is forked from one with the libraries begins, measures and ends as a fresh
one does.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lighten import forked_jobs
from lighten.jobs import MODELS, Outcome, in_child
from lighten.machine import gpu_support

MIB = 2**20
JOB = "tests.job_known"
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="jobs are forked on Linux"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="jobs are not forked beside a GPU"),
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])


@pytest.fixture(scope="module", autouse=True)
def no_server_is_left() -> Iterator[None]:
    yield
    forked_jobs.close()


def test_whether_jobs_are_forked_is_known_without_pytorch() -> None:
    if gpu_support.has_driver():
        pytest.skip("this machine has a GPU, which PyTorch is asked about")
    code = "import sys, lighten.forked_jobs as f; print(f.possible(), 'torch' in sys.modules)"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed.split() == [str(forked_jobs.possible()), "False"]


def forked(libraries: tuple[str, ...] = ("numpy",), **settings: Any) -> Outcome:
    outcome = in_child(JOB, settings, libraries=libraries)
    assert server_pid() == outcome.records[0]["parent"]
    return outcome


def fresh(**settings: Any) -> Outcome:
    outcome = in_child(JOB, settings)
    assert outcome.records[0]["parent"] == os.getpid()
    return outcome


def is_there(pid: int) -> bool:
    """Whether a process runs; what nobody has taken the exit code of does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ends(pid: int) -> bool:
    """Whether it comes to its end."""
    until = time.monotonic() + 10
    while is_there(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_there(pid)


def server_pid() -> int:
    assert forked_jobs._server is not None
    assert forked_jobs._server._process is not None
    return forked_jobs._server._process.pid


def test_it_holds_what_a_fresh_one_holds_that_has_the_same_libraries() -> None:
    """And what it then takes is measured to 1 %, whatever this process holds."""
    block = torch.ones(300 * MIB, dtype=torch.uint8)
    settings = {"mib": 200, "modules": list(MODELS)}
    ours, theirs = (
        outcome.records[0] for outcome in (forked(MODELS, **settings), fresh(**settings))
    )
    del block
    for what in ("held", "most"):
        assert ours[what] == pytest.approx(theirs[what], abs=4 * MIB), what
    assert ours["peak_bytes"] == pytest.approx(200 * MIB, rel=0.01)
    assert ours["threads"] == theirs["threads"]


def test_it_begins_as_a_fresh_one() -> None:
    ours, theirs = (outcome.records[0] for outcome in (forked(), fresh()))
    for what in ("environment", "folder", "first_path", "nice", "sacrifice", "interrupt", "limits",
                 "name", "open"):  # fmt: skip
        assert ours[what] == theirs[what], what


@pytest.mark.parametrize("ends", ["well", "mistake", "error", "exit", "killed"])
def test_it_ends_as_a_fresh_one(ends: str) -> None:
    ours, theirs = (outcome for outcome in (forked(ends=ends), fresh(ends=ends)))
    assert len(ours.records) == len(theirs.records) == 1
    assert (ours.error is None) == (ends == "well")
    for what in ("error", "is_user_error", "out_of_memory", "timed_out"):
        assert getattr(ours, what) == getattr(theirs, what), what


def test_one_server_forks_all_until_something_is_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forked()
    first = server_pid()
    forked()
    assert server_pid() == first
    monkeypatch.setenv("LIGHTEN_KNOWN", "yes")
    assert forked().records[0]["environment"]["LIGHTEN_KNOWN"] == "yes"
    assert server_pid() != first
    assert not psutil.pid_exists(first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, hard))
    try:
        assert str(2**40) in forked().records[0]["limits"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_job_that_takes_too_long_or_too_much_is_ended() -> None:
    ended = in_child(JOB, {"ends": "never"}, libraries=("numpy",), timeout_s=2.0)
    assert ended.timed_out
    assert not psutil.pid_exists(ended.records[0]["pid"])
    limit = ended.process_peak_bytes + 100 * MIB
    ended = in_child(JOB, {"mib": 2000}, libraries=("numpy",), memory_bytes=limit)
    assert ended.out_of_memory
    assert "holds more than" in str(ended.error)
    assert forked().error is None  # the server is there still


def test_a_second_job_at_the_same_time_is_a_fresh_process() -> None:
    results: list[Outcome] = []
    options: dict[str, Any] = {"libraries": ("numpy",), "timeout_s": 20.0}
    first = threading.Thread(
        target=lambda: results.append(in_child(JOB, {"ends": "never"}, **options))
    )
    began = threading.Event()
    options["on_record"] = lambda _: began.set()
    first.start()
    assert began.wait(20)
    second = in_child(JOB, {}, libraries=("numpy",))
    assert second.records[0]["parent"] == os.getpid()
    psutil.Process(server_pid()).children()[0].kill()
    first.join()
    assert results[0].out_of_memory  # as of a process that the system ends


def test_a_server_that_has_ended_is_replaced_and_one_that_is_killed_ends_its_job() -> None:
    forked()
    psutil.Process(server_pid()).kill()
    assert forked().error is None

    def kill(record: dict[str, Any]) -> None:
        psutil.Process(record["parent"]).kill()

    ended = in_child(JOB, {"ends": "never"}, libraries=("numpy",), on_record=kill)
    assert ended.out_of_memory
    assert ends(ended.records[0]["pid"])


def test_a_server_goes_with_its_client() -> None:
    """However that ends."""
    code = (
        "import os, signal\n"
        "from lighten import forked_jobs\n"
        "from lighten.jobs import in_child\n"
        f"in_child({JOB!r}, {{}}, libraries=('numpy',))\n"
        "print(forked_jobs._server._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ends(int(said.stdout))
