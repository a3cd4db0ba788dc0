"""vLLM as an engine: for real where it is installed (`make vllm`), and refused where it is not."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("uvicorn")
pytest.importorskip("xllamacpp")

import lighten.api
from lighten import models
from lighten.errors import UserError
from lighten.generation.settings import Sampling
from lighten.machine import hardware
from lighten.serving import vllm
from lighten.serving.adapters import fingerprint, open_base
from lighten.serving.engine import Adapter, Generation, Piece
from lighten.serving.engines import engine_of
from lighten.serving.options import Options
from lighten.serving.registry import Registry
from lighten.serving.remote import Remote
from tests.processes import run_async
from tests.serving import ADMIN, save_adapter, serving

ROOT = Path(__file__).parents[1]
INSTALLED = os.environ.get(vllm.PROGRAM) or ROOT / ".vllm" / "bin" / "vllm"


def test_where_it_is_missing_the_way_to_install_it_is_said(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vllm.PROGRAM, "/nowhere/vllm")
    with pytest.raises(UserError, match=r"/nowhere/vllm.*pip install vllm"):
        lighten.api.serve(str(tiny_folder), engine="vllm", port=0, log=lambda _: None)


def test_what_it_does_not_serve_is_refused_before_it_starts(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = save_adapter(tiny_folder, tmp_path / "it", seed=1)
    assert vllm.require_servable(folder) == 4
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for change in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match="merge"):
            vllm.require_servable(folder)
    file.write_text(json.dumps({**config, "rank_pattern": {"q_proj": 24}}))
    assert vllm.require_servable(folder) == 24


def test_nothing_of_a_request_is_left_to_its_defaults() -> None:
    generation = Generation([5, 6], "key", 7, Sampling(0.5, seed=-1), frozenset({2}), logprobs=0)
    body = vllm.request_body(generation)
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("key", [5, 6], 7)
    assert (body["stop_token_ids"], body["logprobs"], body["seed"]) == ([2], 1, 2**63 - 1)
    assert vllm.request_body(Generation([5], None, 1))["model"] == "base"


# What stands for vLLM's server where it is not installed: its command line, /health, and the two
# paths that load and unload; each is written down with the process that took it.
STAND_IN = """#!{python}
import http.server, json, os, socketserver, sys
assert sys.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"], sys.argv
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            return self.complete(body)
        with open({calls!r}, "a") as file:
            print(os.getpid(), self.path.split("/")[-1], body["lora_name"], file=file)
        assert "lora_path" not in body or os.path.isfile(body["lora_path"] + "/adapter_config.json")
        self.send_response(200)
        self.end_headers()
    def complete(self, body):
        assert body["prompt"] == [5, 6, 7], body
        self.send_response(200)
        self.end_headers()
        if body["stream"]:
            assert "prompt_logprobs" not in body
            top = {{"top_logprobs": [{{"token_id:9": -0.5, "token_id:2": -0.25}}],
                    "token_logprobs": [-0.25]}}
            choice = {{"token_ids": [2], "finish_reason": None, "logprobs": top}}
            self.wfile.write(b"data: " + json.dumps({{"choices": [choice]}}).encode() + b"\\n\\n")
            return
        assert (body["max_tokens"], body["prompt_logprobs"]) == (1, 1) and "logprobs" not in body
        told = [None, {{"6": {{"logprob": -0.5, "rank": 1, "decoded_token": "x"}}}},
                {{"7": {{"logprob": -3.0, "rank": 40, "decoded_token": "x"}},
                  "9": {{"logprob": -1.0, "rank": 1, "decoded_token": "x"}}}}]
        self.wfile.write(json.dumps({{"choices": [{{"prompt_logprobs": told}}]}}).encode())
    def address_string(self):
        return "it"
socketserver.UnixStreamServer(sys.argv[sys.argv.index("--uds") + 1], Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its calls are written into this file."""
    calls = tmp_path / "calls"
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(STAND_IN.format(python=sys.executable, calls=str(calls)))
    python.chmod(0o755)
    python.with_name("vllm").touch()
    monkeypatch.setenv(vllm.PROGRAM, str(python.with_name("vllm")))
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    return calls


@pytest.mark.parametrize(
    ("flags", "quantized", "dtype"),
    [({"avx2"}, False, "float32"), ({"avx2"}, True, "auto"), ({"avx512_bf16"}, False, "auto")],
)
def test_it_computes_in_float32_where_a_processor_only_emulates_bfloat16(
    flags: set[str], quantized: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_DEVICE", "cpu")
    monkeypatch.setattr(hardware, "processor_flags", lambda: flags)
    assert vllm.choose_dtype(quantized=quantized).value == dtype


def test_it_chooses_by_itself_on_a_gpu_that_only_it_can_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LIGHTEN_DEVICE", raising=False)
    monkeypatch.setattr(hardware, "processor_flags", lambda: {"avx2"})
    monkeypatch.setattr(vllm, "unused_gpu", lambda: "this PyTorch is built without CUDA")
    assert vllm.choose_dtype().value == "auto"


@pytest.mark.parametrize(
    ("settings", "told"),
    [({}, "float32, the processor"), ({"storage": "bf16"}, "bfloat16, as wanted"),
     ({"engine_flags": {"dtype": "half"}}, "half, as wanted")],
)  # fmt: skip
def test_the_format_that_is_told_is_said(
    settings: dict[str, Any], told: str, tiny_folder: Path, stand_in: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LIGHTEN_DEVICE", "cpu")
    monkeypatch.setattr(hardware, "processor_flags", lambda: {"avx2"})
    said: list[str] = []
    registry = Registry(open_base(str(tiny_folder)), "base", root=None, most=1)
    engine = engine_of("vllm", registry, Options(engine="vllm", **settings), 64, said.append)
    assert isinstance(engine, vllm.Vllm)
    assert f"base: {told}" in said[0]


def test_a_prompt_is_told_of_by_a_request_of_its_own(tiny_folder: Path, stand_in: Path) -> None:
    """A stream of vLLM's gives no log-probabilities of it."""
    asked = Generation(
        [5, 6, 7], None, 1, stop_ids=frozenset({2}), logprobs=1, prompt_logprobs=1, tells_end=True
    )

    async def run(generation: Generation) -> list[Piece]:
        engine = vllm.Vllm(
            tiny_folder, models.load_tokenizer(str(tiny_folder)), context=64, slots=2
        )
        await engine.start([])
        pieces = [piece async for piece in engine.generate(generation)]
        await engine.stop()
        return pieces

    prompt, end = run_async(run(asked))
    assert [(token.id, token.logprob, token.rank) for token in prompt.prompt] == [
        (5, None, 0), (6, -0.5, 1), (7, -3.0, 40)
    ]  # fmt: skip
    assert [[top.id for top in token.top] for token in prompt.prompt] == [[], [6], [9]]
    assert (end.finish, end.text, end.tokens) == ("stop", "", 1)
    assert [(token.id, token.logprob) for token in end.logprobs] == [(2, -0.25)]
    alone, end = run_async(run(dataclasses.replace(asked, max_tokens=0)))
    assert (alone, end.finish, end.logprobs) == (prompt, "length", ())


def test_a_server_that_dies_gets_all_its_adapters_again(
    tiny_folder: Path, tmp_path: Path, stand_in: Path
) -> None:
    """Those of run time, too, and one whose folder is gone by then."""
    adapters = [
        Adapter(fingerprint(folder), folder)
        for folder in (save_adapter(tiny_folder, tmp_path / str(n), seed=n) for n in range(3))
    ]

    async def run() -> None:
        engine = vllm.Vllm(
            tiny_folder, models.load_tokenizer(str(tiny_folder)), context=64, slots=2
        )
        await engine.start(adapters[:2])
        await engine.set_adapters(adapters[1:])
        shutil.rmtree(adapters[2].folder)
        os.kill(int(stand_in.read_text().split()[0]), signal.SIGKILL)
        while not engine.facts()["restarts"]:
            await asyncio.sleep(0.02)
        assert engine.obstacle() is None
        await engine.stop()

    run_async(run())
    lines = [line.split() for line in stand_in.read_text().splitlines()]
    before, after = (
        [(action, name) for pid, action, name in lines if (pid == lines[0][0]) == is_first]
        for is_first in (True, False)
    )
    first_key, second_key, third_key = (adapter.key for adapter in adapters)
    load, unload = "load_lora_adapter", "unload_lora_adapter"
    assert before == [(load, first_key), (load, second_key), (load, third_key), (unload, first_key)]
    assert after == [(load, second_key), (load, third_key)]


def wide(source: Path, folder: Path) -> Path:
    """A tiny model whose heads have 32 features: vLLM computes no narrower ones on a processor."""
    shutil.copytree(source, folder)
    config = AutoConfig.from_pretrained(
        source, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_it_answers_as_each_adapter_alone_even_trained_anew(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Mixed adapters against PEFT in float32, and a folder that has other contents later."""
    if not Path(INSTALLED).is_file():
        pytest.skip("vLLM is not installed: make vllm")
    folder = wide(tiny_folder, tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        save_adapter(folder, tmp_path / name, seed=seed + 1)
    base = models.load(str(folder), dtype="float32")
    reference: Any = PeftModel.from_pretrained(base.model, str(tmp_path / "one"), "one")
    reference.load_adapter(str(tmp_path / "two"), "two")
    reference.eval()
    shutil.copytree(tmp_path / "one", tmp_path / "moving")
    prompt = list(range(5, 200))  # longer than a block of its prefix cache

    def expected(name: str) -> list[float]:
        reference.set_adapter(name)
        with torch.inference_mode():
            row = reference(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        values: list[float] = row.topk(3).values.tolist()
        return values

    def top_log_probs(url: str, model: str) -> list[float]:
        body = {"model": model, "prompt": prompt, "max_tokens": 2, "logprobs": 3, "temperature": 0}
        answer = Remote(url).request("POST", "/v1/completions", body)
        return sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)

    def prompt_log_probs(url: str, model: str) -> list[float]:
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True}
        told = Remote(url).request("POST", "/v1/completions", body)["choices"][0]["logprobs"]
        assert len(told["tokens"]) == len(prompt) + 1
        return list(told["token_logprobs"][1:-1])

    def expected_of_prompt(name: str) -> list[float]:
        reference.set_adapter(name)
        with torch.inference_mode():
            rows = reference(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        values: list[float] = rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        return values

    with serving(
        str(folder), "--engine", "vllm", "--storage", "f32", "--served-model-name", "base",
        "--adapters", f"one={tmp_path / 'one'}", f"two={tmp_path / 'two'}", "--adapter-dir",
        str(tmp_path), cache=tmp_path / "cache", env={vllm.PROGRAM: str(INSTALLED)},
    ) as server:  # fmt: skip
        for _ in range(2):
            for name in ("one", "two"):
                assert top_log_probs(server.url, name) == pytest.approx(expected(name), abs=2e-3)
                told = prompt_log_probs(server.url, name)
                assert told == pytest.approx(expected_of_prompt(name), abs=2e-3)
        admin = Remote(server.url, ADMIN)
        for source in ("one", "two", "one"):
            shutil.rmtree(tmp_path / "moving")
            shutil.copytree(tmp_path / source, tmp_path / "moving")
            admin.request(
                "POST", "/v1/load_lora_adapter", {"lora_name": "moving", "lora_path": "moving"}
            )
            assert top_log_probs(server.url, "moving") == pytest.approx(expected(source), abs=2e-3)
        schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"],
                  "additionalProperties": False}  # fmt: skip
        answer = Remote(server.url).chat(
            "one", [{"role": "user", "content": "json"}], max_tokens=60, response_format={
                "type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
        )  # fmt: skip
        assert json.loads(answer["choices"][0]["message"]["content"])["a"] in ("x", "y")
