#!/usr/bin/env bash
# httpx 0.28.1: iter_lines of a stream of server-sent events ends lines inside an event's JSON.
#
# Expected: one "data:" line an event, as the standard of server-sent events ends lines at CR and LF.
# Seen: U+2028, U+2029 and U+0085 end a line too, as in str.splitlines; a server of a
# language model that writes JSON with ensure_ascii=False sends them as they are.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet httpx==0.28.1
"$folder/env/bin/python" - <<'PY'
import json

import httpx

print("httpx", httpx.__version__)
counts = {}
for code in (0x20, 0x2028, 0x2029, 0x85):
    event = "data: " + json.dumps({"text": f"one{chr(code)}two"}, ensure_ascii=False) + "\n\n"
    response = httpx.Response(200, content=event.encode("utf-8"))
    counts[code] = sum(1 for line in response.iter_lines() if line)
    print(f"U+{code:04X}: {counts[code]} lines of an event of one")
raise SystemExit(counts != {0x20: 1, 0x2028: 2, 0x2029: 2, 0x85: 2})
PY
