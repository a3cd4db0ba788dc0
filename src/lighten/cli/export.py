"""The commands `lighten export` and `lighten verify`: parse, call the API, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lighten.cli.console import Json, console, print_json
from lighten.cli.plan import CANNOT_TELL

if TYPE_CHECKING:
    from lighten.quantization.verify import Receipt

_Source = Annotated[
    str,
    typer.Argument(metavar="RUN|ADAPTER|MODEL", help="A run, an adapter's folder, or a model."),
]
_Form = Annotated[
    str,
    typer.Option(
        "--as",
        help="merged, adapter, gguf (16 bits), gguf:TYPE such as gguf:q8_0, gguf-adapter, "
        "executorch (for a phone).",
    ),
]
_Adapter = Annotated[str | None, typer.Option(help="Which, of a run with several.")]
_Folder = Annotated[
    Path | None, typer.Option("--output_dir", help="Folder to write; default under exports/.")
]
_Dtype = Annotated[
    str, typer.Option(help="Of a merged model: auto (16 bits), float32, bfloat16, float16.")
]
_Onto = Annotated[
    str | None,
    typer.Option(
        help="Weights that an adapter of a quantised base is merged onto: original (default), "
        "or dequantized: those that it learnt on."
    ),
]
_Context = Annotated[
    int | None,
    typer.Option(
        help="Of executorch: tokens of prompt and answer together; default 1024.",
    ),
]  # fmt: skip
_Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare its answers with those before.")
]
DIFFERS = 1  # exit code of an artefact that does not answer as it may


def export(
    source: _Source,
    form: _Form = "merged",
    adapter: _Adapter = None,
    output_dir: _Folder = None,
    dtype: _Dtype = "auto",
    onto: _Onto = None,
    context_tokens: _Context = None,
    verify: _Verify = True,
    as_json: Json = False,
) -> None:
    """Write what was trained in a form that other software loads, with a receipt."""

    def log(line: str) -> None:
        if not as_json:
            console().print(line, highlight=False)

    from lighten import api

    artefact = api.export(
        source,
        form,
        adapter=adapter,
        output_dir=output_dir,
        dtype=dtype,
        onto=onto,
        context_tokens=context_tokens,
        verify=verify,
        log=log,
    )
    if as_json:
        print_json(
            {
                "folder": str(artefact.folder),
                "files": [str(file) for file in artefact.files],
                "size_bytes": artefact.size_bytes,
                "notes": list(artefact.notes),
                "receipt": artefact.receipt.to_dict() if artefact.receipt else None,
            }
        )
    else:
        for file in artefact.files:
            size = file.stat().st_size / 1e6
            console().print(f"{file}: {size:,.1f} MB", highlight=False, soft_wrap=True)
        for note in artefact.notes:
            console().print(note, highlight=False)
    _tell_receipt(artefact.receipt, quiet=as_json)


def verify(
    artefact: Annotated[
        Path, typer.Argument(help="An export's folder, a GGUF file or an ExecuTorch program.")
    ],
    against: Annotated[str, typer.Option(help="The run, adapter or model that it was made from.")],
    adapter: _Adapter = None,
    as_json: Json = False,
) -> None:
    """Compare an artefact's answers with those of what it was made from: the receipt."""
    from lighten import api

    receipt = api.verify(
        artefact, against, adapter=adapter, log=lambda line: typer.echo(line, err=True)
    )
    if as_json:
        print_json(receipt.to_dict())
    _tell_receipt(receipt, quiet=as_json)


def push(
    artefact: Annotated[Path, typer.Argument(help="An export's folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub.")],
    public: Annotated[bool, typer.Option("--public", help="A new repository is public.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also one whose receipt did not pass.")
    ] = False,
) -> None:
    """Upload an artefact to a hub's repository: private, without pickles, looked at before."""
    from lighten import api

    address = api.push(artefact, repo_id, private=not public, force=force)
    console().print(f"uploaded: {address}", soft_wrap=True, highlight=False)


def _tell_receipt(receipt: Receipt | None, *, quiet: bool) -> None:
    """Print a receipt; one that did not pass ends the command with an exit code of its own.

    Where it cannot tell, that is `plan`'s of the same name.
    """
    if receipt is None:
        return
    if not quiet:
        console().print(receipt.sentence(), highlight=False)
    if not receipt.passed:
        raise typer.Exit(CANNOT_TELL if receipt.passed is None else DIFFERS)
