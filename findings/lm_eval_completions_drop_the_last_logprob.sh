#!/usr/bin/env bash
# lm-eval 0.4.13, local-completions: the last log-probability of an answer with `echo` never counts.
#
# Expected: the score of a continuation is the sum of its tokens' log-probabilities in the answer.
# Seen: the last entry is taken for the one token that `max_tokens: 1` has written and is cut off. A
# server whose answer ends before a token that it shows (the model's end comes first, or
# `max_tokens` counts as 0) has no such entry: then the continuation's last token is left out of the
# sum, and nothing is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 "lm-eval[api]==0.4.13"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import importlib.metadata
from lm_eval.models.openai_completions import LocalCompletionsAPI

print("lm-eval", importlib.metadata.version("lm-eval"))
prompt = [7, 8, 9, 10]  # two tokens of context, two of the continuation
told = {"token_logprobs": [None, -1.0, -2.0, -4.0], "top_logprobs": [None, {"b": -1.0}, {"c": -2.0},
        {"d": -4.0}], "tokens": ["a", "b", "c", "d"]}
written = {"token_logprobs": told["token_logprobs"] + [-8.0],
           "top_logprobs": told["top_logprobs"] + [{"e": -8.0}], "tokens": told["tokens"] + ["e"]}
sums = {}
for name, logprobs in (("with a written token", written), ("without", told)):
    answer = {"choices": [{"index": 0, "text": "", "logprobs": logprobs}]}
    ((total, greedy),) = LocalCompletionsAPI.parse_logprobs(answer, tokens=[prompt], ctxlens=[2])
    sums[name] = total
    print(name, "->", total)
raise SystemExit(sums != {"with a written token": -6.0, "without": -2.0})
PY
