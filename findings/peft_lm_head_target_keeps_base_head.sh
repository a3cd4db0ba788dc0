#!/usr/bin/env bash
# peft 0.21.2: an adapter that targets lm_head holds a frozen copy of the base's whole head.
#
# Expected: the two low-rank factors of lm_head, as for every other target (r x hidden + words x r).
# Seen: `base_model.model.lm_head.base_layer.weight` too, words x hidden, unchanged from the base: the
# file grows by the size of the head, and whoever reads the key as a trained weight drops the update.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 \
  safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PY'
import peft, torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=2)
base = LlamaForCausalLM(config)
head = base.lm_head.weight.detach().clone()
model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["lm_head"]))
model.save_pretrained("adapter")
saved = load_file("adapter/adapter_model.safetensors")
print("peft", peft.__version__)
for key, value in sorted(saved.items()):
    print(f"{key}: {tuple(value.shape)}")
key = "base_model.model.lm_head.base_layer.weight"
same = key in saved and torch.equal(saved[key], head)
print("the base's head is in the file, unchanged:", same)
raise SystemExit(not same)
PY
