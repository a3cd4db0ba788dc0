"""Peers with the same base and adapters: llama.cpp's own server, vLLM's, PEFT's mixed batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve_load import Round, Shape, one_round
from lighten.errors import UserError
from lighten.machine.hardware import cache_folder
from lighten.models.load import locate
from lighten.serving import adapters, running
from lighten.serving.remote import Remote, ServerError
from lighten.serving.vllm import server

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
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _until_ready(process: subprocess.Popen[str], remote: Remote, path: str) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        if process.poll() is not None:
            raise UserError(f"it ended with code {process.returncode}")
        try:
            remote.request("GET", path)
            return
        except (ServerError, ValueError) as error:
            if isinstance(error, ValueError):  # an answer that is no JSON is one
                return
        if time.monotonic() > deadline:
            raise UserError(f"it did not answer within {_START_S:.0f} s")
        time.sleep(0.2)


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
    model, _ = running.base_as_gguf(opened, "q8_0")
    there = adapters.resolve([str(folder)])
    files = []
    for name, path in there.items():
        one = adapters.open_adapter(name, path, opened).adapter
        assert one is not None
        files.append(str(adapters.adapter_as_gguf(one, opened)))
    port = _free_port()
    settings = {
        "model": str(model), "socket": "127.0.0.1", "slots": slots, "context": context,
        "threads": threads, "poll": 0, "gpu_layers": 0, "adapters": files, "verbosity": 1,
        "cache": "f16", "flags": {"port": port},
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "lighten.serving.child"], stdin=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={"OMP_WAIT_POLICY": "passive", **os.environ},
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(settings) + "\n")
    process.stdin.flush()
    remote = Remote(f"http://127.0.0.1:{port}")
    names = list(there)

    def more(model: str) -> dict[str, Any]:
        return {"lora": [{"id": number, "scale": float(name == model)}
                         for number, name in enumerate(names)]}  # fmt: skip

    try:
        _until_ready(process, remote, "/health")
        yield Peer(
            lambda models, shape, seed: one_round(
                remote,
                [model or "" for model in models],
                shape,
                pid=process.pid,
                seed=seed,
                more=more,
                streamed=streamed,
            )
        )
    finally:
        process.stdin.close()
        process.wait(timeout=30)


@contextmanager
def vllm(
    base: str, folder: Path, *, slots: int, context: int, rank: int, program: Path = VLLM
) -> Iterator[Peer]:
    """VLLM's server.

    Args:
        base: The base.
        folder: Of adapters.
        slots: Answers at once.
        context: Tokens of a prompt with its answer.
        rank: Of the largest adapter.
        program: Its command, in an environment of its own.

    Raises:
        UserError: It is not installed, or does not start.
    """
    if not program.is_file():
        raise UserError(f"{program} is missing: make vllm")
    there = adapters.resolve([str(folder)])
    port = _free_port()
    log = cache_folder() / "vllm.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [
        *server(str(program)), "--model", str(locate(base)[1]), "--served-model-name", "base",
        "--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(slots), "--max-model-len",
        str(context), "--enable-lora", "--max-loras", str(len(there)), "--max-lora-rank",
        str(rank), "--generation-config", "vllm", "--lora-modules",
        *(f"{name}={path}" for name, path in there.items()),
    ]  # fmt: skip
    environment = {
        key: value for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "OMP_NUM_THREADS")
    }  # fmt: skip
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1",
                    "HF_HUB_OFFLINE": "1"}  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, text=True, env=environment)
        remote = Remote(f"http://127.0.0.1:{port}")
        try:
            _until_ready(process, remote, "/health")
            yield Peer(
                lambda models, shape, seed: one_round(
                    remote,
                    [model or "base" for model in models],
                    shape,
                    pid=process.pid,
                    seed=seed,
                )
            )
        except UserError as error:
            raise UserError(f"vLLM: {error}; see {log}") from error
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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
        wanted = {"models": list(models), "shape": vars(shape), "seed": seed}
        stdin.write(json.dumps(wanted) + "\n")
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
