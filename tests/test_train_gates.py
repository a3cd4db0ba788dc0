"""Gates in a kernel, against transformers' feed-forward layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from lighten.cpu import gates
from tests.kernels import each_kernel


def build_mlp(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 4}
    if name == "gemma":
        return GemmaMLP(GemmaConfig(**sizes, hidden_activation="gelu_pytorch_tanh"))
    return LlamaMLP(LlamaConfig(**sizes))


def results(layer: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_(True)
    out = layer(x)
    inputs = [x, *layer.parameters()]
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


@each_kernel
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_they_are_as_near_to_float64_as_transformers(name: str, dtype: torch.dtype) -> None:
    exact = build_mlp(name).to(dtype).double()
    x, upstream = (2.0 * torch.randn(2, 37, 40)).to(dtype), torch.randn(2, 37, 40).to(dtype)
    truth = results(exact, x.double(), upstream.double())
    errors = []
    for quick in (False, True):
        layer = build_mlp(name).to(dtype)
        assert not quick or gates.quicken(nn.Sequential(layer)) == 1
        pairs = zip(results(layer, x, upstream), truth, strict=True)
        errors.append(
            [float((value.double() - reference).square().mean()) for value, reference in pairs]
        )
    # One rounding fewer in bfloat16; in float32 both have the last digit's.
    allowed = {torch.bfloat16: 1.05, torch.float32: 1.5}[dtype]
    for plain, quick_one in zip(*errors, strict=True):
        assert quick_one <= allowed * plain


@each_kernel
def test_the_activations_are_exact(dtype: torch.dtype) -> None:
    """From far below to far above zero, value and gradients."""
    gate = torch.linspace(-100.0, 100.0, 4003).to(dtype)
    up, grad = torch.full_like(gate, 0.75), torch.full_like(gate, 1.5)
    rounding, near = {torch.bfloat16: (2**-8, 1e-5), torch.float32: (2e-6, 1e-7)}[dtype]
    for gelu in (False, True):
        exact_gate, exact_up = gate.double().requires_grad_(), up.double().requires_grad_()
        act = (
            nn.functional.gelu(exact_gate, approximate="tanh")
            if gelu
            else nn.functional.silu(exact_gate)
        )
        expected = act * exact_up
        gradients = torch.autograd.grad(expected, (exact_gate, exact_up), grad.double())
        computed = [torch.ops.lighten.gated(gate, up, gelu)]
        computed += torch.ops.lighten.gated_backward(gate, up, grad, gelu)
        for a, b in zip(computed, (expected.detach(), *gradients), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=rounding, atol=near)


@each_kernel
def test_two_inputs_are_kept(dtype: torch.dtype) -> None:
    layer = build_mlp("llama").to(dtype).requires_grad_(False)
    gates.quicken(nn.ModuleList([layer]))
    saved: list[Tensor] = []
    x = torch.randn(5, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.to(dtype))
    assert [tuple(t.shape) for t in saved if t.shape == (5, 72)] == [(5, 72)] * 2


def test_a_format_without_a_kernel_is_left_alone() -> None:
    layer = build_mlp("llama").half()
    plain = copy.deepcopy(layer)
    gates.quicken(nn.ModuleList([layer]))
    x = torch.randn(5, 40, requires_grad=True).half()
    assert torch.equal(layer(x), plain(x))


def test_what_it_does_not_know_it_leaves_alone() -> None:
    layer = build_mlp("llama")
    layer.act_fn = nn.ReLU()
    assert gates.quicken(nn.Sequential(layer, nn.Linear(4, 4))) == 0


@each_kernel
def test_the_operations_say_what_they_return(dtype: torch.dtype) -> None:
    x, y = torch.randn(3, 20).to(dtype), torch.randn(3, 20).to(dtype)
    torch.library.opcheck(torch.ops.lighten.gated, (x, y, True))
    torch.library.opcheck(torch.ops.lighten.gated_backward, (x, y, x, False))
    weight, scales = torch.randn(20).to(dtype), torch.rand(3, 1)
    torch.library.opcheck(torch.ops.lighten.rms_norm, (x, weight, 1e-6, True))
    torch.library.opcheck(torch.ops.lighten.rms_norm_backward, (x, weight, scales, y, False))
