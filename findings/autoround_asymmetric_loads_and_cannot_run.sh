#!/usr/bin/env bash
# auto-round 0.16.1 with sym=False: what it saves for a CPU loads in transformers and fails when used.
#
# Expected: a saved 4-bit model either loads and answers, or is refused when it is saved or loaded.
# Seen: it loads, and the first forward pass raises a TypeError; with sym=True the same model answers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 auto-round==0.16.1
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import importlib.metadata
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
config = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=4)
seen = {}
for symmetric in (True, False):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    texts = [" ".join(f"w{(i * j) % 320}" for j in range(40)) for i in range(1, 9)]
    maker = AutoRound(model, tokenizer, bits=4, group_size=32, sym=symmetric, iters=0, seqlen=32,
                      nsamples=8, dataset=[tokenizer(t, return_tensors="pt")["input_ids"][:, :32]
                                           for t in texts])
    maker.quantize_and_save(f"sym-{symmetric}", format="auto_round")
    import pathlib
    saved = [p.parent for p in pathlib.Path(f"sym-{symmetric}").rglob("config.json")][0]
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    try:
        with torch.no_grad():
            loaded(input_ids=torch.tensor([[3, 4, 5]]))
        seen[symmetric] = "answers"
    except TypeError as error:
        seen[symmetric] = f"TypeError: {error}"
    print("sym", symmetric, "->", seen[symmetric])
ok = seen[True] == "answers" and seen[False].startswith("TypeError")
raise SystemExit(not ok)
PY
