"""What saves memory in a training pass: it must save, and change nothing else."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.cache_utils
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import lighten
from lighten.adapters import Cohort
from lighten.cpu import allocator
from lighten.engine.checkpointing import checkpoint_layers
from lighten.engine.forward_backward import shares_of
from lighten.engine.loss import Objective
from lighten.engine.offload import Offload, PinnedMemory, ScratchFile, wrap
from lighten.errors import DiskFull, UserError
from lighten.machine import disk, hardware, heap
from lighten.recipe import Recipe, RecipeError
from tests.processes import python
from tests.test_train_step import (
    UNEVEN,
    cohort_of,
    gradients,
    in_blocks,
    micro_batches,
    one_step,
    random_spec,
)
from tests.tiny import ARCHITECTURES, save_tiny

GLIBC = heap.glibc() is not None
# Blocks of growing size, written and freed as activations are: how many pages had to be fetched?
WORK = """
import resource, sys
from lighten.cpu import allocator
import torch
if sys.argv[1] == "kept":
    print(allocator.keep_pages("cpu").value)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    blocks = [torch.ones(size * 2**18) for size in (35, 48, 40)]
for _ in range(6): work()
def fetched():
    before = faults()
    work()
    return faults() - before
print(min(fetched() for _ in range(3)))
import psutil
held = psutil.Process().memory_info().rss
allocator.trim()
print(held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
@pytest.mark.parametrize("compiler", ["g++", "/bin/false"])
def test_pages_of_freed_activations_are_kept_and_given_back_when_asked(compiler: str) -> None:
    def run(how: str) -> list[str]:
        return subprocess.run(
            [sys.executable, "-c", WORK, how],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "CXX": compiler},
        ).stdout.split("\n")

    plain_lines, kept_lines = run("plain"), run("kept")
    used = "arena" if compiler == "g++" and allocator.has_arena() else "glibc"
    assert kept_lines[0] == f"{used}, pages kept"
    # The least of a few rounds: on some machines the heap grows once more by one block.
    assert int(plain_lines[0]) > 10 * max(1, int(kept_lines[1]))
    assert int(kept_lines[2]) > 100 * 2**20
    assert int(plain_lines[1]) < 20 * 2**20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2"),
    ],
)
@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_an_allocator_that_the_user_arranged_is_left_alone(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    choice = allocator.keep_pages("cpu")
    assert choice.value == "as it is"
    assert name in choice.reason


def test_other_systems_and_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocator.keep_pages("cuda").value == "as it is"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "not glibc" in allocator.keep_pages("cpu").reason
    assert allocator.trim() is False


def offloaded(cohort: Cohort, folder: Path) -> Offload:
    offload = Offload(cohort.model, ScratchFile(folder), smallest_bytes=1)
    wrap(cohort.model, offload)
    return offload


Saver = Callable[[Cohort, Path], Any]
SAVERS: dict[str, Saver] = {
    "each layer": lambda cohort, _: checkpoint_layers(cohort.model),
    "every second layer": lambda cohort, _: checkpoint_layers(cohort.model, every=2),
    "attention": lambda cohort, _: checkpoint_layers(cohort.model, part="attention"),
    "mlp": lambda cohort, _: checkpoint_layers(cohort.model, part="mlp"),
    "offload": offloaded,
    "offload of layer inputs": lambda cohort, folder: (
        checkpoint_layers(cohort.model),
        offloaded(cohort, folder),
    ),
    "offload of what is not recomputed": lambda cohort, folder: (
        checkpoint_layers(cohort.model, part="attention"),
        offloaded(cohort, folder),
    ),
}


def step_with(
    saver: Saver | None, arch: str, packed: bool, folder: Path
) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """What one step of two adapters reports, and each one's gradients."""
    specs = [random_spec("a", 4, seed=1, dropout=0.2), random_spec("b", 8, seed=2)]
    cohort = cohort_of(*specs, arch=arch)
    if packed:
        in_blocks(cohort)
    if saver is not None:
        saver(cohort, folder)
    objective = Objective(cohort.model, cohort, packs=packed)
    report, members = one_step(cohort, UNEVEN, 3, packed=packed, objective=objective)
    return report, {name: gradients(member) for name, member in members.items()}


def assert_bitwise(
    actual: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]], name: str
) -> None:
    for member in ("a", "b"):
        for key, value in expected[member].items():
            assert torch.equal(actual[member][key], value), (name, key)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_saver_is_bitwise_the_run_without_it(arch: str, packed: bool, tmp_path: Path) -> None:
    report, expected = step_with(None, arch, packed, tmp_path)
    for name, saver in SAVERS.items():
        if arch == "opt" and name == "mlp":  # its layers hold the two products themselves
            with pytest.raises(UserError, match="have no mlp of their own; use layer"):
                step_with(saver, arch, packed, tmp_path)
            continue
        saver_report, actual = step_with(saver, arch, packed, tmp_path)
        for member in ("a", "b"):
            assert saver_report[member].loss == report[member].loss, name
        assert_bitwise(actual, expected, name)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_savers_work_where_autograd_has_a_thread_of_its_own(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: what layers follow while they are recomputed must not be this thread's alone."""
    _, expected = step_with(None, "llama", packed, tmp_path)
    real, threads = torch.autograd.backward, []

    def elsewhere(*args: Any, **kwargs: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(real, *args, **kwargs).result()
            threads.extend(pool._threads)

    monkeypatch.setattr(torch.autograd, "backward", elsewhere)
    for name, saver in SAVERS.items():
        threads.clear()
        _, actual = step_with(saver, "llama", packed, tmp_path)
        assert threads, "nothing went backward elsewhere"
        assert_bitwise(actual, expected, name)


def kept_bytes(saver: Saver | None, folder: Path) -> int:
    """What autograd holds between forward and backward, weights apart, each storage once."""
    cohort = cohort_of(random_spec(), num_hidden_layers=4)
    if saver is not None:
        saver(cohort, folder)
    staying = {p.untyped_storage()._cdata for p in cohort.model.parameters()}
    storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in staying:
            storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return tensor

    (batch,) = micro_batches(UNEVEN, ["a"], 6)
    objective = Objective(cohort.model, cohort)
    weights = torch.ones(len(batch.labels))
    shares = shares_of(batch)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), objective.at(batch, shares):
        loss, _ = objective(batch, shares, weights)
    total_bytes = sum(size for ref, size in storages.values() if not ref.expired())
    assert loss.requires_grad
    return total_bytes


def test_recomputed_layers_keep_less() -> None:
    baseline = kept_bytes(None, Path())
    bytes_kept = {name: kept_bytes(SAVERS[name], Path())
                  for name in ("each layer", "every second layer", "attention", "mlp")}  # fmt: skip
    assert bytes_kept["each layer"] < 0.35 * baseline
    assert bytes_kept["each layer"] < bytes_kept["every second layer"] < 0.75 * baseline
    assert bytes_kept["attention"] < 0.9 * baseline
    assert bytes_kept["mlp"] < 0.9 * baseline


def test_offloaded_activations_leave_memory_and_weights_stay(tmp_path: Path) -> None:
    cohort = cohort_of(random_spec(), num_hidden_layers=4)
    offload = offloaded(cohort, tmp_path)
    store = offload.store
    assert isinstance(store, ScratchFile)
    refs: list[tuple[StorageWeakRef, int]] = []
    plain = store.put

    def put(flat: Tensor) -> Any:
        storage = flat.untyped_storage()
        refs.append((StorageWeakRef(storage), storage.nbytes()))
        assert storage._cdata not in weights
        return plain(flat)

    weights = {p.untyped_storage()._cdata for p in cohort.model.parameters()}
    weights |= {p.untyped_storage()._cdata for p in cohort.parameters("a").values()}
    store.put = put  # type: ignore[method-assign]
    (batch,) = micro_batches(UNEVEN, ["a"], 6)
    objective, shares = Objective(cohort.model, cohort), shares_of(batch)
    with objective.at(batch, shares):
        loss, _ = objective(batch, shares, torch.ones(len(batch.labels)))
        freed_bytes = sum(size for ref, size in refs if ref.expired())
        assert offload.moved_bytes == sum(size for _, size in refs) > 0
        assert freed_bytes > 0.95 * offload.moved_bytes
        assert offload.moved_bytes > 0.8 * kept_bytes(None, tmp_path)
        loss.backward()
    del loss
    gc.collect()
    assert store.waiting == 0  # the file is written from its start again
    assert store.end == 0
    assert not list(tmp_path.iterdir())  # it has no name that could be left behind


def test_small_activations_stay(tmp_path: Path) -> None:
    cohort = cohort_of(random_spec())
    offload = Offload(cohort.model, ScratchFile(tmp_path), smallest_bytes=2**20)
    wrap(cohort.model, offload)
    one_step(cohort, UNEVEN, 3)
    assert offload.moved_bytes == 0


def test_a_full_disk_and_a_folder_in_memory_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ScratchFile(tmp_path)

    class Full:
        def seek(self, place: int) -> None:
            assert place == 0

        def write(self, view: memoryview) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "file", Full())
    with pytest.raises(DiskFull, match=r"activation_offload: cannot write 8 bytes: No space left"):
        store.put(torch.zeros(8, dtype=torch.uint8))
    monkeypatch.setattr(disk, "file_system", lambda folder: "tmpfs")
    with pytest.raises(UserError, match="is in memory"):
        ScratchFile(tmp_path)


def test_trap37_no_cache_while_training_and_the_setting_is_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cohort = cohort_of(random_spec())
    checkpoint_layers(cohort.model)
    before = cohort.model.config.to_dict()
    assert cohort.model.config.use_cache

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a cache was made")

    with monkeypatch.context() as patched:
        patched.setattr(transformers.cache_utils.DynamicCache, "__init__", refuse)
        one_step(cohort, UNEVEN, 3)
        with pytest.raises(AssertionError, match="a cache was made"), torch.no_grad():
            cohort.model(input_ids=torch.tensor([[5, 6]]))  # it would have been seen
    assert cohort.model.config.to_dict() == before
    with cohort.using("a"), torch.no_grad():
        ids = torch.tensor([[5, 9, 14]])
        tokens = cohort.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        plain = cohort.model.generate(
            input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False
        )
    assert torch.equal(tokens, plain)


def test_trap34_the_reentrant_form_is_refused_and_other_arguments_are_handed_on(
    chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"model": "m", "dataset": str(chat_file), "gradient_checkpointing": True}
    with pytest.raises(RecipeError, match="adapters on a frozen base no gradient"):
        Recipe.from_values({**values, "gradient_checkpointing_kwargs": {"use_reentrant": True}})
    with pytest.raises(RecipeError, match="debug is not one of use_reentrant"):
        Recipe.from_values({**values, "gradient_checkpointing_kwargs": {"debug": True}})
    options = {"use_reentrant": False, "determinism_check": "none"}
    recipe = Recipe.from_values({**values, "gradient_checkpointing_kwargs": options})
    seen_options: list[dict[str, Any]] = []

    def note_options(forward: Any, *args: Any, **kwargs: Any) -> Any:
        seen_options.append({key: kwargs.pop(key) for key in options})
        return forward(*args, **kwargs)

    monkeypatch.setattr("lighten.engine.checkpointing.checkpoint", note_options)
    cohort = cohort_of(random_spec())
    checkpoint_layers(cohort.model, options=recipe.gradient_checkpointing_kwargs)
    one_step(cohort, UNEVEN, 6)
    assert seen_options == [options] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("gradient_checkpointing_layers", 2), ("gradient_checkpointing_part", "mlp"),
     ("gradient_checkpointing_kwargs", {"use_reentrant": False})],
)  # fmt: skip
def test_selectivity_without_checkpointing_is_refused(
    field: str, value: Any, chat_file: Path
) -> None:
    with pytest.raises(RecipeError, match=f"{field} has no effect without gradient_checkpointing"):
        Recipe.from_values({"model": "m", "dataset": str(chat_file), field: value})


def test_a_run_says_what_it_recomputes_and_where_activations_wait(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    run = lighten.train(
        model=str(tiny_folder), dataset=str(chat_file), output_dir=str(tmp_path / "run"),
        max_steps=1, val_size=0, progress=False, gradient_checkpointing=True,
        gradient_checkpointing_layers=2, gradient_checkpointing_part="mlp",
        activation_offload=True,
    )  # fmt: skip
    choices = {choice["what"]: choice["value"] for choice in run.info()["choices"]}
    assert choices["checkpointing"] == "1 layers' mlp"
    assert choices["activations"] == "scratch file"


@pytest.mark.gpu
def test_gpu_offload_is_bitwise_and_frees_memory() -> None:
    def run(moved: bool) -> tuple[list[Tensor], int]:
        cohort = cohort_of(random_spec(), num_hidden_layers=8, hidden_size=256)
        cohort.model.cuda()
        for parameter in cohort.parameters("a").values():
            parameter.data = parameter.data.cuda()
        if moved:
            offload = Offload(cohort.model, PinnedMemory(torch.device("cuda")), smallest_bytes=1)
            wrap(cohort.model, offload)
        ids = torch.randint(3, 300, (8, 200), generator=torch.Generator().manual_seed(0)).cuda()
        peak = hardware.PeakMemory("cuda")
        with cohort.using("a"):
            states = cohort.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            torch.cuda.synchronize()
            states.square().mean().backward()
        grads = [p.grad for p in cohort.parameters("a").values() if p.grad is not None]
        return grads, int(peak.read()["peak_bytes"])

    (plain, high), (moved_grads, low) = run(False), run(True)
    assert len(plain) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, moved_grads, strict=True))
    assert low < 0.7 * high


def test_a_second_run_of_a_process_is_measured_like_the_first(tmp_path: Path) -> None:
    """What the first left free counted as held before, and its use as none."""
    settings = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    folder = save_tiny(tmp_path / "base", **settings)
    said = [{"role": "user", "content": "the user"}, {"role": "assistant", "content": "the answer"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([json.dumps({"messages": said})] * 16), encoding="utf-8")
    peaks = []
    for name in ("first", "second", "third"):
        run = lighten.train(
            model_name_or_path=str(folder), dataset=str(rows), output_dir=str(tmp_path / name),
            method="full", dtype="float32", max_steps=2, workers=1, progress=False, planned=False,
        )  # fmt: skip
        record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
        peaks.append(record["training"]["peak_bytes"])
    assert min(peaks[1:]) > 0.8 * peaks[0]


EVALUATIONS = """
import sys
import torch
import lighten
from lighten.cpu import allocator

model, dataset, folder = sys.argv[1:]
allocator.keep_pages("cpu")
for number, free_blocks in enumerate((0, 0, 400)):
    blocks = [torch.ones(2**18) for _ in range(free_blocks)]  # 1 MiB each, as a training has them
    del blocks
    evaluated = lighten.evaluate(
        model, dataset=dataset, output_dir=f"{folder}/{number}", val_size=0.5, dtype="bfloat16",
        max_new_tokens=4, bootstrap_samples=100,
    )
    print(evaluated.models[0]["peak_bytes"])
"""


def test_an_evaluation_is_measured_alike_whatever_was_left_free(
    chat_file: Path, tmp_path: Path
) -> None:
    """The first of a process maps the libraries' pages too, as many as the system reads at once."""
    folder = save_tiny(tmp_path / "base", hidden_size=512, intermediate_size=2048)
    completed = python(EVALUATIONS, str(folder), str(chat_file), str(tmp_path / "out"))
    assert completed.returncode == 0, completed.stderr
    _, second, third = map(int, completed.stdout.split())
    assert third > 0.8 * second > 0.8 * (folder / "model.safetensors").stat().st_size / 2
