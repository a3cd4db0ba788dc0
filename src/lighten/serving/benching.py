"""The verb `bench serve`: loads, checks, a file of both, and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.machine.hardware import machine
from lighten.reporting.charts import Series, line_chart
from lighten.serving import checks
from lighten.serving.load import Load, Outcome, series
from lighten.serving.remote import Remote, ServerError
from lighten.whole_files import write_bytes

# The colours that the report's pages give to a chart; a picture of its own needs them, too.
_STYLE = (
    "<style>svg{font:12px system-ui,sans-serif;--series-1:#2b6cb0;--ink:var(--series-1);"
    "background:#fff}.series path{stroke:var(--ink);fill:none;stroke-width:2}.series circle{"
    "fill:var(--ink)}.grid{stroke:#ddd}.axis{stroke:#555}text{fill:#333}</style>"
)


def bench(
    url: str,
    *,
    key: str | None,
    output: Path | None,
    identity_requests: int,
    told: Callable[[str], None],
    **load: Any,
) -> dict[str, Any]:
    """Measure and check a server; see `lighten.bench_serve`.

    Raises:
        UserError: A setting of the load, or the server does not answer.
    """
    wanted = Load(**load)
    wanted.check()
    remote = Remote(url, key)
    models = list(remote.models())
    try:
        looked = checks.fields(remote, models[0])
        for own in looked:
            told(f"{'ok   ' if own.passed else 'FAILS'} {own.name}: {own.detail}")
        same = checks.identity(remote, models, requests=identity_requests) if models else None
    except ServerError as error:
        raise UserError(f"{remote.url}: {error}") from error
    if same is not None:
        told(f"identity: {same.same} of {same.requests} answers as alone, {same.rounding} with "
             f"rounding, {same.wrong} of another model")  # fmt: skip
    found = series(remote, wanted, lambda own: told(_line(own)))
    result = {
        "url": remote.url, "machine": machine().to_dict(), "load": asdict(wanted),
        "models": models, "checks": [asdict(own) for own in looked],
        "identity": None if same is None else asdict(same),
        "loads": [own.to_dict() for own in found],
    }  # fmt: skip
    if output is not None:
        write_bytes(output / "bench-serve.json", json.dumps(result, indent=2).encode() + b"\n")
        write_bytes(output / "bench-serve.svg", picture(found).encode())
    return result


def picture(found: Sequence[Outcome]) -> str:
    """Throughput against the number of adapters, as an SVG of its own."""
    shown = [own for own in found if own.what != "base and adapters"]
    counts = [0 if own.what == "base" else own.adapters for own in shown]
    line = Series("tokens/s", [float(n) for n in counts], [own.tokens_per_s for own in shown],
                  markers=True)  # fmt: skip
    drawn = line_chart(
        [line], title="Throughput against the number of adapters",
        x_label="adapters (0: the base)", y_label="tokens/s", from_zero=True,
    )  # fmt: skip
    svg = drawn[drawn.index("<svg") : drawn.index("</svg>") + 6]
    svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    head, _, rest = svg.partition(">")
    return f"{head}>{_STYLE}{rest}\n"


def _line(own: Outcome) -> str:
    first, between = own.first_token_s, own.between_tokens_s
    errors = sum(own.errors.values())
    return (
        f"{own.what}: {own.tokens_per_s:.1f} tokens/s, first text {_ms(first['p50'])} (p99 "
        f"{_ms(first['p99'])}), between {_ms(between['p50'])} (p99 {_ms(between['p99'])}), "
        f"{own.answered} answered, {errors} errors"
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"
