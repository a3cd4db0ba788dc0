#!/usr/bin/env bash
# torch 2.13.0: FSDP2 with a gradient divide factor of 1 cannot run its backward pass over gloo.
#
# Expected: `set_gradient_divide_factor(1.0)` sums gradients over the ranks, and a sum is what every
# backend has: it is how one loss over all ranks' tokens is divided by their count once.
# Seen: the backward pass raises, since any factor that was set is given to the backend as a scaled
# sum, an operation of NCCL alone; 1.0 too. Without the call the same model trains over gloo.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
cat > "$folder/rank.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))


def backward(factor):
    model = torch.nn.Linear(8, 8, bias=False)
    fully_shard(model, mesh=mesh)
    if factor is not None:
        model.set_gradient_divide_factor(factor)
    try:
        model(torch.ones(2, 8)).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "ran"


plain, one = backward(None), backward(1.0)
if dist.get_rank() == 0:
    print("torch", torch.__version__)
    print("no factor:", plain)
    print("factor 1.0:", one)
dist.barrier()
sys.exit(not (plain == "ran" and one != "ran"))
PY
OMP_NUM_THREADS=1 "$folder/env/bin/torchrun" --nproc-per-node 2 --master-addr 127.0.0.1 \
  --master-port 29611 "$folder/rank.py" 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
