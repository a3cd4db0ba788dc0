"""When memory runs out in a step: which part is to blame, and the step again with less at a time.

How a step is cut into micro-batches never changes its result (`data/batches.py`), so the same step
is made again with micro-batches of half as many tokens, as long as there is more than one row in
the largest. Once the optimiser has begun to move the weights nothing can be made again.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lighten import models
from lighten.cpu import allocator
from lighten.data.batches import MicroBatch
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.memory_errors import ShortOfMemory
from lighten.errors import UserError
from lighten.folders import resume_command
from lighten.parallel import ranks
from lighten.training.prediction import Prediction
from lighten.training.setup import Setup

GIB = 2**30
_WANTED = re.compile(r"[Tt]ried to allocate (?:([\d.]+) ([KMG])iB|(\d+) bytes)")
# Parts of a plan that are told apart once memory has run out.
_GROUPS = {
    "base weights": ("base weights", "quantisation constants"), "adapters": ("adapters",),
    "gradients": ("gradients",), "optimiser": ("optimiser",),
}  # fmt: skip
REST = "activations, logits and buffers"


class OutOfMemory(UserError):
    """Memory ran out, and smaller micro-batches were no way on."""


@dataclass(frozen=True)
class Retry:
    """One time that a step was made again.

    Attributes:
        step: Which, from 1.
        tokens: Tokens of its largest micro-batch before.
        new_tokens: Tokens of a micro-batch at most from then on.
        blame: Which part took more than was predicted.
    """

    step: int
    tokens: int
    new_tokens: int
    blame: str


class Watch:
    """Sees to it that a step is made again only while the optimiser has not moved.

    Args:
        adapters: Whose optimisers are watched.
    """

    def __init__(self, adapters: Sequence[AdapterOptimizer]) -> None:
        self.moved = False
        for adapter in adapters:
            adapter.optimizer.register_step_pre_hook(self._moves)

    def _moves(self, *_: Any) -> None:
        self.moved = True


def smaller(
    setup: Setup, batches: Sequence[MicroBatch], watch: Watch, error: BaseException, step: int
) -> tuple[int, int]:
    """Tokens of the largest micro-batch, and how many a micro-batch shall have from now on.

    Raises:
        OutOfMemory: There is no smaller micro-batch on any rank, the optimiser has moved, or other
            ranks are waiting for this one.
    """
    if watch.moved:
        raise OutOfMemory(
            f"memory ran out while the optimiser moved the weights in step {step}; the last "
            f"checkpoint is intact: go on with: {resume_command(setup.recipe.run_folder)} on a "
            "machine with more memory, or with the same optimiser in 8 bits in a new run"
        ) from error
    if setup.strategy.in_step and setup.accelerator.num_processes == 1:
        raise OutOfMemory(
            f"memory ran out in step {step}, while a layer's weights were brought; start again "
            "with a smaller per_device_train_batch_size"
        ) from error
    if setup.accelerator.num_processes > 1 and not isinstance(error, ShortOfMemory):
        raise OutOfMemory(
            f"memory ran out on one of {setup.accelerator.num_processes} ranks in step {step}, "
            "while others waited for it; start again with a smaller per_device_train_batch_size"
        ) from error
    largest = max((batch.input_ids.numel() for batch in batches if len(batch.items) > 1), default=0)
    tokens = max(ranks.gather(setup.accelerator, largest))
    if not tokens:
        raise OutOfMemory(
            f"memory ran out in step {step} with single rows for micro-batches, up to "
            f"{max((batch.tokens for batch in batches), default=0)} tokens long"
        ) from error
    return tokens, max(1, tokens // 2)


def clear(setup: Setup) -> None:
    """Let go of a broken step: its gradients, what its exception held, and what is cached."""
    for adapter in setup.adapters:
        adapter.optimizer.zero_grad(set_to_none=True)
        for parameter in adapter.parameters.values():  # of which ranks may move some rows each
            parameter.grad = None
    gc.collect()
    if setup.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        allocator.trim()


def clear_frames(error: BaseException) -> None:
    """Let go of the tensors that the frames of a failed run still hold, by its error's causes."""
    at: BaseException | None = error
    while at is not None:
        traceback.clear_frames(at.__traceback__)
        at = at.__cause__ or at.__context__
    gc.collect()


def blame(
    prediction: Prediction | None, setup: Setup, peak_bytes: int, error: BaseException
) -> str:
    """Which part took more than was predicted, in a sentence.

    What stays (weights, gradients, moments) is counted exactly; the rest of the peak, with the
    request that failed, is what comes and goes within a step.

    Args:
        prediction: The plan.
        setup: The run.
        peak_bytes: Most that was held so far, in `PeakMemory`'s sense.
        error: What was raised.
    """
    if prediction is None or prediction.record is None:
        return "without a plan there is nothing to compare with"
    memory = prediction.record["memory"]
    predicted = _grouped(memory)
    actual = _measure_parts(setup)
    actual[REST] = max(0, peak_bytes + wanted_bytes(error) - sum(actual.values()))
    over = {name: actual[name] - predicted.get(name, 0) for name in actual}
    worst = max(over, key=lambda name: over[name])
    if over[worst] <= 0.02 * memory["expected"]:
        capacity = prediction.record.get("capacity")
        free = f" ({capacity / GIB:.2f} GiB)" if capacity else ""
        return f"no part took more than predicted: less memory was free than at the start{free}"
    return (
        f"{worst}: {actual[worst] / GIB:.2f} GiB, {predicted.get(worst, 0) / GIB:.2f} GiB predicted"
    )


def wanted_bytes(error: BaseException) -> int:
    """The request that failed, where the error names it."""
    match = _WANTED.search(str(error))
    if match is None:
        return 0
    if match[3]:
        return int(match[3])
    return int(float(match[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]])


def _grouped(memory: Mapping[str, Any]) -> dict[str, int]:
    sizes = {part["name"]: part["bytes"] for part in memory["parts"]}
    grouped = {name: sum(sizes.pop(p, 0) for p in parts) for name, parts in _GROUPS.items()}
    return {**grouped, REST: sum(sizes.values())}


def _measure_parts(setup: Setup) -> dict[str, int]:
    """Bytes of what stays between steps; gradients as large as they become in a step."""
    learning = [p for adapter in setup.adapters for p in adapter.parameters.values()]
    learning_bytes = sum(p.numel() * p.element_size() for p in learning)
    inside = {id(p) for p in setup.base.model.parameters()}
    shared = sum(p.numel() * p.element_size() for p in learning if id(p) in inside)
    weights = models.census(setup.base.model).weight_bytes - shared
    state = sum(
        tensor.numel() * tensor.element_size()
        for adapter in setup.adapters
        for tensor in adapter.optimizer_tensors().values()
    )
    full = setup.recipe.method == "full"
    return {
        "base weights": weights + (learning_bytes if full else 0),
        "adapters": 0 if full else learning_bytes,
        "gradients": learning_bytes,
        "optimiser": state,
    }
