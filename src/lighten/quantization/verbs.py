"""Export, verify, push and quantize as functions, with the command line's names and meaning."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lighten.quantization.merged_model import Exported
    from lighten.quantization.table import Quantized
    from lighten.quantization.verify import Receipt
    from lighten.runs import Run


def export(
    source: Run | str | os.PathLike[str],
    form: str = "merged",
    *,
    adapter: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    onto: str | None = None,
    context_tokens: int | None = None,
    verify: bool = True,
    log: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write what was trained in a form that other software loads, with a receipt.

    Args:
        source: A run, an adapter's folder, a model's folder or a base's name.
        form: `adapter`, `merged`, `gguf`, `gguf:TYPE` such as `gguf:q8_0`, `gguf-adapter`, or
            `executorch` for a phone.
        adapter: Of a run with several, whose.
        output_dir: The folder to write; under `exports` when None.
        dtype: Of a merged model: `auto` (16 bits), `float32`, `bfloat16`, `float16`.
        onto: Where an adapter that learnt on a quantised base is added: `original` weights (when
            None), or those `dequantized` ones.
        context_tokens: Of a program for ExecuTorch: prompt and answer together; 1024 when None.
        verify: Compare its answers with those of what it was made from.
        log: Given a line about each part of the work.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.artifacts import open_source
    from lighten.path_checks import named_run
    from lighten.quantization import export as exports
    from lighten.streams import library_bars

    opened = open_source(named_run(source), adapter=adapter)
    target = None if output_dir is None else Path(output_dir)
    with library_bars():
        return exports.export(
            opened, form, target, dtype=dtype, onto=onto, context_tokens=context_tokens,
            receipt=verify, log=log,
        )  # fmt: skip


def verify(
    artefact: str | os.PathLike[str],
    against: Run | str | os.PathLike[str],
    *,
    adapter: str | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Receipt:
    """Compare an artefact's answers with those of what it was made from, and store the receipt.

    Args:
        artefact: An export's folder, a GGUF file, or an ExecuTorch program.
        against: A run, an adapter's folder, a model's folder or a base's name.
        adapter: Of a run with several, whose.
        log: Told at first where the receipt cannot be stored.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.artifacts import open_source
    from lighten.path_checks import named_run
    from lighten.quantization.receipts import verify_artefact
    from lighten.streams import library_bars

    with library_bars():
        source = open_source(named_run(against), adapter=adapter)
        return verify_artefact(Path(artefact), source, log)


def push(
    artefact: str | os.PathLike[str], repo_id: str, *, private: bool = True, force: bool = False
) -> str:
    """Upload an artefact to a hub's repository, after a look at it.

    Args:
        artefact: Its folder.
        repo_id: `owner/name` on the hub.
        private: A new repository is seen by its owner alone.
        force: Upload one whose receipt did not pass, too.

    Returns:
        Address of the commit.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.quantization.push import push as upload

    return upload(Path(artefact).expanduser(), repo_id, private=private, force=force)


def quantize(
    source: Run | str | os.PathLike[str],
    to: Sequence[str] | str,
    *,
    adapter: str | None = None,
    dataset: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    log: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Quantized:
    """Write smaller copies of a model, and measure all on the same held-out tokens.

    Args:
        source: A run, or a model by name.
        to: Formats: `int8`, `nf4`, `int4`, `gguf:q4_k_m`, … (see `targets`).
        adapter: Which adapter of the run, where it has several.
        dataset: Data to choose rounding by and to measure on; default the run's.
        output_dir: Each format is a folder in this; default `exports` of the run.
        log: Given a line about each part of the work.
        options: `tokens` and `questions`, the bounds of measuring.

    Returns:
        What `quantize.json` holds.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten import path_checks
    from lighten.quantization.targets import parse, require_tools

    require_tools(parse(to))
    checked_source = path_checks.source_of(source)
    from lighten.quantization.table import quantize as quantize_model

    target = None if output_dir is None else Path(output_dir).expanduser()
    return quantize_model(
        checked_source,
        to,
        adapter=adapter,
        dataset=dataset,
        output_dir=target,
        log=log,
        **options,
    )
