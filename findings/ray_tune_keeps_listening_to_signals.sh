#!/usr/bin/env bash
# ray[tune] 2.60.0: the handlers of SIGINT and SIGUSR1 that a Tune run sets stay once it has ended.
#
# Expected: after `Tuner.fit` a process listens to signals as it did before.
# Seen: the first Ctrl-C after it is taken by the ended run ("ending Ray Tune run") and raises no
# KeyboardInterrupt: whatever the process does next, a training or an evaluation, goes on. SIGUSR1,
# with which SLURM warns of a job's end, is taken each time, where it would have ended the process.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet 'ray[tune]==2.60.0'
cd "$folder"
RAY_USAGE_STATS_ENABLED=0 "$folder/env/bin/python" - >"$folder/out" 2>"$folder/log" <<'PY' ||
import os
import signal

import ray
from ray import tune

before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
run = tune.RunConfig(storage_path=os.path.abspath("results"), verbose=0)
results = tune.Tuner(lambda config: {"score": config["x"]},
                     param_space={"x": tune.grid_search([1])}, run_config=run).fit()
ray.shutdown()
after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
try:
    signal.raise_signal(signal.SIGINT)
    first = "does nothing"
except KeyboardInterrupt:
    first = "raises KeyboardInterrupt"
print("SEEN ray", ray.__version__, "ended with", len(results.errors), "errors")
print("SEEN handlers kept as they were:", [a is b for a, b in zip(before, after)])
print("SEEN the first Ctrl-C", first)
PY
  { tail -20 "$folder/log"; exit 1; }
sed -n 's/^SEEN //p' "$folder/out" | tee "$folder/seen"
grep -q 'ended with 0 errors' "$folder/seen"
grep -q 'kept as they were: \[False, False\]' "$folder/seen"
grep -q 'first Ctrl-C does nothing' "$folder/seen"
