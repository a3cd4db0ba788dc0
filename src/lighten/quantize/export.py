"""What was trained as files that other software loads, each with a receipt."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.artifacts import Artefact, copy_companions
from lighten.errors import UserError
from lighten.peft_config import CONFIG, WEIGHTS
from lighten.quantize import verify
from lighten.quantize.gguf_source import read_json
from lighten.quantize.merge import Unmergeable, merge
from lighten.quantize.verify import Receipt
from lighten.runs import whole_folder

FORMS = ("adapter", "merged", "gguf", "gguf-adapter")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODELFILE = "Modelfile"


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


def check(artefact: Artefact, form: str, dtype: str) -> tuple[str, str]:
    """The form and its type, before anything is read.

    Raises:
        UserError: There is no such form, or it needs an adapter, or a package is missing.
    """
    form, _, kind = form.lower().partition(":")
    if form not in FORMS:
        raise UserError(f"--as: {form!r} is not one of {', '.join(FORMS)} (gguf:TYPE too)")
    if dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if kind and form != "gguf":
        raise UserError(f"--as: {form} has no types; {form}:{kind} is not valid")
    if form in ("adapter", "gguf-adapter") and artefact.adapter is None:
        raise UserError(f"{artefact.name} has no adapter; export it --as merged or --as gguf")
    if form.startswith("gguf"):
        from lighten.quantize.gguf_file import require_gguf
        from lighten.quantize.gguf_types import file_type

        require_gguf()
        kind = kind or "f16"
        file_type(kind)
    return form, kind


def export(
    artefact: Artefact,
    form: str,
    target: Path | None = None,
    *,
    dtype: str = "auto",
    receipt: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write what was trained in a form that other software loads.

    Args:
        artefact: What.
        form: `adapter`, `merged`, `gguf` (f16), `gguf:TYPE` or `gguf-adapter`.
        target: Folder to write; None: under `exports` of the run, or of the current folder.
        dtype: Of a merged model.
        receipt: Compare its answers with those of what it was made from.
        tell: Given a line about each part of the work.

    Raises:
        UserError: The form is none, the adapter is of another base, a file is torn, a package is
            missing, or the disk is full. An older export stays.
    """
    form, kind = check(artefact, form, dtype)
    label = f"{form}-{kind}" if kind else form
    if target is None:
        root = artefact.run.folder if artefact.run is not None else Path.cwd()
        name = label if artefact.run is not None else f"{artefact.name}-{label}"
        target = root / "exports" / name
    target = target.expanduser()
    tell(f"writing {target}")
    made = _WRITERS[form](artefact, target, kind or dtype)
    if not receipt:
        return made
    tell("comparing its answers with those before")
    found = receipt_of(artefact, target, form, kind or dtype)
    verify.write_receipt(found, target)
    return Exported(made.folder, made.files, made.size_bytes, made.notes, found)


def _exported(folder: Path, pattern: str, notes: tuple[str, ...] = ()) -> Exported:
    files = tuple(sorted(folder.glob(pattern)))
    return Exported(folder, files, sum(file.stat().st_size for file in files), notes)


def _adapter(artefact: Artefact, target: Path, _: str) -> Exported:
    assert artefact.adapter is not None
    with whole_folder(target) as partial:
        copy_companions(artefact, partial)
        for name in (CONFIG, WEIGHTS, "README.md"):
            if (artefact.adapter / name).is_file():
                shutil.copyfile(artefact.adapter / name, partial / name)
    return _exported(target, "*.safetensors")


def _merged(artefact: Artefact, target: Path, dtype: str) -> Exported:
    notes: list[str] = []

    def beside(folder: Path) -> None:
        copy_companions(artefact, folder)
        (folder / "README.md").write_text(_card(artefact, notes), encoding="utf-8")

    if stored := artefact.facts.get("stored"):
        notes.append(
            f"the adapter was trained on the base in {stored} and is merged into its original "
            "weights; the receipt says how far the answers are from those of the adapter on them"
        )
    if artefact.adapter is None:
        with whole_folder(target) as partial:
            for path in artefact.base_folder.iterdir():
                if path.suffix == ".safetensors" or path.name.endswith(".index.json"):
                    shutil.copyfile(path, partial / path.name)
            shutil.copyfile(artefact.base_folder / "config.json", partial / "config.json")
            beside(partial)
        return _exported(target, "*.safetensors")
    try:
        merge(artefact.base_folder, artefact.adapter, target, dtype=dtype, beside=beside)
    except Unmergeable as why:
        notes.append(f"merged in memory by PEFT: {why}")
        _merge_in_memory(artefact, target, dtype, beside)
    return _exported(target, "*.safetensors", tuple(notes))


def _merge_in_memory(
    artefact: Artefact, target: Path, dtype: str, beside: Callable[[Path], None]
) -> None:
    """Through PEFT, for what only its own modules can merge; the whole model is in memory."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert artefact.adapter is not None
    stored = str(read_json(artefact.base_folder / "config.json").get("dtype") or "bfloat16")
    chosen = stored if dtype == "auto" else dtype
    if dtype == "auto" and chosen == "float32":
        chosen = "bfloat16"
    try:
        base = AutoModelForCausalLM.from_pretrained(
            artefact.base_folder, dtype=torch.float32, local_files_only=True
        )
        model: Any = PeftModel.from_pretrained(base, artefact.adapter)
        merged = model.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{artefact.adapter} cannot be merged: {first}") from error
    with whole_folder(target) as partial:
        merged.to(getattr(torch, chosen)).save_pretrained(partial)
        beside(partial)


@contextmanager
def model_folder(artefact: Artefact, near: Path) -> Iterator[Path]:
    """A folder with the artefact as one model: its own, or a merged one for as long as it is used.

    Args:
        artefact: What.
        near: A merged one is made beside this.
    """
    if artefact.adapter is None:
        yield artefact.base_folder
        return
    near.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=near.parent, prefix=".merged-") as scratch:
        folder = Path(scratch) / "model"
        _merged(artefact, folder, "auto")
        yield folder


def _gguf(artefact: Artefact, target: Path, kind: str) -> Exported:
    from lighten.quantize.gguf_model import write_gguf

    file_name = f"{artefact.name}.{kind}.gguf"
    with model_folder(artefact, target) as folder, whole_folder(target) as partial:
        plan = write_gguf(folder, partial / file_name, kind, name=artefact.name)
        _write_modelfile(folder, partial, file_name)
        card = _card(artefact, plan.sentences())
        (partial / "README.md").write_text(card, encoding="utf-8")
    return _exported(target, "*.gguf", tuple(plan.sentences()))


def _gguf_adapter(artefact: Artefact, target: Path, _: str) -> Exported:
    from transformers import AutoConfig

    from lighten.quantize.gguf_adapter import write_gguf_adapter

    assert artefact.adapter is not None
    file_name = f"{artefact.name}.adapter.gguf"
    with whole_folder(target) as partial:
        config = AutoConfig.from_pretrained(artefact.base_folder, local_files_only=True)
        write_gguf_adapter(artefact.adapter, config, partial / file_name)
        (partial / "README.md").write_text(_card(artefact, []), encoding="utf-8")
    note = "it goes on the base as GGUF: lighten export BASE --as gguf"
    return _exported(target, "*.gguf", (note,))


def _write_modelfile(folder: Path, partial: Path, file_name: str) -> None:
    from transformers import AutoTokenizer

    from lighten.quantize.gguf_source import read_settings
    from lighten.quantize.gguf_tokenizer import stop_texts
    from lighten.quantize.modelfile import modelfile

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    stops, adds_bos = stop_texts(folder, int(read_settings(folder)["vocab_size"]))
    text = modelfile(tokenizer, source=f"./{file_name}", stops=stops, adds_bos=adds_bos)
    (partial / MODELFILE).write_text(text, encoding="utf-8")


_WRITERS: dict[str, Callable[[Artefact, Path, str], Exported]] = {
    "adapter": _adapter, "merged": _merged, "gguf": _gguf, "gguf-adapter": _gguf_adapter,
}  # fmt: skip


def receipt_of(artefact: Artefact, target: Path, form: str, kind: str) -> Receipt:
    """Compare what was written with what it was made from.

    Args:
        artefact: What it was made from.
        target: The export's folder.
        form: Of the export.
        kind: Its type: a format of floating point, or of GGUF.
    """
    source = verify.InTransformers(artefact.base_folder, artefact.adapter, artefact.companions)
    prompts = verify.prompts_of(artefact, source.tokenizer)
    against = artefact.name
    if form in ("adapter", "merged"):
        if form == "merged":
            kind = _dtype_of(target)
            other = verify.InTransformers(target)
        else:
            kind = "adapter"
            other = verify.InTransformers(artefact.base_folder, target, target)
        return verify.compare(
            source, other, prompts, artefact=target.name, kind=kind, against=against
        )
    (file,) = target.glob("*.gguf")
    if form == "gguf":
        with verify.in_llamacpp(file) as opened:
            return verify.compare(
                source, opened, prompts, artefact=target.name, kind=kind, against=against
            )
    from lighten.quantize.gguf_model import write_gguf

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".base-") as scratch:
        base = Path(scratch) / "base.gguf"
        write_gguf(artefact.base_folder, base, "f32")
        with verify.in_llamacpp(base, file) as opened:
            return verify.compare(
                source, opened, prompts, artefact=target.name, kind="f16", against=against
            )


def verify_artefact(path: Path, against: Artefact) -> Receipt:
    """The receipt of files that are there already; it is stored beside them.

    Args:
        path: An export's folder, or a GGUF file.
        against: What it was made from.

    Raises:
        UserError: It is nothing that can be compared.
    """
    path = path.expanduser()
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if files:
        if len(files) > 1 or files[0].suffix != ".gguf":
            raise UserError(f"{path}: name one GGUF file, or an export's folder")
        from lighten.models.gguf_header import read_header

        facts = read_header(files[0]).settings
        if facts.get("general.type") == "adapter":
            found = receipt_of(against, folder, "gguf-adapter", "f16")
        else:
            kind = files[0].stem.rpartition(".")[2].lower()
            with _comparing(against) as (source, prompts), verify.in_llamacpp(files[0]) as opened:
                found = verify.compare(
                    source, opened, prompts, artefact=files[0].name, kind=kind,
                    against=against.name,
                )  # fmt: skip
    elif (path / CONFIG).is_file():
        found = receipt_of(against, path, "adapter", "adapter")
    elif (path / "config.json").is_file():
        found = receipt_of(against, path, "merged", "auto")
    else:
        raise UserError(f"{path} is neither a GGUF file nor a folder with a model or an adapter")
    verify.write_receipt(found, folder)
    return found


@contextmanager
def _comparing(against: Artefact) -> Iterator[tuple[verify.InTransformers, list[str]]]:
    source = verify.InTransformers(against.base_folder, against.adapter, against.companions)
    yield source, verify.prompts_of(against, source.tokenizer)


def _dtype_of(folder: Path) -> str:
    config = read_json(folder / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _card(artefact: Artefact, notes: list[str]) -> str:
    """A model card for the hub."""
    trained = ""
    if artefact.run is not None:
        checksum = artefact.facts.get("data_sha256")
        trained = f"\nTrained on `{artefact.facts['data']}`" + (
            f" (SHA-256 `{checksum}`).\n" if checksum else ".\n"
        )
    told = "".join(f"\n- {note}" for note in notes)
    return (
        f"---\nbase_model: {artefact.base}\ntags: [lighten]\n---\n\n# {artefact.name}\n\n"
        f"Made with lighten from `{artefact.base}`.\n{trained}{told}\n"
    )
