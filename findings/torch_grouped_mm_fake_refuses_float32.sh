#!/usr/bin/env bash
# torch 2.13.0: a product of experts that runs in float32 cannot be traced in float32.
#
# Expected: `torch.nn.functional.grouped_mm` takes on fake and on meta tensors what it takes on real
# ones, so that a model can be traced, exported or measured without its memory.
# Seen: on a processor it runs in float32 and in bfloat16, while its fake form refuses all but bfloat16
# ("Expected inputs of BF16 type"). A mixture-of-experts model that uses it works, and its plan of
# memory or its export in the same format fails.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
"$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

print("torch", torch.__version__)


def product(place, dtype):
    """Two experts, four rows each."""
    with place:
        rows, experts = torch.ones(8, 16, dtype=dtype), torch.ones(2, 16, 16, dtype=dtype)
        ends = torch.tensor([4, 8], dtype=torch.int32)
        try:
            return tuple(F.grouped_mm(rows, experts, offs=ends).shape)
        except RuntimeError as error:
            return str(error).splitlines()[0]


seen = {}
for dtype in (torch.bfloat16, torch.float32):
    places = {"real": contextlib.nullcontext(), "fake": FakeTensorMode(), "meta": torch.device("meta")}
    for name, place in places.items():
        seen[dtype, name] = product(place, dtype)
        print(dtype, name, "->", seen[dtype, name])
runs = {key: isinstance(value, tuple) for key, value in seen.items()}
refused = {(torch.float32, "fake"), (torch.float32, "meta")}
raise SystemExit(any(ran == (key in refused) for key, ran in runs.items()))
PY
