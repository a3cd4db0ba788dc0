"""Reading and encoding 50,000 chat rows, against `datasets` with the same tokenizer and template.

    python benchmarks/data_reading.py --setup   # once: datasets into an environment of its own
    python benchmarks/data_reading.py           # the table; the last line is JSON

Ours is what a training does before its first step (`load_rows`): rows checked, split, rendered,
tokenised, and a mark for each token that is learnt. Theirs is `load_dataset` and
`map(batched=True)` over `apply_chat_template`, once for the ids alone and once with the marks of
the assistant's tokens, for which the template is given its `{% generation %}` tags; with one
process, and with one on each core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine

MODEL = "smollm2-135m"
ROWS, MEGABYTES = 50_000, 60
PEERS = ("datasets==5.2.0", "transformers==5.24.0", "jinja2")
ENVIRONMENT = "benchmark-datasets"

# What both measure: seconds, or the peak above what was held before. While there are children it is
# the sum of the proportional set sizes of all processes, sampled: pages that a forked child shares
# with its parent are there once. The parent's own peak is the kernel's high-water mark. Sampling
# takes 10 ms for each process, a tenth of two cores: seconds are those of runs without it.
MEASURE = """
import json, os, sys, threading, time
job = json.loads(sys.argv[1])
def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
def pss(pid):
    try:
        for line in open(f"/proc/{pid}/smaps_rollup"):
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
def children():
    found, todo = [], [os.getpid()]
    while todo:
        try:
            below = open("/proc/{0}/task/{0}/children".format(todo.pop())).read().split()
        except OSError:
            continue
        found += below; todo += below
    return found
class Peak:
    def __enter__(self):
        open("/proc/self/clear_refs", "w").write("5")
        self.base, self.together, self.ended = status("VmRSS"), 0, False
        self.base_pss = pss(os.getpid())
        self.thread = threading.Thread(target=self.watch, daemon=True)
        if job["watch"]:
            self.thread.start()
        self.began = time.perf_counter(); self.cpu = sum(os.times()[:4])
        return self
    def watch(self):
        while not self.ended:
            if others := children():
                self.together = max(self.together, sum(map(pss, [os.getpid(), *others])))
            time.sleep(0.1)
    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.began
        self.cpu_seconds = sum(os.times()[:4]) - self.cpu
        self.ended = True
        if job["watch"]:
            self.thread.join()
        self.bytes = max(status("VmHWM") - self.base, self.together - self.base_pss)
        self.held_bytes = status("VmRSS") - self.base
"""

THEIRS = (
    MEASURE
    + """
import datasets, transformers
datasets.disable_progress_bars()
tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"])
marked = job["marks"]
if marked:
    tokenizer.chat_template = job["template"]
def encode(batch):
    out = tokenizer.apply_chat_template(
        batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=marked)
    return {name: out[name] for name in ["input_ids"] + ["assistant_masks"] * marked}
with Peak() as peak:
    rows = datasets.load_dataset("json", data_files=job["data"], split="train",
                                 cache_dir=job["cache"])
    rows = rows.map(encode, batched=True, remove_columns=rows.column_names,
                    num_proc=job["processes"])
tokens = sum(map(len, rows[:1000]["input_ids"]))
marks = sum(map(sum, rows[:1000]["assistant_masks"])) if marked else None
print(json.dumps({"seconds": peak.seconds, "cpu_s": peak.cpu_seconds, "peak_bytes": peak.bytes,
                  "rows": len(rows), "first_1000_tokens": tokens, "first_1000_marks": marks}))
"""
)

OURS = (
    MEASURE
    + """
import gc
import lighten.training.rows as rows_of
from lighten.models import load_tokenizer
from lighten.recipe import Recipe
recipe = Recipe.from_values({"model_name_or_path": job["model"], "dataset": job["data"],
    "val_size": 0, "max_length": 1 << 20, "output_dir": job["cache"] + "/run"})
tokenizer = load_tokenizer(job["model"])
with Peak() as peak:
    rows = rows_of.load_rows(recipe, tokenizer)
gc.collect()
held = status("VmRSS") - peak.base
encoded = rows.train.rows
touched = int(encoded.ids.sum()) + int(encoded.supervised.sum())  # every page that is mapped
first = [encoded[place] for place in range(1000)]
print(json.dumps({"seconds": peak.seconds, "cpu_s": peak.cpu_seconds, "peak_bytes": peak.bytes,
    "rows": len(encoded), "tokens": rows.train.counts.tokens, "held_bytes": held,
    "all_touched_bytes": status("VmRSS") - peak.base,
    "first_1000_tokens": sum(len(row.input_ids) for row in first),
    "first_1000_marks": sum(row.supervised_tokens for row in first)}))
"""
)


def python() -> Path:
    """The interpreter of the environment that has `datasets`."""
    from lighten.machine.hardware import cache_folder

    return cache_folder() / ENVIRONMENT / "bin" / "python"


def set_up() -> None:
    """Make that environment."""
    folder = python().parents[1]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python()), "-m", "pip", "install", "--quiet", *PEERS], check=True)


def write_rows(path: Path, rows: int, megabytes: float) -> None:
    """Chat rows of one to three turns; the words are those of our documents, in random order."""
    documents = Path(__file__).parents[1]
    words = (documents / "README.md").read_text(encoding="utf-8").split()
    words += (documents / "docs" / "rank-study.md").read_text(encoding="utf-8").split()
    draw, size = random.Random(7), sum(map(len, words)) / len(words) + 1
    turn = megabytes * 1e6 / rows / 1.75 / size  # words of a question and its answer, on average
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages = []
            if draw.random() < 0.2:
                messages.append({"role": "system", "content": "You are a careful assistant."})
            for _ in range(draw.choice([1, 1, 2, 3])):
                for role, share in (("user", 0.35), ("assistant", 0.65)):
                    count = max(1, round(turn * share * draw.uniform(0.3, 1.7)))
                    content = " ".join(draw.choices(words, k=count))
                    messages.append({"role": role, "content": content})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def with_generation_tags(template: str) -> str:
    """SmolLM2's template, its assistant turns between the tags that `datasets` users need."""
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    if template.count(turn) != 1:
        raise ValueError("the template is not the one that this benchmark knows")
    tagged = (
        "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}" + turn + "{% endif %}"
    )
    return template.replace(turn, tagged)


def measured(code: str, job: dict[str, Any], interpreter: str, cache: Path) -> dict[str, Any]:
    """One run in a process of its own, with a cache folder of its own."""
    source = str(Path(__file__).parents[1] / "src")
    environment = {**os.environ, "HF_HOME": str(cache / "hf"), "LIGHTEN_CACHE": str(cache / "ours")}
    if interpreter == sys.executable:
        environment["PYTHONPATH"] = source
    process = subprocess.run(
        [interpreter, "-c", code, json.dumps({**job, "cache": str(cache)})],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup", action="store_true", help="make the peers' environment")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.setup:
        set_up()
        return
    if not python().is_file():
        raise SystemExit("no environment with datasets: run data_reading.py --setup first")
    before = machine.before_start()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Path(scratch), arguments.rows, arguments.repeats, cores)
    table = {name: _median(runs) for name, runs in rows.items()}
    for name, row in table.items():
        print(f"{name:28} {row['seconds']:7.2f} s {row['cpu_s']:7.2f} CPU s "
              f"{row['peak_bytes'] / 2**20:8.1f} MiB above what was held")  # fmt: skip
    first_start, second_start = table["lighten"], table["lighten, second start"]
    peer, plain = table["datasets, marks"], table["datasets, ids alone"]
    alike = all(
        first_start[key] == peer[key] for key in ("rows", "first_1000_tokens", "first_1000_marks")
    )
    figures = {
        "time_vs_datasets": first_start["seconds"] / peer["seconds"] if alike else None,
        "memory_vs_datasets": first_start["peak_bytes"] / peer["peak_bytes"] if alike else None,
        "second_start": second_start["seconds"] / peer["seconds"] if alike else None,
        "bytes_per_token": first_start["all_touched_bytes"] / first_start["tokens"],
        "bytes_per_token_after_encoding": first_start["held_bytes"] / first_start["tokens"],
        "time_vs_ids_alone": first_start["seconds"] / plain["seconds"],
        "memory_vs_ids_alone": first_start["peak_bytes"] / plain["peak_bytes"],
        "time_vs_datasets_on_each_core": first_start["seconds"]
        / table["datasets, marks, on each core"]["seconds"],
    }
    machine.store(
        "data_reading", {"rows": rows, "figures": figures, "peers": list(PEERS)}, before,
        {"fewer than 3 repeats": arguments.repeats < 3, "other rows": arguments.rows != ROWS,
         "ids or marks differ": not alike},
    )  # fmt: skip
    print(json.dumps(figures))


def measure(scratch: Path, count: int, repeats: int, cores: int) -> dict[str, list[dict[str, Any]]]:
    """Every row of the table, in turns; each run in a process of its own."""
    from lighten.models import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    tokenizer.save_pretrained(scratch / "tokenizer")
    data = scratch / "rows.jsonl"
    write_rows(data, count, MEGABYTES * count / ROWS)
    theirs: dict[str, Any] = {
        "data": str(data), "tokenizer": str(scratch / "tokenizer"), "processes": None,
        "template": with_generation_tags(str(tokenizer.chat_template)),
    }  # fmt: skip
    ours: dict[str, Any] = {"data": str(data), "model": MODEL}
    rows: dict[str, list[dict[str, Any]]] = {}
    for turn in range(repeats + 1):
        # The last turn is for the memory alone.
        theirs["watch"] = ours["watch"] = turn == repeats
        for name, settings in (
            ("datasets, marks", {"marks": True}),
            ("datasets, ids alone", {"marks": False}),
            ("datasets, marks, on each core", {"marks": True, "processes": cores}),
        ):
            with tempfile.TemporaryDirectory(dir=scratch) as cache:
                result = measured(THEIRS, {**theirs, **settings}, str(python()), Path(cache))
            rows.setdefault(name, []).append(result)
        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            for name in ("lighten", "lighten, second start"):
                result = measured(OURS, ours, sys.executable, Path(cache))
                rows.setdefault(name, []).append(result)
        print(f"turn {turn + 1} of {repeats + 1}", flush=True)
    return rows


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of the runs that nothing watched; all else of the one that was."""
    *timed, watched = runs
    seconds = {key: statistics.median(run[key] for run in timed) for key in ("seconds", "cpu_s")}
    return {**watched, **seconds}


if __name__ == "__main__":
    main()
