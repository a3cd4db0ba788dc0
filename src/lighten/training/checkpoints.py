"""Resumable states of a run: `checkpoints/checkpoint-<step>/`, whole or not there.

A checkpoint is written under a hidden name and renamed when every file is on disk, with the
checksum of each file in `trainer_state.json`, so that a kill at any moment, a full disk or a
truncated file never costs more than the newest state. Random numbers need no saving: order and
dropout are functions of seed, epoch and step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lighten.adapters import Trained, dtensors, shards
from lighten.engine.adapter_optimizer import AdapterOptimizer, AdapterOptimizerProgress
from lighten.errors import UserError
from lighten.parallel.offloaded import stores
from lighten.runs import write_bytes, write_json

log = logging.getLogger(__name__)
STATE, OPTIMIZER = "trainer_state.json", "optimizer"


@dataclass
class TrainerState:
    """Where a run stands.

    Attributes:
        step: Optimiser steps of the run made.
        tokens: Real tokens trained on, all adapters.
        supervised_tokens: Those whose loss counted.
        seconds: Time spent in steps.
        members: Progress of each adapter by name.
        scaler: Factor of each adapter's float16 loss, empty where nothing is scaled.
        elapsed_s: Time spent training, evaluations and checkpoints included.
        total_steps: Of the whole run, where `max_time` set them; else 0.
        examples_per_step: Rows of one optimiser step over all ranks, which a run keeps when it goes
            on with another number of them; 0 before there is a checkpoint.
        global_step: The step again under transformers' name, for tools that read it.
        files: SHA-256 of the checkpoint's other files by relative path.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    elapsed_s: float = 0.0
    total_steps: int = 0
    members: dict[str, AdapterOptimizerProgress] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    examples_per_step: int = 0
    global_step: int = 0
    files: dict[str, str] = field(default_factory=dict)


def save(
    folder: Path,
    state: TrainerState,
    trained: Trained,
    adapters: Sequence[AdapterOptimizer],
    *,
    base_model: str,
    revision: str | None,
) -> Path:
    """Write `checkpoint-<step>` under the folder and return its path.

    Raises:
        UserError: The disk is full; older checkpoints are untouched.
    """
    final = folder / f"checkpoint-{state.step}"
    partial = folder / f".checkpoint-{state.step}.partial"
    for stale in folder.glob(".checkpoint-*.partial"):  # of runs that were killed while they wrote
        shutil.rmtree(stale, ignore_errors=True)
    tensors = _optimizer_tensors(adapters)
    state.global_step, state.files = state.step, {}
    try:
        _write(partial, "", shards.Shards(tensors, OPTIMIZER), state)
        for adapter in adapters:
            # One adapter's files at a time are in memory.
            files = trained.contents(adapter.name, base_model=base_model, revision=revision)
            _write(partial, f"{trained.folder}/{adapter.name}/", files, state)
            del files
        for adapter in adapters:
            if adapter.progress.infinite:
                continue  # it left, so that the others go on
            trained.verify(adapter.name, weights_of(partial, trained, adapter.name))
        write_json(partial / STATE, asdict(state))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def take_part(trained: Trained, adapters: Sequence[AdapterOptimizer]) -> None:
    """What every other rank does while the main one saves: hand over the rows that it holds.

    Raises:
        PeerLost: A rank has ended.
    """
    for shard in shards.Shards(_optimizer_tensors(adapters), OPTIMIZER).values():
        shard.take_part()
        stores.release_all()  # of what was read for it
    for adapter in adapters:
        if dtensors.any_spread(adapter.parameters.values()):
            for content in trained.contents(adapter.name).values():
                assert isinstance(content, shards.Shard)
                content.take_part()


def _optimizer_tensors(adapters: Sequence[AdapterOptimizer]) -> dict[str, torch.Tensor]:
    return {
        f"{adapter.name}/{key}": value
        for adapter in adapters
        for key, value in adapter.optimizer_tensors().items()
    }


def _write(
    folder: Path, prefix: str, files: Mapping[str, bytes | shards.Shard], state: TrainerState
) -> None:
    """Write files under a prefix and note their checksums."""
    with ThreadPoolExecutor(1, "checksum") as pool:
        sums = {}
        for name, content in files.items():
            write_bytes(folder / prefix / name, content)
            stores.release_all()  # of what was read for it
            sums[prefix + name] = pool.submit(_checksum, folder / prefix / name)
    state.files |= {name: checksum.result() for name, checksum in sums.items()}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_of(checkpoint: Path, trained: Trained, name: str) -> Path:
    """The folder of a checkpoint that holds what was trained under a name."""
    return checkpoint / trained.folder / name


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all whole, and a sentence per newer one that is not.

    Raises:
        UserError: The newest one is another version's, which this one does not read.
    """
    broken: list[str] = []
    for checkpoint in reversed(listing(folder)):
        wrong = fault(checkpoint)
        if wrong is None:
            return checkpoint, broken
        broken.append(f"{checkpoint.name} is not whole ({wrong}); using an older one")
    return None, broken


def listing(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = folder.glob("checkpoint-*") if folder.is_dir() else []
    return sorted(
        (path for path in folders if path.name.partition("-")[2].isdigit()),
        key=lambda path: int(path.name.partition("-")[2]),
    )


def restore(
    checkpoint: Path, trained: Trained, adapters: Sequence[AdapterOptimizer]
) -> TrainerState:
    """Put weights and optimisers back as they were.

    Raises:
        UserError: The checkpoint is of another cohort.
    """
    state = read_state(checkpoint)
    if set(state.members) != {adapter.name for adapter in adapters}:
        raise UserError(
            f"{checkpoint} holds the adapters {sorted(state.members)}, the recipe has "
            f"{sorted(adapter.name for adapter in adapters)}"
        )
    optimizer = shards.load(checkpoint, OPTIMIZER)
    for adapter in adapters:
        restore_weights(checkpoint, trained, adapter.name)
        prefix = f"{adapter.name}/"
        keys = [key for key in optimizer if key.startswith(prefix)]
        adapter.restore_optimizer(
            {key.removeprefix(prefix): optimizer.pop(key) for key in keys}, stores.release_all
        )
        adapter.progress = state.members[adapter.name]
    return state


def restore_weights(checkpoint: Path, trained: Trained, name: str) -> None:
    """Put back what was trained under a name; of a base a weight is in memory at a time.

    Raises:
        UserError: It does not fit.
    """
    trained.restore(name, weights_of(checkpoint, trained, name), stores.release_all)


def read_state(checkpoint: Path) -> TrainerState:
    """The `trainer_state.json` of a checkpoint.

    Raises:
        UserError: Another version of lighten wrote it, with more in it.
    """
    raw = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    _require_known(checkpoint, TrainerState, raw)
    for values in raw["members"].values():
        _require_known(checkpoint, AdapterOptimizerProgress, values)
    raw["members"] = {
        name: AdapterOptimizerProgress(**values) for name, values in raw["members"].items()
    }
    return TrainerState(**raw)


def _require_known(checkpoint: Path, kind: type[Any], values: Mapping[str, Any]) -> None:
    unknown = values.keys() - {each.name for each in fields(kind)}
    if unknown:
        raise UserError(
            f"{checkpoint} was written by another version of lighten: {STATE} says "
            f"{min(unknown)!r}, which this version does not know; go on with that version, or "
            "choose another --output_dir to begin anew"
        )


def prune(folder: Path, limit: int | None, keep: Sequence[int | None], newest: Path) -> None:
    """Delete the oldest checkpoints beyond the limit, never one of the steps to keep (trap 40).

    Args:
        folder: Where they are.
        limit: How many stay; None: all.
        keep: Steps whose checkpoints stay in any case.
        newest: The one just written. Later steps are torn, or the run had gone on from them; they
            would take a whole one's place.
    """
    checkpoints = listing(folder)
    whole = checkpoints.index(newest) + 1
    for torn in checkpoints[whole:]:
        _delete(torn)
    checkpoints = checkpoints[:whole]
    if limit is None:
        return
    protected = {f"checkpoint-{step}" for step in keep if step is not None}
    for checkpoint in checkpoints[: max(0, len(checkpoints) - limit)]:
        if checkpoint.name not in protected:
            _delete(checkpoint)


def _delete(checkpoint: Path) -> None:
    """Delete one, or say why not: a file that is open elsewhere, or another user's, ends no run."""
    try:
        checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)
    except OSError as error:
        log.warning("%s could not be deleted (%s) and stays", checkpoint, error.strerror or error)


def fault(checkpoint: Path, prefix: str = "") -> str | None:
    """What is wrong with a checkpoint's files, or None.

    Args:
        checkpoint: Its folder.
        prefix: Look at the files alone whose relative paths begin so.

    Raises:
        UserError: Another version of lighten wrote it, with more in it.
    """
    try:
        state = read_state(checkpoint)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{STATE} is missing or cut off"
    for name, digest in state.files.items():
        if not name.startswith(prefix):
            continue
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            changed = _checksum(path) != digest
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if changed:
            return f"{name} has changed or was cut off"
    return None
