#!/usr/bin/env bash
# deepspeed 0.19.8 on a processor without float16 arithmetic: `deepspeed.zero.Init(dtype=torch.float32)`
# builds the model in bfloat16.
#
# Expected: parameters in the format that was named.
# Seen: its choice reads `dtype or float16 if the processor has float16 else bfloat16`, in which the
# condition binds weaker than `or`: without float16 the named format is not looked at. Nothing is
# said. Named nothing, with no format in the configuration either, it gives float32. On a processor
# that emulates bfloat16 such a training takes many times as long.
#
# It needs a C++ compiler: DeepSpeed builds an operation of its own at its first start on a processor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 setuptools wheel ninja psutil numpy
"$folder/env/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cd "$folder"
export PATH="$folder/env/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/extensions" DS_ACCELERATOR=cpu
"$folder/env/bin/python" - >"$folder/out" 2>"$folder/log" <<'PY' ||
import os
import socket

import torch

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(port))
import deepspeed
from deepspeed.accelerator import get_accelerator

deepspeed.init_distributed("gloo")
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def built(**named):
    with deepspeed.zero.Init(config_dict_or_path=config, **named):
        return torch.nn.Linear(8, 8, bias=False).weight.dtype


print("FOUND deepspeed", deepspeed.__version__)
print("FOUND float16 here:", bool(get_accelerator().is_fp16_supported()))
print("FOUND named float32:", built(dtype=torch.float32))
print("FOUND named nothing:", built())
PY
  { tail -20 "$folder/log"; exit 1; }
sed -n 's/^FOUND //p' "$folder/out" | tee "$folder/seen"
# A processor with float16 arithmetic is given what was named.
seen=bfloat16
grep -q 'float16 here: True' "$folder/seen" && seen=float32
grep -q "named float32: torch.$seen" "$folder/seen"
grep -q 'named nothing: torch.float32' "$folder/seen"
