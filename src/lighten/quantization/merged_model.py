"""What was trained as one model: an adapter merged, tensor by tensor where that goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.artifacts import Artefact, added_words, copy_companions
from lighten.errors import UserError
from lighten.models.load import weight_files
from lighten.peft_config import WEIGHTS, read_config, tensor_shapes
from lighten.quantization.export_card import DEQUANTIZED, ONTO_KEY, ORIGINAL, card, write_manifest
from lighten.quantization.gguf_source import read_json
from lighten.quantization.merge import Unmergeable, in_float32, merge, require_range
from lighten.quantization.rounding import rounding_of
from lighten.runs import whole_folder
from lighten.safetensors_header import index_of
from lighten.whole_files import scratch_folder
from lighten.wording import first_line

if TYPE_CHECKING:
    from lighten.quantization.verify import Receipt

ONTO = (ORIGINAL, DEQUANTIZED)


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: Where.
        files: Its weights.
        size_bytes: Of those.
        notes: What is to be known of it.
        receipt: Whether it answers as before; None where that was not asked for.
    """

    folder: Path
    files: tuple[Path, ...]
    size_bytes: int
    notes: tuple[str, ...] = ()
    receipt: Receipt | None = None


def written(folder: Path, pattern: str, notes: tuple[str, ...] = ()) -> Exported:
    """What lies in a folder after an export."""
    files = tuple(sorted(folder.glob(pattern)))
    return Exported(folder, files, sum(file.stat().st_size for file in files), notes)


def merged(artefact: Artefact, target: Path, dtype: str, dequantized: bool) -> Exported:
    """Write a model folder: the base with the adapter in it, or the base as it is."""
    notes: list[str] = []
    onto = DEQUANTIZED if dequantized else ORIGINAL

    def add_companions(folder: Path) -> None:
        copy_companions(artefact, folder)
        if artefact.added_tokens and not (artefact.companions / "tokenizer.json").is_file():
            raise UserError(f"{artefact.companions} lacks its tokenizer; train or save it again")
        (folder / "README.md").write_text(card(artefact, notes), encoding="utf-8")
        write_manifest(artefact, folder, "merged", **onto_fact(artefact, dequantized))

    if artefact.stored is not None:
        alternative = next(choice for choice in ONTO if choice != onto)
        notes.append(
            f"the adapter learnt on {artefact.stored} weights and is merged onto the {onto} ones "
            f"(the other choice is --onto {alternative})"
        )
    if artefact.adapter is None:
        with whole_folder(target) as partial:
            index = index_of(artefact.base_folder)
            for path in (*weight_files(artefact.base_folder), *([index] if index else [])):
                shutil.copyfile(path, partial / path.name)
            shutil.copyfile(artefact.base_folder / "config.json", partial / "config.json")
            add_companions(partial)
        return written(target, "*.safetensors")
    try:
        notes += merge(
            artefact.base_folder, artefact.adapter, target, dtype=dtype, beside=add_companions,
            words=added_words(artefact), rounding=rounding_of(artefact) if dequantized else None,
        )  # fmt: skip
    except Unmergeable as why:
        if dequantized:
            raise UserError(
                f"{artefact.adapter} cannot be merged onto dequantized weights ({why}); use --onto "
                "original"
            ) from None
        notes.append(f"merged in memory by PEFT: {why}")
        _merge_in_memory(artefact, target, dtype, add_companions)
    return written(target, "*.safetensors", tuple(notes))


def onto_fact(artefact: Artefact, dequantized: bool) -> dict[str, str]:
    """For the manifest: what an adapter of a quantised base was merged onto."""
    if artefact.stored is None:
        return {}
    return {ONTO_KEY: DEQUANTIZED if dequantized else ORIGINAL}


def _merge_in_memory(
    artefact: Artefact, target: Path, dtype: str, add_companions: Callable[[Path], None]
) -> None:
    """Through PEFT, for what only its own modules can merge; the whole model is in memory."""
    import torch
    from peft import PeftModel

    from lighten.adapters.files import word_rows
    from lighten.models.vocabulary import grow
    from lighten.quantization.dense import dense_base, untie

    assert artefact.adapter is not None
    if read_config(artefact.adapter).get("layer_replication"):
        raise UserError(
            f"{artefact.adapter} cannot be merged: layers that layer_replication repeats share "
            "their weights, and each has another update"
        )
    config = read_json(artefact.base_folder / "config.json")
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype_name = stored if dtype == "auto" else dtype
    if dtype == "auto" and dtype_name == "float32":
        dtype_name = "bfloat16"
    try:
        base = dense_base(artefact.base_folder)
        brought = word_rows(base, tensor_shapes(artefact.adapter / WEIGHTS))
        grow(base, max(added_words(artefact), brought))
        untie(base, artefact.adapter)
        model: Any = PeftModel.from_pretrained(base, artefact.adapter)
        if not hasattr(model.base_model, "merge_and_unload"):
            raise UserError(
                f"{artefact.adapter} cannot be merged: {model.active_peft_config.peft_type.value} "
                "learns a prompt in front of the text and changes no weight; use it in PEFT"
            )
        whole = model.merge_and_unload(safe_merge=True)
    except UserError:
        raise  # in a sentence already
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"{artefact.adapter} cannot be merged: {first_line(error)}") from error
    kept = in_float32(artefact.base_folder, whole) if dtype == "auto" else frozenset()
    for name, weight in (*whole.named_parameters(), *whole.named_buffers()):
        if not weight.is_floating_point() or name in kept:
            continue
        require_range(weight.detach(), name, getattr(torch, dtype_name))
        weight.data = weight.data.to(getattr(torch, dtype_name))
    with whole_folder(target) as partial:
        whole.save_pretrained(partial)
        add_companions(partial)


@contextmanager
def model_folder(
    artefact: Artefact, sibling: Path, *, dequantized: bool = False, dtype: str = "auto"
) -> Iterator[Path]:
    """A folder with the artefact as one model: its own, or a merged one for as long as it is used.

    Args:
        artefact: What.
        sibling: A merged one is made beside this.
        dequantized: Merge onto the dequantised weights that the adapter learnt on.
        dtype: Of a merged one.
    """
    if artefact.adapter is None:
        yield artefact.base_folder
        return
    with scratch_folder(sibling.parent, "merged") as scratch:
        folder = scratch / "model"
        merged(artefact, folder, dtype, dequantized)
        yield folder
