#!/usr/bin/env bash
# transformers 5.24.0 with torchao 0.18.0: a Gemma 3 whose embedding is in INT8 comes back with the
# embedding's scale unset.
#
# Expected: Gemma 3 multiplies its embeddings by sqrt(hidden_size), a buffer beside the weight that no
# file holds and every loading makes anew.
# Seen: where the weight is a tensor of torchao's, from_pretrained leaves that buffer as its memory was.
# The same folder loaded without the embedding's INT8 has it right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 torchao==0.18.0 \
  accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>/dev/null <<'PY'
import torchao, transformers
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, TorchAoConfig

print("transformers", transformers.__version__, "torchao", torchao.__version__)
config = Gemma3TextConfig(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                          tie_word_embeddings=False)
Gemma3ForCausalLM(config).save_pretrained("plain")
int8 = Int8WeightOnlyConfig(version=2)
scales = {}
for name, layers in (("layer alone", {}), ("embedding too", {"model.embed_tokens": int8})):
    wanted = TorchAoConfig(FqnToConfig({"model.layers.0.self_attn.q_proj": int8, **layers}),
                           include_input_output_embeddings=True)
    AutoModelForCausalLM.from_pretrained("plain", quantization_config=wanted).save_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    embedding = model.model.embed_tokens
    scales[name] = float(embedding.embed_scale)
    print(f"{name}: the embedding is {type(embedding.weight.data).__name__},",
          f"its scale {scales[name]} for sqrt(64) = 8")
as_seen = scales["layer alone"] == 8.0 and scales["embedding too"] != 8.0
print("the scale is lost with the embedding's INT8:", as_seen)
raise SystemExit(not as_seen)
PY
