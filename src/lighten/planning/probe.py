"""`lighten plan --probe`: one true step of the planned shape, with random weights, compared.

The step is made in a process of its own, so that what it measures is its own and running out of
memory costs nothing else. Nothing is downloaded but the configuration. What is random does not
matter to memory or time, only shapes do; that nothing is skipped is seen to by the engine itself,
which refuses a step without gradient.

    python -m lighten.planning.probe < request.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.cpu import allocator
from lighten.errors import UserError
from lighten.machine.devices import Device
from lighten.planning.result import Plan
from lighten.recipe import Recipe

if TYPE_CHECKING:
    from lighten.data.batches import MicroBatch
    from lighten.engine.workers import Workers
    from lighten.training.rows import Rows
    from lighten.training.setup import Setup

# Steps that are timed, after one that warms up.
STEPS = 2
# Numbers of each weight that are looked at to see whether it has changed.
SAMPLED = 4096


@dataclass(frozen=True)
class Probed:
    """What a step of the planned shape took.

    Attributes:
        peak_bytes: In the plan's sense; None where memory ran out.
        allocated_bytes: On a GPU, of the allocator's blocks alone.
        step_seconds: Of the last step; None where memory ran out.
        predicted_bytes: By the plan.
        predicted_seconds: By the plan.
        error: What was said where memory ran out.
    """

    peak_bytes: int | None
    allocated_bytes: int | None
    step_seconds: float | None
    predicted_bytes: int
    predicted_seconds: float | None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def probe(recipe: Recipe, plan: Plan, device: Device, rows: Rows | None = None) -> Probed:
    """Make the planned step in a process of its own.

    Args:
        recipe: As planned.
        plan: Its plan.
        device: This machine's.
        rows: The encoded data that the plan took, for its lengths.

    Raises:
        UserError: The device is not of this machine, weights wait outside of it, or the process
            failed in another way.
    """
    from lighten.planning.predict import lengths_of, longest_rows, supervised_share

    if not device.is_here:
        raise UserError(
            f"--probe runs the step here, and {device.name} is elsewhere; leave --device out"
        )
    for setting in ("offload_params", "offload_base"):
        if (where := getattr(recipe, setting)) != "none":
            raise UserError(
                f"--probe makes its step with all weights on the device, and {setting}: {where} "
                "keeps them elsewhere; leave one of the two out"
            )
    lengths, without_data = lengths_of(rows), longest_rows(recipe)
    if lengths is None and without_data is not None:
        count, tokens = without_data
        lengths = [tokens] * count
    request = {
        "recipe": recipe.completed(), "kind": device.kind, "lengths": lengths,
        "supervised": supervised_share(rows),
    }  # fmt: skip
    completed = subprocess.run(
        [sys.executable, "-m", "lighten.planning.probe"], input=json.dumps(request),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    time_s = None if plan.time is None else plan.time.seconds
    lines = completed.stdout.strip().splitlines()
    measured = json.loads(lines[-1]) if completed.returncode == 0 and lines else None
    if measured is None:
        from lighten.engine.memory_errors import ended_by_it

        message = _last_line(completed.stderr)
        if not ended_by_it(completed.returncode, message):
            raise UserError(f"the probe failed: {message}")
        return Probed(None, None, None, plan.memory.expected, time_s, message or "killed")
    context = sum(p.bytes for p in plan.memory.parts if p.name == "device context")
    on_gpu = "reserved_bytes" in measured["memory"]
    peak = (
        measured["memory"]["reserved_bytes"] + context
        if on_gpu
        else measured["memory"]["peak_bytes"]
    )
    return Probed(
        peak, measured["memory"]["peak_bytes"] if on_gpu else None, measured["seconds"],
        plan.memory.expected, time_s,
    )  # fmt: skip


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def measure(
    recipe: Recipe,
    kind: str,
    lengths: Sequence[int] | None,
    supervised: float = 1.0,
    *,
    random: bool = True,
    least: int = STEPS,
    most: int = STEPS,
    budget_s: float = 0.0,
) -> dict[str, Any]:
    """Make the step here and now, in a process that has done nothing else.

    Args:
        recipe: Any; its data is not read.
        kind: `cpu` or `cuda`.
        lengths: Tokens of each row; None: all have `max_length`.
        supervised: Share of each row's tokens that are supervised.
        random: With random weights of the base's shape; else with its own.
        least: Steps that are timed, at least.
        most: At most.
        budget_s: Seconds after which no more than `least` of them are timed.

    Returns:
        The peak `memory` as `PeakMemory` reads it, the `seconds` of a step, their `timing`, the
        real `tokens` of a step, its longest row and its rows side by side, the `parameters` that
        learn and, on a processor, `settled_bytes`, what stays when free pages are given back, and
        `worker_bytes`, the most that another worker's process held beside what it shares.

    Raises:
        UserError: Nothing was trained: no weight has changed after the steps.
    """
    import psutil
    from accelerate import Accelerator

    from lighten.engine.forward_backward import undropped
    from lighten.engine.step import train_step
    from lighten.machine.hardware import PeakMemory, take
    from lighten.machine.timing import measure_step
    from lighten.training import run
    from lighten.training.base import load_base
    from lighten.training.prepare import prepare

    assert run is not None  # everything is imported, as when a training begins to measure
    allocator.keep_pages(kind)
    take(kind)
    accelerator = Accelerator(cpu=kind == "cpu")
    memory, before = PeakMemory(kind), psutil.Process().memory_info().rss
    where = str(accelerator.device)
    base = random_base(recipe, where) if random else load_base(recipe, where, learns=True)
    # How many rows there are decides nothing here but the number of steps, which are not made.
    setup = prepare(recipe, accelerator, base, _rows(lengths or [recipe.max_length], supervised))
    batches = _batches(setup, lengths, supervised)
    largest = batches()
    setup.objective.verify(largest[0], undropped(largest[0]))
    workers = _workers(setup)
    weights = [p for adapter in setup.adapters for p in adapter.parameters.values()]
    at_first = samples_of(weights)

    def step() -> None:
        all_batches = batches()
        for group in setup.groups(setup.adapters):
            names = {adapter.name for adapter in group}
            part = [batch for batch in all_batches if batch.items[0].adapter in names]
            train_step(part, group, setup.objective, accelerator, setup.scaler, workers)
        if workers is not None:
            memory.beside(workers.unshared_bytes)

    timing = measure_step(step, device=kind, least=least, most=most, budget_s=budget_s)
    if all(map(_equal, at_first, samples_of(weights))):
        raise UserError(
            "nothing was trained: no weight has changed after a few steps, so its time says nothing"
        )
    measured: dict[str, Any] = {
        "memory": memory.read(), "seconds": timing.median, "timing": timing.to_dict(),
        "tokens": sum(sum(batch.lengths) for batch in largest),
        "rows": max(len(batch.lengths) for batch in largest),
        "longest": max(max(batch.lengths) for batch in largest),
        "parameters": sum(p.numel() for p in weights),
    }  # fmt: skip
    if workers is not None:
        measured["worker_bytes"] = workers.unshared_bytes // (workers.count - 1)
        workers.close()
    if kind == "cpu":
        allocator.trim()
        measured["settled_bytes"] = psutil.Process().memory_info().rss - before
    return measured


def samples_of(weights: Sequence[Any]) -> list[Any]:
    """Some numbers of each weight: whole copies would count among what is measured."""
    return [
        p.detach().flatten()[:: max(1, p.numel() // SAMPLED)].clone() if p.numel() else p.detach()
        for p in weights
    ]


def _equal(before: Any, after: Any) -> bool:
    import torch

    return bool(torch.equal(before, after))


def _batches(
    setup: Setup, lengths: Sequence[int] | None, supervised: float
) -> Callable[[], list[MicroBatch]]:
    """What makes the micro-batches of the largest step anew."""
    from lighten.data.batches import collate
    from lighten.planning.steps import largest_step

    cut, of_rows = largest_step(setup, lengths)
    rows = _rows(of_rows, supervised).train.rows
    names = [adapter.name for adapter in setup.adapters]
    packed, device = setup.objective.packs, setup.accelerator.device
    return lambda: [collate(part, rows, names, packed=packed, device=device) for part in cut]


def _workers(setup: Setup) -> Workers | None:
    """As the training loop opens them."""
    import torch

    from lighten.engine.forked import possible, processes_for
    from lighten.engine.workers import Threads

    if setup.workers == 1:
        return None
    if not possible():
        return Threads(setup.workers, torch.get_num_threads())
    return processes_for(setup.workers, setup.objective, setup.groups(setup.adapters))


def random_base(recipe: Recipe, device: str) -> Any:
    """The base of a recipe with random weights in the formats that loading gives them.

    Each layer is filled, and quantised where it will be, one after another: memory that is not
    written to is not taken, so no more than one layer is dense beside the result, as in loading.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from lighten import models
    from lighten.machine.hardware import choose_dtype
    from lighten.models import quantized
    from lighten.models.attention_setting import set_attention
    from lighten.models.stored import packed_paths, stored_in
    from lighten.planning.build import config_of, storage_of

    config = config_of(recipe)[0]
    dtype = choose_dtype(recipe.compute_dtype, device)
    compute: torch.dtype = getattr(torch, dtype.value)
    trains_all = recipe.method == "full" and recipe.last_layers is None
    storage = storage_of(recipe, config)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if trains_all else compute,
            trust_remote_code=recipe.trust_remote_code,
        )  # fmt: skip
    packed = set() if storage is None else set(packed_paths(model, stored_in(config)))
    with allocator.temporaries_given_back() if storage else nullcontext(), torch.no_grad():
        for path, module in list(model.named_modules()):
            for parameter in module.parameters(recurse=False):
                # Small enough to stay finite through any depth, and never zero.
                parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(0.5)
            if storage is not None and path in packed:
                model.set_submodule(path, quantized.quantised(module, storage, compute, device))
    model.requires_grad_(False)
    return models.Base(
        model=model.to(device).eval(), tokenizer=None, name=recipe.model_name_or_path,
        source="folder", path=Path(), revision=None, file_bytes=None, dtype=dtype,
        attention=set_attention(model, recipe.attn_implementation, device),
        quantization=quantized.explain(model, storage),
    )  # fmt: skip


def _rows(lengths: Sequence[int], supervised: float) -> Rows:
    """Rows of the given lengths, with that share of their tokens supervised."""
    from lighten.data import Encoded, TemplateChoice
    from lighten.data.tokenise import EncodingCounts
    from lighten.planning.steps import row_of
    from lighten.training.rows import Rows

    counts = EncodingCounts(rows=len(lengths), tokens=sum(lengths))
    rows: Any = [row_of(length, supervised) for length in lengths]
    return Rows(Encoded(rows, counts), None, TemplateChoice("", "", ""), {})


def main() -> None:
    """Read a request from standard input, make the step, print what it took."""
    request = json.load(sys.stdin)
    with tempfile.TemporaryDirectory(prefix="lighten-probe-") as scratch:
        # Offloaded activations would go into the run's folder, and compiling takes longer than all.
        scratch_settings = {"output_dir": scratch, "torch_compile": False}
        recipe = Recipe.model_validate({**request.pop("recipe"), **scratch_settings})
        print(json.dumps(measure(recipe, **request)))  # noqa: T201


if __name__ == "__main__":
    main()
