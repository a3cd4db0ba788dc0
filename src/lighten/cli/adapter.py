"""The verbs `adapter info` and `adapter resize`: call the API, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lighten.cli.console import Json, console, print_json, print_table
from lighten.wording import counted

adapter_app = typer.Typer(
    no_args_is_help=True, help="Look at an adapter's rank, or write it at a lower one."
)
_Target = Annotated[str, typer.Argument(metavar="RUN | FOLDER", help="A run, or an adapter.")]
_Adapter = Annotated[str | None, typer.Option(help="Which adapter of the run.")]


@adapter_app.command()
def info(
    target: _Target,
    adapter: _Adapter = None,
    layers: Annotated[bool, typer.Option("--layers", help="A row for each layer.")] = False,
    as_json: Json = False,
) -> None:
    """Rank, alpha, targets, size, and how much of its rank it uses; --layers: each layer."""
    from lighten import api

    details = api.adapter_info(target, adapter=adapter)
    if as_json:
        print_json(details)
        return
    facts = _facts(details)
    print_table(["adapter", ""], facts)
    if not layers:
        console().print(
            f"{counted(len(details['layers']), 'layer')}; a row for each: --layers", highlight=False
        )
        return
    rows = [
        [layer["path"], str(layer["rank"]), f"{layer['effective_rank']:.1f}", str(layer["rank_90"]),
         str(layer["rank_99"]), f"{layer['norm']:.3g}"]
        for layer in details["layers"]
    ]  # fmt: skip
    print_table(["layer", "rank", "used", "for 90 %", "for 99 %", "norm"], rows)
    console().print(
        "used: effective rank, exp of the entropy of the singular values (Roy and Vetterli); for "
        "90 %: the rank that keeps so much of the update's energy, the sum of their squares",
        highlight=False,
    )
    # The rows of a large model scroll the summary out of sight.
    console().print(": ".join(facts[-1]), highlight=False)


def _facts(details: dict[str, Any]) -> list[list[str]]:
    targets = details["target_modules"]
    root = "sqrt(r)" if details["use_rslora"] else "r"
    return [
        ["folder", details["folder"]],
        ["base", details["base_model"] or "not said"],
        ["rank", f"{details['r']}, at most {details['largest_rank']} in a layer"],
        ["alpha", f"{details['lora_alpha']:g}, divided by {root}"],
        ["targets", targets if isinstance(targets, str) else ", ".join(targets)],
        ["trained whole", ", ".join(details["modules_to_save"]) or "nothing"],
        ["parameters", f"{details['parameters']:,}"],
        ["file", f"{details['file_bytes'] / 1e6:,.1f} MB"],
        ["rank used", f"{details['effective_rank_mean']:.1f} on average; rank "
                      f"{details['rank_90_max']} keeps 90 % and rank {details['rank_99_max']} 99 % "
                      "of every layer's update"],
    ]  # fmt: skip


@adapter_app.command()
def resize(
    target: _Target,
    rank: Annotated[int, typer.Option(help="The highest rank that a layer keeps.")],
    adapter: _Adapter = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where to write it.")] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter at a lower rank, each layer's best approximation, in PEFT's format."""
    from lighten import api

    folder, resized = api.resize_adapter(target, rank, adapter=adapter, output_dir=output_dir)
    facts = resized.facts()
    if as_json:
        print_json({"folder": str(folder), **facts})
        return
    worst = facts["worst_layer"]
    print_table(
        ["resized", ""],
        [
            ["rank", _cut(facts, len(resized.cuts), rank)],
            ["alpha", f"{facts['lora_alpha']:g}"],
            ["parameters", f"{facts['parameters']:,}"],
            ["energy kept", f"{facts['energy_kept']:.2%} of the update's squared norm"],
            ["error", f"{facts['error']:.2e} of its norm; {worst['error']:.2e} in {worst['path']}, "
                      "the worst layer"],
        ],
    )  # fmt: skip
    if facts["left_behind"]:
        console().print(
            f"not copied, for they belong to no adapter: {', '.join(facts['left_behind'])}",
            highlight=False,
        )
    console().print(f"adapter: {folder}", soft_wrap=True, highlight=False)


def _cut(facts: dict[str, Any], layers: int, rank: int) -> str:
    if not facts["layers_cut"]:
        return f"{facts['largest_rank']}, nothing cut: no layer is over rank {rank}"
    return f"{facts['r']}, {facts['layers_cut']} of {layers} layers cut"
