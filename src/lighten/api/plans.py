"""The verbs of planning: one device or many, a server, quantising."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten import path_checks
from lighten.api.recipes import RecipeLike, plannable
from lighten.errors import UserError
from lighten.recipe import Recipe

if TYPE_CHECKING:
    from lighten.planning.distributed import Distributed, Strategy
    from lighten.planning.probe import Probed
    from lighten.planning.result import Plan
    from lighten.planning.search import Limits, SearchResult, Sized
    from lighten.planning.serve import Quantizing
    from lighten.planning.serving import Serving
    from lighten.quantization.forecast import Forecast
    from lighten.runs import Run


def plan(
    recipe: RecipeLike | None = None,
    *,
    device: str | None = None,
    changes: bool = True,
    on_plan: Callable[[Plan], None] | None = None,
    **overrides: Any,
) -> Plan:
    """Predict memory and time: `plan("recipe.yaml")` or `plan(model=…, device="t4")`.

    Args:
        recipe: A recipe, its file, a mapping of settings, a run, or None to take settings from the
            overrides alone, which need no `dataset` then.
        device: By name (`t4`, `a100-80`, `cpu`, …); default this machine.
        changes: Where it does not surely fit, look for what would.
        on_plan: Given the plan before changes are looked for.
        overrides: Settings by name.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.planning.gc_pause import unsearched

    chosen = plannable(recipe, **overrides)
    with unsearched():
        from lighten.machine import devices
        from lighten.planning.predict import plan as predict

    return predict(chosen, devices.named(device), changes=changes, on_plan=on_plan)


def plan_probe(
    recipe: RecipeLike | None = None, *, device: str | None = None, **overrides: Any
) -> tuple[Plan, Probed]:
    """Plan, then make one true step of the planned shape with random weights, and compare.

    Raises:
        UserError: Something the user can mend; the device is not of this machine.
    """
    chosen = plannable(recipe, **overrides)
    from lighten.machine import devices
    from lighten.planning import predict
    from lighten.planning.probe import probe

    where = devices.named(device)
    rows = predict.read_rows(chosen, [])
    prediction = predict.plan(chosen, where, rows=rows, read_data=False)
    return prediction, probe(chosen, prediction, where, rows)


def plan_search(
    recipe: RecipeLike | None = None,
    *,
    device: str | None = None,
    log: Callable[[str], None] | None = None,
    **overrides: Any,
) -> tuple[SearchResult, Recipe | None]:
    """The fastest configuration that fits a device, and its recipe.

    Settings that are given as overrides stay as they are given.

    Args:
        recipe: As for `plan`.
        device: As for `plan`.
        log: Given a line about what is being looked at.
        overrides: Settings by name.

    Raises:
        UserError: Something the user can mend.
    """
    chosen = plannable(recipe, **overrides)
    from lighten.machine import devices
    from lighten.planning import predict, search
    from lighten.training.base import require_trainable

    require_trainable(chosen)
    rows = predict.read_rows(chosen, [])
    planner = predict.planner_for(devices.named(device), rows)
    result = search.fastest(chosen, planner, fixed=fixed_by(overrides), log=log)
    best = result.best
    return result, None if best is None else chosen.changed(best.settings)


def plan_largest(
    models: Sequence[str],
    *,
    device: str | None = None,
    log: Callable[[str], None] | None = None,
    **overrides: Any,
) -> list[Sized]:
    """Which of several models is the largest that a device can train.

    Args:
        models: By name; of hub models only the configuration is read.
        device: As for `plan`.
        log: Given a line about what is being looked at.
        overrides: Settings by name, for all of them.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.machine import devices
    from lighten.planning import predict, search

    return search.largest(
        [(name, predict.parameters_of(name)) for name in models],
        lambda name: plannable(model_name_or_path=name, **overrides),
        predict.planner_for(devices.named(device)),
        fixed=fixed_by(overrides),
        log=log,
    )


def plan_limits(
    recipe: RecipeLike | None = None, *, device: str | None = None, **overrides: Any
) -> Limits:
    """The longest context and the most rows that fit a device.

    Raises:
        UserError: Something the user can mend.
    """
    chosen = plannable(recipe, **overrides)
    from lighten.machine import devices
    from lighten.planning import predict, search
    from lighten.training.base import require_trainable

    require_trainable(chosen)
    planner = predict.planner_for(devices.named(device))
    return search.limits(chosen, planner, longest=predict.described(chosen).context_length)


def fixed_by(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that overrides name, by their own names: a search leaves them alone."""
    from lighten.recipe import aliases

    return tuple(aliases.translate(overrides)[0])


def plan_spread(
    recipe: RecipeLike | None = None,
    *,
    device: str | None = None,
    strategy: Strategy | None = None,
    gpus: int = 1,
    nodes: int = 1,
    processes: int | None = None,
    offload: Sequence[str] = (),
    **overrides: Any,
) -> Distributed:
    """Memory, communication and time per rank on many GPUs, from published formulas.

    Or of as many processes on this machine's processor, which share its memory.

    Args:
        recipe: As for `plan`; its micro-batch is that of each rank.
        device: The GPU, by name.
        strategy: `ddp`, `zero1`, `zero2`, `zero3`, `fsdp` or `fsdp_hybrid`; None: the recipe's,
            or the one that fits and sends least (`ddp` where none fits).
        gpus: Per node.
        nodes: Machines.
        processes: On this machine's processor; GPUs and nodes are then left out.
        offload: `optimizer`, `param`, or both, to main memory; none: what the recipe says.
        overrides: Settings by name.

    Raises:
        UserError: Something the user can mend.
    """
    if strategy is not None and overrides.get("offload_params", "none") != "none":
        overrides["strategy"] = strategy  # one goes with the other
    chosen = plannable(recipe, **overrides)
    for name, count in (("gpus", gpus), ("nodes", nodes)):
        if count < 1:
            raise UserError(f"--{name} is {count}; give 1 or more")
    if processes is not None:
        _require_processes(processes, device, strategy, gpus * nodes, offload)
    from lighten.machine import devices
    from lighten.planning import offloaded, predict
    from lighten.planning.distributed import TRAINED, cheapest, of_recipe, on_ranks, spread
    from lighten.recipe import spread as spread_rules

    where = devices.named(device if processes is None else "cpu")
    ranks = gpus * nodes if processes is None else processes
    full = chosen.method == "full"
    named = chosen if strategy is None else chosen.model_copy(update={"strategy": strategy})
    spread_rules.require_ranks(named, ranks)
    on_disk = not offload and offloaded.on_disk(chosen)
    offload = offload or offloaded.places(chosen, where.kind)
    layers = predict.described(chosen).layers

    @functools.cache
    def alone_of(cut: str) -> Plan:
        recipe = chosen.model_copy(update={"strategy": cut, "offload_params": "none"})
        return predict.plan(recipe, where, changes=False, ranks=ranks)

    def faults(name: Strategy) -> list[str]:
        """What a recipe that names this strategy is refused for."""
        trained = "fsdp" if name == "fsdp_hybrid" else name
        return spread_rules.problems(chosen.model_copy(update={"strategy": trained}))

    def spread_by(name: Strategy) -> Distributed:
        # Where layers are gathered, micro-batches hold rows of all adapters.
        gathers = name == "fsdp_hybrid" or spread_rules.gathers(name, full=full)
        alone = alone_of("fsdp" if gathers else "ddp")
        if processes is not None:
            return on_ranks(alone, where, name, ranks=processes, local=processes, layers=layers,
                            offload=tuple(offload), on_disk=on_disk)  # fmt: skip
        return spread(alone, where, name, gpus=gpus, nodes=nodes, layers=layers,
                      offload=tuple(offload), on_disk=on_disk)  # fmt: skip

    if strategy is None and chosen.strategy == "auto" and (processes is not None or not offload):
        best = cheapest(spread_by(name) for name in TRAINED if not faults(name))
        if best is not None:
            return best
    if strategy is not None and (refused := faults(strategy)):
        raise UserError("\n".join(refused))
    return spread_by(strategy or of_recipe(chosen.strategy))


def _require_processes(
    processes: int, device: str | None, strategy: str | None, gpus: int, offload: Sequence[str]
) -> None:
    """What goes with processes on this machine's processor.

    Raises:
        UserError: The first that does not.
    """
    if processes < 1:
        raise UserError(f"--processes is {processes}; give 1 or more")
    if gpus > 1:
        raise UserError("give --processes (on the processor), or --gpus and --nodes, not both")
    if device not in (None, "cpu", "this"):
        raise UserError(f"--processes is of this machine's processor; leave --device {device} out")
    if strategy == "fsdp_hybrid":
        raise UserError("--fsdp hybrid is of several machines; with --processes use full")
    if offload:
        raise UserError("--offload is of GPUs; with --processes set offload_optimizer: nvme")


def plan_serve(
    model: str | os.PathLike[str], *, device: str | None = None, **options: Any
) -> Serving:
    """Memory of a server with one base and many adapters.

    Args:
        model: The base; of a hub model only the configuration is read.
        device: As for `plan`.
        options: Of `lighten.planning.serve.serve`: `adapters`, `rank`, `context`, `concurrency`, ….

    Raises:
        UserError: Something the user can mend.
    """
    model = os.fspath(model)
    path_checks.require_model(model)
    from lighten.machine import devices
    from lighten.planning.serve import serve

    return serve(model, devices.named(device), **options)


def plan_quantize(model: str | os.PathLike[str], **options: Any) -> Quantizing:
    """Main memory and time to quantise a base.

    Args:
        model: The base; of a hub model only the configuration is read.
        options: Of `lighten.planning.serve.quantize`: `storage`, `double`, `revision`.

    Raises:
        UserError: Something the user can mend.
    """
    model = os.fspath(model)
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
