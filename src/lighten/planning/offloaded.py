"""What a step's timeline is where optimiser state and weights wait outside of the device."""

from __future__ import annotations

from dataclasses import replace

from lighten.parallel.offloaded.adamw import MOMENTS, PIECE_NUMBERS
from lighten.planning.distributed import gathered_bytes
from lighten.planning.result import States, StepTime
from lighten.planning.storage_tracker import OUTSIDE, Block, Event, Timeline
from lighten.recipe import Recipe

STEP = "optimiser step"
# bitsandbytes pages the state of tensors of so many numbers or more (`get_state_buffer`).
PAGED_NUMBERS = 100_000
# What is left out of the trace, or comes into its result afterwards.
UNTRACED = {"torch_compile": False, "activation_offload": False, "offload_optimizer": "none",
            "offload_params": "none"}  # fmt: skip


def places(recipe: Recipe, kind: str) -> tuple[str, ...]:
    """What of a rank's states is not in the memory that is planned: `optimizer`, `param`.

    Args:
        recipe: What would be trained.
        kind: `cpu` or `cuda`, where the optimiser's state is with the weights that it moves.
    """
    elsewhere = ("nvme",) if kind == "cpu" else ("cpu", "nvme")
    if recipe.offload_params in elsewhere:
        return ("optimizer", "param")
    return ("optimizer",) if recipe.offload_optimizer in elsewhere else ()


def on_disk(recipe: Recipe) -> bool:
    """Whether something of a recipe's states waits in a file."""
    return "nvme" in (recipe.offload_optimizer, recipe.offload_params)


def bytes_elsewhere(recipe: Recipe, kind: str, states: States, padding: float) -> tuple[int, int]:
    """Bytes in main memory beside a GPU, and on a disk, where one process trains.

    Args:
        recipe: What would be trained.
        kind: `cpu` or `cuda`.
        states: All of them.
        padding: How many times its bytes a weight takes in pinned memory.
    """
    moved = places(recipe, kind)
    host, disk = 0.0, 0.0
    if "optimizer" in moved and recipe.offload_optimizer == "nvme":
        disk += states.optimiser
    elif "optimizer" in moved:
        host += states.optimiser
    if "param" in moved and recipe.offload_params == "nvme":
        disk += sum(states.spread)
        host += states.gradients
    elif "param" in moved:
        host += padding * (sum(states.spread) + states.gradients)
    return int(host), int(disk)


def choices(recipe: Recipe, kind: str) -> dict[str, str]:
    """What a plan says of it."""
    sentences = {}
    moved = places(recipe, kind)
    for setting, name, what in (
        ("offload_optimizer", "optimizer", "AdamW's state"),
        ("offload_params", "param", "a rank's part of the weights"),
    ):
        device = getattr(recipe, setting)
        if device == "none":
            continue
        where = "on a disk" if device == "nvme" else "in main memory"
        if name not in moved:
            where += ", where the run computes: nothing moves"
        elif setting == "offload_params" and kind != "cpu":
            where += ", gradients in main memory, and the optimiser runs on the processor"
        sentences[setting] = f"{device}: {what} waits {where}"
    return sentences


def with_moving(
    time: StepTime | None, recipe: Recipe, moved: tuple[str, ...], states: States,
    micro_batches: int, link: float | None,
) -> tuple[StepTime | None, str]:  # fmt: skip
    """The time of a step that brings what waits elsewhere and puts it back, and a sentence.

    Args:
        time: Of the computation.
        recipe: What would be trained.
        moved: Its `places`.
        states: All of them.
        micro_batches: Of a step: each brings weights twice, and puts gradients away.
        link: To main memory, in bytes per second, if known.
    """
    what, moved_bytes = "the optimiser's state", 2 * states.optimiser
    if "param" in moved:
        what = "weights and gradients"
        moved_bytes = micro_batches * (2 * sum(states.spread) + states.gradients)
    if time is None or link is None or on_disk(recipe):
        unknown = None if time is None else replace(time, whole=False)
        return unknown, f"what it takes to bring {what} is not in the time of a step"
    seconds = moved_bytes / link
    slower = replace(
        time, seconds=time.seconds + seconds, low=time.low + seconds, high=time.high + seconds,
        bytes_moved=time.bytes_moved + moved_bytes, whole=time.whole and "param" not in moved,
    )  # fmt: skip
    return slower, (
        f"each step moves {moved_bytes / 1e9:.1f} GB of {what} at "
        f"{link / 1e9:.0f} GB/s, by the link to main memory of the datasheet"
        + ("; the optimiser's own time on the processor is not in it" if "param" in moved else "")
    )


def without_weights(timeline: Timeline, states: States, layers: int, kind: str) -> Timeline:
    """The timeline with what one process gathers of weights that wait elsewhere.

    Beside a GPU gradients are in main memory too, and the optimiser moves them there.

    Args:
        timeline: With all of them.
        states: Bytes of all of them.
        layers: Decoder layers.
        kind: `cpu` or `cuda`.
    """
    gone = {"base weights", *(() if kind == "cpu" else ("gradients", "optimiser"))}
    held = Block(int(gathered_bytes(states, layers, ("param",), kind)), "base weights")
    events = [event for event in timeline.events if event.block.part not in gone]
    return replace(timeline, events=[Event(held, True, 0, OUTSIDE), *events])


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


def without_paged_state(timeline: Timeline, optimizer: str) -> tuple[Timeline, int]:
    """The timeline without state that a paged optimiser keeps in managed memory, and its bytes.

    The driver moves it to main memory where the device's is short, and PyTorch's allocator does not
    know of it. The trace, which computes on a processor, has it among the device's.

    Args:
        timeline: With it.
        optimizer: By transformers' name.
    """
    least = PAGED_NUMBERS * (1 if optimizer.endswith("8bit") else 4)
    paged = {
        event.block for event in timeline.events
        if event.block.part == "optimiser" and event.block.bytes >= least
    }  # fmt: skip
    events = [event for event in timeline.events if event.block not in paged]
    return replace(timeline, events=events), sum(block.bytes for block in paged)
