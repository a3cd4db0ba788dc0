"""What was trained as files that other software loads, each with a receipt."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lighten.artifacts import Artefact, copy_companions, new_tokens
from lighten.errors import UserError
from lighten.models.load import weight_files
from lighten.peft_config import CONFIG, WEIGHTS, read_config, tensor_shapes
from lighten.quantization import executorch, verify
from lighten.quantization.executorch_rounding import ROUNDED
from lighten.quantization.export_card import (
    DEQUANTIZED,
    MANIFEST,
    card,
    is_measured,
    require_replaceable,
    require_same_gguf,
    write_manifest,
)
from lighten.quantization.gguf_source import read_json
from lighten.quantization.gguf_types import gguf_merge_dtype
from lighten.quantization.merged_model import (
    ONTO,
    Exported,
    merged,
    model_folder,
    onto_fact,
    written,
)
from lighten.quantization.model_source import refuse_quantized
from lighten.quantization.receipts import receipt_of
from lighten.quantization.room import require_export_room, require_receipt_room
from lighten.runs import whole_folder, write_json
from lighten.whole_files import scratch_folder
from lighten.wording import typed

FORMS = ("adapter", "merged", "gguf", "gguf-adapter", "executorch")
MERGED = ("merged", "gguf", "executorch")  # the forms that an adapter is merged for
FEWEST = 16  # positions of a program
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODELFILE = "Modelfile"


def check(
    artefact: Artefact, form: str, dtype: str, onto: str | None, context_tokens: int | None = None
) -> tuple[str, str]:
    """The form and its type, before anything is read; a program's type is its context.

    Raises:
        UserError: There is no such form, or it needs an adapter, the adapter has no weights in
            safetensors, or a package is missing.
    """
    form, _, kind = form.lower().partition(":")
    if form not in FORMS:
        raise UserError(f"--as: {form!r} is not one of {', '.join(FORMS)} (gguf:TYPE too)")
    if dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if dtype != "auto" and form != "merged":
        raise UserError(f"--dtype {dtype} is of --as merged; {form} has no use for it")
    if dtype != "auto" and artefact.adapter is None:
        raise UserError(
            f"--dtype {dtype} is of a merged adapter; {artefact.name} has none, and its weights "
            "are copied as they are: leave --dtype out"
        )
    if kind and form != "gguf":
        raise UserError(f"--as: {form} has no types; {form}:{kind} is not valid")
    if onto is not None and onto not in ONTO:
        raise UserError(f"--onto: {onto!r} is not one of {', '.join(ONTO)}")
    if onto is not None and (artefact.stored is None or form not in MERGED):
        raise UserError(
            f"--onto: {artefact.name} did not learn on a quantised base, or is not merged"
        )
    if form in ("adapter", "gguf-adapter") and artefact.adapter is None:
        raise UserError(f"{artefact.name} has no adapter; export it --as merged or --as gguf")
    if form == "adapter" and artefact.adapter is not None:
        tensor_shapes(artefact.adapter / WEIGHTS)
    if form == "gguf-adapter" and (tokens := new_tokens(artefact)):
        raise UserError(
            f"{artefact.name} brings new tokens ({', '.join(tokens[:3])}), which the base as GGUF "
            "would read as pieces; merge it into the model instead: --as merged (or --as gguf)"
        )
    if form.startswith("gguf"):
        from lighten.quantization.gguf_file import require_gguf
        from lighten.quantization.gguf_types import file_type

        require_gguf()
        kind = kind or "f16"
        file_type(kind)
    if context_tokens is not None and form != "executorch":
        raise UserError(f"--context_tokens is of executorch; {form} has the model's own context")
    if form == "executorch":
        executorch.require()
        if artefact.adapter is None:
            refuse_quantized(artefact.base, artefact.base_folder)
        kind = str(executorch.CONTEXT if context_tokens is None else context_tokens)
        if int(kind) < FEWEST:
            raise UserError(f"--context_tokens: {kind} is too short for a question and an answer")
    require_same_base(artefact)
    return form, kind


def require_same_base(artefact: Artefact) -> None:
    """The adapter belongs to the base, and the base's files are those that it learnt on.

    Raises:
        UserError: Its configuration names another base, or the checksums differ.
    """
    if artefact.adapter is None or artefact.run is None:
        return
    from lighten.models.load import checksum, locate
    from lighten.models.names import public_name

    base_name = read_config(artefact.adapter).get("base_model_name_or_path")
    base_names = {artefact.base, public_name(artefact.base)}  # cards name what others can open
    if (
        base_name
        and base_name not in base_names
        and not _one_place(Path(base_name), Path(artefact.base))
    ):
        raise UserError(
            f"{artefact.adapter} belongs to the base {base_name}, not to {artefact.base}; name the "
            "run or the adapter that goes with it"
        )
    trained_on = (artefact.run.info().get("base") or {}).get("checksum")
    _, path = locate(artefact.base, revision=artefact.revision)
    if trained_on is not None and checksum(weight_files(path)) != trained_on:
        raise UserError(
            f"the weights of {artefact.base} are not those that {artefact.run.folder} was trained "
            "on (their checksums differ); put those back, or train again"
        )


def _one_place(recorded: Path, base: Path) -> bool:
    """Whether an adapter's path of its base leads there, or did before the folder was moved."""
    if recorded.is_absolute() and not recorded.exists():
        return recorded.name == base.name
    return recorded.resolve() == base.resolve()


def export(
    artefact: Artefact,
    form: str,
    target: Path | None = None,
    *,
    dtype: str = "auto",
    onto: str | None = None,
    context_tokens: int | None = None,
    receipt: bool = True,
    log: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write what was trained in a form that other software loads.

    Args:
        artefact: What.
        form: `adapter`, `merged`, `gguf` (f16), `gguf:TYPE`, `gguf-adapter` or `executorch`.
        target: Folder to write; None: under `exports` of the run (of several adapters, under
            `exports/ADAPTER`), or under `exports/NAME` of the current folder.
        dtype: Of a merged model.
        onto: For an adapter that learnt on a quantised base: `original` weights (when None) or
            those `dequantized` ones that it learnt on.
        context_tokens: Of a program for ExecuTorch: prompt and answer together; None: 1024.
        receipt: Compare its answers with those of what it was made from.
        log: Given a line about each part of the work.

    Raises:
        UserError: The form is none, the adapter is of another base, a file is torn, a package is
            missing, or the disk is full. An older export stays.
    """
    form, kind = check(artefact, form, dtype, onto, context_tokens)
    label = f"{form}-{kind}" if kind and form == "gguf" else form
    if target is None:
        target = artefact.exports / label
    target = target.expanduser()
    require_replaceable(target)
    _require_other_folder(artefact, target)
    if form in MERGED:
        require_export_room(artefact, form, kind or dtype, target, receipt)
    if form == "gguf-adapter" and receipt:
        require_receipt_room(artefact, form, target)
    log(f"writing {target}")
    write = _WRITERS[form]
    with _room_for_rounded(target, kept=form == "executorch" and receipt) as rounded:
        if rounded is not None:
            write = functools.partial(_executorch, keep=rounded)
        exported = write(artefact, target, kind or dtype, onto == DEQUANTIZED)
        if "diverged" in artefact.facts:
            exported = replace(exported, notes=(artefact.facts["diverged"], *exported.notes))
        if artefact.stored is not None and form in MERGED and receipt:
            log("measuring the held-out loss on either base")
            exported = _with_losses(exported, artefact)
        if not receipt:
            return exported
        log("comparing its answers with those before")
        comparison = receipt_of(artefact, target, form, kind or dtype, onto == DEQUANTIZED, rounded)
    verify.write_receipt(comparison, target)
    return Exported(
        exported.folder, exported.files, exported.size_bytes, exported.notes, comparison
    )


@contextmanager
def _room_for_rounded(target: Path, *, kept: bool) -> Iterator[Path | None]:
    """Where a program's making hands its rounded weights on to its receipt; None: it does not."""
    if not kept:
        yield None
        return
    with scratch_folder(target.parent, "rounded") as scratch:
        yield scratch / ROUNDED


def _require_other_folder(artefact: Artefact, target: Path) -> None:
    """An export takes the place of an older one, but not of what it is made of.

    Raises:
        UserError: It would.
    """
    sources = (artefact.base_folder, artefact.adapter, artefact.companions)
    if target.resolve() in {path.resolve() for path in sources if path is not None}:
        raise UserError(
            f"--output_dir {target} is what is exported, and would be replaced; choose another "
            "folder"
        )


def _with_losses(exported: Exported, artefact: Artefact) -> Exported:
    """Write down what the adapter loses on each of the weights that it can be merged onto."""
    from lighten.quantization.merge_losses import held_out_losses

    losses = held_out_losses(artefact)
    if losses is None:
        return exported
    path = exported.folder / MANIFEST
    write_json(path, {**read_json(path), "held_out_loss": losses})
    text = ", ".join(f"{name} {loss['loss']:.4f}" for name, loss in losses.items())
    note = f"held-out loss of the adapter, nats per token, by the weights it is on: {text}"
    return replace(exported, notes=(*exported.notes, note))


def _adapter(artefact: Artefact, target: Path, _: str, __: bool) -> Exported:
    assert artefact.adapter is not None
    with whole_folder(target) as partial:
        copy_companions(artefact, partial)
        for name in (CONFIG, WEIGHTS, "README.md"):
            if (artefact.adapter / name).is_file():
                shutil.copyfile(artefact.adapter / name, partial / name)
        write_manifest(artefact, partial, "adapter")
    return written(target, "*.safetensors")


def _gguf(artefact: Artefact, target: Path, kind: str, dequantized: bool) -> Exported:
    from lighten.quantization.gguf_model import write_gguf

    file_name = f"{artefact.name}.{kind}.gguf"
    dtype = gguf_merge_dtype(kind)
    with (
        model_folder(artefact, target, dequantized=dequantized, dtype=dtype) as folder,
        whole_folder(target) as partial,
    ):
        plan = write_gguf(folder, partial / file_name, kind, name=artefact.name)
        if is_measured(target):
            require_same_gguf(partial, target, "what lighten quantize has measured")
        _write_modelfile(folder, partial, file_name)
        text = card(artefact, plan.sentences())
        (partial / "README.md").write_text(text, encoding="utf-8")
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", partial / "generation_config.json")
        write_manifest(artefact, partial, f"gguf:{kind}", **onto_fact(artefact, dequantized))
    return written(target, "*.gguf", tuple(plan.sentences()))


def _gguf_adapter(artefact: Artefact, target: Path, _: str, __: bool) -> Exported:
    from transformers import AutoConfig

    from lighten.quantization.gguf_adapter import write_gguf_adapter

    assert artefact.adapter is not None
    file_name = f"{artefact.name}.adapter.gguf"
    with whole_folder(target) as partial:
        config = AutoConfig.from_pretrained(artefact.base_folder, local_files_only=True)
        write_gguf_adapter(artefact.adapter, config, partial / file_name)
        (partial / "README.md").write_text(card(artefact, []), encoding="utf-8")
        write_manifest(artefact, partial, "gguf-adapter")
    note = f"it goes on the base as GGUF: lighten export {typed(artefact.base)} --as gguf"
    return written(target, "*.gguf", (note,))


def _executorch(
    artefact: Artefact, target: Path, context: str, dequantized: bool, keep: Path | None = None
) -> Exported:
    file_name = f"{artefact.name}{executorch.SUFFIX}"
    # It is rounded to 4 bits once, from as it learnt, and not from what 16 bits leave of that.
    whole = model_folder(artefact, target, dequantized=dequantized, dtype="float32")
    rounding, record, notes = executorch.program_rounding(artefact)
    with whole as folder, whole_folder(target) as partial:
        notes += executorch.write_program(
            folder, partial / file_name, rounding, context_tokens=int(context), keep=keep
        )
        copy_companions(artefact, partial)
        (partial / "README.md").write_text(card(artefact, notes), encoding="utf-8")
        write_manifest(
            artefact, partial, "executorch", rounding=record, **onto_fact(artefact, dequantized)
        )
    return written(target, f"*{executorch.SUFFIX}", tuple(notes))


def _write_modelfile(folder: Path, partial: Path, file_name: str) -> None:
    from transformers import AutoTokenizer

    from lighten.quantization.gguf_source import read_settings
    from lighten.quantization.gguf_tokenizer import stop_texts
    from lighten.quantization.modelfile import modelfile

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    stops, adds_bos = stop_texts(folder, int(read_settings(folder)["vocab_size"]))
    text = modelfile(tokenizer, source=f"./{file_name}", stops=stops, adds_bos=adds_bos)
    (partial / MODELFILE).write_text(text, encoding="utf-8")


_WRITERS: dict[str, Callable[[Artefact, Path, str, bool], Exported]] = {
    "adapter": _adapter, "merged": merged, "gguf": _gguf, "gguf-adapter": _gguf_adapter,
    "executorch": _executorch,
}  # fmt: skip
