"""Plans beyond one device: many GPUs, a server, quantising; `lighten.api` has the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten import path_checks

if TYPE_CHECKING:
    from lighten.api_recipe import RecipeLike
    from lighten.planning.distributed import Distributed, Strategy
    from lighten.planning.serve import Quantizing
    from lighten.planning.serving import Serving
    from lighten.quantization.forecast import Forecast
    from lighten.runs import Run


def plan_spread(
    recipe: RecipeLike | None = None,
    *,
    device: str | None = None,
    strategy: Strategy | None = None,
    gpus: int = 1,
    nodes: int = 1,
    offload: Sequence[str] = (),
    **overrides: Any,
) -> Distributed:
    """Memory, communication and time per rank on many GPUs, from published formulas.

    Args:
        recipe: As for `plan`; its micro-batch is that of each rank.
        device: The GPU, by name.
        strategy: `ddp`, `zero1`, `zero2`, `zero3`, `fsdp` or `fsdp_hybrid`; None: the recipe's,
            or the one that fits and sends least (`ddp` where none fits).
        gpus: Per node.
        nodes: Machines.
        offload: `optimizer`, `param`, or both, to main memory; none: what the recipe says.
        overrides: Settings by name.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.api_recipe import plannable

    chosen = plannable(recipe, **overrides)
    from lighten.machine import devices
    from lighten.planning import offloaded, predict
    from lighten.planning.distributed import cheapest, of_recipe, spread

    where = devices.named(device)
    alone = predict.plan(chosen, where, changes=False)
    if not offload and offloaded.leaves_device(chosen, where.kind):
        offload = ("optimizer",)
    layers = predict.layers_of(chosen)
    if strategy is None and chosen.strategy == "auto":
        best = cheapest(alone, where, gpus=gpus, nodes=nodes, layers=layers)
        if best is not None and not offload:
            return best
    return spread(
        alone,
        where,
        strategy or of_recipe(chosen.strategy),
        gpus=gpus,
        nodes=nodes,
        layers=layers,
        offload=tuple(offload),
    )


def plan_serve(model: str, *, device: str | None = None, **options: Any) -> Serving:
    """Memory of a server with one base and many adapters (options: see `plan.serve.serve`).

    Raises:
        UserError: Something the user can mend.
    """
    path_checks.require_model(model)
    from lighten.machine import devices
    from lighten.planning.serve import serve

    return serve(model, devices.named(device), **options)


def plan_quantize(model: str, **options: Any) -> Quantizing:
    """Main memory and time to quantise a base (options: see `plan.serve.quantize`).

    Raises:
        UserError: Something the user can mend.
    """
    path_checks.require_model(model)
    from lighten.machine import devices
    from lighten.planning.serve import quantize

    return quantize(model, capacity=devices.named("cpu").memory_bytes, **options)


def plan_formats(
    source: Run | str | os.PathLike[str],
    to: Sequence[str] | str,
    *,
    adapter: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> Forecast:
    """File sizes, memory, disk and time of `quantize`, and what it needs that is not installed.

    Args:
        source: A run, or a model by name.
        to: Formats, as of `quantize`.
        adapter: Which adapter of the run, where it has several.
        output_dir: As of `quantize`.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.machine import devices
    from lighten.quantization.forecast import forecast

    target = None if output_dir is None else Path(output_dir).expanduser()
    return forecast(
        path_checks.source_of(source), to, adapter=adapter, output_dir=target,
        memory_bytes=devices.named("cpu").memory_bytes,
    )  # fmt: skip
