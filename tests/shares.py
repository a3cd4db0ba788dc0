"""The order in which workers of pytest-xdist take tests: the longest first, a file by one worker.

`--dist worksteal` gives each worker a run of as many tests as the others, and one that has no more
takes half of what another has left, from its end. In the order of the alphabet a file that makes
something for all its tests is cut in two, so that two workers make it, and a test of minutes is
begun last. So each worker's run begins with its share of what takes long, and short tests end it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest

# Minutes, roughly, of files that take more than half of one: only their order by length counts.
LONG = {
    "test_quantize": 1.5, "test_export_executorch": 1.5, "test_plan_trace": 1.7, "test_sweep": 1.4,
    "test_plan_training": 1.4, "test_cases_plan_spread": 1.3, "test_benchmarks": 1.3,
    "test_cases_plan_methods": 1.2, "test_whole_path": 1.1, "test_plan_command": 1.0,
    "test_train_runs": 1.0, "test_train_compiled": 1.0, "test_streamed_base": 0.9,
    "test_cpu_plain": 0.9, "test_audit": 0.9, "test_ranks_spawned": 0.8, "test_serve": 0.8,
    "test_cases_scale": 0.7, "test_plan_search": 0.7, "test_default_path": 0.6,
    "test_strategies": 0.5, "test_train_forked": 0.5,
}  # fmt: skip
# Of tests that share nothing with the others of their file.
ALONE = {"test_every_command_of_the_readme_runs": 4.0, "[docs/phone.md]": 2.0}
PAGE = 0.6


def in_shares(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """Tests in the order in which `--dist worksteal` hands them out; as they are for one worker.

    Args:
        items: All of them, in the order that every worker finds them in.
        workers: How many share them.
    """
    if workers < 2:
        return list(items)
    long: dict[str, list[pytest.Item]] = defaultdict(list)
    short = []
    for item in items:
        file = item.path.stem
        if file in LONG:
            long[file].append(item)
        elif file == "test_docs" and item.get_closest_marker("slow"):
            long[item.nodeid].append(item)
        else:
            short.append(item)
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    minutes = [0.0] * workers
    for name in sorted(long, key=_minutes, reverse=True):
        least = minutes.index(min(minutes))
        shares[least] += long[name]
        minutes[least] += _minutes(name)
    # As worksteal cuts them: each worker gets its part of what is left.
    left, at = len(items), 0
    for place, share in enumerate(shares):
        size = left // (workers - place)
        room = max(0, size - len(share))
        share += short[at : at + room]
        at, left = at + room, left - size
    shares[-1] += short[at:]
    return [item for share in shares for item in share]


def _minutes(name: str) -> float:
    if name in LONG:
        return LONG[name]
    return next((m for part, m in ALONE.items() if part in name), PAGE)
