#!/usr/bin/env bash
# rouge-score 0.1.2: of a text that is not in Latin letters only ASCII letters and digits are counted.
#
# Expected: 1 for a text beside itself, and little for two texts that say different things.
# Seen: a Korean (Russian, Chinese, Arabic) answer equal to its reference scores 0, and two different
# sentences that share a number score 1, since the number is all that is left of both. No warning is
# given, and a mean over a data set mostly tells how many answers have a number or an English word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet rouge-score==0.1.2
cd "$folder"
PYTHONIOENCODING=utf-8 "$folder/env/bin/python" - 2>"$folder/log" <<'PY' ||
from importlib.metadata import version

from rouge_score import rouge_scorer

print("rouge-score", version("rouge-score"))
scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"])
ok = True
for reference, answer, expected in (
    ("the shop opens at 9", "the shop opens at 9", 1),
    ("가게는 아침 일찍 엽니다", "가게는 아침 일찍 엽니다", 0),
    ("Магазин открыт утром", "Магазин открыт утром", 0),
    ("商店早上开门", "商店早上开门", 0),
    ("가게는 9 시에 엽니다", "학생은 모두 9 명입니다", 1),
):
    found = {name: score.fmeasure for name, score in scorer.score(reference, answer).items()}
    print(f"{answer!r} for {reference!r}: {found}")
    ok &= set(found.values()) == {expected}
raise SystemExit(not ok)
PY
  { tail -5 "$folder/log"; exit 1; }
