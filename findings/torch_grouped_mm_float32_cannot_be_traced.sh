#!/usr/bin/env bash
# torch 2.13.0: the grouped product of mixtures of experts runs in float32 on a processor, and cannot be
# traced there.
#
# Expected: what runs can be traced with fake tensors, which know shapes alone.
# Seen: in float32 (and float16) the product runs; on fake tensors it raises "Expected inputs of BF16
# type". Whoever traces a model to plan its memory or to compile it meets this with transformers'
# mixtures of experts, whose default path is this operation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - 2>/dev/null <<'PY'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

print("torch", torch.__version__)
offsets = torch.tensor([3, 8], dtype=torch.int32)  # rows of either expert
outcomes = {}
for dtype in (torch.bfloat16, torch.float32, torch.float16):
    rows, experts = torch.randn(8, 16, dtype=dtype), torch.randn(2, 16, 32, dtype=dtype)
    real = torch.nn.functional.grouped_mm(rows, experts, offs=offsets)
    expected = torch.cat([rows[:3] @ experts[0], rows[3:] @ experts[1]])
    runs = bool(torch.allclose(real.float(), expected.float(), rtol=2e-2, atol=2e-2))
    with FakeTensorMode() as mode:
        try:
            fakes = [mode.from_tensor(tensor) for tensor in (rows, experts, offsets)]
            torch.nn.functional.grouped_mm(fakes[0], fakes[1], offs=fakes[2])
            traced = "traced"
        except RuntimeError as error:
            traced = str(error).splitlines()[0]
    outcomes[dtype] = runs, traced
    print(f"{dtype}: right {runs}; on fake tensors: {traced}")
as_seen = outcomes[torch.bfloat16] == (True, "traced") and all(
    outcomes[dtype][0] and "BF16" in outcomes[dtype][1] for dtype in (torch.float32, torch.float16)
)
print("float32 and float16 run and cannot be traced:", as_seen)
raise SystemExit(not as_seen)
PY
