"""The largest micro-batch and the longest context within a given memory: planned, then measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lighten.jobs import MODELS, Outcome, in_child
from lighten.machine.devices import Device
from lighten.planning import predict, search
from lighten.planning.changes import SHORTEST
from lighten.recipe import Recipe

# The search ends when what fits and what does not are this near to each other.
NEAR = 0.05
MOST_TRIES = 8
GROWTH = 1.15  # from what the plan says to the first try beyond it


@dataclass(frozen=True)
class Try:
    """One size, in a process of its own.

    Attributes:
        size: Rows or tokens.
        fits: Whether its steps were made within the memory.
        process_bytes: The most that its process held.
        why: What ended it; None: nothing.
    """

    size: int
    fits: bool
    process_bytes: int
    why: str | None


def search_from(
    planned: int, attempt: Callable[[int], Try], *, most: int | None = None, step: int = 1
) -> tuple[int | None, list[Try]]:
    """The largest size that fits, searched in both directions from what a plan says.

    Args:
        planned: Where to begin.
        attempt: Tries a size.
        most: No larger one is tried.
        step: Sizes are multiples of this.

    Returns:
        The largest that fitted, None if not one did; and all tries, in order.
    """
    tries: list[Try] = []
    fits, too_much = 0, None if most is None else most + step
    size = max(step, planned // step * step)
    factor = GROWTH
    for _ in range(MOST_TRIES):
        trial = attempt(size)
        tries.append(trial)
        if trial.fits:
            fits = size
        else:
            too_much = size
        if too_much is None:
            size = max(fits + step, int(fits * factor) // step * step)
            factor **= 2
        elif too_much - fits <= max(step, NEAR * fits):
            break
        elif not fits:
            size = max(step, int(too_much / factor) // step * step)
            factor **= 2
            if size >= too_much:
                break
        elif most is not None and too_much == most + step and fits < most:
            size = min(most // step * step, max(fits + step, int(fits * factor) // step * step))
            factor **= 2
        else:
            size = max(fits + step, (fits + too_much) // 2 // step * step)
        if size in (trial.size for trial in tries):
            break
    return fits or None, tries


def largest(
    recipe: Recipe,
    device: Device,
    memory_bytes: int,
    *,
    timeout_s: float,
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Records of the most rows at the recipe's length and of the longest row.

    Args:
        recipe: Its settings.
        device: Of this machine.
        memory_bytes: What the whole process may hold; on a GPU, what it may reserve.
        timeout_s: A try that takes longer counts as one that does not fit, and says so.
        log: Given a line about each try.
    """
    if recipe.offload_params != "none":
        log("max-batch: offload_params of the recipe is not followed: weights are on the device")
    recipe = recipe.changed({
        "gradient_accumulation_steps": 1, "tokens_per_microbatch": None, "offload_params": "none",
    })  # fmt: skip
    room = memory_bytes
    if device.kind == "cpu":  # a plan is of what comes on top of the libraries
        smallest = recipe.changed({"per_device_train_batch_size": 1})
        first = _run_steps(smallest, device, memory_bytes, timeout_s)
        if first.records:
            room -= max(0, first.process_peak_bytes - first.records[0]["peak_bytes"])
    planner = predict.planner_for(replace(device, memory_bytes=room))
    positions = predict.described(recipe).context_length
    planned = search.limits(recipe, planner, longest=positions)
    step = SHORTEST // 2
    records = []
    for quantity, size, setting, maximum, multiple in (
        ("micro-batch", planned.rows, "per_device_train_batch_size", None, 1),
        ("context", planned.context, "max_length", positions, step),
    ):

        def attempt(size: int, setting: str = setting) -> Try:
            changed = {setting: size}
            if setting == "max_length":
                changed["per_device_train_batch_size"] = 1
            outcome = _run_steps(recipe.changed(changed), device, memory_bytes, timeout_s)
            record = outcome.records[0] if outcome.records else {}
            process_bytes = record.get("reserved_bytes") or outcome.process_peak_bytes
            why = outcome.error
            if why is None and record.get("reserved_bytes") and process_bytes > memory_bytes:
                why = f"it reserves more than {memory_bytes / 2**30:.2f} GiB"
            trial = Try(size, why is None, process_bytes, why)
            verdict = "fits" if trial.fits else f"does not fit: {trial.why}"
            log(f"{setting} {size}: {process_bytes / 2**30:.2f} GiB, {verdict}")
            return trial

        best, tries = search_from(size or multiple, attempt, most=maximum, step=multiple)
        misfits = [trial for trial in tries if not trial.fits]
        records.append(
            {
                "part": "max-batch", "name": f"{quantity} within {memory_bytes / 2**30:.2f} GiB",
                "what": quantity, "memory_bytes": memory_bytes, "planned": size, "largest": best,
                "smallest_too_much": min((trial.size for trial in misfits), default=None),
                "max_length": recipe.max_length if quantity == "micro-batch" else None,
                "tries": [vars(trial) for trial in tries],
                "why": None if best else f"not even {multiple} fits: {misfits[-1].why}",
            }
        )  # fmt: skip
    return records


def _run_steps(recipe: Recipe, device: Device, memory_bytes: int, timeout_s: float) -> Outcome:
    return in_child(
        "lighten.benchmarking.training",
        {"recipe": recipe.completed(), "kind": device.kind, "lengths": None, "supervised": 1.0,
         "least": 1, "most": 1, "budget_s": 0.0},
        libraries=MODELS, memory_bytes=memory_bytes if device.kind == "cpu" else None,
        timeout_s=timeout_s,
    )  # fmt: skip
