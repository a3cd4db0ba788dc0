"""The language-model loss of a micro-batch: logits only where a token is supervised.

Dimensions: B rows, T padded tokens, S supervised positions of the micro-batch, H hidden size,
V vocabulary. The backbone runs without its head; the head's logits [S, V] are formed chunk by
chunk, and the gradient of the hidden states in the same pass, so that no more than one chunk of
logits ever exists. The idea is that of Cut Cross-Entropy (arXiv 2411.09009) and of Liger's fused
linear cross-entropy (arXiv 2410.10989), here in plain PyTorch; where there is a kernel, it turns a
chunk of logits into its gradients (`fused_loss`).
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lighten.adapters.frozen import weight_of
from lighten.adapters.layers import CohortCopies, CohortLinear, Share
from lighten.adapters.trained import Trained
from lighten.cpu import products
from lighten.data.batches import MicroBatch
from lighten.engine import fused_loss
from lighten.engine.fused_loss import cross_entropy_
from lighten.models.packed_rows import packed

# Bytes of one chunk of logits, large enough to fill a matrix product (benchmarks/limit.py), and the
# rows that it holds a multiple of, by the kind of device that has a kernel. None: PyTorch's
# operations, whose logits are float32; 256 rows of a 49k vocabulary. On a GPU 512 of 128k.
CHUNKS: dict[str | None, tuple[int, int]] = {
    None: (48 * 2**20, 1), "cpu": (64 * 2**20, 32), "cuda": (128 * 2**20, 128),
}  # fmt: skip
PIECE_BYTES = 16 * 2**20  # of the head's gradient, float32
# Up to what a position's loss counts in the head's gradient while that is formed in float16: a
# chunk of some hundred positions sums up to no more than some of their hidden states then.
LARGEST_WEIGHT = 2.0**-5
# How far the fast path may be from the model's own loss on the first batch, relative.
AGREEMENT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
# Rows of the first batch, and positions of each, whose loss is compared with the model's own.
CHECKED_ROWS, CHECKED_POSITIONS = 8, 64


@dataclass(frozen=True)
class HeadRule:
    """What an architecture does to its logits after the head.

    Attributes:
        scale: Factor on the logits (Cohere's `logit_scale`, Falcon-H1's `lm_head_multiplier`,
            Granite's 1 / `logits_scaling`, HyperCLOVA X's `logits_scaling`).
        softcap: c in c · tanh(logits / c) (Gemma 2's `final_logit_softcapping`, RecurrentGemma's
            `logits_soft_cap`), or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> HeadRule:
        """Read the rule from the configuration: of a model that also sees, from its decoder's."""
        config, whole = model.config.get_text_config(), model.config

        def setting(name: str) -> float | None:
            value: float | None = getattr(config, name, None) or getattr(whole, name, None)
            return value

        scale = float(setting("logit_scale") or 1.0)
        scale *= float(setting("lm_head_multiplier") or 1.0)
        scaling = float(setting("logits_scaling") or 1.0)
        scale *= scaling if config.model_type == "hyperclovax" else 1.0 / scaling
        return cls(scale, setting("final_logit_softcapping") or setting("logits_soft_cap"))

    def apply(self, logits: Tensor) -> Tensor:
        """[S, V] raw logits → [S, V] final ones."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


class Workspace(threading.local):
    """A thread's memory for one chunk of logits: fresh blocks of this size cost page faults."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] of what is in it; the values are whatever they were."""
        buffer = self._buffers.get(name)
        size = rows * columns
        if (
            buffer is None
            or buffer.numel() < size
            or buffer.dtype != dtype
            or (buffer.device != like.device)
        ):
            buffer = torch.empty(size, dtype=dtype, device=like.device)
            self._buffers[name] = buffer
        return buffer[:size].view(rows, columns)

    def chunks(self, positions: int, weight: Tensor, kernel: str | None) -> Iterable[slice]:
        """Positions whose logits are formed together, as `_chunks` has them; a plan needs few."""
        return _chunks(positions, weight, kernel)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of the cross-entropies over a head, chunk by chunk.

    Kept for the backward pass: the gradient of each position's loss by its hidden state, without
    the weight, so that float16 does not underflow; and the head's gradient if it learns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weights: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        rule: HeadRule,
        space: Workspace,
        kernel: str | None,
    ) -> tuple[Tensor, Tensor]:
        W = head_weight.to(hidden.dtype)  # a head that learns may be float32 over bfloat16 states
        bias = None if head_bias is None else head_bias.to(hidden.dtype)
        nll = hidden.new_empty(labels.shape, dtype=torch.float32)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_W = torch.zeros_like(W, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        grad_bias = nll.new_zeros(W.shape[0]) if ctx.needs_input_grad[4] else None
        lifted, lift = weights, None
        if grad_W is not None and W.dtype == torch.float16 and len(weights):
            lifted, lift = _lifted(weights)
        learns = any(ctx.needs_input_grad)
        for rows in space.chunks(len(labels), W, kernel):
            raw = _logits(hidden[rows], W, space)
            if bias is not None:
                raw.add_(bias)
            if kernel:
                nll[rows] = cross_entropy_(raw, labels[rows], rule.scale, rule.softcap or 0.0)
            else:
                nll[rows] = _gradients_for_logits(raw, labels[rows], rule, space, learns)
            if grad is not None:
                products.linear_into(grad[rows], raw, W.T)
            if grad_bias is not None:
                grad_bias += (raw * weights[rows, None]).sum(0)
            if grad_W is not None:
                _add_product(grad_W, raw.mul_(lifted[rows, None].to(raw.dtype)), hidden[rows])
            del raw  # before the next chunk's are formed
        if grad_W is not None and lift is not None:
            grad_W /= lift
        ctx.formats = head_weight.dtype, None if head_bias is None else head_bias.dtype
        ctx.save_for_backward(grad, grad_W, grad_bias, weights)
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad, grad_W, grad_bias, weights = ctx.saved_tensors
        if grad is not None:
            grad = (grad * (weights * grad_total)[:, None]).to(grad.dtype)
        if grad_W is not None:
            # In place: it is as large as the head, and nobody goes backward twice.
            grad_W = grad_W.mul_(grad_total).to(ctx.formats[0])
        if grad_bias is not None:
            grad_bias = (grad_bias * grad_total).to(ctx.formats[1])
        return grad, None, None, grad_W, grad_bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, space: Workspace) -> Tensor:
    """Hidden states [n, H] times the head [V, H]: [n, V], for the caller to change."""
    if products.takes(hidden, weight):
        return products.linear(hidden, weight)
    raw = space.take("logits", len(hidden), hidden, weight.shape[0], weight.dtype)
    return torch.mm(hidden, weight.T, out=raw)


def _lifted(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weights times a power of two that brings the largest up to `LARGEST_WEIGHT`, and that.

    A token of a step of thousands counts some 1e-4: times it, the probability of any word but the
    likeliest is less than float16 holds, and its row of the head would learn nothing.
    """
    largest = weights.amax().clamp_min(torch.finfo(weights.dtype).tiny)
    lift = (LARGEST_WEIGHT / largest).log2().floor().clamp_min(0.0).exp2()
    return weights * lift, lift


def _add_product(total: Tensor, gradients: Tensor, hidden: Tensor) -> None:
    """Add gradientsᵀ hidden ([n, V], [n, H]) to a float32 total [V, H].

    A processor makes a float32 copy of what it adds in another format: as large as the head, so it
    is added piece by piece there.
    """
    size = total.shape[0]
    if total.device.type == "cpu":
        size = max(1, PIECE_BYTES // (4 * total.shape[1]))
    for start in range(0, total.shape[0], size):
        piece = gradients[:, start : start + size]
        total[start : start + size] += products.linear(piece.T, hidden.T)


def _gradients_for_logits(
    raw: Tensor, labels: Tensor, rule: HeadRule, space: Workspace, needs_gradient: bool
) -> Tensor:
    """As `fused_loss.cross_entropy_`, in PyTorch's operations; losses alone if not wanted."""
    columns = labels[:, None]
    logits = rule.apply(raw)
    gradient = space.take("gradient", len(raw), raw, raw.shape[1], torch.float32).copy_(logits)
    torch.softmax(gradient, -1, out=gradient)
    # log Σ exp from the largest: exact in float32 without another pass over exponentials.
    normaliser = logits.amax(1).float() - gradient.amax(1).log()
    nll = normaliser - logits.gather(1, columns)[:, 0].float()
    if not needs_gradient:
        return nll
    gradient.scatter_add_(1, columns, gradient.new_full(columns.shape, -1.0))
    if rule.softcap is not None:
        gradient *= 1.0 - (logits.float() / rule.softcap).square_()
    if rule.scale != 1.0:
        gradient *= rule.scale
    raw.copy_(gradient)
    return nll


def _chunks(positions: int, weight: Tensor, kernel: str | None) -> list[slice]:
    """Positions whose logits are formed together.

    Args:
        positions: All of them.
        weight: Of the head, [V, H].
        kernel: The kind of device whose kernel turns logits into gradients; None: there is none.
    """
    bytes_, tile = CHUNKS[kernel]
    # Without a kernel they are float32 once more.
    size = max(1, bytes_ // ((weight.element_size() if kernel else 4) * weight.shape[0]))
    size -= size % tile if size > tile else 0
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


class Objective:
    """The loss of micro-batches under a cohort, by the fast path or by the model's own forward.

    Attributes:
        fast: Whether logits are formed at supervised positions only.
        reason: Why, in words for the user.
        packs: Whether rows may stand behind each other in one.
        packing_reason: Why, in words for the user.

    Args:
        model: The base with what learns attached.
        cohort: What learns.
        fast: False: the model's own forward.
        packs: Try to pack rows.
        device: `cpu` or `cuda`, where that is not where the model's tensors are (a plan).
        within: Does work that runs the model, where its weights have to be gathered for that.
        end_pass: Called when a micro-batch is through the model, its backward pass too.
    """

    def __init__(
        self, model: PreTrainedModel, cohort: Trained, *, fast: bool = True, packs: bool = False,
        device: str | None = None, within: Callable[[Callable[[], Any]], Any] | None = None,
        end_pass: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.cohort = model, cohort
        self._within = within or (lambda work: work())
        self._end_pass = end_pass or (lambda: None)
        self._device = device or model.device.type
        self.packs, self.packing_reason = packs, "rows under each other, right-padded"
        self.rule = HeadRule.of(model)
        self.fast, self.reason = fast, "logits at supervised positions only"
        self._verified = not fast
        self.workspace: Callable[[], Workspace] = Workspace
        self._space = Workspace()
        self._head = model.get_output_embeddings()
        self._backbone = model.base_model
        if self._head is None or self._backbone is model:
            self.fast, self.reason = False, f"{type(model).__name__} has no separate head"
        elif type(self._head.weight).__module__.startswith("torchao."):
            # Which knows layers' products, and not those of slices and transposes.
            self.fast, self.reason = False, "the head's weight is a quantised one of torchao"

    def __call__(
        self, batch: MicroBatch, shares: tuple[Share, ...], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss of a micro-batch, and what each supervised position lost.

        Call it, and the backward pass after it, inside `at(batch, shares)`: layers that are
        recomputed in the backward pass ask again which rows are whose.

        Args:
            batch: The micro-batch.
            shares: Which rows take which adapter.
            weights: [S] float32; the loss is the weighted sum over supervised positions.

        Returns:
            The scalar loss and the negative log-likelihoods [S], float32, without gradient.
        """
        result: tuple[Tensor, Tensor] = self._within(lambda: self._loss(batch, shares, weights))
        return result

    def _loss(
        self, batch: MicroBatch, shares: tuple[Share, ...], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden_or_logits = self._positions(batch)
        if not self.fast:
            nll = F.cross_entropy(hidden_or_logits.float(), batch.labels, reduction="none")
            return (nll * weights).sum(), nll.detach()
        if isinstance(self._head, CohortLinear | CohortCopies):
            return self._through_adapted_head(hidden_or_logits, batch, shares, weights)
        return _ChunkedCrossEntropy.apply(
            hidden_or_logits,
            batch.labels,
            weights,
            weight_of(self._head),
            self._head.bias,
            self.rule,
            self._space,
            self._device if fused_loss.available(self._device, hidden_or_logits) else None,
        )

    @contextmanager
    def at(self, batch: MicroBatch, shares: tuple[Share, ...]) -> Iterator[None]:
        """The model knows which of the batch's rows are whose, and where packed ones begin."""
        with self.cohort.sharing(shares, batch.starts), packed(batch.starts):
            yield
            self._end_pass()

    def _positions(self, batch: MicroBatch) -> Tensor:
        """Hidden states [S, H] (fast) or logits [S, V] at the supervised positions."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids
        run = self._backbone if self.fast else self.model
        out = run(**inputs)
        states = out.last_hidden_state if self.fast else out.logits
        return states.flatten(0, 1)[batch.positions]

    def _through_adapted_head(
        self, hidden: Tensor, batch: MicroBatch, shares: tuple[Share, ...], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Chunks through a head that learns: each is recomputed in the backward pass (trap 8)."""

        def chunk(adapter: str | None, hidden: Tensor, labels: Tensor) -> Tensor:
            with self.cohort.using(adapter):
                logits = self.rule.apply(self._head(hidden).float())
            return F.cross_entropy(logits, labels, reduction="none")

        parts = []
        for share in shares:
            start, stop = batch.supervised_before[share.start], batch.supervised_before[share.stop]
            for rows in _chunks(stop - start, self._head.weight, None):
                span = slice(start + rows.start, start + rows.stop)
                args = (share.adapter, hidden[span], batch.labels[span])
                parts.append(checkpoint(chunk, *args, use_reentrant=False))
        nll = torch.cat(parts)
        return (nll * weights).sum(), nll.detach()

    @torch.no_grad()
    def verify(self, batch: MicroBatch, shares: tuple[Share, ...]) -> bool:
        """Compare what is quick with the model's own forward, and leave it where they differ.

        The first call does so; later ones return at once.

        Returns:
            Whether `packs` has become false, so that the batch has to be laid out anew.
        """
        if self._verified or not (self.fast or batch.starts) or not len(batch.labels):
            return False
        packed = self.packs
        batch = batch.thinned(CHECKED_ROWS, CHECKED_POSITIONS)
        weights = torch.full_like(batch.labels, 1.0 / len(batch.labels), dtype=torch.float32)

        def loss(batch: MicroBatch) -> float:
            with self.at(batch, shares):
                return float(self(batch, shares, weights)[0])

        reference = self._reference_loss(batch, shares)

        def difference(value: float) -> float:
            return abs(value - reference) / max(abs(reference), 1e-6)

        allowed = AGREEMENT.get(self.cohort.dtype, 2e-2)
        quick = loss(batch)
        self._space = (
            self.workspace()
        )  # this thread's may never be used again: workers have their own
        self._verified = True  # not before: where memory ran out above, it is asked again
        if batch.starts is not None:
            self.packing_reason = f"rows packed without padding; {difference(quick):.1e} from apart"
            if difference(quick) > allowed:
                self.packs = False
                self.packing_reason = (
                    f"the loss of packed rows was {quick:.4f} and that of the rows apart "
                    f"{reference:.4f}: {type(self.model).__name__} looks across rows that stand "
                    "behind each other"
                )
                quick = loss(batch.padded())
        if not self.fast:
            return packed != self.packs
        self.reason = (
            f"logits at supervised positions only; {difference(quick):.1e} from the model's own "
            "loss on the first batch"
        )
        if difference(quick) > allowed:
            self.fast = False
            self.reason = (
                f"the loss at supervised positions was {quick:.4f} and the model's own "
                f"{reference:.4f}: {type(self.model).__name__} does something to its logits that "
                "the fast path does not know"
            )
        return packed != self.packs

    def agree(self, *, fast: bool, packs: bool) -> None:
        """Take what all ranks found of their first batches: what one of them cannot, none does."""
        if self.fast and not fast:
            self.reason = "the loss at supervised positions differed from the model's on a rank"
        if self.packs and not packs:
            self.packing_reason = (
                "the loss of packed rows differed from that of rows apart on a rank"
            )
        self.fast, self.packs, self._verified = fast, packs, True

    def _reference_loss(self, batch: MicroBatch, shares: tuple[Share, ...]) -> float:
        """The mean loss by the model's own forward, one row after another.

        It keeps the logits of the asked positions alone, where the model can: all of a row's would
        be the peak of a run whose vocabulary is large.
        """
        keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        losses = []
        for share in shares:
            for row in range(share.start, share.stop):
                single = batch.alone(row)
                if not len(single.labels):
                    continue
                inputs: dict[str, Any] = {"logits_to_keep": single.positions} if keeps else {}
                with self.at(single, (Share(share.adapter, 0, 1),)):
                    inputs |= {"input_ids": single.input_ids, "use_cache": False}
                    out = self._within(functools.partial(self.model, **inputs))
                logits = out.logits[0] if keeps else out.logits[0, single.positions]
                losses.append(F.cross_entropy(logits.float(), single.labels, reduction="none"))
        return float(torch.cat(losses).mean())
