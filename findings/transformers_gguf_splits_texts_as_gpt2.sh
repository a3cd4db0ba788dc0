#!/usr/bin/env bash
# transformers 5.24.0: a tokenizer from a GGUF file splits texts as GPT-2's where the file says
# deepseek-v3, glm4, hunyuan or seed-coder.
#
# Expected: the ids that llama.cpp makes by the same file (its key `tokenizer.ggml.pre` names how text
# is cut before merging), or an error for a name that transformers does not know, as llama.cpp has it.
# Seen: llama-bpe and qwen2 agree; a name that is not in transformers' table is left aside, and GPT-2's
# pattern stays. Numbers and signs before words come out as other ids than the model was trained on;
# nothing is raised and no warning is given. So a model and its own GGUF file answer differently, and
# who evaluates or tunes by such a tokenizer does so on texts that the model never saw spelled that way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 \
  xllamacpp==2026.10.11549
cd "$folder"
PYTHONIOENCODING=utf-8 HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' ||
import json
import urllib.request
from importlib.metadata import version

import gguf
import numpy as np
import xllamacpp
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

for package in ("transformers", "gguf", "xllamacpp"):
    print(package, version(package))
MERGES = ["2 0", "2 6", "20 2", "( x"]
TOKENS = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<end>"]
END, SIZE = len(TOKENS) - 1, 32


def write(pre):
    """A tokenizer, and a small model, without which llama.cpp serves none."""
    writer = gguf.GGUFWriter("model.gguf", "llama")
    writer.add_vocab_size(len(TOKENS))
    writer.add_context_length(64)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(1)
    writer.add_feed_forward_length(SIZE)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(SIZE // 2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([gguf.TokenType.NORMAL] * END + [gguf.TokenType.CONTROL])
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)
    shapes = {"token_embd": (len(TOKENS), SIZE), "output": (len(TOKENS), SIZE), "output_norm": (SIZE,)}
    shapes |= {f"blk.0.{name}_norm": (SIZE,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.{name}": (SIZE, SIZE) for name in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.01, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_llamacpp(text):
    request = urllib.request.Request(
        server.listening_address + "/tokenize", json.dumps({"content": text}).encode(),
        {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


ok = True
for pre, known in {"llama-bpe": True, "qwen2": True, "deepseek-v3": False, "glm4": False,
                   "hunyuan": False, "seed-coder": False}.items():
    write(pre)
    tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = "model.gguf", 64, 1, False
    server = xllamacpp.Server(params)
    for text in ("2026", "f(x)"):
        own, other = tokenizer(text, add_special_tokens=False)["input_ids"], by_llamacpp(text)
        print(f"{pre} {text!r}: transformers {[TOKENS[i] for i in own]}, "
              f"llama.cpp {[TOKENS[i] for i in other]}")
        ok &= (own == other) == known
    del server
raise SystemExit(not ok)
PY
  { tail -5 "$folder/log"; exit 1; }
