#!/usr/bin/env bash
# deepspeed 0.19.8: its schedulers make the first two steps at a rate of 0, and warm up by a logarithm.
#
# Expected: a warm-up of N steps whose first step has 1/N of the rate, linear as in transformers, the
# same rate at its top in both classes.
# Seen: the first two steps of WarmupLR learn nothing (its own first step has the rate of "before the
# first", and so has the one at its making); `warmup_type` is `log` unless it says `linear`;
# WarmupDecayLR's top is 0.001 unless it says otherwise, where WarmupLR takes the optimiser's rate.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy setuptools wheel
DS_BUILD_OPS=0 "$folder/env/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cd "$folder"
DS_ACCELERATOR=cpu "$folder/env/bin/python" - 2>/dev/null <<'PY'
import deepspeed
import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR, WarmupLR

print("deepspeed", deepspeed.__version__)


def rates(make, steps=6):
    """The rate that each optimiser step has: the engine steps the optimiser, then the schedule."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = make(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(round(optimizer.param_groups[0]["lr"], 4))
        optimizer.step()
        schedule.step()
    return seen


linear = rates(lambda o: WarmupLR(o, warmup_num_steps=4, warmup_type="linear"))
plain = rates(lambda o: WarmupLR(o, warmup_num_steps=4))
decay = rates(lambda o: WarmupDecayLR(o, total_num_steps=100, warmup_num_steps=4,
                                      warmup_type="linear"))
print("WarmupLR, linear:", linear)
print("WarmupLR:        ", plain)
print("WarmupDecayLR:   ", decay)
raise SystemExit(not (linear[:2] == [0, 0] and linear[2] == 0.125 and max(linear) == 0.5
                      and plain[2] == 0.25 and max(decay) == 0.001))
PY
