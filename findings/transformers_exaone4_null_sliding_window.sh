#!/usr/bin/env bash
# transformers 5.24.0: an EXAONE 4 configuration without a sliding window cannot be made.
#
# Expected: `sliding_window: null` means full attention in every layer, as for other architectures
# (Qwen 3, Mistral), and as the class's own code means it: it sets the window's pattern to 0 then.
# Seen: ZeroDivisionError: the kinds of the layers are worked out as number modulo that pattern. With
# `layer_types` given as well the same configuration is made, and all its layers attend fully.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' ||
import importlib.metadata

from transformers import Exaone4Config, Qwen3Config

print("transformers", importlib.metadata.version("transformers"))
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
print("Qwen 3", Qwen3Config(**size, sliding_window=None).layer_types)
kinds = ["full_attention"] * 2
print("EXAONE 4, kinds given", Exaone4Config(**size, sliding_window=None, layer_types=kinds).layer_types)
try:
    Exaone4Config(**size, sliding_window=None)
except ZeroDivisionError as error:
    print("EXAONE 4 ZeroDivisionError:", error)
else:
    raise SystemExit("it is made now")
PY
  { tail -5 "$folder/log"; exit 1; }
