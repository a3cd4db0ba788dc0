"""One optimiser step of a cohort, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from lighten.data.batches import MicroBatch
from lighten.errors import UserError
from lighten.parallel import ranks
from lighten.train.lanes import Lanes
from lighten.train.loss import Objective
from lighten.train.member import Member
from lighten.train.passes import learn, shares_of
from lighten.train.scaling import LossScaler


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
    members: Sequence[Member],
    objective: Objective,
    accelerator: Accelerator,
    scaler: LossScaler,
    lanes: Lanes | None = None,
) -> dict[str, MemberStep]:
    """Forward, backward and update of every adapter on one step's micro-batches of this rank.

    Args:
        batches: The micro-batches.
        members: The adapters that they hold.
        objective: The loss.
        accelerator: The ranks.
        scaler: For float16: the factor of each adapter's loss.
        lanes: Train micro-batches side by side; None: one after another.

    Raises:
        TrainingDiverged: A loss is not finite, or a gradient that no float16 factor explains.
        UserError: An adapter has no supervised token in this step, or no gradient at all.
    """
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
    lost = _backward(batches, members, objective, per_token, scaler, lanes)
    counted[:, 0] = torch.tensor([lost[member.name] for member in members], dtype=torch.float64)
    totals[:, 0] = _over_ranks(counted[:, 0], accelerator)
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
    # Adapters are small: one flat sum per step, whatever each rank's micro-batches were, costs
    # less than hooks that fire per backward pass.
    if accelerator.num_processes > 1:
        gradients = [gradient for member in members for gradient in member.gradients()]
        flat = ranks.total(accelerator, torch.cat([g.flatten() for g in gradients]))
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]),
                                    strict=True):  # fmt: skip
            gradient.copy_(summed.view_as(gradient))

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
            member.progress.steps += 1
        member.optimizer.zero_grad(set_to_none=True)
        scaler.update(member.name, finite=not own.skipped)
    return report


def rehearse(
    batches: Sequence[MicroBatch],
    members: Sequence[Member],
    objective: Objective,
    scaler: LossScaler,
    lanes: Lanes | None = None,
) -> None:
    """The passes of a step on this rank, to see how long they take; their gradients go.

    Args, as of `train_step`; nothing is changed by it.
    """
    counts = _counted(batches, members)[:, 1].clamp(min=1.0).tolist()
    per_token = {member.name: 1.0 / count for member, count in zip(members, counts, strict=True)}
    _backward(batches, members, objective, per_token, scaler, lanes)
    for member in members:
        member.gradient_norm()
        member.optimizer.zero_grad(set_to_none=True)


def _counted(batches: Sequence[MicroBatch], members: Sequence[Member]) -> Tensor:
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
    members: Sequence[Member],
    objective: Objective,
    per_token: Mapping[str, float],
    scaler: LossScaler,
    lanes: Lanes | None,
) -> dict[str, float]:
    """Gradients of all micro-batches into the parameters; each adapter's summed token losses."""
    scales = {member.name: scaler.factor(member.name) for member in members}
    if lanes is None or not batches:  # the last step of an epoch may leave a rank without rows

        def backward(loss: Tensor) -> None:
            scaler.begin_backward()
            loss.backward()

        found = [learn(batch, objective, per_token, scales, backward) for batch in batches]
    else:
        parameters = [p for member in members for p in member.parameters.values()]
        found = lanes.learn(objective, batches, parameters, per_token, scales)
    return {
        member.name: math.fsum(own.get(member.name, 0.0) for own in found) for member in members
    }


def _check(members: Sequence[Member], report: Mapping[str, MemberStep], scaler: LossScaler) -> None:
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
