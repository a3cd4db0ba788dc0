"""`lighten serve --plan` against the files and the engine that it is about."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

import lighten.api
from lighten import models
from lighten.errors import UserError
from lighten.generation.engine import Engine
from lighten.generation.request import Request
from lighten.generation.settings import Sampling
from lighten.machine import hardware
from lighten.machine.hardware import Gpu
from lighten.quantization.gguf_file import require_gguf
from lighten.serving import adapters
from lighten.serving.engine import Adapter
from lighten.serving.engines import base_as_gguf
from lighten.serving.options import STORAGES
from tests.processes import call
from tests.serving import save_adapter
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters, of ranks 4, 4 and 8."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate((("one", 4), ("two", 4), ("wide", 8))):
        save_adapter(tiny_folder, root / name, seed=seed, r=rank)
    return root


@pytest.mark.parametrize("storage", STORAGES)
def test_a_storage_is_as_large_as_the_file_that_is_served(
    storage: str, tiny_folder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors by the `gguf` library's reader, and the adapters' as they are written."""
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path))
    gguf = require_gguf()
    base = adapters.open_base(str(tiny_folder))

    def tensors(file: Path) -> int:
        return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)

    sizes, memory = lighten.api.plan_server(
        str(tiny_folder), engine="llamacpp", storage=storage, adapters=[str(folder)], slots=3
    )
    assert memory.parts["base weights"] == tensors(base_as_gguf(base, storage)[0])
    names = ("one", "two", "wide")
    held = [Adapter(adapters.fingerprint(folder / name), folder / name) for name in names]
    assert memory.parts["adapters"] == sum(
        tensors(adapters.adapter_as_gguf(adapter, base)) for adapter in held
    )
    number = 4 if storage == "f32" else 2
    config = base.config
    assert (
        memory.parts["KV cache"]
        == (3 * 256 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim)
        * number
    )
    assert (sizes.storage, sizes.adapters, sizes.rank, sizes.context) == (storage, 3, 8, 256)
    assert f"the base as {storage}; 3 adapters of rank 8" in sizes.sentence()


@pytest.mark.parametrize(("storage", "dtype"), [("f32", "float32"), ("bf16", "bfloat16")])
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_our_engine_holds_as_much_as_was_planned(
    arch: str, storage: str, dtype: str, folder: Path, tmp_path: Path
) -> None:
    """Also where layers have a window, which our cache does not cut to."""
    base = save_tiny(tmp_path / "base", arch)
    loaded = models.load(str(base), dtype=dtype, attn_implementation="eager", device="cpu")
    weights = models.census(loaded.model).weight_bytes
    adapter = save_adapter(base, tmp_path / "one", seed=1)
    sizes, memory = lighten.api.plan_server(
        str(base), engine="lighten", storage=storage, adapters=[str(adapter)], slots=2, context=128
    )
    engine = Engine(loaded.model, max_sequences=2, max_tokens=128)
    engine.load_adapter("one", adapter)
    ended = threading.Event()
    engine.submit(
        Request([5] * 120, "one", 2, frozenset(), Sampling(0.0), None, lambda _: None,
                lambda *_: ended.set())
    )  # fmt: skip
    assert ended.wait(60)
    assert memory.parts["base weights"] == weights
    assert engine.memory_bytes == {
        "adapters": memory.parts["adapters"], "cache": memory.parts["KV cache"],
    }  # fmt: skip
    assert sizes.storage == dtype
    engine.close(10)


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_base_that_is_quantised_in_its_files_is_planned_as_it_is_loaded(
    settings: dict[str, bool], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base = models.load(str(save_tiny(tmp_path / "dense")), device="cpu", **settings)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    loaded = models.load(str(tmp_path / "base"), dtype="float32", device="cpu")
    weights = models.census(loaded.model).weight_bytes
    sizes, memory = lighten.api.plan_server(str(tmp_path / "base"), engine="lighten", storage="f32")
    assert sizes.storage == ("nf4" if "load_in_4bit" in settings else "int8")
    # A table of the 16 numbers is shared by all layers.
    tables = 64 * 7 * loaded.model.config.num_hidden_layers
    assert 0 <= weights - memory.parts["base weights"] <= tables
    planned = lighten.api.plan_serve(str(tmp_path / "base"), device="t4").parts["base weights"]
    assert planned < memory.parts["base weights"]


def test_the_engine_is_the_one_that_would_be_taken(
    tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single_plan, _ = lighten.api.plan_server(str(tiny_folder), adapters=[str(folder / "one")])
    folder_plan, _ = lighten.api.plan_server(str(tiny_folder), adapters=[str(folder)])
    assert (single_plan.engine.value, folder_plan.engine.value) == ("llamacpp", "lighten")
    monkeypatch.setattr(hardware, "chosen_gpu", lambda: Gpu("NVIDIA T4", 16 * 10**9, "7.5"))
    monkeypatch.setattr("lighten.serving.vllm.installed", lambda: "/somewhere/bin/vllm")
    on_gpu, memory = lighten.api.plan_server(str(tiny_folder), adapters=[str(folder)])
    assert on_gpu.engine.value == "vllm"
    assert on_gpu.storage in ("bfloat16", "float16", "float32")
    assert memory.parts["adapters"] > 0


def test_what_cannot_be_served_is_not_planned(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="positions"):
        lighten.api.plan_server(str(tiny_folder), context=10_000)
    with pytest.raises(UserError, match="storage"):
        lighten.api.plan_server(str(tiny_folder), storage="q3")
    for name in ("one", "two"):
        save_adapter(tiny_folder, tmp_path / "many" / name, seed=1)
    with pytest.raises(UserError, match="2 adapters are more than --max-cpu-loras 1"):
        lighten.api.plan_server(
            str(tiny_folder), adapters=[str(tmp_path / "many")], most_adapters=1
        )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"adapter_model.safetensors cannot be read"):
        lighten.api.plan_server(str(tiny_folder), adapters=[str(tmp_path)])


def test_the_command_says_what_is_held(tiny_folder: Path, folder: Path) -> None:
    result = call(
        "serve", str(tiny_folder), "--plan", "--adapters", str(folder / "one"), str(folder / "two"),
        "--engine", "llamacpp", "--storage", "f16", "--max-num-seqs", "3",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "llamacpp, as wanted; the base as f16; 2 adapters of rank 4" in result.stdout
    assert "3 answers at once, each of 256 tokens" in result.stdout
    for part in ("base weights", "KV cache", "adapters"):
        assert part in result.stdout
