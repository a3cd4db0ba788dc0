#!/usr/bin/env bash
# bitsandbytes 0.50.2, LLM.int8() on a processor: a frozen model computes one function in train() and
# another in eval(), and in eval() a row's logits depend on the rows beside it.
#
# Expected: without dropout both modes compute the same, as any dense model's do, and a row has its
# logits whatever it is batched with, up to rounding of sums.
# Seen: in train() the weights are dequantised and activations stay as they are. In eval() activations
# are rounded to 8 bits too, but for the columns in which any row of the batch has an outlier: other
# neighbours, other columns. An adapter is trained on one model and measured and served on another, a
# training loss cannot be set beside a validation loss, and a score moves with the batch size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 \
  bitsandbytes==0.50.2
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" "$folder/env/bin/python" - 2>"$folder/log" <<'PY' ||
import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

print("bitsandbytes", bitsandbytes.__version__)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2)).save_pretrained("model")
rows = torch.randint(3, 320, (4, 24))


def distance(left, right):
    return float((left - right).norm() / right.norm())


seen = {}
for name, quantization in (("float32", None), ("INT8", BitsAndBytesConfig(load_in_8bit=True))):
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32, device_map="cpu",
                                                 quantization_config=quantization)
    logits = {}
    for mode in ("train", "eval"):
        model.train(mode == "train")
        with torch.no_grad():
            logits[mode] = model(rows[:1]).logits, model(rows).logits[:1]
    seen[name] = (distance(logits["train"][0], logits["eval"][0]),
                  *(distance(*reversed(logits[mode])) for mode in ("train", "eval")))
    print("{}: train() is {:.2g} from eval(); a row in a batch is {:.2g} from the row alone in "
          "train(), {:.2g} in eval()".format(name, *seen[name]))
int8 = seen["INT8"]
ok = max(seen["float32"]) < 1e-4 and int8[0] > 5e-3 and int8[1] < 1e-4 and int8[2] > 2e-3
raise SystemExit(not ok)
PY
  { tail -5 "$folder/log"; exit 1; }
