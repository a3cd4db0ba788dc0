"""A model as an ExecuTorch program for a phone, and what the program answers.

Lowering and running happen in processes of their own (`executorch_program`, `executorch_runtime`).

Dimensions: T tokens, V words.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lighten import data
from lighten.artifacts import Artefact
from lighten.errors import UserError, require_package
from lighten.quantization import child
from lighten.quantization.calibration import calibration_rows
from lighten.quantization.executorch_rounding import ProgramRounding
from lighten.quantization.gguf_source import Array, declared_ends
from lighten.quantization.rounding import trained_dtype
from lighten.quantization.targets import dynamic_group_size

SUFFIX = ".pte"
CONTEXT = 1024  # positions of a program's cache, prompt and answer together
_NEAREST = "weights are rounded to their nearest, which loses more than rounding by data"
_HEADER = 40  # bytes, up to the end of the segments' offset and size


def require() -> None:
    """ExecuTorch and torchao are installed.

    Raises:
        MissingExtra: One is not.
    """
    for package in ("executorch", "torchao"):
        require_package(package, "phone")


def program_rounding(artefact: Artefact) -> tuple[ProgramRounding, dict[str, Any], list[str]]:
    """How a program of an artefact is rounded: by rows that the run was trained on.

    A run that learnt with the rounding in place is rounded to the nearest, as it learnt.

    Returns:
        The rounding, what is recorded of it, and what a user should know, a sentence each.
    """
    from transformers import AutoTokenizer

    run, groups = artefact.run, dynamic_group_size(artefact.run)
    nearest = ProgramRounding(groups), {"group_size": groups, "calibration": None}
    if run is None:
        return *nearest, [f"{_NEAREST}: no run says what data it will see"]
    recipe = run.recipe()
    if recipe.qat_groups is not None:
        learnt_in = trained_dtype(artefact)
        record = {"group_size": groups, "calibration": None, "learnt_in": learnt_in}
        return ProgramRounding(groups, learnt_in=learnt_in), record, []
    try:
        tokenizer = AutoTokenizer.from_pretrained(artefact.companions, local_files_only=True)
        data.choose_template(tokenizer, recipe.chat_template)
        rows, record = calibration_rows(recipe, tokenizer)
    except UserError as error:
        return *nearest, [f"{_NEAREST}: the data of the run cannot be read ({error})"]
    return ProgramRounding(groups, rows), {"group_size": groups, "calibration": record}, []


def write_program(
    folder: Path, target: Path, rounding: ProgramRounding, *, context_tokens: int = CONTEXT,
    keep: Path | None = None,
) -> list[str]:  # fmt: skip
    """Lower a model folder to an ExecuTorch program, in a process of its own.

    Args:
        folder: A transformers model in safetensors, with its tokenizer.
        target: The `.pte` file, written whole or not at all.
        rounding: How weights are rounded.
        context_tokens: Prompt and answer together; fewer where the model knows fewer positions.
        keep: File for the rounded weights, so that the receipt need not round again.

    Returns:
        What a user should know, a sentence each.

    Raises:
        UserError: The model cannot be loaded or traced, or the disk or the memory is full.
        MissingExtra: ExecuTorch or torchao is not installed.
    """
    require()
    from lighten import models

    positions = models.limits(str(folder)).positions
    longest = min(context_tokens, positions or context_tokens)
    job = {
        "do": "make", "name": "executorch", "kind": "executorch", "model": str(folder),
        "folder": str(target.parent), "file": str(target), "context": longest,
        "ends": _ends(folder), "rounding": asdict(rounding),
        "keep": None if keep is None else str(keep),
    }  # fmt: skip
    notes: list[str] = child.call(job)["notes"]
    return [
        *notes,
        f"prompt and answer together take {longest} tokens at most (--context_tokens)",
    ]


def write_rounding(folder: Path, rounding: ProgramRounding, keep: Path) -> None:
    """Round a model folder as `write_program` does, in a process like its own.

    Args:
        folder: A transformers model in safetensors.
        rounding: How weights are rounded.
        keep: File for the rounded weights.

    Raises:
        UserError: The model cannot be loaded, or the disk or the memory is full.
    """
    child.call({
        "do": "make", "name": "rounding", "kind": "rounding", "model": str(folder),
        "folder": str(keep.parent), "keep": str(keep), "rounding": asdict(rounding),
    })  # fmt: skip


def _ends(folder: Path) -> list[int]:
    """Ids of the tokens that end an answer: the model's, and the tokenizer's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [*declared_ends(folder), tokenizer.eos_token_id]
    return [end for end in dict.fromkeys(ids) if end is not None]


class Program:
    """A program in ExecuTorch's Python runtime, which runs in a process of its own.

    Args:
        path: The `.pte` file.
        tokenizer: Of its model.

    Raises:
        UserError: It is no program, a torn one, or one that was not made here.
        MissingExtra: ExecuTorch is not installed.
    """

    def __init__(self, path: Path, tokenizer: Any) -> None:
        require()
        require_whole(path)
        self.path, self.tokenizer = path, tokenizer
        self.peak_bytes = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lighten.quantization.executorch_runtime", str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._scratch = tempfile.TemporaryDirectory(prefix="lighten-program-")
        try:
            self.positions = int(self._answer()["positions"])
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._scratch.cleanup()

    def tokenise(self, text: str) -> list[int]:
        """Token ids of a rendered prompt."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def log_probabilities(self, tokens: Sequence[int]) -> Array:
        """Of the next token after every token, [T, V]; each is given alone, as in an answer."""
        self._require_room(len(tokens))
        file = Path(self._scratch.name) / "scores.npy"
        self._ask({"do": "every", "ids": list(tokens), "file": str(file)})
        scores = np.load(file).astype(np.float32, copy=False)
        scores -= scores.max(-1, keepdims=True)
        totals = np.exp(scores).sum(-1, keepdims=True, dtype=np.float64)
        log_probs: Array = scores - np.log(totals).astype(np.float32)
        return log_probs

    def greedy(self, tokens: Sequence[int], most: int) -> list[int]:
        """The likeliest continuation, token by token."""
        answer: list[int] = self.timed(tokens, most)["answer"]
        return answer

    def timed(self, tokens: Sequence[int], most: int, stops: Sequence[int] = ()) -> dict[str, Any]:
        """The likeliest continuation as `answer`, with `prefill_seconds` and `decode_seconds`."""
        self._require_room(len(tokens) + most)
        return self._ask({"do": "greedy", "ids": list(tokens), "most": most, "stops": list(stops)})

    def _require_room(self, tokens: int) -> None:
        if tokens > self.positions:
            raise UserError(
                f"{self.path} takes {self.positions} tokens, not {tokens}; export it with a larger "
                "--context_tokens"
            )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why it ended is said where its answer is missed
        answer = self._answer()
        self.peak_bytes = int(answer["peak_bytes"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            why = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise UserError(f"ExecuTorch's runtime stopped while it ran {self.path} ({why})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self.path} cannot be run by ExecuTorch: {answer['error']}")
        return answer


@contextmanager
def running(path: Path, tokenizer: Any) -> Iterator[Program]:
    """A program for as long as it is used."""
    program = Program(path, tokenizer)
    try:
        yield program
    finally:
        program.close()


def require_whole(path: Path) -> None:
    """A file is a program, as long as its header says: the runtime maps it unseen.

    Source: https://docs.pytorch.org/executorch/stable/pte-file-format.html

    Raises:
        UserError: It is not.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    numbers = [int.from_bytes(head[start : start + 8], "little") for start in (16, 24, 32)]
    program, offset, segments = numbers
    kinds = (head[4:6], head[8:12]) == (b"ET", b"eh00")
    if len(head) < _HEADER or not kinds or size < max(program, offset + segments):
        raise UserError(f"{path} is not a whole ExecuTorch program; export it again")
