#!/usr/bin/env bash
# tokenizers 0.23.3: the end of a streamed answer is lost where its last token ends within a character.
#
# Expected: DecodeStream gives the whole characters of such a token, or has a call for what is left.
# Seen: a token of a space and the first byte of a Korean syllable gives nothing, the space neither,
# and the stream has only `step`: an answer cut at its limit of tokens is shorter than decode() of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet tokenizers==0.23.3
"$folder/env/bin/python" - <<'PY'
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

print("tokenizers", tokenizers.__version__)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
space, first = "\u0120", "\u00ed"  # how byte-level vocabularies write a space and the byte ED
words = {word: place for place, word in enumerate([*letters, space + first])}
tokenizer = Tokenizer(models.BPE(words, [(space, first)]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
ids = tokenizer.encode("a \ud55c").ids[:2]
stream = DecodeStream(skip_special_tokens=True)
pieces = [stream.step(tokenizer, token) for token in ids]
calls = [name for name in dir(stream) if not name.startswith("_")]
print("decode:", repr(tokenizer.decode(ids)), "stream:", pieces, "calls:", calls)
raise SystemExit(
    (tokenizer.decode(ids), pieces, calls) != ("a \ufffd", ["a", None], ["step"])
)
PY
