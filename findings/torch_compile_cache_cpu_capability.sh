#!/usr/bin/env bash
# torch 2.13.0: code that torch.compile made for one ATEN_CPU_CAPABILITY is taken for another.
#
# Expected: the variable that keeps PyTorch to AVX2, to measure as on a processor that has no more, is
# part of the key under which compiled code is kept, for the width of its vectors follows it.
# Seen: the key does not hold it. What was compiled with AVX512 runs with AVX2 next time and gives
# other numbers, without a word; with a folder for compiled code of its own the result is right.
# Needs a processor with AVX512 and a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
grep -qw avx512f /proc/cpuinfo || { echo "this processor has no AVX512"; exit 1; }
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/gate.py" <<'PY'
import sys
import torch

def gate(x, weight):
    return torch.nn.functional.silu(x) * weight + torch.exp(-x * x).sum(-1, keepdim=True)

torch.manual_seed(0)
x, weight = torch.randn(64, 576), torch.randn(64, 576)
difference = float((torch.compile(gate)(x, weight) - gate(x, weight)).abs().max())
print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {sys.argv[1]}:",
      "as without compiling" if difference < 1e-2 else f"off by {difference:.0f}")
raise SystemExit(difference >= 1e-2)
PY
run() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/env/bin/python" "$folder/gate.py" "$1" 2>/dev/null; }
export TORCHINDUCTOR_FX_GRAPH_CACHE=1
run first
ATEN_CPU_CAPABILITY=avx2 run second
ATEN_CPU_CAPABILITY=avx2 run first && exit 1
echo "code compiled with AVX512 was taken with AVX2: True"
