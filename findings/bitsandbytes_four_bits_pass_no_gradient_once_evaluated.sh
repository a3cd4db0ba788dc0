#!/usr/bin/env bash
# bitsandbytes 0.50.2, 4 bits, on a processor with AVX512-BF16 (Zen 4, Sapphire Rapids): after the first
# evaluation the quantised layers pass no gradient on.
#
# Expected: train(), eval() and train() again have the gradients of train() alone, or an error is raised.
# Seen: a call in eval() packs the weights for a quick kernel that has no backward pass, and they stay
# packed in train(). QLoRA that is evaluated between steps then trains on what goes around the quantised
# layers: adapters on q_proj and v_proj get no gradient at all, adapters on all layers one that points
# elsewhere. The loss is right and backward() succeeds; PyTorch's one warning is all that is said.
# It computes in bfloat16, too, whatever `bnb_4bit_compute_dtype` says. Without AVX512-BF16 nothing is
# packed, and this script has nothing to see. Loading the 4-bit model anew after an evaluation helps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 \
  accelerate==1.15.0 bitsandbytes==0.50.2
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" "$folder/env/bin/python" - 2>"$folder/log" <<'PY' ||
import bitsandbytes
import peft
import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

print("bitsandbytes", bitsandbytes.__version__, "peft", peft.__version__)
if not has_avx512bf16():
    print("this processor has no AVX512-BF16: nothing to see here")
    raise SystemExit
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2)).save_pretrained("model")
rows = torch.randint(3, 320, (2, 24))


def learn(model):
    """Loss and the adapters' gradient of one training step."""
    model.train()
    model.zero_grad()
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    return float(loss), torch.cat([
        (torch.zeros_like(weight) if weight.grad is None else weight.grad).float().flatten()
        for weight in model.parameters() if weight.requires_grad])


ok = True
for targets in (["q_proj", "v_proj"], "all-linear"):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        "model", dtype=torch.bfloat16, device_map="cpu", quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16))
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"))
    loss, gradient = learn(model)
    _, again = learn(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=rows)
    loss_after, after = learn(model)
    same = float(torch.cosine_similarity(again, gradient, 0))
    left = float(after.norm() / gradient.norm())
    alike = float(torch.cosine_similarity(after, gradient, 0))
    print(f"adapters on {targets}: loss {loss:.3f}, and {loss_after:.3f} once evaluated; the gradient has "
          f"{left:.3f} of its length then, and a cosine of {alike:.3f} with the first ({same:.3f} before)")
    ok &= abs(loss_after - loss) < 0.1 and same > 0.99 and left < 0.5 and alike < 0.5
raise SystemExit(not ok)
PY
  { tail -5 "$folder/log"; exit 1; }
