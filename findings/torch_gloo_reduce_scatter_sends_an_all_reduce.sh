#!/usr/bin/env bash
# torch 2.13.0, gloo: a reduce-scatter sends as many bytes as an all-reduce of the same tensor.
#
# Expected: half of them, as a ring has it, which is what ZeRO-2 saves traffic by.
# Seen: on two ranks each sends the tensor once, whichever of the two it calls (Linux, by what the
# kernel counts for the loopback interface).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat >"$folder/ranks.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist


def sent() -> int:
    with open("/proc/net/dev") as file:
        (line,) = (line for line in file if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


rank = int(sys.argv[1])
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], GLOO_SOCKET_IFNAME="lo")
dist.init_process_group("gloo", rank=rank, world_size=2)
size = 8_000_000
ratios = {}
for name in ("all_reduce", "reduce_scatter"):
    whole, part = torch.ones(size), torch.empty(size // 2)
    dist.barrier()
    before = sent()
    dist.barrier()
    if name == "all_reduce":
        dist.all_reduce(whole)
    else:
        dist.reduce_scatter_tensor(part, whole)
        assert bool((part == 2).all())
    dist.barrier()
    ratios[name] = (sent() - before) / (2 * 4 * size)
    dist.barrier()
if rank == 0:
    print("torch", torch.__version__)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} of the tensor is sent by each of two ranks")
    sys.exit(not all(0.95 < ratio < 1.1 for ratio in ratios.values()))
PY
port=$("$folder/env/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/env/bin/python" "$folder/ranks.py" 1 "$port" &
"$folder/env/bin/python" "$folder/ranks.py" 0 "$port"
wait $!
