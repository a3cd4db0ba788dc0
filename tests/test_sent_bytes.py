"""What ranks really send in a step, by the system's count of their connections, is what is planned.

One pair of ranks makes all the runs.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import lighten
from lighten.api.plans import plan_spread
from lighten.planning.distributed import all_gather, all_reduce
from lighten.training import loop
from tests.processes import notes_of, runs_of_rank, start_ranks, wait_for
from tests.tiny import save_tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells bytes by connection")
LAYERS, RANKS, COUNT = 4, 2, 2
LEARNS: dict[str, dict[str, Any]] = {
    "adapters": {"lora_r": [8, 16]},
    "all": {"method": "full"},
    "last": {"trainable_layers": "last_2"},
    "packed": {"lora_r": 8, "load_in_4bit": True},
}
RUNS = [
    ("adapters", "ddp"), ("adapters", "zero1"), ("adapters", "zero2"), ("adapters", "zero3"),
    ("all", "ddp"), ("all", "zero1"), ("all", "zero2"), ("all", "fsdp"),
    ("last", "zero2"), ("last", "zero3"), ("packed", "zero3"),
]  # fmt: skip
# tcp_info of linux/tcp.h: 8 bytes, 24 numbers of 4, then those of 8 with some of 4 between.
BYTES_SENT = 200


def sent_bytes() -> int:
    """By this process over all connections that it has."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # it was closed, or is none of TCP's
            continue
        if len(info) >= BYTES_SENT + 16:
            sent, again = struct.unpack_from("QQ", info, BYTES_SENT)
            total += sent - again  # a busy machine's kernel sends some twice
    return total


def settings(root: Path, data: Path, learns: str, strategy: str) -> dict[str, Any]:
    return {
        "model_name_or_path": str(root / "base"), "dataset": str(data), "dtype": "float32",
        "output_dir": str(root / f"{learns}-{strategy}"), "strategy": strategy, "max_steps": 3,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": COUNT, "max_length": 48,
        "max_train_samples": 2 * COUNT * RANKS, "val_size": 0, "learning_rate": 1e-3,
        **LEARNS[learns],
    }  # fmt: skip


def train_all(ports: str, file: str) -> None:
    """In a rank: one run after another, and what the last step of each sent."""
    step = loop.train_step
    notes: list[dict[str, Any]] = []

    def noted_step(*args: Any, **options: Any) -> Any:
        distributed.barrier()
        before = sent_bytes()
        report = step(*args, **options)
        distributed.barrier()
        notes[-1]["sent"] = sent_bytes() - before
        return report

    loop.train_step = noted_step
    for run_settings, noted in runs_of_rank(ports, file):
        notes.append(noted)
        lighten.train(progress=False, planned=False, **run_settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Path:
    root = tmp_path_factory.mktemp("sent")
    save_tiny(
        root / "base", "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS
    )
    runs = [settings(root, chat_file, *run) for run in RUNS]
    wait_for(start_ranks(train_all, runs, root / "runs.json"))
    return root


@pytest.mark.parametrize(("learns", "strategy"), RUNS)
def test_a_rank_sends_what_is_planned(
    root: Path, chat_file: Path, learns: str, strategy: str
) -> None:
    values = settings(root, chat_file, learns, strategy)
    planned = plan_spread(processes=RANKS, **values)
    for rank in notes_of(root / "runs.json", RUNS.index((learns, strategy))):
        # Counts, losses and what collectives say of themselves are a few thousand bytes.
        assert rank["sent"] == pytest.approx(planned.volume.network, rel=0.01, abs=10_000)


def meet(ports: str, file: str) -> None:
    """In a rank: what each collective sends of a megabyte."""
    for sizes, noted in runs_of_rank(ports, file):
        distributed.init_process_group("gloo")
        rank, tensor = distributed.get_rank(), torch.ones(sizes["bytes"] // 4)
        halves = list(tensor.chunk(RANKS))
        for name in ("all_reduce", "all_gather", "reduce_scatter"):
            distributed.barrier()
            before = sent_bytes()
            if name == "all_reduce":
                distributed.all_reduce(tensor)
            elif name == "all_gather":
                distributed.all_gather(halves, halves[rank].clone())
            else:
                distributed.reduce_scatter(halves[rank].clone(), halves)
            distributed.barrier()
            noted[name] = sent_bytes() - before
        distributed.destroy_process_group()


def test_gloo_scatters_by_reducing_all(tmp_path: Path) -> None:
    """What the plan counts on processors; NCCL's ring sends half as much (PyTorch 2.13)."""
    size = 2**20
    wait_for(start_ranks(meet, [{"bytes": size}], tmp_path / "runs.json"))
    expected = {"all_reduce": all_reduce(size, RANKS), "all_gather": all_gather(size, RANKS),
                "reduce_scatter": all_reduce(size, RANKS)}  # fmt: skip
    for rank in notes_of(tmp_path / "runs.json", 0):
        assert rank == pytest.approx(expected, rel=0.01)
