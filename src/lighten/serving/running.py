"""The process of `lighten serve`: open what is served, start the engine, listen, end well."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from lighten import models
from lighten.errors import require_package
from lighten.serving import adapters, address
from lighten.serving.answering import Front, Limits
from lighten.serving.engine import Engine
from lighten.serving.engines import choose_here, engine_of
from lighten.serving.front import application
from lighten.serving.options import Options, context_of, is_loopback, require_valid
from lighten.serving.registry import Registry
from lighten.wording import counted

_ENDS = (signal.SIGTERM, signal.SIGINT)
_GRACE_S = 25  # running answers have so long after SIGTERM, the engine its few seconds after them


def serve(base: str, options: Options, log: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; running answers are finished first.

    The port is taken before the base is read, which may take minutes.

    Args:
        base: The base; see `adapters.open_base`.
        options: How.
        log: Hears what is served, with which choices and why.

    Raises:
        UserError: Something the user can mend.
    """
    require_extra()
    require_valid(options)
    with _ended_by_sigterm(), address.bound(options.host, options.port) as sockets:
        _serve_at(sockets, base, options, log)


def _serve_at(
    sockets: list[socket.socket], base: str, options: Options, log: Callable[[str], None]
) -> None:
    import uvicorn

    registry, engine = prepare(base, options, log)
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
            log(f"ready after {time.perf_counter() - began:.1f} s: {names}")

        starting = asyncio.create_task(start())
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await engine.stop()

    app = application(front, lifespan)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE_S,
        server_header=False, lifespan="on",
    )  # fmt: skip
    server = _listening(config, front, log)
    address.listen(sockets, options.host, options.port)
    _run(server, sockets)
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program before it serves, too, and not by the system's hand.

    That does not end the first process of a container, and leaves half-written conversions behind.
    """

    def end(*_: Any) -> None:
        raise SystemExit(0)

    if threading.current_thread() is not threading.main_thread():  # no signal comes here
        yield
    else:
        with _on_signals(end, signal.SIGTERM):
            yield


def _run(server: Any, sockets: list[socket.socket]) -> None:
    """Until a signal ends it; in a thread of a program as long as that runs."""
    if threading.current_thread() is not threading.main_thread():  # no signal comes here
        server.run(sockets)
    elif _has_loop():  # a notebook's
        thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
        with _on_signals(lambda *_: setattr(server, "should_exit", True), *_ENDS):
            thread.start()
            thread.join()
    else:
        # uvicorn raises the signal once more when it has ended: that is no way to end a server.
        with _on_signals(lambda *_: None, *_ENDS):
            server.run(sockets)


@contextlib.contextmanager
def _on_signals(handler: Callable[..., None], *numbers: signal.Signals) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handled in previous.items():
            signal.signal(number, handled)


def _has_loop() -> bool:
    """Whether an event loop runs in this thread, beside which none can be started."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _listening(config: Any, front: Front, log: Callable[[str], None]) -> Any:
    """A server that tells its address, and refuses new requests from the first signal on."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                log(f"listening at http://{f'[{host}]' if ':' in host else host}:{port}")

        async def shutdown(self, sockets: Any = None) -> None:
            front.stopping = True
            if front.answering:
                log(f"stopping, after {counted(front.answering, 'answer')} under way")
            await super().shutdown(sockets)

    return Server(config)


def prepare(name: str, options: Options, log: Callable[[str], None]) -> tuple[Registry, Engine]:
    """The models that are served, and an engine for them that is not started yet.

    Raises:
        UserError: A model or an adapter that cannot be served.
    """
    registry, context = open_served(name, options)
    chosen = choose_here(
        options, registry.adapters, registry.base.config, gguf=registry.base.gguf is not None,
        shape=lambda: models.skeleton(registry.base.name, revision=options.revision),
    )  # fmt: skip
    template = registry.base.asking.template
    if template.name != "model" and options.chat_template is None:
        log(f"chat template: {template.name}, {template.reason}")
    engine = engine_of(chosen.value, registry, options, context, log)
    log(
        f"engine: {chosen.value}, {chosen.reason}; {counted(options.slots, 'answer')} at once, "
        f"each of {context} tokens with its prompt"
    )
    return registry, engine


def open_served(name: str, options: Options) -> tuple[Registry, int]:
    """The models that are served, and the tokens that a prompt may have with its answer.

    Raises:
        UserError: A model or an adapter that cannot be served.
    """
    base = adapters.open_base(name, revision=options.revision, chat_template=options.chat_template)
    called = options.served_name or name
    registry = Registry(base, called, root=options.adapter_dir, most=options.most_adapters)
    registry.open(adapters.resolve(options.adapters, options.most_adapters))
    return registry, context_of(options, base.config, name)


def require_extra() -> None:
    """Refuse at once where the front's packages or the engine's are missing.

    Raises:
        MissingExtra: Names the command that installs them.
    """
    for module in ("xllamacpp", "gguf", "starlette", "uvicorn"):
        require_package(module, "serve")


def _hosts(options: Options) -> frozenset[str] | None:
    """Only names of this machine are answered while no key is asked for (DNS rebinding)."""
    if options.api_keys or not is_loopback(options.host):
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", options.host.strip("[]").lower()})
