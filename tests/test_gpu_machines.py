"""What depends on a GPU's presence, age or number, decided as if one were in this machine.

Nothing is computed on one here: PyTorch's answers about the machine are replaced, or its tensors
have no values. What only a GPU can show is marked `gpu` elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import BitsAndBytesConfig

import lighten.cpu
from benchmarks import gpu_suite
from lighten import models
from lighten.benchmarking import attention as attention_job
from lighten.benchmarking import size as size_job
from lighten.engine import compiled, forked, fused_loss
from lighten.engine.loss import HeadRule, Objective, Workspace, _ChunkedCrossEntropy
from lighten.engine.memory_errors import ran_out
from lighten.engine.scaling import LossScaler
from lighten.engine.step import TrainingDiverged
from lighten.errors import UserError
from lighten.generation import attention
from lighten.generation.attention import Prefill
from lighten.machine import devices, forks, gpu_support, hardware
from lighten.models.attention_setting import require_attention
from lighten.models.stored import on_processor
from lighten.parallel import launch, ranks, tried
from lighten.parallel.launch import Launch
from lighten.parallel.tried import Tried
from lighten.planning.planner import Planner
from lighten.quantization.verify import InTransformers
from lighten.serving.cohort import CohortEngine
from tests.test_plan_changes import formula
from tests.test_plan_planner import recipes
from tests.test_train_step import UNEVEN, cohort_of, one_step, random_spec
from tests.tiny import save_tiny, tiny_tokenizer

T4 = (7, 5)
CUDA = torch.device("cuda", 0)
PATIENCE_S = 300.0  # of a busy machine
passed_on: list[str] = []  # what a forked process has of this one, and a fresh one has not


def a_gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int] = T4, count: int = 1) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


def origin(_word: str) -> Tried:
    return Tried(True, "forked" if passed_on else "fresh")


def test_nothing_that_computes_is_forked_beside_a_gpu(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu(monkeypatch)
    assert not forks.computing()
    assert not forked.possible()
    planner = Planner(formula(900, []), in_processes=True)
    planner.plan_ahead(recipes(tiny_folder))
    assert not any(planner.knows(recipe) for recipe in recipes(tiny_folder))


@pytest.fixture
def devices_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the system shows its GPUs, for a PyTorch that sees none of them."""
    monkeypatch.delenv("LIGHTEN_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_support, "_DEVICES", tmp_path)
    monkeypatch.setattr(gpu_support, "_DRIVER", tmp_path / "version")
    gpu_support._tell.cache_clear()
    return tmp_path


def test_a_gpu_that_pytorch_does_not_reach_is_told_of(
    devices_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not gpu_support.has_driver()
    (devices_folder / "nvidiactl").touch()
    assert gpu_support.has_driver()
    assert hardware.choose_device() == hardware.Choice("cpu", "no CUDA device")
    (devices_folder / "nvidia0").touch()
    (devices_folder / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for _ in range(2):
        assert "its driver (550.54.15) may be too old for CUDA 13.0" in (
            hardware.choose_device().reason
        )
    assert caplog.text.count("the processor computes: PyTorch does not reach") == 1
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this PyTorch is built without CUDA" in hardware.choose_device().reason
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.choose_device() == hardware.Choice("cpu", "no CUDA device")


@pytest.mark.parametrize(
    ("capability", "architectures", "device"),
    [(T4, "sm_75 sm_80 sm_120", "cuda"), ((8, 9), "sm_75 sm_80 sm_120", "cuda"),
     ((6, 0), "sm_75 sm_80 sm_120", "cpu"), ((10, 0), "sm_75 sm_90a sm_120", "cpu"),
     ((13, 0), "sm_90 compute_120", "cuda"), (T4, "", "cuda")],
)  # fmt: skip
def test_a_gpu_that_pytorch_has_no_code_for_is_left_alone(
    capability: tuple[int, int], architectures: str, device: str, devices_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    a_gpu(monkeypatch, capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", architectures.split)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
    choice = hardware.choose_device()
    assert choice.value == device
    assert ("has no code for A GPU" in choice.reason) == (device == "cpu")


@pytest.mark.skipif(not forks.possible(), reason="processes are forked on Linux")
@pytest.mark.parametrize(("gpu", "expected"), [(False, "forked"), (True, "fresh")])
def test_what_doctor_tries_beside_a_gpu_begins_afresh(
    gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sys.modules[__name__], "passed_on", ["something"])
    outcome = tried.tried("ranks over gloo", origin, "", limit_s=PATIENCE_S)
    assert outcome.detail == expected


def test_a_plan_for_another_gpu_opens_none(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu(monkeypatch)

    def opens(kind: str) -> None:
        raise AssertionError(f"{kind} was opened")

    monkeypatch.setattr(devices, "here", opens)
    assert compiled._gpu_rate(torch.bfloat16) == compiled.NOMINAL_FLOPS_OF_GPU


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """A kernel that raises what is in the list, or writes nothing, with Triton at hand."""
    raised: list[BaseException] = []

    def run(logits: Tensor, *_: Any) -> Tensor:
        if raised:
            raise raised[0]
        return logits

    module = ModuleType("lighten.cpu.cross_entropy_kernel")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(lighten.cpu, "cross_entropy_kernel", module, raising=False)
    monkeypatch.setattr(fused_loss.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    a_gpu(monkeypatch)
    fused_loss.obstacle.cache_clear()
    yield raised
    fused_loss.obstacle.cache_clear()


def hidden_on_gpu(dtype: torch.dtype) -> Tensor:
    with FakeTensorMode():
        return torch.empty(4, 8, dtype=dtype, device=CUDA)


def said_of_kernel(dtype: torch.dtype) -> str | None:
    with FakeTensorMode():  # the logits of the attempt have no values
        return fused_loss.obstacle(dtype, CUDA)


def test_losses_need_no_kernel_where_the_gpu_is_too_old_for_it(
    kernel: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said_of_kernel(torch.float16) is None
    assert fused_loss.available("cuda", hidden_on_gpu(torch.float16))
    assert said_of_kernel(torch.bfloat16) == "compute capability 7.5 has no bfloat16"
    assert not fused_loss.available("cuda", hidden_on_gpu(torch.bfloat16))
    a_gpu(monkeypatch, (8, 6))
    fused_loss.obstacle.cache_clear()
    assert said_of_kernel(torch.bfloat16) is None


def test_losses_need_no_kernel_where_none_can_be_compiled(
    kernel: list[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    kernel.append(RuntimeError("Failed to find C compiler. Please specify via CC.\nAnd more."))
    assert said_of_kernel(torch.float16) == "Failed to find C compiler. Please specify via CC."
    assert not fused_loss.available("cuda", hidden_on_gpu(torch.float16))
    assert "Failed to find C compiler" in caplog.text


def test_memory_that_runs_out_is_no_obstacle_to_a_kernel(kernel: list[BaseException]) -> None:
    kernel.append(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        said_of_kernel(torch.float16)
    kernel.clear()
    assert said_of_kernel(torch.float16) is None


@pytest.mark.parametrize("weight", [1.0, 2.0**-13, 2.0**-18])
def test_float16_teaches_the_heads_unlikely_words(weight: float) -> None:
    torch.manual_seed(0)
    positions, features, words = 128, 16, 8192
    states, head = torch.randn(positions, features), 0.1 * torch.randn(words, features)
    labels = torch.randint(0, 64, (positions,))
    weights = torch.full((positions,), weight)

    def gradient(dtype: torch.dtype) -> Tensor:
        """Of the float32 head; its products are formed in `dtype`."""
        learns = head.to(dtype).float().requires_grad_(True)
        total, _ = _ChunkedCrossEntropy.apply(
            states.to(dtype).requires_grad_(True), labels, weights, learns, None, HeadRule(),
            Workspace(), None,
        )  # fmt: skip
        total.backward()
        assert learns.grad is not None
        return learns.grad

    ours, exact = gradient(torch.float16), gradient(torch.float32)
    for rows in (slice(0, 64), slice(64, None)):  # words that are labels, and those that are not
        assert float((ours[rows] - exact[rows]).norm() / exact[rows].norm()) < 0.02


def test_a_base_that_float16_cannot_hold_is_no_matter_of_the_learning_rate() -> None:
    cohort = cohort_of(random_spec(), dtype=torch.float16)
    model: Any = cohort.model
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
    scaler = LossScaler()
    objective = Objective(cohort.model, cohort)
    with pytest.raises(TrainingDiverged, match=r"float16 ends at 65,504.* set dtype to float32"):
        one_step(cohort, UNEVEN, 3, scaler=scaler, objective=objective)


@pytest.mark.parametrize("library", ["CUBLAS", "CUDNN", "CUSOLVER"])
def test_a_library_that_finds_no_memory_is_short_of_it(library: str) -> None:
    said = f"CUDA error: {library}_STATUS_ALLOC_FAILED when calling `create(handle)`"
    assert ran_out(RuntimeError(said))
    assert not ran_out(RuntimeError(said.replace("ALLOC_FAILED", "EXECUTION_FAILED")))


def test_our_engine_answers_on_the_device_that_is_named(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu(monkeypatch)
    monkeypatch.setenv("LIGHTEN_DEVICE", "cpu")
    engine = CohortEngine(str(tiny_folder), context=64, slots=1)
    engine._open()
    assert engine._opened is not None
    assert engine._opened.model.device.type == "cpu"
    assert engine._engine is not None
    engine._engine.close(10.0)


def test_processes_that_measure_compute_on_the_gpu_that_is_named(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu(monkeypatch, count=2)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LIGHTEN_DEVICE", "cuda:1")
    hardware.take("cpu")
    assert taken == []
    hardware.take("cuda")
    assert taken == [torch.device("cuda:1")]
    monkeypatch.setenv("LIGHTEN_DEVICE", "cuda:2")
    with pytest.raises(UserError, match="cuda:2 is not there"):
        next(size_job.run(str(tiny_folder), adapter=None, revision=None, device="cuda"))
    with pytest.raises(UserError, match="cuda:2 is not there"):
        next(attention_job.run(
            kind="sdpa", heads=1, key_heads=1, features=8, lengths=(16,), device="cuda",
            dtype="float16", training=False, budget_s=0.1,
        ))  # fmt: skip


def test_a_base_is_read_into_the_gpu_that_this_process_computes_on(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu(monkeypatch, count=2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    told: list[dict[str, Any]] = []

    def read(*_: Any, **options: Any) -> None:
        told.append(options)
        raise OSError("enough")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    for device in ("cuda", "cuda:0", "cpu"):
        with pytest.raises(UserError):
            models.load(str(tiny_folder), dtype="float16", load_in_4bit=True, device=device)
    maps = [options["device_map"] for options in told]
    assert maps == [{"": "cuda:1"}, {"": "cuda:0"}, {"": "cpu"}]


def test_a_receipt_reads_four_bits_on_the_processor_beside_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny(tmp_path / "dense")
    assert on_processor(dense) == {}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    stored = tmp_path / "stored"
    model.save_pretrained(stored)
    tiny_tokenizer().save_pretrained(stored)
    a_gpu(monkeypatch)
    # With nothing said transformers takes the model to this one.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert InTransformers(stored).model.device.type == "cpu"


@pytest.mark.parametrize(
    ("device", "capability", "says"),
    [("cpu", None, "is for CUDA devices alone; use sdpa"), ("cuda", T4, "this GPU has 7.5; use"),
     ("cuda:1", None, "this GPU has 7.5; use"), ("cuda", (8, 6), None)],
)  # fmt: skip
def test_flash_attention_is_refused_before_anything_is_loaded(
    device: str, capability: tuple[int, int] | None, says: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    a_gpu(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    require_attention("sdpa", device, capability)
    if says is None:
        require_attention("flash_attention_2", device, capability)
        return
    with pytest.raises(UserError, match=says):
        require_attention("flash_attention_2", device, capability)


def test_ranks_may_see_one_gpu_each_where_slurm_shows_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def task(gpus_on_node: int) -> Launch:
        return launch.recognise({
            "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_LOCALID": "1", "SLURM_GPUS_ON_NODE": str(gpus_on_node),
            "CUDA_VISIBLE_DEVICES": "0",
        })  # fmt: skip

    # Two tasks of a node with one GPU are shown the same one.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    ranks._require_gpus(task(2), "cuda:0", gpus=1)
    both = Launch("torchrun", 1, 2, 1, 2)
    ranks._require_gpus(both, "cuda", gpus=2)
    for shared in (task(1), both):
        with pytest.raises(UserError, match=r"2 ranks .* a machine with 1 GPU;"):
            ranks._require_gpus(shared, "cuda", gpus=1)
    with pytest.raises(UserError, match="LIGHTEN_DEVICE=cuda:1 is one GPU for 2 ranks"):
        ranks._require_gpus(both, "cuda:1", gpus=2)


def test_a_run_after_one_on_another_device_computes_where_it_is_told() -> None:
    """In a notebook: accelerate keeps the first run's device for as long as the process lives."""
    try:
        before = ranks.connect(Launch(), "cpu", "")
        assert ranks.connect(Launch(), "cpu", "").device == before.device
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state |= {"device": torch.device("cuda", 0), "_cpu": False}
        assert ranks.connect(Launch(), "cpu", "").device.type == "cpu"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_ranks_own_lack_of_memory_is_no_lost_peer() -> None:
    with pytest.raises(torch.OutOfMemoryError), ranks.lost_peers(0, 2):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("window", [0, 5, 64])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_lone_token_attends_without_a_mask(
    window: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    query, room = torch.randn(1, 4, 1, 8), (torch.randn(3, 2, 32, 8) for _ in range(2))
    keys, values = room
    masks: list[Any] = []

    def attend(*tensors: Tensor, attn_mask: Tensor | None, **options: Any) -> Tensor:
        masks.append(attn_mask)
        return attended(*tensors, attn_mask=attn_mask, **options)

    attended = F.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", attend)
    ours = attention._attend_sequence(query, keys, values, Prefill(0, 1, 2, 19), 0.3, window,
                                      softcap)  # fmt: skip
    assert masks == ([] if softcap else [None])
    first = max(0, 20 - window) if window else 0
    key, value = (x[2:3, :, first:20].repeat_interleave(2, 1) for x in (keys, values))
    scores = query @ key.mT * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    expected = (scores.softmax(-1) @ value)[0].transpose(0, 1)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("capability", "dtype", "masked", "expected"),
    [(T4, torch.float16, False, True), ((8, 9), torch.float16, False, False),
     ((8, 9), torch.float32, False, True), ((8, 9), torch.bfloat16, True, True)],
)  # fmt: skip
def test_keys_are_repeated_where_no_kernel_reads_grouped_ones(
    capability: tuple[int, int], dtype: torch.dtype, masked: bool, expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    a_gpu(monkeypatch, capability)
    mask = torch.ones(9, 14, dtype=torch.bool) if masked else None
    assert attention._wants_every_head(hidden_on_gpu(dtype), mask) == expected
    assert not attention._wants_every_head(torch.empty(4, dtype=dtype), mask)


@pytest.mark.parametrize("cached", [0, 5])
def test_repeated_keys_answer_as_grouped_ones(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 9, 8)
    keys, values = (torch.randn(1, 2, 32, 8) for _ in range(2))
    arguments = (query, keys, values, Prefill(0, 9, 0, cached), 0.3, 0, None)
    grouped = attention._attend_sequence(*arguments)
    monkeypatch.setattr(attention, "_wants_every_head", lambda *_: True)
    torch.testing.assert_close(attention._attend_sequence(*arguments), grouped)


@pytest.mark.parametrize(
    ("capability", "tiny", "expected"),
    [(T4, False, "float16"), ((8, 9), False, "bfloat16"), (T4, True, "float32")],
)
def test_the_suites_bases_are_in_a_format_that_the_gpu_has(
    capability: Sequence[int], tiny: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu(monkeypatch, (capability[0], capability[1]))
    assert gpu_suite.dtype_of(argparse.Namespace(device="cuda", tiny=tiny)) == expected
