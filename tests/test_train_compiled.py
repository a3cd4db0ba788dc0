"""Compiled decoder layers against the same layers as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lighten.adapters import AdapterSpec, attach
from lighten.cpu import gates, kernels
from lighten.engine import compiled
from lighten.engine.checkpointing import checkpoint_layers
from lighten.engine.offload import Offload, ScratchFile, wrap
from tests.test_train_step import UNEVEN, assert_close, cohort_of, gradients, in_blocks, one_step
from tests.test_train_step import random_spec as spec
from tests.tiny import tiny_model

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)
# What one test has compiled, another finds in the compiler's cache.
COMPILED = pytest.mark.parametrize(("arch", "checkpointing"), [("llama", True), ("gpt2", False)])


@needs_compiler
@pytest.mark.slow
# Dynamo instantiates autograd functions itself while it traces them, and lists tensors' gradients.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@COMPILED
def test_compiled_layers_learn_what_plain_ones_learn(arch: str, checkpointing: bool) -> None:
    plain, plain_members = one_step(in_blocks(cohort_of(spec(), arch=arch)), UNEVEN, 3, packed=True)
    cohort = in_blocks(cohort_of(spec(), arch=arch))
    compiled.compile_layers(cohort.model)
    torch._dynamo.utils.counters.clear()
    if checkpointing:
        assert checkpoint_layers(cohort.model) == 2
    report, members = one_step(cohort, UNEVEN, 3, packed=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert report["a"].loss == pytest.approx(plain["a"].loss, rel=1e-5)
    assert_close(gradients(members["a"]), gradients(plain_members["a"]))


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(kernels.obstacle() is not None, reason=str(kernels.obstacle()))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_batches_of_other_rows_meet_the_same_compiled_kernels() -> None:
    """bfloat16, as long runs on a processor have it: kernels are operations of the graph."""

    def run(dtype: torch.dtype, quick: bool = False) -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        cohort = in_blocks(cohort_of(spec(), dtype=dtype))
        assert gates.quicken(cohort.model) == 2
        if quick:
            compiled.compile_layers(cohort.model)
        grads = []
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for rows in (UNEVEN, UNEVEN[::-1], UNEVEN[1:]):
                _, members = one_step(cohort, rows, 3, packed=True)
                grads.append(
                    torch.cat([grad.flatten() for grad in gradients(members["a"]).values()])
                )
        called = {event.key for event in profiler.key_averages()}
        assert "lighten::attention_backward" in called
        assert "lighten::gated_backward" in called
        return grads

    exact, plain = run(torch.float32), run(torch.bfloat16)
    for truth, eager, quick in zip(exact, plain, run(torch.bfloat16, quick=True), strict=True):
        assert float((quick - truth).norm()) < 1.1 * float((eager - truth).norm())
    assert not torch._dynamo.utils.counters["graph_break"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@COMPILED
def test_what_compiled_layers_keep_can_wait_elsewhere(
    arch: str, checkpointing: bool, tmp_path: Path
) -> None:
    def run(moved: bool) -> tuple[float, dict[str, torch.Tensor]]:
        torch._dynamo.reset()
        cohort = in_blocks(cohort_of(spec(), arch=arch))
        compiled.compile_layers(cohort.model)
        if checkpointing:
            checkpoint_layers(cohort.model)
        offload = Offload(cohort.model, ScratchFile(tmp_path), smallest_bytes=1)
        if moved:
            wrap(cohort.model, offload)
        report, members = one_step(cohort, UNEVEN, 3, packed=True)
        assert (offload.moved_bytes > 0) == moved
        return report["a"].loss, gradients(members["a"])

    (loss, expected), (moved_loss, actual) = run(False), run(True)
    assert moved_loss == loss
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_short_runs_cohorts_and_dropout_are_not_compiled_and_the_reason_is_said() -> None:
    def choice(
        *specs: AdapterSpec, torch_compile: bool | str = "auto", tokens: int = 10**12,
        dtype: torch.dtype = torch.bfloat16,
    ) -> str:  # fmt: skip
        cohort = attach(tiny_model("llama").to(dtype), list(specs))
        decision = compiled.choose(torch_compile, cohort, tokens=tokens, device="cpu", cores=2)
        return f"{decision.value}: {decision.reason}"

    if shutil.which("g++"):
        assert choice(spec()).startswith("on: a run of about")
        assert choice(spec(), torch_compile=True) == "on: torch_compile of the recipe"
        assert choice(spec(), dtype=torch.float32).startswith("off: float32 on a processor")
    assert "would not pay it back" in choice(spec(), tokens=1000) or not shutil.which("g++")
    assert choice(spec(), torch_compile=False) == "off: torch_compile of the recipe"
    assert "the cohort has several" in choice(spec("a"), spec("b"), torch_compile=True)
    assert "lora_dropout" in choice(spec(dropout=0.1), torch_compile=True)
    assert "low-rank adapters alone" in choice(spec(modules_to_save=("norm",)), torch_compile=True)
