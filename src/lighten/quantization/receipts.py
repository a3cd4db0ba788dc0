"""Receipts of artefacts: each kind opened in its runtime, beside what it was made from."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lighten.artifacts import Artefact, added_words
from lighten.errors import UserError
from lighten.peft_config import CONFIG
from lighten.quantization import executorch, verify
from lighten.quantization.executorch_rounding import ROUNDED, ProgramRounding
from lighten.quantization.export_card import DEQUANTIZED, MANIFEST, ONTO_KEY
from lighten.quantization.gguf_source import read_json
from lighten.quantization.gguf_types import FILE_TYPES
from lighten.quantization.merged_model import model_folder
from lighten.quantization.questions import Questions, questions_of, texts_of
from lighten.quantization.room import require_receipt_room
from lighten.quantization.rounding import rounding_of
from lighten.quantization.runtime_loss import runtime_loss
from lighten.quantization.verify import Receipt
from lighten.whole_files import is_writable, scratch_folder


def receipt_of(
    artefact: Artefact, target: Path, form: str, kind: str, dequantized: bool = False,
    rounded: Path | None = None,
) -> Receipt:  # fmt: skip
    """Compare what was written with what it was made from.

    Args:
        artefact: What it was made from.
        target: The export's folder.
        form: Of the export.
        kind: Its type: a format of floating point, or of GGUF.
        dequantized: It holds the adapter on the weights that it learnt on, and not on those that
            these were quantised from.
        rounded: Of a program: its rounded weights as its making kept them; None: they are computed
            again.
    """
    source, questions = _source_of(artefact, dequantized)
    against = _against(artefact, dequantized)
    if form in ("adapter", "merged"):
        if form == "merged":
            kind = _dtype_of(target)
            exported = verify.InTransformers(target)
        else:
            kind = "adapter"
            exported = verify.InTransformers(
                artefact.base_folder, target, target, words=added_words(artefact)
            )
        return verify.compare(
            source, exported, questions, artefact=target.name, kind=kind, against=against
        )
    if form == "executorch":
        (file,) = target.glob(f"*{executorch.SUFFIX}")
        return _of_program(artefact, file, source, questions, dequantized, rounded)
    (file,) = target.glob("*.gguf")
    if form == "gguf":
        with verify.in_llamacpp(file) as opened:
            return verify.compare(
                source, opened, questions, artefact=target.name, kind=kind, against=against
            )
    return _of_gguf_adapter(artefact, file, source, questions, target.name)


def _of_gguf_adapter(
    artefact: Artefact, file: Path, source: verify.InTransformers, questions: Questions, name: str
) -> Receipt:
    """A GGUF adapter on its base in float32, which is written for as long as that takes."""
    from lighten.quantization.gguf_model import write_gguf

    with _scratch(file.parent.parent, "base") as scratch:
        base = scratch / "base.gguf"
        write_gguf(artefact.base_folder, base, "f32")
        with verify.in_llamacpp(base, file) as opened:
            return verify.compare(
                source, opened, questions, artefact=name, kind="f16",
                against=_against(artefact, False),
            )  # fmt: skip


def _of_program(
    artefact: Artefact, file: Path, source: verify.InTransformers, questions: Questions,
    dequantized: bool, rounded: Path | None = None,
) -> Receipt:  # fmt: skip
    """A program beside its model, and beside the same rounding in PyTorch.

    What the rounding costs is measured against the model; what the runtime adds to it, apart and
    on more tokens. A run with `qat` learnt rounded, and never answered otherwise.
    """
    rounding, record, _ = executorch.program_rounding(artefact)
    manifest = file.parent / MANIFEST
    # Of other data than there are now the rounding cannot be computed again.
    reproducible = manifest.is_file() and read_json(manifest).get("rounding") == record
    if reproducible and rounded is None:
        require_receipt_room(artefact, "executorch", _place(file.parent))
    with executorch.running(file, source.tokenizer) as program:
        if rounding.learnt_in is not None:
            round_as_learnt(source, rounding.group_size, rounding.learnt_in)
        receipt = verify.compare(
            source, program, questions, artefact=file.name, kind="executorch",
            against=_against(artefact, dequantized), context_tokens=program.positions,
        )  # fmt: skip
        if not reproducible:
            return receipt
        if rounding.learnt_in is not None:
            source.release()  # what rounding loses is measured from unrounded weights
        with _rounded_weights(artefact, file, dequantized, rounding, rounded) as weights:
            reference = _in_transformers(artefact, dequantized)
            if artefact.adapter is not None:
                reference.model = reference.model.merge_and_unload()
            rounding.apply(reference.model, weights)
        texts = texts_of(artefact, source.tokenizer)
        longest = min(verify.LONGEST, program.positions)
        added = runtime_loss(source, reference, program, texts, longest)
    return dataclasses.replace(receipt, runtime=added)


def round_as_learnt(source: verify.InTransformers, group_size: int, learnt_in: str) -> None:
    """Let a model compute as in its quantisation-aware training, until it is released.

    Args:
        source: What was trained.
        group_size: Numbers of a row that share a scale.
        learnt_in: Format in which weights were rounded.
    """
    import torch

    from lighten.adapters.fake_quant import fake_quantise

    model = source.model
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    fake_quantise(model, group_size, computes=getattr(torch, learnt_in))
    source.model = model


@contextmanager
def _rounded_weights(
    artefact: Artefact, file: Path, dequantized: bool, rounding: ProgramRounding,
    rounded: Path | None,
) -> Iterator[Path]:  # fmt: skip
    """The weights that a program was given: as kept, else computed again just as they were.

    Rounding by data turns a difference in the last bit into other integers, so it starts from the
    same files, in a process like the export's.
    """
    if rounded is not None:
        yield rounded
        return
    with _scratch(file.parent, "rounded") as scratch:
        weights = scratch / ROUNDED
        with model_folder(
            artefact, scratch / "model", dequantized=dequantized, dtype="float32"
        ) as folder:
            executorch.write_rounding(folder, rounding, weights)
        yield weights


def _place(folder: Path) -> Path:
    """Where a receipt's own files are written: there, or among the system's temporary ones."""
    return folder if is_writable(folder) else Path(tempfile.gettempdir())


@contextmanager
def _scratch(folder: Path, name: str) -> Iterator[Path]:
    """A folder for a receipt's own files, see `_place`."""
    if is_writable(folder):
        with scratch_folder(folder, name) as scratch:
            yield scratch
    else:
        with tempfile.TemporaryDirectory(prefix="lighten-") as temporary:
            yield Path(temporary)


def verify_artefact(
    path: Path, against: Artefact, log: Callable[[str], None] = lambda _: None
) -> Receipt:
    """The receipt of files that are there already; it is stored beside them.

    Args:
        path: An export's folder, a GGUF file, or an ExecuTorch program.
        against: What it was made from.
        log: Told at first where the receipt cannot be stored, as on a disk that is only read.

    Raises:
        UserError: It is nothing that can be compared.
    """
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; name an export's folder or its file")
    folder = path if path.is_dir() else path.parent
    is_stored = is_writable(folder)
    if not is_stored:
        log(f"{folder} cannot be written to: the receipt is shown and not stored")
    pattern, dequantized = f"*{executorch.SUFFIX}", _is_dequantized(against, folder)
    programs = [path] if path.suffix == executorch.SUFFIX else sorted(path.glob(pattern))
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(programs) == 1:
        executorch.require_whole(programs[0])
        receipt = _of_program(against, programs[0], *_source_of(against, dequantized), dequantized)
    elif files:
        if len(files) > 1 or files[0].suffix != ".gguf":
            raise UserError(f"{path}: name one GGUF file or program, or an export's folder")
        from lighten.models.gguf_header import read_header

        facts = read_header(files[0]).settings
        if facts.get("general.type") == "adapter":
            require_receipt_room(against, "gguf-adapter", _place(folder.parent))
            parts = _source_of(against, False)
            receipt = _of_gguf_adapter(against, files[0], *parts, files[0].name)
        else:
            kind = _gguf_type(facts, files[0])
            source, questions = _source_of(against, dequantized)
            with verify.in_llamacpp(files[0]) as opened:
                receipt = verify.compare(
                    source, opened, questions, artefact=files[0].name, kind=kind,
                    against=_against(against, dequantized),
                )  # fmt: skip
    elif (path / CONFIG).is_file():
        receipt = receipt_of(against, path, "adapter", "adapter")
    elif (path / "config.json").is_file():
        receipt = receipt_of(against, path, "merged", "auto", dequantized)
    else:
        raise UserError(
            f"{path} is no GGUF file, no program and no folder with a model or an adapter"
        )
    if is_stored:
        verify.write_receipt(receipt, folder)
    return receipt


def _source_of(against: Artefact, dequantized: bool) -> tuple[verify.InTransformers, Questions]:
    """What an artefact is compared with, in memory, and what both are asked."""
    source = _in_transformers(against, dequantized)
    return source, questions_of(against, source.tokenizer)


def _in_transformers(artefact: Artefact, dequantized: bool) -> verify.InTransformers:
    return verify.InTransformers(
        artefact.base_folder, artefact.adapter, artefact.companions,
        rounding_of(artefact) if dequantized else None, added_words(artefact),
    )  # fmt: skip


def _is_dequantized(against: Artefact, folder: Path) -> bool:
    """Whether an export's manifest says that it holds the dequantised weights of training."""
    path = folder / MANIFEST
    if against.stored is None or not path.is_file():
        return False
    return bool(read_json(path).get(ONTO_KEY) == DEQUANTIZED)


def _against(artefact: Artefact, dequantized: bool) -> str:
    return f"{artefact.name} on its dequantized base" if dequantized else artefact.name


def _gguf_type(facts: Mapping[str, Any], file: Path) -> str:
    """A GGUF file's type as its header says, whatever it is called."""
    number = facts.get("general.file_type")
    names = (entry.name for entry in FILE_TYPES.values() if entry.number == number)
    return next(names, file.stem.rpartition(".")[2].lower())


def _dtype_of(folder: Path) -> str:
    """How a model folder's weights are stored: what `verify.ALLOWED` names."""
    config = read_json(folder / "config.json")
    stored = config.get("quantization_config")
    if isinstance(stored, dict):
        if stored.get("load_in_4bit"):
            return str(stored.get("bnb_4bit_quant_type") or "nf4")
        text = json.dumps(stored)  # llm-compressor: `num_bits`, of groups of layers
        return "int4" if 'bits": 4' in text or "int4" in text else "int8"
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
