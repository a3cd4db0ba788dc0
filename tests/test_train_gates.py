"""Gates in a kernel, against transformers' feed-forward layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from lighten.cpu import gates, kernels

pytestmark = pytest.mark.skipif(kernels.obstacle() is not None, reason=str(kernels.obstacle()))


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


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_they_are_nearer_to_float64_than_transformers(name: str) -> None:
    exact = build_mlp(name).bfloat16().double()
    x, upstream = (2.0 * torch.randn(2, 37, 40)).bfloat16(), torch.randn(2, 37, 40).bfloat16()
    truth = results(exact, x.double(), upstream.double())
    errors = []
    for quick in (False, True):
        layer = build_mlp(name).bfloat16()
        assert not quick or gates.quicken(nn.Sequential(layer)) == 1
        pairs = zip(results(layer, x, upstream), truth, strict=True)
        errors.append(
            [float((value.double() - reference).square().mean()) for value, reference in pairs]
        )
    for plain, quick_one in zip(*errors, strict=True):
        assert quick_one <= 1.05 * plain


def test_the_activations_are_exact_to_float32() -> None:
    """From far below to far above zero, value and gradients."""
    gate = torch.linspace(-100.0, 100.0, 4003).bfloat16()
    up, grad = torch.full_like(gate, 0.75), torch.full_like(gate, 1.5)
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
            torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-5)


def test_two_inputs_are_kept_and_float32_is_left_alone() -> None:
    layer = build_mlp("llama").bfloat16().requires_grad_(False)
    float32_layer = copy.deepcopy(layer).float()
    plain = copy.deepcopy(float32_layer)
    gates.quicken(nn.ModuleList([layer, float32_layer]))
    saved: list[Tensor] = []
    x = torch.randn(5, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.bfloat16())
    assert [tuple(t.shape) for t in saved if t.shape == (5, 72)] == [(5, 72)] * 2
    assert torch.equal(float32_layer(x), plain(x))


def test_what_it_does_not_know_it_leaves_alone() -> None:
    layer = build_mlp("llama")
    layer.act_fn = nn.ReLU()
    assert gates.quicken(nn.Sequential(layer, nn.Linear(4, 4))) == 0


def test_the_operations_say_what_they_return() -> None:
    x, y = torch.randn(3, 20).bfloat16(), torch.randn(3, 20).bfloat16()
    torch.library.opcheck(torch.ops.lighten.gated, (x, y, True))
    torch.library.opcheck(torch.ops.lighten.gated_backward, (x, y, x, False))
    weight, scales = torch.randn(20).bfloat16(), torch.rand(3, 1)
    torch.library.opcheck(torch.ops.lighten.rms_norm, (x, weight, 1e-6, True))
    torch.library.opcheck(torch.ops.lighten.rms_norm_backward, (x, weight, scales, y, False))
