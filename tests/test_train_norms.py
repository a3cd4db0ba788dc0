"""Norms with a backward pass of their own, against transformers'."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lighten.cpu import norms
from tests.test_train_step import UNEVEN, assert_close, cohort_of, gradients, one_step, random_spec

KINDS = [LlamaRMSNorm, GemmaRMSNorm]


def made(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    norm = kind(48)  # type: ignore[call-arg]
    norm.weight.data = torch.randn(48)
    return norm.to(dtype)


def results(norm: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_(True)
    out = norm(x)
    wanted = [x, *(own for own in [norm.weight] if own.requires_grad)]
    return (out.detach(), *torch.autograd.grad(out, wanted, upstream))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_transformers(kind: type[nn.Module], dtype: torch.dtype) -> None:
    plain, quick = made(kind, dtype), made(kind, dtype)
    assert norms.quicken(nn.Sequential(quick)) == 1
    x, upstream = (3.0 * torch.randn(2, 2, 7, 48)).to(dtype)
    before = x.clone()
    found, wanted = results(quick, x, upstream), results(plain, x, upstream)
    assert torch.equal(x, before)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == other.dtype
        torch.testing.assert_close(own, other, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learns", [True, False])
def test_in_half_precision_they_are_as_near_to_float32_as_transformers(
    kind: type[nn.Module], learns: bool
) -> None:
    exact = made(kind, torch.bfloat16).float().requires_grad_(learns)
    x, upstream = (3.0 * torch.randn(2, 2, 64, 48)).bfloat16()
    truth = results(exact, x.float(), upstream.float())
    apart = []
    for quick in (False, True):
        norm = made(kind, torch.bfloat16).requires_grad_(learns)
        if quick:
            norms.quicken(nn.Sequential(norm))
        found = zip(results(norm, x, upstream), truth, strict=True)
        apart.append([float((own.float() - other).square().mean()) for own, other in found])
    for plain, quick_one in zip(*apart, strict=True):
        assert quick_one <= 1.1 * plain


@pytest.mark.parametrize("kind", KINDS)
def test_they_keep_their_input_and_a_number_per_token(kind: type[nn.Module]) -> None:
    norm = made(kind, torch.bfloat16).requires_grad_(False)
    norms.quicken(nn.Sequential(norm))
    kept: list[Tensor] = []
    x = torch.randn(5, 48, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    assert sorted(tuple(t.shape) for t in kept) == [(5, 1), (5, 48), (48,)]


def test_a_copy_follows_its_own_weight() -> None:
    norm = made(LlamaRMSNorm, torch.float32)
    norms.quicken(nn.Sequential(norm))
    other = copy.deepcopy(norm)
    other.weight.data.zero_()
    assert not other(torch.randn(3, 48)).any()
    assert norm(torch.randn(3, 48)).any()


def test_other_norms_and_passes_that_do_not_learn_are_left_alone() -> None:
    class Different(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.weight * hidden_states

    assert norms.quicken(nn.Sequential(Different(4), nn.LayerNorm(4), nn.RMSNorm(4))) == 0
    plain, quick = made(LlamaRMSNorm, torch.bfloat16), made(LlamaRMSNorm, torch.bfloat16)
    norms.quicken(nn.Sequential(quick))
    x = torch.randn(9, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(plain(x), quick(x))
    mixed = torch.randn(9, 48)  # float32 over a bfloat16 weight
    assert torch.equal(plain(mixed), quick(mixed))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3"])
def test_a_cohort_learns_the_same(arch: str) -> None:
    _, wanted = one_step(cohort_of(random_spec(), arch=arch), UNEVEN, 3)
    cohort = cohort_of(random_spec(), arch=arch)
    assert norms.quicken(cohort.model) >= 5
    _, found = one_step(cohort, UNEVEN, 3)
    assert_close(gradients(found["a"]), gradients(wanted["a"]))
