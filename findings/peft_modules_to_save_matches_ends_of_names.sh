#!/usr/bin/env bash
# peft 0.21.2: `modules_to_save=["norm"]` trains and saves every layer norm of a Llama.
#
# Expected: the module that is called `norm` (the last one), as target_modules=["proj"] finds no
# q_proj: names are matched from one dot to the next.
# Seen: modules_to_save takes whatever ends with the text: `norm` is also the end of input_layernorm
# and post_attention_layernorm, in every layer. They are trained, and the adapter holds them: one that
# was to change the last norm changes all of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import peft
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", peft.__version__)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=2)
model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(
    r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
model.save_pretrained("adapter")
whole = sorted(key for key in load_file("adapter/adapter_model.safetensors") if "lora_" not in key)
print("modules_to_save=['norm'] saved:", *whole, sep="\n  ")
try:
    peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(target_modules=["proj"]))
    refused = False
except ValueError as error:
    refused = True
    print("target_modules=['proj']:", str(error).split(".")[0])
raise SystemExit(not (refused and len(whole) == 5))
PY
