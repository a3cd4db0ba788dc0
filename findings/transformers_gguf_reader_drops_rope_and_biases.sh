#!/usr/bin/env bash
# transformers 5.24.0: `from_pretrained(gguf_file=...)` drops rope scaling and attention biases.
#
# Expected: the model that the file holds, or an error. The file is written by gguf 0.19.0 with the
# keys and tensors that llama.cpp's converter writes: `llama.rope.scaling.*` for linear scaling,
# `rope_freqs.weight` for Llama 3's factors, `blk.0.attn_q.bias` and its like for biases.
# Seen: neither is read. The configuration comes back with rope_type "default" and without biases,
# and the logits are another model's; nothing is raised. The same model without them is read exactly.
# Llama 3.1 to 3.3 have such factors: who evaluates, tunes or converts a file of theirs this way works
# on a model that is not the one in the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import importlib.metadata

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HEADS, SIZE, THETA = 2, 64, 10000.0
HEAD = SIZE // HEADS
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def interleaved(rows):
    """Rows of q and k in GGUF's order: the two of a rotated pair side by side, not half a head apart."""
    return rows.reshape(HEADS, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(model):
    config, rope = model.config, model.config.rope_parameters
    writer = gguf.GGUFWriter("model.gguf", "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HEAD)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        unscaled = THETA ** (-np.arange(0, HEAD, 2) / HEAD)
        factors = unscaled / model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, value in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        rows = value.numpy()
        if "q_proj" in stem or "k_proj" in stem:
            rows = interleaved(rows)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


for package in ("transformers", "gguf"):
    print(package, importlib.metadata.version(package))
ids = torch.arange(3, 60)[None]
off = {}
for name, settings in (("plain", {}), ("linear rope scaling", {"rope_parameters": LINEAR}),
                       ("Llama 3's rope factors", {"rope_parameters": LLAMA3}),
                       ("attention biases", {"attention_bias": True})):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=SIZE, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=512,
        initializer_range=0.2, **settings)).eval()
    for key, value in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(value)
    write(model)
    read = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32)
    read.eval()
    with torch.no_grad():
        off[name] = float((model(ids).logits - read(ids).logits).abs().max())
    print(f"{name}: logits differ by up to {off[name]:.2g}; read as rope_type "
          f"{read.config.rope_parameters['rope_type']}, attention_bias {read.config.attention_bias}")
plain = off.pop("plain")
raise SystemExit(not (plain < 1e-3 and all(value > 0.1 for value in off.values())))
PY
