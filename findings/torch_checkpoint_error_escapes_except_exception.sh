#!/usr/bin/env bash
# torch 2.13.0: errors of torch.distributed.checkpoint are no `Exception`.
#
# Expected: a checkpoint that does not fit the model (a parameter that it lacks) raises what `except
# Exception` catches, as torch.load and load_state_dict do: that is how a run falls back to the
# checkpoint before it, or starts anew.
# Seen: CheckpointException derives from BaseException. Code that catches Exception does not catch it,
# and the run ends.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
"$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import torch
from torch.distributed import checkpoint

print("torch", torch.__version__)
checkpoint.save({"weight": torch.ones(3)}, checkpoint_id="saved")
state = {"weight": torch.zeros(3)}
checkpoint.load(state, checkpoint_id="saved")
print("a state that fits is loaded:", state["weight"].tolist())
try:
    checkpoint.load({"weight": torch.zeros(3), "bias": torch.zeros(3)}, checkpoint_id="saved")
except Exception as error:
    seen = f"except Exception catches {type(error).__name__}"
except BaseException as error:
    seen = type(error).__name__
    print(f"except Exception does not catch {seen}; its bases:",
          [base.__name__ for base in type(error).__mro__])
else:
    seen = "it was loaded"
print(seen)
raise SystemExit(not (seen == "CheckpointException" and state["weight"].tolist() == [1, 1, 1]))
PY
