#!/usr/bin/env bash
# peft 0.21.2: a BOFT adapter on a machine without a CUDA toolkit leaves CC and CXX set to gcc.
#
# Expected: the environment of the process is as it was before the adapter was made.
# Seen: CC=gcc and CXX=gcc stay. PEFT sets them while it tries to build a CUDA extension, and puts
# nothing back where that fails. What compiles C++ later in the process then links with gcc, which
# leaves out the C++ library: the result is built and cannot be loaded ("undefined symbol").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
env -u CC -u CXX -u CUDA_HOME HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' ||
import importlib.metadata
import os

from peft import BOFTConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", importlib.metadata.version("peft"))
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
before = os.environ.get("CC"), os.environ.get("CXX")
get_peft_model(LlamaForCausalLM(config),
               BOFTConfig(boft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
after = os.environ.get("CC"), os.environ.get("CXX")
print("CC and CXX before", before, "and after", after)
raise SystemExit(not (before == (None, None) and after == ("gcc", "gcc")))
PY
  { tail -5 "$folder/log"; exit 1; }
