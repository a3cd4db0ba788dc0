#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a processor: 4-bit weights are wrong where a row is no multiple of 64 numbers.
#
# Expected: NF4 loses about 9 % of a normal weight's size whatever its shape is, since blocks of 64
# share a scale and go on over the ends of rows, as the count of the scales says.
# Seen: 25 to 29 % with rows of 80, 96 or 720 (all right with 64 and 576): dequantising begins a new
# block with each row, so numbers get the scale of another block. The same numbers as one long row come
# out right. Nothing is raised where such a layer trains; a model of such a width just seems bad at
# 4 bits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2
cd "$folder"
CUDA_VISIBLE_DEVICES="" "$folder/env/bin/python" - 2>"$folder/log" <<'PY' ||
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print("bitsandbytes", bitsandbytes.__version__)
ok = True
for columns in (64, 576, 80, 96, 720):
    torch.manual_seed(0)
    weight = torch.randn(32, columns)

    def lost(values):
        return float((values.float().reshape(weight.shape) - weight).norm() / weight.norm())

    matrix = lost(dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4")))
    row = lost(dequantize_4bit(*quantize_4bit(weight.reshape(1, -1), blocksize=64, quant_type="nf4")))
    layer = bitsandbytes.nn.Linear4bit(columns, 32, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").train()
    with torch.no_grad():
        product = lost(layer(torch.eye(columns)).t())
    print(f"rows of {columns}: {matrix:.1%} lost as a matrix, {product:.1%} in a layer, "
          f"{row:.1%} as one long row")
    ok &= row < 0.1 and ((matrix < 0.1 and product < 0.1) if columns % 64 == 0
                         else (matrix > 0.15 and product > 0.15))
raise SystemExit(not ok)
PY
  { tail -5 "$folder/log"; exit 1; }
