#!/usr/bin/env bash
# peft 0.21.2: after a call with `adapter_names` that was refused, later calls use its adapters.
#
# Expected: a call that raises changes nothing. Names and rows that do not match in number raise a
# ValueError, which a server catches and answers as a bad request.
# Seen: the hooks that name an adapter for each row are taken off only where the call ends well. The
# next plain call of as many rows as names is answered by the refused call's adapters instead of the
# active one, `set_adapter` does not help, and nothing is raised.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", peft.__version__)
torch.manual_seed(0)
base = LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                   num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
model = peft.get_peft_model(LlamaForCausalLM(base), adapter, "first")
model.add_adapter("second", adapter)
model.set_adapter("first")
model.eval()
ids = torch.arange(3, 9).reshape(2, 3)


def logits(**settings):
    with torch.no_grad():
        return model(input_ids=ids, **settings).logits


def difference(left, right):
    return float((left - right).abs().max())


first, second = (logits(adapter_names=[name] * 2) for name in ("first", "second"))
before = logits()
try:
    model(input_ids=ids[:1], adapter_names=["second"] * 2)
except ValueError as error:
    print("refused:", error)
else:
    raise SystemExit("it is not refused now")
model.set_adapter("first")
after = logits()
print(f"before: from the active adapter by {difference(before, first):.2g}")
print(f"after: from the active adapter by {difference(after, first):.2g}, "
      f"from the refused call's by {difference(after, second):.2g}")
ok = difference(before, first) < 1e-5 and difference(after, second) < 1e-5
raise SystemExit(not (ok and difference(after, first) > 1e-2))
PY
