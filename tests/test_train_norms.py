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

NORM_CLASSES = [LlamaRMSNorm, GemmaRMSNorm]
WIDTH = 45  # no whole vectors


def build_norm(norm_class: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    norm = norm_class(WIDTH)  # type: ignore[call-arg]
    norm.weight.data = torch.randn(WIDTH)
    return norm.to(dtype)


def results(norm: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_(True)
    out = norm(x)
    inputs = [x, *(weight for weight in [norm.weight] if weight.requires_grad)]
    return (out.detach(), *torch.autograd.grad(out, inputs, upstream))


@pytest.mark.parametrize("norm_class", NORM_CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learns", [True, False])
def test_values_and_gradients_are_transformers(
    norm_class: type[nn.Module], dtype: torch.dtype, learns: bool
) -> None:
    plain, quick = (build_norm(norm_class, dtype).requires_grad_(learns) for _ in range(2))
    assert norms.quicken(nn.Sequential(quick)) == 1
    x, upstream = (3.0 * torch.randn(2, 2, 7, WIDTH)).to(dtype)
    before = x.clone()
    actual, expected = results(quick, x, upstream), results(plain, x, upstream)
    assert torch.equal(x, before)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    for value, reference in zip(actual, expected, strict=True):
        assert value.dtype == reference.dtype
        torch.testing.assert_close(value, reference, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("norm_class", NORM_CLASSES)
@pytest.mark.parametrize("learns", [True, False])
def test_in_half_precision_they_are_as_near_to_float32_as_transformers(
    norm_class: type[nn.Module], learns: bool
) -> None:
    exact = build_norm(norm_class, torch.bfloat16).float().requires_grad_(learns)
    x, upstream = (3.0 * torch.randn(2, 2, 64, WIDTH)).bfloat16()
    truth = results(exact, x.float(), upstream.float())
    errors = []
    for quick in (False, True):
        norm = build_norm(norm_class, torch.bfloat16).requires_grad_(learns)
        if quick:
            norms.quicken(nn.Sequential(norm))
        pairs = zip(results(norm, x, upstream), truth, strict=True)
        errors.append(
            [float((value.float() - reference).square().mean()) for value, reference in pairs]
        )
    for plain, quick_one in zip(*errors, strict=True):
        assert quick_one <= 1.1 * plain


@pytest.mark.parametrize("norm_class", NORM_CLASSES)
def test_they_keep_their_input_and_a_number_per_token(norm_class: type[nn.Module]) -> None:
    norm = build_norm(norm_class, torch.bfloat16).requires_grad_(False)
    norms.quicken(nn.Sequential(norm))
    saved: list[Tensor] = []
    x = torch.randn(5, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm(x)
    assert sorted(tuple(t.shape) for t in saved) == [(5, 1), (5, WIDTH), (WIDTH,)]


def test_a_copy_follows_its_own_weight() -> None:
    norm = build_norm(LlamaRMSNorm, torch.float32)
    norms.quicken(nn.Sequential(norm))
    copied = copy.deepcopy(norm)
    copied.weight.data.zero_()
    assert not copied(torch.randn(3, WIDTH)).any()
    assert norm(torch.randn(3, WIDTH)).any()


def test_other_norms_and_passes_that_do_not_learn_are_left_alone() -> None:
    class Different(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.weight * hidden_states

    assert norms.quicken(nn.Sequential(Different(4), nn.LayerNorm(4), nn.RMSNorm(4))) == 0
    plain, quick = (
        build_norm(LlamaRMSNorm, torch.bfloat16),
        build_norm(LlamaRMSNorm, torch.bfloat16),
    )
    norms.quicken(nn.Sequential(quick))
    x = torch.randn(9, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(plain(x), quick(x))
    mixed = torch.randn(9, WIDTH)  # float32 over a bfloat16 weight
    assert torch.equal(plain(mixed), quick(mixed))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3"])
def test_a_cohort_learns_the_same(arch: str) -> None:
    _, expected = one_step(cohort_of(random_spec(), arch=arch), UNEVEN, 3)
    cohort = cohort_of(random_spec(), arch=arch)
    assert norms.quicken(cohort.model) >= 5
    _, actual = one_step(cohort, UNEVEN, 3)
    assert_close(gradients(actual["a"]), gradients(expected["a"]))
