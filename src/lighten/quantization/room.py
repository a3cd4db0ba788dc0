"""Room on the disk for what will be written, by the model's shapes alone: no weight is read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lighten.artifacts import Artefact, added_words, copy_companions
from lighten.errors import UserError
from lighten.machine.disk import require_room
from lighten.quantization.gguf_source import Weight, read_settings, read_weights
from lighten.quantization.gguf_types import gguf_merge_dtype
from lighten.quantization.targets import GROUP_SIZE

# Of a program's weight: 4 bits and its share of a scale in bfloat16.
_PROGRAM_BYTES = 0.5 + 2 / GROUP_SIZE


def require_export_room(
    artefact: Artefact, form: str, kind: str, target: Path, receipt: bool = True
) -> None:
    """The disk has room for an export, and for the merged model that it is made from.

    Args:
        artefact: What is exported.
        form: `merged`, `gguf` or `executorch`.
        kind: Type of a GGUF file, or format of a merged model.
        target: The folder to write.
        receipt: One is taken afterwards; until then a program's rounded weights are kept.

    Raises:
        UserError: The model cannot have this form.
        DiskFull: The disk has not.
    """
    with described(artefact) as (folder, weights):
        numbers = sum(weight.numbers for weight in weights.values())
        merged = 0 if artefact.adapter is None or form == "merged" else 2 * numbers
        if form == "gguf":
            from lighten.quantization.gguf_model import file_bytes

            size = file_bytes(folder, kind, name=artefact.name, weights=weights)
            merged *= 2 if gguf_merge_dtype(kind) == "float32" else 1
        elif form == "executorch":
            program, kept = _program_bytes(folder, weights)
            size, merged = program + (kept if receipt else 0), 2 * merged
        elif artefact.adapter is None:
            size = sum(map(tensor_bytes, weights.values()))
        else:
            size = numbers * (4 if kind == "float32" else 2)
    require_room(target, size + merged, f"exporting {artefact.name} as {form}")


def require_receipt_room(artefact: Artefact, form: str, folder: Path) -> None:
    """The disk has room for what a receipt is computed with, until it is there.

    Args:
        artefact: What the receipt's artefact was made from.
        form: `gguf-adapter`: the base in float32; or `executorch`: the rounded weights, computed
            again from a merged model.
        folder: Beside the files or of them: where that is written.

    Raises:
        UserError: The model cannot have this form.
        DiskFull: The disk has not.
    """
    if form == "gguf-adapter":
        from lighten.quantization.gguf_model import file_bytes

        size = file_bytes(artefact.base_folder, "f32")
    else:
        with described(artefact) as (description, weights):
            size = _program_bytes(description, weights)[1]
            if artefact.adapter is not None:
                size += 4 * sum(weight.numbers for weight in weights.values())
    require_room(
        folder, size, f"comparing {artefact.name} as {form}", way_out="free some space there"
    )


def _program_bytes(folder: Path, weights: Mapping[str, Weight]) -> tuple[int, int]:
    """Of a program for a phone, and of its rounded weights as they are kept until its receipt.

    Words to look up and head have 8 bits, tied or not; kept weights have a byte, scales four.
    """
    words = int(read_settings(folder)["vocab_size"])
    tables = [weight.numbers for weight in weights.values() if weight.shape[:1] == (words,)]
    layers = sum(weight.numbers for weight in weights.values()) - sum(tables)
    twice = 2 * max(tables, default=0)
    return twice + int(_PROGRAM_BYTES * layers), twice + int((1 + 4 / GROUP_SIZE) * layers)


@contextmanager
def described(artefact: Artefact) -> Iterator[tuple[Path, dict[str, Weight]]]:
    """Configuration and tokenizer of the model that will be quantised, and its tensors' shapes."""
    if artefact.adapter is None:
        yield artefact.base_folder, read_weights(artefact.base_folder)
        return
    from lighten.quantization.merge import Unmergeable, merged_shapes

    with tempfile.TemporaryDirectory(prefix="lighten-plan-") as scratch:
        folder = Path(scratch)
        shutil.copyfile(artefact.base_folder / "config.json", folder / "config.json")
        copy_companions(artefact, folder)
        try:
            weights = merged_shapes(
                artefact.base_folder, artefact.adapter, folder, words=added_words(artefact)
            )
        except Unmergeable:  # in memory, by PEFT: of the base's own shapes
            weights = _dense_weights(artefact.base_folder, folder)
        try:
            yield folder, weights
        except UserError as error:
            if str(folder) not in str(error):
                raise
            # It is of the plan alone: nobody has seen it.
            raise UserError(str(error).replace(str(folder), artefact.name)) from error


def _dense_weights(base: Path, folder: Path) -> dict[str, Weight]:
    """Weights of a base that is merged in memory; one in few bits is dequantised for it.

    Args:
        base: Where it is.
        folder: With its configuration, which becomes that of the dense model.
    """
    from lighten.models.describe import skeleton
    from lighten.models.stored import stored_as

    if stored_as(base) is None:
        return read_weights(base)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["quantization_config"]
    file.write_text(json.dumps(config), encoding="utf-8")
    parameters = skeleton(str(folder)).named_parameters()  # each once
    return {name: Weight(file, "BF16", tuple(p.shape), 0) for name, p in parameters}


def tensor_bytes(weight: Weight) -> int:
    """Bytes of a tensor as its file has it."""
    return weight.numbers * {"F32": 4, "F64": 8}.get(weight.kind, 2)
