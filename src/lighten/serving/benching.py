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
from lighten.serving.load import Load, Outcome, lengths, series
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
    log: Callable[[str], None],
    **load: Any,
) -> dict[str, Any]:
    """Measure and check a server; see `lighten.bench_serve`.

    Raises:
        UserError: A setting of the load, or the server does not answer.
    """
    settings = Load(**load)
    settings.check()
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output-dir {output} is a file; name a folder")
    remote = Remote(url, key)
    models = list(remote.models())
    if not models:
        raise UserError(f"{remote.url} lists no models")
    try:
        field_checks = checks.fields(remote, models[0])
        for check in field_checks:
            log(f"{'ok   ' if check.passed else 'FAILS'} {check.name}: {check.detail}")
        identity = checks.identity(remote, models, requests=identity_requests)
    except ServerError as error:
        raise UserError(f"{remote.url}: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{remote.url} does not answer as OpenAI's server: {error!r}") from error
    log(
        f"identity: {identity.same} of {identity.requests} answers as alone, "
        f"{identity.rounding} with rounding, {identity.wrong} of another model"
        + (
            f", {identity.unclear} of which nothing tells whose they are"
            if identity.unclear
            else ""
        )
    )
    outcomes = series(remote, settings, lambda outcome: log(_line(outcome, settings.rate)))
    differing = lengths(outcomes)
    if differing is not None:
        log(
            "these rates are not comparable: answers are "
            f"{differing[0]:.1f} to {differing[1]:.1f} tokens long on average, by load; a smaller "
            "--max-tokens, which all of them reach, makes them so"
        )
    result = {
        "url": remote.url, "machine": machine().to_dict(), "load": asdict(settings),
        "models": models, "checks": [asdict(check) for check in field_checks],
        "identity": asdict(identity),
        "comparable": differing is None,
        "loads": [outcome.to_dict() for outcome in outcomes],
    }  # fmt: skip
    if output is not None:
        write_bytes(output / "bench-serve.json", json.dumps(result, indent=2).encode() + b"\n")
        write_bytes(output / "bench-serve.svg", picture(outcomes).encode())
    return result


def picture(outcomes: Sequence[Outcome]) -> str:
    """Throughput against the number of adapters, as an SVG of its own."""
    plotted = [outcome for outcome in outcomes if outcome.what != "base and adapters"]
    counted = all(outcome.tokens is not None for outcome in plotted)
    label = "tokens/s" if counted else "parts of streams/s"
    line = Series(
        label, [float(outcome.adapters) for outcome in plotted],
        [outcome.tokens_per_s if counted else outcome.parts_per_s for outcome in plotted],
        markers=True,
    )  # fmt: skip
    chart = line_chart(
        [line], title="Throughput against the number of adapters",
        x_label="adapters (0: the base)", y_label=label, from_zero=True,
    )  # fmt: skip
    svg = chart[chart.index("<svg") : chart.index("</svg>") + 6]
    svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    head, _, rest = svg.partition(">")
    return f"{head}>{_STYLE}{rest}\n"


def _line(outcome: Outcome, rate: float | None) -> str:
    first, between = outcome.first_token_s, outcome.between_tokens_s
    errors = f"{sum(outcome.errors.values())} errors"
    if outcome.errors:
        errors += f", most often: {max(outcome.errors, key=outcome.errors.__getitem__)}"
    reached = outcome.sent_per_s
    sent = "" if reached is None else f"sent at {reached:.3g} per s of {rate:g}, "
    if outcome.tokens_per_s is None:
        throughput = f"{outcome.parts_per_s:.1f} parts of streams/s (the server counts no tokens)"
    else:
        throughput = f"{outcome.tokens_per_s:.1f} tokens/s"
    if outcome.tokens_per_answer is not None:
        throughput += f" ({outcome.tokens_per_answer:.1f} an answer)"
    return (
        f"{outcome.what}: {throughput}, first text {_ms(first['p50'])} (p99 "
        f"{_ms(first['p99'])}), between {_ms(between['p50'])} (p99 {_ms(between['p99'])}), "
        f"{sent}{outcome.answered} answered, {errors}"
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"
