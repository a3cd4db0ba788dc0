"""The process that llama.cpp's server lives in: a crash there is no crash of the front.

Reads its settings from the first line of standard input, listens at its Unix socket, and ends when
standard input does: it never outlives the front. Signals are for the front alone, which finishes
answers first; one to all processes of a service (systemd's) comes here, too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any


def parameters(settings: dict[str, Any]) -> Any:
    """llama.cpp's parameters from ours."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.hostnames = [settings["socket"]]  # a name that ends with .sock is a Unix socket
    params.n_parallel = settings["slots"]
    params.n_ctx = settings["context"] * settings["slots"]
    params.kv_unified = False  # each answer has room of its own, whatever the others do
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.cpuparams.poll = params.cpuparams_batch.poll = settings["poll"]
    kinds = {"f16": xllamacpp.ggml_type.GGML_TYPE_F16, "f32": xllamacpp.ggml_type.GGML_TYPE_F32}
    params.cache_type_k = params.cache_type_v = kinds[settings["cache"]]
    if settings["cache"] == "f32":  # its flash attention rounds to float16 on the way
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers = settings["gpu_layers"]
    # llama.cpp would answer from the state of another adapter (its prompt cache in main memory
    # does not look at adapters); every request names the scale of every adapter, see `llamacpp`.
    params.cache_ram_mib = 0
    params.ctx_shift = False  # no silent forgetting of a long answer's beginning
    params.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in settings["adapters"]
    ]
    params.lora_init_without_apply = True
    params.warmup = True
    params.ui = False
    params.endpoint_slots = False
    params.verbosity = settings["verbosity"]
    for name, value in settings["flags"].items():
        setattr(params, name, value)
    return params


def main() -> None:
    """Serve until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    import xllamacpp

    settings = json.loads(sys.stdin.readline())

    def end_with_front() -> None:
        sys.stdin.read()
        os._exit(0)

    # While the model is loaded, too.
    watcher = threading.Thread(target=end_with_front)
    watcher.start()
    try:
        server = xllamacpp.Server(parameters(settings))
    except BaseException as error:
        print(f"FAILED {type(error).__name__}: {error}", flush=True)  # noqa: T201  # the front's log
        os._exit(1)
    watcher.join()
    del server


if __name__ == "__main__":
    main()
