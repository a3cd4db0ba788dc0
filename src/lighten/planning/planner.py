"""Plan many recipes for one device: none of them twice, and several at a time where that helps.

A plan is a trace of some ten thousand small operations in Python, which uses one core. Where
several are wanted at once, processes that are forked from this one make them side by side.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context

import torch

from lighten.errors import MissingExtra, UserError
from lighten.machine import containers
from lighten.machine.forks import computing, end_with_parent
from lighten.planning.gc_pause import spared
from lighten.planning.result import Plan
from lighten.recipe import Recipe

MOST_PROCESSES = 8  # each has its own copy of the interpreter's objects, some 200 MiB


class Planner:
    """Plans recipes; a recipe that was planned before is not planned again.

    Args:
        planned: Plans one recipe.
        in_processes: Whether forked processes may plan: not where rates are measured meanwhile,
            which others beside it would disturb. On a machine with a GPU none does.
    """

    def __init__(self, planned: Callable[[Recipe], Plan], *, in_processes: bool) -> None:
        self._planned = planned
        self._in_processes = in_processes and computing()
        self._plans: dict[str, Plan | UserError] = {}

    def __call__(self, recipe: Recipe) -> Plan:
        """The plan of a recipe.

        Raises:
            UserError: It cannot be planned.
        """
        key = _key(recipe)
        if key not in self._plans:
            self._plans[key] = _plan_or_error(self._planned, recipe)
        outcome = self._plans[key]
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def knows(self, recipe: Recipe) -> bool:
        """Whether the recipe is planned already."""
        return _key(recipe) in self._plans

    @property
    def missing(self) -> list[str]:
        """What kept recipes from being planned that is not installed, with what installs it."""
        outcomes = self._plans.values()
        return sorted({str(outcome) for outcome in outcomes if isinstance(outcome, MissingExtra)})

    def plan_ahead(self, recipes: Iterable[Recipe]) -> None:
        """Make plans side by side that will be asked for.

        Whatever does not come of it is planned when it is asked for.

        Args:
            recipes: Their recipes.
        """
        unplanned = {_key(recipe): recipe for recipe in recipes if _key(recipe) not in self._plans}
        count = min(len(unplanned), containers.cores(), MOST_PROCESSES) if self._in_processes else 1
        if count < 2:
            return
        try:
            plans = _side_by_side(self._planned, [*unplanned.values()], count)
        except (BrokenExecutor, OSError):
            return  # no room for more processes
        self._plans.update(zip(unplanned, plans, strict=True))


def _key(recipe: Recipe) -> str:
    return f"{recipe.model_dump_json()} {sorted(recipe.model_fields_set)}"


def _plan_or_error(planned: Callable[[Recipe], Plan], recipe: Recipe) -> Plan | UserError:
    try:
        with spared():
            return planned(recipe)
    except UserError as error:
        return error


def _side_by_side(
    planned: Callable[[Recipe], Plan], recipes: Sequence[Recipe], count: int
) -> list[Plan | UserError]:
    with warnings.catch_warnings():
        # Python 3.12 warns of threads; those of this process wait, and the forked ones use none.
        warnings.simplefilter("ignore", DeprecationWarning)
        workers = ProcessPoolExecutor(
            count, get_context("fork"), initializer=_begin, initargs=(planned,)
        )
        try:
            return list(workers.map(_plan_here, recipes))
        finally:
            workers.shutdown(cancel_futures=True)


_planned_here: Callable[[Recipe], Plan]  # of a forked process


def _begin(planned: Callable[[Recipe], Plan]) -> None:
    """What a forked process does first."""
    global _planned_here  # a closure cannot be sent with each recipe
    _planned_here = planned
    # Ctrl-C reaches the whole group, and it is the parent's to tell of.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)  # OpenMP's team of the parent has no members here


def _plan_here(recipe: Recipe) -> Plan | UserError:
    return _plan_or_error(_planned_here, recipe)
