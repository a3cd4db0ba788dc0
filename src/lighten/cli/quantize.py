"""The verb `quantize`: parse, call the API, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lighten.cli.console import Json, console, print_json, print_table
from lighten.parallel import launch
from lighten.wording import typed

if TYPE_CHECKING:
    from lighten.quantization.table import Quantized

_Source = Annotated[str, typer.Argument(metavar="RUN | MODEL", help="What is made smaller.")]
_To = Annotated[
    str,
    typer.Option(
        help="Formats, with commas: int8 (torchao), int8:bitsandbytes (LLM.int8), nf4, int4 "
        "(GPTQ, on your data), int4:rounded, int8-dynamic-act-int4-weight (torchao, as qat "
        "trains for), gguf:q8_0, gguf:q4_k_m and other types."
    ),
]
_Adapter = Annotated[str | None, typer.Option(help="Which adapter of the run.")]
_Dataset = Annotated[
    str | None,
    typer.Option(help="Data to round for and to measure on; default the run's."),
]
_Output = Annotated[
    Path | None,
    typer.Option(help="Folder of them; default RUN/exports."),
]
_Tokens = Annotated[int, typer.Option(min=16, help="Held-out tokens measured on at most.")]
_Questions = Annotated[int, typer.Option(min=0, help="Held-out questions answered at most.")]


def quantize(
    source: _Source,
    to: _To = "int8,nf4,int4",
    adapter: _Adapter = None,
    dataset: _Dataset = None,
    output_dir: _Output = None,
    tokens: _Tokens = 2048,
    questions: _Questions = 16,
    as_json: Json = False,
) -> None:
    """Write smaller copies of a model, and one table of what each costs and keeps."""
    from lighten import api

    launch.require_alone("quantising", f"lighten quantize {typed(source)}")

    def log(line: str) -> None:
        typer.echo(line, err=True)

    result = api.quantize(
        source, to, adapter=adapter, dataset=dataset, output_dir=output_dir, tokens=tokens,
        questions=questions, log=log,
    )  # fmt: skip
    if as_json:
        print_json(result.to_dict())
    else:
        print_quantized(result)


def print_quantized(result: Quantized) -> None:
    """Print what each format costs and keeps, and where the files are."""
    rows = result.formats
    columns = [*COLUMNS, *((label, _metric(name)) for name, label in
                           result.settings["metrics"].items()), *COSTS]  # fmt: skip
    print_table(["format", *(row["name"].replace(":", ": ") for row in rows)],
                [[label, *(show(row) for row in rows)] for label, show in columns])  # fmt: skip
    for line in (f"measured {result.settings['mode']}", *result.notes):
        console().print(line, highlight=False)
    console().print(f"written under {result.folder}", soft_wrap=True, highlight=False)


def _number(key: str, shape: str, scale: float = 1.0) -> Any:
    def show(row: dict[str, Any]) -> str:
        value = row.get(key)
        return "–" if value is None else format(value / scale, shape)

    return show


def _perplexity(row: dict[str, Any]) -> str:
    if row.get("perplexity") is None:  # not measured, or no number when it was
        return "–"
    error = row["perplexity_standard_error"]
    return f"{row['perplexity']:.2f}" + ("" if error is None else f" ±{error:.2f}")


def _metric(name: str) -> Any:
    """Of the answers, with its standard error over the questions."""

    def show(row: dict[str, Any]) -> str:
        value = row.get("metrics", {}).get(name)
        if value is None:
            return "–"
        error = value["se"]
        return f"{value['value']:.1f}" + ("" if error is None else f" ±{error:.1f}")

    return show


COLUMNS = (
    ("file MB", _number("file_bytes", ",.1f", 1e6)),
    ("of bfloat16", _number("ratio", ".3f")),
    ("resident MB", _number("resident_bytes", ",.0f", 1e6)),
    ("perplexity", _perplexity),
    ("KL, nats", _number("kl", ".4f")),
    ("top-1 agreement", _number("top1_agreement", ".1%")),
)
COSTS = (
    ("prefill tokens/s", _number("prefill_tokens_per_second", ",.0f")),
    ("decode tokens/s", _number("decode_tokens_per_second", ",.1f")),
    ("made in s", _number("made_seconds", ",.1f")),
    ("peak MB of making", _number("made_peak_bytes", ",.0f", 1e6)),
    ("on the frontier", lambda row: "yes" if row["frontier"] else "no"),
)
