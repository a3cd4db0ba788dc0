"""A run as files for a phone: what each takes to make, what it keeps, and how fast it answers here.

    python benchmarks/phone.py                 # the docstring demo, trained first where it is not
    python benchmarks/phone.py --run runs/chat

`lighten export` is run as a user would, to ExecuTorch and to GGUF in 4 bits, each with its receipt;
then both files answer in their own runtimes, with this machine's processor and one after another.
Seconds and memory are those of the whole command: making the file and comparing its answers. The
table of docs/phone.md is this one's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine

FORMS = ("executorch", "gguf:q4_k_m")
PROMPT_TOKENS, ANSWER_TOKENS = 128, 33
RECIPE = Path(__file__).resolve().parents[1] / "examples" / "docstrings" / "recipe.yaml"


def exported(run: Path, form: str, folder: Path, context: int) -> dict[str, Any]:
    """`lighten export` with its receipt: what it wrote, its seconds, and the most it held."""
    words = ["export", str(run), "--as", form, "--output_dir", str(folder), "--json"]
    if form == "executorch":
        words += ["--context_tokens", str(context)]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, "-m", "lighten", *words], stdout=output)
        # Of this process and of those that it waited for, whichever held most.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    # 1: the receipt did not pass, 2: it cannot tell; both are figures too.
    if process.returncode not in (0, 1, 2):
        raise SystemExit(f"lighten {' '.join(words)} failed with exit code {process.returncode}")
    export = json.loads(text)
    return {
        "file": export["files"][0], "bytes": export["size_bytes"], "receipt": export["receipt"],
        "seconds": time.perf_counter() - began, "peak_bytes": usage.ru_maxrss * 1024,
    }  # fmt: skip


def speed_of_program(file: Path, repeats: int) -> dict[str, float]:
    """Tokens a second of ExecuTorch's runtime, and the most its process held."""
    from transformers import AutoTokenizer

    from lighten.quantization import executorch

    tokenizer = AutoTokenizer.from_pretrained(file.parent, local_files_only=True)
    with executorch.running(file, tokenizer) as program:
        ids = prompt(tokenizer)
        program.timed(ids, ANSWER_TOKENS)  # what is allocated at first is no part of it
        times = [program.timed(ids, ANSWER_TOKENS) for _ in range(repeats)]
        return {
            "prefill_tokens_per_second": len(ids)
            / statistics.median(timing["prefill_seconds"] for timing in times),
            "decode_tokens_per_second": (ANSWER_TOKENS - 1)
            / statistics.median(timing["decode_seconds"] for timing in times),
            "runtime_bytes": program.peak_bytes,
        }


def speed_of_gguf(file: Path, tokenizer: Any, repeats: int) -> dict[str, float]:
    """Tokens a second of llama.cpp, and what the file takes in memory."""
    from lighten.quantization import child

    figures = child.call(
        {"do": "measure", "name": file.name, "kind": "gguf", "folder": str(file.parent),
         "rows": [], "prompts": [], "rooms": [], "prompt": prompt(tokenizer), "store": None,
         "reference": False, "repeats": repeats}
    )  # fmt: skip
    return {
        "prefill_tokens_per_second": figures["prefill_tokens_per_second"],
        "decode_tokens_per_second": figures["decode_tokens_per_second"],
        "runtime_bytes": figures["resident_bytes"],
    }


def prompt(tokenizer: Any) -> list[int]:
    """As many ids as are read at once."""
    text = "The quick brown fox jumps over the lazy dog. " * 64
    return [int(token) for token in tokenizer(text)["input_ids"]][:PROMPT_TOKENS]


def trained(folder: Path) -> Path:
    """The demo's run, trained where it is not there yet."""
    if not (folder / "adapters").is_dir():
        subprocess.run(
            [sys.executable, "-m", "lighten", "train", str(RECIPE), "--output_dir", str(folder)],
            check=True,
        )
    return folder


def main() -> None:
    """Export, measure, print, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished run of one adapter")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the program's cache")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    before = machine.before_start()
    run = trained(arguments.run or machine.RESULTS / "trial" / "runs" / "demo")
    forms: dict[str, dict[str, Any]] = {}
    # Their processes begin as large as this one is, so nothing large is imported before them.
    with tempfile.TemporaryDirectory(prefix="lighten-phone-") as scratch:
        for form in FORMS:
            print(f"{form} ...", flush=True)
            folder = Path(scratch) / form.replace(":", "-")
            forms[form] = exported(run, form, folder, arguments.context)
        from transformers import AutoTokenizer

        program = Path(forms["executorch"]["file"])
        tokenizer = AutoTokenizer.from_pretrained(program.parent, local_files_only=True)
        forms["executorch"] |= speed_of_program(program, arguments.repeats)
        file = Path(forms["gguf:q4_k_m"]["file"])
        forms["gguf:q4_k_m"] |= speed_of_gguf(file, tokenizer, arguments.repeats)
    for form, row in forms.items():
        receipt = row["receipt"]
        print(
            f"{form:14} {row['bytes'] / 1e6:7.1f} MB, made and compared in {row['seconds']:.0f} s, "
            f"{row['peak_bytes'] / 1e9:.1f} GB; "
            f"{row['prefill_tokens_per_second']:.0f} tokens/s read, "
            f"{row['decode_tokens_per_second']:.1f} written, {row['runtime_bytes'] / 1e6:.0f} MB; "
            f"KL {receipt['mean_kl']:.3g}, {receipt['same_likeliest']:.1%} the same likeliest, "
            f"passed: {receipt['passed']}"
        )
    machine.store(
        "phone", {"forms": forms}, before, {"fewer than 3 repeats": arguments.repeats < 3}
    )
    print(json.dumps(
        {form.partition(":")[0]: {key: value for key, value in row.items() if key != "file"}
         for form, row in forms.items()}
    ))  # fmt: skip


if __name__ == "__main__":
    main()
