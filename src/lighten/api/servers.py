"""The verbs of serving."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten import path_checks
from lighten.errors import UserError
from lighten.path_checks import RunLike
from lighten.wording import typed

if TYPE_CHECKING:
    from lighten.planning.serving import Serving
    from lighten.serving.options import Options
    from lighten.serving.sizing import Sizes


def serve(
    base: RunLike,
    *,
    log: Callable[[str], None] | None = None,
    adapter_dir: str | os.PathLike[str] | None = None,
    api_keys: Sequence[str] = (),
    admin_keys: Sequence[str] = (),
    **options: Any,
) -> None:
    """Serve a base and adapters at an OpenAI-compatible address until SIGTERM or Ctrl-C.

    `serve("smollm2-135m", adapters={"support": "runs/a"})`; running answers are finished first.

    Args:
        base: A model, or a run of full fine-tuning.
        log: Given a line about what is served and where; default: printed to standard error.
        adapter_dir: Folder that adapters may be loaded from at run time.
        api_keys: Of clients, beside those in `LIGHTEN_API_KEY`.
        admin_keys: For loading adapters, beside those in `LIGHTEN_ADMIN_KEY`.
        options: See `lighten.serving.options.Options`.

    Raises:
        UserError: Something the user can mend; an adapter cannot be served unmerged.
    """
    base = path_checks.text_of(base)
    path_checks.require_base(base)
    from lighten.serving import running

    running.serve(
        base, _options(adapter_dir, api_keys, admin_keys, options),
        log or (lambda line: print(line, file=sys.stderr)),  # noqa: T201
    )  # fmt: skip


def plan_server(base: RunLike, **options: Any) -> tuple[Sizes, Serving]:
    """What `serve` with the same settings will hold, and the memory of it; nothing is started.

    Args:
        base: As of `serve`; only its configuration is fetched.
        options: As of `serve`.

    Raises:
        UserError: It cannot be served so.
    """
    base = path_checks.text_of(base)
    path_checks.require_base(base)
    from lighten.machine import devices
    from lighten.planning.serve import serve as memory
    from lighten.serving.sizing import sizes

    planned = sizes(base, _options(
        options.pop("adapter_dir", None), options.pop("api_keys", ()),
        options.pop("admin_keys", ()), options,
    ))  # fmt: skip
    return planned, memory(
        planned.model, devices.named(planned.device), adapters=planned.adapters,
        rank=planned.rank, context=planned.context, concurrency=planned.slots,
        cache_bytes=planned.cache_number_bytes, weight_bytes=planned.base_bytes,
        adapter_bytes=planned.adapter_bytes, windows=planned.cache_has_windows,
        revision=options.get("revision"),
    )  # fmt: skip


def _options(
    adapter_dir: str | os.PathLike[str] | None, api_keys: Sequence[str],
    admin_keys: Sequence[str], options: dict[str, Any],
) -> Options:  # fmt: skip
    from lighten.serving.options import Options, keys

    if admin_keys and adapter_dir is None:
        raise UserError("--admin-key needs --adapter-dir FOLDER, which adapters are loaded from")
    every_admin_key = keys(admin_keys, "LIGHTEN_ADMIN_KEY")
    if adapter_dir is not None and not every_admin_key:
        raise UserError(
            "--adapter-dir is where adapters are loaded from at run time, which needs --admin-key "
            "(or LIGHTEN_ADMIN_KEY); to serve those in it from the start: "
            f"--adapters {typed(adapter_dir)}"
        )
    adapters = options.pop("adapters", ())
    if isinstance(adapters, str):
        adapters = (adapters,)
    named = (
        {name: path_checks.text_of(source) for name, source in adapters.items()}
        if isinstance(adapters, Mapping)
        else tuple(map(path_checks.text_of, adapters))
    )
    return Options(
        adapters=named,
        adapter_dir=None if adapter_dir is None else Path(adapter_dir).expanduser(),
        api_keys=keys(api_keys, "LIGHTEN_API_KEY"),
        admin_keys=every_admin_key,
        **options,
    )


def bench_serve(
    url: str,
    *,
    key: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    identity_requests: int = 64,
    log: Callable[[str], None] | None = None,
    **load: Any,
) -> dict[str, Any]:
    """Load a server from many clients, and check that its answers are right.

    Args:
        url: Of an OpenAI-compatible server, ours or another.
        key: Of the server.
        output_dir: Where `bench-serve.json` and `bench-serve.svg` go; None: nowhere.
        identity_requests: Answers that are compared with those of the same model asked alone.
        log: Given a line about each part when it is measured.
        load: See `lighten.serving.load.Load`.

    Returns:
        What was measured (`loads`, and whether their rates are `comparable`), and what was checked
        (`checks`, `identity`).

    Raises:
        UserError: Something the user can mend; the server does not answer.
    """
    from lighten.serving import benching

    target = None if output_dir is None else Path(output_dir).expanduser()
    return benching.bench(
        url, key=key, output=target, identity_requests=identity_requests,
        log=log or (lambda _: None), **load,
    )  # fmt: skip
