"""The process of `lighten serve`: open what is served, start the engine, listen, end well."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.errors import UserError, missing_extra
from lighten.machine.hardware import Choice, cache_folder
from lighten.serving import adapters
from lighten.serving.adapters import Base
from lighten.serving.answering import Front, Limits
from lighten.serving.engine import Engine
from lighten.serving.front import application
from lighten.serving.registry import Registry

log = logging.getLogger(__name__)
STORAGES = ("q8_0", "f16", "bf16", "f32")
STORAGE = STORAGES[0]  # unless another is asked for; ours has the processor's own format then
STORED = {"f32": "float32", "bf16": "bfloat16"}  # what our engine holds a base as
STORED_BY_VLLM = {**STORED, "f16": "float16"}
_GRACE_S = 25  # running answers have so long after SIGTERM; the process ends within 30 s
_CONTEXT = 4096


@dataclass(frozen=True)
class Options:
    """How a server is run; the command line's flags.

    Attributes:
        adapters: `name=path`, runs, folders of adapters.
        engine: One of `ENGINES`, or `auto`.
        served_name: What clients call the base; default as it was given.
        host: Address to listen at.
        port: 0 for any that is free.
        storage: Format of the base in llama.cpp.
        context: Tokens of a prompt with its answer; default the model's, at most 4096.
        slots: Answers made at the same time.
        threads: Of the processor.
        gpu_layers: Layers on a GPU, -1 for all.
        adapter_dir: Folder that adapters may be loaded from at run time.
        most_adapters: Adapters at most.
        api_keys: Keys of clients.
        admin_keys: Keys for loading adapters.
        waiting: Answers under way and waiting at most.
        engine_flags: llama.cpp's or vLLM's own settings, passed on.
        prefix_caching: Whether beginnings that prompts of one adapter share are computed once.
        revision: Of a hub id.
    """

    adapters: Iterable[str] | Mapping[str, str] = ()
    engine: str = "auto"
    served_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    storage: str = STORAGE
    context: int | None = None
    slots: int = 8
    threads: int | None = None
    gpu_layers: int = -1
    adapter_dir: Path | None = None
    most_adapters: int = 64
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    waiting: int = 512
    engine_flags: Mapping[str, Any] = field(default_factory=dict)
    prefix_caching: bool = True
    revision: str | None = None


def serve(base: str, options: Options, told: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; running answers are finished first.

    Args:
        base: The base; see `adapters.open_base`.
        options: How.
        told: Hears what is served, with which choices and why.

    Raises:
        UserError: Something the user can mend.
    """
    require_extra()
    import uvicorn

    _check(options)
    registry, engine = prepare(base, options, told)
    front = Front(
        registry, engine, options.api_keys, options.admin_keys,
        _hosts(options), Limits(waiting=options.waiting),
    )  # fmt: skip
    failed: list[BaseException] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async def start() -> None:
            began = time.perf_counter()
            try:
                await engine.start(registry.adapters)
                await front.warm_up()
            except Exception as error:
                failed.append(error)
                server.should_exit = True
                return
            names = ", ".join(registry.models)
            told(f"ready after {time.perf_counter() - began:.1f} s: {names}")

        starting = asyncio.create_task(start())
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await engine.stop()

    app = application(front, lifespan)
    config = uvicorn.Config(
        app, host=options.host, port=options.port, log_config=None, access_log=False,
        timeout_graceful_shutdown=_GRACE_S, server_header=False, lifespan="on",
    )  # fmt: skip
    server = _listening(config, front, told)
    # uvicorn raises the signal once more when it has ended: that is no way to end a server.
    before = {number: signal.signal(number, lambda *_: None)
              for number in (signal.SIGTERM, signal.SIGINT)}  # fmt: skip
    try:
        server.run()
    except SystemExit as error:  # the port is taken
        raise UserError(
            f"{options.host}:{options.port} cannot be listened at: another program has the port, "
            "or the address is not this machine's; choose another --port"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        raise failed[0]


def _listening(config: Any, front: Front, told: Callable[[str], None]) -> Any:
    """A server that tells its address, and refuses new requests from the first signal on."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                told(f"listening at http://{f'[{host}]' if ':' in host else host}:{port}")

        async def shutdown(self, sockets: Any = None) -> None:
            front.stopping = True
            if front.answering:
                told(f"stopping: {front.answering} answers are finished first")
            await super().shutdown(sockets)

    return Server(config)


def prepare(name: str, options: Options, told: Callable[[str], None]) -> tuple[Registry, Engine]:
    """The models that are served, and an engine for them that is not started yet.

    Raises:
        UserError: A model or an adapter that cannot be served.
    """
    base = adapters.open_base(name, revision=options.revision)
    called = options.served_name or name
    registry = Registry(base, called, root=options.adapter_dir, most=options.most_adapters)
    registry.open(adapters.resolve(options.adapters))
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None) or _CONTEXT
    context = options.context or min(positions, _CONTEXT)
    if context > positions:
        raise UserError(
            f"--max-model-len {context} is more than the {positions} positions of {name}"
        )
    chosen = choose_engine(options, len(registry.adapters))
    engine = ENGINES[chosen.value](registry, options, context, told)
    told(
        f"engine: {chosen.value}, {chosen.reason}; {options.slots} answers at once, each of "
        f"{context} tokens with its prompt"
    )
    return registry, engine


def choose_engine(options: Options, adapters: int) -> Choice:
    """Which engine answers, and why.

    llama.cpp takes the least memory and answers one adapter after another; ours computes the
    tokens of all adapters together.

    Args:
        options: How it is served.
        adapters: How many are served from the start.
    """
    if options.engine != "auto":
        return Choice(options.engine, "as wanted")
    if options.engine_flags or options.storage != STORAGE:
        return Choice("llamacpp", "whose settings were given")
    if adapters < 2:
        return Choice("llamacpp", "the embedded one, which takes the least memory")
    return Choice("lighten", f"which computes the tokens of all {adapters} adapters together")


def _cohort(
    registry: Registry, options: Options, context: int, told: Callable[[str], None]
) -> Engine:
    from lighten.serving.cohort import CohortEngine

    told("base: transformers' model in this process")
    return CohortEngine(
        registry.base.name, context=context, slots=options.slots, revision=options.revision,
        dtype=STORED[options.storage] if options.storage != STORAGE else "auto",
        threads=options.threads, prefix_caching=options.prefix_caching,
    )  # fmt: skip


def _llamacpp(
    registry: Registry, options: Options, context: int, told: Callable[[str], None]
) -> Engine:
    from lighten.serving.llamacpp import LlamaCpp

    base = registry.base
    model, why = base_as_gguf(base, options.storage)
    told(f"base: {model.stat().st_size / 1e6:,.0f} MB, {why}")
    for own in registry.adapters:  # refused here, with the reason, and not while it serves
        adapters.adapter_as_gguf(own, base)
    return LlamaCpp(
        model, lambda own: adapters.adapter_as_gguf(own, base),
        context=context, slots=options.slots, threads=options.threads,
        gpu_layers=options.gpu_layers, cache="f32" if options.storage == "f32" else "f16",
        flags=dict(options.engine_flags), prefix_caching=options.prefix_caching,
    )  # fmt: skip


def _vllm(
    registry: Registry, options: Options, context: int, told: Callable[[str], None]
) -> Engine:
    from lighten.serving.vllm import Vllm, program, require_servable

    base = registry.base
    if base.gguf is not None:
        raise UserError(f"--engine vllm does not serve the GGUF file {base.gguf}; give its folder")
    for own in registry.adapters:
        require_servable(own.folder)
    told(f"base: as it is, in {program()}")
    return Vllm(
        base.folder, base.asking.tokenizer, context=context, slots=options.slots,
        most_adapters=options.most_adapters, flags=dict(options.engine_flags),
        dtype=STORED_BY_VLLM.get(options.storage, "auto"), prefix_caching=options.prefix_caching,
    )  # fmt: skip


# An engine that is not started yet, by name; each says to `told` what it does to the base.
ENGINES: dict[str, Callable[[Registry, Options, int, Callable[[str], None]], Engine]] = {
    "llamacpp": _llamacpp,
    "lighten": _cohort,
    "vllm": _vllm,
}


def base_as_gguf(base: Base, storage: str) -> tuple[Path, str]:
    """The base as GGUF, from the cache or written there; and what was done.

    Raises:
        UserError: It has no GGUF form.
    """
    from lighten.quantization.gguf_model import write_gguf

    if base.gguf is not None:
        return base.gguf, "the GGUF file as it is"
    key = base.contents()
    target = cache_folder() / "serve" / "bases" / f"{key[:32]}-{storage}.gguf"
    if target.is_file():
        return target, f"{storage}, converted before"
    target.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    write_gguf(base.folder, target, storage, name=base.name)
    return target, f"converted to {storage} in {time.perf_counter() - began:.1f} s"


def require_extra() -> None:
    """Refuse at once where the front's packages or the engine's are missing.

    Raises:
        MissingExtra: Names the command that installs them.
    """
    import importlib.util

    for module in ("xllamacpp", "gguf", "starlette", "uvicorn"):
        if importlib.util.find_spec(module) is None:
            raise missing_extra(module, "serve")


def _check(options: Options) -> None:
    if options.engine not in ("auto", *ENGINES):
        raise UserError(f"--engine {options.engine} is not known; use auto, {', '.join(ENGINES)}")
    if options.engine == "lighten" and options.engine_flags:
        raise UserError("--engine-flag is for --engine llamacpp and vllm")
    if options.engine == "lighten" and options.storage not in (STORAGE, *STORED):
        raise UserError(
            f"--storage {options.storage} is for --engine llamacpp; ours holds a base as "
            f"{', '.join(STORED)}"
        )
    if options.engine == "vllm" and options.storage not in (STORAGE, *STORED_BY_VLLM):
        raise UserError(
            f"--storage {options.storage} is for --engine llamacpp; vLLM holds a base as "
            f"{', '.join(STORED_BY_VLLM)}, or as its configuration says"
        )
    if options.storage not in STORAGES:
        raise UserError(f"--storage {options.storage} is not known; use {', '.join(STORAGES)}")
    if not _is_loopback(options.host) and not options.api_keys:
        raise UserError(
            f"--host {options.host} lets other machines in: give clients a key with --api-key "
            "(or LIGHTEN_API_KEY), or stay at 127.0.0.1"
        )
    if options.slots < 1 or (options.context is not None and options.context < 16):
        raise UserError("--max-num-seqs is at least 1 and --max-model-len at least 16")
    if options.adapter_dir is not None and not options.adapter_dir.is_dir():
        raise UserError(f"--adapter-dir {options.adapter_dir} is no folder")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _hosts(options: Options) -> frozenset[str] | None:
    """Only names of this machine are answered while no key is asked for (DNS rebinding)."""
    if options.api_keys or not _is_loopback(options.host):
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", options.host.strip("[]").lower()})


def keys(given: Iterable[str], variable: str) -> tuple[str, ...]:
    """Keys from flags and from an environment variable, which no list of processes shows."""
    words = [*given, *os.environ.get(variable, "").split(",")]
    return tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
