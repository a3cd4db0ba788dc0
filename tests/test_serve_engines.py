"""Which engine `--engine auto` takes, and why, on machines that are described."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from lighten import models
from lighten.errors import UserError
from lighten.machine import hardware
from lighten.machine.hardware import Gpu
from lighten.peft_config import WEIGHTS
from lighten.quantization.gguf_file import GgufContent
from lighten.quantization.gguf_model import write_gguf
from lighten.serving import llamacpp, vllm
from lighten.serving.adapters import open_base
from lighten.serving.engine import Adapter
from lighten.serving.engines import base_as_gguf, choose_engine, choose_here
from lighten.serving.options import Options
from lighten.serving.running import open_served, prepare
from tests.serving import save_adapter
from tests.tiny import VOCAB, save_tiny

T4 = Gpu("NVIDIA T4", 16 * 10**9, "7.5")
PASCAL = Gpu("NVIDIA P100", 16 * 10**9, "6.0")
VLLM = "/somewhere/bin/vllm"


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = save_adapter(tiny_folder, tmp_path_factory.mktemp("adapters") / "one", seed=1)
    return [Adapter("first", folder), Adapter("second", folder)]


def test_a_processor_has_llama_cpp_or_ours(adapters: list[Adapter]) -> None:
    assert choose_engine(Options(), []).value == "llamacpp"
    assert choose_engine(Options(), adapters[:1]).value == "llamacpp"
    choice = choose_engine(Options(), adapters, program=VLLM)
    assert choice.value == "lighten"
    assert "all 2 adapters" in choice.reason
    assert "vLLM" not in choice.reason


def test_adapters_that_are_loaded_later_count_too(tmp_path: Path) -> None:
    """A server that began with none had llama.cpp, which answers one adapter after another."""
    choice = choose_engine(Options(adapter_dir=tmp_path), [])
    assert choice.value == "lighten"
    assert "all adapters together, those that are loaded later too" in choice.reason
    assert choose_engine(Options(adapter_dir=tmp_path, most_adapters=1), []).value == "llamacpp"


def test_a_base_that_is_quantised_has_ours(tmp_path: Path, tiny_folder: Path) -> None:
    """llama.cpp's file cannot be made from it."""
    folder = shutil.copytree(tiny_folder, tmp_path / "int8")
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    base = open_base(str(folder))
    chosen = choose_here(
        Options(), [], base.config, gguf=False, shape=lambda: models.skeleton(str(folder))
    )
    assert (chosen.value, "quantised already" in chosen.reason) == ("lighten", True)
    with pytest.raises(UserError, match="--engine lighten"):
        base_as_gguf(base, "q8_0")


def test_a_gguf_base_is_served_without_a_copy_of_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 a copy would be seven times as large as the file; llama.cpp does not read it."""
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    write_gguf(tiny_folder, tmp_path / "it.gguf", "q8_0")
    registry, _ = prepare(str(tmp_path / "it.gguf"), Options(), lambda _: None)
    base, plain = registry.base, open_base(str(tiny_folder))
    assert base_as_gguf(base, "q8_0")[0] == tmp_path / "it.gguf"
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []
    assert base.asking.stop_ids == plain.asking.stop_ids
    assert base.asking.text("Hello you") == plain.asking.text("Hello you")


def test_two_that_convert_a_base_at_once_both_serve_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers that share a cache have processes of one number; so have threads."""
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    both, write = threading.Barrier(2, timeout=60), GgufContent.write

    def written(content: GgufContent, path: Path) -> None:
        write(content, path)
        both.wait()

    monkeypatch.setattr(GgufContent, "write", written)
    base = open_base(str(tiny_folder))
    with ThreadPoolExecutor(2) as pool:
        (first, _), (second, _) = pool.map(lambda _: base_as_gguf(base, "f32"), range(2))
    assert first == second
    monkeypatch.undo()
    write_gguf(tiny_folder, tmp_path / "alone.gguf", "f32", name=base.name)
    assert first.read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    assert [file.name for file in first.parent.iterdir()] == [first.name]


def test_a_gpu_has_vllm_where_it_is_installed_and_the_reason_is_said(
    adapters: list[Adapter],
) -> None:
    for served in ([], adapters):
        chosen = choose_engine(Options(), served, gpu=T4, program=VLLM)
        assert chosen.value == "vllm"
        assert "NVIDIA T4" in chosen.reason


def test_why_a_gpu_has_another_engine_is_said(adapters: list[Adapter], tmp_path: Path) -> None:
    folder = tmp_path / "biased"
    folder.mkdir()
    config = json.loads((adapters[0].folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    biased = [*adapters, Adapter("third", folder)]
    missing = choose_engine(Options(), adapters, gpu=T4)
    assert missing.value == "lighten"
    assert "NVIDIA T4" in missing.reason
    assert "make vllm" in missing.reason
    old = choose_engine(Options(), [], gpu=PASCAL, program=VLLM)
    assert (old.value, "7.0" in old.reason, "6.0" in old.reason) == ("llamacpp", True, True)
    file = choose_engine(Options(), [], gpu=T4, program=VLLM, gguf=True)
    assert (file.value, "GGUF" in file.reason) == ("llamacpp", True)
    refused = choose_engine(Options(), biased, gpu=T4, program=VLLM)
    assert (refused.value, "trained bias" in refused.reason) == ("lighten", True)


def test_an_adapted_head_that_is_the_word_embeddings_has_ours(
    adapters: list[Adapter], tmp_path: Path
) -> None:
    """llama.cpp would change both."""
    folder = shutil.copytree(adapters[0].folder, tmp_path / "head")
    weights = load_file(folder / WEIGHTS)
    for factor, shape in (("A", (4, 32)), ("B", (VOCAB, 4))):
        weights[f"base_model.model.lm_head.lora_{factor}.weight"] = torch.ones(shape)
    save_file(weights, folder / WEIGHTS)
    head = [Adapter("first", folder)]
    assert choose_engine(Options(), head, tied=True).value == "lighten"
    assert choose_engine(Options(), head).value == "llamacpp"
    assert choose_engine(Options(), adapters[:1], tied=True).value == "llamacpp"


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0,
                                       "rope_theta": 10000.0}}, "rotary"),
        ("falcon", {}, "cannot be replaced"),
    ],
)  # fmt: skip
def test_a_base_that_ours_does_not_take_has_llama_cpp(
    arch: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """However many adapters there are; where ours is wanted that is said before it is loaded."""
    base = save_tiny(tmp_path / "base", arch, **changes)
    for seed, name in enumerate(("one", "two")):
        save_adapter(base, tmp_path / "adapters" / name, seed=seed)
    registry, _ = open_served(str(base), Options(adapters=[str(tmp_path / "adapters")]))
    chosen = choose_here(
        Options(), registry.adapters, registry.base.config, gguf=False,
        shape=lambda: models.skeleton(str(base)),
    )  # fmt: skip
    assert chosen.value == "llamacpp"
    assert reason in chosen.reason
    with pytest.raises(UserError, match=f"{reason}.*--engine llamacpp"):
        prepare(str(base), Options(engine="lighten"), lambda _: None)


def test_a_system_without_unix_sockets_has_ours(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows: the others' processes could not be asked, and it would end in a traceback."""
    monkeypatch.delattr(asyncio, "open_unix_connection")
    lines: list[str] = []
    _, engine = prepare(str(tiny_folder), Options(), lines.append)
    assert engine.name == "lighten"
    assert "Unix socket" in lines[-1]
    with pytest.raises(UserError, match=r"Unix socket.*--engine lighten"):
        prepare(str(tiny_folder), Options(engine="llamacpp"), lines.append)


def test_what_is_wanted_is_taken(adapters: list[Adapter]) -> None:
    for engine in ("llamacpp", "lighten", "vllm"):
        chosen = choose_engine(Options(engine=engine), adapters, gpu=T4, program=VLLM)
        assert chosen.value == engine
    for options in (
        Options(storage="f16"), Options(engine_flags={"n_batch": 512}), Options(gpu_layers=20)
    ):  # fmt: skip
        assert choose_engine(options, adapters, gpu=T4, program=VLLM).value == "llamacpp"


def test_it_is_looked_for_where_it_is_installed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole choice on a machine that has a GPU, by what lies where `make vllm` puts it."""
    registry, context = open_served(str(tiny_folder), Options())
    assert context == 256

    def chosen() -> str:
        return choose_here(
            Options(), registry.adapters, registry.base.config, gguf=False,
            shape=lambda: models.skeleton(str(tiny_folder)),
        ).value  # fmt: skip

    monkeypatch.setattr(hardware, "chosen_gpu", lambda: T4)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(vllm.PROGRAM, raising=False)
    monkeypatch.chdir(tmp_path)
    assert chosen() == "llamacpp"
    program = tmp_path / ".vllm" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.touch()
    assert chosen() == "vllm"
    assert vllm.program() == str(program)
    monkeypatch.setenv(vllm.PROGRAM, str(program))
    monkeypatch.chdir("/")
    assert chosen() == "vllm"
    monkeypatch.setenv(vllm.PROGRAM, "/nowhere/vllm")
    with pytest.raises(UserError, match=r"/nowhere/vllm.*pip install vllm"):
        chosen()


@pytest.mark.parametrize("environment", [vllm.environment, llamacpp.environment])
def test_an_engine_computes_on_the_device_that_is_named(
    environment: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LIGHTEN_DEVICE", "cuda:2")
    assert environment()["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-b,6")
    assert environment()["CUDA_VISIBLE_DEVICES"] == "6"
    monkeypatch.setenv("LIGHTEN_DEVICE", "cuda")
    assert environment()["CUDA_VISIBLE_DEVICES"] == "4,GPU-b,6"
    monkeypatch.setenv("LIGHTEN_DEVICE", "cpu")
    assert environment()["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("LIGHTEN_DEVICE", "cuda:3")
    with pytest.raises(UserError, match="cuda:3"):
        environment()
