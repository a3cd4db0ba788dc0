"""The processor's own kernels against float64, and what happens where there are none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lighten import cpu
from lighten.cpu import kernels, native
from lighten.cpu.kernels import attention as kernel
from lighten.engine.fused_loss import cross_entropy_
from lighten.models import attention as blocks
from tests.kernels import each_kernel

needs_kernels = pytest.mark.skipif(kernels.obstacle() is not None, reason=str(kernels.obstacle()))

# What rounding each product's factors leaves, to bfloat16 half of 2⁻⁸ on average.
CLOSE = {torch.bfloat16: 0.004, torch.float32: 3e-6}
# Scores of hundreds and thousands have as many digits fewer behind the point.
CLOSE_OF_LARGE = {torch.bfloat16: 0.004, torch.float32: 3e-5}


def inputs(
    dtype: torch.dtype, heads: int, keys: int, tokens: int, features: int, rows: int = 1
) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(rows, tokens, count, features).to(dtype).transpose(1, 2).requires_grad_()
        for count in (heads, keys, keys)
    ]


def exact(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: list[int], window: int = 0
) -> Tensor:
    """In float64, a row at a time."""
    outs = []
    for first, last in list(pairwise(starts)) or [(0, q.shape[2])]:
        seen = torch.ones(last - first, last - first, dtype=torch.bool).tril()
        if window:
            seen = seen.triu(1 - window)
        row = (x[:, :, first:last] for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(*row, seen, scale=scale, enable_gqa=True))
    return torch.cat(outs, 2)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected).norm() / expected.norm())


@each_kernel
@pytest.mark.parametrize(
    ("heads", "keys", "features", "lengths"),
    [
        (9, 3, 64, [329, 272, 171, 157]),
        (4, 2, 80, [5, 33, 64]),
        (4, 4, 128, [100, 1]),
        (2, 1, 8, [7, 40, 32]),
        (4, 1, 256, [70]),
        (3, 3, 20, [31, 1, 96]),
        (12, 2, 32, [70, 33]),
        (6, 1, 40, [300, 2500]),  # more keys than are weighed at once; several parts of a row
    ],
)
def test_packed_rows_are_attended_to_as_in_float64(
    dtype: torch.dtype, heads: int, keys: int, features: int, lengths: list[int]
) -> None:
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = inputs(dtype, heads, keys, starts[-1], features)
    scale = features**-0.5
    out = kernel.Attention.apply(q, k, v, scale, starts)
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = exact(*doubles, scale, starts)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    expected_gradients = torch.autograd.grad(expected, doubles, upstream.double())
    assert error(out, expected.detach()) < CLOSE[dtype]
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert error(gradient, expected_gradient) < CLOSE[dtype]


@each_kernel
@pytest.mark.parametrize("lengths", [[130, 7, 60], [700], [2300]])
@pytest.mark.parametrize("window", [1, 8, 31, 32, 33, 64, 100, 257, 640])
def test_a_window_hides_what_is_too_long_ago(
    dtype: torch.dtype, lengths: list[int], window: int
) -> None:
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = inputs(dtype, 6, 2, starts[-1], 16)
    out = kernel.Attention.apply(q, k, v, 0.25, starts, window)
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = exact(*doubles, 0.25, starts, window)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    expected_gradients = torch.autograd.grad(expected, doubles, upstream.double())
    assert error(out, expected.detach()) < CLOSE[dtype]
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        # A query that sees itself alone has no gradient but rounding's.
        if float(expected_gradient.norm()) > 1e-9:
            assert error(gradient, expected_gradient) < CLOSE[dtype]


@each_kernel
@pytest.mark.parametrize("tokens", [1, 32, 77])
def test_rows_under_each_other_and_any_layout_give_the_same(
    dtype: torch.dtype, tokens: int
) -> None:
    q, k, v = inputs(dtype, 4, 2, tokens, 24, rows=3)
    out = kernel.Attention.apply(q, k, v, 0.2, [])
    assert error(out, exact(*(x.detach().double() for x in (q, k, v)), 0.2, [])) < CLOSE[dtype]
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    contiguous = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    out_again = kernel.Attention.apply(*contiguous, 0.2, [])
    assert torch.equal(out, out_again)
    turned = upstream.mT.contiguous().mT  # features apart from each other
    for a, b in zip(gradients, torch.autograd.grad(out_again, contiguous, turned), strict=True):
        assert torch.equal(a, b)


@each_kernel
@pytest.mark.parametrize("tokens", [70, 700])
def test_large_scores_do_no_harm(dtype: torch.dtype, tokens: int) -> None:
    """Far beyond e^88, where exponentials end in float32."""
    q, k, v = inputs(dtype, 2, 2, tokens, 16)
    large = [x.detach() * factor for x, factor in ((q, 40.0), (k, 40.0), (v, 1.0))]
    out = kernel.Attention.apply(*large, 1.0, [])
    assert error(out, exact(*(x.double() for x in large), 1.0, [])) < CLOSE_OF_LARGE[dtype]


@each_kernel
@pytest.mark.parametrize("rising", [True, False])
def test_keys_that_matter_more_than_all_before_or_after_them(
    dtype: torch.dtype, rising: bool
) -> None:
    """Each chunk of keys then makes what was summed before vanish, or vanishes beside it."""
    q, k, v = (x.detach().float() for x in inputs(dtype, 2, 1, 900, 16))
    ramp = torch.linspace(0.0, 60.0, 900)
    k[..., 0] = ramp if rising else ramp.flip(0)
    q[..., 0] = 8.0
    rounded = [x.to(dtype) for x in (q, k, v)]
    out = kernel.Attention.apply(*rounded, 0.5, [])
    assert error(out, exact(*(x.double() for x in rounded), 0.5, [])) < CLOSE_OF_LARGE[dtype]


@each_kernel
def test_no_number_is_made_of_what_is_none(dtype: torch.dtype) -> None:
    """A run that diverges has to show it: NaN in a query reaches the result."""
    q, k, v = (x.detach() for x in inputs(dtype, 2, 2, 40, 16))
    q[:, :, 5] = float("nan")
    out, sums = torch.ops.lighten.attention(q, k, v, 0.25, [])
    assert bool(out[:, :, 5].isnan().all())
    assert bool(out[:, :, [4, 6]].isfinite().all())
    grads = torch.ops.lighten.attention_backward(
        q, k, v, out.nan_to_num(), sums, torch.ones_like(out), 0.25, []
    )
    assert bool(grads[0][:, :, 5].isnan().all())


@each_kernel
def test_no_loss_and_no_gate_is_made_of_what_is_no_number(dtype: torch.dtype) -> None:
    for softcap in (0.0, 30.0):
        logits = torch.zeros(2, 50, dtype=dtype)
        logits[0, 7] = float("nan")
        losses = cross_entropy_(logits, torch.tensor([3, 3]), 1.0, softcap)
        assert losses.isnan().tolist() == [True, False]
    gate = torch.full((20,), float("nan"), dtype=dtype)
    assert bool(torch.ops.lighten.gated(gate, torch.ones_like(gate), False).isnan().all())


@each_kernel
@pytest.mark.parametrize("starts", [[0, 120, 200], [0, 2100, 2200], [0, 3100]])
def test_threads_change_nothing(dtype: torch.dtype, starts: list[int]) -> None:
    """Nor where a long row's parts are several threads' work."""
    q, k, v = inputs(dtype, 6, 3, starts[-1], 32)

    def attended() -> tuple[Tensor, ...]:
        out = kernel.Attention.apply(q, k, v, 0.1, starts)
        return (out, *torch.autograd.grad(out.sum(), (q, k, v)))

    assert_threads_change_nothing(attended)


def assert_threads_change_nothing(compute: Callable[[], tuple[Tensor, ...]]) -> None:
    results = []
    for threads in (1, 3):
        threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(compute())
        finally:
            torch.set_num_threads(threads_before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_kernel
def test_threads_change_no_norm_no_gate_and_no_loss(dtype: torch.dtype) -> None:
    """Of enough numbers for three."""
    torch.manual_seed(0)
    x, y = (torch.randn(2001, 401).to(dtype) for _ in range(2))
    weight, labels = x[0].contiguous(), torch.arange(2001) % 401

    def computed() -> tuple[Tensor, ...]:
        normal, scales = torch.ops.lighten.rms_norm(x, weight, 1e-6, False)
        gradient = torch.ops.lighten.rms_norm_backward(x, weight, scales, y, False)
        logits = x.clone()
        losses = cross_entropy_(logits, labels, 1.0, 0.0)
        gate = torch.ops.lighten.gated(x, y, True)
        gradients = torch.ops.lighten.gated_backward(x, y, x, False)
        return normal, scales, gradient, logits, losses, gate, *gradients

    assert_threads_change_nothing(computed)


@each_kernel
def test_the_operations_say_what_they_return_and_what_they_cost(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in inputs(dtype, 4, 2, 60, 16))
    out, sums = torch.ops.lighten.attention(q, k, v, 0.25, [0, 20, 60])
    torch.library.opcheck(torch.ops.lighten.attention, (q, k, v, 0.25, [0, 20, 60]))
    args = (q, k, v, out, sums, torch.randn_like(out), 0.25, [0, 20, 60])
    torch.library.opcheck(torch.ops.lighten.attention_backward, args)
    with FlopCounterMode(display=False) as counter:
        torch.ops.lighten.attention(q, k, v, 0.25, [0, 20, 60])
        torch.ops.lighten.attention_backward(*args)
    pairs = 20 * 21 // 2 + 40 * 41 // 2  # pairs of a query and a key
    assert counter.get_total_flops() == (2 + 5) * 2 * 4 * 16 * pairs
    with FlopCounterMode(display=False) as counter:
        torch.ops.lighten.attention(q, k, v, 0.25, [0, 20, 60], 15)
    pairs = sum(min(15, place + 1) for length in (20, 40) for place in range(length))
    assert counter.get_total_flops() == 2 * 2 * 4 * 16 * pairs


@each_kernel
def test_the_kernel_is_as_close_as_the_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs(dtype, 4, 2, 150, 32)
    expected = exact(*(x.detach().double() for x in (q, k, v)), 0.2, [0, 100, 150])
    ours = blocks.block_attention(q, k, v, 0.2, (0, 100, 150))
    monkeypatch.setattr(kernel, "takes", lambda *_: False)
    plain = blocks.block_attention(q, k, v, 0.2, (0, 100, 150))
    assert not torch.equal(ours, plain)
    assert error(ours, expected) < 1.2 * error(plain, expected)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_a_compiler_of_c_links_the_library_of_cpp_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CXX is after PEFT made a BOFT adapter."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "threads.cpp").write_text(
        "#include <cmath>\n#include <thread>\n"
        'extern "C" int answer() { int a = 0; std::thread([&] { a = 7; }).join(); return a; }\n'
        'extern "C" void all(float* x, int n) { for (int i = 0; i < n; ++i) x[i] = expf(x[i]); }\n'
    )
    monkeypatch.setenv("CXX", "gcc")
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    path = native.compiled(tmp_path / "code", ["-O3", "-march=native", "-ffast-math"])
    completed = subprocess.run(  # in this process others have loaded the library of C++
        [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL({str(path)!r}).answer())"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert completed.stdout == "7\n", completed.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({cpu.SWITCH: cpu.PLAIN}, cpu.OFF),
        ({"CXX": "no-such-compiler", "PATH": "/nowhere"}, "there is no C++ compiler"),
        ({"CXX": "/bin/false"}, "/bin/false made nothing of float32: "),
    ],
)
def test_without_kernels_it_is_said_why(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    code = "from lighten.cpu.kernels import float32; print(float32.library(), float32.obstacle())"
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "LIGHTEN_CACHE": str(tmp_path), **environment},
    )  # fmt: skip
    assert completed.stdout.startswith("None ")
    assert message in completed.stdout
    assert not list(tmp_path.rglob("*.so"))
