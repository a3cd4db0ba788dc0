"""What an engine holds of adapters that are served no more."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from lighten.errors import UserError
from lighten.peft_config import CONFIG
from lighten.serving.answering import Front, Limits
from lighten.serving.engine import Adapter
from lighten.serving.front import application
from lighten.serving.options import Options
from lighten.serving.requests import Refused
from lighten.serving.running import open_served, prepare
from tests.processes import run_async
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

    run_async(held_after_answers())


def test_all_adapters_that_cannot_be_served_are_told_together(
    tiny_folder: Path, tmp_path: Path
) -> None:
    for name in ("good", "broken", "odd name"):
        save_adapter(tiny_folder, tmp_path / "adapters" / name, seed=1)
    (tmp_path / "adapters" / "broken" / CONFIG).write_text("{")
    with pytest.raises(UserError) as caught:
        open_served(str(tiny_folder), Options(adapters=[str(tmp_path / "adapters")]))
    broken, named = str(caught.value).splitlines()
    assert "broken" in broken
    assert "'odd name'" in named


class Taking:
    """An engine that takes whatever it is given."""

    async def set_adapters(self, adapters: list[Adapter]) -> None:
        self.adapters = adapters


def test_a_folder_of_one_adapter_is_that_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    """As a run is; one that lies elsewhere is refused however it is reached."""
    inside = save_adapters(tiny_folder, tmp_path) / "inside"
    for group, names in (("single", ["one"]), ("pair", ["one", "two"]), ("astray", [])):
        (inside / group).mkdir()
        for name in names:
            shutil.copytree(inside / name, inside / group / name)
    (inside / "astray" / "outside").symlink_to(tmp_path / "outside")
    registry, _ = open_served(str(tiny_folder), Options(adapter_dir=inside))
    engine: Any = Taking()

    async def refused(path: str) -> tuple[int, str]:
        with pytest.raises(Refused) as caught:
            await registry.load("it", path, engine)
        return caught.value.status, caught.value.message

    async def load() -> None:
        assert await registry.load("it", "single", engine) == "it is loaded"
        assert [adapter.folder for adapter in engine.adapters] == [inside / "single" / "one"]
        status, message = await refused("pair")
        assert (status, "one, two" in message) == (400, True)
        assert (await refused("astray"))[0] == 403
        (inside / "astray" / "outside").unlink()
        assert await refused("astray") == (400, f"{inside / 'astray'} holds no adapter ({CONFIG})")

    run_async(load())


def refused_as(**fields: Any) -> dict[str, Any]:
    """A schema that the engine does not follow."""
    schema = {"name": "it", "schema": {"type": "nonsense"}}
    return {"response_format": {"type": "json_schema", "json_schema": schema}, **fields}


def test_what_was_asked_is_let_go_of_with_its_answer(tiny_folder: Path, tmp_path: Path) -> None:
    """An error that holds its own frame would hold the adapter until garbage is looked for."""
    pytest.importorskip("llguidance")
    options = Options(engine="lighten", storage="f32", slots=2, threads=1, context=64)
    body = {"model": "it", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
    requests: list[tuple[int, dict[str, Any]]] = [
        (200, {}), (200, {"n": 2, "stream": True}), (400, {"no_such": 1}),
        (400, {"max_tokens": 99}),
        *((400, refused_as(n=n, stream=stream)) for n in (1, 2) for stream in (False, True)),
    ]  # fmt: skip

    async def held() -> list[dict[str, Any]]:
        registry, engine = prepare(str(tiny_folder), options, lambda _: None)
        front = Front(registry, engine)
        await engine.start(registry.adapters)
        await front.warm_up()
        still_there = []
        transport = httpx.ASGITransport(application(front))
        async with httpx.AsyncClient(transport=transport, base_url="http://it") as http:
            for status, fields in requests:
                base = registry.models[registry.name]
                registry.models = {**registry.models, "it": dataclasses.replace(base, name="it")}
                model = weakref.ref(registry.models["it"])
                answer = await http.post("/v1/chat/completions", json={**body, **fields})
                assert answer.status_code == status, answer.text
                registry.models.pop("it")
                await asyncio.sleep(0.05)
                if model() is not None:
                    still_there.append(fields)
        await engine.stop()
        return still_there

    gc.collect()
    gc.disable()
    try:
        assert run_async(held()) == []
    finally:
        gc.enable()


def test_limits_hold_for_requests_of_one_moment_and_metrics_end_with_their_adapter(
    tiny_folder: Path,
) -> None:
    options = Options(engine="lighten", storage="f32", slots=2, threads=1, context=64)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 40, "ignore_eos": True}

    async def asked() -> tuple[list[int], str]:
        registry, engine = prepare(str(tiny_folder), options, lambda _: None)
        front = Front(registry, engine, limits=Limits(waiting=1))
        await engine.start(registry.adapters)
        await front.warm_up()
        registry.models["it"] = dataclasses.replace(registry.models[registry.name], name="it")
        transport = httpx.ASGITransport(application(front))
        async with httpx.AsyncClient(transport=transport, base_url="http://it") as http:

            async def ask() -> int:
                answer = await http.post("/v1/chat/completions", json={**body, "model": "it"})
                return answer.status_code

            answers = [asyncio.create_task(ask()) for _ in range(3)]
            while not front.answering:
                await asyncio.sleep(0)
            registry.models.pop("it")  # as if it were unloaded
            front.metrics.forget("it")
            statuses = sorted(await asyncio.gather(*answers))
            page = (await http.get("/metrics")).text
        assert front.answering == 0
        await engine.stop()
        return statuses, page

    statuses, page = run_async(asked())
    assert statuses[0] == 200
    assert statuses[1:] in ([429, 429], [404, 429], [404, 404])
    assert 'model="it"' not in page
