"""What llama.cpp's convention does to a weight: the opposite of what reading a GGUF file undoes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Heads = tuple[int, int]
_ROTARY = re.compile(r"\.attn_([qk])\.")
_TRANSPOSED = re.compile(r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$")


def as_stored(weight: Array, stored: str, architecture: str, heads: Heads) -> Array:
    """A weight or bias as a GGUF file of the architecture holds it.

    Args:
        weight: As transformers has it.
        stored: Its name in the file, with suffix.
        architecture: llama.cpp's.
        heads: Of queries and of keys.
    """
    if architecture.startswith("gemma") and stored.endswith("norm.weight"):
        return weight + np.float32(1)
    if is_transposed(stored, architecture):
        return weight.T
    return rotary_interleaved(weight, stored, architecture, heads)


def is_transposed(stored: str, architecture: str) -> bool:
    """Whether transformers holds the weight as inputs × outputs (GPT-2's Conv1D)."""
    return architecture == "gpt2" and bool(_TRANSPOSED.search(stored))


def is_rotary(stored: str, architecture: str) -> bool:
    """Whether rows lie in another order in a GGUF file."""
    return architecture == "llama" and bool(_ROTARY.search(stored))


def rotary_interleaved(weight: Array, stored: str, architecture: str, heads: Heads) -> Array:
    """Rows of a Llama's queries and keys in the order of llama.cpp.

    transformers turns the first half of a head against the second, llama.cpp neighbours. Any array
    whose first dimension is the layer's output can be given, the B of an adapter too.
    """
    if not is_rotary(stored, architecture):
        return weight
    count = heads[0] if ".attn_q." in stored else heads[1]
    halves = weight.reshape(count, 2, weight.shape[0] // count // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
