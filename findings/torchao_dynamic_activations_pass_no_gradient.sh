#!/usr/bin/env bash
# torchao 0.18.0: a layer with rounded activations (int8 x int8, 8da4w) passes no gradient on.
#
# Expected: as with weight-only INT8, a frozen quantised layer passes the gradient to its input (which
# is all that an adapter before it needs), or says that it cannot.
# Seen: the layer's output is cut off from its input. Alone that ends in an error, but with a residual
# connection around it, as in every transformer block, the rest of the gradient arrives and the
# backward pass succeeds without a word: adapters in such a base train on gradients that leave out
# what goes through its quantised layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 numpy
cd "$folder"
"$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import torch
import torchao
from torchao.quantization import (Int8DynamicActivationInt8WeightConfig,
                                  Int8DynamicActivationIntxWeightConfig, Int8WeightOnlyConfig,
                                  PerGroup, quantize_)

print("torch", torch.__version__, "torchao", torchao.__version__)


def gradient(layer):
    """Of an adapter before a residual block: h = x + x A, out = h + layer(h)."""
    adapter = torch.nn.Parameter(torch.zeros(64, 64))
    hidden = x + x @ adapter
    out = hidden + layer(hidden)
    (out - target).square().mean().backward()
    return adapter.grad.flatten()


seen = {}
for name, config in (
    ("INT8 weights", Int8WeightOnlyConfig(version=2)),
    ("INT8 weights and activations", Int8DynamicActivationInt8WeightConfig(version=2)),
    ("8da4w", Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4,
                                                    weight_granularity=PerGroup(32))),
):
    torch.manual_seed(0)
    x, target = torch.randn(8, 64), torch.randn(8, 64)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False).requires_grad_(False))
    full = gradient(model)
    none = gradient(lambda hidden: model(hidden).detach())  # what is left where the layer is cut off
    quantize_(model, config)
    arrived = gradient(model)
    linked = model(x.requires_grad_()).requires_grad
    right = float(torch.cosine_similarity(arrived, full, 0))
    cut = float(torch.cosine_similarity(arrived, none, 0))
    seen[name] = linked, right, cut
    print(f"{name}: output linked to input: {linked}; cosine of the adapter's gradient with the "
          f"unquantised one {right:.4f}, with that of a cut layer {cut:.4f}")
weights = seen.pop("INT8 weights")
ok = weights[0] and weights[1] > 0.999
ok = ok and all(not linked and right < 0.95 and cut > 0.99 for linked, right, cut in seen.values())
raise SystemExit(not ok)
PY
