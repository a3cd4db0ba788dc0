"""What an engine holds of adapters that are served no more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from lighten.serving.options import Options
from lighten.serving.running import prepare
from tests.serving import save_adapter, save_adapters


def test_memory_of_an_adapter_is_given_back_with_its_last_answer(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Unloaded or replaced while a request takes it, with no other change after that."""
    inside = save_adapters(tiny_folder, tmp_path) / "inside"
    options = Options(
        adapters={"one": str(inside / "one"), "two": str(inside / "two")}, engine="lighten",
        storage="f32", slots=1, threads=1, context=64, adapter_dir=inside,
    )  # fmt: skip

    async def held_after_answers() -> None:
        registry, engine = prepare(str(tiny_folder), options, lambda _: None)
        await engine.start(registry.adapters)

        def held() -> set[str]:
            return set(engine._running().adapters)  # type: ignore[attr-defined]

        one, two = (registry.named(name) for name in ("one", "two"))
        first = {model.adapter.key for model in (one, two) if model.adapter}
        save_adapter(tiny_folder, inside / "two", seed=9)
        await registry.unload("one", engine)
        await registry.load("two", "two", engine)
        assert held() > first
        served = {adapter.key for model in [registry.named("two")] if (adapter := model.adapter)}
        del one
        async with asyncio.timeout(20):
            while len(held()) > 2:
                await asyncio.sleep(0.01)
        del two
        async with asyncio.timeout(20):
            while held() != served:
                await asyncio.sleep(0.01)
        await engine.stop()

    asyncio.run(held_after_answers())
