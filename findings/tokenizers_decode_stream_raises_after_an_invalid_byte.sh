#!/usr/bin/env bash
# tokenizers 0.23.3: DecodeStream raises where decode() writes a replacement character, if an invalid
# byte stands behind a whole character of a byte-fallback vocabulary (Llama 2's, Mistral 7B's).
#
# Expected: the parts of a stream are the text that decode() gives, the invalid byte as U+FFFD.
# Seen: ByteFallback decodes a run of bytes as one and makes signs for what is none of all of them if
# one is invalid; the stream has given out the whole character by then, and its next step raises
# "Invalid prefix encountered". The same stream without a whole character before goes on.
# A model that samples such bytes, as Korean or a line break and half a character, ends a server's
# stream in the middle of an answer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet tokenizers==0.23.3
"$folder/env/bin/python" - <<'PY'
import tokenizers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, DecodeStream, Fuse, Sequence
from tokenizers.models import WordLevel

print("tokenizers", tokenizers.__version__)
pieces = ["a", *(f"<0x{byte:02X}>" for byte in "가".encode())]
core = Tokenizer(WordLevel({piece: number for number, piece in enumerate(pieces)}, "a"))
core.decoder = Sequence([ByteFallback(), Fuse()])
seen = {}
for name, ids in (("valid", [1, 2, 3, 0]), ("invalid alone", [1, 0]), ("invalid behind", [1, 2, 3, 1, 0])):
    stream, parts = DecodeStream(skip_special_tokens=False), []
    try:
        for token in ids:
            parts.append(stream.step(core, token) or "")
        seen[name] = "".join(parts)
    except Exception as error:
        seen[name] = str(error).partition(" while")[0]
    print(f"{name}: decode {core.decode(ids, False)!r}, stream {seen[name]!r}")
as_seen = (seen["valid"], seen["invalid alone"]) == ("가a", "\N{REPLACEMENT CHARACTER}a")
raise SystemExit(not (as_seen and seen["invalid behind"].startswith("Invalid prefix")))
PY
