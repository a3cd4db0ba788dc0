"""Products of float32 by oneDNN: the same as PyTorch's own, there and back, and where they pay."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lighten import cpu
from lighten.adapters import ops
from lighten.cpu import products
from lighten.engine.loss import HeadRule, Workspace, _ChunkedCrossEntropy
from lighten.planning.build import config_of
from lighten.planning.steps import follow_recipe
from tests.test_plan_trace import FLOAT32, WAYS, folder_of, follow, really, recipe_of
from tests.test_plan_trace import steps_of as course_of

NAME = "mkldnn::_linear_pointwise"


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor as on one that MKL is slow on, however small the product."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("oneDNN is not there")
    monkeypatch.setattr(products, "is_slow_on_mkl", lambda: True)
    monkeypatch.setattr(products, "FEWEST", 1)


class Model(nn.Module):
    """Two linear layers; the first one's output is changed in place, as in Gemma 3n."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 40), nn.Linear(40, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x)
        hidden *= 0.5
        return self.last(hidden)  # type: ignore[no-any-return]


def called(run: torch.profiler.profile) -> int:
    return sum(event.count for event in run.key_averages() if event.key == NAME)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of what learns."""
    x = x.clone().requires_grad_(True)
    out = model(x)
    learning = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), learning)]


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (33, 24), (2, 3, 24), (4, 64, 24)])
def test_a_model_computes_the_same(shape: tuple[int, ...], learns: bool) -> None:
    torch.manual_seed(0)
    model, x = Model().requires_grad_(learns), torch.randn(shape)
    expected = results(copy.deepcopy(model).double(), x.double())
    assert products.quicken(model) == 2
    with torch.profiler.profile() as run:
        values = results(model, x)
    assert called(run) == (6 if learns else 4)
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's
def test_compiled_layers_compute_the_same() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(33, 24)
    expected = results(model, x)
    products.quicken(model)
    torch._dynamo.reset()
    quick = torch.compile(model, dynamic=True, backend="aot_eager")
    with torch.profiler.profile() as run:
        values = results(quick, x)
    assert called(run) == 6
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_adapters_compute_the_same() -> None:
    """Two of different rows over two layers, against autograd in float64."""
    torch.manual_seed(0)
    bases = [nn.Linear(24, 40).requires_grad_(False), nn.Linear(24, 16, bias=False)]
    bases[1].requires_grad_(False)
    parts = [ops.Part(0, 20, 2.0), ops.Part(20, 33, 0.5), ops.Part(20, 33, 0.5, layer=1)]
    sizes = [(3, 24), (40, 3), (4, 24), (40, 4), (4, 24), (16, 4)]
    x = torch.randn(33, 24, requires_grad=True)
    factors = [torch.randn(size, requires_grad=True) for size in sizes]
    weights = [torch.randn(33, 40), torch.randn(33, 16)]

    def gradients(form: object, dtype: torch.dtype) -> list[Tensor]:
        layers = [copy.deepcopy(base).to(dtype) for base in bases]
        inputs = [tensor.detach().to(dtype).requires_grad_(True) for tensor in (x, *factors)]
        outs = form(inputs[0], layers, parts, inputs[1:])  # type: ignore[operator]
        total = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
        return [*(out.detach() for out in outs), *torch.autograd.grad(total, inputs)]

    with torch.profiler.profile() as run:
        values = gradients(ops.low_rank_linears, torch.float32)
    assert called(run) > 8
    for value, exact in zip(values, gradients(ops.reference, torch.float64), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_loss_over_a_head_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of the positions, with a head that learns."""
    torch.manual_seed(0)
    hidden, head = torch.randn(37, 24), torch.randn(320, 24)
    labels, weights = torch.randint(320, (37,)), torch.rand(37)
    monkeypatch.setattr("lighten.engine.loss.CHUNKS", {None: (16 * 320 * 4, 16)})

    def loss() -> list[Tensor]:
        states, weight = (x.clone().requires_grad_(True) for x in (hidden, head))
        total, nll = _ChunkedCrossEntropy.apply(
            states, labels, weights, weight, None, HeadRule(), Workspace(), None
        )
        return [nll, *torch.autograd.grad(total, [states, weight])]

    with torch.profiler.profile() as run:
        values = loss()
    assert called(run) == 3 * 3
    monkeypatch.setattr(products, "is_slow_on_mkl", lambda: False)
    torch.testing.assert_close(values, loss(), rtol=1e-5, atol=1e-5)


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    model = Model()
    model.last.forward = before = lambda x: x  # type: ignore[method-assign]
    assert products.quicken(model) == 1
    assert model.last.forward is before
    assert products.quicken(model) == 0, "once is enough"


def test_quantised_weights_of_torchao_are_left_to_it() -> None:
    """They say that they are float32, and know no product of oneDNN's."""
    torchao = pytest.importorskip("torchao.quantization")
    model, x = Model().requires_grad_(False), torch.randn(33, 24)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    expected = results(model, x)
    products.quicken(model)
    assert all(map(torch.equal, results(model, x), expected))
    with torch.no_grad():
        assert torch.equal(model(x), expected[0])


def test_small_products_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "FEWEST", 24 * 40 * 33 + 1)
    model = Model()
    products.quicken(model)
    with torch.profiler.profile() as run:
        results(model, torch.randn(33, 24))
    assert called(run) == 0


@pytest.mark.parametrize("avx512", [False, True])
def test_a_wide_weight_read_the_other_way_around_is_left_to_mkl_without_avx512(
    avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There MKL is the quicker one; an adapter's thin factors stay with oneDNN."""
    monkeypatch.setattr(products, "has_avx512", lambda: avx512)
    torch.manual_seed(0)
    model, x = nn.Linear(80, 96, bias=False).requires_grad_(False), torch.randn(33, 80)
    expected = results(copy.deepcopy(model).double(), x.double())
    products.quicken(model)
    with torch.profiler.profile() as run:
        values = results(model, x)
    assert called(run) == 1 + avx512
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)
    assert products.takes(torch.randn(33, 96), torch.randn(96, 8).T)


def test_the_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.SWITCH, cpu.PLAIN)
    assert products.quicken(Model()) == 0
    assert not products.takes(torch.randn(33, 24), torch.randn(40, 24))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_are_multiplied_as_ever(dtype: torch.dtype) -> None:
    model, x = Model().to(dtype), torch.randn(32, 24, dtype=dtype)
    expected = results(model, x)
    products.quicken(model)
    assert all(map(torch.equal, results(model, x), expected))


def test_mixed_precision_multiplies_in_its_format() -> None:
    model, x = Model(), torch.randn(32, 24)
    products.quicken(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("way", ["lora", "full", "cohort"])
def test_a_plan_follows_them(way: str, tmp_path: Path) -> None:
    """Memory as it comes and goes in real steps, and each product among what takes time."""
    recipe = recipe_of(folder_of(tmp_path), **WAYS[way])
    traced = follow(recipe, (4, 48))
    assert course_of(traced.timeline) == course_of(really(recipe, (4, 48), "llama", 2))
    multiplied = [work for _, _, work in traced.timeline.work if work.name == NAME]
    assert multiplied
    assert all(work.flops > 0 for work in multiplied)


def test_a_plan_for_a_gpu_knows_nothing_of_them(tmp_path: Path) -> None:
    recipe = recipe_of(folder_of(tmp_path))
    traced = follow_recipe(recipe, config_of(recipe)[0], FLOAT32, "cuda", rows_tokens=(2, 32))
    assert not any(work.name == NAME for _, _, work in traced.timeline.work)


def test_without_onednn_plans_and_trainings_are_imported() -> None:
    """As on a Mac, whose PyTorch has no such operations."""
    code = (
        "import types, torch, peft, accelerate, torch._inductor.compile_fx\n"
        "torch.ops.__dict__['mkldnn'] = types.SimpleNamespace()\n"
        "import lighten.planning.trace, lighten.training.run, lighten.generation.engine"
    )
    # A process of its own: others are forked from one that has imported them.
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
