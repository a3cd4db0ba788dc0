"""The verb `quantize`: a model in several formats, and one table of what each costs and keeps."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.machine.disk import require_room
from lighten.models.load import checksum, weight_files
from lighten.models.names import card_line, card_name
from lighten.paths import data_names
from lighten.quantization import child
from lighten.quantization.export_card import MANIFEST, require_replaceable, require_same_gguf
from lighten.quantization.forecast import forecast
from lighten.quantization.gguf_source import read_weights
from lighten.quantization.model_source import (
    HeldOutSet,
    ModelSource,
    calibration_of,
    evaluation_of,
    opened,
)
from lighten.quantization.room import tensor_bytes
from lighten.quantization.targets import DYNAMIC, Target, parse, require_tools
from lighten.runs import QUANTIZE, Run
from lighten.whole_files import as_written, scratch_folder, whole_folder, write_json
from lighten.wording import counted

REFERENCE = "bfloat16"
# Bounds that keep five formats of a small model under ten minutes on two cores.
TOKENS, QUESTIONS, PROMPT_TOKENS = 2048, 16, 128
MODE = (
    "one row at a time, without padding, activations in bfloat16; LLM.int8 in eval mode; GGUF "
    "through llama.cpp with keys and values in float16"
)
Log = Callable[[str], None]


@dataclass(repr=False)
class Quantized:
    """What `quantize.json` holds.

    Attributes:
        model: What was quantised.
        formats: A row per format, that of the unquantised model first.
        settings: How it was measured.
        notes: What has to be said of it.
        folder: Where the artefacts are.
    """

    model: str
    formats: list[dict[str, Any]]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    folder: str = ""
    version: int = 1

    def __repr__(self) -> str:
        names = ", ".join(row["name"] for row in self.formats)
        return f"Quantized({self.model!r}: {names}; in {self.folder!r})"

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        # The report knows what it draws; it is looked up when a notebook asks.
        return str(import_module("lighten.reporting.notebook").quantized_html(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def format(self, name: str) -> dict[str, Any]:
        """The row of a format."""
        return next(row for row in self.formats if row["name"] == name)


def quantize(
    source: str | Run,
    to: Sequence[str] | str,
    *,
    adapter: str | None = None,
    dataset: str | None = None,
    output_dir: Path | None = None,
    tokens: int = TOKENS,
    questions: int = QUESTIONS,
    log: Log = lambda _: None,
) -> Quantized:
    """Write a model in each format, measure all on the same tokens, and write `quantize.json`.

    Formats that an earlier command wrote stay in the table if they are of the same weights, are
    still there, and were measured on the same tokens in the same way.

    Args:
        source: Run, its folder, or a model's name.
        to: Formats.
        adapter: Whose, where a run has several.
        dataset: Data to calibrate and measure on, for a model without a run.
        output_dir: Each format is a folder in this; None: `exports` of the run, or of here.
        tokens: Held-out tokens at most.
        questions: Held-out questions at most that are answered for the metric.
        log: Given a line about each part of the work.

    Raises:
        UserError: Something the user can mend; what was written before it is whole.
    """
    targets = parse(to)
    require_tools(targets)
    expected = forecast(
        source, to, adapter=adapter, output_dir=output_dir, tokens=tokens, timed=False
    )
    root = Path(expected.folder)
    require_room(
        root, expected.disk_bytes + expected.temporary_bytes, f"quantising {expected.model}"
    )
    with (
        _scratch(root) as scratch,
        opened(source, scratch, adapter=adapter, dataset=dataset) as model,
    ):
        for target in targets:
            require_replaceable(root / target.folder)
        calibration, record = ([], None) if not any(t.calibrated for t in targets) else (
            calibration_of(model)
        )  # fmt: skip
        held_out = evaluation_of(model, tokens, questions)
        measuring = _Measuring(held_out, model, scratch)
        log(f"measuring {model.name} in {REFERENCE}")
        rows = [{"name": REFERENCE, "file_bytes": _reference_bytes(model.folder),
                 **measuring.of("reference", model.folder, REFERENCE)}]  # fmt: skip
        for target in targets:
            log(f"making {target.name}")
            folder = root / target.folder
            costs = _make(target, model, folder, calibration, record)
            log(f"measuring {target.name}")
            rows.append({"name": target.name, "folder": str(folder),
                         "file_bytes": weight_bytes(folder), **costs,
                         **measuring.of(target.kind, folder, target.name)})  # fmt: skip
        settings = measuring.settings(record, model.folder)
        earlier, settings["calibration"] = _earlier_rows(
            root / QUANTIZE, {row["name"] for row in rows}, settings
        )
        rows += earlier
        notes = [*measuring.notes(), *_about_bytes([row["name"] for row in rows[1:]], model),
                 *expected.notes()]  # fmt: skip
        if model.diverged is not None:
            notes.insert(0, model.diverged)
        if earlier:
            names = ", ".join(row["name"] for row in earlier)
            notes.append(f"{names}: of an earlier command, their speeds too")
        result = Quantized(model.name, _with_frontier(rows), settings, notes, str(root))
        if model.run is not None:
            write_json(model.run.folder / QUANTIZE, result.to_dict())
        write_json(root / QUANTIZE, result.to_dict())
    return result


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A folder beside the formats: what a killed command leaves there goes with the next one."""
    try:
        with scratch_folder(root, "quantize") as scratch:
            yield scratch
    finally:
        with suppress(OSError):
            root.rmdir()  # where nothing was made


def _earlier_rows(
    path: Path, written: set[str], settings: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Rows of the table that is there which may stand beside those of now.

    Args:
        path: The table; it may not be there.
        written: Names of the formats of now.
        settings: How those were measured. Formats calibrated on other data than they cannot stay.

    Returns:
        The rows, and what the calibrated rows of now and before were calibrated on.
    """
    calibration = settings["calibration"]
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        before, rows = stored["settings"], stored["formats"][1:]
        if {**before, "calibration": None} != {**as_written(settings), "calibration": None}:
            return [], calibration
        same_data = calibration is None or before["calibration"] == as_written(calibration)
        kept = [
            (row, calibrated) for row in rows
            if row["name"] not in written
            and weight_bytes(Path(row["folder"])) == row["file_bytes"]
            and (not (calibrated := parse(row["name"])[0].calibrated) or same_data)
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return [], calibration  # there is none, or another version's
    if any(calibrated for _, calibrated in kept):
        calibration = before["calibration"]
    return [row for row, _ in kept], calibration


def _about_bytes(formats: Sequence[str], model: ModelSource) -> list[str]:
    """What has to be said of torchao's 4-bit weights."""
    if all(target.kind != DYNAMIC for target in parse(formats)):
        return []
    learnt = model.recipe is not None and model.recipe.qat is not None and model.run is not None
    return [
        f"{DYNAMIC}: groups of {model.group_size}, "
        f"{'which the run was trained for' if learnt else 'after training'}; torchao gives each "
        "4-bit weight a byte on a processor, in the file too: the ExecuTorch export packs them"
    ]


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(file.stat().st_size for file in _weights(folder))


def _reference_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files as they would be in the reference's format.

    A GGUF file is opened by a copy in float32, and older models are published so.
    """
    weights = read_weights(folder).values()
    return weight_bytes(folder) - sum(tensor_bytes(w) - 2 * w.numbers for w in weights)


def _weights(folder: Path) -> list[Path]:
    return [*weight_files(folder), *sorted(folder.glob("*.gguf"))]


def _make(
    target: Target,
    model: ModelSource,
    folder: Path,
    calibration: list[list[int]],
    record: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write one format, whole or not at all; what it took."""
    with model.folder_for(target, folder) as source, whole_folder(folder) as partial:
        job = {
            "do": "make", "name": target.name, "kind": target.kind, "type": target.type,
            "model": str(source), "folder": str(partial), "label": model.name,
            "calibration": calibration if target.calibrated else [],
            "group_size": model.group_size,
        }  # fmt: skip
        costs = child.call(job)
        if target.kind == "gguf" and (folder / MANIFEST).is_file():
            # Its card, receipt and Modelfile are of this very file, and stay.
            require_same_gguf(partial, folder, "what lighten export wrote")
            shutil.copytree(
                folder, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.gguf")
            )
            return _costs(costs)
        if target.calibrated:
            write_json(partial / "calibration.json", record)
        (partial / "README.md").write_text(_card(target, model, record), encoding="utf-8")
    return _costs(costs)


def _costs(costs: dict[str, Any]) -> dict[str, Any]:
    return {"made_seconds": costs["seconds"], "made_peak_bytes": costs["peak_bytes"]}


def _card(target: Target, model: ModelSource, record: dict[str, Any] | None) -> str:
    library = "gguf" if target.kind == "gguf" else "transformers"
    how = ""
    if target.calibrated and record is not None:
        data = data_names(record["dataset"])
        how = (
            f" Its rounding was chosen on {counted(record['rows'], 'row')} of "
            f"{record['row_tokens']} tokens of `{data}` (SHA-256 of the ids {record['sha256']})."
        )
    use = (
        f"```\nllama-cli -m {model.name}.{target.type}.gguf\n```\n"
        if library == "gguf"
        else "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", '
        'dtype="bfloat16")\n```\n'
    )
    trained = "" if model.diverged is None else f" {model.diverged}"
    return (
        f"---\n{card_line(model.base)}library_name: {library}\ntags: [lighten, quantized]\n"
        f"---\n\n# {model.name}, {target.name}\n\n`{card_name(model.base)}` "
        f"{'as it came' if model.run is None else f'as trained in `{model.run.name}`'}, quantised "
        f"to {target.name}.{trained}{how}\n\n{use}"
    )


class _Measuring:
    """The same tokens for every row of the table."""

    def __init__(self, held_out: HeldOutSet | None, model: ModelSource, scratch: Path) -> None:
        self._held_out, self._store = held_out, scratch / "predictions"
        self._store.mkdir()
        text = "The quick brown fox jumps over the lazy dog. " * 64
        ids = [int(token) for token in model.tokenizer(text)["input_ids"]]
        self._prompt = ids[:PROMPT_TOKENS]

    def of(self, kind: str, folder: Path, name: str) -> dict[str, Any]:
        """Quality, memory and speed of one artefact, from a process of its own."""
        held_out = self._held_out
        job = {
            "do": "measure", "name": name, "kind": kind, "folder": str(folder),
            "rows": [] if held_out is None else [asdict(row) for row in held_out.rows],
            "prompts": [] if held_out is None else held_out.prompts,
            "rooms": [] if held_out is None else held_out.rooms,
            "prompt": self._prompt, "store": str(self._store), "reference": kind == "reference",
        }  # fmt: skip
        measurement = child.call(job)
        measurement.pop("rows")
        measurement.pop("decode_samples")
        answers = measurement.pop("answers")
        if held_out is not None and answers:
            measurement["metrics"] = held_out.task.values(answers, held_out.references)
        return measurement

    def settings(self, calibration: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
        """What was measured, and how."""
        held_out = self._held_out
        return {
            "mode": MODE,
            "weights_sha256": checksum(_weights(folder)),
            "dataset": None if held_out is None else held_out.name,
            "tokens_sha256": None if held_out is None else held_out.sha256,
            "questions": 0 if held_out is None else len(held_out.prompts),
            "answer_tokens": None if held_out is None else held_out.task.answer_tokens,
            "metrics": {} if held_out is None else held_out.task.labels,
            "prefill_tokens": len(self._prompt),
            "calibration": calibration,
        }

    def notes(self) -> list[str]:
        """What has to be said of the figures."""
        if self._held_out is None:
            return ["no held-out data: sizes and speeds alone; give --dataset FILE"]
        return [*self._held_out.notes, *self._held_out.task.notes]


def _with_frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mark the rows than which none is both smaller and nearer to the data."""
    points = [(row["file_bytes"], _loss(row)) for row in rows]
    for row, (size, loss) in zip(rows, points, strict=True):
        row["ratio"] = size / rows[0]["file_bytes"]
        row["frontier"] = math.isfinite(loss) and not any(
            other[0] <= size and other[1] <= loss and other != (size, loss) for other in points
        )
    return rows


def _loss(row: Mapping[str, Any]) -> float:
    """Of a row; infinite where it was not measured, or is no number (null in a file)."""
    loss = row.get("loss")
    return math.inf if loss is None or math.isnan(loss) else float(loss)
