"""Regional compilation: one decoder layer is compiled and its code serves all of them.

A whole model takes minutes to compile and again for each change of shape; its layers are alike, so
one of them is enough. What a layer does between its matrix products (norms, rotary positions,
gates, residual sums) becomes a few fused loops, and less is kept for the backward pass. Source:
PyTorch's recipe on regional compilation.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lighten.adapters import Cohort, Trained
from lighten.adapters.decoder import decoder_layers
from lighten.adapters.frozen import is_quantized
from lighten.engine import fused_loss
from lighten.machine import devices
from lighten.machine.hardware import Choice

# A decoder layer takes about half a minute to compile on two cores, for a fifth less memory and a
# few percent of each step at best: shorter runs would lose by it (docs/lab-notes.md).
PAYS_AFTER_S = 900.0
# On a GPU it took a minute (an H100, 16 cores) for a fifth of each step.
PAYS_ON_GPU_AFTER_S = 600.0
# What a processor with bfloat16 arithmetic computes per second and core, for that estimate alone:
# it has to be the same whenever a run is resumed, so it is not measured.
NOMINAL_FLOPS_PER_CORE = 2e11
# The same of a GPU that has no datasheet here, and the share of a datasheet's arithmetic that whole
# steps reach (benchmarks/gpu_suite.py).
NOMINAL_FLOPS_OF_GPU, REACHED = 1e13, 0.2
# Each layer's code would check at each call what the compiler knows of every tensor's layout: 2 %
# of a step on a processor, for what tests check once. Older compilers have the first alone.
CHECKS = ("size_asserts", "alignment_asserts", "scalar_asserts")


def choose(
    setting: bool | str,
    trained: Trained,
    *,
    tokens: int,
    device: str,
    cores: int,
    most_s: float | None = None,
) -> Choice:
    """Whether layers are compiled, and why.

    Args:
        setting: `auto`, or what the recipe says.
        trained: What learns.
        tokens: That the whole run will train on.
        device: `cpu` or `cuda`.
        cores: Of the processor.
        most_s: The time that the run may take, if it is limited.
    """
    if setting is False:
        return Choice("off", "torch_compile of the recipe")
    model = trained.model
    if (obstacle := _obstacle(trained, device)) is not None:
        return Choice("off", obstacle)
    if setting is True:
        return Choice("on", "torch_compile of the recipe")
    if device == "cpu" and trained.dtype == torch.float32:
        return Choice("off", "float32 on a processor gains nothing by it: products are most of it")
    parameters = sum(p.numel() for p in model.parameters())
    rate = NOMINAL_FLOPS_PER_CORE * cores if device == "cpu" else _gpu_rate(trained.dtype)
    seconds = 4.0 * parameters * tokens / rate
    if most_s is not None:
        seconds = min(seconds, most_s)
    if seconds < (PAYS_AFTER_S if device == "cpu" else PAYS_ON_GPU_AFTER_S):
        return Choice("off", f"a run of about {seconds / 60:.0f} min would not pay it back")
    return Choice("on", f"a run of about {seconds / 60:.0f} min pays the compilation back")


def _gpu_rate(dtype: torch.dtype) -> float:
    """FLOP/s that steps may reach on the GPU that this process computes on.

    A plan for another machine's opens none here: its changes are planned in forked processes, which
    cannot.
    """
    if not torch.cuda.is_initialized():
        return NOMINAL_FLOPS_OF_GPU
    listed = devices.here("cuda").flops.get(str(dtype).removeprefix("torch."))
    return listed * REACHED if listed else NOMINAL_FLOPS_OF_GPU


def _obstacle(trained: Trained, device: str) -> str | None:
    model = trained.model
    if not isinstance(trained, Cohort) or trained.copies:
        return "layers are compiled for low-rank adapters alone"
    if len(trained.specs) != 1:
        return "layers are compiled for one adapter, and the cohort has several"
    if any(spec.dropout for spec in trained.specs.values()):
        return "lora_dropout forms its masks outside of compiled code"
    if trained.group_size is not None:
        return "quantisation-aware layers round their weights outside of compiled code"
    if any(is_quantized(module) for module in model.modules()):
        return "a quantised or streamed base's weights are made outside of compiled code"
    if not decoder_layers(model):
        return f"{type(model).__name__} does not say which of its layers are alike"
    if device != "cpu" and importlib.util.find_spec("triton") is None:
        return "there is no Triton, which writes a GPU's code"
    if model.device.type == "cuda":
        # What keeps it from one kernel keeps it from all of a layer's.
        why = fused_loss.obstacle(trained.dtype, model.device)
        if why is not None:
            return f"Triton writes no code here: {why}"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        return f"there is no C++ compiler ({compiler})"
    return None


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the decoder layers for passes that learn; others run as they did.

    The first call of each takes its time. The embedding's output wants a gradient from now on, or
    the first layer would need code of its own, for twice the time.
    """

    def wants_gradient(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(wants_gradient)
    inductor_options = torch._inductor.list_options()
    unchecked = {name: False for name in CHECKS if name in inductor_options}
    for layer in decoder_layers(model):
        layer.forward = _compiled(layer, unchecked)


def _compiled(layer: nn.Module, options: dict[str, Any]) -> Any:
    plain = layer.forward
    quick = torch.compile(plain, dynamic=True, options=options)

    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (quick if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return run
