#!/usr/bin/env bash
# transformers 5.24.0: in a folder whose config.json says `qwen2`, AutoTokenizer splits texts as Qwen 2
# does, whatever way of splitting stands in its tokenizer.json.
#
# Expected: the ids of tokenizer.json, which `tokenizers` reads, as in a folder of another architecture.
# Seen: the class that belongs to the architecture takes vocabulary and merges from the file and brings
# a pre-tokenizer of its own; "tokenizer_class": "PreTrainedTokenizerFast" beside it does not help. A
# model of Qwen 2's shape with a tokenizer of its own sees other numbers than it was trained on; nothing
# is raised and no warning is given. The same files under `llama` are read as they are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' ||
import json
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

for package in ("transformers", "tokenizers"):
    print(package, version(package))
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = [("2", "0"), ("2", "6"), ("20", "26")]
tokens = [*alphabet, *map("".join, merges), "<end>"]
tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, merges))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's: numbers whole
tokenizer.decoder = decoders.ByteLevel()
ids = {"tokenizer.json": tokenizer.encode("2026").ids}
for kind in ("qwen2", "llama"):
    Path(kind).mkdir()
    tokenizer.save(f"{kind}/tokenizer.json")
    Path(kind, "config.json").write_text(json.dumps({"model_type": kind}))
    Path(kind, "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}))
    opened = AutoTokenizer.from_pretrained(kind)
    ids[kind] = opened("2026", add_special_tokens=False)["input_ids"]
    print(kind, type(opened).__name__, [tokens[i] for i in ids[kind]])
print("tokenizer.json", [tokens[i] for i in ids["tokenizer.json"]])
raise SystemExit(not (ids["llama"] == ids["tokenizer.json"] != ids["qwen2"]))
PY
  { tail -5 "$folder/log"; exit 1; }
