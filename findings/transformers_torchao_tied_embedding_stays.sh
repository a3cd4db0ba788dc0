#!/usr/bin/env bash
# transformers 5.24.0 with torchao 0.18.0: include_input_output_embeddings=True leaves the embedding
# of a model with a tied head as it was.
#
# Expected: the embedding in INT8, as TorchAoConfig's option says.
# Seen: with tied weights neither embedding nor head is quantised, without a word; untied, the head is.
# A small model's embedding is a large part of it, so its "INT8" file stays far above half.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 torchao==0.18.0 \
  accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>/dev/null <<'PY'
import torchao, transformers
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

print("transformers", transformers.__version__, "torchao", torchao.__version__)
found = {}
for tied in (True, False):
    config = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    LlamaForCausalLM(config).save_pretrained(f"tied-{tied}")
    wanted = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(f"tied-{tied}", quantization_config=wanted)
    kinds = {name: type(module.weight).__name__ + ":" + type(module.weight.data).__name__
             for name, module in (("embedding", model.model.embed_tokens), ("head", model.lm_head),
                                  ("layer", model.model.layers[0].self_attn.q_proj))}
    print("tied" if tied else "untied", kinds)
    found[tied] = {name: "Int8" in kind or "Affine" in kind for name, kind in kinds.items()}
as_seen = found[True]["layer"] and not found[True]["embedding"] and not found[True]["head"]
print("tied: the layer is quantised, embedding and head are not:", as_seen)
raise SystemExit(not as_seen)
PY
