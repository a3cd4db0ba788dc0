"""What `lighten doctor` tries in child processes: it works, or a line says why and what to do."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from lighten.machine import disk
from lighten.parallel import tried
from lighten.parallel.tried import Tried
from tests.processes import call

PATIENCE_S = 300.0  # of a busy machine


def sleep(seconds: str) -> Tried:
    time.sleep(float(seconds))
    return Tried(True, "slept")


def crash(_word: str) -> Tried:
    os.kill(os.getpid(), signal.SIGKILL)
    return Tried(True, "lives")


def fail(word: str) -> Tried:
    raise KeyError(word)


def test_each_operation_is_tried_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tried, "LIMIT_S", PATIENCE_S)
    outcomes = tried.operations(tmp_path, tmp_path / "not" / "there yet")
    pinned = outcomes.pop("offload_base: cpu")
    assert pinned.works is (True if torch.cuda.is_available() else None), pinned
    assert all(outcome.works for outcome in outcomes.values()), outcomes
    assert (outcomes["offload_base: disk"].bytes_per_s or 0) > 0
    assert f"read in {tmp_path} at " in outcomes["offload_base: disk"].sentence()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_memory_is_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "file_system", lambda folder: "tmpfs")
    outcome = tried.tried("offload_optimizer: nvme", tried._nvme, str(tmp_path),
                          limit_s=PATIENCE_S)  # fmt: skip
    assert outcome.works is False
    assert f"{tmp_path} is in memory (tmpfs)" in outcome.detail
    assert outcome.sentence().endswith("; name another folder with nvme_path")


def test_what_stands_still_crashes_or_fails_is_a_line(tmp_path: Path) -> None:
    name = "ranks over gloo"
    for work, word, limit_s, says in (
        (sleep, "3600", 0.2, "it took more than 0.2 s; let processes connect"),
        (crash, "", PATIENCE_S, "its process ended with exit code -9; let"),
        (fail, "absent", PATIENCE_S, "KeyError: 'absent'; let"),
    ):
        outcome = tried.tried(name, work, word, scratch=tmp_path, limit_s=limit_s)
        assert outcome.works is False
        assert says in outcome.detail
    missing = tried.tried(name, sleep, "0", scratch=tmp_path / "nowhere")
    assert missing.works is False
    assert "No such file or directory" in missing.detail
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_was_tried() -> None:
    report = json.loads(call("doctor", "--json").stdout)
    assert report["machine"]["cores"] >= 1
    assert set(report["operations"]) == set(tried.ADVICE)
    assert {"works", "detail", "bytes_per_s"} == set(report["operations"]["offload_base: disk"])
    shown = call("doctor").stdout
    assert "base format" in shown
    assert "tried here" in shown
