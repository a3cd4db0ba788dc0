#!/usr/bin/env bash
# torch 2.13.0 on a processor: fused optimisers ignore how a gradient lies in memory.
#
# Expected: `SGD(fused=True)` and `AdamW(fused=True)` do what they do without `fused`, whatever the
# strides of a parameter and of its gradient.
# Seen: both walk parameter and gradient by their storage. Where the two are laid out differently (a
# weight that is the transpose of another, as after converting from a layer that holds it the other
# way round, with a gradient that came out row by row), each number is moved by another number's
# gradient, without an error. Parameters and gradients laid out alike are right, and autograd lays a
# gradient out as its parameter: this is met by code that sets `.grad` itself (ranks, workers, offload).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
cat > "$folder/step.py" <<'PY'
import sys

import torch


def moved(make, fused, transposed):
    torch.manual_seed(0)
    rows = torch.randn(6, 5)
    parameter = torch.nn.Parameter(rows.t().clone() if transposed else rows.t().contiguous())
    parameter.grad = torch.randn(5, 6)
    before = parameter.detach().clone()
    make([parameter], lr=1.0, fused=fused).step()
    return (parameter.detach() - before).contiguous()


print("torch", torch.__version__)
wrong = {}
for make in (torch.optim.SGD, torch.optim.AdamW):
    for transposed in (False, True):
        difference = moved(make, True, transposed) - moved(make, False, transposed)
        wrong[make, transposed] = float(difference.abs().max())
        layout = "transposed" if transposed else "row by row"
        print(f"{make.__name__}, parameter {layout}: fused differs by {wrong[make, transposed]:.3g}")
same = all(value < 1e-5 for (_, transposed), value in wrong.items() if not transposed)
other = all(value > 1e-2 for (_, transposed), value in wrong.items() if transposed)
sys.exit(not (same and other))
PY
"$folder/env/bin/python" "$folder/step.py"
