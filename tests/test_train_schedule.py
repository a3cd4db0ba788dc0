"""The learning rate, against transformers' own schedules."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerState, TrainingArguments, get_scheduler

from lighten.engine.schedule import in_steps, learning_rate_factor, warmup_length


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_after_the_warm_up_it_is_transformers_own(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=5, num_training_steps=40)
    for step in range(40):
        if step >= 5 or schedule == "constant":
            factor = learning_rate_factor(step, 40, 5, schedule)
            assert factor == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


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
