"""How much arithmetic and memory traffic a LoRA step cannot do without.

Dimensions: N tokens, L tokens of one row, S supervised positions, I and O features in and out of a
linear layer, H hidden size, V vocabulary, r rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.steps import Steps


def step_flops(description: Any, adapter_parameters: int, steps: Steps) -> float:
    """Matrix-product FLOPs that LoRA steps cannot do without.

    Per token 2 + 2 per frozen parameter (forward, and backward to the inputs) and 2 + 4 per adapter
    parameter; per supervised token 2 + 2 per parameter of the head; per row of L tokens and layer
    6 · L² · hidden size for causal attention (2 forward, 4 backward). It leaves out norms, softmax,
    activations and the optimiser, takes the heads together as wide as the hidden size, and counts
    the first layer's input gradient, which nobody needs.
    """
    parts = description.parameters
    frozen, head = parts["attention"] + parts["mlp"], parts["head"] or parts["embedding"]
    total = 0.0
    for row, mask in itertools.chain.from_iterable(steps):
        total += (4.0 * frozen + 6.0 * adapter_parameters) * len(row) + 4.0 * head * sum(mask[1:])
        total += 6.0 * len(row) ** 2 * description.hidden_size * description.layers
    return total


@dataclass(frozen=True)
class Work:
    """What a part of a step has to do at least.

    Attributes:
        flops: Of its matrix products.
        bytes: Read and written once by a part that keeps nothing in a cache from another.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def least_seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The longer of what arithmetic and what memory allow."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def linear(N: int, I: int, O: int, size: int, weight_bytes: float, *, backward: bool) -> Work:  # noqa: E741
    """A frozen layer's product, and its gradient to the input if anybody needs it."""
    passes = 2 if backward else 1
    return Work(2.0 * N * I * O * passes, passes * (weight_bytes + (N * I + N * O) * size))


def low_rank(N: int, I: int, O: int, r: int, *, backward: bool) -> Work:  # noqa: E741
    """An adapter's products beside it; x, y and their gradients are there already.

    Forward x Aᵀ Bᵀ; backward the gradients of A and B, and of x if anybody needs it. Bytes: the
    float32 factors read twice and their gradients written.
    """
    products = (6.0 if backward else 4.0) * I + 6.0 * O
    return Work(N * r * products, 3.0 * 4 * r * (I + O))


def attention(lengths: Sequence[int], width: int, kv_width: int, size: int) -> Work:
    """Causal attention of rows, each within itself: half the products of all pairs, three times."""
    tokens = sum(lengths)
    moved = (4.0 * width + 4.0 * kv_width) * tokens * size  # q, k, v, out and their gradients
    return Work(6.0 * width * sum(length**2 for length in lengths), moved)


def elementwise(values: int, size: int, inputs: int = 1) -> Work:
    """A norm or an activation: inputs read, one output written; again, and their gradients."""
    return Work(0.0, values * size * ((inputs + 1.0) + (2.0 * inputs + 1.0)))


def loss(S: int, H: int, V: int, size: int) -> Work:
    """The head's logits and their gradient back to the hidden states."""
    return Work(4.0 * S * H * V, (2.0 * H * V + 2.0 * S * H) * size)


def optimiser(parameters: int) -> Work:
    """AdamW in float32: weight and two moments read and written, the gradient read."""
    return Work(0.0, 7.0 * 4 * parameters)
