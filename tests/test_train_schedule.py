"""The learning rate, against transformers' own schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerState, TrainingArguments, get_scheduler

from lighten.engine.schedule import in_steps, learning_rate_factor, warmup_length


@pytest.mark.parametrize(
    ("schedule", "parameters"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.5}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_restarts", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_with_min_lr", {"min_lr": 3e-5}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
        ("polynomial", {}),
        ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
        ("inverse_sqrt", {}),
        ("inverse_sqrt", {"timescale": 3}),
        ("warmup_stable_decay", {"num_decay_steps": 10}),
        ("warmup_stable_decay", {"num_decay_steps": 10, "decay_type": "linear"}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 38, "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
        ),
    ],
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_after_the_warm_up_it_is_transformers_own(
    schedule: str, parameters: dict[str, Any], warmup: int
) -> None:
    rate = 2e-4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=warmup, num_training_steps=40,
        scheduler_specific_kwargs=parameters,
    )  # fmt: skip
    for step in range(40):
        if step >= warmup or schedule == "constant":
            factor = learning_rate_factor(step, 40, warmup, schedule, parameters, peak=rate)
            assert rate * factor == pytest.approx(scheduler.get_last_lr()[0], abs=1e-16)
        optimizer.step()
        scheduler.step()


def test_the_steps_of_an_end_may_be_a_share() -> None:
    factors = [
        [learning_rate_factor(step, 40, 4, "warmup_stable_decay", {"num_decay_steps": steps})
         for step in range(40)]
        for steps in (10, 0.25)
    ]  # fmt: skip
    assert factors[0] == factors[1]


def test_a_warm_up_rises_evenly_and_never_wastes_its_first_step() -> None:
    assert [learning_rate_factor(s, 40, 4, "linear") for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_its_length_is_a_share_rounded_up_or_as_given() -> None:
    assert warmup_length(101, 0.03, None) == 4
    assert warmup_length(101, 0.03, 0) == 0


@pytest.mark.parametrize("steps", [0, 0.03, 0.1, 1, 7])
def test_a_number_of_steps_below_1_is_a_share_as_in_transformers(steps: float) -> None:
    expected = TrainingArguments(warmup_steps=steps).get_warmup_steps(101)
    assert warmup_length(101, 0.5, steps) == expected


@pytest.mark.parametrize("total_steps", [3, 8, 101, 1000])
@pytest.mark.parametrize("share", [0.0003, 0.05, 0.07, 0.1, 0.25, 0.99])
def test_how_often_below_1_is_a_share_as_in_transformers(share: float, total_steps: int) -> None:
    state = TrainerState()
    state.compute_steps(TrainingArguments(eval_steps=share), total_steps)
    assert in_steps(share, total_steps) == state.eval_steps
