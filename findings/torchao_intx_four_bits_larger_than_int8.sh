#!/usr/bin/env bash
# torchao 0.18.0: a model quantised to 4 bits with IntxWeightOnlyConfig is larger than one in INT8.
#
# Expected: 4-bit weights with a scale for each group of 32 take about 0.3 of bfloat16 (4.5 to 5 bits
# a weight), 2-bit ones less; INT8 takes half.
# Seen: each weight takes a byte whatever its bits are, in memory and in the file, and the scales and
# zero points of the groups come on top: 4 bits and 2 bits take the same, more than INT8, with the
# precision of 4 and 2 bits. No warning says so; only the file's size does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 numpy
cd "$folder"
"$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import os

import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

print("torch", torch.__version__, "torchao", torchao.__version__)
configs = {
    "bfloat16": None,
    "INT8": Int8WeightOnlyConfig(version=2),
    "4 bits": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "2 bits": IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerGroup(32)),
}
size, error = {}, {}
for name, config in configs.items():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False)).to(torch.bfloat16)
    weight = model[0].weight.detach().float()
    if config is not None:
        quantize_(model, config)
    torch.save(model.state_dict(), "weights.pt")
    size[name] = os.path.getsize("weights.pt")
    rounded = model(torch.eye(1024, dtype=torch.bfloat16)).detach().float().t()
    error[name] = float((rounded - weight).norm() / weight.norm())
    print(f"{name}: {size[name]} bytes, {size[name] / size['bfloat16']:.2f} of bfloat16, "
          f"weights off by {error[name]:.1%}")
ok = size["4 bits"] > size["INT8"] and abs(size["2 bits"] - size["4 bits"]) < 4096
raise SystemExit(not (ok and error["INT8"] < error["4 bits"] < error["2 bits"]))
PY
