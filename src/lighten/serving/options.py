"""How a server is run: the command line's flags, and which of them do not go together."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.errors import UserError

ENGINES = ("llamacpp", "lighten", "vllm")
STORAGES = ("q8_0", "f16", "bf16", "f32")
STORAGE = STORAGES[0]  # unless another is asked for; ours has the processor's own format then
STORED = {"f32": "float32", "bf16": "bfloat16"}  # what our engine holds a base as
_CONTEXT = 4096  # of a server whose user names none, where the base has so many positions
_LAST_PORT = 65535
ALL_LAYERS = -1  # on a GPU
STORED_BY_VLLM = {**STORED, "f16": "float16"}


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
        chat_template: As a recipe's; of the base, and of adapters that bring none. Default the
            base's own.
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
    gpu_layers: int = ALL_LAYERS
    adapter_dir: Path | None = None
    most_adapters: int = 64
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    waiting: int = 512
    engine_flags: Mapping[str, Any] = field(default_factory=dict)
    prefix_caching: bool = True
    revision: str | None = None
    chat_template: str | None = None


def require_valid(options: Options) -> None:
    """Refuse what cannot be served so.

    Raises:
        UserError: Names the flag, and what to change.
    """
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
    if options.engine in ("lighten", "vllm") and options.gpu_layers != ALL_LAYERS:
        raise UserError(f"--gpu-layers is for --engine llamacpp, not for {options.engine}")
    if options.storage not in STORAGES:
        raise UserError(f"--storage {options.storage} is not known; use {', '.join(STORAGES)}")
    if not is_loopback(options.host) and not options.api_keys:
        raise UserError(
            f"--host {options.host} lets other machines in: give clients a key with --api-key "
            "(or LIGHTEN_API_KEY), or stay at 127.0.0.1"
        )
    if options.slots < 1 or (options.context is not None and options.context < 16):
        raise UserError("--max-num-seqs is at least 1 and --max-model-len at least 16")
    if options.waiting < 1 or (options.threads is not None and options.threads < 1):
        raise UserError("--max-waiting and --threads are at least 1")
    if not 0 <= options.port <= _LAST_PORT:
        raise UserError(f"--port {options.port} is none; ports go from 0, any free one, to 65535")
    if options.adapter_dir is not None and not options.adapter_dir.is_dir():
        raise UserError(f"--adapter-dir {options.adapter_dir} is no folder")


def context_of(options: Options, config: Any, name: str) -> int:
    """Tokens that a prompt may have with its answer.

    Args:
        options: How it is served.
        config: Of the base.
        name: Of the base.

    Raises:
        UserError: More are wanted than the base has positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or _CONTEXT
    context = options.context or min(positions, _CONTEXT)
    if context > positions:
        raise UserError(
            f"--max-model-len {context} is more than the {positions} positions of {name}"
        )
    return int(context)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def keys(flags: Iterable[str], variable: str) -> tuple[str, ...]:
    """Keys from flags and from an environment variable, which no list of processes shows.

    Raises:
        UserError: One is empty, as where a shell's variable was not set: none would be asked for.
    """
    flags = list(flags)
    if not all(word.strip() for word in flags):
        raise UserError(
            f"a key on the command line is empty; give one, set {variable}, or leave the flag out"
        )
    words = [*flags, *os.environ.get(variable, "").split(",")]
    return tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
