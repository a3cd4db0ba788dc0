"""One optimiser step of a cohort, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
class AdapterStep:
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
    adapters: Sequence[AdapterOptimizer],
    objective: Objective,
    accelerator: Accelerator,
    scaler: LossScaler,
    workers: Workers | None = None,
    strategy: Strategy | None = None,
    idle: Sequence[MicroBatch] = (),
    *,
    update: bool = True,
) -> dict[str, AdapterStep]:
    """Forward, backward and update of every adapter on one step's micro-batches of this rank.

    Args:
        batches: The micro-batches.
        adapters: Those that the micro-batches hold, with their optimisers.
        objective: The loss.
        accelerator: The ranks.
        scaler: For float16: the factor of each adapter's loss.
        workers: Train micro-batches side by side; None: one after another.
        strategy: How weights, gradients and state lie on the ranks; None: each holds everything.
        idle: Micro-batches that count nothing: this rank makes these passes for the others' sake.
        update: False: the gradients are thrown away and nothing has changed; to time a step.

    Raises:
        ShortOfMemory: Memory ran out on one of several ranks; all of them raise it.
        TrainingDiverged: A loss is not finite, or a gradient that no float16 factor explains.
        UserError: An adapter has no supervised token in this step, or no gradient at all.
    """
    strategy = strategy or Strategy("ddp", accelerator)
    # The loss is a mean over the supervised tokens of the whole step: all micro-batches and all
    # ranks (traps 1 to 3). So the counts have to be known before the first backward pass.
    report = _counted(batches, adapters, accelerator)
    if update:
        _require_supervised(report)
    per_token = {name: 1.0 / max(1, step.supervised_tokens) for name, step in report.items()}
    scales = {adapter.name: scaler.factor(adapter.name) for adapter in adapters}
    parameters = [p for adapter in adapters for p in adapter.parameters.values()]
    losses: list[dict[str, float]] = []
    out_of_memory: BaseException | None = None
    try:
        with ranks.lost_within(accelerator.process_index, accelerator.num_processes):
            if workers is not None and batches:  # an epoch's last step may have no rows for a rank
                losses = workers.learn(objective, batches, parameters, per_token, scales)
            else:
                for batch in batches:
                    losses.append(learn(batch, objective, per_token, scales, scaler.backward))
            for batch in idle:
                uncounted, unscaled = dict.fromkeys(per_token, 0.0), dict.fromkeys(per_token, 1.0)
                learn(batch, objective, uncounted, unscaled, torch.Tensor.backward)
    except (MemoryError, RuntimeError) as error:
        if accelerator.num_processes == 1 or strategy.in_step or not ran_out(error):
            raise
        losses, out_of_memory = [], error
    for name, loss in _losses_of_all_ranks(losses, per_token, out_of_memory, accelerator).items():
        report[name].loss = loss / max(1, report[name].supervised_tokens)

    strategy.sum_gradients(parameters)
    for adapter in adapters:
        scaler.unscale(adapter)
        report[adapter.name].grad_norm = adapter.gradient_norm()
    if update and len(adapters) > 1 and objective.cohort.shares_products and not _is_finite(report):
        # Of one adapter, perhaps: in products that all share it has reached the others.
        for adapter in adapters:
            adapter.optimizer.zero_grad(set_to_none=True)
        with objective.cohort.apart():
            return train_step(
                batches, adapters, objective, accelerator, scaler, workers, strategy, idle
            )
    if update:
        _require_finite(adapters, report, scaler)
    for adapter in adapters:
        if update:
            _move(adapter, report[adapter.name], scaler, strategy)
        adapter.optimizer.zero_grad(set_to_none=True)
    return report


def _counted(
    batches: Sequence[MicroBatch], adapters: Sequence[AdapterOptimizer], accelerator: Accelerator
) -> dict[str, AdapterStep]:
    """Rows and tokens of each adapter in the step, over all ranks, and its learning rate."""
    places = {adapter.name: place for place, adapter in enumerate(adapters)}
    counts = torch.zeros(len(adapters), 3, dtype=torch.float64)
    for batch in batches:
        for share in shares_of(batch):
            rows = slice(share.start, share.stop)
            supervised = batch.supervised_in(share.start, share.stop)
            counts[places[str(share.adapter)]] += torch.tensor(
                [supervised, sum(batch.lengths[rows]), share.stop - share.start]
            )
    return {
        adapter.name: AdapterStep(
            learning_rate=adapter.learning_rate,
            examples=int(rows),
            tokens=int(tokens),
            supervised_tokens=int(supervised),
        )
        for adapter, (supervised, tokens, rows) in zip(
            adapters, _over_ranks(counts, accelerator).tolist(), strict=True
        )
    }


def _require_supervised(report: Mapping[str, AdapterStep]) -> None:
    for name, step in report.items():
        if step.supervised_tokens == 0:
            raise UserError(
                f"adapter {name!r}: a step without one supervised token; every answer in "
                "it was cut off or empty (raise max_length, or see: lighten data check)"
            )


def _losses_of_all_ranks(
    losses: Sequence[Mapping[str, float]],
    names: Iterable[str],
    out_of_memory: BaseException | None,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Each adapter's summed token losses, once all ranks have agreed that memory sufficed.

    Args:
        losses: Of this rank, by micro-batch and adapter.
        names: The adapters.
        out_of_memory: What was raised where memory ran out on this rank.
        accelerator: The ranks.

    Raises:
        ShortOfMemory: It ran out on one rank: all raise this, so that all make the step again.
    """
    sums = {name: math.fsum(loss.get(name, 0.0) for loss in losses) for name in names}
    local = torch.tensor([*sums.values(), out_of_memory is not None], dtype=torch.float64)
    *totals, failed = _over_ranks(local, accelerator).tolist()
    # One process has raised by now, and a plan's tensors have no values.
    if accelerator.num_processes > 1 and failed:
        raise ShortOfMemory(
            f"out of memory on {int(failed)} of {accelerator.num_processes} ranks"
        ) from out_of_memory
    return dict(zip(sums, totals, strict=True))


def _over_ranks(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Float64 values summed over ranks; one rank's stay on the processor: not every device can."""
    if accelerator.num_processes == 1:
        return values
    return ranks.total(accelerator, values.to(accelerator.device)).cpu()


def _is_finite(report: Mapping[str, AdapterStep]) -> bool:
    figures = (figure for step in report.values() for figure in (step.loss, step.grad_norm))
    return all(map(math.isfinite, figures))


def _require_finite(
    adapters: Sequence[AdapterOptimizer], report: Mapping[str, AdapterStep], scaler: LossScaler
) -> None:
    """Look at every adapter before the first one moves: a step given up has changed none."""
    diverged = {}
    for adapter in adapters:
        step = report[adapter.name]
        finite = math.isfinite(step.grad_norm)
        if not math.isfinite(step.loss) or (not finite and scaler.hopeless(adapter.name)):
            # Before anything has learnt it is the base that computes no number.
            overflows = scaler.enabled and not adapter.progress.steps
            mend = (
                "float16 ends at 65,504, and some models' activations do not; set dtype to float32"
                if overflows
                else f"a lower learning_rate than {adapter.settings.learning_rate:g} may help"
            )
            diverged[adapter.name] = (
                f"adapter {adapter.name!r}: loss {step.loss} and gradient norm {step.grad_norm} at "
                f"its step {adapter.progress.steps + 1}; the weights were not changed ({mend})"
            )
        step.skipped = not finite
    if diverged:
        raise TrainingDiverged(diverged)
    for adapter in adapters:
        if report[adapter.name].grad_norm == 0.0 and adapter.progress.steps == 0:
            raise UserError(
                f"adapter {adapter.name!r} has no gradient at its first step: nothing it changes "
                "reaches the loss (check lora_target_modules)"
            )


def _move(
    adapter: AdapterOptimizer, step: AdapterStep, scaler: LossScaler, strategy: Strategy
) -> None:
    """The optimiser's update; of a step to be skipped neither weights nor schedule (trap 42)."""
    if not step.skipped:
        for group in adapter.optimizer.param_groups:
            group["lr"] = step.learning_rate * group["lr_factor"]
        adapter.optimizer.step()
        strategy.moved(list(adapter.parameters.values()))
        adapter.progress.steps += 1
    scaler.update(adapter.name, finite=not step.skipped)
