#!/usr/bin/env bash
# sacrebleu 2.6.0: `corpus_bleu`, `corpus_chrf` and `corpus_ter` of lists of unequal length score what
# both lists have.
#
# Expected: an error, as its command line gives for files with unequal numbers of lines.
# Seen: an evaluation that ended after two of three answers has BLEU and chrF 100 and TER 0, and so
# have three answers to two references. What is missing lowers no score and no warning is given:
# compare the counts before asking.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet sacrebleu==2.6.0
cd "$folder"
"$folder/env/bin/python" - 2>"$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import pathlib
import subprocess
import sys

import sacrebleu

print("sacrebleu", sacrebleu.__version__)
references = ["the cat sat on the mat today", "a dog ran over the hill",
              "nobody ever wrote an answer to this"]
ok = True
for answers, known in ((references[:2], references), (references, references[:2])):
    for score, best in ((sacrebleu.corpus_bleu, 100), (sacrebleu.corpus_chrf, 100),
                        (sacrebleu.corpus_ter, 0)):
        value = score(answers, [known]).score
        print(f"{score.__name__}, {len(answers)} answers, {len(known)} references: {value:.1f}")
        ok &= abs(value - best) < 1e-6
    for name, lines in (("answers", answers), ("references", known)):
        pathlib.Path(name).write_text("\n".join(lines) + "\n")
    done = subprocess.run([sys.executable, "-m", "sacrebleu", "references", "-i", "answers"],
                          capture_output=True, text=True, check=False)
    print("its command line: exit status", done.returncode, done.stderr.strip().splitlines()[-1:])
    ok &= done.returncode != 0
raise SystemExit(not ok)
PY
