"""What operations give on fake tensors: told from memory as PyTorch tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lighten.planning import fake_results
from lighten.planning.fake_results import FakeResults

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def calls(x: Tensor, y: Tensor) -> Iterator[Call]:
    """Operations that make, look at, change and list tensors; x and y are [6, 4]."""
    yield aten.mul.Tensor, (x, y), {}
    yield aten.mul.Tensor, (x, 2), {}
    yield aten.mul.Tensor, (x, 2.0), {}
    yield aten.mm.default, (x, aten.t.default(y)), {}
    yield aten.view.default, (x, [2, 12]), {}
    yield aten.view.default, (x, [12, 2]), {}
    yield aten.slice.Tensor, (x, 0, 2, 5), {}
    yield aten.expand.default, (aten.select.int(x, 0, 1), [3, 4]), {}
    yield aten.split.Tensor, (x, 4), {}
    yield aten.add_.Tensor, (x, y), {}
    yield aten.mm.out, (x, aten.t.default(y)), {"out": aten.empty.memory_format([6, 6])}
    yield aten.max.dim, (x, 1), {}
    yield aten.native_layer_norm.default, (x, [4], None, None, 1e-5), {}
    yield aten.cat.default, ([x, y],), {}
    yield aten.to.dtype, (x, torch.float16), {}
    yield aten.empty_like.default, (x,), {"dtype": torch.int64}
    yield aten.zeros.default, ([3, 0],), {}
    yield aten.as_strided.default, (x, [2, 2], [1, 1], 3), {}
    yield aten.permute.default, (x, [1, 0]), {}
    yield aten.clone.default, (aten.permute.default(x, [1, 0]),), {}
    yield aten._foreach_norm.Scalar, ([x, y],), {}
    yield aten.div.Tensor, (aten.arange.default(6), 2), {}


def facts(out: Any, given: list[Tensor]) -> Any:
    """All that one can ask of a result, and whose storage it has."""
    if isinstance(out, (tuple, list)):
        return type(out), [facts(one, given) for one in out]
    if not isinstance(out, Tensor):
        return out
    storage = out.untyped_storage()
    return (
        type(out), out.shape, out.stride(), out.storage_offset(), out.dtype, out.device,
        storage.nbytes(), [out is one for one in given],
        [storage is one.untyped_storage() for one in given],
    )  # fmt: skip


def tensors_of(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree
    return [t for b in branches for t in tensors_of(b)] if isinstance(
        tree, (tuple, list, dict)
    ) else []  # fmt: skip


def test_a_result_from_memory_is_pytorchs_own() -> None:
    results = FakeResults()
    with FakeTensorMode():
        for _ in range(3):
            both = [list(calls(torch.empty(6, 4), torch.empty(6, 4))) for _ in range(2)]
            for (func, args, kwargs), (_, plain_args, plain_kwargs) in zip(*both, strict=True):
                out, plain = results.run(func, args, kwargs), func(*plain_args, **plain_kwargs)
                given, plain_given = (
                    tensors_of([args, kwargs]),
                    tensors_of([plain_args, plain_kwargs]),
                )
                assert facts(out, given) == facts(plain, plain_given), func


def test_each_kind_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def noting(func: Any, args: Any, kwargs: Any) -> Any:
        ran.append(func)
        return func(*args, **kwargs)

    monkeypatch.setattr(fake_results, "run_fake", noting)
    results = FakeResults()
    with FakeTensorMode():
        for _ in range(3):
            for func, args, kwargs in calls(torch.empty(6, 4), torch.empty(6, 4)):
                results.run(func, args, kwargs)
        assert len(ran) == len(list(calls(torch.empty(6, 4), torch.empty(6, 4))))


@pytest.mark.parametrize(
    "call",
    [lambda x: (aten.resize_.default, (x, [2])),
     lambda x: (aten.mm.out, (x, aten.t.default(x))),
     lambda _: (aten.mul.Tensor, (torch.tensor(2.0), 3.0))],
    ids=["a shape that is changed", "an out that is resized", "a tensor with a value"],
)  # fmt: skip
def test_what_depends_on_more_is_asked_for_each_time(call: Callable[[Tensor], Any]) -> None:
    results = FakeResults()
    with FakeTensorMode():
        for _ in range(3):
            (func, args), (_, plain_args) = call(torch.empty(6, 4)), call(torch.empty(6, 4))
            out_of = func is aten.mm.out
            kwargs, plain_kwargs = ({"out": torch.empty(0)} if out_of else {} for _ in range(2))
            out, plain = results.run(func, args, kwargs), func(*plain_args, **plain_kwargs)
            given, plain_given = tensors_of([args, kwargs]), tensors_of([plain_args, plain_kwargs])
            assert facts(out, given) == facts(plain, plain_given)
            assert [t.shape for t in given] == [t.shape for t in plain_given]


def test_the_default_format_is_a_part_of_the_question() -> None:
    results = FakeResults()
    with FakeTensorMode():
        formats = []
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            torch.set_default_dtype(dtype)
            try:
                formats.append(results.run(aten.empty.memory_format, ([2],), {}).dtype)
            finally:
                torch.set_default_dtype(torch.float32)
    assert formats == [torch.float32, torch.bfloat16, torch.float32]
