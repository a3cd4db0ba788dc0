"""Gated feed-forward layers whose gate is one kernel, where the processor has it in their format.

`down(activation(gate(x)) · up(x))` is what Llama and most models since compute. PyTorch's
operations read and write the wide vectors between many times, forward and backward, and keep three
of them; the kernel reads and writes each once and keeps two. Compiled layers have it too: what a
compiler makes of the gate takes them half as long again (docs/lab-notes.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from lighten import cpu
from lighten.cpu.forwards import Forward, replace_forwards, same_code
from lighten.cpu.kernels import pointwise

SILU, GELU = (nn.SiLU, SiLUActivation), (GELUTanh,)


def quicken(model: nn.Module) -> int:
    """Give the feed-forward layers that are known their gate in a kernel, for passes that learn.

    Known are those whose code is that of Llama's, whatever their class is called.

    Returns:
        How many there are; 0 where `LIGHTEN_CPU` turns it off.
    """
    return replace_forwards(model, _forward_for) if cpu.enabled() else 0


def _forward_for(module: nn.Module) -> Forward | None:
    same = same_code(type(module).forward, LlamaMLP.forward)
    return _forward if same and _has_kernel(module) else None


def _has_kernel(layer: Any) -> bool:
    """Whether the kernel has the layer's activation."""
    return isinstance(layer.act_fn, (*SILU, *GELU))


def activated(layer: Any, gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) · up of a feed-forward layer, in the kernel where there is one."""
    output: Tensor
    if _has_kernel(layer) and pointwise.takes(gate, up):
        output = pointwise.Gated.apply(gate, up, isinstance(layer.act_fn, GELU))
    else:
        output = layer.act_fn(gate) * up
    return output


def _forward(self: Any, x: Tensor) -> Any:
    if not torch.is_grad_enabled():
        return type(self).forward(self, x)
    return self.down_proj(activated(self, self.gate_proj(x), self.up_proj(x)))
