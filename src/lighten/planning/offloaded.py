"""What a step's timeline is where optimiser state waits outside of the device."""

from __future__ import annotations

from dataclasses import replace

from lighten.parallel.offloaded.adamw import MOMENTS, PIECE_NUMBERS
from lighten.planning.result import StepTime
from lighten.planning.storage_tracker import OUTSIDE, Block, Event, Timeline
from lighten.recipe import Recipe

STEP = "optimiser step"
# What is left out of the trace, or comes into its result afterwards.
UNTRACED = {"torch_compile": False, "activation_offload": False, "offload_optimizer": "none",
            "offload_params": "none"}  # fmt: skip


def leaves_device(recipe: Recipe, kind: str) -> bool:
    """Whether the optimiser's state is not in the memory that is planned.

    Args:
        recipe: What would be trained.
        kind: `cpu` or `cuda`.
    """
    where = recipe.offload_optimizer
    return where == "nvme" or (where == "cpu" and kind != "cpu")


def places(recipe: Recipe, kind: str) -> tuple[str, ...]:
    """What of a rank's states is elsewhere, by the formulas' names: `optimizer`, `param`."""
    moved = ["optimizer"] if leaves_device(recipe, kind) else []
    if recipe.offload_params == "nvme":
        moved.append("param")
    return tuple(moved)


def choices(recipe: Recipe, kind: str) -> dict[str, str]:
    """What a plan says of it."""
    told = {}
    moved = places(recipe, kind)
    for setting, name, what in (
        ("offload_optimizer", "optimizer", "AdamW's state"),
        ("offload_params", "param", "a rank's part of the weights"),
    ):
        device = getattr(recipe, setting)
        if device == "none":
            continue
        where = "on a disk" if device == "nvme" else "in main memory"
        unmoved = "" if name in moved else ", where the run computes: nothing moves"
        told[setting] = f"{device}: {what} waits {where}{unmoved}"
    return told


def with_moving(
    time: StepTime | None, state_bytes: int, link: float | None
) -> tuple[StepTime | None, str]:
    """The time of a step that brings the optimiser's state and puts it back, and a sentence.

    Args:
        time: Of the computation.
        state_bytes: Of the state.
        link: To where it waits, in bytes per second, if known.
    """
    if time is None or link is None:
        moved = None if time is None else replace(time, whole=False)
        return moved, "what it takes to bring the optimiser's state is not in the time of a step"
    seconds = 2 * state_bytes / link
    slower = replace(
        time, seconds=time.seconds + seconds, low=time.low + seconds, high=time.high + seconds,
        bytes_moved=time.bytes_moved + 2 * state_bytes,
    )  # fmt: skip
    return slower, (
        f"each step moves {2 * state_bytes / 1e9:.1f} GB of the optimiser's state at "
        f"{link / 1e9:.0f} GB/s, by the link to main memory of the datasheet"
    )


def without_state(timeline: Timeline) -> Timeline:
    """The timeline with two pieces of the optimiser's state within its steps, in place of all."""
    state_blocks = {event.block for event in timeline.events if event.block.part == "optimiser"}
    # One is moved while the next is brought.
    bytes_held = min(
        2 * len(MOMENTS) * 4 * PIECE_NUMBERS, sum(block.bytes for block in state_blocks)
    )  # fmt: skip
    events: list[Event] = []
    held: Block | None = None
    for event in timeline.events:
        stepping = timeline.runs[event.run].phase == STEP
        if stepping and held is None:
            held = Block(bytes_held, "optimiser", OUTSIDE, event.run)
            events.append(Event(held, True, event.run, OUTSIDE))
        elif held is not None and not stepping:
            events.append(Event(held, False, event.run, OUTSIDE))
            held = None
        if event.block not in state_blocks:
            events.append(event)
    if held is not None:
        events.append(Event(held, False, held.run, OUTSIDE))
    return replace(timeline, events=events)
