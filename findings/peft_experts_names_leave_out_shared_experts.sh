#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: target_modules that name an expert's layers leave out the
# shared expert's and the dense layers' linear layers of the same names, in some families alone.
#
# Expected: target_modules=["gate_proj", "up_proj", "down_proj"] adapts every nn.Linear whose last
# name is one of them, as it does in a model without experts.
# Seen: in GLM-4-MoE and DeepSeek-V3 the names are taken for those of the stacked experts' parameters:
# mlp.shared_experts.* and the MLP of the first, dense layer get no adapter, with "all-linear"
# neither, and nothing is said. In Qwen2-MoE the shared expert's layers are adapted, the experts not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import importlib.metadata
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

print("peft", importlib.metadata.version("peft"))
names = ["gate_proj", "up_proj", "down_proj"]
size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
routed = dict(n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, n_group=1,
              topk_group=1)
latent = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
families = {
    "llama": {}, "glm4_moe": {**routed, "head_dim": 8}, "deepseek_v3": {**routed, **latent},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2,
                  "shared_expert_intermediate_size": 32},
}
adapted = {}
for family, settings in families.items():
    for targets in (names, "all-linear"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size, **settings))
        linear = {path for path, module in model.named_modules()
                  if isinstance(module, torch.nn.Linear) and path.rpartition(".")[2] in names}
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
        have = {path.split(".lora_A")[0].removeprefix("base_model.model.")
                for path, _ in wrapped.named_parameters() if ".lora_A" in path}
        adapted[family, str(targets)] = sum(path in have for path in linear), len(linear)
        print(family, targets, "->", len(linear & have), "of", len(linear), "linear layers")
ok = all(some == (0 if family in ("glm4_moe", "deepseek_v3") else count) and count == 6
         for (family, _), (some, count) in adapted.items())
raise SystemExit(not ok)
PY
