"""Peers with the same base and adapters: llama.cpp's own server, vLLM's, PEFT's mixed batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from benchmarks.serve_load import Round, Shape, one_round
from lighten.errors import UserError
from lighten.machine.hardware import cache_folder
from lighten.models.load import locate
from lighten.serving import adapters, engines
from lighten.serving.remote import Remote
from lighten.serving.vllm import choose_dtype, environment, installed, server

ROOT = Path(__file__).parents[1]
VLLM = ROOT / ".vllm" / "bin" / "vllm"  # `make vllm`
_START_S = 600.0


@dataclass
class Peer:
    """A server that answers rounds.

    Attributes:
        run: A round of models, by their names in the adapters' folder; the base: None.
    """

    run: Callable[[Sequence[str | None], Shape, int], Round]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _served(
    name: str, words: Sequence[str], port: int, *, environment: Mapping[str, str],
    first_line: str = "",
) -> Iterator[tuple[Remote, int]]:  # fmt: skip
    """A server that ends with its standard input; a client of it when it is ready, and its pid."""
    log = cache_folder() / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=out, stderr=out, text=True, env=environment
        )
        assert process.stdin is not None
        try:
            process.stdin.write(first_line)
            process.stdin.flush()
            remote = Remote(f"http://127.0.0.1:{port}")
            _until_ready(process, port, log)
            yield remote, process.pid
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until_ready(process: subprocess.Popen[str], port: int, log: Path) -> None:
    deadline, direct = time.monotonic() + _START_S, build_opener(ProxyHandler({}))
    while process.poll() is None and time.monotonic() < deadline:
        # vLLM's answer has no body; llama.cpp's is an error while it loads.
        with suppress(OSError), direct.open(f"http://127.0.0.1:{port}/health", timeout=_START_S):
            return
        time.sleep(0.2)
    raise UserError(f"it did not start (code {process.poll()}); see {log}")


@contextmanager
def llamacpp(
    base: str, folder: Path, *, slots: int, context: int, threads: int, streamed: bool = False
) -> Iterator[Peer]:
    """llama.cpp's own server, with nothing before it, as `lighten serve` starts it.

    Args:
        base: The base.
        folder: Of adapters.
        slots: Answers at once.
        context: Tokens of a prompt with its answer.
        threads: Of the processor.
        streamed: Read the answers as streams.
    """
    opened = adapters.open_base(base)
    model, _ = engines.base_as_gguf(opened, "q8_0")
    adapter_paths = adapters.resolve([str(folder)])
    files = []
    for name, path in adapter_paths.items():
        adapter = adapters.open_adapter(name, path, opened).adapter
        assert adapter is not None
        files.append(str(adapters.adapter_as_gguf(adapter, opened)))
    port = _free_port()
    settings = {
        "model": str(model), "socket": "127.0.0.1", "slots": slots, "context": context,
        "threads": threads, "poll": 0, "gpu_layers": 0, "adapters": files, "verbosity": 1,
        "cache": "f16", "flags": {"port": port},
    }  # fmt: skip
    names = list(adapter_paths)

    def lora_fields(model: str) -> dict[str, Any]:
        return {"lora": [{"id": number, "scale": float(name == model)}
                         for number, name in enumerate(names)]}  # fmt: skip

    with _served(
        "llamacpp", [sys.executable, "-m", "lighten.serving.child"], port,
        environment={"OMP_WAIT_POLICY": "passive", **os.environ},
        first_line=json.dumps(settings) + "\n",
    ) as (remote, pid):  # fmt: skip

        def run(models: Sequence[str | None], shape: Shape, seed: int) -> Round:
            model_names = [model or "" for model in models]
            return one_round(
                remote,
                model_names,
                shape,
                pid=pid,
                seed=seed,
                extra_fields=lora_fields,
                streamed=streamed,
            )

        yield Peer(run)


@contextmanager
def vllm(
    base: str, folder: Path, *, slots: int, context: int, rank: int
) -> Iterator[Peer]:  # fmt: skip
    """VLLM's server.

    Args:
        base: The base.
        folder: Of adapters.
        slots: Answers at once.
        context: Tokens of a prompt with its answer.
        rank: Of the largest adapter.

    Raises:
        UserError: It is not installed, or does not start.
    """
    program = installed() or str(VLLM)
    if not Path(program).is_file():
        raise UserError(f"{program} is missing: make vllm")
    adapter_paths = adapters.resolve([str(folder)])
    port = _free_port()
    words = [
        sys.executable, "-m", "lighten.serving.tether", *server(program),
        "--model", str(locate(base)[1]), "--served-model-name", "base", "--host", "127.0.0.1",
        "--port", str(port), "--max-num-seqs", str(slots), "--max-model-len", str(context),
        "--enable-lora", "--max-loras", str(len(adapter_paths)), "--max-lora-rank", str(rank),
        "--generation-config", "vllm", "--dtype", choose_dtype().value,
        "--lora-modules",
        *(f"{name}={path}" for name, path in adapter_paths.items()),
    ]  # fmt: skip
    offline = {**environment(), "HF_HUB_OFFLINE": "1"}
    with _served("vllm", words, port, environment=offline) as (remote, pid):

        def run(models: Sequence[str | None], shape: Shape, seed: int) -> Round:
            return one_round(remote, [model or "base" for model in models], shape, pid=pid,
                             seed=seed)  # fmt: skip

        yield Peer(run)


@contextmanager
def peft(base: str, folder: Path, *, threads: int) -> Iterator[Peer]:
    """PEFT's `generate(adapter_names=...)` in a process of its own: one static batch after another.

    Args:
        base: The base.
        folder: Of adapters.
        threads: Of the processor.
    """
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("serve_peft.py")), base, str(folder),
         str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(models: Sequence[str | None], shape: Shape, seed: int) -> Round:
        request = {"models": list(models), "shape": vars(shape), "seed": seed}
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise UserError(f"PEFT's process ended with code {process.wait()}")
        return Round(**json.loads(line))

    try:
        yield Peer(run)
    finally:
        process.stdin.close()
        process.wait(timeout=60)
