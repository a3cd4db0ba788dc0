#!/usr/bin/env bash
# auto-round 0.16.1, transformers 5.24.0: a 4-bit model that is asked for in float32 comes in float16.
#
# Expected: dtype=torch.float32 gives dense weights of float32, or an error.
# Seen on a CPU: norms and embeddings are float16, with a logged line alone, and a weight that float16
# cannot hold is infinite. The layers themselves multiply float32 as well: the table of formats that
# their backend is chosen by does not name it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 auto-round==0.16.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import importlib.metadata
import pathlib

import torch
from auto_round import AutoRound
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

print("auto-round", importlib.metadata.version("auto-round"))
words = {f"w{i}": i for i in range(320)}
core = Tokenizer(models.WordLevel(words, unk_token="w0"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w1", eos_token="w2")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
)).eval()
with torch.no_grad():
    model.model.embed_tokens.weight[7, 0] = 70000.0
texts = [" ".join(f"w{(i * j) % 320}" for j in range(40)) for i in range(1, 9)]
maker = AutoRound(model, tokenizer, bits=4, group_size=32, sym=True, iters=0, seqlen=32, nsamples=8,
                  dataset=[tokenizer(t, return_tensors="pt")["input_ids"][:, :32] for t in texts])
maker.quantize_and_save("saved", format="auto_round")
saved = [path.parent for path in pathlib.Path("saved").rglob("config.json")][0]
loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
embedding, norm = loaded.model.embed_tokens.weight, loaded.model.norm.weight
print("asked for float32: embedding", embedding.dtype, "norm", norm.dtype,
      "70000 is", float(embedding[7, 0]))
raise SystemExit(not (embedding.dtype == norm.dtype == torch.float16
                      and float(embedding[7, 0]) == float("inf")))
PY
