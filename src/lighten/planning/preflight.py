"""The plan that every training makes first, and what it leaves for later plans.

A plan never breaks a run: whatever goes wrong with it is one line, and the run goes on. Only where
it surely does not fit is the run refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lighten.errors import UserError
from lighten.machine import devices
from lighten.machine.devices import Device
from lighten.parallel import launch
from lighten.parallel.launch import Launch
from lighten.planning import calibration, offloaded, predict, text
from lighten.planning.distributed import Distributed, of_recipe, on_ranks
from lighten.planning.planner import Planner
from lighten.planning.result import Plan
from lighten.recipe import Recipe
from lighten.runs import Run, now
from lighten.training.base import require_trainable
from lighten.training.prediction import Prediction
from lighten.training.progress import TrainingProgress
from lighten.training.rows import Rows
from lighten.wording import first_line

MOST_ADVICE = 3


def plan_first(recipe: Recipe, *, force: bool = False, progress: bool = False) -> Prediction | None:
    """Plan a run on this machine's device.

    Args:
        recipe: What will be trained.
        force: Say that it does not fit, and go on.
        progress: Show on standard error how far the data are encoded.

    Returns:
        The plan as training takes it; None on a rank that is not the first.

    Raises:
        UserError: It surely does not fit, no gradient passes through its base, or no run would
            come of the data.
    """
    place = launch.recognise()
    if not place.main:
        return None
    # A model that is here for the first time is fetched and converted now.
    with TrainingProgress(enabled=progress) as shown:
        require_trainable(recipe)
        try:
            device = devices.named()
            rows = _rows(recipe, device, shown)
        except UserError:
            raise  # the run would end with it, too
        except Exception as error:
            return _none(error)
        try:
            plan = predict.plan(
                _alone(recipe, place), device, rows=rows, read_data=False, changes=False,
                ranks=place.world_size,
            )  # fmt: skip
        except Exception as error:
            return _none(error)
    advice = _advice(recipe, device, plan, rows, place)
    lines, fits, record = text.lines(plan), plan.fits(), plan.to_dict()
    if (spread := _over_ranks(recipe, device, plan, place)) is not None:
        lines.append(text.spread_verdict(spread))
        fits, record["spread"] = spread.fits(), spread.to_dict()
    if fits is False:
        if not force:
            raise UserError(_refusal(plan, spread, advice()))
        lines.append("it does not fit by this plan; going on, as --force says")
    return Prediction(lines, record, rows, advice)


def _alone(recipe: Recipe, place: Launch) -> Recipe:
    """Of which the plan of one process has all states: several ranks are reckoned from that."""
    whole = place.world_size > 1 and recipe.offload_params != "none"
    return recipe.model_copy(update={"offload_params": "none"}) if whole else recipe


def _rows(recipe: Recipe, device: Device, shown: TrainingProgress) -> Rows | None:
    """All rows of the data, encoded; on the way what is slow on the device is said."""
    if (slow := predict.slow_format_of(recipe, device)) is not None:
        shown.note(f"warning: {slow}")
    return predict.read_rows(recipe, [], shown.encoding, all_rows=True)


def _none(error: Exception) -> Prediction:
    """Why there is no plan; whatever it is, the run does not depend on it."""
    return Prediction([f"no plan: {first_line(error)}"])


def remember(run: Run, *, uninterrupted: bool = True) -> None:
    """Add what was predicted and measured to this machine's calibration file, quietly.

    Args:
        run: A run that has ended.
        uninterrupted: It was made in one go. What goes on from a checkpoint, or had nothing left
            to do, measures something else than what was planned.
    """
    if not uninterrupted:
        return
    info, plan = run.info(), run.plan()
    pair = info.get("prediction")
    if plan is None or pair is None or info.get("status") != "finished" or info.get("retries"):
        return  # a run that went on with smaller micro-batches is not what was planned
    try:
        machine = predict.machine_name(devices.named())
        uncorrected = plan.get("traced") or {}
        calibration.add(
            {
                "when": now(),
                "device": machine,
                "model": plan["model"],
                "weights_bytes": _weights_bytes(plan),
                "method": plan["method"],
                "shape": plan["shape"],
                "memory": _against(uncorrected.get("expected"), pair.get("memory")),
                "step_seconds": _against(uncorrected.get("seconds"), pair.get("step_seconds")),
            }
        )
    except (UserError, OSError, KeyError) as error:
        run.update(calibration=f"not kept: {first_line(error)}")


def _weights_bytes(plan: Mapping[str, Any]) -> float | None:
    states = plan.get("states")
    return None if states is None else float(states["frozen"] + states["trained"])


def _against(traced: float | None, pair: dict[str, float] | None) -> dict[str, float] | None:
    """Measured beside what the trace alone said: a correction must not feed on itself."""
    if pair is None:
        return None
    return {"predicted": pair["predicted"] if traced is None else traced,
            "measured": pair["measured"]}  # fmt: skip


def _advice(
    recipe: Recipe, device: Device, plan: Plan, rows: Rows | None, place: Launch
) -> Callable[[], Sequence[str]]:
    def advice() -> list[str]:
        try:
            planner = predict.planner_for(device, rows, ranks=place.world_size)
            # Each change is compared with `plan`, and so planned as that was.
            as_planned = Planner(lambda one: planner(_alone(one, place)), in_processes=False)
            moved = recipe.offload_params != "none"
            changes, cut = predict.changes_of(recipe, plan, as_planned if moved else planner)
        except Exception as error:  # memory may be short just now
            return [f"what would need less cannot be planned here: {first_line(error)}"]
        return [*(text.change(change) for change in changes[:MOST_ADVICE]), *cut]

    return advice


def _over_ranks(recipe: Recipe, device: Device, plan: Plan, place: Launch) -> Distributed | None:
    """What each rank of this launch needs; None for one process."""
    if place.world_size == 1:
        return None
    return on_ranks(
        plan, device, of_recipe(recipe.strategy), ranks=place.world_size,
        local=place.local_world_size, layers=predict.described(recipe).layers,
        offload=offloaded.places(recipe, device.kind), on_disk=offloaded.on_disk(recipe),
    )  # fmt: skip


def _refusal(plan: Plan, spread: Distributed | None, advice: Sequence[str]) -> str:
    mend = "".join(f"\n  - {line}" for line in advice)
    verdict = text.verdict(plan) if spread is None else text.spread_verdict(spread)
    return f"{verdict}; --force trains all the same" + (
        f", and these would need less:{mend}" if advice else ""
    )
