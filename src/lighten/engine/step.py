"""One optimiser step of a cohort, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from lighten.data.batches import MicroBatch
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.forward_backward import learn, shares_of
from lighten.engine.loss import Objective
from lighten.engine.memory_errors import ShortOfMemory, ran_out
from lighten.engine.scaling import LossScaler
from lighten.engine.workers import Workers
from lighten.errors import UserError
from lighten.parallel import ranks
from lighten.parallel.strategies import Strategy


class TrainingDiverged(UserError):
    """A loss or gradient is not a number: the run stops before any optimiser moves.

    Args:
        sentences: What is wrong, by adapter.
    """

    def __init__(self, sentences: Mapping[str, str]) -> None:
        super().__init__("; ".join(sentences.values()))
        self.sentences = dict(sentences)

    def __reduce__(self) -> tuple[type[TrainingDiverged], tuple[dict[str, str]]]:
        return TrainingDiverged, (self.sentences,)


@dataclass
class MemberStep:
    """What one step was for one adapter, over all ranks.

    Attributes:
        loss: Sum of the supervised tokens' losses divided by their count, in nats.
        grad_norm: Before clipping.
        learning_rate: The rate used.
        examples: Rows.
        tokens: Real tokens, prompt included, padding not.
        supervised_tokens: Tokens whose loss counted.
        skipped: A non-finite float16 gradient: the optimiser did not move.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    skipped: bool = False


def train_step(
    batches: Sequence[MicroBatch],
    members: Sequence[AdapterOptimizer],
    objective: Objective,
    accelerator: Accelerator,
    scaler: LossScaler,
    workers: Workers | None = None,
    strategy: Strategy | None = None,
    idle: Sequence[MicroBatch] = (),
) -> dict[str, MemberStep]:
    """Forward, backward and update of every adapter on one step's micro-batches of this rank.

    Args:
        batches: The micro-batches.
        members: The adapters that they hold.
        objective: The loss.
        accelerator: The ranks.
        scaler: For float16: the factor of each adapter's loss.
        workers: Train micro-batches side by side; None: one after another.
        strategy: How weights, gradients and state lie on the ranks; None: each holds everything.
        idle: Micro-batches that count nothing: this rank makes these passes for the others' sake.

    Raises:
        ShortOfMemory: Memory ran out on one of several ranks; all of them raise it.
        TrainingDiverged: A loss is not finite, or a gradient that no float16 factor explains.
        UserError: An adapter has no supervised token in this step, or no gradient at all.
    """
    strategy = strategy or Strategy("ddp", accelerator)
    counted = _counted(batches, members)
    # The loss is a mean over the supervised tokens of the whole step: all micro-batches and all
    # ranks (traps 1 to 3). So the counts have to be known before the first backward pass.
    totals = _over_ranks(counted, accelerator)
    for member, supervised in zip(members, totals[:, 1].tolist(), strict=True):
        if supervised == 0:
            raise UserError(
                f"adapter {member.name!r}: a step without one supervised token; every answer in "
                "it was cut off or empty (raise max_length, or see: lighten data check)"
            )

    per_token = {
        member.name: 1.0 / supervised
        for member, supervised in zip(members, totals[:, 1].tolist(), strict=True)
    }
    broken: BaseException | None = None
    try:
        lost = _passes(batches, idle, members, objective, per_token, accelerator, scaler, workers)
    except (MemoryError, RuntimeError) as error:
        if accelerator.num_processes == 1 or strategy.in_step or not ran_out(error):
            raise
        lost, broken = dict.fromkeys(per_token, 0.0), error
    # What each has lost, and whether memory ran out on a rank, which all have to know.
    told = torch.tensor([*(lost[name] for name in per_token), broken is not None]).double()
    summed = _over_ranks(told, accelerator)
    # A plan's tensors have no values, and one process has raised by now.
    if accelerator.num_processes > 1 and (short := int(summed[-1])):
        raise ShortOfMemory(
            f"out of memory on {short} of {accelerator.num_processes} ranks"
        ) from broken
    totals[:, 0] = summed[:-1]
    report = {
        member.name: MemberStep(
            loss=nll / supervised,
            learning_rate=member.learning_rate,
            examples=int(rows),
            tokens=int(tokens),
            supervised_tokens=int(supervised),
        )
        for member, (nll, supervised, tokens, rows) in zip(members, totals.tolist(), strict=True)
    }
    parameters = [p for member in members for p in member.parameters.values()]
    strategy.sum_gradients(parameters)
    for member in members:
        scaler.unscale(member)
        report[member.name].grad_norm = member.gradient_norm()
    _check(members, report, scaler)
    for member in members:
        own = report[member.name]
        if not own.skipped:  # trap 42: neither weights nor schedule move
            for group in member.optimizer.param_groups:
                group["lr"] = own.learning_rate * group["lr_factor"]
            member.optimizer.step()
            strategy.moved(list(member.parameters.values()))
            member.progress.steps += 1
        member.optimizer.zero_grad(set_to_none=True)
        scaler.update(member.name, finite=not own.skipped)
    return report


def rehearse(
    batches: Sequence[MicroBatch],
    members: Sequence[AdapterOptimizer],
    objective: Objective,
    accelerator: Accelerator,
    scaler: LossScaler,
    workers: Workers | None = None,
    strategy: Strategy | None = None,
    idle: Sequence[MicroBatch] = (),
) -> dict[str, MemberStep]:
    """A step but for its update, to see how long it takes; the gradients go.

    Args, as of `train_step`; nothing is changed by it.

    Returns:
        Nothing of any adapter.
    """
    counts = _counted(batches, members)[:, 1].clamp(min=1.0).tolist()
    per_token = {member.name: 1.0 / count for member, count in zip(members, counts, strict=True)}
    _passes(batches, idle, members, objective, per_token, accelerator, scaler, workers)
    strategy = strategy or Strategy("ddp", accelerator)
    strategy.sum_gradients([p for member in members for p in member.parameters.values()])
    for member in members:
        member.gradient_norm()
        member.optimizer.zero_grad(set_to_none=True)
    return {}


def _passes(
    batches: Sequence[MicroBatch],
    idle: Sequence[MicroBatch],
    members: Sequence[AdapterOptimizer],
    objective: Objective,
    per_token: Mapping[str, float],
    accelerator: Accelerator,
    scaler: LossScaler,
    workers: Workers | None,
) -> dict[str, float]:
    """`_backward`, and the passes for the sake of other ranks."""
    with ranks.lost_within(accelerator.process_index, accelerator.num_processes):
        lost = _backward(batches, members, objective, per_token, scaler, workers)
        nothing, plain = dict.fromkeys(per_token, 0.0), dict.fromkeys(per_token, 1.0)
        for batch in idle:
            learn(batch, objective, nothing, plain, torch.Tensor.backward)
    return lost


def _counted(batches: Sequence[MicroBatch], members: Sequence[AdapterOptimizer]) -> Tensor:
    """Of each adapter: 0.0 for its loss, supervised tokens, tokens and rows; [members, 4]."""
    order = {member.name: place for place, member in enumerate(members)}
    counted = torch.zeros(len(members), 4, dtype=torch.float64)
    for batch in batches:
        for share in shares_of(batch):
            rows = slice(share.start, share.stop)
            counted[order[str(share.member)], 1:] += torch.tensor(
                [batch.supervised_in(share.start, share.stop), sum(batch.lengths[rows]),
                 share.stop - share.start]
            )  # fmt: skip
    return counted


def _over_ranks(counted: Tensor, accelerator: Accelerator) -> Tensor:
    """Float64 counts summed over ranks; one rank's stay on the processor: not every device can."""
    if accelerator.num_processes == 1:
        return counted.clone()
    return ranks.total(accelerator, counted.to(accelerator.device)).cpu()


def _backward(
    batches: Sequence[MicroBatch],
    members: Sequence[AdapterOptimizer],
    objective: Objective,
    per_token: Mapping[str, float],
    scaler: LossScaler,
    workers: Workers | None,
) -> dict[str, float]:
    """Gradients of all micro-batches into the parameters; each adapter's summed token losses."""
    scales = {member.name: scaler.factor(member.name) for member in members}
    if workers is None or not batches:  # the last step of an epoch may leave a rank without rows

        def backward(loss: Tensor) -> None:
            scaler.begin_backward()
            loss.backward()

        found = [learn(batch, objective, per_token, scales, backward) for batch in batches]
    else:
        parameters = [p for member in members for p in member.parameters.values()]
        found = workers.learn(objective, batches, parameters, per_token, scales)
    return {
        member.name: math.fsum(own.get(member.name, 0.0) for own in found) for member in members
    }


def _check(
    members: Sequence[AdapterOptimizer], report: Mapping[str, MemberStep], scaler: LossScaler
) -> None:
    """Look at every adapter before the first one moves: a step given up has changed none."""
    diverged = {}
    for member in members:
        own = report[member.name]
        finite = math.isfinite(own.grad_norm)
        if not math.isfinite(own.loss) or (not finite and scaler.hopeless(member.name)):
            diverged[member.name] = (
                f"adapter {member.name!r}: loss {own.loss} and gradient norm {own.grad_norm} at "
                f"its step {member.progress.steps + 1}; the weights were not changed (a lower "
                f"learning_rate than {member.settings.learning_rate:g} may help)"
            )
        own.skipped = not finite
    if diverged:
        raise TrainingDiverged(diverged)
    for member in members:
        if report[member.name].grad_norm == 0.0 and member.progress.steps == 0:
            raise UserError(
                f"adapter {member.name!r} has no gradient at its first step: nothing it changes "
                "reaches the loss (check lora_target_modules)"
            )
