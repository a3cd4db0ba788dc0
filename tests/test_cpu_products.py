"""Products of float32 by oneDNN: the same as PyTorch's own, and only where they are wanted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lighten import cpu
from lighten.cpu import products


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor as on one that MKL is slow on."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("oneDNN is not there")
    monkeypatch.setattr(products, "is_slow_on_mkl", lambda: True)


class Model(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 40), nn.Linear(40, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.first(x)
        return self.last(hidden)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("shape", [(1, 24), (16, 24), (33, 24), (2, 3, 24), (4, 64, 24)])
def test_a_model_computes_the_same(shape: tuple[int, ...]) -> None:
    model, x = Model().requires_grad_(False), torch.randn(shape)
    expected = Model().double()
    expected.load_state_dict(model.state_dict())
    with torch.no_grad(), products.by_onednn(model):
        out = model(x)
    torch.testing.assert_close(out.double(), expected(x.double()), rtol=1e-5, atol=1e-6)
    assert out.shape == (*shape[:-1], 8)


@pytest.mark.usefixtures("slow")
def test_layers_have_their_forward_back_and_what_learns_keeps_it() -> None:
    model = Model()
    calls: list[int] = []

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(x))
        return torch.nn.functional.linear(x, weight, bias)

    model.last.forward = lambda x: counted(x, model.last.weight, None)  # type: ignore[method-assign]
    before = model.last.forward
    with products.by_onednn(model):
        assert model.last.forward is before
        assert "forward" in vars(model.first)
        model(torch.randn(32, 24)).sum().backward()
    assert calls == [32]
    assert model.first.weight.grad is not None
    assert "forward" not in vars(model.first)


@pytest.mark.usefixtures("slow")
def test_the_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.SWITCH, cpu.PLAIN)
    model = Model()
    with products.by_onednn(model):
        assert "forward" not in vars(model.first)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_are_multiplied_as_ever(dtype: torch.dtype) -> None:
    model, x = Model().to(dtype), torch.randn(32, 24, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        with products.by_onednn(model):
            assert torch.equal(model(x), expected)
